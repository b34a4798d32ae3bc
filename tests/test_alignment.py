"""The alignment term against NumPy float64 by the formula; zero where both sides agree; free where it sleeps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from salt_jax.diffusion import flow
from salt_jax.errors import InputError
from salt_jax.losses import alignment
from salt_jax.losses.alignment import AlignmentConfig, alignment_loss
from tests import tiny


def _tokens(seed):
  return jax.random.normal(jax.random.key(seed), (2, 3, 5, 8))


def _unit(x):
  x = np.asarray(x, np.float64)
  return x / np.linalg.norm(x, axis=-1, keepdims=True)


def _relations(student, reference, margin):
  """Equation (2), loop by loop."""
  s, r = _unit(student), _unit(reference)
  out = np.zeros(s.shape[0])
  for b in range(s.shape[0]):
    frames = []
    for f in range(s.shape[1]):
      difference = np.abs(s[b, f] @ s[b, f].T - r[b, f] @ r[b, f].T)
      frames.append(np.maximum(difference - margin, 0).mean())
    out[b] = np.mean(frames)
  return out


@pytest.mark.parametrize('margin', [0.0, 0.1, 0.5])
def test_relations_by_the_formula(margin):
  one, other = _tokens(0), _tokens(1)
  got = alignment.relation_loss(one, other, margin)
  np.testing.assert_allclose(got, _relations(one, other, margin), rtol=1e-5)


def test_relations_gradient_by_finite_differences():
  one, other, way = np.asarray(_tokens(0), np.float64), _tokens(1), np.asarray(_tokens(2))
  grad = jax.grad(lambda x: alignment.relation_loss(x, other, 0.1).sum())(_tokens(0))
  step = 1e-5
  difference = (
    _relations(one + step * way, other, 0.1) - _relations(one - step * way, other, 0.1)
  ).sum()
  np.testing.assert_allclose(np.sum(np.asarray(grad) * way), difference / (2 * step), rtol=1e-3)


def test_relations_do_not_see_the_length_of_a_token_nor_a_rotation():
  one, other = _tokens(0), _tokens(1)
  lengths = jnp.exp(jax.random.normal(jax.random.key(3), (2, 3, 5, 1)))
  turn = np.linalg.qr(np.random.default_rng(0).standard_normal((8, 8)))[0]
  expected = alignment.relation_loss(one, other, 0.1)
  np.testing.assert_allclose(
    alignment.relation_loss(one * lengths, other, 0.1), expected, rtol=1e-5
  )
  np.testing.assert_allclose(alignment.relation_loss(one @ turn, other, 0.1), expected, rtol=1e-4)
  assert np.all(np.asarray(alignment.relation_loss(one, one @ turn, 0.0)) < 1e-6)


@pytest.mark.parametrize('kernel', ['linear', 'rbf'])
def test_mmd_by_the_formula(kernel):
  one, other = _tokens(0), _tokens(1)
  s, r = _unit(one), _unit(other)

  def k(a, b):
    if kernel == 'linear':
      return a @ b.T
    return np.exp(-np.square(a[:, None] - b[None]).sum(-1) / 2)

  expected = [
    np.mean(
      [
        k(x, x).mean() + k(y, y).mean() - 2 * k(x, y).mean()
        for x, y in zip(s[b], r[b], strict=True)
      ]
    )
    for b in range(2)
  ]
  np.testing.assert_allclose(alignment.mmd_loss(one, other, kernel), expected, rtol=1e-4)
  # Not what relations are: a rotation of all tokens moves the distribution.
  assert np.all(np.asarray(alignment.mmd_loss(one, one, kernel)) < 1e-6)


def _features(x, t):
  """Tokens of two rows; depends on every channel and on the level."""
  b, f = x.shape[:2]
  return jnp.tanh(x.reshape(b, f, 12, -1) + (t / 1000)[..., None, None])


@pytest.mark.parametrize('kind', alignment.KINDS)
def test_zero_and_without_gradient_where_student_is_reference(kind):
  x, cfg = tiny.latents(0), AlignmentConfig(kind=kind)
  run = jax.value_and_grad(lambda x, r: alignment_loss(_features, x, r, tiny.keys(), cfg).sum())
  value, grad = run(x, x)
  # MMD leaves the rounding of three equal means.
  assert abs(float(value)) < 1e-6 and float(jnp.abs(grad).max()) < 1e-6
  value, grad = run(x, 1.5 * tiny.latents(1))
  assert float(value) > 1e-4 and float(jnp.abs(grad).max()) > 1e-8
  to_reference = jax.grad(lambda r: alignment_loss(_features, x, r, tiny.keys(), cfg).sum())
  assert not np.asarray(to_reference(tiny.latents(1))).any()


def test_both_sides_share_level_and_noise_and_the_whole_is_the_formula():
  x, reference, cfg = tiny.latents(0), tiny.latents(1), AlignmentConfig()
  seen = []

  def features(y, t):
    seen.append((np.asarray(y, np.float64), np.asarray(t)))
    return _features(y, t)

  got = alignment_loss(features, x, reference, tiny.keys(), cfg)
  (one, t), (other, same) = seen
  np.testing.assert_array_equal(t, same)
  assert (t == t[:, :1]).all(), 'one level a clip'
  s = t[:, :, None, None, None].astype(np.float64) / 1000
  noise = (one - (1 - s) * np.asarray(x)) / s
  np.testing.assert_allclose(noise, (other - (1 - s) * np.asarray(reference)) / s, atol=1e-3)
  expected = _relations(_features(one, t), _features(other, t), 0.1)
  np.testing.assert_allclose(got, expected, rtol=1e-4)


def test_levels_of_features():
  keys = flow.example_keys(jax.random.key(0), jnp.arange(20000))
  t = 1000 * np.asarray(alignment.feature_level(keys, AlignmentConfig()))
  u = np.arange(200) / 1000
  expected = np.clip(1000 * 5 * u / (1 + 4 * u), 20, 980)
  assert t.min() >= 19.99 and t.max() < 556
  # Standard error of the mean of 20,000 draws is 1.1.
  assert abs(t.mean() - expected.mean()) < 5


def test_a_sleeping_loss_is_zero_and_computes_nothing_and_an_active_one_is_the_loss():
  calls = []

  def loss(x):
    jax.debug.callback(lambda: calls.append(1))
    return jnp.square(x).sum(axis=(1, 2, 3, 4))

  @jax.jit
  def run(x, active):
    weight = jnp.arange(1.0, 3.0)
    return jax.value_and_grad(lambda x: (weight * alignment.when(active, loss, 2 * x)).sum())(x)

  x = tiny.latents(0)
  value, grad = run(x, False)
  jax.effects_barrier()
  assert float(value) == 0 and not np.asarray(grad).any() and not calls
  value, grad = run(x, True)
  jax.effects_barrier()
  assert len(calls) == 1
  weights = np.array([1.0, 2.0])[:, None, None, None, None]
  np.testing.assert_allclose(value, (weights * 4 * np.square(np.asarray(x))).sum(), rtol=1e-5)
  np.testing.assert_allclose(grad, weights * 8 * np.asarray(x), rtol=1e-5)


@pytest.mark.parametrize(
  ('changes', 'sentence'),
  [
    (dict(kind='x'), 'alignment.kind=x is unknown'),
    (dict(kernel='x'), 'alignment.kernel=x is unknown'),
    (dict(network='x'), 'alignment.network=x is unknown'),
    (dict(t_low=300), 'alignment.t_low=300 must be below alignment.t_high=200'),
  ],
)
def test_unknown_words_are_refused(changes, sentence):
  with pytest.raises(InputError, match=sentence):
    AlignmentConfig(**changes)
