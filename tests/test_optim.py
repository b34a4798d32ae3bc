"""AdamW against its formula in float64, the schedules, and the arithmetic of the EMA."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from salt_jax import optim
from salt_jax.errors import InputError


def _config(**changes):
  cfg = ml_collections.ConfigDict(
    {
      'lr': 0.01,
      'b1': 0.8,
      'b2': 0.95,
      'eps': 1e-6,
      'weight_decay': 0.1,
      'clip': 1.0,
      'schedule': 'cosine',
      'warmup': 3,
      'total': 10,
    }
  )
  cfg.update(changes)
  return cfg


def _tree(seed, scale):
  rng = np.random.default_rng(seed)
  return {'w': {'kernel': scale * rng.normal(size=(3, 4)), 'bias': scale * rng.normal(size=4)}}


def _rate(cfg, count):
  if count < cfg.warmup:
    return cfg.lr * (count + 1) / cfg.warmup
  return cfg.lr * 0.5 * (1 + np.cos(np.pi * (count - cfg.warmup) / (cfg.total - cfg.warmup)))


def _adamw_by_the_formula(cfg, params, grads):
  """Loshchilov and Hutter, algorithm 2, on flat float64 vectors, after clipping."""
  first, second = np.zeros_like(params), np.zeros_like(params)
  for count, grad in enumerate(grads):
    grad = grad * min(1.0, cfg.clip / np.linalg.norm(grad))
    first = cfg.b1 * first + (1 - cfg.b1) * grad
    second = cfg.b2 * second + (1 - cfg.b2) * grad**2
    mean = first / (1 - cfg.b1 ** (count + 1))
    spread = np.sqrt(second / (1 - cfg.b2 ** (count + 1)))
    step = mean / (spread + cfg.eps) + cfg.weight_decay * params
    params = params - _rate(cfg, count) * step
  return params


def _flat(tree):
  return np.concatenate([np.asarray(x, np.float64).ravel() for x in jax.tree.leaves(tree)])


def test_adamw_equals_the_formula():
  cfg = _config()
  # Norms lie on both sides of the clip.
  grads = [_tree(seed, scale) for seed, scale in enumerate((3.0, 0.02, 1.0, 0.1, 5.0, 0.01))]
  start = _tree(100, 1.0)
  optimizer = optim.make_optimizer(cfg)
  params = jax.tree.map(jnp.float32, start)
  state = optimizer.init(params)
  step = jax.jit(lambda g, s, p: optim.apply_updates(optimizer, g, s, p))
  for grad in grads:
    before = params
    params, state, norms = step(jax.tree.map(jnp.float32, grad), state, params)
  expected = _adamw_by_the_formula(cfg, _flat(start), [_flat(grad) for grad in grads])
  # Six float32 updates of numbers near 1: a few units in the last place (1.2e-7).
  np.testing.assert_allclose(_flat(params), expected, rtol=0, atol=1e-6)
  assert norms['grad_norm'] == pytest.approx(np.linalg.norm(_flat(grads[-1])), rel=1e-5)
  assert norms['param_norm'] == pytest.approx(np.linalg.norm(expected), rel=1e-5)
  change = np.linalg.norm(_flat(params) - _flat(before))
  # The difference of two float32 vectors of norm 3 carries their rounding.
  assert norms['update_norm'] == pytest.approx(change, rel=1e-3)


def test_half_precision_gradients_are_widened():
  optimizer = optim.make_optimizer(_config(warmup=0))
  params = {'w': jnp.ones(4)}
  grads = {'w': jnp.full(4, 0.5, jnp.bfloat16)}
  params, state, _ = optim.apply_updates(optimizer, grads, optimizer.init(params), params)
  kinds = {x.dtype for x in jax.tree.leaves((params, state)) if x.ndim}
  assert kinds == {jnp.dtype('float32')}


def test_schedules():
  cosine = optim.learning_rate(_config())
  rates = [float(cosine(jnp.int32(count))) for count in range(13)]
  # float32 cosine of numbers up to pi.
  np.testing.assert_allclose(rates[:11], [_rate(_config(), c) for c in range(11)], atol=2e-9)
  assert rates[10:] == [rates[10]] * 3
  constant = optim.learning_rate(_config(schedule='constant', warmup=0))
  np.testing.assert_allclose([constant(jnp.int32(c)) for c in (0, 5, 50)], 0.01)


@pytest.mark.parametrize(
  'changes, words',
  [
    ({'schedule': 'linear'}, "'linear'"),
    ({'warmup': 10}, 'warmup=10'),
    ({'clip': 0.0}, 'clip=0'),
    ({'clip': float('nan')}, 'clip=nan'),
  ],
)
def test_bad_settings_are_named(changes, words):
  with pytest.raises(InputError, match=words):
    optim.make_optimizer(_config(**changes))


def test_ema_keeps_the_stated_weight_of_its_first_copy():
  update = jax.jit(lambda old, new, step: optim.ema(old, new, 0.99, step, 40))
  old = {'w': jnp.zeros(3)}
  for step in range(40):
    new = {'w': jnp.full(3, step, jnp.float32)}
    old = update(old, new, jnp.int32(step))
    assert float(old['w'][0]) == step
  old = {'w': jnp.ones(3)}
  for step in range(40, 120):
    old = update(old, {'w': jnp.zeros(3)}, jnp.int32(step))
  # 80 products in float32 lose at most 80 half units: 5e-6.
  np.testing.assert_allclose(old['w'], 0.99**80, rtol=5e-6)
  assert float(old['w'][0]) == pytest.approx(0.447, abs=1e-3)
  assert old['w'].dtype == jnp.float32
