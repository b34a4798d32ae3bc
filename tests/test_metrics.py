"""Lines, curves, resume, and the guard against NaN."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from salt_jax import metrics
from salt_jax.errors import InputError, NonFiniteError


def _steps(path):
  return [json.loads(line)['step'] for line in path.read_text().splitlines()]


def test_resume_drops_what_lies_ahead_and_half_lines(tmp_path):
  writer = metrics.Writer(tmp_path)
  for step in range(1, 6):
    writer.write(step, {'loss': jnp.float32(step / 8)})
  writer.close()
  with writer.path.open('a') as lines:
    lines.write('{"step": 6, "lo')
  writer = metrics.Writer(tmp_path, resume_step=3)
  writer.write(4, {'loss': 9.0, 'critic/loss': float('nan')})
  writer.close()
  assert _steps(writer.path) == [1, 2, 3, 4]
  lines = [json.loads(line) for line in writer.path.read_text().splitlines()]
  assert lines[2] == {'step': 3, 'loss': 0.375}
  assert lines[3] == {'step': 4, 'loss': 9.0, 'critic/loss': None}
  assert list((tmp_path / 'tensorboard').glob('events*'))


def test_lines_are_on_disk_at_once(tmp_path):
  writer = metrics.Writer(tmp_path)
  writer.write(1, {'loss': 1.0})
  assert _steps(writer.path) == [1]
  writer.close()


def test_other_processes_write_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr(metrics.jax, 'process_index', lambda: 1)
  writer = metrics.Writer(tmp_path / 'run')
  writer.write(1, {'loss': 1.0})
  writer.close()
  assert not (tmp_path / 'run').exists()


def test_progress_leaves_the_compilation_out():
  times = iter([100.0, 110.0, 110.0])
  progress = metrics.Progress(total=400, start=100, clock=lambda: next(times))
  assert progress.line(101, {'loss': 0.5}) == 'step 101/400  loss 0.5'
  assert progress.line(121, {'loss': 0.1234567}) == (
    'step 121/400  2 step/s  left 2m20s  loss 0.1235'
  )


@pytest.mark.parametrize(
  'duration, text',
  [(0.2, '0s'), (59.7, '1m00s'), (90, '1m30s'), (7500, '2h05m'), (273600, '3d04h')],
)
def test_seconds(duration, text):
  assert metrics.seconds(duration) == text


def test_non_finite_names_scalar_step_and_checkpoint():
  metrics.assert_finite(1, {'loss': 3.0, 'norm': np.float32(1e30)}, None, 'run')
  with pytest.raises(NonFiniteError) as error:
    metrics.assert_finite(12, {'loss': 1.0, 'critic/loss': jnp.nan}, 10, 'run/checkpoints')
  assert str(error.value) == (
    'step 12: critic/loss is nan; stopped, the last good checkpoint is step 10 in run/checkpoints.'
  )
  with pytest.raises(InputError, match='loss is -inf; stopped, there is no checkpoint in run'):
    metrics.assert_finite(2, {'loss': float('-inf')}, None, 'run')


def test_param_count():
  assert metrics.param_count({'a': np.ones((3, 4)), 'b': [np.ones(5), np.float32(1)]}) == 18
