"""The first number that is not finite stops the run and is named, and the last good checkpoint stays."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from salt_jax import stages, train
from salt_jax.checkpoint import Checkpoints
from salt_jax.errors import NonFiniteError
from tests import tiny_config
from tests.commands import sentence_of


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tiny_config.write_weights(str(tmp_path_factory.mktemp('weights')))


def _stage_that_breaks_at(broken: int, finite_loss: bool):
  """A stage of one parameter whose update is NaN at one step, with or without the loss showing it."""
  params = {'generator': {'kernel': np.ones((4, 4), np.float32)}}

  def run(state, frozen, batch, n, *, recipe):
    bad = jnp.where(n == broken - 1, jnp.nan, 1.0)
    params = jax.tree.map(lambda x: x * bad, state.params)
    loss = 1.0 if finite_loss else bad
    return state.replace(params=params), {
      'loss': jnp.float32(loss),
      'param_norm': optax.tree.norm(params),
    }

  spec = stages.StepSpec('generator', run, 1, lambda feed: iter([{'index': np.arange(8)}] * 99))
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
  return stages.Stage(shapes, lambda: params, {}, ('generator',), (spec,))


@pytest.mark.parametrize(
  'broken, finite_loss, term, kept',
  [
    (1, False, 'loss', None),
    (4, False, 'loss', 2),
    (5, False, 'loss', 4),
    (4, True, 'param_norm', 2),
  ],
)
def test_the_first_number_that_is_not_finite_stops_the_run(
  folder, tmp_path, monkeypatch, broken, finite_loss, term, kept
):
  config = tiny_config.get_config(folder)
  config.optim = {'generator': config.optim.generator}
  monkeypatch.setattr(stages, 'build', lambda *_: _stage_that_breaks_at(broken, finite_loss))
  with pytest.raises(NonFiniteError) as error:
    train.run(config, str(tmp_path))
  last = 'the last good checkpoint is step' if kept else 'there is no checkpoint'
  assert f'step {broken}: generator/{term} is nan; stopped, {last}' in sentence_of(error)
  steps = [int(p.name) for p in (tmp_path / 'checkpoints').iterdir() if p.name.isdigit()]
  assert max(steps, default=None) == kept and not (tmp_path / 'export').exists()
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  assert [json.loads(line)['step'] for line in lines] == list(range(1, broken))
  if kept:
    checkpoints = Checkpoints(str(tmp_path / 'checkpoints'), keep=4)
    kernel = jax.ShapeDtypeStruct(
      (4, 4), np.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
    )
    got = checkpoints.restore(kept, {'ema': {'generator': {'kernel': kernel}}})
    checkpoints.close()
    assert np.isfinite(got['ema']['generator']['kernel']).all()
