"""UMT5's tokenizer as Wan 2.1 uses it (wan.md 4.5): prompts are cleaned, split into pieces, ended and padded.

The pieces are the user's files. `tokenizer.json` is what the original reads and comes first; `spiece.model` is the
sentencepiece model that it was made from. The two may differ in characters that no piece has: the model may spell them
in bytes where its conversion says `<unk>`.
"""

import hashlib
import html
import importlib
import os
import re
from types import ModuleType

import numpy as np
from jaxtyping import Bool, Int

from salt_jax.errors import InputError
from salt_jax.models.text import EOS, PAD, pad

FILES = ('tokenizer.json', 'spiece.model')
_LIMIT = 60  # characters of a prompt that a refusal repeats


def _library(name: str) -> ModuleType:
  try:
    return importlib.import_module(name)
  except ImportError as error:
    raise InputError(
      f"UMT5's tokenizer needs the package {name}: pip install 'salt_jax[wan]'."
    ) from error


def clean(prompt: str) -> str:
  """Wan's cleaning: broken Unicode mended and widths made plain, HTML unescaped twice, runs of whitespace one space.

  Raises:
    InputError: the package ftfy is not installed; without it other tokens come out.
  """
  mended = _library('ftfy').fix_text(prompt)
  return ' '.join(html.unescape(html.unescape(mended)).split())


class _SentencePiece:
  """Pieces of `spiece.model`; symbols such as `</s>` that stand in a text are read as symbols, as transformers does."""

  def __init__(self, path: str):
    self._model = _library('sentencepiece').SentencePieceProcessor(model_file=path)
    self.size = self._model.get_piece_size()
    ids = [i for i in range(self.size) if self._model.is_control(i) or self._model.is_unknown(i)]
    symbols = '|'.join(re.escape(self._model.id_to_piece(i)) for i in ids)
    self._symbols = re.compile(f'({symbols})')

  def id_of(self, symbol: str) -> int:
    return self._model.piece_to_id(symbol)

  def ids(self, text: str) -> list[int]:
    found = []
    for place, part in enumerate(self._symbols.split(text)):
      found += [self.id_of(part)] if place % 2 else self._model.encode(part)
    return found


class _Json:
  """Pieces of `tokenizer.json`."""

  def __init__(self, path: str):
    self._model = _library('tokenizers').Tokenizer.from_file(path)
    self._model.no_padding()
    self._model.no_truncation()
    self.size = self._model.get_vocab_size()

  def id_of(self, symbol: str) -> int | None:
    return self._model.token_to_id(symbol)

  def ids(self, text: str) -> list[int]:
    return self._model.encode(text, add_special_tokens=False).ids


def find(folder: str) -> str | None:
  """The file to read in a tokenizer's folder, None if neither is there."""
  paths = (os.path.join(folder, name) for name in FILES)
  return next((path for path in paths if os.path.isfile(path)), None)


def _read(folder: str) -> _Json | _SentencePiece:
  path = find(folder)
  if path is None:
    raise InputError(
      f"UMT5's tokenizer is not in {folder or 'an unnamed folder'}: put {' or '.join(FILES)} there, "
      'or point --config.weights.tokenizer at their folder.'
    )
  try:
    pieces = (_Json if path.endswith('.json') else _SentencePiece)(path)
  except InputError:
    raise
  except Exception as error:  # tokenizers raises nothing narrower
    raise InputError(f'{path} cannot be read as a tokenizer: copy or download it again.') from error
  for symbol, number in (('<pad>', PAD), ('</s>', EOS)):
    if pieces.id_of(symbol) != number:
      raise InputError(
        f"{path} gives {symbol} the id {pieces.id_of(symbol)}, and UMT5 {number}: take UMT5's tokenizer."
      )
  return pieces


class UnigramTokenizer:
  """Ids of cleaned prompts, `</s>` behind them, padded to a fixed length.

  Attributes:
    length: ids a prompt is padded or cut to, `</s>` included; Wan's is 512.
    size: number of ids that the files know.
    digest: SHA-256 of the file that is read.

  Args:
    folder: folder of `tokenizer.json` or `spiece.model`.
    length: see above.

  Raises:
    InputError: no such file there, or it is damaged or no T5's; or a package is missing.
  """

  def __init__(self, folder: str, length: int):
    _library('ftfy')
    self._pieces = _read(folder)
    with open(find(folder), 'rb') as file:
      self.digest = hashlib.file_digest(file, 'sha256').hexdigest()
    self.length = length
    self.size = self._pieces.size

  def __call__(self, prompts: list[str]) -> tuple[Int[np.ndarray, 'b n'], Bool[np.ndarray, 'b n']]:
    """Ids and mask of prompts; what is too long is cut, with `</s>` at its end.

    Raises:
      InputError: a prompt of which cleaning leaves nothing.
    """
    return pad([self._row(prompt) for prompt in prompts], self.length)

  def empty(self, batch: int) -> tuple[Int[np.ndarray, 'b n'], Bool[np.ndarray, 'b n']]:
    """The empty text: nothing but `</s>`."""
    return pad([[EOS]] * batch, self.length)

  def _row(self, prompt: str) -> list[int]:
    text = clean(prompt)
    if not text:
      raise InputError(
        f'prompt {prompt[:_LIMIT]!r} is empty once whitespace and HTML are cleaned; write a caption.'
      )
    return [*self._pieces.ids(text)[: self.length - 1], EOS]
