"""Losses of Causal Forcing's initial stages against NumPy float64 written from the equations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from salt_jax.diffusion import flow
from salt_jax.losses import causal
from tests import tiny

FRAMES, CHUNK = tiny.FRAMES, tiny.CHUNK


class Linear:
  """A model that can be recomputed by hand, of all it is given; it keeps its last arguments."""

  def __init__(self, seed):
    self.factors = np.random.default_rng(seed).uniform(0.5, 1.5, 4)
    self.seen = None

  def __call__(self, x, t, text, clean, clean_t):
    assert t.shape == clean_t.shape == x.shape[:2] and clean.shape == x.shape
    assert t.dtype in (jnp.float32, np.float64), 'bfloat16 timesteps collapse the grid'
    self.seen = [np.asarray(y, np.float64) for y in (x, t, text, clean, clean_t)]
    a, b, c, d = self.factors
    per_frame = (b * t + d * clean_t) / 1000
    row = 40 * text.mean(axis=(1, 2))[:, None, None, None, None]
    return a * x + c * clean + per_frame[..., None, None, None] + row


def _wide(sigma):
  return sigma[..., None, None, None]


@pytest.mark.parametrize(
  'shift, golden',
  [
    (5.0, {0: 0, 1: 0.001281, 100: 0.139075, 250: 0.397952, 500: 1.024862, 750: 1.914043, 833: 2.0764,
           900: 1.865346, 990: 0.306796, 998: 0.063499, 999: 0.031879}),
    (8.0, {0: 0, 1: 0.000954, 100: 0.104399, 250: 0.304258, 500: 0.832399, 750: 1.855831, 889: 2.47261,
           900: 2.461748, 990: 0.565555, 998: 0.120244, 999: 0.060555}),
  ],
)  # fmt: skip
def test_golden_weights_of_the_levels(shift, golden):
  """Table 1.1 of self_forcing.md, to its last digit."""
  grid = flow.shifted(1 - np.arange(1000) / 1000, shift)
  weights = np.asarray(flow.training_weight(grid, shift), np.float64)
  for i, value in golden.items():
    assert weights[i] == pytest.approx(value, abs=6e-7), f'index {i} at shift {shift}'
  np.testing.assert_allclose(weights.mean(), 1.0, rtol=1e-6)
  y = np.exp(-2 * ((1000 * grid - 500) / 1000) ** 2)
  y -= y.min()
  # float32 levels next to 1 are known to 6e-8, and w is 8 there per unit of 1 - sigma.
  np.testing.assert_allclose(weights, y / y.mean(), rtol=1e-6, atol=5e-7)


def test_levels_are_one_a_chunk_and_uniform_under_the_shift():
  keys = flow.example_keys(jax.random.key(0), jnp.arange(4000))
  sigma = causal.chunk_levels(keys, FRAMES, CHUNK, 5.0)
  assert sigma.dtype == jnp.float32 and sigma.shape == (4000, FRAMES)
  sigma = np.asarray(sigma, np.float64)
  np.testing.assert_array_equal(sigma[:, 0::2], sigma[:, 1::2])
  chunks = sigma[:, ::2]
  u = chunks / (5 - 4 * chunks)
  np.testing.assert_allclose(1000 * u, np.round(1000 * u), atol=1e-2)
  # 12,000 draws of deviation 0.289: the mean is known to 0.0026; shares of a tenth to 0.0027.
  np.testing.assert_allclose(u.mean(), 0.4995, atol=0.011)
  np.testing.assert_allclose(np.histogram(u, 10, (0, 1))[0] / u.size, 0.1, atol=0.013)
  # Independent chunks: correlations of 4,000 pairs are known to 0.016.
  assert np.abs(np.corrcoef(u.T) - np.eye(3)).max() < 0.07


def test_noise_on_the_clean_clip_stays_at_low_levels():
  keys = flow.example_keys(jax.random.key(0), jnp.arange(4000))
  sigma = np.asarray(causal.chunk_levels(keys, FRAMES, CHUNK, 5.0, 0.2))
  assert sigma.max() <= 0.2 and sigma.max() > 0.18 and sigma.min() == 0
  assert not np.asarray(causal.chunk_levels(keys, FRAMES, CHUNK, 5.0, 0.0)).any()


@pytest.mark.parametrize('noise', [0.0, 0.3])
def test_causal_flow_matching_by_the_formula(noise):
  x0, text, keys, model = tiny.latents(0), tiny.text(1), tiny.keys(), Linear(0)
  cfg = causal.ForcingConfig(noise=noise)
  loss, aux = causal.causal_flow_loss(model, x0, text, keys, cfg, chunk=CHUNK, shift=5.0)
  x, t, text64, clean, clean_t = model.seen
  sigma, x0 = t / 1000, np.asarray(x0, np.float64)
  assert (sigma > 0).all() and (sigma[:, 0] != sigma[:, -1]).all()
  eps = (x - (1 - _wide(sigma)) * x0) / _wide(sigma)
  np.testing.assert_allclose([eps.mean(), eps.std()], [0, 1], atol=0.05)
  if noise:
    assert 0 < clean_t.max() <= 1000 * noise
    added = (clean - (1 - _wide(clean_t / 1000)) * x0)[clean_t > 0] / _wide(clean_t / 1000)[
      clean_t > 0
    ]
    np.testing.assert_allclose([added.mean(), added.std()], [0, 1], atol=0.1)
  else:
    assert not clean_t.any()
    np.testing.assert_array_equal(clean, x0)
  error = np.square(model(x, t, text64, clean, clean_t) - (eps - x0)).mean(axis=(2, 3, 4))
  y = np.exp(-2 * (sigma - 0.5) ** 2) - np.exp(-0.5)
  grid = flow.shifted(1 - np.arange(1000) / 1000, 5.0)
  mean = (np.exp(-2 * (grid - 0.5) ** 2) - np.exp(-0.5)).mean()
  # eps is recovered by a division by sigma.
  np.testing.assert_allclose(loss, (y / mean * error).mean(axis=1), rtol=1e-4)
  np.testing.assert_allclose(aux['flow_error'], error.mean(axis=1), rtol=1e-4)


def test_causal_ode_takes_one_level_a_clip_and_aims_at_the_end_behind_the_clean_clip():
  sigmas = jnp.asarray(flow.few_step_sigmas(4, 5.0), jnp.float32)
  keys = flow.example_keys(jax.random.key(1), jnp.arange(64))
  record = jax.random.normal(jax.random.key(2), (64, 6, FRAMES, 2, 2, 3))
  model = Linear(1)
  text = jax.random.normal(jax.random.key(3), (64, 2, 4))
  loss, _ = causal.causal_ode_loss(model, record, text, keys, sigmas)
  x, t, text64, clean, clean_t = model.seen
  record = np.asarray(record, np.float64)
  np.testing.assert_array_equal(clean, record[:, 5], err_msg='chunks look back at the real clip')
  assert not clean_t.any() and (t == t[:, :1]).all(), 'one level for the whole clip'
  levels = (1000 * np.asarray(sigmas)).tolist()
  index = np.array([levels.index(value) for value in t[:, 0]])
  # 64 draws over four levels: 16 each, deviation 3.5.
  assert np.bincount(index, minlength=4).min() > 3 and index.max() == 3
  np.testing.assert_array_equal(x, record[np.arange(64), index])
  x0 = x - _wide(t / 1000) * model(x, t, text64, clean, clean_t)
  expected = np.square(x0 - record[:, 4]).mean(axis=(1, 2, 3, 4))
  np.testing.assert_allclose(loss, expected, rtol=1e-5)


CFG = causal.CausalConsistencyConfig(steps=48, guidance=3.0)


def _consistency(fns, x0, keys):
  texts = tiny.text(1), tiny.text(2)
  return causal.causal_consistency_loss(fns, x0, texts, keys, CFG, 5.0), texts


def test_causal_consistency_by_the_formula():
  x0, keys = tiny.latents(0), tiny.keys()
  student, target, teacher = fns = causal.Fns(Linear(0), Linear(1), Linear(2))
  (loss, _), texts = _consistency(fns, x0, keys)
  cond, uncond = (np.asarray(y, np.float64) for y in texts)
  x0 = np.asarray(x0, np.float64)
  x, t, seen, clean, clean_t = student.seen
  assert (t == t[:, :1]).all(), 'one level for the whole clip'
  grid = 5 * (1 - np.arange(48) / 48) / (1 + 4 * (1 - np.arange(48) / 48))
  i = np.abs(t[:, :1] / 1000 - grid).argmin(1)
  here, below = grid[i][:, None], grid[i + 1][:, None]
  np.testing.assert_allclose(t, 1000 * here + 0 * t, rtol=1e-6)
  eps = (x - (1 - _wide(here)) * x0) / _wide(here)
  np.testing.assert_allclose([eps.mean(), eps.std()], [0, 1], atol=0.05)
  for fn, text in ((student, cond), (target, cond), (teacher, np.concatenate([cond, uncond]))):
    np.testing.assert_array_equal(fn.seen[2], text)
    np.testing.assert_array_equal(fn.seen[3], np.concatenate([x0, x0])[: len(text)])
    assert not fn.seen[4].any(), 'all look back at the clean clip'
  c, u = (teacher(x, t, text, clean, clean_t) for text in (cond, uncond))
  lower = x + _wide(below - here) * (u + 3.0 * (c - u))
  assert np.abs(c - u).max() > 0.5, 'the prompts make no difference here'
  np.testing.assert_allclose(target.seen[0], lower, atol=2e-6)
  aim = lower - _wide(below) * target(lower, 1000 * below + 0 * t, cond, clean, clean_t)
  got = x - _wide(here) * student(x, t, cond, clean, clean_t)
  np.testing.assert_allclose(loss, np.square(got - aim).mean(axis=(1, 2, 3, 4)), rtol=1e-4)


def test_consistency_passes_a_gradient_to_the_student_alone():
  x0, keys = tiny.latents(0), tiny.keys()

  def loss(factors):
    fns = causal.Fns(*(lambda x, t, text, clean, clean_t, f=f: f * x for f in factors))
    return _consistency(fns, x0, keys)[0][0].sum()

  grads = jax.grad(loss)(jnp.array([0.5, 0.6, 0.7]))
  assert grads[0] != 0 and not np.asarray(grads[1:]).any()


def test_consistency_is_zero_on_the_exact_flow():
  """All clips of the data are x0, so x0_hat is x0 from every level for whoever knows it."""
  x0, keys = tiny.latents(0), tiny.keys()

  def exact(x, t, text, clean, clean_t):
    return (x - clean) / (t / 1000)[..., None, None, None]

  loss = _consistency(causal.Fns(exact, exact, exact), x0, keys)[0][0]
  # float32 rounding of latents of order one.
  np.testing.assert_allclose(loss, 0, atol=1e-11)


def test_consistency_levels_are_uniform_and_stop_before_the_last():
  keys = flow.example_keys(jax.random.key(4), jnp.arange(4700))
  x0 = jnp.ones((4700, 1, 1, 1, 1))
  zero = lambda x, t, text, clean, clean_t: 0 * x  # noqa: E731
  texts = (jnp.zeros((4700, 1, 1)),) * 2
  _, aux = causal.causal_consistency_loss(causal.Fns(zero, zero, zero), x0, texts, keys, CFG, 5.0)
  grid = np.asarray(flow.few_step_sigmas(48, 5.0), np.float32)
  values, counts = np.unique(np.asarray(aux['consistency_sigma']), return_counts=True)
  np.testing.assert_array_equal(values[::-1], grid[:47])
  # 100 draws each, deviation 10.
  assert counts.min() > 55 and counts.max() < 150
