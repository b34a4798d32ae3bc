"""Distils a causal student on its own rollouts: DMD with a critic and a cache, and what Salt adds.

  python -m salt_jax.main --config=configs/selfforcing.py:nano
  python -m salt_jax.main --config=configs/selfforcing.py:nano,method=dmd
  python -m salt_jax.main --config=configs/selfforcing.py:nano,backbone=longlive,streaming

`nano` runs here and now, from the weights that ship with the package. Without an argument it is Wan 2.1 1.3B with the
14B teacher on a TPU slice, by the released recipe, and asks for their weights.

method=   salt      mixed steps, consistency, alignment to a denser-step reference (the default)
          mixed_sc  mixed steps and consistency
          mixed     mixed steps
          sc        eight steps and consistency; the paper reports that this alone hurts an autoregressive student
          dmd       four steps: Self Forcing
teacher=  size of the teacher above nano: 14b (the default) or 1.3b
i2v       the first frame is given, to student, teacher and critic
backbone= self_forcing, causal_forcing (another init, alignment from step 700) or longlive (window 12, sink 3)
chunk=    latent frames in a chunk; 1 is the frame-wise student
streaming LongLive's second stage: a student that is there already goes on along videos of up to 240 latent frames whose
          prompt changes once, with method=dmd (the default then) or mixed. All weights are trained, where the original
          trains LoRA of rank 256 at rates of 1e-5 and 2e-6; so the rates stay those of the first stage.
"""

from configs import base

METHODS = ('salt', 'mixed_sc', 'mixed', 'sc', 'dmd')
STREAMING_METHODS = ('dmd', 'mixed')
BACKBONES = ('self_forcing', 'causal_forcing', 'longlive')
# First step of the alignment, and how its noise is coupled, in the released recipes.
ALIGNMENT = {
  'self_forcing': (1000, 'independent'),
  'causal_forcing': (700, 'aligned_b'),
  'longlive': (1200, 'aligned_b'),
}


def get_config(arg=None):
  spec = dict(
    size=('1.3b', 'nano', '14b'),
    backbone=BACKBONES,
    chunk=3,
    teacher='',
    i2v=False,
    streaming=False,
  )
  word, arg = arg, base.parse_arg(arg, method=METHODS, **spec)
  if arg.streaming:
    arg = base.parse_arg(word, method=STREAMING_METHODS, **spec)
  nano = arg.size == 'nano'
  config = base.common(
    name=f'selfforcing-{arg.size}' + ('' if arg.method == 'salt' else f'-{arg.method}'),
    stage='selfforcing',
    size=arg.size,
    total_steps=80 if nano else 2000,
    batch=4 if nano else 64,
  )
  config.model = base.dit(arg.size)
  base.teach(config, arg.teacher, arg.i2v)
  window = dict(window=12, sink=3) if arg.backbone == 'longlive' else {}
  config.rollout = base.rollout(arg.size, chunk=arg.chunk, **window)
  config.schedule = schedule(arg.method)
  config.losses = dict(
    dmd=1.0,
    consistency=0.2 if arg.method in ('salt', 'mixed_sc', 'sc') else 0.0,
    alignment=0.1 if arg.method == 'salt' else 0.0,
  )
  config.update(base.terms(config.teacher.layers))
  config.reference.start, config.reference.coupling = ALIGNMENT[arg.backbone]
  if nano:
    config.reference.start = 0
  config.generator_every = 2 if nano else 5  # critic updates per generator update
  config.optim = dict(
    generator=base.adamw(5e-4 if nano else 2e-6, b1=0.0),
    critic=base.adamw(4e-4 if nano else 4e-7, b1=0.0),
  )
  config.ema = base.ema(config)
  if not nano and arg.backbone == 'causal_forcing':
    config.weights.init = f'weights/causal_forcing_init_{arg.size}.safetensors'
  config.data = dict(kind='captions' if nano else 'prompts', path='' if nano else 'prompts.txt')
  # At the end: judged clips of held-out images and captions, and rows of the picture.
  config.evaluate = dict(clips=16, rows=4, steps=(4, 2), teacher_steps=24, guidance=4.0)
  config.log.samples_every = 40 if nano else 0
  if arg.i2v:
    base.first_frames(config)
  if arg.streaming:
    long_videos(config)
  return config


def long_videos(config) -> None:
  """Trains a finished student on, clip by clip along streams that are longer than it was trained on."""
  config.name += '-streaming'
  config.streaming = dict(
    frames=129 if config.size == 'nano' else 240,
    new=18,
    boundary='reencoded',
    global_sink=False,
    causal=False,
  )
  config.weights.init = config.weights.student


def schedule(method: str) -> dict:
  """Step counts of a rollout, how often each is drawn, and the shift of their levels."""
  if method == 'dmd':
    return dict(steps=(4,), probs=(1.0,), shift=5.0)
  if method == 'sc':
    return dict(steps=(8,), probs=(1.0,), shift=5.0)
  return dict(steps=(8, 4, 2), probs=(0.4, 0.4, 0.2), shift=5.0)
