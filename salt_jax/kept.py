"""What programs were found to need, kept by their content: equal ones are compiled once, and a search goes on."""

import hashlib
import importlib.metadata
import json
import os
from collections.abc import Callable
from typing import TypeVar

from salt_jax.errors import InputError

Found = TypeVar('Found')


class Reports:
  """A folder of findings, a JSON file each, of as many processes as like."""

  def __init__(self, folder: str):
    self._folder = folder

  def find(self, key: str, read: Callable[[dict], Found]) -> Found | None:
    """What `read` makes of the finding of a key; None if there is none.

    Raises:
      InputError: a damaged file.
    """
    path = self._path(key)
    try:
      with open(path, encoding='utf-8') as file:
        return read(json.load(file))
    except FileNotFoundError:
      return None
    except (ValueError, KeyError, TypeError) as error:
      raise InputError(f'{path} is no kept report ({error!r}): delete it.') from error

  def keep(self, key: str, found: dict) -> None:
    write(self._path(key), found)

  def _path(self, key: str) -> str:
    return os.path.join(self._folder, f'{key}.json')


def write(path: str, found: dict) -> None:
  """Writes JSON, the whole or nothing."""
  scratch = f'{path}.{os.getpid()}'
  with open(scratch, 'w', encoding='utf-8') as file:
    json.dump(found, file, indent=1)
  os.replace(scratch, path)


def versions() -> dict[str, str]:
  """Of what makes and compiles a program."""
  return {name: importlib.metadata.version(name) for name in ('jax', 'libtpu')}


# Raise it when other things are read from a compiled program, or otherwise.
FORMAT = 2


def key(*parts: object) -> str:
  """Of a program's text and of what else the compiler's finding rests on; the same in every process."""
  told = {name: os.environ.get(name, '') for name in ('LIBTPU_INIT_ARGS', 'XLA_FLAGS')}
  text = json.dumps([FORMAT, versions(), told, *(str(part) for part in parts)], sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:32]
