"""Streams: a clip that goes on equals the longer clip, a switch writes what it should, training goes along them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

from salt_jax.diffusion import flow, rollout, streaming
from salt_jax.errors import InputError
from salt_jax.models import cache as caches
from salt_jax.models import wan
from tests import test_wan, tiny

APPLY = wan.bind(tiny.WAN)
SIGMAS = flow.padded_sigmas(4, 5.0, 9)
WINDOW, SINK, NEW = 4, 1, 4
CHUNKING = tiny.chunking(window=WINDOW, sink=SINK)


@functools.partial(jax.jit, static_argnames='chunking')
def _roll(params, past, chunking=CHUNKING):
  plan = rollout.student_plan(chunking, jnp.asarray(SIGMAS), jnp.int32(1))
  return rollout.rollout(APPLY, params, tiny.keys(), tiny.prompt(), plan, past)


def _past(cache, start, x0, done):
  return rollout.Past(cache, jnp.int32(start), x0, jnp.int32(done))


def _nothing():
  return _past(rollout.stream_cache(CHUNKING, tiny.BATCH), 0, jnp.zeros_like(tiny.latents(0)), 0)


@pytest.fixture(scope='module')
def clips():
  """Three clips of one stream, frames 0-5, 4-9 and 8-13, of which the later ones are given their first chunk."""
  rolled = [_roll(tiny.params(), _nothing())]
  for i in (1, 2):
    given = jnp.pad(rolled[-1].x0[:, NEW:], ((0, 0), (0, NEW), (0, 0), (0, 0), (0, 0)))
    rolled.append(_roll(tiny.params(), _past(rolled[-1].cache, i * NEW, given, 1)))
  return rolled


def test_clips_that_go_on_equal_one_long_clip(clips):
  """The long clip reads static slices of a cache that holds all of it; the stream a ring of 8 slots behind a mask."""
  long = _roll(tiny.params(), None, dataclasses.replace(CHUNKING, frames=14))
  assert clips[0].cache.capacity == WINDOW - tiny.CHUNK + tiny.FRAMES < 14
  for i, clip in enumerate(clips):
    # Up to eight passes in a row amplify float32 rounding.
    part = slice(i * NEW, i * NEW + tiny.FRAMES)
    np.testing.assert_allclose(clip.x0, long.x0[:, part], atol=2e-4, err_msg=f'clip {i}')
  assert _roll._cache_size() == 2, 'a position recompiled the rollout'


def _exit_loop(params, clip):
  """Exits of the last clip's new chunks, one by one behind the frames that the window names, in a plain cache."""
  k, v, frames = clip.cache.k, clip.cache.v, np.asarray(clip.cache.frames).tolist()
  outs = []
  for at in range(tiny.CHUNK, tiny.FRAMES, tiny.CHUNK):
    start, x = 2 * NEW + at, clip.trace.x[:, at : at + tiny.CHUNK]
    seen = [f for f in range(start) if f < SINK or f >= start + tiny.CHUNK - (WINDOW - SINK)]
    slots = np.array([frames.index(f) for f in seen])
    past = caches.KVCache(k[:, :, slots], v[:, :, slots], jnp.asarray(seen))
    t = jnp.full(x.shape[:2], 1000 * SIGMAS[1])
    outs.append(
      x - SIGMAS[1] * APPLY(params, x, t, tiny.prompt(), wan.Chunk(past, jnp.int32(start)))[0]
    )
  return jnp.concatenate(outs, axis=1)


def _exit(params, clip):
  """The same, all chunks at once."""
  v = rollout.velocity(APPLY, params, clip.trace, tiny.prompt(), clip.cache, tiny.CHUNK)
  return flow.x0_from_velocity(clip.trace.x, v, clip.trace.sigma)[:, tiny.CHUNK :]


def test_the_exit_pass_of_a_clip_that_goes_on_equals_the_loop_written_out(clips):
  clip, weight = clips[2], tiny.latents(7)[:, tiny.CHUNK :]

  def weighted(exits):
    return jax.jit(
      jax.value_and_grad(
        lambda p: (lambda x: ((x * weight).sum(), x))(exits(p, clip)), has_aux=True
      )
    )

  (_, one), grad = weighted(_exit)(tiny.params())
  (_, other), expected = weighted(_exit_loop)(tiny.params())
  np.testing.assert_allclose(one, clip.x0[:, tiny.CHUNK :], atol=1e-4)
  np.testing.assert_allclose(one, other, atol=1e-4)
  scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
  for a, b in zip(jax.tree.leaves(grad), jax.tree.leaves(expected), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4 * scale)


def test_no_gradient_flows_through_the_cache_or_into_the_rollout(clips):
  def loss(params, k):
    cache = clips[0].cache.replace(k=clips[0].cache.k + k)
    rolled = _roll(params, _past(cache, NEW, clips[0].x0, 1))
    rolled = rolled.replace(cache=rolled.cache.replace(k=rolled.cache.k + k))
    return jnp.square(_exit(jax.lax.stop_gradient(params), rolled)).sum() + rolled.x0.sum()

  zero = jax.jit(jax.grad(loss, argnums=(0, 1)))(tiny.params(), jnp.zeros_like(clips[0].cache.k))
  assert not any(np.asarray(g).any() for g in jax.tree.leaves(zero))


def test_a_stream_without_a_window_is_refused():
  with pytest.raises(InputError, match='a stream needs a window'):
    rollout.stream_cache(tiny.chunking(), tiny.BATCH)


@functools.partial(jax.jit, static_argnames=('chunk', 'global_sink'))
def _recache(cache, latents, start, chunk=None, global_sink=False, params=None):
  return streaming.recache(
    APPLY,
    tiny.params() if params is None else params,
    cache,
    latents,
    tiny.prompt(seed=4),
    start,
    global_sink=global_sink,
    chunk=chunk,
  )


def _held(cache, what):
  """Absolute frame -> what the ring behind the sink holds of it."""
  frames = np.asarray(cache.frames)[SINK:]
  return {int(f): np.asarray(what[:, :, SINK + i]) for i, f in enumerate(frames)}


@pytest.mark.parametrize('chunk', [None, tiny.CHUNK])
def test_a_switch_writes_the_window_anew_with_the_new_prompt_at_its_positions(clips, chunk):
  """Values do not depend on a shift in time, because attention sees differences of positions; keys are rotated."""
  cache, latents, start = clips[2].cache, clips[2].x0[:, -WINDOW:], 14 - WINDOW
  new = _recache(cache, latents, jnp.int32(start), chunk)
  clip = jnp.pad(latents, ((0, 0), (start, 0), (0, 0), (0, 0), (0, 0)))
  t = jnp.zeros(clip.shape[:2])
  _, at_zero = APPLY(
    tiny.params(), latents, t[:, :WINDOW], tiny.prompt(seed=4), wan.Clip(chunk=chunk)
  )
  _, in_place = APPLY(tiny.params(), clip, t, tiny.prompt(seed=4), wan.Clip())
  k, v, old_k = _held(new, new.k), _held(new, new.v), _held(cache, cache.k)
  assert k.keys() == old_k.keys()
  for i, f in enumerate(range(start, 14)):
    np.testing.assert_allclose(v[f], at_zero.v[:, :, i], atol=1e-4, err_msg=f'values of frame {f}')
    # The first layer's keys know nothing but their frame and its position.
    np.testing.assert_allclose(
      k[f][0], in_place.k[0, :, f], atol=1e-4, err_msg=f'keys of frame {f}'
    )
    assert np.abs(k[f][-1] - old_k[f][-1]).max() > 1e-3, 'the prompt made no difference'
  for f in set(k) - set(range(start, 14)):
    np.testing.assert_array_equal(k[f], old_k[f])


def test_causal_recaching_differs_from_the_originals(clips):
  args = clips[2].cache, clips[2].x0[:, -WINDOW:], jnp.int32(14 - WINDOW)
  assert np.abs(_recache(*args, tiny.CHUNK).v - _recache(*args).v).max() > 1e-3
  with pytest.raises(InputError, match='4 frames to cache anew do not divide into chunks of 3'):
    _recache(*args, 3)


def test_the_sink_is_kept_or_replaced_and_the_next_chunk_reads_it(clips):
  cache, latents = clips[2].cache, clips[2].x0[:, -WINDOW:]
  kept, replaced = (_recache(cache, latents, jnp.int32(10), None, sink) for sink in (True, False))
  np.testing.assert_array_equal(kept.k[:, :, :SINK], cache.k[:, :, :SINK])
  np.testing.assert_array_equal(kept.frames, cache.frames)
  assert replaced.frames[:SINK].tolist() == [10]
  np.testing.assert_array_equal(
    replaced.v[:, :, 0], replaced.v[:, :, list(replaced.frames).index(10, SINK)]
  )
  x0s = [
    _roll(tiny.params(), _past(c, 12, clips[2].x0, 1)).x0[:, tiny.CHUNK :]
    for c in (cache, kept, replaced)
  ]
  assert np.abs(x0s[0] - x0s[1]).max() > 1e-3 and np.abs(x0s[1] - x0s[2]).max() > 1e-3


@pytest.mark.parametrize('chunk', [None, 1])
def test_behind_a_sink_that_stays_frames_see_it_besides_each_other(clips, chunk, monkeypatch):
  """diffusers, whose every layer is handed the sink of the old prompt in place of all frames before the window."""
  model, params = test_wan._oracle(tiny.WAN)
  cache, latents, first = clips[2].cache, clips[2].x0[:, -WINDOW:], 14 - WINDOW + SINK
  new = _recache(cache, latents, jnp.int32(14 - WINDOW), chunk, True, params)
  tokens, seen, attend = cache.k.shape[3], [], torch.nn.functional.scaled_dot_product_attention
  own = slice(first * tokens, None)
  place = np.arange(14 * tokens) // tokens - first  # of a query, and of the keys behind the sink
  allowed = place[:, None] // (chunk or 14) >= place[None, own] // (chunk or 14)
  allowed = torch.from_numpy(np.pad(allowed, ((0, 0), (SINK * tokens, 0)), constant_values=True))

  def behind_sink(query, key, value, attn_mask=None, **how):
    if key.shape[2] == query.shape[2]:
      layer, given = len(seen), (cache.k, cache.v)
      seen.append((key[:, :, own], value[:, :, own]))
      sinks = [np.array(x[layer, :, :SINK]).transpose(0, 3, 1, 2, 4) for x in given]
      sinks = [torch.from_numpy(x.reshape(*x.shape[:2], -1, x.shape[-1])) for x in sinks]
      key, value = (torch.cat(pair, 2) for pair in zip(sinks, seen[-1], strict=True))
      attn_mask = allowed
    return attend(query, key, value, attn_mask=attn_mask, **how)

  monkeypatch.setattr(torch.nn.functional, 'scaled_dot_product_attention', behind_sink)
  for block in model.blocks:
    block.attn1.set_processor(WanAttnProcessor())
  clip = np.zeros((tiny.BATCH, 14, *tiny.LATENT), np.float32)
  clip[:, first:] = latents[:, SINK:]
  with torch.no_grad():
    model(
      torch.from_numpy(np.moveaxis(clip, -1, 1).copy()),
      torch.zeros(tiny.BATCH),
      torch.from_numpy(np.array(tiny.prompt(seed=4).text)),
    )
  for held, which in ((_held(new, new.k), 0), (_held(new, new.v), 1)):
    for i, frame in enumerate(range(first, 14)):
      wanted = np.stack([layer[which].numpy() for layer in seen])[
        ..., i * tokens : (i + 1) * tokens, :
      ]
      # float32 sums of another order through three layers; without the sink the last one is off by 0.1.
      np.testing.assert_allclose(
        held[frame], np.swapaxes(wanted, 2, 3), atol=1e-4, err_msg=f'frame {frame}'
      )
  np.testing.assert_array_equal(new.k[:, :, :SINK], cache.k[:, :, :SINK])
  np.testing.assert_array_equal(new.frames, cache.frames)


@pytest.mark.parametrize('chunk, slots', [(None, SINK), (3, SINK), (1, SINK + 2)])
def test_no_slots_are_multiplied_that_no_chunk_of_the_window_reads(clips, chunk, slots):
  cache, given = clips[2].cache, []

  def apply(params, x, t, prompt, context):
    given.append(context.cache.capacity)
    own = jnp.zeros((*cache.k.shape[:2], x.shape[1], *cache.k.shape[3:]))
    return x, context.cache.replace(k=own, v=own)

  again = functools.partial(streaming.recache, apply, global_sink=True, chunk=chunk)
  jax.eval_shape(again, {}, cache, clips[2].x0[:, -WINDOW:], tiny.prompt(), jnp.int32(10))
  assert set(given) == {slots}


@pytest.mark.parametrize('stays', [True, False])
def test_recaching_tells_the_level_of_the_cache(clips, stays):
  cache, told = clips[2].cache, []

  def apply(params, x, t, prompt, context):
    told.append(t)
    own = jnp.zeros((*cache.k.shape[:2], x.shape[1], *cache.k.shape[3:]))
    return x, cache.replace(k=own, v=own)

  again = functools.partial(streaming.recache, apply, global_sink=stays, context_noise=0.1)
  again({}, cache, clips[2].x0[:, -WINDOW:], tiny.prompt(), jnp.int32(10))
  np.testing.assert_allclose(
    told[0], np.full((tiny.BATCH, WINDOW - SINK * stays), 100.0), rtol=1e-6
  )


def test_a_switch_within_the_sink_that_stays_changes_nothing(clips):
  cache = clips[0].cache
  jax.tree.map(
    np.testing.assert_array_equal,
    _recache(cache, clips[0].x0[:, :SINK], jnp.int32(0), None, True),
    cache,
  )


def test_one_program_recaches_at_every_position(clips):
  before = _recache._cache_size()
  for start in (4, 6, 10):
    _recache(clips[2].cache, clips[2].x0[:, :WINDOW], jnp.int32(start), None, False)
  assert _recache._cache_size() <= before + 1


def test_where_steps_stand_in_streams():
  """Clips follow each other without a gap; each stream switches once, behind its first clip and before its last."""
  cfg = streaming.StreamingConfig()
  assert cfg.clips(21) == 13 and 21 + 18 * 12 == 237
  at = jax.vmap(lambda c: streaming.place(jax.random.key(0), c, cfg, 21))(jnp.arange(13 * 200))
  np.testing.assert_array_equal(at.stream, np.repeat(np.arange(200), 13))
  np.testing.assert_array_equal(at.clip, np.tile(np.arange(13), 200))
  switch = np.asarray(at.switch).reshape(200, 13)
  assert (switch == switch[:, :1]).all(), 'a stream changed its mind'
  # LongLive's frames 21, 39, ..., 201; 200 draws leave none of the 11 out.
  assert set(21 + 18 * (switch[:, 0] - 1)) == set(range(21, 202, 18))
