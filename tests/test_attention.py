"""The back ends of attention agree, in values and gradients; what cannot run is refused.

Splash runs on TPU alone: here its kernel is interpreted, at lengths that are no multiples of its blocks. The tolerances
are a few roundings of float32 in sums of some hundred terms of size 1.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from salt_jax import flops, recipe
from salt_jax.errors import InputError
from salt_jax.models import attention, splash, wan
from salt_jax.models.attention import Kernel
from tests import tiny, tiny_config

SPLASH = Kernel('splash', (256, 256, 128), interpret=True)


def _qkv(queries, keys, seed=0):
  rng = np.random.default_rng(seed)
  return tuple(
    jnp.asarray(rng.standard_normal((2, length, 2, 128)), jnp.float32)
    for length in (queries, keys, keys)
  )


def _value_and_grads(fn, args, kernel):
  weights = jnp.cos(jnp.arange(128.0))

  def loss(*args):
    out = fn(*args, kernel=kernel)
    return jnp.sum(out * weights), out

  (_, out), grads = jax.value_and_grad(loss, range(len(args)), has_aux=True)(*args)
  return out, *grads


def _agree(fn, args, kernel=SPLASH):
  for got, want in zip(
    _value_and_grads(fn, args, kernel),
    _value_and_grads(fn, args, attention.DENSE),
    strict=True,
  ):
    scale = float(jnp.abs(want).max())
    np.testing.assert_allclose(got, want, atol=5e-6 * scale, rtol=0)


@pytest.mark.parametrize('ring', [False, True])
def test_splash_is_dense_attention_at_lengths_that_need_padding(ring):
  args = _qkv(300, 420)  # two blocks of queries, two of keys
  valid = jnp.asarray(np.random.default_rng(1).random(420) < 0.6) if ring else None
  _agree(lambda q, k, v, kernel: attention.attend(q, k, v, valid, kernel), args)


def _clip(q, k, v, kernel):
  return attention.chunk_causal((q, k, v), 150, None, kernel)


def _behind(q, k, v, kernel):
  """Three chunks, each behind as many frames of a cache as come before it, of which some are hidden besides."""
  old = _qkv(1, 300, seed=5)[1:]
  at = jnp.arange(300)
  return attention.chunk_causal(
    (q, k, v), 150, lambda i: (*old, (at < 100 * i) & (at % 7 > 0)), kernel
  )


@pytest.mark.parametrize('fn', [_clip, _behind])
def test_splash_is_dense_attention_chunk_by_chunk(fn):
  """150 tokens a chunk, no multiple of 128."""
  _agree(fn, _qkv(450, 450))


@pytest.mark.parametrize('live', [False, True])
@pytest.mark.parametrize('kernel', [attention.DENSE, SPLASH], ids=lambda kernel: kernel.name)
def test_a_past_gets_a_gradient_if_it_is_live_and_none_if_not(kernel, live):
  """Against attention to all keys in one piece, of which what is dead is a constant."""
  q, k, v = _qkv(300, 300)
  old = _qkv(1, 300, seed=5)[1:]

  def read(q, k, v, *old, kernel):
    def before(i):
      return (*old, jnp.arange(300) < 190 * i)

    return attention.chunk_causal((q, k, v), 150, before, kernel, live)

  def plain(q, k, v, *old, kernel):
    old = old if live else jax.lax.stop_gradient(old)
    first = attention.dense(q[:, :150], k[:, :150], v[:, :150])
    both = zip((k, v), old, strict=True)
    k, v = (jnp.concatenate([x[:, 150:], y[:, :190]], axis=1) for x, y in both)
    return jnp.concatenate([first, attention.dense(q[:, 150:], k, v)], axis=1)

  got = _value_and_grads(read, (q, k, v, *old), kernel)
  for one, want in zip(got, _value_and_grads(plain, (q, k, v, *old), kernel), strict=True):
    np.testing.assert_allclose(one, want, atol=5e-6 * float(jnp.abs(want).max()), rtol=0)
  assert all(bool(jnp.any(x)) == live for x in got[-2:])


@pytest.fixture
def computed(monkeypatch):
  """Rows of blocks that the gradient to keys and values is told to compute."""
  make, rows = splash.by_queries, []

  def seen(*args):
    table = make(*args)
    rows.extend(table.compute[0].tolist())
    return table

  monkeypatch.setattr(splash, 'by_queries', seen)
  return rows


def test_blocks_without_a_trained_key_are_passed_over_by_the_gradient_to_keys(computed):
  """Blocks of 256: trained and seen; hidden; trained up to key 600; frozen; frozen and hidden.

  Of a block that is computed all keys get what they would get if nothing were frozen: `attend` alone drops it.
  """
  at = jnp.arange(1280)
  valid = (at < 1024) & (at // 256 != 1)
  args = _qkv(300, 1280)

  def read(q, k, v, kernel):
    return splash.attend(q, k, v, valid, *kernel[1:], trained=600)

  out, dq, *got = _value_and_grads(read, args, SPLASH)
  right, right_dq, *want = _value_and_grads(
    lambda q, k, v, kernel: attention.dense(q, k, v, valid), args, attention.DENSE
  )
  assert computed == [[1, 0, 1, 0, 0]] * 3
  some = jnp.isin(at // 256, jnp.array([0, 2]))
  for one, other in zip(got, want, strict=True):
    assert bool(jnp.any(other[:, 768:1024])) and not bool(jnp.any(one[:, ~some]))
  got, want = ([x[:, some] for x in grads] for grads in (got, want))
  for one, other in zip((out, dq, *got), (right, right_dq, *want), strict=True):
    np.testing.assert_allclose(one, other, atol=5e-6 * float(jnp.abs(other).max()), rtol=0)


def test_blocks_of_hidden_keys_are_not_multiplied():
  """Blocks of 256: NaN behind the last key that is seen, and in a block between, would spoil whatever they touch."""
  at = jnp.arange(1280)
  valid = (at < 700) & ~((at >= 256) & (at < 512))
  q, k, v = _qkv(150, 1280)
  hidden = (at // 256 == 1) | (at >= 768)
  broken = (jnp.where(hidden[:, None, None], jnp.nan, x) for x in (k, v))

  def read(q, k, v, kernel):
    return attention.attend(q, k, v, valid, kernel)

  want = _value_and_grads(read, (q, k, v), attention.DENSE)
  for got, right in zip(_value_and_grads(read, (q, *broken), SPLASH), want, strict=True):
    np.testing.assert_allclose(got, right, atol=5e-6 * float(jnp.abs(right).max()), rtol=0)


@pytest.mark.parametrize(
  'some', ['1000', '0001', '0110', '1011', '1111'], ids=lambda word: f'blocks {word}'
)
def test_a_block_that_is_passed_over_loads_the_next(some):
  some = [word == '1' for word in some]
  load, computed = splash.by_keys(jnp.repeat(jnp.asarray(some), 128), 3, 128)
  seen = [i for i, one in enumerate(some) if one]
  following = [next((j for j in seen if j >= i), seen[0]) for i in range(4)]
  np.testing.assert_array_equal(load, [[following] * 3])
  np.testing.assert_array_equal(computed, [[some] * 3])


@pytest.mark.parametrize('seed', range(4))
def test_the_gradient_to_keys_computes_the_blocks_with_a_trained_key_and_no_others(seed):
  rng = np.random.default_rng(seed)
  trained = rng.random(8 * 128) < 1 / 128  # some blocks have none, some have one
  load, computed = splash.by_queries(jnp.asarray(trained), 3, 128)
  blocks = {key // 128 for key in np.flatnonzero(trained)}
  assert 0 < len(blocks) < 8
  for block in range(8):
    assert computed[0, :, block].tolist() == [block in blocks] * 3
    assert load[0, :, block].tolist() == ([0, 1, 2] if block in blocks else [0, 0, 0])


@pytest.mark.parametrize('live, blocks', [(False, 2), (True, 4)])
def test_a_chunk_behind_a_cache_has_the_gradient_to_its_own_keys_alone(computed, live, blocks):
  """300 keys of its own and 600 before them, in blocks of 256."""
  attention.attend_behind(_qkv(300, 300), (*_qkv(1, 600)[1:], None), SPLASH, live)
  assert computed == [[1] * blocks + [0] * (4 - blocks)] * 3


@pytest.mark.parametrize('kind', splash.BLOCKS)
def test_little_is_multiplied_for_nothing(kind):
  """A rollout at 480x832, seven chunks of 4,680 tokens: pairs that kernels compute against those that are needed.

  With its gradient, all of a pass is counted: forwards, and with remat once more, two products of the pairs that are
  seen; in the gradient to queries three, and in that to keys four of those within a chunk.
  """
  chunk, keys, along_keys, along_queries = 4680, 7 * 4680 + 4680, 0, 0
  rows, width, _ = splash.chosen(chunk, keys, splash.BLOCKS[kind])
  at, blocks = jnp.arange(-(-keys // width) * width), -(-chunk // rows)
  for i in range(7):
    seen = at < (i + 1) * chunk
    along_keys += int(splash.by_keys(seen, blocks, width).compute.sum()) * rows * width
    learnt = splash.by_queries(seen & (at < chunk), blocks, width)
    along_queries += int(learnt.compute.sum()) * rows * width
  assert along_keys <= 1.1 * 28 * chunk**2

  cfg, product = wan.wan_1_3b(), 2 * 1536 * 30
  chunking = tiny.chunking(frames=21, chunk=3, cache=(30, 1560, 12, 128))
  once, frozen = flops.chunk_causal(cfg, chunking), flops.past(cfg, chunking)
  other = sum(flops for name, flops in once.items() if name != 'self_attention')
  blocks = other - once['embeddings'] - once['head']
  for saves, forwards in (((), 4), (('attention',), 2)):
    cfg = dataclasses.replace(cfg, attention='splash', remat_saves=saves)
    _, formula, again, _ = flops._trained('student', cfg, once, behind=frozen)
    assert formula == pytest.approx(3 * sum(once.values()) - frozen)
    executed = product * ((forwards + 3) * along_keys + 4 * along_queries)
    executed += 3 * other + blocks
    assert formula + again < executed <= 1.1 * formula + again


def test_rows_are_plain_attention_over_flat_tokens():
  q, k, v = _qkv(12, 7)
  five = q.reshape(2, 3, 4, 2, 128)
  got = attention.attend_rows(five, k, v)
  np.testing.assert_array_equal(got.reshape(q.shape), attention.dense(q, k, v))


@pytest.mark.parametrize('length, largest', [(4680, 2048), (32760, 2048), (1560, 1024), (130, 512)])
def test_blocks_pad_little_and_fit(length, largest):
  """Oracle: all multiples of 128 up to the largest, whose count is at most twice the fewest."""
  size = splash.block(length, largest)
  fewest = -(-length // largest)
  padded = {
    -(-length // s) * s for s in range(128, largest + 1, 128) if -(-length // s) <= 2 * fewest
  }
  assert size % 128 == 0 and size <= largest
  assert -(-length // size) * size == min(padded)


def test_keys_come_in_whole_steps_of_the_kernel():
  for keys in (100, 512, 4680, 9360, 32760):
    _, block, at_once = splash.chosen(4680, keys, (2048, 2048, 1024))
    assert block % at_once == 0 and at_once % 128 == 0 and block <= 2048


def test_cudnn_reads_what_may_be_seen_first():
  """Lengths stand for the mask: dense attention over the first `sum(valid)` keys is dense attention behind the mask."""
  q, k, v = _qkv(5, 9)
  valid = jnp.array([1, 0, 1, 1, 0, 0, 1, 1, 0], bool)
  k2, v2 = (attention.first_valid(x, valid)[:, :5] for x in (k, v))
  want = attention.dense(q, k, v, valid)
  np.testing.assert_allclose(attention.dense(q, k2, v2), want, atol=1e-6)


@pytest.mark.parametrize('queries, keys', [(6, 257), (5, 8), (6, 8)])
@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('trained', [None, 3])
def test_cudnn_gets_even_lengths_and_computes_the_same(monkeypatch, queries, keys, masked, trained):
  """The call itself is XLA's here, which takes the same arguments: cuDNN has no CPU form."""
  q, k, v = (x.astype(jnp.float16) for x in _qkv(queries, keys))
  valid = jnp.arange(keys) % 3 > 0 if masked else None
  call = jax.nn.dot_product_attention

  def instead(q, k, v, *, implementation, **rest):
    assert implementation == 'cudnn' and q.shape[1] % 2 == k.shape[1] % 2 == v.shape[1] % 2 == 0
    return call(q, k, v, implementation='xla', **rest)

  monkeypatch.setattr(jax.nn, 'dot_product_attention', instead)

  def loss(qkv, kernel):
    out = attention.attend(*qkv, valid, kernel, trained)
    return jnp.sum(jnp.sin(out.astype(jnp.float32)))

  got, want = (jax.value_and_grad(loss)((q, k, v), Kernel(name)) for name in ('cudnn', 'dense'))
  for one, two in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
    assert one.shape == two.shape
    # Half precision has 11 bits; the largest values here are about 1.
    np.testing.assert_allclose(np.float32(one), np.float32(two), atol=4e-3)
  for one in (*got[1][1:], *want[1][1:]):
    assert bool(jnp.any(one[:, 3:])) == (trained is None)


@pytest.mark.parametrize(
  'platform, kind, name',
  [('tpu', 'TPU v5', 'splash'), ('gpu', 'NVIDIA H100', 'cudnn'), ('cpu', 'cpu', 'dense')],
)
def test_auto_is_the_platforms_own(platform, kind, name):
  chosen, blocks = attention.choose('auto', platform, kind)
  assert chosen == name and bool(blocks) == (name == 'splash')


@pytest.mark.parametrize(
  'args, words',
  [
    (('splash', 'cpu', 'cpu'), 'attention "splash" needs a tpu, and this is a cpu: set it to auto'),
    (('cudnn', 'tpu', 'TPU v5'), 'attention "cudnn" needs a gpu, and this is a tpu'),
    (
      ('flash', 'gpu', 'x'),
      'attention "flash" is unknown; choose one of auto, dense, cudnn, splash.',
    ),
    (('splash', 'tpu', 'TPU v9'), 'has no blocks for a "TPU v9": name them as attention_blocks'),
    (
      ('splash', 'tpu', 'TPU v9', (100, 256, 128)),
      'must be (queries, keys, keys at once), multiples of 128',
    ),
    (
      ('splash', 'tpu', 'TPU v9', (128, 256, 384)),
      'must be (queries, keys, keys at once), multiples of 128',
    ),
  ],
)
def test_what_cannot_run_is_refused(args, words):
  with pytest.raises(InputError) as error:
    attention.choose(*args)
  assert words in str(error.value) and '\n' not in str(error.value)


def test_a_config_asks_for_what_its_machine_has():
  config = tiny_config.get_config('nowhere')
  config.model.attention, config.teacher.attention = 'auto', 'auto'
  assert recipe.build(config).model.kernel == attention.DENSE
  on_tpu = recipe.build(config, ('tpu', 'TPU v6 lite'))
  assert on_tpu.teacher.kernel == Kernel('splash', splash.BLOCKS['TPU v6 lite'])
  config.teacher.attention = 'splash'
  with pytest.raises(InputError, match='"splash" needs a tpu'):
    recipe.build(config)


def test_cudnn_refuses_32_bits():
  with pytest.raises(InputError, match='needs bfloat16 or float16, not float32'):
    attention.attend(*_qkv(4, 4), kernel=Kernel('cudnn'))


def _kernels(jaxpr):
  """Kernels of a traced program whose results are used."""
  inner = [
    getattr(x, 'jaxpr', x)
    for eqn in jaxpr.eqns
    if eqn.outvars and eqn.primitive.name != 'pallas_call'
    for x in jax.tree.leaves(tuple(eqn.params.values()), is_leaf=lambda x: hasattr(x, 'eqns'))
    if hasattr(x, 'eqns') or hasattr(x, 'jaxpr')
  ]
  own = sum(eqn.primitive.name == 'pallas_call' for eqn in jaxpr.eqns)
  return own + sum(map(_kernels, inner))


@pytest.mark.parametrize('chunk', [None, tiny.CHUNK])
def test_a_block_may_keep_its_attention(chunk):
  """Self- and cross-attention run forwards, again, and backwards in two kernels: 8; what is kept is not run again."""

  def count(**changes):
    blocks = dict(attention='splash', attention_blocks=(128, 128, 128))
    cfg = dataclasses.replace(tiny.WAN, dim=256, remat=True, **blocks, **changes)
    params = jax.tree.map(lambda s: jnp.zeros(s.shape), wan.param_shapes(cfg))

    def loss(params, x):
      ctx = wan.Clip(chunk=chunk)
      return jnp.sum(wan.apply(params, x, tiny.levels(1), tiny.prompt(), ctx, cfg)[0])

    return _kernels(jax.make_jaxpr(jax.grad(loss))(params, tiny.latents(0)).jaxpr)

  assert count() == 8 and count(remat_saves=('attention',)) == 6


def test_all_chunks_of_a_clip_share_their_kernels():
  """However many chunks: one kernel forwards and two backwards, and the first is not run again."""

  def loss(q, k, v):
    return jnp.sum(attention.chunk_causal((q, k, v), 128, None, SPLASH))

  for chunks in (2, 3):
    args = _qkv(128 * chunks, 128 * chunks)
    assert _kernels(jax.make_jaxpr(jax.grad(loss, (0, 1, 2)))(*args).jaxpr) == 3


@pytest.mark.parametrize('remat', [False, True])
def test_what_a_kernel_keeps_between_traces_is_no_tracer(remat):
  blocks = dict(attention='splash', attention_blocks=(128, 128, 128))
  cfg = dataclasses.replace(tiny.WAN, dim=256, **blocks)
  for again in (remat, not remat):
    wan.param_shapes(dataclasses.replace(cfg, remat=again))


def test_only_what_has_a_name_is_kept():
  with pytest.raises(InputError, match='take attention and block_input, not queries'):
    dataclasses.replace(tiny.WAN, remat_saves=('queries',))
