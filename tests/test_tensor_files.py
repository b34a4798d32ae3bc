"""Tensors on disk: written as safetensors itself does, one at a time, whole or not at all."""

import hashlib
import os
import signal
import subprocess
import sys
import weakref

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from salt_jax import tensor_files
from salt_jax.errors import InputError
from salt_jax.tensor_files import Tensor, held


def mixed() -> dict[str, np.ndarray]:
  """One of every dtype, transposed views, an empty one and a scalar."""
  rng = np.random.default_rng(0)
  arrays = {
    f'{name.lower()}.{i}': rng.integers(0, 2, (3, 5 - i)).astype(dtype)
    for name, dtype in tensor_files.DTYPES.items()
    for i in range(2)
  }
  arrays['b.transposed'] = rng.standard_normal((4, 7), np.float32).T
  arrays['scalar'] = np.float32(3.5).reshape(())
  arrays['größe'] = np.zeros((0, 4), np.float16)
  return arrays


@pytest.mark.parametrize('metadata', [None, {'format': 'pt'}])
@pytest.mark.parametrize('block', [1, 7, 1 << 24])
def test_the_bytes_are_those_of_safetensors_own_writer(tmp_path, monkeypatch, metadata, block):
  monkeypatch.setattr(tensor_files, '_BLOCK', block)
  ours, theirs = tmp_path / 'ours.safetensors', tmp_path / 'theirs.safetensors'
  digest = tensor_files.write(str(ours), {k: held(x) for k, x in mixed().items()}, metadata)
  whole = {k: np.ascontiguousarray(x).reshape(x.shape) for k, x in mixed().items()}
  safetensors.numpy.save_file(whole, theirs, metadata)
  assert ours.read_bytes() == theirs.read_bytes()
  assert digest == hashlib.sha256(theirs.read_bytes()).hexdigest()


def test_what_is_written_is_read_back(tmp_path):
  path = str(tmp_path / 'x.safetensors')
  tensor_files.write(path, {k: held(x) for k, x in mixed().items()}, {'a': 'b'})
  tensors, metadata = tensor_files.scan(path)
  assert metadata == {'a': 'b'} and tensors.keys() == mixed().keys()
  for name, array in mixed().items():
    got = tensors[name].read()
    assert got.dtype == tensors[name].dtype == array.dtype and tensors[name].shape == array.shape
    np.testing.assert_array_equal(got.astype(np.float64), array.astype(np.float64))


def test_scanning_reads_no_tensor(tmp_path, monkeypatch):
  path = str(tmp_path / 'x.safetensors')
  tensor_files.write(path, {'a': held(np.ones(3))})
  monkeypatch.setattr(np, 'fromfile', lambda *_, **__: pytest.fail('a tensor was read'))
  assert tensor_files.scan(path)[0]['a'].shape == (3,)


def test_one_tensor_is_in_memory_at_a_time(tmp_path):
  """Each is read once, after the one before is gone."""
  alive, read = [], []

  def tensor(name):
    def fetch():
      assert not any(ref() is not None for ref in alive), 'another tensor is still held'
      array = np.full(1000, len(read), np.float32)
      alive.append(weakref.ref(array))
      read.append(name)
      return array

    return Tensor((1000,), np.dtype(np.float32), fetch)

  tensor_files.write(str(tmp_path / 'x'), {f't{i}': tensor(f't{i}') for i in range(5)})
  assert read == [f't{i}' for i in range(5)]


def test_numbers_are_rounded_once_to_the_dtype(tmp_path):
  wide = np.array([1.00390625 + 2**-20, -3.0], np.float32)  # just above the middle of two bfloat16
  path = str(tmp_path / 'x.safetensors')
  tensor_files.write(path, {'a': Tensor((2,), np.dtype(ml_dtypes.bfloat16), lambda: wide)})
  got = tensor_files.scan(path)[0]['a'].read()
  assert got.dtype == ml_dtypes.bfloat16 and got.tolist() == [1.0078125, -3.0]


def _stop():
  raise KeyboardInterrupt


@pytest.mark.parametrize(
  'tensor, error, words',
  [
    (held(np.r_[np.ones(20), np.nan]), InputError, 'source.pt holds NaN or infinite numbers in z'),
    (held(np.r_[np.ones(20), -np.inf].astype(ml_dtypes.bfloat16)), InputError, 'infinite'),
    (
      held(np.ones(2))._replace(dtype=np.dtype('float16'), read=lambda: np.full(2, 1e6)),
      InputError,
      'float16',
    ),
    (Tensor((3,), np.dtype('float32'), lambda: np.ones(2, np.float32)), ValueError, '8 bytes'),
    (Tensor((3,), np.dtype('float32'), _stop), KeyboardInterrupt, None),
  ],
)
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
  tmp_path, monkeypatch, tensor, error, words
):
  monkeypatch.setattr(tensor_files, '_BLOCK', 8)
  path = tmp_path / 'x.safetensors'
  path.write_text('old')
  with pytest.raises(error, match=words):
    tensor_files.write(
      str(path), {'a': held(np.ones(3, np.int64)), 'z': tensor}, source='source.pt'
    )
  assert list(tmp_path.iterdir()) == [path] and path.read_text() == 'old'


def test_a_full_disk_is_seen_before_writing(tmp_path, monkeypatch):
  usage = type(tensor_files.shutil.disk_usage('/'))(10, 9, 1)
  monkeypatch.setattr(tensor_files.shutil, 'disk_usage', lambda _: usage)
  with pytest.raises(InputError, match='GB left; make room or name another folder.'):
    tensor_files.write(str(tmp_path / 'x'), {'a': Tensor((9,), np.dtype('float32'), _stop)})
  assert not list(tmp_path.iterdir())


def every_bfloat16() -> np.ndarray:
  """All numbers that bfloat16 has, with subnormals, both zeros, infinities and NaNs, as a transposed view."""
  return np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16).reshape(128, 512).T


@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16, np.float64])
def test_casting_is_that_of_numpy(dtype):
  """Bit for bit: a NaN keeps its payload."""
  place = np.empty((512, 128), dtype)
  with np.errstate(invalid='ignore'):
    tensor_files.cast_into(place, every_bfloat16())
    wanted = every_bfloat16().astype(dtype, 'C')
  np.testing.assert_array_equal(place.view(np.uint8), wanted.view(np.uint8))


def test_finite_is_what_numpy_calls_finite():
  numbers = every_bfloat16().astype(np.float32).ravel()
  ours = [tensor_files.is_finite(x) for x in every_bfloat16().ravel().reshape(-1, 1)]
  assert ours == np.isfinite(numbers).tolist()


def test_a_checksum_belongs_to_its_file(tmp_path):
  path = tmp_path / 'x.safetensors'
  assert not tensor_files.verify(str(path.parent / 'none'))
  tensor_files.write_checksum(str(path), tensor_files.write(str(path), {'a': held(np.ones(3))}))
  done = subprocess.run(
    ['sha256sum', '-c', 'x.safetensors.sha256'], cwd=tmp_path, capture_output=True
  )
  assert done.returncode == 0
  assert tensor_files.verify(str(path))
  content = bytearray(path.read_bytes())
  content[-1] ^= 1
  path.write_bytes(content)
  with pytest.raises(InputError, match='is not the file that .*sha256 was made of'):
    tensor_files.verify(str(path))
  tensor_files.write(str(path), {'a': held(np.ones(4))})
  assert list(tmp_path.iterdir()) == [path], 'the checksum of the file that was replaced must go'


@pytest.mark.parametrize(
  'content, words',
  [
    (b'version https://git-lfs.github.com/spec/v1\noid sha256:0\n', 'a pointer of Git LFS; fetch'),
    (b'<!DOCTYPE html><html>', 'a web page; download the file itself.'),
    (b'\n  <html lang="en">', 'a web page'),
    (tensor_files.LEGACY_TORCH + b'xyz', 'of torch before 1.6; load it there'),
    (b'\x80\x04\x95abc', 'a bare pickle, which is not read'),
    (b'', 'is not a safetensors file; give one, or convert yours first'),
    (b'{"weight_map": {}}', 'is not a safetensors file; give one'),
    (b'PK\x03\x04rest', 'is a torch file; convert it first with python -m salt_jax.convert.'),
    ((2**40).to_bytes(8, 'little') + b'{"a', 'is not a safetensors file'),
    ((99).to_bytes(8, 'little') + b'{"a', 'is cut short or damaged'),
  ],
)
def test_what_is_no_safetensors_file_is_named(tmp_path, content, words):
  path = tmp_path / 'x.safetensors'
  path.write_bytes(content)
  with pytest.raises(InputError) as error:
    tensor_files.scan(str(path))
  assert words in str(error.value) and str(path) in str(error.value)


def test_a_header_may_begin_with_any_length(tmp_path):
  """Byte 0 of a file is '{' when its header has 123 bytes more than a multiple of 256."""
  text = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.ljust(123)
  path = tmp_path / 'x.safetensors'
  path.write_bytes(len(text).to_bytes(8, 'little') + text + np.float32(7).tobytes())
  assert path.read_bytes()[:1] == b'{' and tensor_files.scan(str(path))[0]['a'].read() == [7]


def test_a_file_that_shrinks_is_noticed(tmp_path):
  path = str(tmp_path / 'x.safetensors')
  tensor_files.write(path, {'a': held(np.ones(3))})
  tensors, _ = tensor_files.scan(path)
  os.truncate(path, os.path.getsize(path) - 4)
  with pytest.raises(InputError, match='cut short'):
    tensors['a'].read()


def test_a_terminated_program_leaves_nothing(tmp_path):
  """A SIGTERM in the middle of writing; the program says when it is there."""
  code = (
    'import numpy as np, signal, sys, time\n'
    'from salt_jax import convert_cli, tensor_files\n'
    'def read():\n  print("writing", flush=True)\n  time.sleep(60)\n'
    'late = tensor_files.Tensor((3,), np.dtype("float32"), read)\n'
    'first = tensor_files.held(np.ones(1000))\n'
    'with convert_cli.stoppable():\n'
    f'  tensor_files.write({str(tmp_path / "x")!r}, {{"a": first, "b": late}})\n'
  )
  child = subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE)
  assert child.stdout.readline() == b'writing\n' and len(list(tmp_path.iterdir())) == 1
  child.send_signal(signal.SIGTERM)
  assert child.wait(30) == 128 + signal.SIGTERM
  assert not list(tmp_path.iterdir())
