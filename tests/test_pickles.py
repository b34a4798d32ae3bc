"""Files of torch.save, against torch itself, without it, and as an attacker would write them."""

import io
import os
import pickle
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

from salt_jax import pickles
from salt_jax.errors import InputError

DTYPES = (
  *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
  *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)


def sentence(error) -> str:
  text = str(error.value)
  assert text.endswith('.') and '\n' not in text and '. ' not in text, text
  return text


def tensors() -> dict[str, torch.Tensor]:
  base = torch.arange(24).reshape(4, 6)
  return {
    **{str(dtype): (base % 2 if dtype is torch.bool else base).to(dtype) for dtype in DTYPES},
    'transposed': base.float().T,
    'slice': base.float()[1:, 2::3],
    'again': base.float()[0],
    'scalar': torch.tensor(2.5),
    'empty': torch.zeros(0, 3),
    'parameter': torch.nn.Parameter(torch.randn(3)),
  }


@pytest.mark.parametrize('protocol', [2, 3, 4])
def test_every_tensor_is_what_torch_saved(tmp_path, protocol):
  path = tmp_path / 'x.pt'
  module = torch.nn.Linear(2, 3).state_dict()  # an OrderedDict with attributes
  content = {'a': tensors(), 'b': [module, (1, None, 'two', 3.0, True)]}
  torch.save(content, path, pickle_protocol=protocol)
  got = pickles.load(str(path))
  assert got['b'][1] == (1, None, 'two', 3.0, True)
  assert list(got['b'][0]) == list(module) and not hasattr(got['b'][0], '_metadata')
  for name, want in (tensors() | dict(module)).items():
    tensor = got['a'][name] if name in got['a'] else got['b'][0][name]
    if name != 'parameter':
      array = tensor.read()
      assert tensor.shape == array.shape == tuple(want.shape) and array.dtype == tensor.dtype
      assert str(tensor.dtype) in str(want.dtype)
      np.testing.assert_array_equal(array.astype(np.float64), want.double().numpy())
  assert got['a']['parameter'].shape == (3,)


def test_torch_is_not_needed(tmp_path):
  path = tmp_path / 'x.pt'
  torch.save({'w': torch.full((2, 3), 1.5)}, path)
  code = (
    "import sys; sys.modules['torch'] = None\n"
    f'from salt_jax import pickles; print(pickles.load({str(path)!r})["w"].read().tolist())'
  )
  done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
  assert done.stdout == '[[1.5, 1.5, 1.5], [1.5, 1.5, 1.5]]\n', done.stderr


def test_loading_reads_no_tensor(tmp_path, monkeypatch):
  path = tmp_path / 'x.pt'
  torch.save({'w': torch.ones(3)}, path)
  monkeypatch.setattr(np, 'fromfile', lambda *_, **__: pytest.fail('a tensor was read'))
  assert pickles.load(str(path))['w'].shape == (3,)


def write_zip(path, text: bytes, storages=(), compression=zipfile.ZIP_STORED, order=b'little'):
  with zipfile.ZipFile(path, 'w', compression) as archive:
    archive.writestr('archive/data.pkl', text)
    archive.writestr('archive/byteorder', order)
    for key, content in dict(storages).items():
      archive.writestr(f'archive/data/{key}', content)


class Reduced:
  """Pickles as a call of whatever it is given."""

  def __init__(self, call, *args):
    self.call = call, args

  def __reduce__(self):
    return self.call


def _global(module: str, name: str) -> bytes:
  return b'c' + f'{module}\n{name}\n'.encode()


def _text(word: str) -> bytes:
  return b'X' + struct.pack('<I', len(word)) + word.encode()


def _touch(path) -> str:
  return f'touch {path}'


# Each leaves the file it is given if it runs; the second half says what the refusal must name.
ATTACKS = {
  'os.system': (lambda f: pickle.dumps(Reduced(os.system, _touch(f))), 'posix.system'),
  'in a state dict': (
    lambda f: pickle.dumps({'generator': {'w': Reduced(os.system, _touch(f))}}),
    'posix.system',
  ),
  'as a key': (lambda f: pickle.dumps({Reduced(os.system, _touch(f)): 1}), 'posix.system'),
  'eval': (lambda f: pickle.dumps(Reduced(eval, f"open('{f}', 'w')")), 'builtins.eval'),
  'exec': (lambda f: pickle.dumps(Reduced(exec, f"open('{f}', 'w')"), 2), '__builtin__.exec'),
  'open': (lambda f: pickle.dumps(Reduced(open, str(f), 'w')), 'io.open'),
  'getattr': (
    lambda f: (
      _global('builtins', 'getattr')
      + b'('
      + _global('posix', 'system')
      + _text('__call__')
      + b'tR.'
    ),
    'builtins.getattr',
  ),
  'subprocess': (
    lambda f: pickle.dumps(Reduced(subprocess.Popen, ['touch', str(f)])),
    'subprocess.Popen',
  ),
  'torch loads bytes': (
    lambda f: _global('torch.storage', '_load_from_bytes') + b'C\x03abc\x85R.',
    'torch.storage._load_from_bytes',
  ),
  'a chain of attributes': (
    lambda f: b'\x80\x04' + _text('collections') + _text('OrderedDict.fromkeys') + b'\x93).',
    'collections.OrderedDict.fromkeys',
  ),
  'a chain through a function': (
    lambda f: (
      b'\x80\x04' + _text('torch._utils') + _text('_rebuild_tensor_v2.__globals__') + b'\x93.'
    ),
    '_rebuild_tensor_v2.__globals__',
  ),
  'our own reader': (
    lambda f: _global('salt_jax.pickles', 'os.system') + b'.',
    'salt_jax.pickles.os.system',
  ),
  'INST': (lambda f: b'(' + _text(_touch(f)) + b'iposix\nsystem\n.', 'INST'),
  'OBJ': (lambda f: b'(' + _global('posix', 'system') + _text(_touch(f)) + b'o.', 'OBJ'),
  'NEWOBJ': (lambda f: b'\x80\x02' + _global('collections', 'OrderedDict') + b')\x81.', 'NEWOBJ'),
  'EXT': (lambda f: b'\x80\x02\x82\x01.', 'EXT1'),
  'a huge memo': (lambda f: b'\x80\x02}r\xff\xff\xff\x7f.', 'LONG_BINPUT'),
  'numpy': (lambda f: pickle.dumps(np.float64(3)), 'numpy'),
}


@pytest.mark.parametrize('attack', ATTACKS)
def test_a_malicious_pickle_is_refused_and_runs_nothing(tmp_path, attack):
  make, words = ATTACKS[attack]
  path, trace = tmp_path / 'x.pt', tmp_path / 'trace'
  write_zip(path, make(trace))
  with pytest.raises(InputError) as error:
    pickles.load(str(path))
  assert words in sentence(error) and str(path) in str(error.value)
  assert list(tmp_path.iterdir()) == [path]


def test_the_attacks_work_on_an_open_reader(tmp_path):
  """So that the test above cannot pass by attacks that do nothing."""
  for attack in ('os.system', 'eval', 'open', 'INST', 'OBJ'):
    trace = tmp_path / attack
    pickle.load(io.BytesIO(ATTACKS[attack][0](trace)))
    assert trace.exists(), attack


def _built(state: bytes) -> bytes:
  """A pickle that sets the state of the function that makes tensors, and then uses it."""
  return b'\x80\x02' + _global('torch._utils', '_rebuild_tensor_v2') + state + b'b.'


@pytest.mark.parametrize(
  'state', [b'}' + _text('path') + _text('x') + b's', b'N}' + _text('path') + _text('x') + b's\x86']
)
def test_a_pickle_cannot_change_the_reader(tmp_path, state):
  path = tmp_path / 'x.pt'
  write_zip(path, _built(state))
  with pytest.raises(InputError, match='a pickle that makes no sense'):
    pickles.load(str(path))


def test_a_state_cannot_hide_what_a_dictionary_does(tmp_path):
  """`items` as an attribute of an OrderedDict would end whoever asks for its items; of its class, everybody."""
  path, state = tmp_path / 'x.pt', b'}' + _text('items') + b'K\x05sb.'
  known = b'\x80\x02' + _global('collections', 'OrderedDict')
  write_zip(path, known + b')R' + state)
  assert list(pickles.load(str(path)).items()) == []
  write_zip(path, known + state)
  with pytest.raises(InputError, match='a pickle that makes no sense'):
    pickles.load(str(path))


def _tensor(offset=0, shape=(2,), strides=(1,), numel=4, key='0', tag='storage') -> bytes:
  """The pickle of {'w': tensor}, whose numbers need not be sound."""
  out = b'\x80\x02}' + _text('w') + _global('torch._utils', '_rebuild_tensor_v2')
  out += b'((' + _text(tag) + _global('torch', 'FloatStorage') + _text(key) + _text('cpu')
  number = lambda n: b'J' + struct.pack('<i', n)  # noqa: E731
  out += number(numel) + b'tQ' + number(offset)
  for numbers in (shape, strides):
    out += b'(' + b''.join(map(number, numbers)) + b't'
  return out + b'\x89' + _global('collections', 'OrderedDict') + b')RtRs.'


def test_the_hand_made_tensor_is_sound(tmp_path):
  path = tmp_path / 'x.pt'
  write_zip(path, _tensor(offset=1, strides=(2,)), {'0': np.arange(4, dtype=np.float32).tobytes()})
  assert pickles.load(str(path))['w'].read().tolist() == [1, 3]


@pytest.mark.parametrize(
  'changes, words',
  [
    (dict(offset=3), 'larger than its bytes'),
    (dict(offset=-1), 'makes no sense'),
    (dict(shape=(5,)), 'larger than its bytes'),
    (dict(strides=(4,)), 'larger than its bytes'),
    (dict(strides=(-1,)), 'makes no sense'),
    (dict(shape=(2, 2)), 'makes no sense'),
    (dict(shape=(2**30, 2**30), strides=(0, 0)), 'larger than its bytes'),
    (dict(numel=5), 'lacks bytes of a tensor'),
    (dict(numel=3), 'lacks bytes of a tensor'),
    (dict(key='1'), 'lacks bytes of a tensor'),
    (dict(key='../data.pkl'), 'lacks bytes of a tensor'),
    (dict(tag='module'), 'makes no sense'),
  ],
)
def test_a_tensor_lies_inside_its_storage(tmp_path, changes, words):
  path = tmp_path / 'x.pt'
  write_zip(path, _tensor(**changes), {'0': np.arange(4, dtype=np.float32).tobytes()})
  with pytest.raises(InputError, match=words) as error:
    pickles.load(str(path))
  sentence(error)


def _cut(path):
  path.write_bytes(path.read_bytes()[:-200])


def _other_zip(path):
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('readme.txt', 'no weights')


def _spoil_local_header(path):
  """The bytes of a storage are found by a header of its own, which is overwritten here."""
  content = bytearray(path.read_bytes())
  with zipfile.ZipFile(path) as archive:
    start = next(i.header_offset for i in archive.infolist() if '/data/0' in i.filename)
  content[start : start + 4] = b'XXXX'
  path.write_bytes(content)


def _flip(path):
  """One bit of the tensor, a number as finite as before; the zip holds a checksum of each storage."""
  content = bytearray(path.read_bytes())
  content[content.index(np.ones(100, np.float32).tobytes()) + 42] ^= 1
  path.write_bytes(content)


@pytest.mark.parametrize(
  'damage, words',
  [
    (_flip, 'holds bytes that are not those of its own checksum'),
    (_cut, 'is cut short or damaged'),
    (_other_zip, 'is a zip archive but not one of torch.save'),
    (lambda p: write_zip(p, b'}.', compression=zipfile.ZIP_DEFLATED), 'not one of torch.save'),
    (lambda p: write_zip(p, b'}.', order=b'big'), 'was saved on a big-endian machine'),
    (lambda p: write_zip(p, b''), 'makes no sense'),
    (lambda p: write_zip(p, b'\x80\x02}X\xff'), 'makes no sense'),
    (lambda p: write_zip(p, b'\x80\x02R.'), 'makes no sense'),
    (_spoil_local_header, 'is cut short or damaged'),
  ],
)
def test_a_damaged_file_gives_one_sentence(tmp_path, damage, words):
  path = tmp_path / 'x.pt'
  torch.save({'w': torch.ones(100)}, path)
  damage(path)
  with pytest.raises(InputError, match=words) as error:
    pickles.load(str(path))['w'].read()
  sentence(error)
