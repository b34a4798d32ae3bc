"""The key-value cache of a causal student: an explicit pytree, frame by frame.

Frame `f` lies in slot `f` while it fits; past the capacity the slots behind the sink are a ring. Keys are stored
after RoPE with their absolute position, so the order of the slots means nothing to attention. Full cache, window
and sink + window are this one type: `window` counts all the frames a chunk may see, itself and the sink
included, and a window at least as long as the clip is the full cache.

Reading never writes. A forward pass returns its own keys and values and `write` alone commits them.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from salt_jax.errors import InputError
from salt_jax.models import axes

# Axes of `[layer b slot t n d]`: as attention reads them.
LAYOUT = (None, axes.BATCH, None, None, axes.HEADS, None)


@struct.dataclass
class KVCache:
  """Keys and values of past frames.

  Attributes:
    k: rotated keys, `[layer b slot t n d]`, t tokens a frame.
    v: values, same shape.
    frames: absolute frame in each slot, -1 where empty.
    sink: first frames that are never evicted.
    window: frames visible to a chunk, itself and the sink included; None is unlimited.
  """

  k: Float[Array, 'layer b slot t n d']
  v: Float[Array, 'layer b slot t n d']
  frames: Int[Array, 'slot']
  sink: int = struct.field(pytree_node=False, default=0)
  window: int | None = struct.field(pytree_node=False, default=None)

  @property
  def capacity(self) -> int:
    return self.k.shape[2]


def allocate(
  shape: tuple[int, int, int, int, int, int], dtype, sink: int = 0, window: int | None = None
) -> KVCache:
  """An empty cache of `shape` (layers, batch, slots, tokens a frame, heads, head width).

  Raises:
    InputError: if the sink leaves no slot for the frames behind it.
  """
  if sink and shape[2] <= sink:
    raise InputError(
      f'a cache of {shape[2]} frames cannot hold a sink of {sink}: enlarge the window.'
    )
  zeros = axes.split(jnp.zeros(shape, dtype), *LAYOUT)
  return KVCache(zeros, zeros, jnp.full(shape[2], -1, jnp.int32), sink=sink, window=window)


def slots_needed(frames: int, chunk: int, sink: int, window: int | None) -> int:
  """Slots that streaming needs: those a chunk can see before itself, or the whole clip if that is less.

  Raises:
    InputError: if the window is shorter than sink + chunk, or than one frame more where the clip is longer than it.
  """
  whole = window is None or window >= frames
  if window is not None and window < sink + chunk + (not whole):
    raise InputError(f'window {window} is too short: it must exceed sink {sink} + chunk {chunk}.')
  return frames if whole else window - chunk


def _slot(frame, sink: int, capacity: int):
  return jnp.where(frame < sink, frame, sink + (frame - sink) % (capacity - sink))


def write(
  cache: KVCache,
  k: Float[Array, 'layer b f t n d'],
  v: Float[Array, 'layer b f t n d'],
  start: int | Int[Array, ''],
) -> KVCache:
  """Commits the keys and values of frames start, start+1, …; writing a chunk again overwrites it."""
  new_k, new_v, frames = cache.k, cache.v, cache.frames
  for i in range(k.shape[2]):
    slot = _slot(start + i, cache.sink, cache.capacity)
    new_k = jax.lax.dynamic_update_slice_in_dim(
      new_k, k[:, :, i : i + 1].astype(new_k.dtype), slot, axis=2
    )
    new_v = jax.lax.dynamic_update_slice_in_dim(
      new_v, v[:, :, i : i + 1].astype(new_v.dtype), slot, axis=2
    )
    frames = frames.at[slot].set(start + i)
  new_k, new_v = (axes.split(x, *LAYOUT) for x in (new_k, new_v))
  return cache.replace(k=new_k, v=new_v, frames=frames)


def visible(cache: KVCache, start: Int[Array, ''], count: int) -> Bool[Array, 'slot']:
  """Slots that a chunk of `count` frames at `start` may read."""
  f = cache.frames
  seen = (f >= 0) & (f < start)
  if cache.window is not None:
    is_sink = jnp.arange(cache.capacity) < cache.sink
    seen &= is_sink | (f >= start + count - (cache.window - cache.sink))
  return seen


def visible_slots(
  cache: KVCache, start: Int[Array, ''], count: int
) -> tuple[Int[Array, 'm'], Bool[Array, 'm']]:
  """Slots worth reading, no more than the window has room for, and which of them a chunk may read.

  A ring that keeps a whole clip of training is longer than the window: what lies outside is not multiplied.
  """
  sink, window = cache.sink, cache.window
  if window is None or cache.capacity <= window - count:
    return jnp.arange(cache.capacity), visible(cache, start, count)
  recent = start + count - (window - sink) + jnp.arange(window - sink - count)
  slots = jnp.concatenate([jnp.arange(sink), _slot(recent, sink, cache.capacity)])
  # Early frames belong to the sink and are not read twice.
  once = jnp.concatenate([jnp.ones(sink, bool), recent >= sink])
  return slots, visible(cache, start, count)[slots] & once


def rewrite(
  cache: KVCache,
  k: Float[Array, 'layer b f t n d'],
  v: Float[Array, 'layer b f t n d'],
  start: int | Int[Array, ''],
  keep_sink: bool,
) -> KVCache:
  """Commits the last frames before a prompt switch anew; their slots, and the others, stay where they are.

  Args:
    cache: as the first prompt left it.
    k, v: of the frames start, start+1, … up to the last one written.
    start: absolute index of the first.
    keep_sink: whether the sink stays as it is; otherwise the first of the given frames become the sink, and only
      an array as start reads such a cache.
  """
  new, sink = write(cache, k, v, start), cache.sink
  count = 0 if keep_sink else min(sink, k.shape[2])
  old = cache if keep_sink else new

  def put(given, before, after, axis):
    given = jax.lax.slice_in_dim(given, 0, count, axis=axis).astype(before.dtype)
    kept = jax.lax.slice_in_dim(before, count, sink, axis=axis)
    ring = jax.lax.slice_in_dim(after, sink, cache.capacity, axis=axis)
    return jnp.concatenate([given, kept, ring], axis=axis)

  frames = start + jnp.arange(k.shape[2])
  return new.replace(
    k=put(k, old.k, new.k, 2),
    v=put(v, old.v, new.v, 2),
    frames=put(frames, old.frames, new.frames, 0),
  )


def visible_runs(cache: KVCache, start: int, count: int) -> list[slice]:
  """The same for a start known at trace time: slices of slots, so that nothing hidden is ever multiplied."""
  capacity, sink = cache.capacity, cache.sink
  frames = np.arange(start)
  oldest = start - (capacity - sink)
  if cache.window is not None:
    oldest = max(oldest, start + count - (cache.window - sink))
  frames = frames[(frames < sink) | (frames >= oldest)]
  slots = np.sort(np.where(frames < sink, frames, sink + (frames - sink) % (capacity - sink)))
  breaks = np.flatnonzero(np.diff(slots) != 1) + 1
  return [slice(int(run[0]), int(run[-1]) + 1) for run in np.split(slots, breaks) if run.size]
