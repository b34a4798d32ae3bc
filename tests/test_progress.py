"""The line a person watches: what is measured, from when on, and against which peak."""

import contextlib
import logging
import os
import pathlib
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from salt_jax import compiled, flops, train
from salt_jax.errors import InputError
from salt_jax.progress import Progress, memory

GIB = 2**30


@pytest.fixture(autouse=True)
def heard(caplog, monkeypatch):
  """Programs that ran before in this process keep the log to themselves."""
  monkeypatch.setattr(logging.getLogger('salt_jax'), 'propagate', True)
  caplog.set_level(logging.INFO, 'salt_jax')


def _device(kind='TPU v5', process=0, **stats):
  names = {'used': 'bytes_in_use', 'peak': 'peak_bytes_in_use', 'limit': 'bytes_limit'}
  found = {names[name]: GIB * value for name, value in stats.items()} or None
  return types.SimpleNamespace(device_kind=kind, process_index=process, memory_stats=lambda: found)


def _progress(times, *devices):
  times = iter(times)
  # An array of objects, as a mesh has it.
  return Progress(400, np.array(devices, object), clock=lambda: next(times))


def _lines(progress, *steps):
  return [progress.line(step, progress.measure(step, spent), {}) for step, spent in steps]


def test_the_first_step_is_told_apart_from_the_rate():
  progress = _progress([58.0, 100.0, 110.0, 150.0])
  measured = progress.measure(101)
  assert measured == {'first_step_seconds': 42.0}
  assert progress.line(101, measured, {'loss': 0.5}) == 'step 101/400  first step 42s  loss 0.5'
  assert progress.line(121, progress.measure(121), {'loss': 0.1234567}) == (
    'step 121/400  2 step/s  left 2m20s  loss 0.1235'
  )
  assert progress.line(126, progress.measure(126), {}) == 'step 126/400  2 s/step  left 9m08s'


def test_a_clock_that_waits_starts_at_the_end_of_the_next_step(caplog):
  """Whether that step is due to have a line or not; a compilation stops it."""
  progress = _progress([0.0, 5.0, 6.0, 9.0, 10.0, 20.0])
  files = types.SimpleNamespace(write=lambda *_: None, write_timing=lambda *_: None)
  saved = types.SimpleNamespace(latest_step=lambda: None, folder='there')
  config = types.SimpleNamespace(log=types.SimpleNamespace(every=10), total_steps=400)

  def log(step):
    train._log((step, {}, 0.0), config, saved, files, progress)

  assert progress.is_waiting
  log(1)
  assert not progress.is_waiting
  with progress.compiling('critic'):
    pass
  assert progress.is_waiting
  log(2)
  assert not progress.is_waiting and 'step 2/' not in caplog.text
  log(10)
  assert caplog.messages[-1] == 'step 10/400  1.25 s/step  left 8m08s'


def test_mfu_is_of_the_named_peak_of_all_devices(caplog):
  progress = _progress([0.0, 5.0, 15.0], *(_device() for _ in range(4)))
  progress.announce({'generator': 5.51e15, 'critic': 1.67e15})
  assert caplog.messages == [
    'by formula a clip takes: generator 5.51 PFLOP, critic 1.67 PFLOP; MFU is of 459 TFLOP/s, bfloat16 of a TPU v5'
  ]
  # 7344e12 over 10 seconds and 4 devices is 183.6e12 each, 40 % of 459e12; what was spent before does not count.
  first, second = _lines(progress, (1, 9e15), (21, 9e15 + 7344e12))
  assert first == 'step 1/400  first step 5s'
  assert second == 'step 21/400  2 step/s  left 3m10s  184 TFLOP/s a device  MFU 40.0%'


def test_an_unknown_device_has_a_rate_and_no_mfu(caplog):
  progress = _progress([0.0, 5.0, 15.0], _device('cpu'))
  progress.announce({'vae': 3e9})
  assert 'MFU' not in caplog.text
  assert _lines(progress, (1, 0.0), (21, 5e12))[1].endswith('500 GFLOP/s a device')
  assert _lines(_progress([0.0, 5.0, 15.0], _device()), (1, 0.0), (21, 0.0))[1].endswith('3m10s')


def test_every_slice_has_a_peak():
  kinds = {'TPU v4', 'TPU v5', 'TPU v5 lite', 'TPU v6 lite', 'TPU7x'}
  assert kinds < set(flops.PEAK_FLOPS)
  assert all(1e14 < peak < 2e15 for peak in flops.PEAK_FLOPS.values())


def test_memory_is_that_of_the_fullest_device_of_this_process():
  full, other = _device(used=12, peak=14, limit=95.7), _device(used=3, peak=20, limit=95.7)
  assert memory([full, other]) == {'hbm': 12, 'hbm_peak': 20, 'hbm_limit': 95.7}
  assert memory([full, _device()]) == {} == memory([]) == memory(jax.devices())
  away = _device(process=1, used=90, peak=90, limit=95.7)
  (line,) = _lines(_progress([0.0, 5.0], full, away), (1, 0.0))
  assert line.endswith('first step 5s  HBM 12.0, peak 14.0 of 95.7 GiB')
  (line,) = _lines(_progress([0.0, 5.0], _device(used=12, peak=14, limit=0)), (1, 0.0))
  assert line.endswith('HBM 12.0, peak 14.0 GiB')


def test_what_is_compiled_later_is_no_part_of_the_rate(caplog):
  progress = _progress([0.0, 5.0, 6.0, 36.0, 40.0, 50.0])
  lines = _lines(progress, (1, 0.0))
  with progress.compiling('critic_step'):
    jax.jit(lambda x: x * 3)(jnp.ones(3))
  assert caplog.messages == ['critic_step: traced and compiled in 30s']
  lines += _lines(progress, (3, 0.0), (23, 0.0))
  assert lines == [
    'step 1/400  first step 5s', 'step 3/400', 'step 23/400  2 step/s  left 3m08s'
  ]  # fmt: skip


def test_behind_a_profile_the_rate_is_measured_anew():
  progress = _progress([0.0, 5.0, 60.0, 61.0, 70.0], _device())
  _lines(progress, (1, 0.0))
  progress.restart(14, 1e15)
  assert _lines(progress, (13, 1e15)) == ['step 13/400']
  (line,) = _lines(progress, (34, 1e15 + 459e12))
  assert line == 'step 34/400  2 step/s  left 3m03s  45.9 TFLOP/s a device  MFU 10.0%'


TWICE = """
import logging, sys
import jax
from salt_jax import compiled
from salt_jax.progress import Progress
logging.basicConfig(stream=sys.stdout, format='%(message)s')
logging.getLogger('salt_jax').setLevel(logging.INFO)
print(compiled.keep(None, sys.argv[1]))
for _ in range(2):
  with Progress(1).compiling('tiny_step'):
    jax.jit(lambda x: x * 3 + 1)(1.0)
  jax.clear_caches()
"""


def test_programs_are_kept_from_the_first_start_on(tmp_path):
  """However small and quick to compile, they are read by the next who compiles them, and the log says so."""
  env = {k: v for k, v in os.environ.items() if 'CACHE' not in k}
  done = subprocess.run(
    [sys.executable, '-c', TWICE, str(tmp_path)],
    env=env,
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  where, first, second = done.stdout.splitlines()
  assert where == str(tmp_path / 'compile_cache')
  assert any(file.name.startswith('jit__lambda') for file in pathlib.Path(where).iterdir())
  assert first.startswith('tiny_step: traced and compiled in')
  assert second.startswith('tiny_step: traced, and read from the compile cache, in')


def test_programs_lie_where_the_checkpoints_do(monkeypatch, tmp_path):
  """In a bucket all hosts read what the first one wrote; small programs are compiled sooner than they are fetched."""
  config = jax.config
  names = ('jax_compilation_cache_dir', 'jax_enable_compilation_cache')
  names += tuple(f'jax_persistent_cache_min_{x}' for x in ('compile_time_secs', 'entry_size_bytes'))
  before = {name: getattr(config, name) for name in names}
  try:
    config.update('jax_compilation_cache_dir', None)
    assert compiled.keep(None, 'gs://bucket/run') == 'gs://bucket/run/compile_cache'
    assert config.jax_persistent_cache_min_compile_time_secs == 1
    config.update('jax_compilation_cache_dir', None)
    monkeypatch.setenv('HOME', '/nowhere')
    assert compiled.keep(None, '~/run') == '/nowhere/run/compile_cache'
    monkeypatch.setenv('HOME', str(tmp_path))
    assert compiled.keep('~/kept', '~/run') == str(tmp_path / 'kept')
    assert (tmp_path / 'kept').is_dir(), 'the folder of that name was made elsewhere'
    assert config.jax_persistent_cache_min_compile_time_secs == 0
  finally:
    for name, value in before.items():
      config.update(name, value)


@pytest.fixture
def kept_here(tmp_path):
  before = jax.config.jax_compilation_cache_dir
  jax.config.update('jax_compilation_cache_dir', str(tmp_path))
  yield
  jax.config.update('jax_compilation_cache_dir', before)


def test_half_an_entry_of_a_killed_start_is_dropped(tmp_path, kept_here):
  """And nothing else: not what was there before, nor other programs."""
  names = ('jit_critic_step-a-cache', 'jit_critic_step-b-cache', 'jit_generator_step-c-cache')
  before, torn, other = (tmp_path / name for name in names)
  before.touch()
  os.utime(before, (1, 1))
  with contextlib.suppress(ValueError), compiled.marked('critic_step'):
    raise ValueError  # the program ends by itself, so nothing is half done
  assert list(tmp_path.iterdir()) == [before]
  killed = compiled.marked('critic_step')
  killed.__enter__()
  torn.touch()
  other.touch()
  assert compiled.keep(None, 'runs/x') == str(tmp_path)
  assert sorted(tmp_path.iterdir()) == [before, other]


def test_nothing_is_kept_if_it_is_switched_off(tmp_path):
  assert jax.config.jax_enable_compilation_cache
  try:
    assert compiled.keep(compiled.OFF, str(tmp_path)) is None
    assert not jax.config.jax_enable_compilation_cache
  finally:
    jax.config.update('jax_enable_compilation_cache', True)


def test_the_environment_is_heard_where_the_flag_is_silent(tmp_path):
  there = jax.config.jax_compilation_cache_dir
  assert there and compiled.keep(None, str(tmp_path)) == there
  assert jax.config.jax_compilation_cache_dir == there


def test_a_bucket_that_cannot_be_written_is_refused(monkeypatch):
  def refuse(path, **_):
    raise PermissionError(f'403 {path}')

  monkeypatch.setattr(type(epath.Path('gs://a/b')), 'mkdir', refuse)
  with pytest.raises(InputError, match='^--compile_cache=gs://no/where: nothing can be written'):
    compiled.keep('gs://no/where', 'runs/x')
