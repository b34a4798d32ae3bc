"""Saving, damaging and restoring, and the config of a working directory."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from salt_jax import checkpoint
from salt_jax.errors import InputError


def _items(seed=0, side=48):
  # Large enough that values lie in files of their own and not in the index.
  keys = jax.random.split(jax.random.key(seed), 2)
  params = {
    'blocks': {'kernel': jax.random.normal(keys[0], (side, side))},
    'head': {'kernel': jax.random.normal(keys[1], (side, 8)).astype(jnp.bfloat16)},
  }
  opt = optax.adamw(1e-3).init(params)
  return {'state': {'params': params, 'opt': opt, 'step': jnp.int32(seed)}, 'ema': params}


def _like(items):
  home = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=home), items)


def _saved(folder, steps=(1, 2, 3), **options):
  checkpoints = checkpoint.Checkpoints(folder, **options)
  for step in steps:
    checkpoints.save(step, _items(step), {'position': step * 8})
  checkpoints.close()
  return checkpoint.Checkpoints(folder, **options)


def _assert_identical(one, other):
  assert jax.tree.structure(one) == jax.tree.structure(other)
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_what_comes_back_is_what_was_saved(tmp_path):
  checkpoints = _saved(tmp_path)
  assert checkpoints.latest_step() == 3
  found = checkpoints.restore(3, _like(_items()))
  assert found.pop('info') == {'step': 3, 'position': 24}
  _assert_identical(found, _items(3))
  _assert_identical(checkpoint.restore_ema(tmp_path, _like(_items()['ema'])), _items(3)['ema'])
  earlier = checkpoint.restore_ema(tmp_path, _like(_items()['ema']), step=2)
  _assert_identical(earlier, _items(2)['ema'])


def test_due_steps_are_saved_and_the_newest_kept(tmp_path):
  checkpoints = checkpoint.Checkpoints(tmp_path, every=2, keep=2)
  assert checkpoints.latest_step() is None
  saved = [checkpoints.save(step, _items(), {}) for step in range(1, 8)]
  assert saved == [False, True, False, True, False, True, False]
  assert checkpoints.save(7, _items(), {}, force=True)
  assert not checkpoints.save(7, _items(), {}, force=True)
  checkpoints.close()
  assert sorted(path.name for path in tmp_path.iterdir()) == ['6', '7']


def test_arrays_may_be_donated_after_save(tmp_path):
  spoil = jax.jit(lambda items: jax.tree.map(lambda x: x * 0, items), donate_argnums=0)
  items = _items(5, side=512)
  checkpoints = checkpoint.Checkpoints(tmp_path)
  checkpoints.save(5, items, {})
  jax.block_until_ready(spoil(items['state']))
  assert items['state']['step'].is_deleted()
  checkpoints.close()
  found = checkpoint.Checkpoints(tmp_path).restore(5, _like(_items(side=512)))
  _assert_identical(found['state'], _items(5, side=512)['state'])


def test_ema_is_read_without_the_state(tmp_path):
  _saved(tmp_path).close()
  shutil.rmtree(tmp_path / '3' / 'state')
  _assert_identical(checkpoint.restore_ema(tmp_path, _like(_items()['ema'])), _items(3)['ema'])


def _data_file(item):
  return max((path for path in item.rglob('*') if path.is_file()), key=lambda x: x.stat().st_size)


def _halve(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path):
  # A middle byte of incompressible floats, which nothing in the format checks.
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


DAMAGES = {
  'half of the values': lambda step: _halve(_data_file(step / 'state')),
  'a flipped bit': lambda step: _flip(_data_file(step / 'state')),
  'half of the index': lambda step: _halve(step / 'state' / 'manifest.ocdbt'),
  'half of the names': lambda step: _halve(step / 'state' / '_METADATA'),
  'half of the info': lambda step: _halve(step / 'info' / 'metadata'),
  'no info': lambda step: shutil.rmtree(step / 'info'),
  'no state': lambda step: shutil.rmtree(step / 'state'),
  'nothing': lambda step: [shutil.rmtree(step), step.mkdir()],
}


@pytest.fixture(scope='module')
def two_steps(tmp_path_factory):
  folder = tmp_path_factory.mktemp('run')
  _saved(folder, steps=(4, 9)).close()
  return folder


@pytest.mark.parametrize('damage', DAMAGES)
def test_damage_is_named_and_the_previous_step_lives(tmp_path, two_steps, damage):
  shutil.copytree(two_steps, tmp_path, dirs_exist_ok=True)
  DAMAGES[damage](tmp_path / '9')
  checkpoints = checkpoint.Checkpoints(tmp_path)
  assert checkpoints.latest_step() == 9
  with pytest.raises(InputError) as error:
    checkpoints.restore(9, _like(_items()))
  checkpoints.close()
  assert f'checkpoint {tmp_path}/9 is damaged' in str(error.value)
  assert 'delete that folder to go on from step 4' in str(error.value)
  assert '\n' not in str(error.value)
  assert sorted(path.name for path in tmp_path.iterdir()) == ['4', '9']
  shutil.rmtree(tmp_path / '9')
  checkpoints = checkpoint.Checkpoints(tmp_path)
  _assert_identical(
    checkpoints.restore(checkpoints.latest_step(), _like(_items()))['state'], _items(4)['state']
  )


def test_only_checkpoint_damaged_means_starting_anew(tmp_path):
  checkpoints = _saved(tmp_path, steps=(1,))
  _halve(tmp_path / '1' / 'info' / 'metadata')
  with pytest.raises(InputError, match='delete that folder to start anew'):
    checkpoints.restore(1, _like(_items()))


def test_another_size_is_named(two_steps):
  checkpoints = checkpoint.Checkpoints(two_steps)
  with pytest.raises(InputError) as error:
    checkpoints.restore(9, _like(_items(side=40)))
  for words in (
    f'checkpoint {two_steps}/9 holds float32[48, 48] at',
    'float32[40, 40]',
    'pass the config it was trained with',
  ):
    assert words in str(error.value)
  deeper = _items()['ema'] | {'tail': {'bias': jnp.ones(3)}}
  with pytest.raises(InputError, match='holds nothing at ema/tail/bias.*asks for float32'):
    checkpoint.restore_ema(two_steps, _like(deeper))
  with pytest.raises(InputError, match=r'holds bfloat16\[48, 8\] at ema/head/kernel'):
    checkpoint.restore_ema(two_steps, _like(jax.tree.map(jnp.float32, _items()['ema'])))


def test_missing_things_are_named(tmp_path, two_steps):
  like = _like(_items()['ema'])
  with pytest.raises(InputError, match=f'no checkpoint folder {tmp_path}/none'):
    checkpoint.restore_ema(tmp_path / 'none', like)
  assert not (tmp_path / 'none').exists()
  with pytest.raises(InputError, match=f'{tmp_path} holds no finished checkpoint'):
    checkpoint.restore_ema(tmp_path, like)
  with pytest.raises(InputError, match=r'no checkpoint of step 5, only of \[4, 9\]'):
    checkpoint.restore_ema(two_steps, like, step=5)
  with pytest.raises(InputError, match='neither a folder nor a bucket'):
    checkpoint.Checkpoints('http://bucket/run')


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16', 'int32', 'uint8', 'int8', 'bool'])
def test_fingerprint_sees_every_element_and_no_order(dtype):
  x = np.asarray(jnp.arange(24).reshape(4, 6) % 2).astype(jnp.dtype(dtype))
  tree = {'a': x, 'b': x + x}
  print_ = int(checkpoint.fingerprint(tree))
  for index in np.ndindex(x.shape):
    other = x.copy()
    other[index] = 1 - other[index].astype('int32')
    assert int(checkpoint.fingerprint(tree | {'a': other})) != print_
  assert int(checkpoint.fingerprint({'a': tree['b'], 'b': tree['a']})) != print_ or dtype == 'bool'


def _config():
  config = ml_collections.ConfigDict(
    {'seed': 0, 'total_steps': 10, 'log': {'every': 5}, 'model': {'dims': (1, 2)}}
  )
  config.model.seed = config.get_ref('seed')
  return config


def test_config_is_written_once_and_compared(tmp_path):
  free = ('total_steps', 'log')
  config = _config()
  checkpoint.check_config(tmp_path / 'run', config, free)
  checkpoint.write_config(tmp_path / 'run', config)
  stored = tmp_path / 'run' / 'config.json'
  text = stored.read_text()
  assert json.loads(text)['model'] == {'dims': [1, 2], 'seed': 0}
  config.total_steps, config.log.every = 20, 1
  checkpoint.check_config(tmp_path / 'run', config, free)
  checkpoint.write_config(tmp_path / 'run', config)
  assert stored.read_text() == text
  config.seed = 3
  with pytest.raises(InputError) as error:
    checkpoint.check_config(tmp_path / 'run', config, free)
  assert 'config.model.seed is 3' in str(error.value)
  assert 'has 0: pass another --workdir or the same config' in str(error.value)
  other = _config()
  other.extra = 1
  with pytest.raises(InputError, match='config.extra is 1, but .* has absent'):
    checkpoint.check_config(tmp_path / 'run', other, free)
  _halve(pathlib.Path(stored))
  with pytest.raises(InputError, match='config.json is damaged'):
    checkpoint.check_config(tmp_path / 'run', _config(), free)


def test_digest_follows_the_config():
  changed = _config()
  changed.seed = 1
  assert checkpoint.config_digest(_config()) == checkpoint.config_digest(_config())
  assert checkpoint.config_digest(changed) != checkpoint.config_digest(_config())
