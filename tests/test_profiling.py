"""Profiles of chosen steps: which, when they start and stop, and where they go."""

import pytest

from salt_jax import profiling
from salt_jax.errors import InputError


@pytest.fixture
def happened(monkeypatch):
  """What is asked of JAX, in order."""
  found = []
  monkeypatch.setattr(profiling.jax, 'block_until_ready', lambda x: found.append(f'wait {x}'))
  start, stop = (lambda folder, **_: found.append(folder)), (lambda: found.append('stop'))
  monkeypatch.setattr(profiling.jax.profiler, 'start_trace', start)
  monkeypatch.setattr(profiling.jax.profiler, 'stop_trace', stop)
  return found


def _run(profiler, steps):
  """State k is what step k leaves."""
  return [(profiler.before(k, k - 1), profiler.after(k, k))[1] for k in steps]


def test_the_device_is_waited_for_at_both_ends_and_nowhere_else(happened):
  profiler = profiling.Profiler(profiling.parse('3:4', 9), 'run/profile')
  assert _run(profiler, range(1, 10)) == [False] * 3 + [True] + [False] * 5
  profiler.close()
  assert happened == ['wait 2', 'run/profile', 'wait 4', 'stop']


def test_a_run_that_is_stopped_within_leaves_what_there_is(happened):
  profiler = profiling.Profiler(profiling.parse('3:8', 9), 'run/profile')
  assert not any(_run(profiler, range(1, 5)))
  profiler.close()
  assert happened == ['wait 2', 'run/profile', 'stop']


def test_every_process_writes_into_a_folder_of_its_own(happened, monkeypatch):
  monkeypatch.setattr(profiling.jax, 'process_count', lambda: 2)
  monkeypatch.setattr(profiling.jax, 'process_index', lambda: 1)
  _run(profiling.Profiler(profiling.parse('1:1', 1), 'run/profile'), [1])
  assert happened[1] == 'run/profile/process1'


def test_without_the_flag_nothing_is_waited_for(happened):
  assert not any(_run(profiling.Profiler(profiling.parse(None, 9), 'profile'), range(1, 10)))
  assert happened == []


@pytest.mark.parametrize(
  'text', ['', '3', '3:', ':4', '3:4:5', '-3:4', 'a:b', '3-4', '4:3', '0:2', '8:10']
)
def test_steps_that_are_none_are_refused(text):
  with pytest.raises(InputError, match=f'^--profile={text} must '):
    profiling.parse(text, 9)


@pytest.mark.parametrize('start, left', [(0, True), (4, True), (5, False), (9, False)])
def test_steps_that_a_run_has_begun_are_not_begun_again(start, left):
  steps = profiling.parse('5:9', 9)
  assert profiling.ahead(steps, start) == (steps if left else profiling.Steps())
  assert profiling.ahead(profiling.Steps(), start) == profiling.Steps()
