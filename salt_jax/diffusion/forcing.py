"""Teacher forcing: every chunk of a noisy clip behind the clean chunks that precede it.

The originals run one sequence [clean; noisy] of twice the length under a mask: clean chunk b sees clean chunks up to b,
noisy chunk b sees itself and clean chunks before b, and both halves have the positions of one clip (self_forcing.md
2.7). The clean half never looks at the noisy one, so here it is a pass of its own: it gives each layer's keys and
values, which the noisy pass then reads. No mask, no block that is computed to be thrown away, and a sampler needs the
clean pass once for all its steps.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from salt_jax.diffusion import flow
from salt_jax.models.cache import KVCache
from salt_jax.models.wan import Clip


def context(
  model: Callable,
  clean: Float[Array, 'b f h w c'],
  t: Float[Array, 'b f'],
  text: Float[Array, 'b n d'],
  chunk: int,
  *,
  live: bool = False,
) -> Clip:
  """What a noisy clip must be run in to stand behind a clean one.

  Nobody sees the last clean chunk, so it is left out.

  Args:
    model: `(x, t, text, ctx) -> (velocity, features)`.
    clean: the clip that chunks look back at.
    t: its timesteps: 0, or small ones if noise was added to it.
    text: encoder rows, the same as of the noisy clip.
    chunk: latent frames in a chunk.
    live: gradients flow through the clean pass too, as in the doubled sequence.
  """
  seen = clean.shape[1] - chunk
  if not seen:
    return Clip(chunk=chunk)
  _, features = model(clean[:, :seen], t[:, :seen], text, Clip(chunk=chunk))
  past = KVCache(features.k, features.v, jnp.arange(seen))
  return Clip(chunk=chunk, past=past, live=live)


def forced(model: Callable, chunk: int, *, live: bool = False) -> Callable:
  """`(x, t, text, clean, clean_t) -> velocity` of a noisy clip behind a clean one; arguments as in `context`."""

  def velocity(x, t, text, clean, clean_t):
    ctx = context(model, clean, clean_t, text, chunk, live=live)
    return model(x, t, text, ctx)[0]

  return velocity


def diffused(model: Callable, chunk: int) -> Callable:
  """The same signature for diffusion forcing: chunks look back at the noisy ones, the clean clip is ignored."""
  return lambda x, t, text, clean, clean_t: model(x, t, text, Clip(chunk=chunk))[0]


def guided(
  model: Callable, clean: Float[Array, 'b f h w c'], texts: tuple, chunk: int, scale: float
) -> Callable:
  """`(x, sigma) -> velocity` with guidance (`flow.guide`) behind a clean clip, whose pass is made once.

  Args:
    model: as in `context`.
    clean: the clip that chunks look back at.
    texts: (prompt rows, unconditional rows); both make their own context.
    chunk: latent frames in a chunk.
    scale: of the guidance.
  """
  text, both = flow.paired(*texts), jnp.concatenate([clean, clean])
  ctx = context(model, both, jnp.zeros(both.shape[:2]), text, chunk)

  def velocity(x, sigma):
    t = jnp.full(both.shape[:2], 1000 * sigma)
    v, _ = model(jnp.concatenate([x, x]), t, text, ctx)
    return flow.guide(*jnp.split(v, 2), scale)

  return velocity
