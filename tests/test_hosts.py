"""Several hosts on one machine: as one, lost ones, SIGTERM, and what is refused on all of them."""

import http.server
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from salt_jax import hosts
from salt_jax.errors import InputError
from tests import bucket, processes, soak, tiny_config

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
def one(weights, tmp_path_factory):
  """A run of one process with two devices."""
  workdir = tmp_path_factory.mktemp('one')
  _run(1, _command(weights, workdir), workdir / 'logs', devices=2)
  return workdir


@pytest.fixture(scope='module')
def lost(weights, tmp_path_factory):
  """The same run of two hosts, each with half of every array, one of which is lost: (workdir, what they said)."""
  workdir = tmp_path_factory.mktemp('two')
  group = processes.start(2, _command(weights, workdir, steps=1000), workdir / 'lost')
  processes.wait_for((workdir / 'checkpoints' / '2').exists, group)
  processes.kill(group[1])
  began = time.monotonic()
  codes, logs = processes.ended(group, workdir / 'lost', limit=60)
  assert codes[0] in (69, -signal.SIGABRT), logs[0][-3000:]
  assert time.monotonic() - began < processes.HEARTBEAT + 25
  return workdir, logs


@pytest.fixture(scope='module')
def two(weights, lost):
  """It is started again, one host is slow for a while and then told to leave: (workdir, step, what they said)."""
  workdir, _ = lost
  command = _command(weights, workdir, '--config.checkpoint.every=1000', steps=1000)
  group = processes.start(2, command, workdir / 'logs')
  log = workdir / 'logs' / 'host-0.log'
  processes.wait_for(lambda: _steps_said(log) > 0, group)
  group[1].send_signal(signal.SIGSTOP)
  time.sleep(processes.HEARTBEAT / 2)
  group[1].send_signal(signal.SIGCONT)
  processes.wait_for(lambda: _steps_said(log) > 1, group)
  group[1].send_signal(signal.SIGTERM)
  codes, logs = processes.ended(group, workdir / 'logs')
  assert codes == [75, 75], [log[-3000:] for log in logs]
  return workdir, max(int(path.name) for path in (workdir / 'checkpoints').iterdir()), logs


def _steps_said(log):
  return len(re.findall(r'  step \d+/1000  ', log.read_text()))


@pytest.fixture(scope='module')
def whole(weights, one, two, tmp_path_factory):
  """One process with two devices, never disturbed, as far as the two hosts came."""
  workdir = tmp_path_factory.mktemp('whole') / 'run'
  shutil.copytree(one, workdir)
  _run(1, _command(weights, workdir, steps=two[1]), workdir / 'logs', devices=2)
  return workdir


def test_a_lost_host_is_named_by_each(lost):
  for host, said in enumerate(map(processes.sentences, lost[1])):
    assert len(said) == 1 and said[0].startswith(f'host {host} '), lost[1][host][-3000:]
    assert said[0].endswith(
      'start the same command on every host to go on from the newest checkpoint.'
    )


def test_sigterm_to_one_host_saves_on_all(two):
  _, step, logs = two
  left = f'told to leave and saved step {step} of 1000; the same command goes on from there.'
  assert processes.sentences(logs[0]) == [left]
  assert processes.sentences(logs[1])[-1] == left


def test_two_hosts_give_the_bits_of_one_through_a_loss_and_a_restart(weights, two, whole, tmp_path):
  """The mesh is the same, and a sum of two does not depend on its order. One process takes over at the end."""
  workdir, step, _ = two
  assert step >= STEPS and [line['step'] for line in _metrics(workdir)] == [*range(1, step + 1)]
  shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
  _run(1, _command(weights, tmp_path, steps=step), tmp_path / 'logs', devices=2)
  _assert_same_run(whole, tmp_path, step)


def test_a_short_soak(weights, one, tmp_path):
  """What python -m tests.soak does with fifty kills, with two: in a save and while it starts."""
  shutil.copytree(one, tmp_path / 'whole')
  words = ['--kills=2', '--seed=23', '--devices=2', f'--folder={tmp_path}', '--']
  command = _command(weights, '')
  words += [word for word in command[2:] if not word.startswith('--workdir')]
  with pytest.raises(SystemExit) as left:
    soak.main(words)
  assert left.value.code == 0


def test_sigterm_twice_leaves_at_once(weights, one, tmp_path):
  command = _command(weights, tmp_path, '--config.checkpoint.every=1000', steps=100000)
  (process,) = processes.start(1, command, tmp_path / 'logs', devices=2)
  lines = tmp_path / 'metrics.jsonl'
  processes.wait_for(lambda: lines.exists() and lines.stat().st_size, [process])
  process.send_signal(signal.SIGTERM)
  # Two that come at once are one.
  process.send_signal(signal.SIGTERM)
  time.sleep(0.02)
  process.send_signal(signal.SIGTERM)
  (code,), (log,) = processes.ended([process], tmp_path / 'logs', limit=30)
  assert code == 143, log[-2000:]
  assert 'left without saving' in processes.sentences(log)[-1]


def test_a_notice_of_the_metadata_server_is_heard_like_sigterm(weights, one, tmp_path):
  """The machine's own SIGTERM then follows, and is not taken for a second one."""
  answer = {'maintenanceEvent': 'MIGRATE_ON_HOST_MAINTENANCE', 'preempted': 'FALSE'}

  class Metadata(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
      assert self.headers['Metadata-Flavor'] == 'Google' and self.path.endswith('?recursive=true')
      self.send_response(200)
      self.end_headers()
      self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *args):
      pass

  server = http.server.ThreadingHTTPServer(('localhost', 0), Metadata)
  threading.Thread(target=server.serve_forever, daemon=True).start()
  command = _command(weights, tmp_path, '--config.checkpoint.every=1000', steps=100000)
  place = f'localhost:{server.server_port}'
  group = processes.start(1, command, tmp_path / 'logs', devices=2, GCE_METADATA_HOST=place)
  lines, log = tmp_path / 'metrics.jsonl', tmp_path / 'logs' / 'host-0.log'
  processes.wait_for(lambda: lines.exists() and lines.read_text().count('\n') > 1, group)
  answer.update(maintenanceEvent='TERMINATE_ON_HOST_MAINTENANCE')
  processes.wait_for(lambda: 'SIGTERM' in log.read_text(), group)
  group[0].send_signal(signal.SIGTERM)
  (code,), (text,) = processes.ended(group, tmp_path / 'logs')
  server.shutdown()
  assert code == 75, text[-2000:]


def test_four_hosts_and_another_mesh_read_what_two_saved(weights, two, whole, tmp_path):
  workdir, step, _ = two
  shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
  mesh = ['--config.mesh.data=2', '--config.mesh.fsdp=2']
  _run(4, _command(weights, tmp_path, *mesh, steps=step), tmp_path / 'logs')
  _assert_same_run(whole, tmp_path, step)


@pytest.mark.slow
def test_one_process_with_one_device_goes_on_where_two_hosts_were(weights, two, whole, tmp_path):
  workdir, step, _ = two
  shutil.copytree(workdir, tmp_path, dirs_exist_ok=True)
  shutil.rmtree(tmp_path / 'checkpoints' / str(step))
  start = max(int(path.name) for path in (tmp_path / 'checkpoints').iterdir())
  _run(1, _command(weights, tmp_path, steps=step), tmp_path / 'logs')
  then, now = _metrics(whole), _metrics(tmp_path)
  assert [line['step'] for line in now] == [*range(1, step + 1)] and now[:start] == then[:start]
  for one, other in zip(then[start:], now[start:], strict=True):
    for name in one:
      # Sums in another order, and Adam without a first moment makes steps of rounded gradients; as in test_train.
      np.testing.assert_allclose(other[name], one[name], rtol=2e-3, err_msg=name)


def test_hosts_sample_from_a_run_whose_arrays_were_split(two, tmp_path):
  words = ['-m', 'salt_jax.sample', f'--checkpoint={two[0]}', '--steps=1']
  words += [
    '--prompt=a red bag moves left',
    '--prompt=a blue bag moves up',
    f'--output={tmp_path}/out.png',
  ]
  _run(2, words, tmp_path / 'logs')
  assert sorted(path.name for path in tmp_path.glob('*.png')) == ['out-0.png', 'out-1.png']


def _refused(kind, weights, tmp_path):
  """(command, devices) that differ between the hosts in one way."""
  command = _command(weights, tmp_path)
  if kind == 'config':
    return lambda host: [*command, f'--config.seed={host}'], 1
  return command, lambda host: 1 + host


REFUSED = {
  'config': 'host 1 has config.seed 1 and host 0 has 0: install the same code and start the same',
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


def test_nccl_that_cannot_begin_is_no_host_that_was_lost(capsys):
  began = 'INTERNAL: NCCL operation ncclCommInitRankConfig(&comm, num_ranks) failed: unhandled cuda error.'
  later = 'INTERNAL: NCCL operation ncclGroupEnd() failed: remote process exited or there was a network error.'
  for said, word in ((began, 'holds memory of its GPUs'), (later, 'host 0 lost another host')):
    assert hosts._explained(jax.errors.JaxRuntimeError(said)) == hosts.LOST
    assert word in capsys.readouterr().err


def test_what_hosts_share(tmp_path):
  """Rows of the batch, whole arrays, stores, reading alone, and checks that only one host fails."""
  _run(2, ['-m', 'tests.host_pieces'], tmp_path / 'logs', devices=2, FOLDER=str(tmp_path))


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


def test_code_is_told_apart_by_a_letter_of_any_module(tmp_path):
  root = processes.ROOT / 'salt_jax'
  copy = tmp_path / 'salt_jax'
  shutil.copytree(root, copy, ignore=shutil.ignore_patterns('*.safetensors', '__pycache__'))
  assert hosts.code_digest(copy) == hosts.code_digest(root)
  file = copy / 'losses' / 'dmd.py'
  file.write_text(file.read_text().replace('a', 'b', 1))
  assert hosts.code_digest(copy) != hosts.code_digest(root)


def test_a_full_disk_is_named_and_the_run_goes_on_with_room(weights, one, tmp_path):
  shutil.copytree(one, tmp_path, dirs_exist_ok=True)
  shutil.rmtree(tmp_path / 'checkpoints' / '4')
  command = _command(weights, tmp_path)
  # No file above 99 kB stands for no room: metrics fit, arrays do not. The log goes through a pipe, which has room.
  done = subprocess.run(
    ['bash', '-c', 'ulimit -f 97 && exec "$@"', 'bash', sys.executable, *command],
    env=processes.environment(2),
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 2, done.stderr[-3000:]
  # Threads of Orbax may write at the same time, and leave the line open.
  assert (
    f'salt_jax: a checkpoint could not be written to {tmp_path}/checkpoints (File too large): mend that, and the same '
    'command goes on from step 2.\n'
  ) in done.stderr, done.stderr[-3000:]
  _run(1, command, tmp_path / 'logs', devices=2)
  _assert_same_run(one, tmp_path)


BUCKET = 'gs://bucket/run'
LOOK = """
import sys
import numpy as np
from salt_jax import places, sources
assert places.is_run(sys.argv[1]) and not places.is_run(sys.argv[1] + 'x')
for run in sys.argv[1:]:
  found = sources.open_source(run, '', 'dit')
  np.savez(sys.argv[2] + '/found.npz', **{name: x.read() for name, x in found.tensors.items()})
"""


@pytest.mark.slow
def test_a_killed_run_goes_on_elsewhere_from_the_bucket(weights, one, tmp_path):
  """The second machine has none of the first one's files, and ends in the bits of a run without a bucket."""
  there = bucket.Bucket()
  place = f'--config.checkpoint.folder={BUCKET}'
  first, second = tmp_path / 'first', tmp_path / 'second'
  command = _command(weights, first, place)
  group = processes.start(1, command, first / 'logs', 2, **there.environment())
  processes.wait_for(lambda: 'run/checkpoints/2/commit_success.txt' in there.objects, group)
  processes.kill(group[0])
  assert 'run/config.json' in there.objects
  command = _command(weights, second, place)
  _run(1, command, second / 'logs', devices=2, **there.environment())
  assert not (second / 'checkpoints').exists()
  assert '"step": 3' in (second / 'metrics.jsonl').read_text().splitlines()[0]
  a, b = load_file(_export(one)), load_file(_export(second))
  for name in a:
    np.testing.assert_array_equal(a[name], b[name], err_msg=name)
  # What reads runs reads the bucket, by its own address and by the folder of the run that filled it.
  look = [sys.executable, '-c', LOOK, BUCKET, str(second)]
  env = processes.environment(1, **there.environment())
  subprocess.run(look, env=env, check=True, timeout=120)
  found = np.load(second / 'found.npz')
  for name in a:
    np.testing.assert_array_equal(found[name], a[name], err_msg=name)


def test_another_config_is_refused_by_what_lies_in_the_bucket(weights, tmp_path):
  there = bucket.Bucket()
  there.put('run/config.json', b'{"seed": 7}')
  words = [f'--config.checkpoint.folder={BUCKET}', '--config.seed=1']
  command = _command(weights, tmp_path, *words)
  (log,) = _run(1, command, tmp_path / 'logs', codes=2, **there.environment())
  (sentence,) = processes.sentences(log)
  assert sentence.startswith('config.') and 'but the run in gs://bucket/run has' in sentence
