"""Prompts encoded once, so that training needs no text encoder: what `salt_jax.precompute` makes of text-to-video.

The rows of a prompt are kept as many as its tokens, and padded when they are read (`data.text_store`).
"""

import os
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from ml_collections import ConfigDict

from salt_jax import data, tokens, weights
from salt_jax.errors import InputError
from salt_jax.models import text
from salt_jax.recipe import Recipe
from salt_jax.sharding import local_mesh, over_local_devices, split_locally
from salt_jax.store import Field, Store, fill, sha256

_BUCKET = 64  # encoded lengths are multiples of it, so that short prompts cost less and few programs are compiled


def _text_fields(rec: Recipe) -> dict[str, Field]:
  rows = Field((None, rec.text.dim), 'bfloat16')
  return {'text': rows, 'negative': rows}


def _text_encoder(config: ConfigDict, rec: Recipe, batch: int) -> Callable[[list], list]:
  """At most `batch` prompts' ids -> their bfloat16 rows `[n d]`, without padding."""
  mesh = local_mesh(config.mesh)
  params = weights.load_narrowed(config.weights.text, 'umt5', rec.text)
  params = split_locally({'text': params}, mesh, config.rules, config.shard_min_size)['text']
  run = jax.jit(lambda p, ids, mask: text.encode(p, ids, mask, rec.text).astype(jnp.bfloat16))

  def encode(prompts):
    if not prompts:
      return []
    longest = max(len(ids) for ids in prompts)
    length = min(rec.text_length, -(-longest // _BUCKET) * _BUCKET)
    # The last shard is filled up, so that its program is the others'.
    filled = list(prompts) + [prompts[0]] * (batch - len(prompts))
    rows = np.asarray(run(params, *over_local_devices(text.pad(filled, length), mesh)))
    return [row[: len(ids)] for row, ids in zip(rows, prompts, strict=False)]

  return encode


def texts(config: ConfigDict, rec: Recipe, prompts: str, folder: str, batch: int) -> str:
  """Encodes a file of prompts, `batch` a shard; fields text, negative: bfloat16 rows `[n d]`, as many as tokens.

  `negative` has no rows where a prompt names none; those of the config's negative prompt are the one record of the
  store `folder/negative`. The bfloat16 of UMT5-XXL is what it computes in.

  Args:
    config: whose text encoder and tokenizer it is.
    rec: the same, built.
    prompts: file of prompts (`prompts.read`).
    folder: where the store goes; what a killed run left there is kept.
    batch: a multiple of this process's devices.

  Raises:
    InputError: files that are missing or wrong, or a folder that was made of others.
  """
  weights.require(config, ['text'])
  words = tokens.tokenizer(config, rec)
  rows = data.tokenized(prompts, words).rows
  facts = {
    'prompts': sha256(prompts),
    'negative': tokens.negative_text(config),
    'negatives': any(other is not None for _, other in rows),
    'length': rec.text_length,
    'encoder': sha256(weights.resolve(config.weights.text)),
    'tokenizer': words.digest,
  }
  encode, fields = _text_encoder(config, rec, batch), _text_fields(rec)
  ids, mask = (x[0] for x in tokens.negative(config, rec).values())
  nothing = np.zeros((0, rec.text.dim), fields['text'].numpy)

  def unconditional(_):
    return {'text': encode([ids[mask]])}

  def make(number):
    part = rows[number * batch : (number + 1) * batch]
    others = iter(encode([other for _, other in part if other is not None]))
    negative = [nothing if other is None else next(others) for _, other in part]
    return {'text': encode([ids for ids, _ in part]), 'negative': negative}

  fill(_negative_of(folder), {'text': fields['text']}, 1, facts, unconditional)
  return fill(folder, fields, -(-len(rows) // batch), facts, make)


def _negative_of(folder: str) -> str:
  return os.path.join(folder, 'negative')


def negative_rows(config: ConfigDict, rec: Recipe) -> Float[np.ndarray, 'n d']:
  """Rows of the unconditional prompt in the config's store of texts.

  Raises:
    InputError: no finished store, or of another encoder, length or negative prompt than the config's.
  """
  folder = config.data.path
  store, own = Store(folder), Store(_negative_of(folder))
  if store.fields != _text_fields(rec):
    raise InputError(
      f'data.path={folder} is no store of texts {rec.text.dim} wide: make it by salt_jax.precompute.'
    )
  for key, wanted in (('negative', tokens.negative_text(config)), ('length', rec.text_length)):
    if store.config[key] != wanted:
      raise InputError(
        f'data.path={folder} was made with {key} {store.config[key]!r}, but the config has {wanted!r}: '
        'encode the prompts again, or set the config back.'
      )
  return own[0]['text']
