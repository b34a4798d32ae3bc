"""What several hosts do with one another, in one program that each of them runs: python -m tests.host_pieces FLAGS."""

import os
import time

import jax
import ml_collections
import numpy as np
from absl import flags

from salt_jax import checkpoint, cli, convert, hosts, run_weights, sharding, store
from salt_jax.errors import InputError

folder = os.environ['FOLDER']


def mesh(**sizes):
  return sharding.make_mesh(dict(data=1, fsdp=1, context=1, tensor=1) | sizes)


def program():
  with hosts.joined(flags.FLAGS):
    me = jax.process_index()
    rows(me)
    arrays()
    stores(me)
    alone(me)
    versions(me)
    folders(me)


def rows(me):
  # Where only the context is between hosts, both read every example.
  for sizes, here in ((dict(context=4), range(8)), (dict(fsdp=4), range(4 * me, 4 * me + 4))):
    sizes = mesh(**sizes)
    mine = sharding.rows_here(8, sizes)
    assert mine == tuple(here), mine
    whole = np.arange(16).reshape(8, 2)
    x = sharding.to_global({'x': whole[list(mine)]}, sizes)['x']
    np.testing.assert_array_equal(sharding.to_host(x), whole)
  # A mesh that follows the wires may give a host the first and the last block.
  order = [jax.devices()[i] for i in (0, 2, 3, 1)]
  mixed = sharding.make_mesh(dict(data=1, fsdp=4, context=1, tensor=1), order)
  mine = sharding.rows_here(8, mixed)
  assert mine == ((0, 1, 6, 7), (2, 3, 4, 5))[me], mine
  x = sharding.to_global({'x': whole[list(mine)]}, mixed)['x']
  np.testing.assert_array_equal(sharding.to_host(x), whole)


def arrays():
  # Slice after slice, along what is not split.
  sharding._SLICE = 64
  for shape, spec in (
    ((6, 8), (None, 'fsdp')),
    ((8, 6), ('fsdp', None)),
    ((8,), ('fsdp',)),
    ((7, 5), ()),
  ):
    value = np.random.default_rng(0).normal(size=shape).astype('float32')
    placed = jax.sharding.NamedSharding(mesh(fsdp=4), jax.sharding.PartitionSpec(*spec))
    x = jax.make_array_from_callback(shape, placed, lambda index, value=value: value[index])
    np.testing.assert_array_equal(sharding.to_host({'x': x})['x'], value)


def stores(me):
  # The index is there when the first host returns, also when the host that writes it is slow.
  finish = store.StoreWriter.finish
  store.StoreWriter.finish = lambda self: (time.sleep(1), finish(self))
  one = {'x': store.Field((2,), 'float32')}
  store.fill(folder + '/store', one, 4, {}, lambda n: {'x': np.full((1, 2), n, 'float32')})
  found = store.Store(folder + '/store', verify=True)
  assert [found[i]['x'][0] for i in range(4)] == [0, 1, 2, 3]


def alone(me):
  # The first host reads a checkpoint, and the other has left for something else.
  tree = sharding.to_global({'x': np.ones((4, 2), 'float32')}, mesh(fsdp=4))
  saved = checkpoint.Checkpoints(folder + '/checkpoints')
  saved.save(1, {'state': tree, 'ema': {'net': tree}}, {})
  saved.close()
  if me == 0:
    np.testing.assert_array_equal(
      convert.read(run_weights.load(folder + '/checkpoints', 'net_ema'), np.float32)['x'], 1
    )


def versions(me):
  config = ml_collections.ConfigDict({'seed': 1})
  hosts.check_same(config, folder)
  refuses(
    'host 1 has jax 0.11 and host 0 has 0.10: install the same code and start the same command',
    lambda: hosts.check_same(config, folder),
    '_version',
    lambda name: f'0.{10 + me}' if name == 'jax' else '1',
  )
  refuses(
    'host 1 has code of the digest b and host 0 has a: ',
    lambda: hosts.check_same(config, folder),
    'code_digest',
    lambda: 'ab'[me],
  )


def refuses(words, check, name, replaced):
  kept = getattr(hosts, name)
  setattr(hosts, name, replaced)
  try:
    check()
  except InputError as error:
    assert str(error).startswith(words), error
  else:
    raise AssertionError(words)
  setattr(hosts, name, kept)


def folders(me):
  hosts.check_shared(folder)
  os.makedirs(f'{folder}/own-{me}', exist_ok=True)
  for check, words in (
    (lambda: hosts.check_shared(f'{folder}/own-{me}'), 'is not the folder that host 0 has there'),
    (lambda: hosts.check_agreed('the newest checkpoint', me), 'is 1 on host 1 and 0 on host 0'),
    (lambda: hosts.together(lambda: fails(me)), 'no room on one'),
  ):
    try:
      check()
    except InputError as error:
      assert words in str(error), error
    else:
      raise AssertionError(words)


def fails(me):
  if me == 1:
    raise InputError('no room on one')


if __name__ == '__main__':
  cli.run(program, lambda: hosts.define_flags('Join.'))
