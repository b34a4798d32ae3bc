"""What a config must satisfy before anything is loaded, compiled or written.

Whatever is refused here would otherwise end a run in its middle, or only when it exports and reports.
"""

import dataclasses
import math
from typing import Any

from ml_collections import ConfigDict

from salt_jax import convert, splits
from salt_jax.diffusion.conditioning import FOLD
from salt_jax.diffusion.draws import ReferenceConfig
from salt_jax.diffusion.flow import TRAIN_STEPS
from salt_jax.errors import InputError
from salt_jax.models import rope
from salt_jax.models.clip import ClipConfig

STAGES = ('vae', 'flow', 'ode', 'ar', 'causal_ode', 'causal_cd', 'selfforcing')
FEW_STEP = ('ode', 'causal_ode', 'causal_cd', 'selfforcing')  # stages that make a few-step student
FORCED = ('ar', 'causal_ode', 'causal_cd')  # stages that train behind clean clips
SIZES = ('nano', '1.3b', '14b')
MAX_STEPS = 8  # of a student that is sampled; all step counts share one program of this length


def _of_optimizers(*fields: str) -> tuple[str, ...]:
  networks = ('generator', 'critic', 'vae', 'dit', 'text')
  return tuple(f'optim.{name}.{field}' for name in networks for field in fields)


_POSITIVE = (
  'batch',
  'accumulate',
  'total_steps',
  'text_length',
  'video.frames',
  'video.height',
  'video.width',
  'video.fps',
  'checkpoint.every',
  'checkpoint.keep',
  'log.every',
  'log.samples',
  'generator_every',
  'rollout.frames',
  'rollout.chunk',
  'schedule.steps',
  'schedule.shift',
  'triples.segments',
  *(
    f'{dit}.{size}'
    for dit in ('model', 'teacher')
    for size in ('dim', 'ffn_dim', 'heads', 'layers')
  ),
  'pairs.count',
  'pairs.steps',
  'pairs.batch',
  'latents.count',
  'latents.batch',
  'causal_consistency.steps',
  'streaming.frames',
  'streaming.new',
  'data.frames',
  'evaluate.rows',
  'evaluate.steps',
  'evaluate.teacher_steps',
  'evaluate.shift',
  'dmd.shift',
  'alignment.shift',
  'flow_shift',
  *_of_optimizers('eps'),
)
_NATURAL = (
  'seed',
  'workers',
  'ema.start',
  'rollout.sink',
  'rollout.window',
  'evaluate.clips',
  'log.samples_every',
  'statistics_clips',
  'losses.dmd',
  'losses.consistency',
  'losses.alignment',
  'consistency.warmup',
  'triples.candidates',
  'triples.first_step',
  'triples.last_step',
  'reference.start',
  'alignment.layer',
  'alignment.margin',
  'dmd.guidance',
  'evaluate.guidance',
  'pairs.guidance',
  'causal_consistency.guidance',
  'l1_weight',
  'kl_weight',
  *_of_optimizers('lr', 'weight_decay', 'warmup', 'total'),
)
_SHARES = ('ema.decay', 'text_dropout', 'rollout.context_noise', 'schedule.probs', 'forcing.noise')
_MOMENTS = _of_optimizers('b1', 'b2')  # at 1 the correction for their start divides by 0
_DIVIDED = (('pairs.count', 'pairs.batch'), ('latents.count', 'latents.batch'))


def check(config: ConfigDict) -> None:
  """Refuses values that no stage can work with.

  Raises:
    InputError: naming the first such value and what it may be.
  """
  if config.size not in SIZES:
    raise InputError(f'size={config.size} is unknown: choose one of {", ".join(SIZES)}.')
  if config.stage not in STAGES:
    raise InputError(f'stage={config.stage} is unknown: choose one of {", ".join(STAGES)}.')
  _ranges(config)
  for whole, part in _DIVIDED:
    if _values(config, whole) and _values(config, whole)[0] % _values(config, part)[0]:
      raise InputError(
        f'{whole}={_values(config, whole)[0]} must be a multiple of {part}={_values(config, part)[0]}.'
      )
  _dtypes(config)
  for name in ('model', 'teacher'):
    if name in config:
      _check_dit(config, name)
  if 'model' in config:
    _check_first_frames(config)
  if 'dmd' in config and not 0 <= config.dmd.t_min < config.dmd.t_max <= TRAIN_STEPS:
    raise InputError(
      f'dmd.t_min={config.dmd.t_min} must be below dmd.t_max={config.dmd.t_max}, both between 0 and {TRAIN_STEPS}.'
    )
  if 'streaming' in config:
    _check_streaming(config)
  if 'losses' in config:
    _check_terms(config)
  if 'rollout' in config and config.rollout.sink and not config.rollout.window:
    raise InputError(
      f'rollout.sink={config.rollout.sink} stays in a window, and there is none: set rollout.window, or rollout.sink=0.'
    )
  if config.stage in FEW_STEP and max(_values(config, 'evaluate.steps')) > MAX_STEPS:
    raise InputError(f'evaluate.steps={config.evaluate.steps} must not exceed {MAX_STEPS}.')
  if 'pairs' in config and config.pairs.steps % config.schedule.steps[0]:
    raise InputError(
      f"pairs.steps={config.pairs.steps} must be a multiple of the student's {config.schedule.steps[0]} steps."
    )
  if any(_values(config, 'log.samples_every')):
    _check_samples(config)
  splits.check_parts(config)
  _check_causal(config)
  _check_clips(config)


def section(cls: type, config: ConfigDict, name: str) -> Any:
  """Makes a dataclass of the config's section `name`.

  Raises:
    InputError: the section is missing, lacks a field, or has one that is unknown.
  """
  if name not in config:
    raise InputError(f'the config has no section "{name}"; take it from a config of this version.')
  fields = dataclasses.fields(cls)
  given, known = set(config[name]), {field.name for field in fields}
  needed = {field.name for field in fields if field.default is dataclasses.MISSING}
  for word, keys in (('has the unknown', given - known), ('lacks the', needed - given)):
    if keys:
      raise InputError(f'the config section "{name}" {word} {", ".join(sorted(keys))}.')
  return cls(**{key: _tuples(v) for key, v in config[name].items()})


def _tuples(value: Any) -> Any:
  """Lists, which is what tuples become in a file, as tuples again."""
  return tuple(_tuples(v) for v in value) if isinstance(value, list | tuple) else value


def _values(config: ConfigDict, path: str) -> tuple:
  """The numbers at a dotted path: none where this stage has no such key, several for a tuple."""
  node = config
  for key in path.split('.'):
    if key not in node:
      return ()
    node = node[key]
  return tuple(node) if isinstance(node, tuple | list) else (node,)


def _ranges(config: ConfigDict) -> None:
  tests = (
    (_POSITIVE, 'positive', lambda x: x > 0),
    (_NATURAL, 'zero or positive', lambda x: x >= 0),
    (_SHARES, 'between 0 and 1', lambda x: 0 <= x <= 1),
    (_MOMENTS, 'zero or positive, and below 1', lambda x: 0 <= x < 1),
  )
  for paths, words, holds in tests:
    for path in paths:
      for value in _values(config, path):
        number = isinstance(value, int | float) and math.isfinite(value)
        if not number or not holds(value):
          raise InputError(f'{path}={value} must be {"" if number else "a number, "}{words}.')
  for value in (v for path in ('schedule.steps', 'evaluate.steps') for v in _values(config, path)):
    if not isinstance(value, int):
      raise InputError(f'{value} in schedule.steps or evaluate.steps must be a whole number.')


def _dtypes(config: ConfigDict) -> None:
  networks = ('model', 'teacher', 'vae', 'text', 'clip')
  for path in ('export_dtype', *(f'{name}.dtype' for name in networks)):
    for value in _values(config, path):
      if value not in convert.DTYPES:
        known = ', '.join(convert.DTYPES)
        raise InputError(f'{path}={value} is unknown: choose one of {known}.')


def _check_samples(config: ConfigDict) -> None:
  """Refuses samples during training that its stage, its student or its texts cannot give."""
  if config.stage not in FEW_STEP:
    why = f'needs a few-step student, which the stage "{config.stage}" does not train'
  elif config.model.in_channels > config.vae.z_dim:
    why = 'samples captions alone, and this student is given first frames'
  elif config.data.kind == 'text_store':
    why = 'samples captions, and data.kind=text_store leaves the encoder away'
  else:
    return
  raise InputError(f'log.samples_every={config.log.samples_every} {why}: set it to 0.')


def _check_dit(config: ConfigDict, name: str) -> None:
  model = config[name]
  pairs = (
    ('out_channels', 'vae.z_dim', config.vae.z_dim),
    ('text_dim', 'text.dim', config.text.dim),
    ('text_len', 'text_length', config.text_length),
  )
  for key, other, value in pairs:
    if key in model and model[key] != value:
      raise InputError(f'{name}.{key}={model[key]} must equal {other}={value}.')
  latent = config.vae.z_dim
  image_to_video = latent + FOLD + latent
  if model.in_channels not in (latent, image_to_video):
    raise InputError(
      f'{name}.in_channels={model.in_channels} must equal vae.z_dim={latent}, or {image_to_video} for I2V.'
    )
  if any(_values(config, f'{name}.image_dim')):
    _check_tower(config, name)


def _check_tower(config: ConfigDict, name: str) -> None:
  """A DiT with an image branch: the tower that its rows come from."""
  model = config[name]
  if 'clip' not in config or not any(_values(config, 'weights.clip')):
    raise InputError(
      f'{name}.image_dim={model.image_dim} wants the rows of a CLIP tower: give the config a section "clip", and its '
      'file as weights.clip.'
    )
  tower = section(ClipConfig, config, 'clip')
  two = any(_values(config, f'{name}.image_positions'))
  for key, value, words in (
    ('image_dim', tower.dim, 'the width'),
    (
      'image_len',
      tower.rows * (1 + two),
      f'the rows for {"two pictures" if two else "one picture"}',
    ),
  ):
    if key in model and model[key] != value:
      raise InputError(f'{name}.{key}={model[key]} must equal {value}, {words} of the CLIP tower.')
  if model.in_channels == config.vae.z_dim:
    raise InputError(
      f'{name}.image_dim={model.image_dim} is of image-to-video: set {name}.in_channels for given frames too.'
    )


def _check_first_frames(config: ConfigDict) -> None:
  """All networks of a stage are given first frames, or none is; and the data must have them."""
  model, z_dim = config.model, config.vae.z_dim
  if 'teacher' in config and config.teacher.in_channels != model.in_channels:
    raise InputError(
      f'teacher.in_channels={config.teacher.in_channels} must equal model.in_channels={model.in_channels}: '
      'both are given first frames, or neither.'
    )
  towers = [sum(_values(config, f'{name}.image_dim')) for name in ('teacher', 'model')]
  if 'teacher' in config and towers[0] != towers[1]:
    raise InputError(
      f'teacher.image_dim={towers[0]} must equal model.image_dim={towers[1]}: both are given rows of the CLIP tower, '
      'or neither.'
    )
  positions = [any(_values(config, f'{name}.image_positions')) for name in ('teacher', 'model')]
  if 'teacher' in config and positions[0] != positions[1]:
    raise InputError(
      f'teacher.image_positions={positions[0]} must equal model.image_positions={positions[1]}: both are given the '
      'last frame besides the first, or neither.'
    )
  kind, wanted = config.data.kind, model.in_channels > z_dim
  if wanted and config.size != 'nano' and kind != 'store':
    raise InputError(
      f'{config.name} has no clips to take first frames from: set data.kind=store, and data.path to what '
      'salt_jax.precompute makes of pictures and prompts.'
    )
  if config.stage == 'selfforcing' and (kind in ('clips', 'store')) != wanted:
    kinds = 'clips, which have a first frame' if wanted else 'captions or prompts'
    raise InputError(
      f'data.kind={kind} does not fit model.in_channels={model.in_channels}: choose {kinds}.'
    )
  if config.stage == 'selfforcing' and kind == 'clips' and 'latents' not in config:
    raise InputError(
      'the config has no section "latents": set latents.count and latents.batch, clips whose first frames are encoded.'
    )


def _check_terms(config: ConfigDict) -> None:
  """The loss terms: known, at least one, and each with a schedule on which it can be active."""
  known = ('dmd', 'consistency', 'alignment')
  for name in config.losses:
    if name not in known:
      raise InputError(f'losses.{name} is unknown: choose from {", ".join(known)}.')
  if not any(config.losses.values()):
    raise InputError('losses has no term with a weight above 0; give one, such as losses.dmd=1.0.')
  steps = _values(config, 'schedule.steps')
  if config.losses.get('consistency', 0):
    for k in _values(config, 'triples.steps'):
      _check_known_steps('triples.steps', k, steps)
      if k % config.triples.segments:
        raise InputError(
          f'triples.segments={config.triples.segments} puts boundaries off the grid of {k} steps: '
          f'choose a divisor of {k}.'
        )
  if config.losses.get('alignment', 0):
    section(ReferenceConfig, config, 'reference')
    for k, _ in config.reference.map:
      _check_known_steps('reference.map', k, steps)
    if config.rollout.chunk == config.rollout.frames:
      raise InputError(
        'losses.alignment needs a causal student: set rollout.chunk below rollout.frames, or losses.alignment=0.'
      )
    network = 'teacher' if config.alignment.network == 'teacher' else 'model'
    if config.alignment.layer >= config[network].layers:
      raise InputError(
        f'alignment.layer={config.alignment.layer} is not in the {config.alignment.network}, whose '
        f'{config[network].layers} blocks count from 0; half depth is {config[network].layers // 2}.'
      )


def _check_known_steps(key: str, k: int, steps: tuple) -> None:
  if k not in steps:
    raise InputError(
      f'{key} names {k} steps, but schedule.steps has {steps}: add {k} there or drop it.'
    )


def _check_causal(config: ConfigDict) -> None:
  """Causal Forcing's initial stages."""
  if config.stage in FORCED and 0 < config.rollout.window < config.rollout.frames:
    raise InputError(
      f'rollout.window={config.rollout.window} is not known to the stage {config.stage}, whose chunks see all before '
      'them: set it to 0, and the window in the stage after it.'
    )
  if 'causal_consistency' in config and config.causal_consistency.steps < 2:
    raise InputError(
      f'causal_consistency.steps={config.causal_consistency.steps} must be 2 or more, to have neighbours.'
    )
  if 'pairs' in config and 'latents' in config and config.pairs.count > config.latents.count:
    raise InputError(
      f'pairs.count={config.pairs.count} must not exceed latents.count={config.latents.count}.'
    )


def _check_streaming(config: ConfigDict) -> None:
  """Long videos: a cache that does not grow, clips that follow each other, and the one loss that knows masks."""
  roll, new, frames = config.rollout, config.streaming.new, config.streaming.frames
  if config.data.kind == 'text_store':
    raise InputError(
      'data.kind=text_store does not fit streaming, which encodes the prompt that it switches to: choose prompts.'
    )
  if not 0 < roll.window <= roll.frames:
    raise InputError(
      f'rollout.window={roll.window} must be between 1 and rollout.frames={roll.frames} for streaming, which '
      'recaches that many frames: choose backbone=longlive.'
    )
  if new >= roll.frames or new % roll.chunk:
    raise InputError(
      f'streaming.new={new} must be a multiple of rollout.chunk={roll.chunk} below rollout.frames={roll.frames}.'
    )
  if not roll.frames + new <= frames <= rope.MAX_FRAMES:
    raise InputError(
      f'streaming.frames={frames} must be at least rollout.frames + streaming.new = {roll.frames + new}, and at most '
      f'the {rope.MAX_FRAMES} positions of RoPE.'
    )
  sink = roll.sink if config.streaming.global_sink else 0
  if config.streaming.causal and (roll.window - sink) % roll.chunk:
    behind = f' but for the sink of {sink}' if sink else ''
    raise InputError(
      f'streaming.causal recaches whole chunks: make rollout.window={roll.window}{behind} a multiple of {roll.chunk}.'
    )
  for name in ('consistency', 'alignment'):
    if config.losses[name]:
      raise InputError(
        f'losses.{name}={config.losses[name]} does not go with streaming, which trains with DMD alone: set it to 0.'
      )
  if config.model.in_channels > config.vae.z_dim:
    raise InputError(
      f'model.in_channels={config.model.in_channels}: streaming has no image-to-video form; give text alone.'
    )


def _check_clips(config: ConfigDict) -> None:
  """The nano world: its clips are square, and the VAE's are encoded four at a time."""
  video = config.video
  if config.size == 'nano' and video.height != video.width:
    raise InputError(
      f'video.height={video.height} and video.width={video.width} must be equal: the clips of nano are square.'
    )
  if any((frames - 1) % 4 for frames in _values(config, 'data.frames')):
    raise InputError(
      f'data.frames={config.data.frames} must be 4n + 1, such as {config.data.frames // 4 * 4 + 1}.'
    )
  if config.stage == 'vae' and config.statistics_clips % 4:
    raise InputError(f'statistics_clips={config.statistics_clips} must be a multiple of 4.')
