"""Files of torch.save, read without torch and without running what they hold.

Such a file is a zip: a pickle that describes the objects, and beside it the bytes of each storage.
A pickle is a program. The reader lets it name a handful of things and no others: dictionaries,
storages, and the functions that make tensors of storages. Even these are stand-ins of our own.
"""

import io
import pickle
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from salt_jax import tensor_files
from salt_jax.errors import InputError
from salt_jax.tensor_files import Tensor

_STORAGES = {
  'DoubleStorage': np.float64,
  'FloatStorage': np.float32,
  'HalfStorage': np.float16,
  'BFloat16Storage': ml_dtypes.bfloat16,
  'LongStorage': np.int64,
  'IntStorage': np.int32,
  'ShortStorage': np.int16,
  'CharStorage': np.int8,
  'ByteStorage': np.uint8,
  'BoolStorage': np.bool_,
}
# What makes objects in ways that no weights need, or takes memory by a number in the file.
_OPCODES = {
  *('EXT1', 'EXT2', 'EXT4', 'INST', 'OBJ', 'NEWOBJ', 'NEWOBJ_EX', 'PERSID'),
  *('NEXT_BUFFER', 'READONLY_BUFFER'),
}
_MEMO = {'PUT', 'BINPUT', 'LONG_BINPUT'}


class _Dict(dict):
  """What an OrderedDict becomes: attributes, such as a state dict's `_metadata`, would hide its own methods."""

  __slots__ = ()

  def __setstate__(self, state):
    del state


class _Type(NamedTuple):
  """A kind of storage; as a tuple it has nothing that a pickle could set."""

  dtype: np.dtype


class _Storage(NamedTuple):
  key: str
  dtype: np.dtype
  numel: int


class _Rebuild(NamedTuple):
  """The making of a tensor from (storage, offset, shape, strides, ...)."""

  path: str
  members: Mapping[str, zipfile.ZipInfo]

  def __call__(self, storage, offset, shape, strides, *_):
    return _tensor(self.path, self.members, storage, (offset, tuple(shape), tuple(strides)))


class _Parameter(NamedTuple):
  """The making of a parameter: the tensor itself."""

  name: str = 'parameter'

  def __call__(self, tensor, *_):
    return tensor


def load(path: str) -> Any:
  """Reads a file of torch.save into plain containers with a `Tensor` for each tensor.

  Tensors stay in the file until they are read.

  Raises:
    InputError: not such a file, cut short, or a pickle that names anything but tensors and
      dictionaries; none of it has run then.
  """
  try:
    with zipfile.ZipFile(path) as archive:
      root, members = _members(path, archive)
      text = archive.read(f'{root}/data.pkl')
  except (zipfile.BadZipFile, EOFError, OSError, RuntimeError) as error:
    raise InputError(f'{path} is cut short or damaged; copy or download it again.') from error
  _refuse_opcodes(path, text)
  try:
    return _Reader(path, text, members).load()
  except InputError:
    raise
  except Exception as error:
    raise _unsound(path) from error


def _unsound(path: str) -> InputError:
  return InputError(f'{path} holds a pickle that makes no sense; copy or download it again.')


def _members(path: str, archive: zipfile.ZipFile) -> tuple[str, dict[str, zipfile.ZipInfo]]:
  """The folder inside the zip, and its storages by key."""
  members = {info.filename: info for info in archive.infolist()}
  roots = [n.removesuffix('/data.pkl') for n in members if n.endswith('/data.pkl')]
  stored = all(info.compress_type == zipfile.ZIP_STORED for info in members.values())
  if len(roots) != 1 or not stored:
    raise InputError(f'{path} is a zip archive but not one of torch.save; unpack it first.')
  order = f'{roots[0]}/byteorder'
  if order in members and archive.read(order) != b'little':
    raise InputError(f'{path} was saved on a big-endian machine; save it on another.')
  data = f'{roots[0]}/data/'
  return roots[0], {n.removeprefix(data): m for n, m in members.items() if n.startswith(data)}


def _refuse_opcodes(path: str, text: bytes) -> None:
  try:
    opcodes = [(opcode.name, argument) for opcode, argument, _ in pickletools.genops(text)]
  except ValueError as error:
    raise _unsound(path) from error
  for name, argument in opcodes:
    # The memo of a pickle never outgrows its text; a large number here would only take memory.
    if name in _OPCODES or (name in _MEMO and int(argument) > len(text)):
      raise InputError(
        f'{path} is a pickle with {name}, which no weights need; '
        'do not load it, and get the weights elsewhere.'
      )


class _Reader(pickle.Unpickler):
  """Unpickles what `torch.save` writes of tensors, and nothing else."""

  def __init__(self, path: str, text: bytes, members: Mapping[str, zipfile.ZipInfo]):
    super().__init__(io.BytesIO(text))
    self._path = path
    rebuild = _Rebuild(path, members)
    self._known = {
      ('collections', 'OrderedDict'): _Dict,
      ('torch._utils', '_rebuild_tensor'): rebuild,
      ('torch._utils', '_rebuild_tensor_v2'): rebuild,
      ('torch._utils', '_rebuild_parameter'): _Parameter(),
      **{('torch', name): _Type(np.dtype(dtype)) for name, dtype in _STORAGES.items()},
    }

  def find_class(self, module, name):
    if (module, name) not in self._known:
      raise InputError(
        f'{self._path} would use {module}.{name} when loaded, which no weights need; '
        'save its tensors alone, or get the weights elsewhere.'
      )
    return self._known[module, name]

  def persistent_load(self, pid):
    tag, kind, key, _, numel = pid
    if tag != 'storage' or type(kind) is not _Type or type(numel) is not int:
      raise _unsound(self._path)
    return _Storage(str(key), kind.dtype, numel)


def _tensor(
  path: str, members: Mapping[str, zipfile.ZipInfo], storage: Any, place: tuple[int, tuple, tuple]
) -> Tensor:
  """A tensor of a storage, checked to lie inside it.

  `place` is (offset, shape, strides), in elements.
  """
  offset, shape, strides = place
  if type(storage) is not _Storage or len(shape) != len(strides):
    raise _unsound(path)
  if not all(type(n) is int and n >= 0 for n in (offset, *shape, *strides)):
    raise _unsound(path)
  info, size = members.get(storage.key), storage.numel * storage.dtype.itemsize
  if info is None or info.file_size != size:
    raise InputError(f'{path} lacks bytes of a tensor; copy or download it again.')
  empty = 0 in shape
  span = 0 if empty else 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
  count = 1
  for n in shape:
    count *= n
  if offset + span > storage.numel or count > storage.numel:
    raise InputError(f'{path} holds a tensor larger than its bytes; copy or download it again.')

  def read() -> np.ndarray:
    begin = _begin(path, info) + offset * storage.dtype.itemsize
    flat = tensor_files.read_at(path, storage.dtype, begin, (span,))
    if span == storage.numel and zlib.crc32(flat.view(np.uint8)) != info.CRC:
      raise InputError(
        f'{path} holds bytes that are not those of its own checksum; copy or download it again, or if it was saved '
        'without checksums save it anew with them.'
      )
    steps = [s * storage.dtype.itemsize for s in strides]
    return np.lib.stride_tricks.as_strided(flat, shape, steps, writeable=False)

  return Tensor(shape, storage.dtype, read)


def _begin(path: str, info: zipfile.ZipInfo) -> int:
  """Where the bytes of a zip's member begin: behind its own header, whose length only it knows."""
  with open(path, 'rb') as file:
    file.seek(info.header_offset)
    header = file.read(30)
  if len(header) < 30 or not header.startswith(b'PK\x03\x04'):
    raise InputError(f'{path} is cut short or damaged; copy or download it again.')
  name, extra = struct.unpack('<HH', header[26:])
  return info.header_offset + 30 + name + extra
