"""FLOPs by formula: published sizes, a count of every product in a traced program, and the draws themselves."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import pytest

from salt_jax import flops
from salt_jax.diffusion.rollout import Chunking, empty_cache
from salt_jax.models import text as text_model
from salt_jax.models import wan
from salt_jax.models.cache import visible_runs
from tests import tiny

SIZES = {'1.3b': wan.wan_1_3b(), '14b': wan.wan_14b()}


def _of_size(cfg, **changes) -> Chunking:
  cache = (cfg.layers, 1560, cfg.heads, cfg.head_dim)
  return Chunking(**dict(frames=21, chunk=3, latent=(60, 104, 16), cache=cache) | changes)


def products(jaxpr, scale=1, loops=None) -> float:
  """FLOPs of all matrix products of a traced program, scans by their length, other loops by what `loops` says."""
  total = 0.0
  for eqn in jaxpr.eqns:
    times = scale
    if eqn.primitive.name == 'dot_general':
      (contracted, _), _ = eqn.params['dimension_numbers']
      terms = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
      total += scale * 2 * terms * math.prod(eqn.outvars[0].aval.shape)
    elif eqn.primitive.name == 'scan':
      times = scale * eqn.params['length']
    elif eqn.primitive.name == 'while':
      times = scale * loops
    for inner in jax.tree.leaves(tuple(eqn.params.values()), is_leaf=_is_program):
      if _is_program(inner):
        total += products(getattr(inner, 'jaxpr', inner), times, loops)
  return total


def _is_program(x) -> bool:
  return hasattr(x, 'eqns') or hasattr(getattr(x, 'jaxpr', None), 'eqns')


def _traced(f, *args) -> float:
  return products(jax.make_jaxpr(f)(*args).jaxpr)


@pytest.mark.parametrize(
  'size, tokens, tera, attention',
  [
    ('1.3b', 1560, 283, 0.70),
    ('1.3b', 3600, 1250, 0.84),
    ('14b', 1560, 1678, 0.52),
    ('14b', 3600, 6523, 0.72),
  ],
)
def test_one_pass_over_a_clip(size, tokens, tera, attention):
  parts = flops.forward(SIZES[size], 21, tokens)
  total = sum(parts.values())
  assert round(total / 1e12) == tera
  assert parts['self_attention'] / total == pytest.approx(attention, abs=0.005)


@pytest.mark.parametrize('size, growing, fixed', [('1.3b', 199, 284), ('14b', 1314, 1691)])
def test_one_denoising_pass_over_seven_chunks(size, growing, fixed):
  cfg = SIZES[size]
  one = sum(flops.rollout(cfg, _of_size(cfg), 0).values())  # the cache's pass alone
  assert one / 1e12 == pytest.approx(growing, abs=0.8)
  masked = 7 * sum(flops.forward(cfg, 3, 1560, 3 * 1560 * 21 * 1560).values())
  assert masked / 1e12 == pytest.approx(fixed, abs=0.6)
  five = flops.rollout(cfg, _of_size(cfg), 4)
  assert sum(five.values()) == pytest.approx(5 * one)


def test_bytes_of_a_cache():
  for size, frame, clip, window in (('1.3b', 274 / 1024, 5.6, 3.2), ('14b', 1.19, 25.0, 14.3)):
    for frames, gib in ((1, frame), (21, clip), (12, window)):
      found = flops.cache_bytes(SIZES[size], frames, 1560) / 2**30
      assert found == pytest.approx(gib, abs=0.05 if frames > 1 else 0.005)
  like = jax.eval_shape(lambda: empty_cache(tiny.chunking(), 1))
  held = sum(x.size * x.dtype.itemsize for x in (like.k, like.v))
  assert held == flops.cache_bytes(tiny.WAN, tiny.FRAMES, 6, 'float32')


TOKENS = math.prod(tiny.LATENT[:2]) // 4


@pytest.mark.parametrize('cfg', [tiny.WAN, tiny.I2V, tiny.FLF2V, tiny.FRAMES_ALONE])
@pytest.mark.parametrize('chunk', [None, 2])
def test_a_clip_against_every_product_of_the_traced_pass(cfg, chunk):
  apply = functools.partial(wan.apply, ctx=wan.Clip(chunk=chunk), cfg=cfg)
  x, t = tiny.latents(0, batch=1), tiny.levels(1, batch=1)
  found = _traced(apply, wan.param_shapes(cfg), x, t, tiny.prompt(cfg, batch=1))
  if chunk is None:
    expected = flops.forward(cfg, tiny.FRAMES, TOKENS)
  else:
    expected = flops.chunk_causal(cfg, tiny.chunking(chunk=chunk))
  assert found == sum(expected.values())


@pytest.mark.parametrize('window, sink', [(None, 0), (4, 0), (5, 1)])
def test_a_chunk_and_a_cached_clip_against_the_traced_pass(window, sink):
  """A static start reads what a chunk may see and no more, so the program holds no other product."""
  cfg, chunking = tiny.WAN, tiny.chunking(window=window, sink=sink, chunk=1)
  cache = empty_cache(chunking, 1)
  params, text = wan.param_shapes(cfg), tiny.prompt(batch=1)
  for start in range(tiny.FRAMES):
    x, t = tiny.latents(0, 1, 1), tiny.levels(1, 1, 1)
    apply = functools.partial(wan.apply, ctx=wan.Chunk(cache, start), cfg=cfg)
    one = flops.forward(cfg, 1, TOKENS, flops.chunk_pairs(chunking, start))
    assert _traced(apply, params, x, t, text) == sum(one.values())
  x, t = tiny.latents(0, batch=1), tiny.levels(1, batch=1)
  apply = functools.partial(wan.apply, ctx=wan.Clip(chunk=1, past=cache), cfg=cfg)
  assert _traced(apply, params, x, t, text) == sum(flops.chunk_causal(cfg, chunking).values())


@pytest.mark.parametrize('window, sink', [(None, 0), (6, 0), (9, 3), (12, 3), (21, 3), (30, 3)])
def test_frames_that_a_chunk_sees(window, sink):
  chunking = tiny.chunking(frames=21, chunk=3, window=window, sink=sink)
  cache = jax.eval_shape(lambda: empty_cache(chunking, 1))
  for start in range(0, 21, 3):
    runs = visible_runs(cache, start, 3)
    assert flops.seen(chunking, start) == sum(run.stop - run.start for run in runs), start


def test_the_encoder_against_the_traced_pass():
  cfg = dataclasses.replace(text_model.nano_text(), dim_attn=32)
  ids, mask = jnp.zeros((1, 7), jnp.int32), jnp.ones((1, 7), bool)
  encode = functools.partial(text_model.encode, cfg=cfg)
  assert _traced(encode, text_model.param_shapes(cfg), ids, mask) == flops.encoder(cfg, 7)
