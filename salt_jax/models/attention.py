"""One attention operation, three back ends, and the chunk-causal form built from it.

Block-causal attention over a clip is a full attention for each chunk of queries. Splash reads all keys and passes over
what is hidden; the others read a static prefix, so that nothing is computed to be thrown away and cuDNN serves them as
it is.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int

from salt_jax.errors import InputError
from salt_jax.models import axes, splash

# The platforms that have a back end; 'auto' is the one of the platform, here and nowhere below a config.
PLATFORMS = {'dense': ('cpu', 'gpu', 'tpu'), 'cudnn': ('gpu',), 'splash': ('tpu',)}
BEST = {'cpu': 'dense', 'gpu': 'cudnn', 'tpu': 'splash'}
SAVED = splash.SAVED


class Kernel(NamedTuple):
  """What computes attention.

  Attributes:
    name: 'dense' (any device, quadratic memory), 'cudnn' (NVIDIA, 16-bit inputs) or 'splash' (TPU).
    blocks: of splash, (queries, keys, keys at once).
    interpret: runs splash step by step on any device, for tests.
  """

  name: str = 'dense'
  blocks: tuple[int, ...] = ()
  interpret: bool = False

  @property
  def skips(self) -> bool:
    """Whether keys that may not be seen cost nothing, also where only the running program knows which they are."""
    return self.name == 'splash'


DENSE = Kernel()


def choose(
  name: str, platform: str, kind: str, blocks: tuple[int, ...] = ()
) -> tuple[str, tuple[int, ...]]:
  """(back end, blocks) of a config's word on a device.

  Args:
    name: a back end, or 'auto' for the best of the platform.
    platform: cpu, gpu or tpu.
    kind: of the device, as JAX names it; gives the blocks of splash.
    blocks: those of the config, if it has its own.

  Raises:
    InputError: a back end that is unknown or cannot run there; never another in its stead.
  """
  if name == 'auto':
    name = BEST.get(platform, 'dense')
  if name not in PLATFORMS:
    raise InputError(f'attention "{name}" is unknown; choose one of auto, {", ".join(PLATFORMS)}.')
  if platform not in PLATFORMS[name]:
    raise InputError(
      f'attention "{name}" needs a {PLATFORMS[name][0]}, and this is a {platform}: set it to auto, or to '
      f'{BEST.get(platform, "dense")}.'
    )
  if name != 'splash':
    return name, ()
  if blocks:
    splash.check(blocks)
    return name, blocks
  if kind not in splash.BLOCKS:
    raise InputError(
      f'splash attention has no blocks for a "{kind}": name them as attention_blocks, such as (1024, 1024, 512).'
    )
  return name, splash.BLOCKS[kind]


def attend(
  q: Float[Array, 'b l n d'],
  k: Float[Array, 'b s n d'],
  v: Float[Array, 'b s n d'],
  valid: Bool[Array, 's'] | None = None,
  kernel: Kernel = DENSE,
  trained: int | None = None,
) -> Float[Array, 'b l n d']:
  """softmax(q k^T / sqrt(d)) v, softmax in float32.

  On a mesh each device has some heads (`axes.HEADS`) and all tokens.

  Args:
    q: queries.
    k: keys, already rotated.
    v: values.
    valid: keys that may be seen, the same for every query; None means all.
    kernel: what computes it.
    trained: so many keys come first that gradients flow to; those behind get none, for which dense and splash
      multiply nothing, and cuDNN as much as for the others. None means all.

  Raises:
    InputError: for an unknown kernel, or cuDNN with 32-bit inputs.
  """
  names = (axes.BATCH, None, axes.HEADS, None)
  run = functools.partial(_attend, kernel=kernel, trained=trained)
  return axes.per_device(run, (names, names, names, (None,)), names)(q, k, v, valid)


def attend_rows(
  q: Float[Array, 'b f t n d'],
  k: Float[Array, 'b s n d'],
  v: Float[Array, 'b s n d'],
  kernel: Kernel = DENSE,
) -> Float[Array, 'b f t n d']:
  """The same for few keys that all devices have: on a mesh each has some tokens, and heads by `axes.WIDTH`."""

  def run(q, k, v):
    out = _attend(rearrange(q, 'b f t n d -> b (f t) n d'), k, v, None, kernel)
    return rearrange(out, 'b (f t) n d -> b f t n d', f=q.shape[1])

  mine = (axes.BATCH, None, axes.TOKENS, axes.WIDTH, None)
  theirs = (axes.BATCH, None, axes.WIDTH, None)
  return axes.per_device(run, (mine, theirs, theirs), mine)(q, k, v)


def _attend(q, k, v, valid, kernel, trained=None):
  if kernel.name == 'dense':
    return dense(q, k, v, valid, trained)
  k, v = (jnp.concatenate(_parts(x, trained), axis=1) for x in (k, v))
  if kernel.name == 'cudnn':
    return _cudnn(q, k, v, valid)
  if kernel.name == 'splash':
    return splash.attend(q, k, v, valid, kernel.blocks, kernel.interpret, trained)
  raise InputError(f'attention "{kernel.name}" is unknown; choose one of {", ".join(PLATFORMS)}.')


def dense(
  q: Float[Array, 'b l n d'],
  k: Float[Array, 'b s n d'],
  v: Float[Array, 'b s n d'],
  valid: Bool[Array, 's'] | None = None,
  trained: int | None = None,
) -> Float[Array, 'b l n d']:
  """The operation in plain array code, which the compiler splits over a mesh as it likes."""
  in_float32 = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
  # Products of their own, so that what gets no gradient has none to be thrown away.
  logits = [in_float32('b l n d, b s n d -> b n l s', q, x) for x in _parts(k, trained)]
  logits = jnp.concatenate(logits, axis=-1) * q.shape[-1] ** -0.5
  if valid is not None:
    logits = jnp.where(valid, logits, jnp.finfo(jnp.float32).min)
  weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
  if trained is None:
    return jnp.einsum('b n l s, b s n d -> b l n d', weights, v)
  shares = weights[..., :trained], weights[..., trained:]
  read = zip(shares, _parts(v, trained), strict=True)
  return sum(in_float32('b n l s, b s n d -> b l n d', *one) for one in read).astype(v.dtype)


def _parts(x: Float[Array, 'b s n d'], trained: int | None) -> list[Float[Array, 'b _ n d']]:
  """Keys or values that gradients flow to, and the others if there are any."""
  return [x] if trained is None else [x[:, :trained], jax.lax.stop_gradient(x[:, trained:])]


def _cudnn(q, k, v, valid):
  if q.dtype not in (jnp.bfloat16, jnp.float16):
    raise InputError(
      f'attention "cudnn" needs bfloat16 or float16, not {q.dtype}: set the model dtype.'
    )
  queries, keys, lengths = q.shape[1], k.shape[1], None
  seen = keys
  if valid is not None:
    # A mask would become a bias of queries x keys; a length costs nothing, and the order of keys means nothing.
    k, v = (first_valid(x, valid) for x in (k, v))
    seen = jnp.sum(valid)
  if valid is not None or keys % 2:
    lengths = jnp.full(q.shape[0], seen, jnp.int32)
  q, k, v = (_even(x) for x in (q, k, v))
  out = jax.nn.dot_product_attention(q, k, v, key_value_seq_lengths=lengths, implementation='cudnn')
  return out[:, :queries]


def _even(x: Float[Array, 'b s n d']) -> Float[Array, 'b s_even n d']:
  """One row of zeros more if the length is odd: JAX refuses odd ones in a gradient, such as CLIP's 257."""
  return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))


def first_valid(x: Float[Array, 'b s n d'], valid: Bool[Array, 's']) -> Float[Array, 'b s n d']:
  """The keys that may be seen before those that may not."""
  return jnp.take(x, jnp.argsort(~valid, stable=True), axis=1)


def chunk_causal(
  qkv: Sequence[Float[Array, 'b l n d']],
  chunk: int,
  past: Callable[[int | Int[Array, '']], tuple[Array, Array, Array | None]] | None = None,
  kernel: Kernel = DENSE,
  live: bool = False,
) -> Float[Array, 'b l n d']:
  """Each chunk of `chunk` tokens sees itself, both ways, and the chunks before it.

  Args:
    qkv: queries, keys and values of the whole clip; the length is a multiple of `chunk`.
    chunk: tokens in a chunk.
    past: gives the (keys, values) that stand before chunk i, and which of them may be seen, None if all; without
      it these are the clip's own earlier tokens. i is an array where the kernel skips what may not be seen.
    kernel: as in `attend`.
    live: lets gradients flow to what `past` gives.
  """
  if kernel.skips:
    return _chunk_loop(qkv, chunk, past, kernel, live)
  q, k, v = qkv
  outs = []
  for i, start in enumerate(range(0, q.shape[1], chunk)):
    own = slice(start, start + chunk)
    if past is None:
      outs.append(attend(q[:, own], k[:, : own.stop], v[:, : own.stop], None, kernel))
    else:
      outs.append(attend_behind((q[:, own], k[:, own], v[:, own]), past(i), kernel, live))
  return jnp.concatenate(outs, axis=1)


def attend_behind(
  own: Sequence[Float[Array, 'b l n d']],
  before: tuple[Float[Array, 'b s n d'], Float[Array, 'b s n d'], Bool[Array, 's'] | None],
  kernel: Kernel = DENSE,
  live: bool = False,
) -> Float[Array, 'b l n d']:
  """A chunk's queries on its own keys and on those before it.

  Args:
    own: queries, keys and values of the chunk.
    before: earlier keys, values, and which of them may be seen; None means all.
    kernel: as in `attend`.
    live: lets gradients flow to the earlier ones too.
  """
  q, k, v = own
  before_k, before_v, seen = before
  valid = None if seen is None else jnp.concatenate([jnp.ones(k.shape[1], bool), seen])
  keys, values = jnp.concatenate([k, before_k], axis=1), jnp.concatenate([v, before_v], axis=1)
  trained = None if live or not before_k.shape[1] else k.shape[1]
  return attend(q, keys, values, valid, kernel, trained)


def _chunk_loop(qkv, chunk, past, kernel, live):
  """The same as one loop over one kernel, where hidden keys cost nothing."""
  q, k, v = qkv
  count = q.shape[1] // chunk

  # What the kernel returns is kept for the backward pass; the keys before each chunk are laid out again.
  @functools.partial(
    jax.checkpoint,
    policy=jax.checkpoint_policies.save_only_these_names(SAVED),
    prevent_cse=False,
  )
  def one(i, own):
    if past is not None:
      return attend_behind(own, past(i), kernel, live)
    return attend(own[0], k, v, jnp.arange(k.shape[1]) < (i + 1) * chunk, kernel)

  parts = tuple(rearrange(x, 'b (i l) n d -> i b l n d', i=count) for x in qkv)
  _, out = jax.lax.scan(lambda _, x: (None, one(*x)), None, (jnp.arange(count), parts))
  return rearrange(out, 'i b l n d -> b (i l) n d')
