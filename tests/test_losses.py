"""DMD, critic, flow-matching and ODE losses against NumPy float64 written from the equations."""

import jax
import jax.numpy as jnp
import numpy as np

from salt_jax.diffusion import flow
from salt_jax.losses import dmd, regression
from tests import tiny

CFG = dmd.DMDConfig()


def _linear(seed):
  """A model whose output can be recomputed by hand: depends on x, on the frame's t and on the text."""
  a, b = np.random.default_rng(seed).uniform(0.5, 1.5, 2)

  def model(x, t, text):
    assert t.shape == x.shape[:2]
    return (
      a * x
      + b * (t / 1000)[..., None, None, None]
      + text.mean(axis=(1, 2))[:, None, None, None, None]
    )

  return model


def _noised(x, keys):
  """Level and noise that the losses draw; their distribution has tests of its own."""
  noisy, eps, sigma, t = dmd._noised(x, keys, CFG)
  return (np.asarray(y, np.float64) for y in (noisy, eps, sigma, t))


def test_dmd_loss_and_gradient_by_the_formula():
  x, cond, uncond, keys = tiny.latents(0), tiny.text(1), tiny.text(2), tiny.keys()
  teacher, critic = _linear(0), _linear(1)
  fns = dmd.Fns(teacher=teacher, critic=critic)
  (loss, aux), grad = jax.value_and_grad(
    lambda x: (lambda out: (out[0].mean(), out))(dmd.dmd_loss(fns, x, (cond, uncond), keys, CFG)),
    has_aux=True,
  )(x)
  per_example, aux = aux

  x64 = np.asarray(x, np.float64)
  noisy, eps, sigma, t = _noised(x, keys)
  s = sigma[:, None, None, None, None]
  np.testing.assert_allclose(noisy, (1 - s) * x64 + s * eps, atol=1e-6)
  c = noisy - s * teacher(noisy, t, np.asarray(cond, np.float64))
  u = noisy - s * teacher(noisy, t, np.asarray(uncond, np.float64))
  real = c + 3.0 * (c - u)
  fake = noisy - s * critic(noisy, t, np.asarray(cond, np.float64))
  g = (fake - real) / np.abs(x64 - real).mean(axis=(1, 2, 3, 4), keepdims=True)
  np.testing.assert_allclose(per_example, 0.5 * np.square(g).mean(axis=(1, 2, 3, 4)), rtol=1e-4)
  # The identity of the method: dL/dx is g over the number of elements, whatever the networks.
  np.testing.assert_allclose(grad, g / g.size, rtol=1e-3, atol=1e-9)
  np.testing.assert_allclose(aux['dmd_gradient'], np.abs(g).mean(axis=(1, 2, 3, 4)), rtol=1e-4)
  for name, score in (('real', real), ('fake', fake)):
    expected = np.abs(x64 - score).mean(axis=(1, 2, 3, 4))
    np.testing.assert_allclose(aux[f'dmd_{name}'], expected, rtol=1e-4)


MASK = np.array([False, True, True, False, True, True])


def test_masked_losses_by_the_formula():
  """Networks see the whole clip; losses, gradient and normaliser know the frames of the mask alone."""
  x, cond, uncond, keys = tiny.latents(0), tiny.text(1), tiny.text(2), tiny.keys()
  teacher, critic = _linear(0), _linear(1)

  def mean_loss(x):
    per_example, aux = dmd.dmd_loss(
      dmd.Fns(teacher, critic), x, (cond, uncond), keys, CFG, jnp.asarray(MASK)
    )
    return per_example.mean(), (per_example, aux)

  (_, (per_example, aux)), grad = jax.value_and_grad(mean_loss, has_aux=True)(x)
  x64, axes = np.asarray(x, np.float64), (1, 2, 3, 4)
  noisy, eps, sigma, t = _noised(x, keys)
  s = sigma[:, None, None, None, None]
  c, u = (noisy - s * teacher(noisy, t, np.asarray(y, np.float64)) for y in (cond, uncond))
  real, fake = c + 3.0 * (c - u), noisy - s * critic(noisy, t, np.asarray(cond, np.float64))
  scale = np.abs(x64 - real)[:, MASK].mean(axis=axes, keepdims=True)
  g = (fake - real) / scale
  np.testing.assert_allclose(per_example, 0.5 * np.square(g[:, MASK]).mean(axis=axes), rtol=1e-4)
  expected = np.where(MASK[None, :, None, None, None], g / g[:, MASK].size, 0)
  np.testing.assert_allclose(grad, expected, rtol=1e-3, atol=1e-9)
  np.testing.assert_allclose(aux['dmd_real'], scale[:, 0, 0, 0, 0], rtol=1e-4)

  per_example, _ = dmd.critic_loss(critic, x, cond, keys, CFG, jnp.asarray(MASK))
  error = (critic(noisy, t, np.asarray(cond, np.float64)) - (eps - x64))[:, MASK]
  np.testing.assert_allclose(per_example, np.square(error).mean(axis=axes), rtol=1e-4)


def test_dmd_gradient_is_zero_where_the_scores_agree_and_finite_at_zero_over_zero():
  x, real = tiny.latents(0), tiny.latents(1)
  assert not np.asarray(dmd.dmd_gradient(x, real, real)).any()
  assert not np.asarray(dmd.dmd_gradient(x, x, x)).any()


def test_the_normaliser_is_one_a_clip():
  x, real, fake = tiny.latents(0), tiny.latents(1), tiny.latents(2)
  both = dmd.dmd_gradient(x, real, fake)
  alone = dmd.dmd_gradient(x[1:], real[1:], fake[1:])
  # A mean over another layout: float32 rounding.
  np.testing.assert_allclose(both[1:], alone, rtol=1e-5)


def test_score_levels_are_shifted_clamped_and_shared_by_the_frames():
  keys = flow.example_keys(jax.random.key(0), jnp.arange(20000))
  t = 1000 * np.asarray(dmd.score_level(keys, CFG))
  t = t.astype(np.float32).round(3)
  assert t.min() == 20 and t.max() == 980
  u = np.arange(1000) / 1000
  expected = np.clip(1000 * 5 * u / (1 + 4 * u), 20, 980)
  # Standard error of the mean of 20,000 draws is 1.6.
  np.testing.assert_allclose(t.mean(), expected.mean(), atol=6)
  np.testing.assert_allclose((t == 980).mean(), (expected == 980).mean(), atol=0.01)


def test_critic_loss_by_the_formula_and_without_gradient_to_the_student():
  x, text, keys = tiny.latents(0), tiny.text(1), tiny.keys()
  critic = _linear(2)
  per_example, _ = dmd.critic_loss(critic, x, text, keys, CFG)
  noisy, eps, _, t = _noised(x, keys)
  error = critic(noisy, t, np.asarray(text, np.float64)) - (eps - np.asarray(x, np.float64))
  np.testing.assert_allclose(per_example, np.square(error).mean(axis=(1, 2, 3, 4)), rtol=1e-4)
  grad = jax.grad(lambda x: dmd.critic_loss(critic, x, text, keys, CFG)[0].sum())(x)
  assert not np.asarray(grad).any()


def test_flow_matching_is_zero_for_the_true_velocity():
  x, text, keys = tiny.latents(0), tiny.text(1), tiny.keys()
  # Knowing x0, the velocity (x_t - x0) / sigma is exact.
  model = lambda xt, t, text: (xt - x) / (t / 1000)[..., None, None, None]  # noqa: E731
  loss, aux = regression.flow_matching_loss(model, x, text, keys, 3.0)
  # Division by the smallest sigma amplifies float32 rounding.
  np.testing.assert_allclose(loss, 0.0, atol=1e-6)
  assert (np.asarray(aux['flow_sigma']) > 0).all()
  zero, _ = regression.flow_matching_loss(lambda x, t, text: 0 * x, x, text, keys, 3.0)
  assert (np.asarray(zero) > 1.5).all(), 'eps - x0 of unit variances has variance 2'


def test_ode_loss_takes_a_level_a_chunk_and_aims_at_the_end():
  sigmas = jnp.asarray(flow.few_step_sigmas(4, 5.0), jnp.float32)
  trajectory = jnp.stack([tiny.latents(i) for i in range(5)], axis=1)
  seen = {}

  def model(x, t, text):
    seen['x'], seen['t'] = np.asarray(x), np.asarray(t)
    return jnp.zeros_like(x)

  loss, _ = regression.ode_loss(
    model, trajectory, tiny.text(), tiny.keys(), sigmas, chunk=tiny.CHUNK
  )
  levels = (1000 * np.asarray(sigmas)).tolist()
  index = np.array([[levels.index(t) for t in row] for row in seen['t']])
  assert (index < 4).all(), 'the clean end is a target, never an input'
  assert (index[:, 0::2] == index[:, 1::2]).all(), 'frames of a chunk share a level'
  chosen = np.stack(
    [[trajectory[b, index[b, f], f] for f in range(tiny.FRAMES)] for b in range(tiny.BATCH)]
  )
  np.testing.assert_array_equal(seen['x'], chosen)
  expected = np.square(chosen - np.asarray(trajectory[:, -1])).mean(axis=(1, 2, 3, 4))
  np.testing.assert_allclose(loss, expected, rtol=1e-5)


def test_ode_levels_are_uniform_over_the_schedule():
  keys = flow.example_keys(jax.random.key(1), jnp.arange(64))
  sigmas = jnp.asarray(flow.few_step_sigmas(4, 5.0), jnp.float32)
  trajectory = jnp.broadcast_to(sigmas[None, :, None, None, None, None], (64, 5, 6, 1, 1, 1))
  drawn = []
  regression.ode_loss(
    lambda x, t, text: drawn.append(np.asarray(t)) or x, trajectory, None, keys, sigmas, chunk=2
  )
  values, counts = np.unique(drawn[0][:, ::2], return_counts=True)
  # 192 draws over four levels: 48 each, standard deviation 6.
  assert len(values) == 4 and counts.min() > 24, counts
