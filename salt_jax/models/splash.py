"""Splash attention of Pallas on TPU, for any lengths: padded to blocks, what is padded never seen.

One kernel serves all that a query may see. Keys that it may not, of padding, of a cache's later frames or of a ring,
have a segment of their own, and a block of keys that holds nothing else is neither loaded nor multiplied: which blocks
these are is data, so a step that reads one chunk and a step that reads seven are the same program. The kernel of the
gradient to keys and values passes over more: blocks of keys that get none, those of a frozen cache.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention
from jaxtyping import Array, Bool, Float, Int

from salt_jax.errors import InputError

# Name of the result for a remat policy; keeping it spares the kernel's forward pass.
SAVED = 'attention'
LANES = 128  # all blocks are multiples
# Largest (queries, keys, keys at once) of a block, by device kind: 4,680 tokens, a chunk of 480x832, pad to 4,992.
# Keys in blocks of 1,024 are at most 2.4% more than are seen (2,048: 4.7%), and compile in half the time; none has been
# timed on a TPU.
BLOCKS = dict.fromkeys(
  ('TPU v4', 'TPU v5', 'TPU v5 lite', 'TPU v6 lite', 'TPU7x'), (1664, 1024, 512)
)
# Room that these blocks need, an option of the compiler.
VMEM_KIB = {
  'TPU v4': 32768,
  'TPU v5': 65536,
  'TPU v5 lite': 65536,
  'TPU v6 lite': 65536,
  'TPU7x': 65536,
}


def check(blocks: tuple[int, ...]) -> None:
  """Refuses blocks that the kernel cannot have.

  Raises:
    InputError: not three multiples of 128, the second of the third.
  """
  whole = len(blocks) == 3 and all(size > 0 and size % LANES == 0 for size in blocks)
  if not whole or blocks[1] % blocks[2]:
    raise InputError(
      f'attention_blocks={blocks} must be (queries, keys, keys at once), multiples of {LANES}, such as '
      '(1024, 1024, 512).'
    )


def block(length: int, largest: int, unit: int = LANES) -> int:
  """Block of at most `largest`, a multiple of `unit`, that pads `length` least; of equals the largest."""
  fewest = -(-length // largest)
  sizes = {-(-length // count // unit) * unit for count in range(fewest, 2 * fewest + 1)}
  sizes = [size for size in sizes if size <= largest]
  return min(sizes, key=lambda size: (-(-length // size) * size, -size))


@functools.lru_cache(maxsize=64)
def _structure(heads: int, sizes: tuple[int, int, int], interpret: bool) -> jax.tree_util.PyTreeDef:
  """The kernel of these blocks without its tables; it has no length."""
  block_q, block_kv, compute = sizes
  one = splash_attention.MultiHeadMask([splash_attention.FullMask((block_q, block_kv))] * heads)
  blocks = splash_attention.BlockSizes(
    block_q=block_q,
    block_kv=block_kv,
    block_kv_compute=compute,
    block_q_dkv=block_q,
    block_kv_dkv=block_kv,
    block_kv_dkv_compute=compute,
    block_q_dq=block_q,
    block_kv_dq=block_kv,
  )
  kernel = splash_attention.make_splash_mha(
    one,
    block_sizes=blocks,
    head_shards=1,
    q_seq_shards=1,
    residual_checkpoint_name=SAVED,
    interpret=interpret,
  )
  return jax.tree.structure(kernel)


class Table(NamedTuple):
  """What a kernel is told of each block of queries and of keys, the same for all heads.

  Attributes:
    load: block to load: of keys where these are passed by, of queries where those are.
    compute: 1 where the block is computed.
  """

  load: Int[Array, '1 q kv']
  compute: Int[Array, '1 q kv']


def _table(load: Int[Array, '#q kv'], some: Bool[Array, 'kv'], rows: int) -> Table:
  shape = (1, rows, some.size)
  return Table(*(jnp.broadcast_to(x, shape).astype(jnp.int32) for x in (load, some)))


def by_keys(seen: Bool[Array, 's'], rows: int, width: int) -> Table:
  """For the forward pass and the gradient to queries, which go along the keys.

  A block that is passed over names the next one that is not, so that it is on its way already.

  Args:
    seen: keys that may be seen, at least one, padded to whole blocks.
    rows: blocks of queries.
    width: keys in a block.
  """
  some = jnp.any(seen.reshape(-1, width), axis=1)
  count = some.size
  ahead = jax.lax.cummin(jnp.where(some, jnp.arange(count), count), reverse=True)
  ahead = jnp.where(ahead < count, ahead, jnp.argmax(some))
  return _table(ahead[None], some, rows)


def by_queries(trained: Bool[Array, 's'], rows: int, width: int) -> Table:
  """For the gradient to keys and values, which goes along the queries, one block of keys after the other.

  For a block of keys that is passed over, zeros are written and the same block of queries is named all along.

  Args:
    trained: keys that get a gradient, padded to whole blocks.
    rows, width: as for `by_keys`.
  """
  some = jnp.any(trained.reshape(-1, width), axis=1)
  return _table(jnp.where(some, jnp.arange(rows)[:, None], 0), some, rows)


def chosen(queries: int, keys: int, largest: tuple[int, int, int]) -> tuple[int, int, int]:
  """Blocks (queries, keys, keys at once) for these lengths; keys come in whole multiples of what is done at once."""
  most_q, most_kv, compute = largest
  compute = min(compute, -(-keys // LANES) * LANES)
  return block(queries, most_q), block(keys, max(most_kv, compute), compute), compute


def attend(
  q: Float[Array, 'b l n d'],
  k: Float[Array, 'b s n d'],
  v: Float[Array, 'b s n d'],
  valid: Bool[Array, 's'] | None,
  blocks: tuple[int, int, int],
  interpret: bool = False,
  trained: int | None = None,
) -> Float[Array, 'b l n d']:
  """softmax(q k^T / sqrt(d)) v on one device.

  Args:
    q, k, v: as for `attention.attend`.
    valid: keys that may be seen; None means all.
    blocks: largest blocks, as in `BLOCKS`.
    interpret: runs the kernel step by step on any device, for tests.
    trained: so many keys come first whose gradient is asked for; that of a block of others is zero. None means all.
  """
  length, keys = q.shape[1], k.shape[1]
  sizes = chosen(length, keys, tuple(blocks))
  padded_q, padded_kv = (
    -(-n // size) * size for n, size in zip((length, keys), sizes, strict=False)
  )
  seen = jnp.ones(keys, bool) if valid is None else valid
  seen = jnp.pad(seen, (0, padded_kv - keys))
  along_keys = by_keys(seen, padded_q // sizes[0], sizes[1])
  first = seen if trained is None else seen & (jnp.arange(padded_kv) < trained)
  along_queries = by_queries(first, padded_q // sizes[0], sizes[1])
  kernel = jax.tree.unflatten(
    _structure(q.shape[2], sizes, interpret), (*along_keys, *along_keys, *along_queries)
  )

  def lay(x, to):
    return jnp.pad(jnp.swapaxes(x, 1, 2), ((0, 0), (0, 0), (0, to - x.shape[1]), (0, 0)))

  segments = None
  if valid is not None or padded_kv > keys:
    segments = splash_attention.SegmentIds(
      q=jnp.ones(padded_q, jnp.int32), kv=seen.astype(jnp.int32)
    )
  scaled = q * jnp.asarray(1 / math.sqrt(q.shape[-1]), q.dtype)
  run = jax.vmap(lambda a, b, c: kernel(a, b, c, segments))
  out = run(lay(scaled, padded_q), lay(k, padded_kv), lay(v, padded_kv))
  return jnp.swapaxes(out[:, :, :length], 1, 2).astype(v.dtype)
