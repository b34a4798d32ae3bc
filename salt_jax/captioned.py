"""Files of prompts that name other files, pictures or videos: which, whether they can be read, and their digest.

What stores of them are made of shares this; each prompt is a record, and `batch` records a shard.
"""

import concurrent.futures
import hashlib
import itertools
import os
from collections.abc import Callable, Sequence

import numpy as np

from salt_jax import prompts
from salt_jax.errors import InputError
from salt_jax.models.text import pad
from salt_jax.store import owed, sha256

_MIB = 2**20


def files(path: str, fields: Sequence[str], wanted: str) -> list[tuple[str, ...]]:
  """The files that each prompt names.

  Args:
    path: file of prompts (`prompts.read`).
    fields: of `prompts.FIELDS`, each of which every prompt must name.
    wanted: who wants them, such as 'image-to-video wants'.

  Raises:
    InputError: a prompt without, or one that is no name of a file.
  """
  found = [tuple(getattr(entry, name) for name in fields) for entry in prompts.read(path)]
  for number, named in enumerate(found, 1):
    if None in named:
      keys = ', '.join(f'"{name}": "FILE"' for name in fields)
      raise InputError(
        f'prompt {number} of {path} names no {fields[named.index(None)]}: {wanted} .jsonl of '
        f'{{"prompt": "...", {keys}}}, or .csv with the columns prompt, {", ".join(fields)}.'
      )
    for name, file in zip(fields, named, strict=True):
      if not isinstance(file, str):
        raise InputError(
          f'prompt {number} of {path}: "{name}" must be a string, the name of a file.'
        )
  return found


def due(named: Sequence[tuple[str, ...]], folder: str, batch: int) -> list[str]:
  """Those that this process has still to encode."""
  shards = owed(folder, -(-len(named) // batch))
  return [file for n in shards for found in named[n * batch : (n + 1) * batch] for file in found]


def check(paths: Sequence[str], read: Callable[[str], object]) -> None:
  """Reads each, so that a damaged one is not found behind hours of work.

  Raises:
    InputError: what `read` raises.
  """

  def one(path: str) -> None:
    read(path)

  with concurrent.futures.ThreadPoolExecutor() as pool:
    list(pool.map(one, paths))


def ends(path: str) -> str:
  """SHA-256 of a file's size, first and last MiB: of large files, whose own index of themselves stands there."""
  with open(path, 'rb') as file:
    size = file.seek(0, os.SEEK_END)
    found = hashlib.sha256(str(size).encode())
    for place in (0, max(0, size - _MIB)):
      file.seek(place)
      found.update(file.read(_MIB))
  return found.hexdigest()


def digest(named: Sequence[tuple[str, ...]], what: str, of: Callable[[str], str] = sha256) -> str:
  """SHA-256 over `of` all that `files` gave; `what` they are.

  Raises:
    InputError: one that cannot be read.
  """

  def one(path: str) -> str:
    try:
      return of(path)
    except OSError as error:
      raise InputError(f'{path} cannot be read: put the {what} there.') from error

  with concurrent.futures.ThreadPoolExecutor() as pool:
    return hashlib.sha256(''.join(pool.map(one, itertools.chain(*named))).encode()).hexdigest()


def tokens(rows: Sequence[tuple], length: int) -> dict[str, np.ndarray]:
  """Fields ids and mask of `data.Tokens.rows`."""
  ids, mask = pad([own for own, _ in rows], length)
  return {'ids': ids, 'mask': mask}
