"""What a student does where it is put: two ways to one level, and chunks behind a past that is not its own.

Nothing here trains. The parts are those of the rollout, so what is looked at is what samples.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Key, PyTree

from salt_jax.diffusion import draws, flow
from salt_jax.diffusion.rollout import (
  CONTEXT_DRAW,
  Chunking,
  Plan,
  Rollout,
  Trace,
  denoise_chunk,
  empty_cache,
  velocity,
)
from salt_jax.models.cache import KVCache, write
from salt_jax.models.prompt import Prompt
from salt_jax.models.wan import Chunk


def triples(steps: int) -> list[tuple[int, int, int]]:
  """All (s, m, e) of the released rule (salt_method.md 2.3), as indices of the grid of `steps`."""
  rule = draws.TripleConfig(steps=(steps,), skip_first=False)
  return [
    (s, m, e) for s in range(steps) for e in draws.ends(steps, s, rule) for m in range(s + 1, e)
  ]


def two_ways(
  apply: Callable,
  params: PyTree,
  text: Prompt,
  rolled: Rollout,
  levels: tuple,
  chunk: int,
) -> tuple[Float[Array, 'b f h w c'], Float[Array, 'b f h w c'], Float[Array, 'b f h w c']]:
  """x_s, and level e from there by one Euler step and by two (salt_method.md 2.1), behind the rollout's cache.

  Args:
    apply: the student.
    params: its parameters.
    text: prompts.
    rolled: a rollout with the exit at s.
    levels: sigmas of s, m and e.
    chunk: latent frames in a chunk, static.
  """
  s, m, e = levels

  def ask(x, sigma):
    return velocity(apply, params, Trace(x, sigma), text, rolled.cache, chunk)

  x = rolled.trace.x
  v = ask(x, s)
  middle = flow.euler(x, v, s, m)
  return x, flow.euler(x, v, s, e), flow.euler(middle, ask(middle, m), m, e)


def chunks_behind(
  apply: Callable,
  params: PyTree,
  keys: Key[Array, 'b'],
  text: Prompt,
  plan: Plan,
  history: KVCache,
) -> Float[Array, 'b f h w c']:
  """Samples every chunk by itself behind its own past in a finished cache, which stays as it is.

  Args:
    apply: the student.
    params: its parameters.
    keys: one a clip.
    text: prompts.
    plan: how a chunk is sampled.
    history: of a whole clip.
  """

  def one(start):
    return denoise_chunk(apply, params, keys, text, plan, (history, start))[0]

  starts = jnp.arange(0, plan.chunking.frames, plan.chunking.chunk, dtype=jnp.int32)
  return rearrange(jax.lax.map(one, starts), 'n b f h w c -> b (n f) h w c')


def commit(
  apply: Callable,
  params: PyTree,
  keys: Key[Array, 'b'],
  text: Prompt,
  latents: Float[Array, 'b f h w c'],
  chunking: Chunking,
) -> KVCache:
  """The cache that given clean latents leave behind: what a rollout does with its own chunks.

  Like there, they are noised to the `context_noise` of the config, which is 0.

  Args:
    apply: the student.
    params: its parameters.
    keys: one a clip.
    text: prompts.
    latents: of whole clips.
    chunking: static.
  """
  count, sigma = chunking.chunk, chunking.context_noise

  def body(i, cache):
    start = i * count
    x = jax.lax.dynamic_slice_in_dim(latents, start, count, 1)
    frames = start + jnp.arange(count)
    noise = flow.frame_noise(keys, frames, CONTEXT_DRAW, chunking.latent)
    t = jnp.full(x.shape[:2], 1000 * sigma, jnp.float32)
    _, features = apply(params, flow.add_noise(x, noise, sigma), t, text, Chunk(cache, start))
    return write(cache, features.k, features.v, start)

  empty = empty_cache(chunking, latents.shape[0])
  return jax.lax.fori_loop(0, chunking.frames // count, body, empty)
