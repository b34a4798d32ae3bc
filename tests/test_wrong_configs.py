"""A config that cannot work is refused in one clear sentence before anything starts."""

import pytest

from configs import causal_init, pretrain, selfforcing
from salt_jax import precompute, recipe, train
from salt_jax.errors import InputError
from tests import tiny_config
from tests.commands import sentence_of

I2V = {'model.in_channels': 36, 'teacher.in_channels': 36}
NO_TERMS = {'losses.dmd': 0.0, 'losses.consistency': 0.0, 'losses.alignment': 0.0}
STAGES = {
  'streaming': lambda: selfforcing.get_config('nano,backbone=longlive,streaming'),
  'streaming_i2v': lambda: selfforcing.get_config('nano,backbone=longlive,streaming,i2v'),
  'selfforcing': lambda: selfforcing.get_config('nano'),
  'ode': lambda: causal_init.get_config('nano'),
  'ar': lambda: causal_init.get_config('nano,stage=ar'),
  'causal_ode': lambda: causal_init.get_config('nano,stage=causal_ode'),
  'causal_cd': lambda: causal_init.get_config('nano,causal_cd'),
  'vae': lambda: pretrain.get_config('vae'),
  'teacher': lambda: pretrain.get_config('teacher'),
  'tower': lambda: tiny_config.get_tower('weights'),
  'teacher_i2v': lambda: pretrain.get_config('teacher,i2v'),
}


def test_the_configs_that_ship_are_accepted():
  for stage, make in STAGES.items():
    if stage != 'streaming_i2v':
      recipe.build(make())
  for word in ('', ',streaming'):
    recipe.build(selfforcing.get_config(f'nano,chunk=1,backbone=longlive{word}'))
  assert recipe.build(selfforcing.get_config('nano,chunk=1')).chunking.chunk == 1
  for size in ('1.3b', '14b'):
    recipe.build(selfforcing.get_config(size))
    for stage in causal_init.STAGES:
      recipe.build(causal_init.get_config(f'{size},stage={stage}'))


@pytest.mark.parametrize(
  'stage, changes, sentence',
  [
    ('selfforcing', {'model.dim': 130}, 'dim 130 does not divide into 4 heads of even width.'),
    ('selfforcing', {'size': 'foo'}, 'size=foo is unknown: choose one of nano, 1.3b, 14b.'),
    ('selfforcing', {'model.ffn_dim': 0}, 'model.ffn_dim=0 must be positive.'),
    ('selfforcing', {'model.heads': 0}, 'model.heads=0 must be positive.'),
    (
      'selfforcing',
      {'model.in_channels': 4},
      'model.in_channels=4 must equal vae.z_dim=16, or 36 for I2V.',
    ),
    (
      'selfforcing',
      {'model.in_channels': 36},
      'teacher.in_channels=16 must equal model.in_channels=36: both are',
    ),
    (
      'selfforcing',
      I2V,
      'data.kind=captions does not fit model.in_channels=36: choose clips, which have a first',
    ),
    (
      'selfforcing',
      I2V | {'data.kind': 'clips'},
      'no section "latents": set latents.count and latents.batch',
    ),
    (
      'selfforcing',
      {'data.kind': 'clips'},
      'data.kind=clips does not fit model.in_channels=16: choose captions or',
    ),
    (
      'selfforcing',
      I2V | {'size': '14b'},
      'has no clips to take first frames from: set data.kind=store',
    ),
    (
      'selfforcing',
      {'data.kind': 'store'},
      'data.kind=store does not fit model.in_channels=16: choose captions or',
    ),
    (
      'selfforcing',
      {'model.image_dim': 1280},
      'model.image_dim=1280 wants the rows of a CLIP tower: give the config',
    ),
    (
      'tower',
      {'model.image_dim': 20},
      'model.image_dim=20 must equal 24, the width of the CLIP tower.',
    ),
    (
      'tower',
      {'teacher.image_len': 20},
      'teacher.image_len=20 must equal 10, the rows for one picture of the CLIP',
    ),
    (
      'tower',
      {'teacher.image_dim': 0},
      'teacher.image_dim=0 must equal model.image_dim=24: both are given rows of',
    ),
    (
      'tower',
      {'model.image_positions': True, 'model.image_len': 20},
      'teacher.image_positions=False must equal model.image_positions=True: both are',
    ),
    (
      'tower',
      {'model.in_channels': 16},
      'model.image_dim=24 is of image-to-video: set model.in_channels for given',
    ),
    (
      'tower',
      {'weights.clip': ''},
      'model.image_dim=24 wants the rows of a CLIP tower: give the config a section',
    ),
    ('selfforcing', {'model.out_channels': 8}, 'model.out_channels=8 must equal vae.z_dim=16.'),
    ('selfforcing', {'teacher.text_dim': 32}, 'teacher.text_dim=32 must equal text.dim=64.'),
    ('selfforcing', {'text.heads': 3}, 'dim_attn 64 does not divide into 3 heads.'),
    ('selfforcing', {'rollout.chunk': 4}, '21 latent frames do not divide into chunks of 4.'),
    ('selfforcing', {'rollout.chunk': 0}, 'rollout.chunk=0 must be positive.'),
    (
      'selfforcing',
      {'rollout.frames': 18},
      'rollout.frames=18 but video.frames=81 make 21 latent frames.',
    ),
    (
      'selfforcing',
      {'rollout.window': 3},
      'window 3 is too short: it must exceed sink 0 + chunk 3.',
    ),
    (
      'selfforcing',
      {'rollout.window': 6, 'rollout.sink': 3},
      'window 6 is too short: it must exceed sink 3',
    ),
    (
      'selfforcing',
      {'rollout.sink': 3},
      'rollout.sink=3 stays in a window, and there is none: set rollout.window, or rollout.sink=0.',
    ),
    (
      'selfforcing',
      {'rollout.window': 22, 'rollout.sink': 20},
      'window 22 is too short: it must exceed sink 20 + chunk 3.',
    ),
    ('selfforcing', {'rollout.mode': 'ddim'}, 'rollout mode "ddim" is unknown: choose sde or ode.'),
    ('selfforcing', {'video.frames': 80}, 'video.frames=80 must be 4n + 1, such as 81.'),
    (
      'selfforcing',
      {'video.height': 72, 'video.width': 72},
      'video.height=72 must be a multiple of 16.',
    ),
    ('selfforcing', {'video.width': 32}, 'video.height=64 and video.width=32 must be equal'),
    (
      'selfforcing',
      {'schedule.probs': (0.4, 0.4, 0.1)},
      'schedule.probs (0.4, 0.4, 0.1) must be positive and sum to',
    ),
    ('selfforcing', {'schedule.probs': (1.5, -0.5)}, 'schedule.probs=1.5 must be between 0 and 1.'),
    ('selfforcing', {'schedule.probs': (0.5, 0.5)}, 'schedule.probs (0.5, 0.5) differ in length.'),
    (
      'selfforcing',
      {'schedule.steps': (4, 4, 2), 'triples.steps': (4,)},
      'names a step count twice.',
    ),
    (
      'selfforcing',
      {'schedule.steps': (6, 4, 2)},
      'triples.steps names 8 steps, but schedule.steps has (6, 4, 2)',
    ),
    (
      'selfforcing',
      {'triples.segments': 3},
      'triples.segments=3 puts boundaries off the grid of 8 steps',
    ),
    ('selfforcing', {'triples.segments': 0}, 'triples.segments=0 must be positive.'),
    (
      'selfforcing',
      {'reference.map': ((3, (6,)),)},
      'reference.map names 3 steps, but schedule.steps has (8, 4, 2)',
    ),
    (
      'selfforcing',
      {'reference.map': ((2, (3,)),)},
      'reference.map: 3 steps are no denser form of 2; take a multiple',
    ),
    ('selfforcing', {'reference.map': ()}, 'reference.map () must hold pairs of a step count and'),
    (
      'selfforcing',
      {'reference.map': ((2, 4),)},
      'reference.map ((2, 4),) must hold pairs of a step count and its references, such as',
    ),
    ('selfforcing', {'reference.map': ((2, ()),)}, 'reference.map ((2, ()),) must hold pairs of'),
    (
      'selfforcing',
      {'reference.map': ((2, (4,)), (2, (8,)))},
      'reference.map ((2, (4,)), (2, (8,))) names a step count twice',
    ),
    (
      'selfforcing',
      {'alignment.t_min': 990.0},
      'alignment.t_min=990.0 must be below alignment.t_max=980.0, both in 0 to 1000.',
    ),
    (
      'selfforcing',
      {'reference.coupling': 'b'},
      'reference.coupling=b is unknown: choose one of aligned_b,',
    ),
    (
      'selfforcing',
      {'alignment.layer': 6},
      'alignment.layer=6 is not in the teacher, whose 6 blocks count from 0',
    ),
    (
      'selfforcing',
      {'alignment.kind': 'x'},
      'alignment.kind=x is unknown: choose one of relations, mmd, latents.',
    ),
    (
      'selfforcing',
      {'consistency.form': 'x'},
      'consistency.form=x is unknown: choose one of endpoint, velocity, x0.',
    ),
    (
      'selfforcing',
      {'rollout.chunk': 21},
      'losses.alignment needs a causal student: set rollout.chunk below',
    ),
    ('selfforcing', {'losses.dmd': -1.0}, 'losses.dmd=-1.0 must be zero or positive.'),
    (
      'selfforcing',
      NO_TERMS,
      'losses has no term with a weight above 0; give one, such as losses.dmd=1.0.',
    ),
    ('selfforcing', {'schedule.steps': ('abc',)}, 'schedule.steps=abc must be a number, positive.'),
    ('selfforcing', {'evaluate.steps': (4, 9)}, 'evaluate.steps=(4, 9) must not exceed 8.'),
    (
      'selfforcing',
      {'export_dtype': 'float8'},
      'export_dtype=float8 is unknown: choose one of float32, ',
    ),
    (
      'selfforcing',
      {'model.dtype': 'float8'},
      'model.dtype=float8 is unknown: choose one of float32, ',
    ),
    ('vae', {'vae.dtype': 'double'}, 'vae.dtype=double is unknown: choose one of float32, '),
    ('selfforcing', {'log.every': 0}, 'log.every=0 must be positive.'),
    ('selfforcing', {'log.samples': 0}, 'log.samples=0 must be positive.'),
    ('selfforcing', {'log.samples_every': -1}, 'log.samples_every=-1 must be zero or positive.'),
    (
      'selfforcing',
      {'log.samples_every': 9, 'data.kind': 'text_store'},
      'data.kind=text_store leaves the encoder',
    ),
    ('vae', {'log.samples_every': 9}, 'the stage "vae" does not train: set it to 0.'),
    ('selfforcing', {'generator_every': 0}, 'generator_every=0 must be positive.'),
    ('selfforcing', {'dmd.t_min': 990.0}, 'dmd.t_min=990.0 must be below dmd.t_max=980.0'),
    ('selfforcing', {'ema.decay': 1.5}, 'ema.decay=1.5 must be between 0 and 1.'),
    (
      'selfforcing',
      {'optim.critic.lr': float('nan')},
      'optim.critic.lr=nan must be a number, zero or positive.',
    ),
    ('teacher', {'optim.text.lr': -1.0}, 'optim.text.lr=-1.0 must be zero or positive.'),
    (
      'selfforcing',
      {'optim.generator.b1': 1.0},
      'optim.generator.b1=1.0 must be zero or positive, and below 1.',
    ),
    ('selfforcing', {'dmd.guidance': float('inf')}, 'dmd.guidance=inf must be a number, zero or'),
    ('selfforcing', {'dmd.shift': 0.0}, 'dmd.shift=0.0 must be positive.'),
    (
      'selfforcing',
      {'optim.critic.clip': 0.0},
      'clip=0.0: the largest gradient norm must be positive.',
    ),
    (
      'selfforcing',
      {'optim.critic.schedule': 'step'},
      "schedule 'step' is unknown; use 'constant' or 'cosine'.",
    ),
    (
      'streaming',
      {'data.kind': 'text_store'},
      'data.kind=text_store does not fit streaming, which encodes the prompt',
    ),
    (
      'streaming',
      {'rollout.window': 0},
      'rollout.window=0 must be between 1 and rollout.frames=21 for streaming',
    ),
    (
      'streaming',
      {'rollout.window': 24},
      'which recaches that many frames: choose backbone=longlive.',
    ),
    (
      'streaming',
      {'streaming.new': 17},
      'streaming.new=17 must be a multiple of rollout.chunk=3 below rollout.frames',
    ),
    (
      'streaming',
      {'streaming.new': 21},
      'streaming.new=21 must be a multiple of rollout.chunk=3 below rollout.frames',
    ),
    ('streaming', {'streaming.new': 0}, 'streaming.new=0 must be positive.'),
    (
      'streaming',
      {'streaming.frames': 38},
      'streaming.frames=38 must be at least rollout.frames + streaming.new = 39',
    ),
    (
      'streaming',
      {'streaming.frames': 5000},
      'streaming.frames=5000 must be at least rollout.frames + streaming.new',
    ),
    (
      'streaming',
      {'streaming.boundary': 'x'},
      'streaming.boundary=x is unknown: choose one of reencoded, latent.',
    ),
    (
      'streaming',
      {'streaming.causal': True, 'rollout.window': 10},
      'make rollout.window=10 a multiple of 3.',
    ),
    (
      'streaming',
      {'streaming.causal': True, 'streaming.global_sink': True, 'rollout.sink': 2},
      'make rollout.window=12 but for the sink of 2 a multiple of 3.',
    ),
    (
      'streaming',
      {'losses.consistency': 0.2},
      'losses.consistency=0.2 does not go with streaming, which trains with',
    ),
    (
      'streaming',
      {'losses.alignment': 0.1},
      'losses.alignment=0.1 does not go with streaming, which trains with DMD',
    ),
    (
      'streaming_i2v',
      {},
      'model.in_channels=36: streaming has no image-to-video form; give text alone.',
    ),
    ('ode', {'pairs.steps': 50}, "pairs.steps=50 must be a multiple of the student's 4 steps."),
    ('ode', {'pairs.count': 100}, 'pairs.count=100 must be a multiple of pairs.batch=64.'),
    (
      'ar',
      {'forcing.context': 'noise'},
      'forcing.context=noise is unknown: choose one of teacher, diffusion.',
    ),
    ('ar', {'forcing.noise': 1.5}, 'forcing.noise=1.5 must be between 0 and 1.'),
    (
      'ar',
      {'forcing.noise': 0.1, 'forcing.context': 'diffusion'},
      'forcing.noise=0.1 needs forcing.context=teacher',
    ),
    (
      'ar',
      {'rollout.window': 9},
      'rollout.window=9 is not known to the stage ar, whose chunks see all before them',
    ),
    ('ar', {'latents.count': 100}, 'latents.count=100 must be a multiple of latents.batch=64.'),
    ('causal_ode', {'pairs.count': 8192}, 'pairs.count=8192 must not exceed latents.count=4096.'),
    ('causal_ode', {'rollout.window': 9}, 'rollout.window=9 is not known to the stage causal_ode'),
    (
      'causal_cd',
      {'causal_consistency.steps': 1},
      'causal_consistency.steps=1 must be 2 or more, to have neighbours.',
    ),
    ('causal_cd', {'evaluate.steps': (4, 9)}, 'evaluate.steps=(4, 9) must not exceed 8.'),
    (
      'teacher',
      {'latents.count': 100},
      'latents.count=100 must be a multiple of latents.batch=64.',
    ),
    (
      'teacher',
      {'optim.dit.warmup': 100, 'optim.dit.total': 100},
      'leaves nothing after warmup=100; raise total or lower warmup.',
    ),
    (
      'vae',
      {'accumulate': 2},
      'accumulate=2 does not fit: the stage "vae" draws one noise for its whole batch. Set it to 1.',
    ),
    (
      'streaming',
      {'accumulate': 2},
      'accumulate=2 does not fit: streaming carries the cache of its whole batch from step to step.',
    ),
    (
      'selfforcing',
      {'accumulate': 8},
      'batch=4 cannot be taken in accumulate=8 parts: make that a divisor.',
    ),
    ('selfforcing', {'accumulate': 0}, 'accumulate=0 must be positive.'),
    ('vae', {'data.frames': 20}, 'data.frames=20 must be 4n + 1, such as 21.'),
    ('vae', {'statistics_clips': 6}, 'statistics_clips=6 must be a multiple of 4.'),
  ],
)
def test_values_that_do_not_fit_are_refused_before_anything_starts(
  stage, changes, sentence, tmp_path, monkeypatch
):
  # What is not refused ends here, and trains nothing.
  monkeypatch.setattr(precompute, 'fill', lambda *_: pytest.fail('it computes clips'))
  monkeypatch.setattr(train, '_checkpoints', lambda *_: pytest.fail('it trains'))
  config = STAGES[stage]()
  config.update_from_flattened_dict(changes)
  with pytest.raises(InputError) as error:
    train.run(config, str(tmp_path / 'run'))
  assert sentence in sentence_of(error)
  assert not (tmp_path / 'run').exists()


def test_sections_of_another_version_are_named():
  config = selfforcing.get_config('nano')
  config.model.depth = 3
  with pytest.raises(InputError, match='section "model" has the unknown depth.'):
    recipe.build(config)
  del config.model.depth, config.text.layers
  with pytest.raises(InputError, match='section "text" lacks the layers.'):
    recipe.build(config)
