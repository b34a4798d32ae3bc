"""From a ConfigDict to the frozen dataclasses that steps and samplers work with.

Here and nowhere else are config fields read by name, so an unknown or missing one fails at start.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from salt_jax import splits
from salt_jax.checks import check, section
from salt_jax.diffusion import draws, flow
from salt_jax.diffusion.draws import ReferenceConfig, Schedule, TripleConfig
from salt_jax.diffusion.rollout import Chunking, Plan, student_plan
from salt_jax.diffusion.streaming import StreamingConfig
from salt_jax.errors import InputError
from salt_jax.losses.alignment import AlignmentConfig
from salt_jax.losses.causal import CausalConsistencyConfig, ForcingConfig
from salt_jax.losses.consistency import ConsistencyConfig
from salt_jax.losses.dmd import DMDConfig
from salt_jax.models import attention
from salt_jax.models.cache import slots_needed
from salt_jax.models.clip import ClipConfig
from salt_jax.models.text import TextConfig
from salt_jax.models.vae import VAEConfig
from salt_jax.models.wan import PATCH, WanConfig
from salt_jax.optim import make_optimizer

SPACE, TIME = 8, 4  # compression of the VAE


@dataclasses.dataclass(frozen=True)
class Recipe:
  """What is static in a stage. A field that a stage does not have is None."""

  seed: int
  vae: VAEConfig
  text: TextConfig
  text_length: int
  optimizers: Mapping
  ema_decay: float
  ema_start: int
  accumulate: int = 1  # parts of a batch that a step takes one after another
  clip: ClipConfig | None = None
  model: WanConfig | None = None
  teacher: WanConfig | None = None
  chunking: Chunking | None = None
  schedule: Schedule | None = None
  losses: Mapping | None = None
  generator_every: int | None = None
  streaming: StreamingConfig | None = None
  dmd: DMDConfig | None = None
  consistency: ConsistencyConfig | None = None
  triples: TripleConfig | None = None
  alignment: AlignmentConfig | None = None
  reference: ReferenceConfig | None = None
  forcing: ForcingConfig | None = None
  causal_consistency: CausalConsistencyConfig | None = None
  l1_weight: float | None = None
  kl_weight: float | None = None
  text_dropout: float | None = None
  flow_shift: float | None = None


def build(config: ConfigDict, device: tuple[str, str] | None = None) -> Recipe:
  """Reads a stage's config.

  Args:
    config: the whole experiment.
    device: (platform, kind) that it is for, such as ('tpu', 'TPU v5'); by default those of this machine.

  Raises:
    InputError: for sizes that do not fit each other, or attention that cannot run on the device.
  """
  check(config)
  fields = dict(
    seed=config.seed,
    vae=section(VAEConfig, config, 'vae'),
    text=section(TextConfig, config, 'text'),
    text_length=config.text_length,
    optimizers={name: make_optimizer(cfg) for name, cfg in config.optim.items()},
    ema_decay=config.ema.decay,
    ema_start=config.ema.start,
    accumulate=splits.parts(config),
  )
  if 'model' in config:
    fields['model'] = _dit(config, 'model', device)
    if fields['model'].image_dim:
      fields['clip'] = section(ClipConfig, config, 'clip')
  if 'teacher' in config:
    fields['teacher'] = _dit(config, 'teacher', device)
  if 'rollout' in config:
    fields['chunking'] = chunking(config)
    fields['schedule'] = section(Schedule, config, 'schedule')
  if 'losses' in config:
    fields |= _terms(config)
  for name, cls in (
    ('forcing', ForcingConfig),
    ('causal_consistency', CausalConsistencyConfig),
    ('streaming', StreamingConfig),
  ):
    if name in config:
      fields[name] = section(cls, config, name)
  for name in ('generator_every', 'l1_weight', 'kl_weight', 'text_dropout', 'flow_shift'):
    if name in config:
      fields[name] = config[name]
  return Recipe(**fields)


def _dit(config: ConfigDict, name: str, device: tuple[str, str] | None) -> WanConfig:
  """A DiT with the attention that its config's word means on the device."""
  cfg = section(WanConfig, config, name)
  platform, kind = device or (jax.default_backend(), jax.devices()[0].device_kind)
  kernel, blocks = attention.choose(cfg.attention, platform, kind, cfg.attention_blocks)
  return dataclasses.replace(cfg, attention=kernel, attention_blocks=blocks)


def _terms(config: ConfigDict) -> dict:
  """The loss terms whose weight is not zero, and what they need."""
  losses = {name: weight for name, weight in config.losses.items() if weight}
  fields = {'losses': losses, 'dmd': section(DMDConfig, config, 'dmd')}
  if 'consistency' in losses:
    cfg = section(ConsistencyConfig, config, 'consistency')
    # Where the weight of pure noise is zero, its second pass is spared.
    fields['triples'] = dataclasses.replace(
      section(TripleConfig, config, 'triples'), skip_first=cfg.weight != 'none'
    )
    fields['consistency'] = cfg
  if 'alignment' in losses:
    fields['alignment'] = section(AlignmentConfig, config, 'alignment')
    fields['reference'] = section(ReferenceConfig, config, 'reference')
  return fields


def latent_shape(config: ConfigDict) -> tuple[int, int, int, int]:
  """(frames, rows, columns, channels) of the latents of the config's video.

  Raises:
    InputError: if frames are not 4n + 1, or height or width is not a multiple of 16.
  """
  video = config.video
  if (video.frames - 1) % TIME:
    raise InputError(
      f'video.frames={video.frames} must be 4n + 1, such as {1 + TIME * (video.frames // TIME)}.'
    )
  for side in ('height', 'width'):
    if video[side] % (SPACE * PATCH):
      raise InputError(f'video.{side}={video[side]} must be a multiple of {SPACE * PATCH}.')
  return (
    1 + (video.frames - 1) // TIME,
    video.height // SPACE,
    video.width // SPACE,
    config.vae.z_dim,
  )


def chunking(config: ConfigDict, frames: int | None = None) -> Chunking:
  """The static part of the config's rollouts, for another number of latent frames if asked.

  Raises:
    InputError: if the rollout does not fit the video or the window is too short.
  """
  model, roll = section(WanConfig, config, 'model'), config.rollout
  video_frames, rows, columns, channels = latent_shape(config)
  if frames is None and roll.frames != video_frames:
    raise InputError(
      f'rollout.frames={roll.frames} but video.frames={config.video.frames} make {video_frames} latent frames.'
    )
  slots_needed(frames or roll.frames, roll.chunk, roll.sink, roll.window or None)
  tokens = rows * columns // PATCH**2
  return Chunking(
    frames=frames or roll.frames,
    chunk=roll.chunk,
    latent=(rows, columns, channels),
    cache=(model.layers, tokens, model.heads, model.head_dim),
    sink=roll.sink,
    window=roll.window or None,
    mode=roll.mode,
    unroll=roll.unroll,
    # Files of before this field are read too.
    **{name: roll[name] for name in ('branches',) if name in roll},
    context_noise=roll.context_noise,
    dtype=model.dtype,
  )


def full_plan(recipe: Recipe, steps: int) -> Plan:
  """A rollout that takes all of `steps` steps: what inference does."""
  sigmas = jnp.asarray(flow.padded_sigmas(steps, recipe.schedule.shift, steps + 1))
  return student_plan(recipe.chunking, sigmas, jnp.int32(steps - 1))


def draw(recipe: Recipe, key, n, *, terms: bool = True) -> draws.Draw:
  """What step n draws from its key; without `terms`, a rollout alone."""
  triples, reference = (recipe.triples, recipe.reference) if terms else (None, None)
  return draws.draw(key, n, recipe.schedule, recipe.chunking, triples, reference)
