"""Tensors that stay on disk until they are read, and safetensors files of them.

A 14B file passes through a program tensor by tensor: opening a file reads its header, and writing
one puts the header first, from the shapes, and then each tensor as it is read.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np
import safetensors

from salt_jax.errors import InputError

# By the names of the format, in the order in which its own writer lays tensors out, last first.
DTYPES = {
  'BOOL': np.dtype(np.bool_),
  'U8': np.dtype(np.uint8),
  'I8': np.dtype(np.int8),
  'F8_E5M2': np.dtype(ml_dtypes.float8_e5m2),
  'F8_E4M3': np.dtype(ml_dtypes.float8_e4m3fn),
  'I16': np.dtype(np.int16),
  'F16': np.dtype(np.float16),
  'BF16': np.dtype(ml_dtypes.bfloat16),
  'I32': np.dtype(np.int32),
  'F32': np.dtype(np.float32),
  'F64': np.dtype(np.float64),
  'I64': np.dtype(np.int64),
}
_BFLOAT16 = DTYPES['BF16']
_ORDER = {dtype: number for number, dtype in enumerate(DTYPES.values())}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_BLOCK = 1 << 24  # elements that are checked, cast and written at a time

LEGACY_TORCH = b'\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19.'


class Tensor(NamedTuple):
  """A tensor by its shape and dtype; `read` fetches it anew each time.

  What is read may be wider than `dtype`, where a sum is still to be rounded.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray]


def held(array: np.ndarray) -> Tensor:
  """The tensor of an array in memory."""
  return Tensor(array.shape, array.dtype, lambda: array)


def kind(path: str) -> str:
  """'safetensors' or 'torch', by a file's first bytes and not by its name.

  Raises:
    InputError: no such file, or one of another kind; what is commonly saved by mistake is named.
  """
  if not os.path.isfile(path):
    raise InputError(f'{path} is not there or not a file; check the path.')
  with open(path, 'rb') as file:
    start = file.read(256)
  if start.startswith(b'PK\x03\x04'):
    return 'torch'
  if start[5:9] == b'\0\0\0{':
    return 'safetensors'
  raise InputError(f'{path} is not a safetensors file{_guess(start)}')


def _guess(start: bytes) -> str:
  if start.startswith(b'version https://git-lfs'):
    return ' but a pointer of Git LFS; fetch the file itself, with git lfs pull.'
  if start.lstrip()[:9].lower().startswith((b'<!doctype', b'<html', b'<?xml')):
    return ' but a web page; download the file itself.'
  if start.startswith(LEGACY_TORCH):
    return ' but of torch before 1.6; load it there and save it anew with a newer one.'
  if start.startswith(b'\x80'):
    return ' but a bare pickle, which is not read; save tensors as safetensors.'
  return '; give one, or convert yours first with python -m salt_jax.convert.'


def scan(path: str) -> tuple[dict[str, Tensor], dict[str, str]]:
  """The tensors of a safetensors file, not yet read, and its metadata.

  Raises:
    InputError: not such a file, cut short, or of a dtype that NumPy lacks.
  """
  if kind(path) != 'safetensors':
    raise InputError(f'{path} is a torch file; convert it first with python -m salt_jax.convert.')
  # safetensors checks that the header is sound and the file as long as it says.
  try:
    with safetensors.safe_open(path, framework='np'):
      pass
  except safetensors.SafetensorError as error:
    raise InputError(f'{path} is cut short or damaged; copy or download it again.') from error
  with open(path, 'rb') as file:
    size = int.from_bytes(file.read(8), 'little')
    header = json.loads(file.read(size))
  metadata = header.pop('__metadata__', {})
  return {name: _at(path, name, row, 8 + size) for name, row in header.items()}, metadata


def _at(path: str, name: str, row: Mapping[str, Any], start: int) -> Tensor:
  if row['dtype'] not in DTYPES:
    raise InputError(f'{path} holds {name} as {row["dtype"]}; use a file of plain numbers.')
  dtype, shape = DTYPES[row['dtype']], tuple(row['shape'])
  begin = start + row['data_offsets'][0]
  return Tensor(shape, dtype, lambda: read_at(path, dtype, begin, shape))


def read_at(path: str, dtype: np.dtype, begin: int, shape: tuple[int, ...]) -> np.ndarray:
  """Reads an array that lies in a file from the byte `begin` on.

  Raises:
    InputError: the file has become shorter since it was opened.
  """
  count = int(np.prod(shape, dtype=np.int64))
  array = np.fromfile(path, dtype, count, offset=begin)
  if array.size < count:
    raise InputError(f'{path} is cut short or damaged; copy or download it again.')
  return array.reshape(shape)


def is_finite(array: np.ndarray) -> bool:
  """Whether no number is NaN or infinite."""
  if array.dtype == _BFLOAT16:
    exponents = array.view(np.uint16) & 0x7F80
    return bool((exponents != 0x7F80).all())
  return bool(np.isfinite(array).all())


def cast_into(place: np.ndarray, array: np.ndarray) -> None:
  """`place[...] = array`; what is only moved or widened goes as integers where it is bfloat16.

  NumPy's own loops take a fraction of the time of bfloat16's, and other threads run beside them.
  """
  if array.dtype != _BFLOAT16 or place.dtype not in (_BFLOAT16, np.float32):
    place[...] = array
  elif place.dtype == _BFLOAT16:
    place.view(np.uint16)[...] = array.view(np.uint16)
  else:
    bits = place.view(np.uint32)
    bits[...] = array.view(np.uint16)
    bits <<= 16


def _blocks(path: str, name: str, tensor: Tensor) -> Iterator[np.ndarray]:
  """A tensor's numbers in its dtype, a block at a time, each known to be finite."""
  flat = np.ascontiguousarray(tensor.read()).reshape(-1)
  for start in range(0, flat.size, _BLOCK):
    block = flat[start : start + _BLOCK]
    if not is_finite(block):
      raise InputError(
        f'{path} holds NaN or infinite numbers in {name}; '
        'use a checkpoint from before they appeared.'
      )
    with np.errstate(over='ignore'):
      block = block.astype(tensor.dtype, copy=False)
    if block.dtype != flat.dtype and not is_finite(block):
      raise InputError(
        f'{name} holds numbers beyond the largest of {tensor.dtype}; choose bfloat16 or float32.'
      )
    yield block


def refuse_nonfinite(path: str, tensors: Mapping[str, np.ndarray]) -> None:
  """Raises InputError if an array holds a number that is not finite; `path` and the first are named."""
  for name, array in tensors.items():
    for _ in _blocks(path, name, held(np.asarray(array))):
      pass


def finite(path: str, name: str, tensor: Tensor) -> Tensor:
  """A tensor that is refused when it is read, as by `refuse_nonfinite`."""

  def read() -> np.ndarray:
    array = tensor.read()
    refuse_nonfinite(path, {name: array})
    return array

  return Tensor(tensor.shape, tensor.dtype, read)


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> tuple[bytes, list[str]]:
  """The file's beginning, and the order in which the tensors follow it: wide dtypes first."""
  order = sorted(tensors, key=lambda name: (-_ORDER[tensors[name].dtype], name))
  rows, end = {'__metadata__': dict(metadata)} if metadata else {}, 0
  for name in order:
    begin, end = end, end + nbytes(tensors[name])
    rows[name] = {
      'dtype': _NAMES[tensors[name].dtype],
      'shape': list(tensors[name].shape),
      'data_offsets': [begin, end],
    }
  text = json.dumps(rows, ensure_ascii=False, separators=(',', ':')).encode()
  text += b' ' * (-len(text) % 8)
  return len(text).to_bytes(8, 'little') + text, order


def nbytes(tensor: Tensor) -> int:
  return int(np.prod(tensor.shape, dtype=np.int64)) * tensor.dtype.itemsize


@contextlib.contextmanager
def draft(path: str) -> Iterator[str]:
  """A name beside `path` to write to; it becomes `path` at the end, or is gone if that fails."""
  os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
  name = f'{path}.{os.getpid()}.tmp'
  try:
    yield name
    os.replace(name, path)
  finally:
    if os.path.isdir(name):
      shutil.rmtree(name)
    elif os.path.exists(name):
      os.remove(name)


def write(
  path: str,
  tensors: Mapping[str, Tensor],
  metadata: Mapping[str, str] | None = None,
  source: str = '',
) -> str:
  """Writes a safetensors file, one tensor in memory at a time; a reader never sees half of it.

  The bytes are those of safetensors' own writer.

  Args:
    path: the file; one that is there is replaced, and its checksum goes.
    tensors: by name; each is read once.
    metadata: strings by name.
    source: the file that a number which is not finite is said to be in, by default `path`.

  Returns:
    The file's SHA-256 in hexadecimal.

  Raises:
    InputError: a number is NaN or infinite, or the disk is full.
    TypeError: metadata that are no strings.
  """
  if not all(isinstance(value, str) for value in (metadata or {}).values()):
    raise TypeError(f'metadata must be strings: {metadata}')
  header, order = _header(tensors, metadata or {})
  with draft(path) as name:
    _check_room(path, len(header) + sum(map(nbytes, tensors.values())))
    with open(name, 'wb') as file:
      digest = _write_all(file, header, ((n, tensors[n]) for n in order), source or path)
    with contextlib.suppress(FileNotFoundError):
      os.remove(path + '.sha256')
  return digest


def _write_all(file: BinaryIO, header: bytes, tensors, source: str) -> str:
  digest = hashlib.sha256(header)
  file.write(header)
  for name, tensor in tensors:
    written, block = 0, None  # a block would keep all of the tensor before
    for block in _blocks(source, name, tensor):
      written += block.nbytes
      digest.update(block.view(np.uint8))
      file.write(block.view(np.uint8))
    if written != nbytes(tensor):
      raise ValueError(f'{name} has {written} bytes, not those of {tensor.shape} {tensor.dtype}.')
  return digest.hexdigest()


def _check_room(path: str, size: int) -> None:
  free = shutil.disk_usage(os.path.dirname(path) or '.').free
  if size > free:
    raise InputError(
      f'{path} takes {size / 1e9:.1f} GB, but its disk has {free / 1e9:.1f} GB left; '
      'make room or name another folder.'
    )


def checksum(path: str) -> str:
  """SHA-256 of a file, in hexadecimal."""
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def write_checksum(path: str, digest: str) -> None:
  """Leaves PATH.sha256 in the format of sha256sum."""
  with draft(path + '.sha256') as name, open(name, 'w', encoding='utf-8') as file:
    file.write(f'{digest}  {os.path.basename(path)}\n')


def verify(path: str) -> bool:
  """Compares a file with the checksum beside it; False if there is none.

  Raises:
    InputError: they differ.
  """
  beside = path + '.sha256'
  if not os.path.isfile(beside):
    return False
  with open(beside, encoding='utf-8', errors='replace') as file:
    want = (file.read().split() or [''])[0].lower()
  if checksum(path) != want:
    raise InputError(
      f'{path} is not the file that {beside} was made of; copy or download it again, '
      'or delete the checksum.'
    )
  return True
