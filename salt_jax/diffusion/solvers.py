"""Guidance, and Euler trajectories of the bidirectional teacher on the few-step grid; samplers are in `multistep`."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from salt_jax.diffusion import flow
from salt_jax.models.wan import Clip


def guided_velocity(
  apply: Callable, params, x, t, texts, scale: float | Float[Array, ''] | None
) -> Float[Array, 'b f h w c']:
  """Velocity with guidance, cond and uncond in one batch (equation of `flow.guide`).

  Args:
    apply: the model.
    params: its parameters.
    x: noisy latents `[b f h w c]`.
    t: one timestep in [0, 1000] for all.
    texts: (prompts, unconditional prompts).
    scale: None, or the Python number 1, drops the second pass.
  """
  cond, uncond = texts
  if scale is None or (isinstance(scale, int | float) and scale == 1):
    return apply(params, x, jnp.full(x.shape[:2], t), cond, Clip())[0]
  both = jnp.concatenate([x, x])
  t = jnp.full(both.shape[:2], t)
  v_cond, v_uncond = jnp.split(apply(params, both, t, flow.paired(cond, uncond), Clip())[0], 2)
  return flow.guide(v_cond, v_uncond, scale)


def euler_sample(
  apply: Callable, params, noise: Float[Array, 'b f h w c'], texts, sigmas: np.ndarray, scale: float
) -> Float[Array, 'b f h w c']:
  """Clean latents from noise along `sigmas` (from 1 down to 0, `[steps + 1]`)."""
  return euler_trajectory(apply, params, noise, texts, sigmas, scale, keep=1)[:, -1]


def euler_trajectory(
  apply: Callable,
  params,
  noise: Float[Array, 'b f h w c'],
  texts,
  sigmas: np.ndarray,
  scale: float,
  *,
  keep: int,
) -> Float[Array, 'b p f h w c']:
  """The trajectory at `keep` evenly spaced levels, and its end.

  With 48 steps and keep 4, the kept levels are those of the four-step schedule at the same shift.

  Returns:
    `[b keep + 1 f h w c]`: inputs at steps 0, n/keep, 2n/keep, …, then the clean latents.
  """

  def velocity(x, sigma):
    return guided_velocity(apply, params, x, 1000 * sigma, texts, scale)

  return trajectory(velocity, noise, sigmas, keep)


def trajectory(
  velocity: Callable, noise: Float[Array, 'b f h w c'], sigmas: np.ndarray, keep: int
) -> Float[Array, 'b p f h w c']:
  """`euler_trajectory` of any field `(x, sigma) -> velocity`."""
  steps = len(sigmas) - 1
  pairs = (
    np.stack([sigmas[:-1], sigmas[1:]], axis=1).astype(np.float32).reshape(keep, steps // keep, 2)
  )

  def step(x, pair):
    v = velocity(x, pair[0])
    return flow.euler(x, v, pair[0], pair[1]), None

  def stretch(x, some):
    return jax.lax.scan(step, x, some)[0], x

  end, kept = jax.lax.scan(stretch, noise, jnp.asarray(pairs))
  return jnp.moveaxis(jnp.concatenate([kept, end[None]]), 0, 1)
