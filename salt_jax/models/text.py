"""UMT5 encoder as Wan 2.1 uses it (T5, arXiv:1910.10683), and the nano world's tokenizer.

Pre-norm layers without biases; attention is not scaled and adds a learned bias by relative
position, each layer with a table of its own; the MLP is gated by a tanh-approximated GELU. Norm
statistics, logits and softmax are float32, everything else runs in `TextConfig.dtype`.
"""

import dataclasses
import difflib
import functools
import hashlib
import string
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from salt_jax.errors import InputError
from salt_jax.models import modules

# Smallest |key - query| of each bucket. Integers, because the logarithm that defines them lands on
# rounding boundaries at 16, 32 and 64.
BUCKET_STARTS = (0, 1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 23, 32, 46, 64, 91)

PAD, EOS = 0, 1
_SPECIALS = ('<pad>', '</s>', '<unk>')


@dataclasses.dataclass(frozen=True)
class TextConfig:
  """Sizes of an encoder and its compute type; hashable, so it is static under jit."""

  vocab: int
  dim: int
  dim_attn: int
  heads: int
  ffn_dim: int
  layers: int
  eps: float = 1e-6
  dtype: str = 'float32'

  def __post_init__(self):
    if self.dim_attn % self.heads:
      raise InputError(f'dim_attn {self.dim_attn} does not divide into {self.heads} heads.')


def umt5_xxl() -> TextConfig:
  return TextConfig(
    vocab=256384, dim=4096, dim_attn=4096, heads=64, ffn_dim=10240, layers=24, dtype='bfloat16'
  )


def nano_text(vocab: int = 22) -> TextConfig:
  """The miniature; `vocab` is the size of the tokenizer, by default that of the nano captions."""
  return TextConfig(vocab=vocab, dim=64, dim_attn=64, heads=4, ffn_dim=128, layers=2)


def relative_buckets(length: int) -> np.ndarray:
  """Bucket in 0..31 of every (query, key) pair, int32 `[n n]`; keys to the right use 16..31."""
  offset = np.arange(length)[None] - np.arange(length)[:, None]
  distance = np.searchsorted(BUCKET_STARTS, np.abs(offset), side='right') - 1
  return (distance + len(BUCKET_STARTS) * (offset > 0)).astype(np.int32)


class RMSNorm(modules.Module):
  cfg: TextConfig

  @nn.compact
  def __call__(self, x):
    weight = self.param('weight', nn.initializers.ones, (x.shape[-1],))
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + self.cfg.eps)
    return x32.astype(self.cfg.dtype) * weight[None, None].astype(self.cfg.dtype)


def _dense(features: int, cfg: TextConfig, name: str, std: float) -> modules.Dense:
  init = nn.initializers.normal(std)
  return modules.Dense(features, use_bias=False, dtype=cfg.dtype, kernel_init=init, name=name)


class PositionBias(modules.Module):
  """Learned float32 bias `[heads query key]` by relative position."""

  cfg: TextConfig

  @nn.compact
  def __call__(self, length: int):
    buckets, std = 2 * len(BUCKET_STARTS), (2 * 2 * len(BUCKET_STARTS) * self.cfg.heads) ** -0.5
    table = modules.Embed(
      buckets, self.cfg.heads, embedding_init=nn.initializers.normal(std), name='embedding'
    )
    return rearrange(table(relative_buckets(length)), 'query key heads -> heads query key')


class Attention(modules.Module):
  cfg: TextConfig

  @nn.compact
  def __call__(self, x, bias):
    cfg, width = self.cfg, self.cfg.dim_attn // self.cfg.heads
    split = functools.partial(rearrange, pattern='b n (h d) -> b n h d', h=cfg.heads)
    q = split(_dense(cfg.dim_attn, cfg, 'q', (cfg.dim * width) ** -0.5)(x))
    k = split(_dense(cfg.dim_attn, cfg, 'k', cfg.dim**-0.5)(x))
    v = split(_dense(cfg.dim_attn, cfg, 'v', cfg.dim**-0.5)(x))
    logits = jnp.einsum('b q h d, b k h d -> b h q k', q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits + bias, axis=-1).astype(cfg.dtype)
    out = rearrange(jnp.einsum('b h q k, b k h d -> b q h d', weights, v), 'b n h d -> b n (h d)')
    return _dense(cfg.dim, cfg, 'o', cfg.dim_attn**-0.5)(out)


class FeedForward(modules.Module):
  cfg: TextConfig

  @nn.compact
  def __call__(self, x):
    cfg = self.cfg
    gate = _dense(cfg.ffn_dim, cfg, 'gate_0', cfg.dim**-0.5)(x)
    linear = _dense(cfg.ffn_dim, cfg, 'fc1', cfg.dim**-0.5)(x)
    gated = jax.nn.gelu(gate, approximate=True) * linear
    return _dense(cfg.dim, cfg, 'fc2', cfg.ffn_dim**-0.5)(gated)


class Layer(modules.Module):
  cfg: TextConfig

  @nn.compact
  def __call__(self, x, mask):
    cfg = self.cfg
    bias = PositionBias(cfg, name='pos_embedding')(x.shape[1])
    # Masked keys lose their position bias too: the original puts the minimum in its place.
    bias = jnp.where(mask[:, None, None], bias[None], jnp.finfo(jnp.float32).min)
    x = x + Attention(cfg, name='attn')(RMSNorm(cfg, name='norm1')(x), bias)
    x = x + FeedForward(cfg, name='ffn')(RMSNorm(cfg, name='norm2')(x))
    return x, None


class UMT5(modules.Module):
  cfg: TextConfig

  @nn.compact
  def __call__(self, ids, mask):
    cfg = self.cfg
    embed = modules.Embed(
      cfg.vocab, cfg.dim, embedding_init=nn.initializers.normal(1.0), name='token_embedding'
    )
    x = embed(ids).astype(cfg.dtype)
    layers = nn.scan(
      Layer,
      variable_axes={'params': 0},
      split_rngs={'params': True},
      in_axes=nn.broadcast,
      length=cfg.layers,
      check_constancy_invariants=False,
    )
    x, _ = layers(cfg, name='blocks')(x, mask)
    x = RMSNorm(cfg, name='norm')(x).astype(jnp.float32)
    return jnp.where(mask[..., None], x, 0)


def encode(
  params: dict, ids: Int[Array, 'b n'], mask: Bool[Array, 'b n'], cfg: TextConfig
) -> Float[Array, 'b n d']:
  """Encodes padded token ids.

  Args:
    params: as `init_params` makes them; paths are Wan's own names.
    ids: token ids; an id outside the vocabulary gives NaN rows.
    mask: True where there is a token, `</s>` included.
    cfg: sizes.

  Returns:
    float32 rows, exactly 0 beyond the text, as the DiT wants them.
  """
  return UMT5(cfg).apply({'params': params}, ids, mask)


def init_params(key: PRNGKeyArray, cfg: TextConfig) -> dict:
  """Random float32 parameters by T5's rules: logits of unit variance without scaling."""
  ids = jnp.zeros((1, 1), jnp.int32)
  return UMT5(cfg).init(key, ids, jnp.ones((1, 1), bool))['params']


def param_shapes(cfg: TextConfig) -> dict:
  """Shapes of the parameters, allocating nothing."""
  return jax.eval_shape(functools.partial(init_params, cfg=cfg), jax.random.key(0))


def pad(
  rows: Sequence[Sequence[int]], length: int
) -> tuple[Int[np.ndarray, 'b n'], Bool[np.ndarray, 'b n']]:
  """Ids of prompts, `</s>` included, padded to `length`, and the mask of what is no padding."""
  ids = np.full((len(rows), length), PAD, np.int32)
  for i, row in enumerate(rows):
    ids[i, : len(row)] = row
  return ids, np.arange(length) < np.array([len(row) for row in rows])[:, None]


class WordTokenizer:
  """One id a word of a closed vocabulary, behind `<pad>` 0, `</s>` 1 and `<unk>` 2.

  Attributes:
    vocabulary: the words, in lower case; a word's id is its place in it plus 3.
    length: ids a prompt is padded to, `</s>` included.
    size: number of ids, the `vocab` of the encoder.
    digest: SHA-256 of the vocabulary.
  """

  def __init__(self, vocabulary: tuple[str, ...], length: int):
    odd = [word for word in vocabulary if _words(word) != [word]]
    if odd or len(set(vocabulary)) < len(vocabulary):
      raise InputError(
        'a vocabulary holds each word once, in lower case and without punctuation '
        f'around it; correct {odd or "the repeated words"}.'
      )
    self.vocabulary = tuple(vocabulary)
    self.length = length
    self.size = len(_SPECIALS) + len(vocabulary)
    self.digest = hashlib.sha256(' '.join(vocabulary).encode()).hexdigest()
    self._ids = {word: i for i, word in enumerate(vocabulary, start=len(_SPECIALS))}

  def __call__(self, prompts: list[str]) -> tuple[Int[np.ndarray, 'b n'], Bool[np.ndarray, 'b n']]:
    """Ids and mask of prompts, `</s>` appended.

    Raises:
      InputError: a prompt that is empty or too long, or a word outside the vocabulary.
    """
    return pad([[*self._row(prompt), EOS] for prompt in prompts], self.length)

  def empty(self, batch: int) -> tuple[Int[np.ndarray, 'b n'], Bool[np.ndarray, 'b n']]:
    """The unconditional input: nothing but `</s>`."""
    return pad([[EOS]] * batch, self.length)

  def _row(self, prompt: str) -> list[int]:
    words = _words(prompt)
    if not words:
      raise InputError('prompt is empty; write a caption, such as one of the training captions.')
    for word in words:
      if word not in self._ids:
        known = ', '.join(difflib.get_close_matches(word, self.vocabulary, n=5, cutoff=0))
        raise InputError(
          f"the word '{word}' in prompt '{prompt}' is not in the vocabulary; "
          f'the nearest known words are {known}.'
        )
    if len(words) >= self.length:
      raise InputError(
        f"prompt '{prompt}' has {len(words)} words but the limit is {self.length - 1}; shorten it."
      )
    return [self._ids[word] for word in words]


def _words(text: str) -> list[str]:
  words = (word.strip(string.punctuation) for word in text.lower().split())
  return [word for word in words if word]
