"""Streams: videos longer than a clip, whose prompt may change on the way (LongLive, self_forcing.md 5.2).

A stream is trained on clip by clip. The first is as long as any clip; each later one shows `overlap` frames again that
are there already, and goes on with `new` ones. Which clip of which stream a step works on, and where the prompt of
that stream changes, are functions of how many steps went before; cache, last latents and prompts are carried.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray

from salt_jax.diffusion import rollout
from salt_jax.diffusion.rollout import Chunking, Past, Plan, Rollout, stream_cache
from salt_jax.errors import InputError
from salt_jax.models.cache import KVCache, rewrite, write
from salt_jax.models.prompt import Prompt
from salt_jax.models.wan import Chunk, Clip

BOUNDARIES = ('reencoded', 'latent')


@dataclasses.dataclass(frozen=True)
class StreamingConfig:
  """How a student is trained on long videos.

  Attributes:
    frames: most latent frames of a stream.
    new: latent frames that a clip behind the first adds.
    boundary: what the losses see as the first frame of such a clip. 'reencoded' is the last pixel frame up to there,
      encoded as an image, because teacher and critic know clips that begin with one; 'latent' is the student's own
      latent, which spares the VAE.
    global_sink: whether the sink survives a prompt switch; otherwise the frames that are cached anew replace it.
    causal: whether these see only their own and earlier chunks; the original lets all of them see each other.
  """

  frames: int = 240
  new: int = 18
  boundary: str = 'reencoded'
  global_sink: bool = False
  causal: bool = False

  def __post_init__(self):
    if self.boundary not in BOUNDARIES:
      raise InputError(
        f'streaming.boundary={self.boundary} is unknown: choose one of {", ".join(BOUNDARIES)}.'
      )

  def clips(self, first: int) -> int:
    """Clips of a stream whose first clip has `first` frames."""
    return 1 + (self.frames - first) // self.new


@struct.dataclass
class Place:
  """Which clip of which stream, and at which clip that stream's prompt changes; all count from 0."""

  stream: Int[Array, '']
  clip: Int[Array, '']
  switch: Int[Array, '']


@struct.dataclass
class Carried:
  """What one clip of a stream leaves to the next.

  Attributes:
    cache: keys and values.
    latents: the last frames, as many as a clip has.
    prompts: tokenised prompts before and behind the switch, `{name: [b n]}`.
  """

  cache: KVCache
  latents: Float[Array, 'b f h w c']
  prompts: dict[str, Array]


def place(key: PRNGKeyArray, calls: Int[Array, ''], cfg: StreamingConfig, first: int) -> Place:
  """Where a step stands. The switch is uniform over the clips behind the first and before the last.

  Args:
    key: of the run, the same for all its steps.
    calls: steps that went before, of generator and critic together.
    cfg: lengths.
    first: frames of a stream's first clip.
  """
  clips = cfg.clips(first)
  stream = calls // clips
  switch = jax.random.randint(jax.random.fold_in(key, stream), (), 1, max(2, clips - 1))
  return Place(stream, calls % clips, switch)


def carry_nothing(chunking: Chunking, batch: int, text_length: int) -> Carried:
  """What the first stream of a run finds, which reads none of it."""
  ids = jnp.zeros((batch, text_length), jnp.int32)
  mask = jnp.zeros((batch, text_length), bool)
  return Carried(
    cache=stream_cache(chunking, batch),
    latents=jnp.zeros((batch, chunking.frames, *chunking.latent)),
    prompts={'ids': ids, 'mask': mask, 'next_ids': ids, 'next_mask': mask},
  )


def begin(carried: Carried, batch: dict, at: Place) -> Carried:
  """Empties the cache and takes new prompts at the start of a stream; otherwise nothing changes.

  Slots that hold no frame are never read, so keys and values may stay.
  """
  starts, cache = at.clip == 0, carried.cache
  frames = jnp.where(starts, -1, cache.frames)
  prompts = {k: jnp.where(starts, batch[k], old) for k, old in carried.prompts.items()}
  return carried.replace(cache=cache.replace(frames=frames), prompts=prompts)


def go_on(
  carried: Carried, boundary: Float[Array, 'b 1 h w c'], at: Place, chunking: Chunking, new: int
) -> tuple[Past, Bool[Array, 'f']]:
  """(what the clip at a place goes on from, which of its frames are new).

  Args:
    carried: of the clip before.
    boundary: first frame of the clip, if it is not a stream's first.
    at: the place.
    chunking: of a clip.
    new: frames that it adds.
  """
  frames, overlap = chunking.frames, chunking.frames - new
  given = jnp.concatenate([boundary, carried.latents[:, new + 1 :]], axis=1)
  later = at.clip > 0
  x0 = jnp.where(later, given, 0.0)
  x0 = jnp.pad(x0, ((0, 0), (0, new), (0, 0), (0, 0), (0, 0)))
  done = jnp.where(later, overlap // chunking.chunk, 0)
  mask = (jnp.arange(frames) >= overlap) | ~later
  return Past(carried.cache, at.clip * new, x0, done), mask


def carry_on(carried: Carried, rolled: Rollout, mask: Bool[Array, 'f'], new: int) -> Carried:
  """What the next clip finds behind this one: the boundary frame, which only losses see, is left out."""
  is_new = mask[None, :, None, None, None]
  latents = jnp.where(is_new, rolled.x0, jnp.roll(carried.latents, -new, axis=1))
  return carried.replace(cache=rolled.cache, latents=latents)


# Where it will lie: no device holds all of it on the way.
@functools.partial(jax.jit, static_argnums=(0, 1))
def empty_cache(chunking: Chunking, batch: int) -> KVCache:
  """The cache of a video that is made chunk by chunk: what a chunk can still see, and no more."""
  return rollout.empty_cache(chunking, batch, streaming=True)


@functools.partial(jax.jit, static_argnums=0, donate_argnames='cache')
def next_chunk(
  apply: Callable,
  params,
  keys: Key[Array, 'b'],
  text: Prompt,
  plan: Plan,
  cache: KVCache,
  start: Int[Array, ''],
) -> tuple[Float[Array, 'b f h w c'], KVCache]:
  """The chunk at `start` and the cache behind it; arguments as for `rollout.denoise_chunk`, the cache is donated."""
  x0, _, cache = rollout.denoise_chunk(apply, params, keys, text, plan, (cache, start))
  return x0, cache


def recache(
  apply: Callable,
  params,
  cache: KVCache,
  latents: Float[Array, 'b f h w c'],
  prompt: Prompt,
  start: Int[Array, ''],
  *,
  global_sink: bool,
  chunk: int | None = None,
  context_noise: float = 0.0,
) -> KVCache:
  """Brings a cache to a new prompt: one pass over the last frames writes their keys and values anew.

  The frames keep their positions and slots, and see each other and nothing else, both ways as in the original. If the
  sink stays, so many fewer of them are written, and these see it besides, as the chunks behind them will.

  Args:
    apply: the model.
    params: its parameters; no gradient reaches them.
    cache: up to the last of the frames.
    latents: the last clean frames, as many as the window holds or there are.
    prompt: the new one.
    start: absolute index of the first of them, an array.
    global_sink: whether the sink stays as the old prompt made it; otherwise the first of these frames become the sink.
    chunk: if given, frames see only their own and earlier chunks of so many frames, and the sink.
    context_noise: sigma that the model is told.

  Raises:
    InputError: frames that do not divide into chunks.
  """
  params, latents, prompt = jax.lax.stop_gradient((params, latents, prompt))

  def read(part, ctx):
    t = jnp.full(part.shape[:2], 1000 * context_noise, jnp.float32)
    return apply(params, part, t, prompt, ctx)[1]

  if global_sink and cache.sink:
    return _recached_behind_sink(read, cache, latents, start, chunk)
  _check_chunks(latents.shape[1], chunk)
  own = read(latents, Clip(chunk=chunk, start=jnp.asarray(start)))
  return rewrite(cache, own.k, own.v, start, keep_sink=global_sink)


def _check_chunks(count: int, chunk: int | None) -> None:
  if chunk and count % chunk:
    raise InputError(f'{count} frames to cache anew do not divide into chunks of {chunk}.')


def _recached_behind_sink(read, cache, latents, start, chunk):
  """`recache` for a sink that stays, one chunk or all of the frames behind it at a time."""
  sink, latents = cache.sink, latents[:, cache.sink :]
  count = latents.shape[1]
  if not count:
    return cache
  _check_chunks(count, chunk)
  size, first = chunk or count, start + sink
  # Only what these frames may see: the sink, and behind it room for all chunks but the last.
  room = count - size
  held = jax.tree.map(lambda x: x[:, :, :sink], (cache.k, cache.v))
  held = [jnp.pad(x, ((0, 0), (0, 0), (0, room), (0, 0), (0, 0), (0, 0))) for x in held]
  frames = jnp.pad(cache.frames[:sink], (0, room), constant_values=-1)
  seen = cache.replace(k=held[0], v=held[1], frames=frames, window=None)

  def one(seen, i):
    at = first + i * size
    own = read(jax.lax.dynamic_slice_in_dim(latents, i * size, size, axis=1), Chunk(seen, at))
    # The last chunk overwrites an earlier one, which nobody reads any more.
    return write(seen, own.k, own.v, at), (own.k, own.v)

  if not room:
    own = read(latents, Chunk(seen, first))
    return rewrite(cache, own.k, own.v, first, keep_sink=True)
  _, own = jax.lax.scan(one, seen, jnp.arange(count // size))
  k, v = (rearrange(x, 'i layer b f ... -> layer b (i f) ...') for x in own)
  return rewrite(cache, k, v, first, keep_sink=True)
