"""A store of arrays in ArrayRecord shards: VAE latents, text states, ODE pairs.

  folder/shard-00000.array_record     records, each the bytes of all fields in the index's order;
                                      before a field whose leading size varies stands that size
  folder/shard-00000.json             its count, bytes and SHA-256, written after the shard
  folder/index.json                   fields, config and all shards, written last

Shards take their final name only when they are whole, so a killed writer goes on at the first one
missing. Several processes may write different shards of one store; one of them finishes it.
"""

import dataclasses
import hashlib
import json
import logging
import math
import os
from collections.abc import Callable, Mapping, Sequence

import grain
import jax
import ml_dtypes
import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from salt_jax import hosts
from salt_jax.errors import InputError

log = logging.getLogger(__name__)

FORMAT = 1
_LENGTH = np.dtype('<u4')


@dataclasses.dataclass(frozen=True)
class Field:
  """Shape of one record's array and the name of its dtype ('bfloat16' included).

  A leading size of None varies from record to record.
  """

  shape: tuple[int | None, ...]
  dtype: str

  @property
  def varies(self) -> bool:
    return self.shape[:1] == (None,)

  @property
  def numpy(self) -> np.dtype:
    return np.dtype(ml_dtypes.bfloat16 if self.dtype == 'bfloat16' else self.dtype)

  def fits(self, array: np.ndarray) -> bool:
    """Whether an array is what a record of this field holds."""
    fixed = int(self.varies)
    same = array.ndim == len(self.shape) and array.shape[fixed:] == self.shape[fixed:]
    return same and array.dtype == self.numpy

  def pack(self, array: np.ndarray) -> bytes:
    head = np.array(len(array), _LENGTH).tobytes() if self.varies else b''
    return head + array.tobytes()

  def unpack(self, record: bytes, offset: int) -> tuple[np.ndarray, int]:
    """The array that starts at `offset`, and where the next one does."""
    shape = self.shape
    if self.varies:
      shape = (int(np.frombuffer(record, _LENGTH, 1, offset)[0]), *shape[1:])
      offset += _LENGTH.itemsize
    array = np.frombuffer(record, self.numpy, math.prod(shape), offset).reshape(shape)
    return array, offset + array.nbytes


def _shard_name(number: int) -> str:
  return f'shard-{number:05d}.array_record'


def sha256(path: str) -> str:
  """Checksum of a file."""
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def _write_json(path: str, content) -> None:
  with open(path + '.tmp', 'w') as file:
    json.dump(content, file, indent=1)
  os.replace(path + '.tmp', path)


def _read_json(path: str, mend: str):
  """Reads a JSON file that this module wrote; `mend` is what to do when it cannot be read."""
  try:
    with open(path) as file:
      return json.load(file)
  except (OSError, ValueError) as error:
    raise InputError(f'{path} is missing or unreadable: {mend}.') from error


def _from_json(fields: Mapping[str, dict]) -> dict[str, Field]:
  return {name: Field(tuple(entry['shape']), entry['dtype']) for name, entry in fields.items()}


class StoreWriter:
  """Writes a store shard by shard; opening it again on the same folder goes on.

  Args:
    folder: where the store lies; made if absent.
    fields: name -> Field of every array in a record.
    shards: number of shards of the whole store.
    config: JSON-able facts about how the records are made (teacher, seed, steps, ...).

  Raises:
    InputError: the folder holds shards of other fields, config or number of shards.
  """

  def __init__(self, folder: str, fields: Mapping[str, Field], shards: int, config: dict):
    self._folder = folder
    self._shards = shards
    described = {name: dataclasses.asdict(field) for name, field in fields.items()}
    # Through JSON and back, so that tuples compare equal to what an earlier writer left.
    self._head = json.loads(json.dumps({'format': FORMAT, 'fields': described, 'config': config}))
    self._fields = dict(fields)
    os.makedirs(folder, exist_ok=True)
    for number in range(shards):
      if self._done(number):
        self._check_same(number)

  def _path(self, number: int) -> str:
    return os.path.join(self._folder, _shard_name(number))

  def _done(self, number: int) -> bool:
    return _is_done(self._folder, number)

  def _card(self, number: int) -> str:
    return _card_of(self._path(number))

  def _check_same(self, number: int) -> None:
    card = _read_json(self._card(number), 'delete it to write its shard again')
    if card['head'] != self._head:
      raise InputError(
        f'{self._folder} already holds shards made in another way than now asked for: '
        'delete the folder or name another.'
      )

  def missing(self) -> list[int]:
    """Numbers of the shards still to write."""
    return [number for number in range(self._shards) if not self._done(number)]

  def write(self, number: int, records: Mapping[str, Sequence[np.ndarray]]) -> None:
    """Writes one shard: every field as [n ...], or as a list of n arrays if it varies, in the store's dtype."""
    self._check_records(number, records)
    count = len(next(iter(records.values())))
    path = self._path(number)
    writer = ArrayRecordWriter(path + '.tmp', 'group_size:1,uncompressed')
    for row in range(count):
      fields = self._fields.items()
      writer.write(b''.join(field.pack(np.asarray(records[name][row])) for name, field in fields))
    writer.close()
    os.replace(path + '.tmp', path)
    shard = {
      'name': _shard_name(number),
      'count': count,
      'bytes': os.path.getsize(path),
      'sha256': sha256(path),
    }
    _write_json(self._card(number), {'head': self._head, 'shard': shard})

  def _check_records(self, number: int, records: Mapping[str, Sequence[np.ndarray]]) -> None:
    if not 0 <= number < self._shards:
      raise InputError(f'shard {number} is outside the {self._shards} shards of {self._folder}.')
    if set(records) != set(self._fields):
      raise InputError(
        f'records have fields {sorted(records)}, but the store has {sorted(self._fields)}.'
      )
    for name, field in self._fields.items():
      wrong = next((x for x in map(np.asarray, records[name]) if not field.fits(x)), None)
      if wrong is not None:
        raise InputError(
          f"field '{name}' is {wrong.dtype} {wrong.shape} a record, "
          f'but the store has {field.dtype} {field.shape}.'
        )
    if len({len(array) for array in records.values()}) > 1:
      raise InputError('the fields have different numbers of records: give each the same.')

  def finish(self) -> None:
    """Writes the index once every shard is there.

    Raises:
      InputError: shards are missing; the first is named.
    """
    missing = self.missing()
    if missing:
      raise InputError(
        f'store {self._folder} lacks {_shard_name(missing[0])}: write it before finishing.'
      )
    shards = [
      _read_json(self._card(number), 'write it again')['shard'] for number in range(self._shards)
    ]
    count = sum(shard['count'] for shard in shards)
    _write_json(
      os.path.join(self._folder, 'index.json'), self._head | {'count': count, 'shards': shards}
    )


def _card_of(path: str) -> str:
  return path.removesuffix('.array_record') + '.json'


def _is_done(folder: str, number: int) -> bool:
  path = os.path.join(folder, _shard_name(number))
  return os.path.exists(_card_of(path)) and os.path.exists(path)


def owed(folder: str, shards: int) -> list[int]:
  """Numbers of the shards that this process has still to write: its own modulo the process count."""
  if os.path.exists(os.path.join(folder, 'index.json')):
    return []
  own = range(jax.process_index(), shards, jax.process_count())
  return [number for number in own if not _is_done(folder, number)]


def fill(folder: str, fields: dict, shards: int, facts: dict, make: Callable[[int], dict]) -> str:
  """Writes the missing shards of a store with `make(number)`, and finishes it; returns the folder.

  Each process writes those that it has `owed`.

  Raises:
    InputError: see `StoreWriter`.
  """
  writer = StoreWriter(folder, fields, shards, facts)
  if not os.path.exists(os.path.join(folder, 'index.json')):
    todo = owed(folder, shards)
    for done, number in enumerate(todo, 1):
      writer.write(number, make(number))
      if done % 10 == 0 or done == len(todo):
        log.info('%s: %d of %d shards', folder, done, len(todo))
    hosts.wait(folder)
    hosts.together(lambda: None if jax.process_index() else writer.finish())
  return folder


class Store(grain.sources.RandomAccessDataSource):
  """A finished store as a Grain random-access source: row -> dict of arrays.

  Args:
    folder: folder of the store.
    verify: whether to compare every shard's SHA-256, which reads the whole store.

  Raises:
    InputError: the store is unfinished, or a shard is missing or has another size or content.
  """

  def __init__(self, folder: str, verify: bool = False):
    index = _read_json(
      os.path.join(folder, 'index.json'), 'the store is unfinished, run its writer to the end'
    )
    if index['format'] != FORMAT:
      raise InputError(
        f'store {folder} has format {index["format"]}, this version reads {FORMAT}: make it again.'
      )
    self.fields = _from_json(index['fields'])
    self.config = index['config']
    for shard in index['shards']:
      _check_shard(folder, shard, verify)
    if not index['count']:
      raise InputError(f'store {folder} holds no records: make it again.')
    self._source = grain.sources.ArrayRecordDataSource(
      [os.path.join(folder, s['name']) for s in index['shards']]
    )
    self._folder = folder

  def __len__(self) -> int:
    return len(self._source)

  def __getitem__(self, row: int) -> dict[str, np.ndarray]:
    record, offset, arrays = self._source[row], 0, {}
    for name, field in self.fields.items():
      arrays[name], offset = field.unpack(record, offset)
    return arrays

  def __repr__(self) -> str:
    return f'Store({self._folder}, {len(self)} records)'


def _check_shard(folder: str, shard: dict, verify: bool) -> None:
  path = os.path.join(folder, shard['name'])
  mend = f"delete {shard['name'].removesuffix('.array_record')}.* and run the store's writer again"
  if not os.path.exists(path):
    raise InputError(f'{path} is missing: {mend}.')
  if os.path.getsize(path) != shard['bytes']:
    raise InputError(
      f'{path} has {os.path.getsize(path)} bytes instead of {shard["bytes"]}: {mend}.'
    )
  if verify and sha256(path) != shard['sha256']:
    raise InputError(f'{path} has another SHA-256 than its index says: {mend}.')
