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


def test_timing_is_kept_apart_from_what_the_run_determines(tmp_path):
  writer = metrics.Writer(tmp_path)
  writer.write(1, {'loss': 1.0})
  writer.write_timing(1, {'first_step_seconds': 9.5})
  writer.write_timing(2, {})
  writer.write_timing(3, {'mfu': 0.25})
  writer.close()
  assert [json.loads(line) for line in writer.path.read_text().splitlines()] == [
    {'step': 1, 'loss': 1.0}
  ]
  writer = metrics.Writer(tmp_path, resume_step=2)
  writer.close()
  assert writer.timing_path.read_text() == '{"step": 1, "first_step_seconds": 9.5}\n'


@pytest.mark.parametrize(
  'value, text',
  [(0.0, '0 '), (12.34, '12.3 '), (999.4, '999 '), (999.6, '1 k'), (5.513e15, '5.51 P')],
)
def test_quantity(value, text):
  assert metrics.quantity(value) == text


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
