"""launch/gcp_tpu.sh against a stand-in for gcloud: runs that are followed, dropped, taken away, resumed; that fail."""

import ctypes
import os
import pathlib
import signal
import subprocess
import threading

import pytest

from tests.clouds import FLAGS, NASTY, wait_for


def test_queued_slices_over_two_nodes(cloud):
  text = cloud('create', 'pods', '--type=v5p-16', '--slices=2', '--reserved')
  assert [state in text for state in ('WAITING_FOR_RESOURCES', 'PROVISIONING')] == [True, True]
  (create,) = cloud.calls('create')
  assert {
    '--node-count=2',
    '--node-prefix=pods',
    '--runtime-version=v2-alpha-tpuv5',
    '--reserved',
  } < set(create)
  cloud('install', 'pods')
  cloud('run', 'pods', '--run=long', '--', *FLAGS, '--multihost')
  for node in ('pods-0', 'pods-1'):
    for worker in (0, 1):
      (record,) = cloud.ran(node, worker)
      assert record['argv'] == [*FLAGS, '--multihost']
  assert 'run long: exit 0' in cloud('status', 'pods')
  cloud('delete', 'pods', '--yes')
  assert cloud.get('world') == {'nodes': {}, 'queued': {}}


def test_refused_connections_start_one_run(cloud):
  cloud.pod()
  cloud.fail('tpu-vm ssh', '[/usr/bin/ssh] exited with return code [255].', code=255)
  cloud.set('unheard', ['start'])
  text = cloud('run', 'pod', '--', *FLAGS)
  assert text.count('could not be reached') == 2 and 'started already' in text
  assert [len(cloud.ran(worker=worker)) for worker in (0, 1)] == [1, 1]
  cloud.fail('tpu-vm ssh', '[/usr/bin/ssh] exited with return code [255].', code=255, times=99)
  assert 'did not start on all workers' in cloud('run', 'pod', '--tries=3', '--', *FLAGS, code=1)
  assert len(cloud.ran()) == 1


def test_a_dropped_log_goes_on_where_it_was(cloud):
  cloud.pod('v4-8')
  cloud.set('program', {'1.pod.0': {'until': 'cut'}})
  cloud.set('cut', ['drop'])
  text = cloud('run', 'pod', '--', *FLAGS)
  assert 'connection dropped; going on behind byte 16' in text
  assert text.count('started 1.pod.0') == 1 and text.count('ended') == 1
  limits = {'--ssh-flag=-o ConnectTimeout=20', '--ssh-flag=-o ServerAliveInterval=15'}
  assert all(limits < set(words) for words in cloud.calls('ssh'))
  assert {words[-1].split()[2] for words in cloud.calls('ssh')[1:]} == {'start', 'follow', 'state'}


@pytest.mark.parametrize(
  'cuts', [['repeat'], ['repeat', 'drop'], ['drop', 'repeat', 'repeat', 'drop']], ids='-'.join
)
def test_a_log_that_gcloud_itself_asks_for_again(cloud, cuts):
  cloud.pod('v4-8')
  says = '低质量\t \\n 100% \r' + 'x' * 9999 + '\n\n  \x1e1 0\n* half a líne'
  cloud.set('program', {'1.pod.0': {'until': 'cut', 'says': says}})
  cloud.set('cut', cuts)
  text = cloud('run', 'pod', '--', *FLAGS)
  (record,) = cloud.state.glob('notes/*/*/pod/log.main')
  log = (cloud.home() / 'salt_jax_runs/main/log').read_bytes()
  assert record.read_bytes() == log and says.encode() + b'ended\n' in log
  assert text.count('started 1.pod.0') == text.count('ended\n') == 1


@pytest.mark.parametrize('queued', [[], ['--queued']])
def test_a_preempted_run_is_resumed_by_hand(cloud, queued):
  cloud('create', 'pod', '--type=v5litepod-8', '--spot', *queued)
  cloud('install', 'pod')
  cloud.set('program', {f'1.pod.{worker}': {'until': 'never'} for worker in (0, 1)})
  cloud.set('cut', ['preempted'])
  text = cloud('run', 'pod', '--', *NASTY, code=75)
  assert 'was taken away' in text and 'resume pod' in text
  assert not cloud.calls('delete')
  assert 'cannot be used now' in cloud('run', 'pod', '--', *FLAGS, code=1)
  assert 'finished on all workers' in cloud('resume', 'pod')
  assert [record['argv'] for record in cloud.ran(worker=1)] == [[*NASTY, '--multihost']]
  first, second = cloud.calls('create')
  assert first == second and len(cloud.calls('delete')) == 1


def test_keep_going_makes_the_slice_again(cloud):
  cloud.pod()
  cloud.set('program', {f'1.pod.{worker}': {'until': 'never'} for worker in (0, 1)})
  cloud.set('cut', ['preempted'])
  cloud('run', 'pod', '--keep-going', '--', *NASTY)
  assert [record['key'] for record in cloud.ran()] == ['2.pod.0']
  assert cloud.ran()[0]['argv'] == [*NASTY, '--multihost']
  assert len(cloud.calls('create')) == 2 and len(cloud.calls('delete')) == 1


def test_a_slice_made_again_is_set_up_again(cloud):
  cloud('create', 'pod', '--type=v5litepod-8')
  cloud('install', 'pod', '--setup=echo "$0" weights > weights')
  cloud.set('program', {f'1.pod.{worker}': {'until': 'never'} for worker in (0, 1)})
  cloud.set('cut', ['preempted'])
  cloud('run', 'pod', '--keep-going', '--', *FLAGS)
  for worker in (0, 1):
    (record,) = cloud.ran(worker=worker)
    assert pathlib.Path(record['cwd'], 'weights').read_text() == 'bash weights\n'


def test_an_installation_noted_without_a_setup_is_read(cloud):
  cloud.pod('v4-8')
  (note,) = cloud.state.glob('notes/*/*/pod/install')
  note.write_bytes(b''.join(field + b'\0' for field in note.read_bytes().split(b'\0')[:4]))
  cloud('run', 'pod', '--', *FLAGS)
  assert 'finished on all workers' in cloud('resume', 'pod')


def test_keep_going_when_the_slice_goes_before_the_run_starts(cloud):
  cloud.pod('v4-8')
  cloud.set('cut', ['before start'])
  assert 'was taken away' in cloud('run', 'pod', '--keep-going', '--', *FLAGS)
  assert [record['key'] for record in cloud.ran()] == ['2.pod.0']


QUEUED = ['WAITING_FOR_RESOURCES', 'ACTIVE']


def preempted(cloud, *options):
  """A queued slice called pod that is taken away once a run in it is followed."""
  cloud('create', 'pod', '--type=v4-8', *options)
  cloud('install', 'pod')
  cloud.set('program', {'1.pod.0': {'until': 'never'}})
  cloud.set('cut', ['preempted'])


def test_keep_going_when_the_slice_goes_while_it_is_made_again(cloud):
  cloud.set('queues', [QUEUED, ['ACCEPTED', 'SUSPENDED'], ['ACCEPTED', 'FAILED'], QUEUED])
  preempted(cloud, '--queued')
  text = cloud('run', 'pod', '--keep-going=3', '--', *FLAGS)
  assert 'pod is SUSPENDED: the slice was taken away' in text
  assert 'could not be reached' not in text
  assert [record['key'] for record in cloud.ran()] == ['2.pod.0']
  assert len(cloud.calls('create')) == 4


def test_a_slice_that_goes_while_it_is_made_again_costs_a_round(cloud):
  cloud.set('queues', [QUEUED, *[['ACCEPTED', 'SUSPENDED']] * 3])
  preempted(cloud, '--queued')
  text = cloud('run', 'pod', '--keep-going=2', '--', *FLAGS, code=75)
  assert 'resume pod' in text and len(cloud.calls('create')) == 3
  assert 'SUSPENDED, it did not come to be' in cloud('resume', 'pod', code=1)


def test_keep_going_says_how_when_the_queue_does_not_move(cloud):
  cloud.set('queues', [QUEUED, ['WAITING_FOR_RESOURCES']])
  preempted(cloud, '--queued')
  text = cloud('run', 'pod', '--keep-going', '--minutes=1', '--', *FLAGS, code=75)
  assert 'WAITING_FOR_RESOURCES still' in text and 'to go on then: launch/gcp_tpu.sh resume' in text


FULL = 'There is no more capacity in the zone "us-west4-a"; you can try in another zone'


def test_keep_going_waits_for_capacity(cloud):
  preempted(cloud)
  cloud.fail('tpu-vm create', FULL, times=7)
  text = cloud('run', 'pod', '--keep-going', '--', *FLAGS)
  assert 'no capacity for v4-8 in us-west4-a (try 7 of 1441, one a minute)' in text
  assert [record['key'] for record in cloud.ran()] == ['2.pod.0']


def test_keep_going_waits_for_capacity_not_for_ever(cloud):
  preempted(cloud)
  cloud.fail('tpu-vm create', FULL, times=99)
  text = cloud('run', 'pod', '--keep-going', '--minutes=6', '--', *FLAGS, code=8)
  assert 'no capacity for v4-8 for 6 minutes' in text and 'gcp_tpu.sh resume pod' in text
  assert len(cloud.calls('create')) == 1 + 7
  assert 'has no capacity for v4-8 now' in cloud('resume', 'pod', '--tries=2', code=8)
  assert len(cloud.calls('create')) == 1 + 7 + 2


GONE = 'Unable to find the server at tpu.googleapis.com'


@pytest.mark.parametrize('options', [[], ['--minutes=1']])
def test_keep_going_outlasts_a_network_that_is_gone(cloud, options):
  preempted(cloud)
  cloud.fail('tpu-vm describe', GONE, times=12, skip=1)
  text = cloud('run', 'pod', '--keep-going', *options, '--', *FLAGS, code=1 if options else 0)
  assert text.count('gcloud does not say what there is of pod: ERROR') == 1
  assert ('nothing was changed' in text) == bool(options)
  assert [record['key'] for record in cloud.ran()] == ([] if options else ['2.pod.0'])


@pytest.mark.parametrize('command, times', [('create', 3), ('delete', 9), ('ssh', 7)])
def test_the_network_may_go_while_the_slice_is_made_again(cloud, command, times):
  preempted(cloud)
  # The calls of ssh before are those of the installation, the start and the log; the answer to the third is cut.
  cloud.fail(f'tpu-vm {command}', GONE, times=times, skip=2 if command == 'ssh' else 0)
  text = cloud('run', 'pod', '--keep-going', '--', *FLAGS)
  assert [record['key'] for record in cloud.ran()] == ['2.pod.0']
  assert ('no network to ask for v4-8' in text) == (command == 'create')


def test_the_network_may_go_while_code_is_sent(cloud):
  preempted(cloud)
  cloud('install', 'pod', '--ship')
  cloud.fail('tpu-vm scp', GONE, times=7)
  cloud('run', 'pod', '--keep-going', '--', *FLAGS)
  assert [record['key'] for record in cloud.ran()] == ['2.pod.0']


def test_a_slice_whose_making_was_not_answered_is_found(cloud):
  preempted(cloud)
  cloud.fail('tpu-vm create', GONE, done=True)
  assert 'no network to ask' in cloud('run', 'pod', '--keep-going', '--', *FLAGS)
  assert [record['key'] for record in cloud.ran()] == ['2.pod.0'] and len(
    cloud.calls('create')
  ) == 2


def test_keep_going_ends_where_nobody_may_ask(cloud):
  preempted(cloud)
  cloud.fail('tpu-vm describe', 'PERMISSION_DENIED: tpu.nodes.get on pod', times=99, skip=1)
  assert 'nothing was changed' in cloud('run', 'pod', '--keep-going', '--', *FLAGS, code=1)


def test_keep_going_ends_where_waiting_does_not_help(cloud):
  preempted(cloud)
  cloud.fail('tpu-vm create', 'RESOURCE_EXHAUSTED: Quota limit TPUV4 has been exceeded.', times=9)
  assert 'quota does not allow' in cloud('run', 'pod', '--keep-going', '--', *FLAGS, code=8)
  assert len(cloud.calls('create')) == 2


def test_keep_going_waits_for_a_slice_in_repair(cloud):
  cloud.pod('v4-8')
  cloud.set('program', {'1.pod.0': {'until': 'cut'}})
  cloud.set('cut', ['repair'])
  cloud('run', 'pod', '--keep-going', '--', *FLAGS)
  assert len(cloud.ran()) == 2 and len(cloud.calls('create')) == 1


def test_keep_going_respects_stop(cloud):
  cloud.pod('v4-8')
  cloud.set('program', {'1.pod.0': {'until': 'never'}})

  def stop():
    wait_for(lambda: (cloud.home() / 'salt_jax_runs/main/log').exists() and cloud.ran())
    environment = {**cloud.environment, 'HOME': str(cloud.home()), 'STANDIN_HOST': 'w'}
    words = ['bash', str(cloud.checkout / 'launch/tpu_worker.sh'), 'stop', 'main']
    subprocess.run(words, env=environment, check=True)

  other = threading.Thread(target=stop)
  other.start()
  assert 'was stopped' in cloud('run', 'pod', '--keep-going', '--', *FLAGS, code=75)
  other.join()
  assert len(cloud.ran()) == 1


def test_keep_going_ends_at_its_number(cloud):
  cloud.pod('v4-8')
  cloud.set('program', {f'{life}.pod.0': {'until': 'never'} for life in (1, 2, 3)})
  cloud.set('cut', ['preempted', 'preempted', 'preempted'])
  assert 'to go on from the newest' in cloud('run', 'pod', '--keep-going=1', '--', *FLAGS, code=75)
  assert len(cloud.calls('create')) == 2


def test_code_that_is_not_there_any_more_is_asked_for(cloud):
  cloud.pod('v4-8')
  cloud('delete', 'pod', '--yes')
  cloud('create', 'pod', '--type=v4-8')
  text = cloud('run', 'pod', '--', *FLAGS, code=1)
  assert '`install` brings it' in text and len(cloud.calls('ssh')) == 2


def test_resume_deletes_no_slice_of_others(cloud):
  cloud.pod('v4-8')
  cloud.set('program', {'1.pod.0': {'until': 'never'}})
  cloud.set('cut', ['preempted'])
  cloud('run', 'pod', '--', *FLAGS, code=75)
  world = cloud.get('world')
  world['nodes']['pod']['labels'] = {}
  cloud.set('world', world)
  assert 'lacks the label' in cloud('resume', 'pod', code=1)
  assert not cloud.calls('delete')


@pytest.mark.parametrize('lost', [69, 134])
def test_the_worker_that_failed_is_named(cloud, lost):
  cloud.pod()
  cloud.set('program', {'1.pod.0': {'code': lost}, '1.pod.1': {'code': 3}})
  text = cloud('run', 'pod', '--keep-going', '--', *FLAGS, code=3)
  assert 'pod, worker 1: exit code 3' in text and f'pod, worker 0: exit code {lost}' in text
  assert len(cloud.ran()) == 1 and not cloud.calls('delete')


def test_a_host_that_jax_ended_as_another_was_lost_goes_on(cloud):
  cloud.pod()
  cloud.set('program', {'1.pod.0': {'code': 134}, '1.pod.1': {'code': 134}})
  text = cloud('run', 'pod', '--keep-going=1', '--', *FLAGS, code=75)
  assert 'run main failed' not in text and 'run main lost a host' in text
  assert len(cloud.ran()) == 2 and len(cloud.calls('create')) == 1


def test_a_run_told_to_leave_goes_on_in_the_same_slice(cloud):
  cloud.pod()
  cloud.set('program', {'1.pod.0': {'until': 'never'}, '1.pod.1': {'until': 'never'}})
  cloud('run', 'pod', '--no-follow', '--', *FLAGS)
  assert 'run main: running' in cloud('status', 'pod')
  for name in ('main', 'other'):
    text = cloud('run', 'pod', f'--run={name}', '--no-follow', '--', *FLAGS, code=1)
    assert 'run main is still running here' in text
  cloud('stop', 'pod')
  text = cloud('logs', 'pod', code=75)
  assert 'saved' in text and 'was stopped' in text
  assert 'run main: stopped' in cloud('status', 'pod')
  cloud.set('program', {})
  cloud('resume', 'pod')
  assert [len(cloud.ran(worker=worker)) for worker in (0, 1)] == [2, 2]
  assert not cloud.calls('delete') and len(cloud.calls('create')) == 1
  text = cloud('logs', 'pod', '--no-follow', '--lines=1')
  assert '[worker 0] ended' in text and '[worker 1] ended' in text
  assert list((cloud.home() / 'salt_jax_runs/main').glob('log.*'))


def test_a_repeated_stop_lets_the_run_save(cloud):
  cloud.pod()
  plan = {'until': 'never', 'saves': 'disk'}
  cloud.set('program', {'1.pod.0': plan, '1.pod.1': plan})
  cloud('run', 'pod', '--no-follow', '--', *FLAGS)
  logs = [cloud.home(worker=worker) / 'salt_jax_runs/main/log' for worker in (0, 1)]
  wait_for(lambda: all('started' in log.read_text() for log in logs))
  cloud.set('unheard', ['stop'])
  text = cloud('stop', 'pod')
  for worker in (0, 1):
    assert f'[worker {worker}] run main: told already; it saves and leaves' in text
  (cloud.state / 'disk').touch()
  assert 'was stopped' in cloud('logs', 'pod', code=75)
  assert all('saving\nsaved\n' in log.read_text() for log in logs)


def test_stop_now_ends_a_run_that_cannot_save(cloud):
  cloud.pod('v4-8')
  cloud.set('program', {'1.pod.0': {'until': 'never', 'saves': 'never'}})
  cloud('run', 'pod', '--no-follow', '--', *FLAGS)
  log = cloud.home() / 'salt_jax_runs/main/log'
  wait_for(lambda: 'started' in log.read_text())
  cloud('stop', 'pod')
  wait_for(lambda: 'saving' in log.read_text())
  assert 'told to leave now' in cloud('stop', 'pod', '--now')
  assert 'was stopped' in cloud('logs', 'pod', code=75)
  assert log.with_name('exit_code').read_text() == '143\n'


@pytest.fixture
def nobody_collects_the_dead():
  """Orphans come to this process, which leaves them as they are, as a container's first process may."""
  set_child_subreaper = 36
  ctypes.CDLL(None).prctl(set_child_subreaper, 1, 0, 0, 0)
  yield
  ctypes.CDLL(None).prctl(set_child_subreaper, 0, 0, 0, 0)


@pytest.mark.usefixtures('nobody_collects_the_dead')
def test_a_machine_that_goes_down_and_one_that_is_cut_off(cloud):
  cloud.pod('v4-8')
  cloud.set('program', {'1.pod.0': {'until': 'never'}})
  place = cloud.home() / 'salt_jax_runs/main'
  for number, end in ((signal.SIGTERM, 'exit 75'), (signal.SIGKILL, 'lost')):
    cloud('run', 'pod', '--no-follow', '--', *FLAGS)
    wait_for(lambda: 'started' in (place / 'log').read_text())
    os.killpg(int((place / 'pid').read_text()), number)
    text = cloud('logs', 'pod', code=75)
    assert ('saved' in text) == (number == signal.SIGTERM)
    assert f'run main: {end}' in cloud('status', 'pod')


def test_results_are_fetched(cloud, tmp_path):
  cloud.pod()
  cloud('run', 'pod', '--', *FLAGS)
  (cloud.state / 'buckets/bucket/run').mkdir(parents=True)
  (cloud.state / 'buckets/bucket/run/step').write_text('7')
  (cloud.home() / 'mnt/run').mkdir(parents=True)
  (cloud.home() / 'mnt/run/report.md').write_text('report')
  cloud('fetch', 'pod', f'--to={tmp_path / "results of today"}')
  assert (tmp_path / 'results of today/workdir/report.md').read_text() == 'report'
  assert (tmp_path / 'results of today/bucket/step').read_text() == '7'
  for worker in (0, 1):
    assert (
      f'started 1.pod.{worker}' in (tmp_path / f'results of today/pod.{worker}.log').read_text()
    )
  assert 'pod' in cloud('list').split()
