"""Wan's many-step solvers: UniPC of order 2 (bh2), DPM++ 2M, and Euler, on its own grids.

In a rectified flow all three move by weighted sums of states and clean predictions:

  (1)  m_i     = x_i - sigma_i v_i
  (2)  y_i     = sum of the weights `accept` times (x_i, y_{i-1}, m_i, m_{i-1}, m_{i-2})   UniPC corrects x_i by m_i
  (3)  x_{i+1} = sum of the weights `advance` times (y_i, m_i, m_{i-1})

The weights depend on the levels alone. They are worked out here in float64, so the half log signal-to-noise ratios,
which are infinite at both ends, never reach a device, and one compiled step serves every solver, grid and guidance. A
step of order 1 takes (sigma'/sigma) y + (1 - sigma'/sigma) m: that is Euler's.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from salt_jax.diffusion import flow

SOLVERS = ('unipc', 'dpmpp', 'euler')
_KEEP = (1.0, 0.0, 0.0, 0.0, 0.0)  # y_i = x_i


class Table(NamedTuple):
  """What a solver does in each step; all float64 on the host.

  Attributes:
    t: what the network is told, in [0, 1000].
    sigma: level of the conversion (1).
    accept: weights of (2).
    advance: weights of (3).
  """

  t: Float[np.ndarray, 'steps']
  sigma: Float[np.ndarray, 'steps']
  accept: Float[np.ndarray, 'steps 5']
  advance: Float[np.ndarray, 'steps 3']


def wan_sigmas(steps: int, shift: float) -> np.ndarray:
  """Levels of Wan's UniPC: u from 0.999 in even steps to 0 under the shift; `[steps + 1]` float64 (wan.md 5.1).

  The first u is 1 - 1/1000 rounded to float32, as in the original.
  """
  top = np.float64(np.float32(1 - 1 / flow.TRAIN_STEPS))
  return flow.shifted(np.linspace(top, 0, steps + 1), shift)


def sigmas(solver: str, steps: int, shift: float) -> np.ndarray:
  """Levels of a solver, `[steps + 1]`, the last 0: DPM++ starts at 1 (wan.md 5.2), the others at 0.999."""
  return flow.few_step_sigmas(steps, shift) if solver == 'dpmpp' else wan_sigmas(steps, shift)


def table(solver: str, steps: int, shift: float) -> Table:
  """The table of a solver on Wan's grid; levels are rounded to float32, and t is cut to whole numbers, as Wan does."""
  levels = sigmas(solver, steps, shift)
  t = np.trunc(flow.TRAIN_STEPS * levels[:-1])
  return on_levels(solver, levels.astype(np.float32))._replace(t=t)


def on_levels(solver: str, levels: np.ndarray) -> Table:
  """The table of a solver on any falling levels that end in 0, `[steps + 1]`; t is 1000 sigma.

  Raises:
    ValueError: an unknown solver.
  """
  if solver not in SOLVERS:
    raise ValueError(f'{solver} is no solver: choose one of {", ".join(SOLVERS)}.')
  levels = np.asarray(levels, np.float64)
  steps = len(levels) - 1
  orders = [1 if solver == 'euler' else min(2, i + 1, steps - i) for i in range(steps)]
  accept = [_KEEP] * steps
  if solver == 'unipc':
    accept[1:] = [_correct(levels[max(i - 2, 0) : i + 1], orders[i - 1]) for i in range(1, steps)]
  advance = [_predict(levels[max(i - 1, 0) : i + 2], orders[i]) for i in range(steps)]
  sigma = levels[:-1]
  return Table(flow.TRAIN_STEPS * sigma, sigma, np.array(accept), np.array(advance))


def _half_log_snr(sigma):
  with np.errstate(divide='ignore'):
    return np.log1p(-sigma) - np.log(sigma)


def _predict(levels: np.ndarray, order: int) -> tuple[float, float, float]:
  """Weights of (y_i, m_i, m_{i-1}) from levels (sigma_{i-1},) sigma_i, sigma_{i+1}; UniPC and DPM++ share them."""
  ratio = levels[-1] / levels[-2]
  if order == 1:
    return ratio, 1 - ratio, 0.0
  before, now, then = _half_log_snr(levels)
  half = 0.5 * (1 - ratio) * (then - now) / (before - now)
  return ratio, 1 - ratio - half, half


def _correct(levels: np.ndarray, order: int) -> tuple[float, float, float, float, float]:
  """Weights of (x_i, y_{i-1}, m_i, m_{i-1}, m_{i-2}) from levels (sigma_{i-2},) sigma_{i-1}, sigma_i.

  The corrector of the step before, whose order it has; rho solves [[1, 1], [r, 1]] rho = b (wan.md 5.1).
  """
  ratio = levels[-1] / levels[-2]
  move = 1 - ratio
  if order == 1:
    return 0.0, ratio, 0.5 * move, 0.5 * move, 0.0
  before, start, end = _half_log_snr(levels)
  h, r = end - start, (before - start) / (end - start)
  grown = np.expm1(-h)
  phi = -grown / h - 1
  b = phi / grown, 2 * (-phi / h - 0.5) / grown
  rho = (b[1] - b[0]) / (r - 1)
  late, early = move * (b[0] - rho), move * rho / r
  return 0.0, ratio, late, move - late - early, early


def _mix(weights: Float[Array, 'n'], terms) -> Float[Array, 'b f h w c']:
  return sum(weight * term for weight, term in zip(weights, terms, strict=True))


def solve(
  velocity: Callable, noise: Float[Array, 'b f h w c'], table: Table
) -> Float[Array, 'b f h w c']:
  """Clean latents of a field `(x, t) -> velocity`; the state is float32.

  Args:
    velocity: t is one number for all.
    noise: standard normal.
    table: an argument of the compiled function that calls this, so that none is compiled anew.
  """

  def step(carry, row):
    x, accepted, m1, m2 = carry
    m = flow.x0_from_velocity(x, velocity(x, row.t), row.sigma)
    accepted = _mix(row.accept, (x, accepted, m, m1, m2))
    return (_mix(row.advance, (accepted, m, m1)), accepted, m, m1), None

  noise = noise.astype(jnp.float32)
  nothing = jnp.zeros_like(noise)
  rows = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), table)
  (x, *_), _ = jax.lax.scan(step, (noise, noise, nothing, nothing), rows)
  return x
