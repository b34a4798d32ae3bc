"""Many-step sampling of a bidirectional teacher, as Wan samples: which checkpoint, which solver, which guidance."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree
from ml_collections import ConfigDict

from salt_jax.diffusion import flow, multistep, solvers
from salt_jax.models import wan
from salt_jax.recipe import Recipe
from salt_jax.step import conditioning

MAX_STEPS = flow.TRAIN_STEPS
GUIDANCE = 5.0  # of every task of Wan (wan.md 5.4)
STEPS, STEPS_I2V = 50, 40
SHIFT, SHIFT_SMALL_I2V, SHIFT_FLF2V = 5.0, 3.0, 16.0
SMALL = 480 * 832  # pixels of a frame up to which I2V has its own shift


@dataclasses.dataclass(frozen=True)
class Settings:
  """How a teacher is sampled."""

  solver: str
  steps: int
  shift: float
  guidance: float


def wan_shift(height: int, width: int, frames: int) -> float:
  """Wan's shift at a size: 5, behind a given frame 3 up to 480x832, and between first and last 16 (wan.md 5.5)."""
  if frames == 2:
    return SHIFT_FLF2V
  return SHIFT_SMALL_I2V if frames and height * width <= SMALL else SHIFT


def settings(args, config: ConfigDict) -> Settings:
  """What the flags say, and for the rest Wan's own defaults, or the report's in the nano world."""
  own = config.evaluate if config.size == 'nano' else {}
  given = config.model.in_channels > config.vae.z_dim
  last = 'image_positions' in config.model and config.model.image_positions
  frames = given * (1 + last)
  shift = own.get('shift', wan_shift(config.video.height, config.video.width, frames))
  return Settings(
    solver=args.sampler,
    steps=args.steps or (STEPS_I2V if frames == 1 else STEPS),
    shift=shift if args.shift is None else args.shift,
    guidance=own.get('guidance', GUIDANCE) if args.guidance is None else args.guidance,
  )


def sampler(
  rec: Recipe, cfg: wan.WanConfig, frozen: PyTree, shape: Sequence[int]
) -> Callable[[PyTree, Settings], Callable]:
  """`(params, settings) -> Sampler`; one program for every solver, shift, guidance and number of steps as they come.

  Args:
    rec: seed of the noise, and the text encoder's sizes.
    cfg: sizes of the teacher.
    frozen: text encoder and unconditional prompt.
    shape: (frames, rows, columns, channels) of the latents.
  """

  @jax.jit
  def run(params, frozen, table, scale, batch):
    names = ('ids', 'mask', 'index', 'condition', 'image')
    texts = conditioning(frozen, dict(zip(names, batch, strict=False)), rec)
    keys = flow.example_keys(jax.random.key(rec.seed + 1), batch[2])
    noise = flow.frame_noise(keys, jnp.arange(shape[0]), 0, tuple(shape[1:]))

    def velocity(x, t):
      return solvers.guided_velocity(wan.bind(cfg), params, x, t, texts, scale)

    return multistep.solve(velocity, noise, table)

  def with_settings(params, chosen):
    table = multistep.table(chosen.solver, chosen.steps, chosen.shift)
    # Without guidance the second pass is left out; None is static where a number would not be.
    scale = None if chosen.guidance == 1 else np.float32(chosen.guidance)
    return lambda *batch: run(params, frozen, table, scale, batch)

  return with_settings
