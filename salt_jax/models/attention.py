"""One attention operation, two back ends, and the chunk-causal form built from it.

Block-causal attention over a clip is a handful of full attentions, one for each chunk of queries, over a
static prefix of keys. So no back end needs a mask, no block is computed to be thrown away, and cuDNN
serves it as it is.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from salt_jax.errors import InputError

IMPLEMENTATIONS = ('dense', 'cudnn')


def attend(
  q: Float[Array, 'b l n d'],
  k: Float[Array, 'b s n d'],
  v: Float[Array, 'b s n d'],
  valid: Bool[Array, 's'] | None = None,
  implementation: str = 'dense',
) -> Float[Array, 'b l n d']:
  """softmax(q k^T / sqrt(d)) v, softmax in float32.

  Args:
    q: queries.
    k: keys, already rotated.
    v: values.
    valid: keys that may be seen, the same for every query; None means all.
    implementation: 'dense' (any device, quadratic memory) or 'cudnn' (NVIDIA, 16-bit inputs).

  Raises:
    InputError: for an unknown implementation, or cuDNN with 32-bit inputs.
  """
  if implementation == 'dense':
    return _dense(q, k, v, valid)
  if implementation == 'cudnn':
    if q.dtype not in (jnp.bfloat16, jnp.float16):
      raise InputError(
        f'attention "cudnn" needs bfloat16 or float16, not {q.dtype}: set the model dtype.'
      )
    mask = None if valid is None else valid[None, None, None, :]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation='cudnn')
  raise InputError(
    f'attention "{implementation}" is unknown; choose one of {", ".join(IMPLEMENTATIONS)}.'
  )


def _dense(q, k, v, valid):
  logits = jnp.einsum('b l n d, b s n d -> b n l s', q, k, preferred_element_type=jnp.float32)
  logits = logits * q.shape[-1] ** -0.5
  if valid is not None:
    logits = jnp.where(valid, logits, jnp.finfo(jnp.float32).min)
  weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
  return jnp.einsum('b n l s, b s n d -> b l n d', weights, v)


def chunk_causal(
  qkv: Sequence[Float[Array, 'b l n d']],
  chunk: int,
  past: Callable[[int], tuple[Array, Array, Array | None]] | None = None,
  implementation: str = 'dense',
) -> Float[Array, 'b l n d']:
  """Each chunk of `chunk` tokens sees itself, both ways, and the chunks before it.

  Args:
    qkv: queries, keys and values of the whole clip; the length is a multiple of `chunk`.
    chunk: tokens in a chunk.
    past: gives the (keys, values) that stand before chunk i, and which of them may be seen, None if all; without
      it these are the clip's own earlier tokens.
    implementation: as in `attend`.
  """
  q, k, v = qkv
  outs = []
  for i, start in enumerate(range(0, q.shape[1], chunk)):
    own, valid = slice(start, start + chunk), None
    if past is None:
      keys, values = k[:, : own.stop], v[:, : own.stop]
    else:
      before_k, before_v, seen = past(i)
      keys = jnp.concatenate([before_k, k[:, own]], axis=1)
      values = jnp.concatenate([before_v, v[:, own]], axis=1)
      if seen is not None:
        valid = jnp.concatenate([seen, jnp.ones(chunk, bool)])
    outs.append(attend(q[:, own], keys, values, valid, implementation))
  return jnp.concatenate(outs, axis=1)
