"""Whole runs: resumed = uninterrupted, one device = eight, one compilation a step, every stage end to end."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from salt_jax import programs, sharding, stages, train
from salt_jax.store import Store
from tests import tiny_config
from tests.processes import devices_of

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope='session')
def weights(tmp_path_factory):
  return tiny_config.write_weights(str(tmp_path_factory.mktemp('weights')))


@pytest.fixture(scope='module')
def finished(weights, tmp_path_factory):
  """An uninterrupted run of six steps, two of them profiled: (workdir, how often each step was traced)."""
  workdir = str(tmp_path_factory.mktemp('run'))
  return workdir, train.run(tiny_config.get_config(weights), workdir, profile='3:4')


def _start(weights, workdir, devices=1, *flags):
  env = os.environ | devices_of(devices)
  command = [
    sys.executable,
    '-m',
    'salt_jax.main',
    f'--config=tests/tiny_config.py:{weights}',
    f'--workdir={workdir}',
  ]
  return subprocess.Popen([*command, *flags], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)


def _finish(process, limit=300):
  _, err = process.communicate(timeout=limit)
  assert process.returncode == 0, err[-3000:]


def _metrics(workdir):
  lines = (pathlib.Path(workdir) / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def _exported(workdir):
  (file,) = pathlib.Path(workdir, 'export').iterdir()
  return load_file(file)


def _fingerprints(workdir, step):
  info = next(pathlib.Path(workdir, 'checkpoints', str(step), 'info').rglob('metadata'))
  return json.loads(info.read_text())['fingerprints']


def test_each_step_compiles_once_over_random_exits(finished):
  workdir, traces = finished
  assert traces == {'generator': 1, 'critic': 1}
  exits = [line['generator/exit'] for line in _metrics(workdir) if 'generator/exit' in line]
  assert len(exits) == 3 and len(set(exits)) > 1, (
    'the exits did not vary, so this test says nothing'
  )


@pytest.mark.parametrize('every', [1, 2, 5])
def test_a_resumed_step_reads_on_behind_its_own_calls(every, weights):
  """A step runs at the iterations that `every` divides; of these so many lie before the start."""
  config = tiny_config.get_config(weights)
  mesh = sharding.make_mesh(config.mesh)
  spec = stages.StepSpec('critic', None, every, lambda feed: feed)
  for start in range(12):
    done = sum(n % every == 0 for n in range(start))
    assert train._feed(spec, config, start, mesh).start_step == done


def test_the_ratio_of_updates_and_the_active_terms_are_logged(finished):
  lines = _metrics(finished[0])
  assert [line['step'] for line in lines] == [1, 2, 3, 4, 5, 6]
  assert ['generator/loss_dmd' in line for line in lines] == [True, False] * 3
  assert all('critic/loss' in line for line in lines)
  assert lines[0]['generator/active_dmd'] == 1.0


def test_training_moved_the_student_and_its_average_lags(finished, weights):
  before, after = load_file(f'{weights}/init.safetensors'), _exported(finished[0])
  name = 'blocks.0.self_attn.q.weight'
  assert 0 < np.abs(after[name] - before[name]).max() < 0.01


def _wait_for_kill(process, workdir, when):
  folder = pathlib.Path(workdir, 'checkpoints')
  began = time.monotonic()
  while process.poll() is None and time.monotonic() - began < 240:
    names = [p.name for p in folder.iterdir()] if folder.is_dir() else []
    if when(names):
      os.kill(process.pid, signal.SIGKILL)
      process.wait()
      return True
    time.sleep(0.002)
  process.wait()
  return False


@pytest.mark.slow  # test_hosts kills at random
def test_killed_runs_go_on_and_end_bit_identical(finished, weights, tmp_path):
  """One kill in the middle of a save, one right after a save, one while starting up."""
  moments = [
    lambda names: any('tmp' in name for name in names),
    lambda names: any(name.isdigit() for name in names),
    lambda names: True,
  ]
  workdir = str(tmp_path / 'killed')
  kills = sum(_wait_for_kill(_start(weights, workdir), workdir, when) for when in moments)
  assert kills == 3, 'a run ended before its kill'
  process = _start(weights, workdir)
  _finish(process)
  assert _fingerprints(workdir, 6) == _fingerprints(finished[0], 6)
  one, other = _exported(workdir), _exported(finished[0])
  for name in one:
    np.testing.assert_array_equal(one[name], other[name], err_msg=name)
  assert [line['step'] for line in _metrics(workdir)] == [1, 2, 3, 4, 5, 6]


def test_starting_a_finished_run_again_changes_nothing(finished, weights):
  before = _fingerprints(finished[0], 6)
  assert train.run(tiny_config.get_config(weights), finished[0]) == {}
  assert _fingerprints(finished[0], 6) == before


@pytest.mark.slow
def test_eight_devices_equal_one(finished, weights, tmp_path):
  mesh = dict(data=2, fsdp=4)
  flags = [f'--config.mesh.{axis}={size}' for axis, size in mesh.items()]
  rules = "--config.rules=(('.*','fsdp'),)"
  process = _start(
    weights, tmp_path, 8, *flags, rules, '--config.shard_min_size=1', '--config.total_steps=3'
  )
  _finish(process)
  for one, many in zip(_metrics(finished[0]), _metrics(tmp_path), strict=False):
    for name in (
      'generator/loss_dmd',
      'generator/dmd_gradient',
      'generator/exit',
      'critic/loss',
      'critic/grad_norm',
    ):
      if name in one:
        # Sums over the batch in another order; from the second step on Adam, whose first moment is the bare
        # gradient here, turns rounding of tiny gradients into whole steps of 2e-4.
        np.testing.assert_allclose(
          many[name], one[name], rtol=2e-3, err_msg=f'{name} at step {one["step"]}'
        )


GOLDEN = {
  'generator/steps': 2.0,
  'generator/exit': 1.0,
  'generator/loss_dmd': 0.17064,
  'generator/loss_alignment': 0.09357,
  'generator/grad_norm': 0.59412,
  'critic/loss': 4.99295,
  'critic/grad_norm': 3.31998,
}


def test_golden_first_step(finished):
  first = _metrics(finished[0])[0]
  message = (
    'The first step of a tiny run gives other numbers. If you changed keys, noise, the data, the schedule or a '
    'loss on purpose, copy the new ones here and say so; if not, you have found a bug.'
  )
  for name, value in GOLDEN.items():
    # Kernels differ between processors in the last digits.
    assert first[name] == pytest.approx(value, rel=2e-3), f'{name}: {message}'


def test_stages_before_distillation_run_and_hand_over(weights, tmp_path):
  """VAE, then teacher on its latents, then causal student on trajectories of the shipped teacher."""
  vae = tiny_config.stage('vae', weights)
  vae.update(statistics_clips=4, batch=2)
  vae.data.frames = 9
  vae.optim.vae.warmup = 0
  assert train.run(vae, str(tmp_path / 'vae')) == {'vae': 1}

  teacher = tiny_config.stage('teacher', weights)
  teacher.latents.update(count=16, batch=8)
  teacher.weights.vae = str(tmp_path / 'vae' / 'export' / 'pretrain-vae-vae.safetensors')
  for net in ('dit', 'text'):
    teacher.optim[net].warmup = 0
  assert train.run(teacher, str(tmp_path / 'teacher')) == {'dit': 1}
  latents = Store(str(tmp_path / 'teacher' / 'latents'))
  values = np.stack([latents[i]['latents'] for i in range(16)]).astype(np.float32)
  # The 4 clips whose statistics were folded in are not these 16.
  np.testing.assert_allclose(values.std((0, 1, 2, 3)), 1.0, atol=0.5)

  ode = tiny_config.stage('ode', weights)
  ode.pairs.update(count=16, steps=8, batch=8)
  ode.optim.generator.warmup = 0
  assert train.run(ode, str(tmp_path / 'ode')) == {'generator': 1}
  pairs = Store(str(tmp_path / 'ode' / 'pairs'))
  assert pairs[0]['trajectory'].shape == (5, 6, 4, 4, 16)
  # The first kept input is the noise itself.
  first = np.stack([pairs[i]['trajectory'][0] for i in range(16)]).astype(np.float32)
  np.testing.assert_allclose([first.mean(), first.std()], [0, 1], atol=0.02)


def test_the_average_alone_is_enough_to_sample(finished, weights):
  from salt_jax import sample

  config, rec, params = sample.load(finished[0])
  exported = sample.load(
    os.path.join(finished[0], 'export', 'selfforcing-nano-generator.safetensors')
  )[2]
  for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(exported), strict=True):
    np.testing.assert_array_equal(a, b)
  assert config.size == 'nano' and rec.model.dim == tiny_config.DIT['dim']


def test_the_profile_holds_the_chosen_steps_alone(finished):
  (file,) = pathlib.Path(finished[0], 'profile').rglob('*.xplane.pb')
  events = [
    (event.name, dict(event.stats))
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes
    for line in plane.lines
    for event in line.events
  ]
  assert sorted(stats['step_num'] for name, stats in events if name == 'train') == [3, 4]
  modules = {stats.get('hlo_module') for _, stats in events}
  assert {'jit_generator_step', 'jit_critic_step'} <= modules


def test_a_run_that_is_started_again_goes_on_without_the_profile_it_has(finished, weights, caplog):
  """Whoever restarts it, a launcher or a cluster, starts the same command."""
  before = sorted(pathlib.Path(finished[0], 'profile').rglob('*.xplane.pb'))
  assert train.run(tiny_config.get_config(weights), finished[0], profile='3:4') == {}
  assert sorted(pathlib.Path(finished[0], 'profile').rglob('*.xplane.pb')) == before
  assert '--profile=3:4 begins before step 6, behind which the run goes on' in caplog.text


def test_timing_is_logged_and_the_first_step_apart(finished):
  lines = (pathlib.Path(finished[0]) / 'timing.jsonl').read_text().splitlines()
  first, *others = [json.loads(line) for line in lines]
  assert first['step'] == 1 and first['first_step_seconds'] > 0
  assert 'steps_per_second' not in first
  # The profile of steps 3 and 4 would spoil the rate, which is measured anew behind it.
  assert [line['step'] for line in others if 'steps_per_second' in line] == [2, 5, 6]
  assert all('mfu' not in line and 'hbm' not in line for line in others), 'a CPU has no such thing'


class _Late:
  """A scalar that is still being computed: remembers how many steps were dispatched when it was read."""

  def __init__(self, step, dispatched, read):
    self.step, self.dispatched, self.read = step, dispatched, read

  def __array__(self, dtype=None, copy=None):
    self.read.append((self.step, len(self.dispatched)))
    return np.float32(self.step).reshape(())


@pytest.fixture
def little(weights, monkeypatch):
  """A run of five steps of next to no work: (its config, a function that sets what a step does)."""

  def step(state, frozen, batch, n, recipe):
    params = {'generator': {'w': state.params['generator']['w'] + n + batch['x'].sum()}}
    return state.replace(params=params, ema=params), {'loss': jnp.float32(n)}

  def feed(_):
    while True:
      yield {'index': np.arange(8), 'x': np.ones(8, np.float32)}

  params = {'generator': {'w': np.zeros(3, np.float32)}}
  spec = stages.StepSpec('generator', step, 1, feed)
  stage = stages.Stage(params, lambda: params, {}, ('generator',), (spec,))
  monkeypatch.setattr(train.stages, 'build', lambda *_: stage)
  monkeypatch.setattr(train, '_finish', lambda *_: None)
  config = tiny_config.get_config(weights)
  config.total_steps = 5
  config.checkpoint.every = 5
  return config


def test_scalars_are_read_behind_the_dispatch_of_the_next_step(little, tmp_path, monkeypatch):
  dispatched, read, plain = [], [], programs.step

  def step(*args):
    run = plain(*args)

    def late(state, frozen, batch, n):
      dispatched.append(1)
      return run(state, frozen, batch, n)[0], {'loss': _Late(len(dispatched), dispatched, read)}

    return late

  def waited(x, plain=jax.block_until_ready):
    assert len(dispatched) == 5, 'the loop waits for the device'
    return plain(x)

  monkeypatch.setattr(programs, 'step', step)
  monkeypatch.setattr(jax, 'block_until_ready', waited)
  train.run(little, str(tmp_path))
  # With the end of the first the clock starts; the last is read because it is saved, and a bad one must not be.
  assert read == [(1, 1), (2, 3), (3, 4), (4, 5), (5, 5)]


def test_a_silent_copy_to_the_device_is_an_error(little, tmp_path, monkeypatch):
  assert train.run(little, str(tmp_path / 'whole')) == {'generator': 1}
  monkeypatch.setattr(train, '_to_devices', lambda batch, mesh: {'x': batch['x']})
  with pytest.raises(Exception, match='Disallowed host-to-device transfer'):
    train.run(little, str(tmp_path / 'silent'))
