"""Checkpoints across processes: another mesh, and SIGKILL in the middle of a save."""

import os
import random
import signal
import subprocess
import sys
import textwrap
import time

import jax
import numpy as np

from salt_jax import checkpoint
from tests.processes import devices_of

PIECES = """
import sys
import jax, jax.numpy as jnp, numpy as np
from salt_jax import checkpoint, sharding
AXES = {'data': 1, 'fsdp': -1, 'context': 1, 'tensor': 1}
mesh = sharding.make_mesh(AXES)
def value(step, side):
  return np.random.default_rng(step).normal(size=(side, side)).astype('float32')
def place(tree, mesh):
  return jax.device_put(tree, sharding.shardings(tree, mesh, [('.*', 'fsdp')], 1))
def like(tree, mesh):
  placed = sharding.shardings(tree, mesh, [('.*', 'fsdp')], 1)
  return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, placed)
"""


def _process(code, *arguments, devices=1):
  env = os.environ | devices_of(devices)
  command = [sys.executable, '-c', PIECES + textwrap.dedent(code), *map(str, arguments)]
  return subprocess.Popen(
    command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
  )


def _run(code, *arguments, devices=1):
  process = _process(code, *arguments, devices=devices)
  out, err = process.communicate(timeout=120)
  assert process.returncode == 0, err[-3000:]
  return out


def test_another_mesh(tmp_path):
  write = """
    tree = {'w': value(1, 64), 'odd': value(2, 7)}
    checkpoints = checkpoint.Checkpoints(sys.argv[1])
    checkpoints.save(1, {'state': place(tree, mesh), 'ema': place(tree, mesh)}, {})
    checkpoints.close()
  """
  read = """
    tree = {'w': value(1, 64), 'odd': value(2, 7)}
    mesh = sharding.make_mesh(AXES | {'tensor': len(jax.devices()) // int(sys.argv[2])})
    spec = {'state': like(tree, mesh), 'ema': like(tree, mesh)}
    found = checkpoint.Checkpoints(sys.argv[1]).restore(1, spec)
    ema = checkpoint.restore_ema(sys.argv[1], spec['ema'])
    for copy in (found['state'], found['ema'], ema):
      assert copy['w'].sharding == spec['ema']['w'].sharding
      jax.tree.map(np.testing.assert_array_equal, copy, tree)
    print(len(copy['w'].addressable_shards), copy['w'].addressable_shards[0].data.shape)
  """
  _run(write, tmp_path / 'eight', devices=8)
  assert _run(read, tmp_path / 'eight', 1, devices=1) == '1 (64, 64)\n'
  assert _run(read, tmp_path / 'eight', 4, devices=8) == '8 (64, 16)\n'
  _run(write, tmp_path / 'one', devices=1)
  assert _run(read, tmp_path / 'one', 8, devices=8) == '8 (64, 8)\n'


def test_sigkill_in_mid_save_leaves_the_previous_checkpoint(tmp_path):
  write = """
    checkpoints = checkpoint.Checkpoints(sys.argv[1])
    start = checkpoints.latest_step() or 0
    if start:
      zero = {'w': np.zeros((1400, 1400), 'float32')}
      found = checkpoints.restore(start, {'state': like(zero, mesh), 'ema': like(zero, mesh)})
      np.testing.assert_array_equal(found['state']['w'], value(start, 1400))
      np.testing.assert_array_equal(found['ema']['w'], value(start, 1400))
    print('restored', start, flush=True)
    for step in range(start + 1, start + 1000):
      tree = place({'w': value(step, 1400)}, mesh)
      checkpoints.save(step, {'state': tree, 'ema': tree}, {})
      print(step, flush=True)
  """
  moments = random.Random(0)
  kills, unfinished, last = 0, False, 0
  # At least three kills, the last of which leaves half a checkpoint.
  while kills < 3 or (not unfinished and kills < 12):
    process = _process(write, tmp_path)
    restored = process.stdout.readline().split()
    assert restored[:1] == ['restored'], process.stderr.read()[-3000:]
    assert int(restored[1]) >= last
    for _ in range(2):
      last = int(process.stdout.readline()) - 1
    time.sleep(moments.uniform(0.0, 0.15))
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kills += 1
    unfinished = any('tmp' in path.name for path in tmp_path.iterdir())
  assert unfinished, 'no kill fell into a save: make the arrays larger'
  checkpoints = checkpoint.Checkpoints(tmp_path)
  step = checkpoints.latest_step()
  assert step >= last
  home = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  like = {'ema': {'w': jax.ShapeDtypeStruct((1400, 1400), np.float32, sharding=home)}}
  found = checkpoints.restore(step, like)
  expected = np.random.default_rng(step).normal(size=(1400, 1400)).astype('float32')
  np.testing.assert_array_equal(found['ema']['w'], expected)
  checkpoints.close()
  assert all(path.name.isdigit() for path in tmp_path.iterdir())
