"""What programs were found to need, kept by their content: equal ones are compiled once, and a search goes on."""

import hashlib
import importlib.metadata
import json
import os

from salt_jax.errors import InputError


class Reports:
  """A folder of findings, a JSON file each, of as many processes as like."""

  def __init__(self, folder: str):
    self._folder = folder
    os.makedirs(folder, exist_ok=True)

  def find(self, key: str) -> dict | None:
    """The finding of a key; None if there is none.

    Raises:
      InputError: a damaged file.
    """
    path = self._path(key)
    try:
      with open(path, encoding='utf-8') as file:
        return json.load(file)
    except FileNotFoundError:
      return None
    except ValueError as error:
      raise InputError(f'{path} is no kept report ({error}): delete it.') from error

  def keep(self, key: str, found: dict) -> None:
    path = self._path(key)
    scratch = f'{path}.{os.getpid()}'
    with open(scratch, 'w', encoding='utf-8') as file:
      json.dump(found, file, indent=1)
    os.replace(scratch, path)

  def _path(self, key: str) -> str:
    return os.path.join(self._folder, f'{key}.json')


def versions() -> dict[str, str]:
  """Of what makes and compiles a program."""
  return {name: importlib.metadata.version(name) for name in ('jax', 'libtpu')}


def key(*parts: object) -> str:
  """Of a program's text, and of all else that its report rests on; the same in every process."""
  text = json.dumps([versions(), *(str(part) for part in parts)], sort_keys=True)
  return hashlib.sha256(text.encode()).hexdigest()[:32]
