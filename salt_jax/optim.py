"""AdamW, its schedule, and the exponential moving average of the weights."""

from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax
from jaxtyping import Array, Float, Int

from salt_jax.errors import InputError


def learning_rate(cfg: ml_collections.ConfigDict) -> optax.Schedule:
  """A linear ramp over `warmup` updates, then constant or a half cosine to zero at `total`.

  The ramp starts at lr / warmup, so that the first update already moves the weights.

  Raises:
    InputError: an unknown schedule, or a cosine that ends before its warmup does.
  """
  if cfg.schedule not in ('constant', 'cosine'):
    raise InputError(f"schedule '{cfg.schedule}' is unknown; use 'constant' or 'cosine'.")
  if cfg.schedule == 'cosine' and cfg.total <= cfg.warmup:
    raise InputError(
      f'cosine over total={cfg.total} updates leaves nothing after '
      f'warmup={cfg.warmup}; raise total or lower warmup.'
    )
  peak, warmup, cosine = cfg.lr, cfg.warmup, cfg.schedule == 'cosine'
  tail = max(cfg.total - warmup, 1)

  def rate(count: Int[Array, '']) -> Float[Array, '']:
    ramp = jnp.minimum(1.0, (count + 1.0) / max(warmup, 1))
    progress = jnp.clip((count - warmup) / tail, 0.0, 1.0)
    decay = 0.5 * (1.0 + jnp.cos(jnp.pi * progress)) if cosine else 1.0
    return jnp.float32(peak) * ramp * decay

  return rate


def make_optimizer(cfg: ml_collections.ConfigDict) -> optax.GradientTransformation:
  """Clipping by the global norm, then AdamW with decoupled decay on all parameters.

  Args:
    cfg: lr, b1, b2, eps, weight_decay, clip (largest global norm), schedule ('constant' or
      'cosine'), warmup and total (updates).

  Raises:
    InputError: a clip that is not positive, or a bad schedule.
  """
  if not cfg.clip > 0:
    raise InputError(f'clip={cfg.clip}: the largest gradient norm must be positive.')
  adamw = optax.adamw(
    learning_rate(cfg), b1=cfg.b1, b2=cfg.b2, eps=cfg.eps, weight_decay=cfg.weight_decay
  )
  return optax.chain(optax.clip_by_global_norm(cfg.clip), adamw)


def apply_updates(
  optimizer: optax.GradientTransformation, grads: Any, opt_state: Any, params: Any
) -> tuple[Any, Any, dict[str, Float[Array, '']]]:
  """One update in float32.

  Returns:
    The new parameters, the new optimizer state, and the norms of the gradient before clipping,
    of the update, and of the new parameters.
  """
  grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
  updates, opt_state = optimizer.update(grads, opt_state, params)
  params = optax.apply_updates(params, updates)
  norms = {
    'grad_norm': optax.tree.norm(grads),
    'update_norm': optax.tree.norm(updates),
    'param_norm': optax.tree.norm(params),
  }
  return params, opt_state, norms


def ema(old: Any, new: Any, decay: float, step: Int[Array, ''], start: int) -> Any:
  """The moving average after one more generator update, in float32.

  Args:
    old: the average so far.
    new: the parameters after this update.
    decay: weight of the old average.
    step: zero-based index of this generator update, traced.
    start: until `start` updates are done the average is a copy of the parameters.
  """
  keep = jnp.where(step < start, 0.0, decay).astype(jnp.float32)
  return jax.tree.map(lambda o, n: keep * o + (1.0 - keep) * n, old, new)
