"""The tokenizer that a config's text encoder goes with, and the unconditional prompt."""

import numpy as np
from ml_collections import ConfigDict

from salt_jax import clips
from salt_jax.errors import InputError
from salt_jax.models.text import WordTokenizer
from salt_jax.models.unigram import UnigramTokenizer
from salt_jax.recipe import Recipe

# An encoder's table may have rows that its tokenizer's files do not know: sentinels (300 in UMT5) and padding to 128.
SPARE_IDS = 512


def tokenizer(config: ConfigDict, rec: Recipe) -> WordTokenizer | UnigramTokenizer:
  """The nano world's words, or UMT5's pieces from the folder `weights.tokenizer`.

  Raises:
    InputError: no tokenizer there, or of another vocabulary than the text encoder's.
  """
  if config.size == 'nano':
    return WordTokenizer(clips.NANO_WORDS, rec.text_length)
  pieces = UnigramTokenizer(config.weights.tokenizer, rec.text_length)
  if not 0 <= rec.text.vocab - pieces.size < SPARE_IDS:
    raise InputError(
      f'the tokenizer in {config.weights.tokenizer} has {pieces.size} ids, but text.vocab={rec.text.vocab}: '
      'take the tokenizer of this encoder.'
    )
  return pieces


def negative_text(config: ConfigDict) -> str:
  """The config's negative prompt; nano has no such field, and an empty one."""
  return '' if config.size == 'nano' else config.negative


def negative(config: ConfigDict, rec: Recipe) -> dict[str, np.ndarray]:
  """ids and mask `[1 n]` of the unconditional prompt."""
  words = tokenizer(config, rec)
  text = negative_text(config)
  ids, mask = words([text]) if text else words.empty(1)
  return {'ids': ids, 'mask': mask}
