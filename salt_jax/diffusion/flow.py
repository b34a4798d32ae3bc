"""Rectified flow: the schedule and every conversion between noise, velocity and clean latents, in float32.

  (1)  x_sigma = (1 - sigma) x0 + sigma eps,  sigma in [0, 1], sigma = 1 is noise
  (2)  v       = eps - x0                     what the network predicts
  (3)  x0      = x_sigma - sigma v
  (4)  x_b     = x_a - (sigma_a - sigma_b) v  one Euler step of the probability-flow ODE
  (5)  sigma   = s u / (1 + (s - 1) u)        a uniform u in [0, 1] under shift s
  (6)  t       = 1000 sigma                   what the network is told
  (7)  w       = y - min y, brought to mean 1 over the 1000 levels,  y = exp(-2 (sigma - 1/2)^2)

sigma is t / 1000 exactly; the originals' look-up of the nearest of 1000 grid points is left out.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key, PyTree

TRAIN_STEPS = 1000


def shifted(u, shift: float):
  """Equation (5), for NumPy and JAX alike."""
  return shift * u / (1 + (shift - 1) * u)


def training_weight(sigma: Float[Array, '...'], shift: float) -> Float[Array, '...']:
  """Equation (7): how much a level counts in causal flow matching (self_forcing.md 1.5).

  y at both ends is the smallest, exp(-1/2), so y - min y = exp(-1/2) expm1(2 sigma (1 - sigma)): no cancellation.

  Args:
    sigma: levels.
    shift: of the grid over which the mean is 1.
  """
  grid = shifted(1 - np.arange(TRAIN_STEPS, dtype=np.float64) / TRAIN_STEPS, shift)
  mean = np.expm1(2 * grid * (1 - grid)).mean()
  sigma = jnp.asarray(sigma, jnp.float32)
  return jnp.expm1(2 * sigma * (1 - sigma)) / jnp.float32(mean)


def few_step_sigmas(steps: int, shift: float) -> np.ndarray:
  """Levels of a few-step schedule: labels 1000 (1 - i / steps) under the shift, then 0; `[steps + 1]` float64.

  Four steps at shift 5 give t = 1000, 937.5, 833.33, 625.
  """
  return shifted(1 - np.arange(steps + 1, dtype=np.float64) / steps, shift)


def padded_sigmas(steps: int, shift: float, length: int) -> np.ndarray:
  """`few_step_sigmas` filled up with zeros to `[length]`, float32: one shape for every number of steps."""
  sigmas = few_step_sigmas(steps, shift)
  return np.pad(sigmas, (0, length - sigmas.size)).astype(np.float32)


def _like(sigma, x):
  """float32 sigma with trailing axes to broadcast against x; sigma has the leading axes of x."""
  sigma = jnp.asarray(sigma, jnp.float32)
  return sigma.reshape(sigma.shape + (1,) * (x.ndim - sigma.ndim)) if sigma.ndim else sigma


def add_noise(x0: Float[Array, '...'], eps: Float[Array, '...'], sigma) -> Float[Array, '...']:
  """Equation (1)."""
  s = _like(sigma, x0)
  return (1 - s) * x0.astype(jnp.float32) + s * eps.astype(jnp.float32)


def x0_from_velocity(x: Float[Array, '...'], v: Float[Array, '...'], sigma) -> Float[Array, '...']:
  """Equation (3)."""
  return x.astype(jnp.float32) - _like(sigma, x) * v.astype(jnp.float32)


def velocity_from_x0(x: Float[Array, '...'], x0: Float[Array, '...'], sigma) -> Float[Array, '...']:
  """Equation (3) solved for v; sigma must be positive."""
  return (x.astype(jnp.float32) - x0.astype(jnp.float32)) / _like(sigma, x)


def euler(
  x: Float[Array, '...'], v: Float[Array, '...'], sigma_from, sigma_to
) -> Float[Array, '...']:
  """Equation (4)."""
  return x.astype(jnp.float32) - (_like(sigma_from, x) - _like(sigma_to, x)) * v.astype(jnp.float32)


def guide(
  cond: Float[Array, '...'], uncond: Float[Array, '...'], scale: float
) -> Float[Array, '...']:
  """Classifier-free guidance of the samplers: uncond + scale (cond - uncond)."""
  return uncond + scale * (cond - uncond)


def guide_on_top(
  cond: Float[Array, '...'], uncond: Float[Array, '...'], scale: float
) -> Float[Array, '...']:
  """Guidance of the DMD teacher: cond + scale (cond - uncond), one more than in `guide`."""
  return cond + scale * (cond - uncond)


def paired(cond: PyTree, uncond: PyTree) -> PyTree:
  """Two prompts' arrays as one batch, `[2 b ...]`: guidance in a single pass."""
  return jax.tree.map(lambda a, b: jnp.concatenate([a, b]), cond, uncond)


def example_keys(key: Key[Array, ''], index: Int[Array, 'b']) -> Key[Array, 'b']:
  """One key an example, from its index in the global batch: the same on one device and on many."""
  return jax.vmap(jax.random.fold_in, (None, 0))(key, index)


def frame_noise(
  keys: Key[Array, 'b'], frames: Int[Array, 'f'], draw, shape: tuple[int, int, int]
) -> Float[Array, 'b f h w c']:
  """Standard normal noise that depends on the example, the absolute frame and the draw alone.

  So the first noise (draw 0) of a clip is the same whatever the chunk size and whichever model samples.
  """

  def one(key, frame):
    return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, frame), draw), shape)

  return jax.vmap(jax.vmap(one, (None, 0)), (0, None))(keys, frames)
