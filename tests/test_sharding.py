"""The mesh, the rule table and the global batch, on one device and on eight."""

import os
import subprocess
import sys
import textwrap

import jax
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from salt_jax import sharding, state
from salt_jax.errors import InputError
from tests.processes import devices_of

ONE = {'data': 1, 'fsdp': 1, 'context': 1, 'tensor': 1}


def _struct(*shape):
  return jax.ShapeDtypeStruct(shape, np.float32)


def _one_device_mesh(**sizes):
  return sharding.make_mesh(ONE | sizes, jax.devices()[:1])


def on_eight_devices(code):
  """Runs code in a process with eight CPU devices and returns what it prints."""
  env = os.environ | devices_of(8)
  done = subprocess.run(
    [sys.executable, '-c', textwrap.dedent(code)],
    env=env,
    text=True,
    capture_output=True,
    timeout=120,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return done.stdout


def test_free_axis_takes_what_is_left():
  mesh = _one_device_mesh(fsdp=-1)
  assert mesh.axis_names == sharding.AXES
  assert mesh.devices.shape == (1, 1, 1, 1)


@pytest.mark.parametrize(
  'sizes, words',
  [
    ({'fsdp': 2}, ['fsdp=2', '1 devices']),
    ({'fsdp': 3, 'data': -1}, ['data=-1', 'fsdp=3', '1 devices']),
    ({'fsdp': -1, 'data': -1}, ['at most one']),
    ({'fsdp': 0}, ['positive']),
  ],
)
def test_wrong_sizes_are_named(sizes, words):
  with pytest.raises(InputError) as error:
    _one_device_mesh(**sizes)
  for word in words:
    assert word in str(error.value)


def test_axes_are_exactly_four():
  with pytest.raises(InputError, match='exactly'):
    sharding.make_mesh({'data': 1, 'fsdp': 1}, jax.devices()[:1])
  with pytest.raises(InputError, match='exactly'):
    sharding.make_mesh(ONE | {'expert': 1}, jax.devices()[:1])


def test_path_without_a_rule_is_named():
  with pytest.raises(InputError, match="'blocks/ffn/kernel'"):
    sharding.shardings(
      {'blocks': {'ffn': {'kernel': _struct(4)}}}, _one_device_mesh(), [('bias', 'replicate')]
    )


def test_a_pattern_that_is_none_is_refused():
  with pytest.raises(InputError, match=r"the pattern '\(' of a sharding rule is no regular expr"):
    sharding.shardings({'w': _struct(4)}, _one_device_mesh(), [('(', 'replicate')])


@pytest.mark.parametrize(
  'rule, words',
  [
    ('shard', "rule 'shard' is unknown"),
    (('fsdp',), 'one per dimension'),
    (('fsdp', 'model'), 'not in'),
  ],
)
def test_bad_rules_are_named(rule, words):
  with pytest.raises(InputError, match=words):
    sharding.shardings({'w': _struct(4, 4)}, _one_device_mesh(), [('.*', rule)])


def test_batch_comes_back_whole():
  batch = {'x': np.arange(12.0).reshape(4, 3), 'n': np.arange(4)}
  placed = sharding.to_global(batch, _one_device_mesh())
  jax.tree.map(np.testing.assert_array_equal, placed, batch)


def test_rules_on_eight_devices():
  out = on_eight_devices("""
    import jax, numpy as np
    from salt_jax import sharding
    mesh = sharding.make_mesh({'data': 1, 'fsdp': 4, 'context': 1, 'tensor': -1})
    assert dict(mesh.shape) == {'data': 1, 'fsdp': 4, 'context': 1, 'tensor': 2}
    struct = lambda *shape: jax.ShapeDtypeStruct(shape, np.float32)
    tree = {'wide': struct(8, 16, 64), 'odd': struct(6, 12, 7), 'none': struct(6, 7),
            'small': struct(4, 4), 'out': {'kernel': struct(3, 8, 6)}, 'tie': struct(2, 32, 32),
            'joint': struct(16, 2), 'norm': struct(64)}
    rules = [('norm', 'replicate'), ('out/kernel', (None, 'fsdp', 'tensor')),
             ('^joint$', (('fsdp', 'tensor'), None)), ('.*', 'fsdp')]
    for name, s in jax.tree_util.tree_leaves_with_path(
        sharding.shardings(tree, mesh, rules, min_size=40)):
      print(jax.tree_util.keystr(name, simple=True, separator='/'), tuple(s.spec))
    for rule in (('fsdp', None), (('fsdp', 'tensor'),)):
      try:
        sharding.shardings({'w': struct(*(6, 4)[:len(rule)])}, mesh, [('w', rule)])
      except sharding.InputError as error:
        print('refused', '6 cannot be split' in str(error))
  """)
  found = dict(line.split(' ', 1) for line in out.splitlines() if not line.startswith('refused'))
  assert {name: eval(spec) for name, spec in found.items()} == {
    'wide': (None, None, 'fsdp'),
    'odd': (None, 'fsdp'),
    'none': (),
    'small': (),
    'out/kernel': (None, 'fsdp', 'tensor'),
    'tie': (None, None, 'fsdp'),
    'joint': (('fsdp', 'tensor'), None),
    'norm': (),
  }
  assert out.count('refused True') == 2


def test_batch_on_eight_devices():
  out = on_eight_devices("""
    import jax, numpy as np
    from salt_jax import sharding
    mesh = sharding.make_mesh({'data': 2, 'fsdp': 2, 'context': 2, 'tensor': 1})
    x = np.arange(24.).reshape(8, 3)
    placed = sharding.to_global({'x': x}, mesh)['x']
    np.testing.assert_array_equal(np.asarray(placed), x)
    print(sorted({shard.index[0].start or 0 for shard in placed.addressable_shards}))
    print(placed.sharding == sharding.batch_sharding(mesh))
    print(sharding.replicated(mesh).is_fully_replicated)
    try:
      sharding.to_global({'x': x[:6]}, mesh)
    except sharding.InputError as error:
      print(error)
  """).splitlines()
  assert out[:3] == ['[0, 2, 4, 6]', 'True', 'True']
  assert 'batch of 6' in out[3] and '4 shards' in out[3]


def test_optimizer_paths_follow_the_parameters():
  mesh = _one_device_mesh()
  tree = {'params': {'w': _struct(4)}, 'opt': [{'mu': {'w': _struct(4)}, 'count': _struct()}]}
  placed = sharding.shardings(tree, mesh, [('w$', ('fsdp',)), ('count', 'replicate')])
  assert placed['opt'][0]['mu']['w'].spec == P('fsdp')
  assert placed['opt'][0]['count'].spec == P()


def test_a_fresh_state_takes_the_place_of_the_parameters_it_is_made_of(monkeypatch):
  """Parameters that were freed later would stay a hole in the memory; the host's own are left alone."""
  host, optimizers = {'net': {'w': np.ones((4, 4), np.float32)}}, {'net': optax.adam(1.0)}
  whole, plain, given = sharding.replicated(_one_device_mesh()), state.place, []

  def place(*args):
    given.append(plain(*args))
    return given[0]

  monkeypatch.setattr(state, 'place', place)
  shapes = state.shapes_of(host, optimizers, ('net',))
  made = state.create(host, optimizers, ('net',), jax.tree.map(lambda _: whole, shapes))
  assert given[0]['net']['w'].is_deleted()
  params, average = made.params['net']['w'], made.ema['net']['w']
  assert params.unsafe_buffer_pointer() != average.unsafe_buffer_pointer()
  jax.block_until_ready(jax.jit(lambda x: x + 1, donate_argnums=0)(params))
  np.testing.assert_array_equal([host['net']['w'], average], np.ones((2, 4, 4)))
