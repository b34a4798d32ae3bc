"""Semigroup consistency of SC-DMD: one long Euler step must equal two short ones (salt_method.md 2.1, 2.2).

(1)  psi(x, v, a, b) = x - (sigma_a - sigma_b) v
(2)  direct   = psi(x_s, v_1, s, e)                   v_1 = v(x_s, sigma_s), the pass that DMD uses
(3)  composed = psi(x_m, v_2, m, e)                   x_m = psi(x_s, sg v_1, s, m), v_2 = v(x_m, sigma_m)
(4)  loss     = w(s) mean (direct - sg composed)^2    w(s) = 1 - sigma_s
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from salt_jax.diffusion import flow
from salt_jax.diffusion.draws import Triple
from salt_jax.errors import InputError

FORMS = ('endpoint', 'velocity', 'x0')
STOPS = ('composed', 'inner_live', 'none')
WEIGHTS = ('linear', 'square', 'none')
TARGETS = ('online', 'ema')


@dataclasses.dataclass(frozen=True)
class ConsistencyConfig:
  """How the two ways are compared; the defaults are the released recipe.

  Attributes:
    form: 'endpoint' is equation (4); 'velocity' compares v_1 with the mean velocity of the two short steps;
      'x0' compares the two clean predictions, with the factor kappa that makes its gradient equation (4)'s.
    stop_grad: 'composed' lets no gradient into the composed way; 'inner_live' lets it through x_m into v_1;
      'none' through v_2 as well.
    weight: w(s): 'linear' 1 - sigma_s, 'square' its square, 'none' 1.
    target: network of the composed way: 'online' or 'ema'.
    warmup: training steps of a half-cosine ramp of the term.
  """

  form: str = 'endpoint'
  stop_grad: str = 'composed'
  weight: str = 'linear'
  target: str = 'online'
  warmup: int = 0

  def __post_init__(self):
    for name, known in (
      ('form', FORMS),
      ('stop_grad', STOPS),
      ('weight', WEIGHTS),
      ('target', TARGETS),
    ):
      if getattr(self, name) not in known:
        raise InputError(
          f'consistency.{name}={getattr(self, name)} is unknown: choose one of {", ".join(known)}.'
        )


def _per_example(x):
  return jnp.mean(x, axis=tuple(range(1, x.ndim)))


def _weight(sigma, cfg: ConsistencyConfig):
  return {'linear': 1 - sigma, 'square': jnp.square(1 - sigma), 'none': jnp.ones_like(sigma)}[
    cfg.weight
  ]


def ramp(n: Int[Array, ''], warmup: int) -> Float[Array, '']:
  """Half-cosine from 0 at step 0 to 1 at step `warmup`; 1 throughout without a warm-up."""
  if not warmup:
    return jnp.float32(1.0)
  return 0.5 - 0.5 * jnp.cos(jnp.pi * jnp.minimum(n / warmup, 1.0))


def consistency_loss(
  again: Callable,
  x: Float[Array, 'b f h w c'],
  v: Float[Array, 'b f h w c'],
  triple: Triple,
  cfg: ConsistencyConfig,
) -> tuple[Float[Array, 'b'], dict]:
  """Equation (4), per clip; zero, at no cost, where the triple is not active.

  Args:
    again: `(x_m, sigma_m) -> velocity`, the network behind the same past.
    x: x_s, the input of the exit step.
    v: v_1, with gradient.
    triple: the three levels.
    cfg: the form.

  Returns:
    (loss `[b]`, {'consistency_defect' `[b]`: |direct - composed| / |direct - x_s|}).
  """
  stop = jax.lax.stop_gradient
  triple = _finite(triple)
  inner = v if cfg.stop_grad in ('inner_live', 'none') else stop(v)
  middle = flow.euler(x, inner, triple.start, triple.middle)

  def second(middle):
    found = again(middle, triple.middle)
    return found if cfg.stop_grad == 'none' else stop(found)

  second_v = jax.lax.cond(triple.active, second, jnp.zeros_like, middle)
  direct = flow.euler(x, v, triple.start, triple.end)
  composed = flow.euler(middle, second_v, triple.middle, triple.end)
  error = _error(cfg, triple, (x, v, direct), (middle, second_v, composed))
  loss = _weight(triple.start, cfg) * _per_example(jnp.square(error))
  return jnp.where(triple.active, loss, 0.0), {
    'consistency_defect': jnp.where(triple.active, defect(x, direct, composed), 0.0)
  }


def _finite(triple: Triple) -> Triple:
  """An inactive triple may be degenerate; some levels that can be divided by keep its gradient finite."""
  levels = (triple.start, triple.middle, triple.end)
  start, middle, end = (
    jnp.where(triple.active, x, y) for x, y in zip(levels, (1.0, 0.5, 0.0), strict=True)
  )
  return triple.replace(start=start, middle=middle, end=end)


def _error(cfg: ConsistencyConfig, triple: Triple, one: tuple, two: tuple):
  """What is squared: of (x_s, v_1, direct) and (x_m, v_2, composed)."""
  x, v, direct = one
  middle, second_v, composed = two
  long, first, rest = (
    triple.start - triple.end,
    triple.start - triple.middle,
    triple.middle - triple.end,
  )
  if cfg.form == 'endpoint':
    return direct - composed
  if cfg.form == 'velocity':
    inner = v if cfg.stop_grad in ('inner_live', 'none') else jax.lax.stop_gradient(v)
    return v - (first * inner + rest * second_v) / long
  kappa = (rest / triple.middle) * (long / triple.start)
  x0 = flow.x0_from_velocity(x, v, triple.start)
  return jnp.sqrt(kappa) * (x0 - flow.x0_from_velocity(middle, second_v, triple.middle))


def defect(
  x: Float[Array, 'b f h w c'],
  direct: Float[Array, 'b f h w c'],
  composed: Float[Array, 'b f h w c'],
) -> Float[Array, 'b']:
  """Normalised semigroup defect (salt_method.md 5.5): |direct - composed|_2 / |direct - x|_2 of each clip."""

  def norm(y):
    return jnp.sqrt(jnp.sum(jnp.square(jax.lax.stop_gradient(y)), axis=tuple(range(1, y.ndim))))

  return norm(direct - composed) / jnp.maximum(norm(direct - x), 1e-12)
