"""Networks of checkpoints pass through memory layer by layer, and are those that Orbax saves and restores whole."""

import dataclasses
import pathlib
import weakref

import jax
import numpy as np
import pytest

from salt_jax import checkpoint, convert, loading, recipe, run_weights, weights
from salt_jax.errors import InputError
from salt_jax.leaves import Leaf
from salt_jax.tensor_files import Tensor, held
from tests import tiny, tiny_config

PARAMS = tiny.params()


def same(tree, other):
  jax.tree.map(np.testing.assert_array_equal, tree, other)


def zeros(config):
  shapes = weights.shapes('dit', recipe.build(config).model)
  return jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes)


def on_device(tree):
  home = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=home), tree)


@pytest.fixture(scope='module')
def written(tmp_path_factory):
  """A checkpoint of two averaged networks, written in layers."""
  folder = tmp_path_factory.mktemp('written') / 'checkpoints'
  tensors = {key: held(array) for key, array in convert.to_wan(PARAMS, 'dit').items()}
  other = {'bias': Leaf((Tensor((), np.dtype(np.float32), lambda: np.float32(2.5)),), False)}
  run_weights.write(folder, {'generator': convert.from_tensors(tensors, 'dit'), 'other': other})
  return folder


def test_what_is_written_in_layers_is_restored_whole_by_orbax(written):
  """Which also compares the fingerprint that was summed up in layers."""
  like = on_device({'generator': PARAMS, 'other': {'bias': np.zeros((), np.float32)}})
  found = checkpoint.restore_ema(written, like)
  same(found, {'generator': PARAMS, 'other': {'bias': np.float32(2.5)}})


def test_what_is_written_in_layers_is_read_in_layers(written):
  found = run_weights.load(written, 'generator_ema')
  assert found['blocks']['ffn_0']['kernel'].stacked and not found['head']['head']['bias'].stacked
  same(convert.read(found), PARAMS)
  layer = found['blocks']['ffn_0']['kernel'].layers[1].read()
  np.testing.assert_array_equal(layer, PARAMS['blocks']['ffn_0']['kernel'][1])


def test_what_training_saves_is_read_in_layers(tmp_path, monkeypatch):
  monkeypatch.setattr(checkpoint, '_CHUNK_BYTES', 2**14)
  trained = jax.tree.map(lambda x: x + 1, PARAMS)
  folder = tmp_path / 'checkpoints'
  checkpoints = checkpoint.Checkpoints(folder)
  items = {'state': {'params': {'generator': trained}}, 'ema': {'generator': PARAMS}}
  checkpoints.save(0, items, {'data_step': 0}, force=True)
  checkpoints.close()
  with checkpoint.reading(folder) as (manager, step):
    stored = checkpoint.networks(manager, step)[0]['generator']
  # 48 x 80 x 3 layers are stored so that one is read without the others.
  assert stored['blocks']['ffn_0']['kernel'].storage.chunk_shape[0] == 1
  same(convert.read(run_weights.load(folder, 'generator_ema')), PARAMS)
  same(convert.read(run_weights.load(folder, 'generator')), trained)
  with pytest.raises(InputError, match='no critic_ema; name one of generator_ema, generator'):
    run_weights.load(folder, 'critic_ema')


@pytest.mark.parametrize('stored', ['float32', 'bfloat16', 'float16'])
def test_what_is_read_narrow_is_what_narrowing_makes(tmp_path, stored):
  cfg, path = dataclasses.replace(tiny.WAN, dtype='bfloat16'), str(tmp_path / 'dit.safetensors')
  convert.save_params(path, PARAMS, 'dit', stored)
  found = weights.load_narrowed(path, 'dit', cfg)
  wanted = weights.narrowed(weights.load(path, 'dit', cfg), cfg.dtype)
  assert {x.dtype.name for x in jax.tree.leaves(found)} == {'float32', 'bfloat16'}
  assert jax.tree.map(lambda x: x.dtype, found) == jax.tree.map(lambda x: x.dtype, wanted)
  same(found, wanted)


def test_a_student_is_read_as_its_judge_computes(tmp_path):
  """Not as it was trained: in bfloat16, say, for a table of float32."""
  config = tiny_config.get_config(str(tmp_path))
  config.model.dtype = 'bfloat16'
  path = weights.export(str(tmp_path), 'generator', zeros(config), config)
  config.model.dtype = 'float32'
  found = loading.student_of(path, recipe.build(config))
  assert {x.dtype.name for x in jax.tree.leaves(found)} == {'float32'}


def test_few_layers_are_in_memory_at_once(tmp_path):
  made, most = [], []

  def read():
    array = np.ones((4, 6), np.float32)
    made.append(weakref.ref(array))
    most.append(sum(ref() is not None for ref in made))
    return array

  layer = Tensor((4, 6), np.dtype(np.float32), read)
  stack = Leaf((layer,) * 12, True)
  run_weights.write(tmp_path / 'checkpoints', {'one': {'blocks': stack, 'more': stack}})
  assert len(most) == 2 * 2 * 12 and max(most) <= 2


@pytest.mark.parametrize('harm', ['cut', 'flip', 'gone'])
def test_a_damaged_array_is_refused(tmp_path, harm):
  folder = tmp_path / 'checkpoints'
  # Of a constant the codec's own checks would see every flip.
  array = np.random.default_rng(0).standard_normal((3, 16, 16), np.float32)
  tensors = tuple(Tensor(a.shape, a.dtype, lambda a=a: a) for a in array)
  run_weights.write(folder, {'one': {'blocks': Leaf(tensors, True)}})
  chunk = next(pathlib.Path(folder).rglob('1.0.0'))
  data = bytearray(chunk.read_bytes())
  if harm == 'gone':
    chunk.unlink()
  elif harm == 'cut':
    chunk.write_bytes(data[: len(data) // 2])
  else:
    data[len(data) // 2] ^= 1
    chunk.write_bytes(data)
  with pytest.raises(InputError, match='is damaged'):
    convert.read(run_weights.load(folder, 'one_ema'))
