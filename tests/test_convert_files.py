"""Weight files: written at once, read back exactly, and refused in one sentence when damaged."""

import pathlib

import jax
import numpy as np
import pytest
from safetensors.torch import load_file

from salt_jax import convert
from salt_jax.errors import InputError
from salt_jax.models import text, wan

TINY = text.TextConfig(vocab=48, dim=16, dim_attn=24, heads=4, ffn_dim=40, layers=2)


def random_params():
  """Device arrays, whose torch layouts are transposed views."""
  leaves, tree = jax.tree.flatten(text.param_shapes(TINY))
  keys = jax.random.split(jax.random.key(0), len(leaves))
  return tree.unflatten(
    [jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
  )


def one_sentence(message: str):
  assert message.endswith(('.', '?')) and '\n' not in message and '. ' not in message, message


@pytest.mark.parametrize('dtype', convert.DTYPES)
def test_a_saved_file_loads_as_float32(tmp_path, dtype):
  """From device arrays, whose torch layouts are transposed views: elements count, not buffers."""
  params = random_params()
  path = tmp_path / 'new' / 'umt5.safetensors'
  convert.save_params(path, params, 'umt5', dtype, {'step': '7'})
  loaded = convert.load_params(path, 'umt5', jax.eval_shape(lambda: params))
  rounded = jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), params)
  assert all(x.dtype == np.float32 for x in jax.tree.leaves(loaded))
  assert jax.tree.all(jax.tree.map(np.array_equal, loaded, rounded))
  assert [p.name for p in path.parent.iterdir()] == ['umt5.safetensors']


def test_torch_reads_what_we_write(tmp_path):
  path = tmp_path / 'umt5.safetensors'
  params = random_params()
  convert.save_params(path, params, 'umt5')
  read = load_file(path)
  assert len(read) == 2 + 2 * 10
  for i in range(2):
    np.testing.assert_array_equal(
      read[f'blocks.{i}.ffn.fc1.weight'].numpy(), params['blocks']['ffn']['fc1']['kernel'][i].T
    )


def _truncate(path: pathlib.Path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _spoil(path: pathlib.Path):
  content = bytearray(path.read_bytes())
  content[-4:] = np.float32(np.nan).tobytes()
  path.write_bytes(content)


@pytest.mark.parametrize(
  'damage, words',
  [
    (pathlib.Path.unlink, 'not there'),
    (_truncate, 'cut short'),
    (lambda path: path.write_bytes(path.read_bytes()[:40]), 'cut short'),
    (lambda path: path.write_bytes(b''), 'not a safetensors file'),
    (lambda path: path.write_text('these are no weights but a letter'), 'not a safetensors file'),
    (_spoil, 'NaN or infinite numbers in'),
  ],
)
def test_a_damaged_file_gives_one_sentence_with_its_path(tmp_path, damage, words):
  params = random_params()
  path = tmp_path / 'umt5.safetensors'
  convert.save_params(path, params, 'umt5')
  damage(path)
  with pytest.raises(InputError, match=words) as error:
    convert.load_params(path, 'umt5', params)
  assert str(path) in str(error.value)
  one_sentence(str(error.value).replace(str(path), 'path'))


def test_a_file_of_another_size_or_network_gives_one_sentence_with_its_path(tmp_path):
  path = tmp_path / 'umt5.safetensors'
  convert.save_params(path, random_params(), 'umt5')
  for network, like, words in (
    ('umt5', text.param_shapes(text.nano_text()), 'another size'),
    ('dit', wan.param_shapes(wan.wan_nano()), 'another model'),
  ):
    with pytest.raises(InputError, match=words) as error:
      convert.load_params(path, network, like)
    assert str(path) in str(error.value)
    one_sentence(str(error.value).replace(str(path), 'path'))


def test_refusing_to_write_leaves_the_old_file(tmp_path):
  path = tmp_path / 'x.safetensors'
  convert.save_safetensors(path, {'a': np.ones(3)})
  before = path.read_bytes()
  with pytest.raises(InputError, match='NaN'):
    convert.save_safetensors(path, {'a': np.array([1, np.nan])})
  with pytest.raises(InputError, match='int3'):
    convert.save_params(path, {}, 'dit', 'int3')
  with pytest.raises(TypeError):
    convert.save_safetensors(path, {'a': np.zeros(3)}, {'step': 7})
  assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
