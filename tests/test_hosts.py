"""Several hosts on one machine: as one, lost ones, SIGTERM, and what is refused on all of them."""

import json
import os
import pathlib
import resource
import shutil
import signal
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from salt_jax import hosts
from salt_jax.errors import InputError
from tests import processes, soak, tiny_config

STEPS = 4


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
  return tiny_config.write_weights(str(tmp_path_factory.mktemp('weights')))


def _command(weights, workdir, *words, steps=STEPS):
  config = f'--config=tests/tiny_config.py:{weights},sharded'
  total = f'--config.total_steps={steps}'
  return ['-m', 'salt_jax.main', config, f'--workdir={workdir}', total, *words]


def _run(count, command, folder, devices=1, codes=0, **changes):
  group = processes.start(count, command, folder, devices, **changes)
  found, logs = processes.ended(group, folder)
  assert found == [codes] * count, [log[-3000:] for log in logs]
  return logs


def _fingerprints(workdir, step):
  info = next(pathlib.Path(workdir, 'checkpoints', str(step), 'info').rglob('metadata'))
  return json.loads(info.read_text())['fingerprints']


def _metrics(workdir):
  lines = pathlib.Path(workdir, 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def _export(workdir):
  (file,) = pathlib.Path(workdir, 'export').glob('*.safetensors')
  return file


def _assert_same_run(one, other, step=STEPS):
  assert _fingerprints(one, step) == _fingerprints(other, step)
  assert _metrics(one) == _metrics(other)
  a, b = load_file(_export(one)), load_file(_export(other))
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.fixture(scope='module')
def two(weights, tmp_path_factory):
  """A run of two hosts, each with half of every array; one of them is slow for a while."""
  workdir = tmp_path_factory.mktemp('two')
  group = processes.start(2, _command(weights, workdir), workdir / 'logs')
  processes.wait_for((workdir / 'metrics.jsonl').exists, group)
  group[1].send_signal(signal.SIGSTOP)
  time.sleep(processes.HEARTBEAT / 2)
  group[1].send_signal(signal.SIGCONT)
  codes, logs = processes.ended(group, workdir / 'logs')
  assert codes == [0, 0], [log[-3000:] for log in logs]
  return workdir


@pytest.fixture(scope='module')
def one(weights, tmp_path_factory):
  """The same run of one process with two devices."""
  workdir = tmp_path_factory.mktemp('one')
  _run(1, _command(weights, workdir), workdir / 'logs', devices=2)
  return workdir


def test_two_hosts_give_the_bits_of_one(one, two):
  """The mesh is the same, and a sum of two does not depend on its order."""
  assert [line['step'] for line in _metrics(two)] == [1, 2, 3, 4]
  _assert_same_run(one, two)


def test_a_lost_host_ends_the_other_and_a_restart_ends_in_the_same_bits(weights, two, tmp_path):
  group = processes.start(2, _command(weights, tmp_path), tmp_path / 'logs')
  processes.wait_for((tmp_path / 'checkpoints' / '2').exists, group)
  processes.kill(group[1])
  began = time.monotonic()
  codes, logs = processes.ended(group, tmp_path / 'logs', limit=60)
  assert codes[0] in (69, -signal.SIGABRT), logs[0][-3000:]
  assert time.monotonic() - began < processes.HEARTBEAT + 25
  for host, said in enumerate(map(processes.sentences, logs)):
    assert len(said) == 1 and said[0].startswith(f'host {host} '), logs[host][-3000:]
    assert said[0].endswith(
      'start the same command on every host to go on from the newest checkpoint.'
    )
  _run(2, _command(weights, tmp_path), tmp_path / 'logs')
  _assert_same_run(two, tmp_path)


def test_a_short_soak(weights, one, tmp_path):
  """What python -m tests.soak does with fifty kills, with three: behind a save, starting, in a save."""
  shutil.copytree(one, tmp_path / 'whole')
  words = ['--kills=3', '--seed=38', '--devices=2', f'--folder={tmp_path}', '--']
  command = _command(weights, '')
  words += [word for word in command[2:] if not word.startswith('--workdir')]
  with pytest.raises(SystemExit) as left:
    soak.main(words)
  assert left.value.code == 0


def test_sigterm_to_one_host_saves_on_all_and_one_process_goes_on(weights, one, tmp_path):
  rare = '--config.checkpoint.every=1000'
  command = _command(weights, tmp_path, rare, steps=1000)
  group = processes.start(2, command, tmp_path / 'logs')
  lines = tmp_path / 'metrics.jsonl'
  processes.wait_for(lambda: lines.exists() and lines.read_text().count('\n') > 1, group)
  group[1].send_signal(signal.SIGTERM)
  codes, logs = processes.ended(group, tmp_path / 'logs')
  assert codes == [75, 75], [log[-3000:] for log in logs]
  (step,) = [int(path.name) for path in (tmp_path / 'checkpoints').iterdir()]
  left = f'told to leave and saved step {step} of 1000; the same command goes on from there.'
  assert processes.sentences(logs[0]) == [left]
  assert processes.sentences(logs[1])[-1] == left
  # An uninterrupted run of one process finds the same state at that step.
  whole = tmp_path / 'whole'
  shutil.copytree(one, whole)
  if step > STEPS:
    _run(1, _command(weights, whole, rare, steps=step), whole / 'logs', devices=2)
    _run(1, _command(weights, tmp_path, rare, steps=step), tmp_path / 'logs', devices=2)
    _assert_same_run(whole, tmp_path, step)
  else:
    _run(1, _command(weights, tmp_path), tmp_path / 'logs', devices=2)
    _assert_same_run(one, tmp_path)


def test_sigterm_twice_leaves_at_once(weights, one, tmp_path):
  command = _command(weights, tmp_path, '--config.checkpoint.every=1000', steps=100000)
  (process,) = processes.start(1, command, tmp_path / 'logs', devices=2)
  lines = tmp_path / 'metrics.jsonl'
  processes.wait_for(lambda: lines.exists() and lines.stat().st_size, [process])
  # While it is stopped, both signals wait, so that it cannot save between them.
  process.send_signal(signal.SIGTERM)
  process.send_signal(signal.SIGTERM)
  time.sleep(0.02)
  process.send_signal(signal.SIGTERM)
  (code,), (log,) = processes.ended([process], tmp_path / 'logs', limit=30)
  assert code == 143, log[-2000:]
  assert 'left without saving' in processes.sentences(log)[-1]


@pytest.mark.parametrize(
  'count, mesh', [(4, dict(data=2, fsdp=2)), (1, dict(data=1, fsdp=1))], ids=['four', 'one']
)
def test_another_number_of_hosts_and_another_mesh_go_on(weights, two, tmp_path, count, mesh):
  """What is restored and put together again is what was saved; how steps depend on the mesh is test_train's."""
  shutil.copytree(two, tmp_path, dirs_exist_ok=True)
  os.remove(_export(tmp_path))
  axes = [f'--config.mesh.{axis}={size}' for axis, size in mesh.items()]
  _run(count, _command(weights, tmp_path, *axes), tmp_path / 'logs')
  _assert_same_run(two, tmp_path)


def test_hosts_sample_from_a_run_whose_arrays_were_split(two, tmp_path):
  words = ['-m', 'salt_jax.sample', f'--checkpoint={two}', '--steps=1']
  words += [
    '--prompt=a red bag moves left',
    '--prompt=a blue bag moves up',
    f'--output={tmp_path}/out.png',
  ]
  _run(2, words, tmp_path / 'logs')
  assert sorted(path.name for path in tmp_path.glob('*.png')) == ['out-0.png', 'out-1.png']


def _other_code(tmp_path):
  shutil.copytree(processes.ROOT / 'salt_jax', tmp_path / 'code' / 'salt_jax')
  with open(tmp_path / 'code' / 'salt_jax' / 'tokens.py', 'a') as file:
    file.write('# changed\n')
  # The working directory comes first on the path of `-m`.
  place = f'import sys, runpy; sys.path[:0] = [{str(tmp_path / "code")!r}]; sys.argv[0] = "main"; '
  return ['-c', place + 'runpy.run_module("salt_jax.main", run_name="__main__")']


def _refused(kind, weights, tmp_path):
  """(command, devices) that differ between the hosts in one way."""
  command = _command(weights, tmp_path)
  if kind == 'config':
    return lambda host: [*command, f'--config.seed={host}'], 1
  if kind == 'devices':
    return command, lambda host: 1 + host
  changed = _other_code(tmp_path)
  return lambda host: changed + command[2:] if host else command, 1


REFUSED = {
  'config': 'host 1 has config.seed 1 and host 0 has 0: install the same code and start the same',
  'code': 'host 1 has code of digest ',
  'devices': 'host 1 has 2 devices and host 0 has 1: give every host the same number.',
}


@pytest.mark.parametrize('kind', REFUSED)
def test_hosts_that_differ_are_refused_on_all_of_them(weights, tmp_path, kind):
  command, devices = _refused(kind, weights, tmp_path)
  logs = _run(2, command, tmp_path / 'logs', devices, codes=2)
  for log in logs:
    (sentence,) = processes.sentences(log)
    assert sentence.startswith(REFUSED[kind]), sentence
  assert not (tmp_path / 'metrics.jsonl').exists()


PIECES = """
import os, sys, time
import jax, numpy as np
from absl import flags
from salt_jax import checkpoint, cli, hosts, sharding, store
from salt_jax.errors import InputError
folder = os.environ['FOLDER']
def mesh(**sizes):
  return sharding.make_mesh(dict(data=1, fsdp=1, context=1, tensor=1) | sizes)
def program():
  with hosts.joined(flags.FLAGS):
    me = jax.process_index()
    rows(me), arrays(), stores(me), alone(me), folders(me)

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
  for shape, spec in (((6, 8), (None, 'fsdp')), ((8, 6), ('fsdp', None)), ((8,), ('fsdp',)), ((7, 5), ())):
    value = np.random.default_rng(0).normal(size=shape).astype('float32')
    placed = jax.sharding.NamedSharding(mesh(fsdp=4), jax.sharding.PartitionSpec(*spec))
    x = jax.make_array_from_callback(shape, placed, lambda index: value[index])
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
    np.testing.assert_array_equal(checkpoint.restore_network(folder + '/checkpoints', 'net_ema')['x'], 1)

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
"""


def test_what_hosts_share(tmp_path):
  """Rows of the batch, whole arrays, stores, reading alone, and checks that only one host fails."""
  program = tmp_path / 'pieces.py'
  program.write_text(PIECES)
  _run(2, [str(program)], tmp_path / 'logs', devices=2, FOLDER=str(tmp_path))


def test_a_second_run_is_kept_out_and_a_dead_one_is_not_in_the_way(tmp_path, monkeypatch):
  monkeypatch.setattr(hosts, '_HANDOVER', 0.2)
  (tmp_path / '.lock').write_text('process 1 on a machine that is gone')
  with hosts.holding(str(tmp_path)):
    with pytest.raises(
      InputError, match=f'another run is at work in {tmp_path} .process {os.getpid()} on'
    ):
      with hosts.holding(str(tmp_path)):
        raise AssertionError('both hold it')
  with hosts.holding(str(tmp_path)):
    pass


def test_a_full_disk_is_named_and_the_run_goes_on_with_room(weights, one, tmp_path):
  shutil.copytree(one, tmp_path, dirs_exist_ok=True)
  shutil.rmtree(tmp_path / 'checkpoints' / '4')
  command = _command(weights, tmp_path)
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  # No file above 100 kB stands for no room: metrics fit, arrays do not.
  resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
  try:
    group = processes.start(1, command, tmp_path / 'logs', devices=2)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
  (code,), (log,) = processes.ended(group, tmp_path / 'logs')
  assert code == 2, log[-3000:]
  (sentence,) = processes.sentences(log)
  assert sentence == (
    f'a checkpoint could not be written to {tmp_path}/checkpoints (File too large): make room there, and the same '
    'command goes on from step 2.'
  )
  _run(1, command, tmp_path / 'logs', devices=2)
  _assert_same_run(one, tmp_path)
