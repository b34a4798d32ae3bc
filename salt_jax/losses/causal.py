"""Losses of Causal Forcing's initial stages (self_forcing.md 3.9 and 5.1), each with an own level for its inputs.

The model of all three is `(x, t, text, clean, clean_t) -> velocity`: a noisy clip whose chunks look back at clean ones.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Key

from salt_jax.diffusion import flow
from salt_jax.errors import InputError
from salt_jax.losses.regression import ode_loss

CONTEXTS = ('teacher', 'diffusion')


@dataclasses.dataclass(frozen=True)
class ForcingConfig:
  """What a chunk looks back at while the autoregressive model is trained.

  Attributes:
    context: 'teacher' is the clean clip, 'diffusion' the noisy clip itself.
    noise: largest sigma of noise on the clean clip; 0 leaves it clean.
  """

  context: str = 'teacher'
  noise: float = 0.0

  def __post_init__(self):
    if self.context not in CONTEXTS:
      raise InputError(
        f'forcing.context={self.context} is unknown: choose one of {", ".join(CONTEXTS)}.'
      )
    if self.noise and self.context == 'diffusion':
      raise InputError(
        f'forcing.noise={self.noise} needs forcing.context=teacher: there is no clean clip to add it to.'
      )


@dataclasses.dataclass(frozen=True)
class CausalConsistencyConfig:
  """Numbers of causal consistency distillation.

  Attributes:
    steps: levels of the grid; neighbours on it are made consistent.
    guidance: of the teacher's Euler step, as uncond + guidance (cond - uncond).
  """

  steps: int = 48
  guidance: float = 3.0


class Fns(NamedTuple):
  """The networks of consistency distillation; the teacher gets (cond, uncond) as one batch of twice the size."""

  student: Callable
  target: Callable
  teacher: Callable


def _per_frame(x):
  return x.mean(axis=tuple(range(2, x.ndim)))


def chunk_levels(
  key: Key[Array, 'b'], frames: int, chunk: int, shift: float, largest: float = 1.0
) -> Float[Array, 'b f']:
  """One sigma a chunk: u uniform on those of {0, …, 999} / 1000 whose shifted level is at most `largest`."""
  grid = flow.shifted(np.arange(flow.TRAIN_STEPS, dtype=np.float64) / flow.TRAIN_STEPS, shift)
  count = int((grid <= largest).sum())
  raw = jax.vmap(lambda k: jax.random.randint(k, (frames // chunk,), 0, count))(key)
  return jnp.repeat(jnp.asarray(grid, jnp.float32)[raw], chunk, axis=1)


def causal_flow_loss(
  model: Callable,
  x0: Float[Array, 'b f h w c'],
  text: Float[Array, 'b n d'],
  key: Key[Array, 'b'],
  cfg: ForcingConfig,
  *,
  chunk: int,
  shift: float,
) -> tuple[Float[Array, 'b'], dict]:
  """Flow matching with an own level for each chunk: mean over frames of w(sigma) mean (v - (eps - x0))^2.

  Args:
    model: with gradient.
    x0: clean latents.
    text: encoder rows.
    key: one key an example.
    cfg: what is done to the clean clip.
    chunk: latent frames that share a level.
    shift: of the levels.
  """
  level, clean_level, noise = jax.vmap(lambda k: jax.random.split(k, 3), out_axes=1)(key)
  sigma = chunk_levels(level, x0.shape[1], chunk, shift)
  clean_sigma = chunk_levels(clean_level, x0.shape[1], chunk, shift, cfg.noise)
  frames, shape = jnp.arange(x0.shape[1]), x0.shape[2:]
  eps, clean_eps = (flow.frame_noise(noise, frames, draw, shape) for draw in (0, 1))
  clean = flow.add_noise(x0, clean_eps, clean_sigma)
  v = model(flow.add_noise(x0, eps, sigma), 1000 * sigma, text, clean, 1000 * clean_sigma)
  error = _per_frame(jnp.square(v - (eps - x0)))
  loss = (flow.training_weight(sigma, shift) * error).mean(axis=1)
  return loss, {'flow_sigma': sigma.mean(axis=1), 'flow_error': error.mean(axis=1)}


def causal_ode_loss(
  model: Callable,
  record: Float[Array, 'b p f h w c'],
  text: Float[Array, 'b n d'],
  key: Key[Array, 'b'],
  sigmas: Float[Array, 's'],
) -> tuple[Float[Array, 'b'], dict]:
  """Predicts the end of an autoregressive trajectory behind the clean clip that it was made behind.

  mean (x0_hat - end)^2 with one level for the whole clip, since its chunks were integrated together.

  Args:
    model: with gradient.
    record: kept inputs, the end of the trajectory, then the clean clip.
    text: encoder rows.
    key: one key an example.
    sigmas: level of each kept input, then 0.
  """
  clean = record[:, -1]
  at_zero = jnp.zeros(clean.shape[:2])
  return ode_loss(
    lambda x, t, text: model(x, t, text, clean, at_zero),
    record[:, :-1],
    text,
    key,
    sigmas,
    chunk=clean.shape[1],
  )


def causal_consistency_loss(
  fns: Fns,
  x0: Float[Array, 'b f h w c'],
  texts: tuple,
  key: Key[Array, 'b'],
  cfg: CausalConsistencyConfig,
  shift: float,
) -> tuple[Float[Array, 'b'], dict]:
  """The student at a level agrees with its average one teacher step below: mean (x0_hat - sg x0_hat')^2.

  i is uniform on {0, …, steps - 2}, one a clip; x_i = add_noise(x0, eps, sigma_i); the teacher's guided Euler step
  leads to x_{i+1}. All look back at the clean clip; student and average see the prompt only.

  Args:
    fns: student with gradient, average, teacher.
    x0: clean latents.
    texts: (prompt rows, unconditional rows).
    key: one key an example.
    cfg: numbers.
    shift: of the grid.
  """
  cond, uncond = texts
  level, noise = jax.vmap(jax.random.split, out_axes=1)(key)
  i = jax.vmap(lambda k: jax.random.randint(k, (), 0, cfg.steps - 1))(level)
  sigmas = jnp.asarray(flow.few_step_sigmas(cfg.steps, shift), jnp.float32)
  here, below = sigmas[i], sigmas[i + 1]
  x = flow.add_noise(x0, flow.frame_noise(noise, jnp.arange(x0.shape[1]), 0, x0.shape[2:]), here)

  def t_of(sigma):
    return jnp.broadcast_to(1000 * sigma[:, None], x0.shape[:2])

  at_zero = jnp.zeros(x0.shape[:2])
  twice = [jnp.concatenate([y, y]) for y in (x, t_of(here), x0, at_zero)]
  both = fns.teacher(*twice[:2], flow.paired(cond, uncond), *twice[2:])
  v_teacher = flow.guide(*jnp.split(both, 2), cfg.guidance)
  lower = jax.lax.stop_gradient(flow.euler(x, v_teacher, here, below))
  v_target = fns.target(lower, t_of(below), cond, x0, at_zero)
  target = jax.lax.stop_gradient(flow.x0_from_velocity(lower, v_target, below))
  v = fns.student(x, t_of(here), cond, x0, at_zero)
  error = jnp.square(flow.x0_from_velocity(x, v, here) - target)
  return error.mean(axis=(1, 2, 3, 4)), {'consistency_sigma': here}
