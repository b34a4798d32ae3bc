"""Regression losses of the stages before distillation: flow matching, and ODE trajectories."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key, PyTree

from salt_jax.diffusion import flow


def _per_example(x):
  return x.mean(axis=tuple(range(1, x.ndim)))


def flow_matching_loss(
  model: Callable,
  x0: Float[Array, 'b f h w c'],
  text: PyTree,
  key: Key[Array, 'b'],
  shift: float,
) -> tuple[Float[Array, 'b'], dict]:
  """mean (v - (eps - x0))^2 at one uniform level a clip, under the shift.

  Args:
    model: `(x, t, text) -> velocity`, with gradient.
    x0: clean latents.
    text: prompts, passed on.
    key: one key an example.
    shift: of the level; 1 is uniform.
  """
  level, noise = jax.vmap(jax.random.split, out_axes=1)(key)
  sigma = flow.shifted(jax.vmap(jax.random.uniform)(level), shift)
  eps = flow.frame_noise(noise, jnp.arange(x0.shape[1]), 0, x0.shape[2:])
  t = jnp.broadcast_to(1000 * sigma[:, None], x0.shape[:2])
  v = model(flow.add_noise(x0, eps, sigma), t, text)
  return _per_example(jnp.square(v - (eps - x0))), {'flow_sigma': sigma}


def ode_loss(
  model: Callable,
  trajectory: Float[Array, 'b p f h w c'],
  text: PyTree,
  key: Key[Array, 'b'],
  sigmas: Float[Array, 'p'],
  *,
  chunk: int,
) -> tuple[Float[Array, 'b'], dict]:
  """Predicts the end of a teacher trajectory from any of its kept levels, an own level for each chunk.

  mean (x0_hat - end)^2 (self_forcing.md 3.8).

  Args:
    model: `(x, t, text) -> velocity`, chunk-causal, with gradient.
    trajectory: kept inputs, then the clean end.
    text: prompts, passed on.
    key: one key an example.
    sigmas: level of each kept input, then 0.
    chunk: latent frames that share a level.
  """
  b, p, f = trajectory.shape[:3]
  draw = jax.vmap(lambda k: jax.random.randint(k, (f // chunk,), 0, p - 1))(key)
  index = jnp.repeat(draw, chunk, axis=1)
  x = jnp.take_along_axis(trajectory, index[:, None, :, None, None, None], axis=1)[:, 0]
  sigma = sigmas[index]
  v = model(x, 1000 * sigma, text)
  error = jnp.square(flow.x0_from_velocity(x, v, sigma) - trajectory[:, -1])
  return _per_example(error), {'ode_sigma': sigma.mean(axis=1)}
