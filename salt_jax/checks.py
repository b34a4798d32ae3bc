"""What a config must satisfy before anything is loaded, compiled or written.

Whatever is refused here would otherwise end a run in its middle, or only when it exports and reports.
"""

import dataclasses
import math
from typing import Any

import jax
from ml_collections import ConfigDict

from salt_jax import convert
from salt_jax.diffusion.flow import TRAIN_STEPS
from salt_jax.errors import InputError

FEW_STEP = ('ode', 'causal_ode', 'causal_cd', 'selfforcing')  # stages that make a few-step student
FORCED = ('ar', 'causal_ode', 'causal_cd')  # stages that train behind clean clips
MAX_STEPS = 8  # of a student that is sampled; all step counts share one program of this length

_POSITIVE = (
  'batch',
  'total_steps',
  'text_length',
  'video.frames',
  'video.height',
  'video.width',
  'video.fps',
  'checkpoint.every',
  'checkpoint.keep',
  'log.every',
  'generator_every',
  'rollout.frames',
  'rollout.chunk',
  'schedule.steps',
  'schedule.shift',
  *(f'{dit}.{size}' for dit in ('model', 'teacher') for size in ('dim', 'heads', 'layers')),
  'pairs.count',
  'pairs.steps',
  'pairs.batch',
  'latents.count',
  'latents.batch',
  'consistency.steps',
  'data.frames',
  'evaluate.rows',
  'evaluate.steps',
  'evaluate.teacher_steps',
)
_NATURAL = (
  'seed',
  'workers',
  'ema.start',
  'rollout.sink',
  'rollout.window',
  'evaluate.clips',
  'statistics_clips',
)
_SHARES = ('ema.decay', 'text_dropout', 'rollout.context_noise', 'schedule.probs', 'forcing.noise')
_DIVIDED = (('pairs.count', 'pairs.batch'), ('latents.count', 'latents.batch'))


def check(config: ConfigDict) -> None:
  """Refuses values that no stage can work with.

  Raises:
    InputError: naming the first such value and what it may be.
  """
  _ranges(config)
  for whole, part in _DIVIDED:
    if _values(config, whole) and _values(config, whole)[0] % _values(config, part)[0]:
      raise InputError(
        f'{whole}={_values(config, whole)[0]} must be a multiple of {part}={_values(config, part)[0]}.'
      )
  if config.export_dtype not in convert.DTYPES:
    raise InputError(
      f'export_dtype={config.export_dtype} is unknown: choose one of {", ".join(convert.DTYPES)}.'
    )
  for name in ('model', 'teacher'):
    if name in config:
      _check_dit(config, name)
  if 'dmd' in config and not 0 <= config.dmd.t_min < config.dmd.t_max <= TRAIN_STEPS:
    raise InputError(
      f'dmd.t_min={config.dmd.t_min} must be below dmd.t_max={config.dmd.t_max}, both between 0 and {TRAIN_STEPS}.'
    )
  if config.stage in FEW_STEP and max(_values(config, 'evaluate.steps')) > MAX_STEPS:
    raise InputError(f'evaluate.steps={config.evaluate.steps} must not exceed {MAX_STEPS}.')
  if 'pairs' in config and config.pairs.steps % config.schedule.steps[0]:
    raise InputError(
      f"pairs.steps={config.pairs.steps} must be a multiple of the student's {config.schedule.steps[0]} steps."
    )
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
  return cls(**{key: tuple(v) if isinstance(v, list) else v for key, v in config[name].items()})


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


def _check_dit(config: ConfigDict, name: str) -> None:
  model = config[name]
  pairs = (
    ('in_channels', 'vae.z_dim', config.vae.z_dim),
    ('out_channels', 'vae.z_dim', config.vae.z_dim),
    ('text_dim', 'text.dim', config.text.dim),
    ('text_len', 'text_length', config.text_length),
  )
  for key, other, value in pairs:
    if key in model and model[key] != value:
      raise InputError(f'{name}.{key}={model[key]} must equal {other}={value}.')


def _check_causal(config: ConfigDict) -> None:
  """Causal Forcing's initial stages."""
  if config.stage in FORCED and 0 < config.rollout.window < config.rollout.frames:
    raise InputError(
      f'rollout.window={config.rollout.window} is not known to the stage {config.stage}, whose chunks see all before '
      'them: set it to 0, and the window in the stage after it.'
    )
  if 'consistency' in config and config.consistency.steps < 2:
    raise InputError(
      f'consistency.steps={config.consistency.steps} must be 2 or more, to have neighbours.'
    )
  if 'pairs' in config and 'latents' in config and config.pairs.count > config.latents.count:
    raise InputError(
      f'pairs.count={config.pairs.count} must not exceed latents.count={config.latents.count}.'
    )


def _check_clips(config: ConfigDict) -> None:
  """The nano world: its clips are square, and the VAE's are encoded four at a time."""
  video = config.video
  if config.size == 'nano' and video.height != video.width:
    raise InputError(
      f'video.height={video.height} and video.width={video.width} must be equal: the clips of nano are square.'
    )
  if 'data' in config and config.data.kind == 'clips' and (config.data.frames - 1) % 4:
    raise InputError(
      f'data.frames={config.data.frames} must be 4n + 1, such as {config.data.frames // 4 * 4 + 1}.'
    )
  if config.stage == 'vae' and config.statistics_clips % 4:
    raise InputError(f'statistics_clips={config.statistics_clips} must be a multiple of 4.')


def check_batch(batch: int, mesh: jax.sharding.Mesh) -> None:
  """Refuses a global batch that the mesh cannot split.

  Raises:
    InputError: naming a size that it can split.
  """
  shards = mesh.shape['data'] * mesh.shape['fsdp']
  if batch % shards:
    raise InputError(
      f'batch={batch} cannot be split over data x fsdp = {shards} shards; make it a multiple of {shards}.'
    )
