"""The cache by itself: what is seen, what is kept, what is overwritten."""

import jax.numpy as jnp
import numpy as np
import pytest

from salt_jax.errors import InputError
from salt_jax.models import cache as caches

CHUNK = 3


def _frame(f):
  """Keys that say which frame they are, `[layer b f t n d]`."""
  return jnp.full((1, 1, 1, 2, 1, 2), float(f))


def _fill(cache, upto, write=caches.write):
  for start in range(0, upto, CHUNK):
    k = jnp.concatenate([_frame(start + i) for i in range(CHUNK)], axis=2)
    cache = write(cache, k, -k, start)
  return cache


def _frames_read(cache, start):
  """Absolute frames that a chunk at `start` reads, statically and by mask."""
  held = np.asarray(cache.k[0, 0, :, 0, 0, 0])
  runs = caches.visible_runs(cache, start, CHUNK)
  static = sorted(int(f) for run in runs for f in held[run])
  mask = np.asarray(caches.visible(cache, jnp.int32(start), CHUNK))
  return static, sorted(int(f) for f in held[mask])


def _expected(start, sink, window):
  if window is None:
    return list(range(start))
  recent = start + CHUNK - (window - sink)
  return [f for f in range(start) if f < sink or f >= recent]


@pytest.mark.parametrize(
  ('sink', 'window'), [(0, None), (0, 6), (0, 7), (3, 9), (3, 12), (1, 8), (2, 21)]
)
@pytest.mark.parametrize('streaming', [False, True])
def test_reads_exactly_the_frames_that_the_window_names(sink, window, streaming):
  total = 21
  slots = caches.slots_needed(total, CHUNK, sink, window) if streaming else total
  cache = caches.allocate((1, 1, slots, 2, 1, 2), jnp.float32, sink, window)
  for start in range(0, total, CHUNK):
    static, masked = _frames_read(_fill(cache, start), start)
    assert static == masked == _expected(start, sink, window), f'chunk at {start}'


@pytest.mark.parametrize(('sink', 'window'), [(0, 6), (3, 9), (3, 12), (1, 8), (2, 7)])
def test_a_ring_longer_than_the_window_is_read_where_the_window_is(sink, window):
  """Of a ring that keeps a clip behind what its first chunk sees, no more slots are read than the window has."""
  cache = caches.allocate((1, 1, window - CHUNK + 12, 2, 1, 2), jnp.float32, sink, window)
  for end in range(0, 60, CHUNK):
    cache = _fill(
      cache, CHUNK, lambda c, k, v, start, end=end: caches.write(c, k + end, v, start + end)
    )
    held = np.asarray(cache.k[0, 0, :, 0, 0, 0])
    # Any chunk of the last clip can be asked again.
    for start in range(max(0, end - 9), end + CHUNK + 1, CHUNK):
      slots, valid = (np.asarray(x) for x in caches.visible_slots(cache, jnp.int32(start), CHUNK))
      assert slots.size == window - CHUNK
      assert sorted(held[slots[valid]].astype(int)) == _expected(start, sink, window), (end, start)


@pytest.mark.parametrize('last', [9, 30])
@pytest.mark.parametrize('capacity', [9, 21])
def test_recached_frames_keep_their_places_and_the_sink_is_kept_or_replaced(last, capacity):
  """Sink 3, window 12: twelve frames written anew (or the nine there are) hold 1000 + their number."""
  cache = _fill(caches.allocate((1, 1, capacity, 2, 1, 2), jnp.float32, 3, 12), last)
  first = max(0, last - 12)
  k = jnp.concatenate([_frame(1000 + f) for f in range(first, last)], axis=2)
  kept = caches.rewrite(cache, k, -k, jnp.int32(first), keep_sink=True)
  replaced = caches.rewrite(cache, k, -k, jnp.int32(first), keep_sink=False)
  np.testing.assert_array_equal(kept.frames, cache.frames)
  np.testing.assert_array_equal(replaced.frames[3:], cache.frames[3:])
  np.testing.assert_array_equal(kept.k[0, 0, :3, 0, 0, 0], [0, 1, 2])
  np.testing.assert_array_equal(replaced.frames[:3], first + np.arange(3))
  np.testing.assert_array_equal(replaced.k[0, 0, :3, 0, 0, 0], 1000 + first + np.arange(3))
  for new, sink in ((kept, [0, 1, 2]), (replaced, 1000 + first + np.arange(3))):
    slots, valid = caches.visible_slots(new, jnp.int32(last), CHUNK)
    read = np.asarray(new.k[0, 0, slots, 0, 0, 0])[np.asarray(valid)]
    recent = 1000 + np.arange(max(3, last - 6), last)
    np.testing.assert_array_equal(np.sort(read), np.sort([*sink, *recent]))
    np.testing.assert_array_equal(new.v, -new.k)


def test_sink_survives_many_turns_of_the_ring():
  cache = caches.allocate((1, 1, 9, 2, 1, 2), jnp.float32, 3, 12)
  cache = _fill(cache, 120)
  np.testing.assert_array_equal(cache.frames[:3], [0, 1, 2])
  np.testing.assert_array_equal(cache.k[0, 0, :3, 0, 0, 0], [0, 1, 2])
  assert sorted(np.asarray(cache.frames[3:])) == list(range(114, 120))


def test_writing_a_chunk_again_overwrites_it_in_place():
  once = _fill(caches.allocate((1, 1, 9, 2, 1, 2), jnp.float32, 3, 12), 15)
  again = caches.write(once, once.k[:, :, 3:6] * 0 + 7, once.v[:, :, 3:6], 12)
  np.testing.assert_array_equal(np.sort(once.frames), np.sort(again.frames))
  held = {int(f): float(k) for f, k in zip(again.frames, again.k[0, 0, :, 0, 0, 0], strict=True)}
  assert [held[f] for f in (12, 13, 14)] == [7.0, 7.0, 7.0] and held[11] == 11.0


def test_a_window_that_cannot_hold_sink_and_chunk_is_refused():
  with pytest.raises(InputError, match='window 6 is too short'):
    caches.slots_needed(21, CHUNK, 3, 6)
  # A window as long as the clip is the full cache, and still too short for what it must hold.
  with pytest.raises(InputError, match='window 21 is too short: it must exceed sink 20'):
    caches.slots_needed(21, CHUNK, 20, 21)
  assert caches.slots_needed(6, CHUNK, 3, 6) == 6
