"""The schedule and the conversions, against float64 and against golden numbers."""

import jax
import jax.numpy as jnp
import numpy as np

from salt_jax.diffusion import flow


def _random(seed, shape=(2, 3, 4)):
  return np.random.default_rng(seed).standard_normal(shape)


def test_conversions_undo_each_other():
  x0, eps = _random(0), _random(1)
  sigma = np.array([0.02, 0.98])
  x = flow.add_noise(jnp.asarray(x0), jnp.asarray(eps), sigma)
  v = flow.velocity_from_x0(x, x0, sigma)
  # float32 rounding of x is amplified by 1 / sigma = 50.
  np.testing.assert_allclose(v, eps - x0, atol=3e-5)
  np.testing.assert_allclose(flow.x0_from_velocity(x, eps - x0, sigma), x0, atol=1e-6)


def test_euler_to_zero_is_the_clean_prediction_and_steps_compose():
  x, v = _random(2), _random(3)
  np.testing.assert_array_equal(flow.euler(x, v, 0.7, 0.0), flow.x0_from_velocity(x, v, 0.7))
  once = flow.euler(x, v, 0.9, 0.2)
  twice = flow.euler(flow.euler(x, v, 0.9, 0.5), v, 0.5, 0.2)
  np.testing.assert_allclose(once, twice, atol=1e-6)


def test_noise_stays_float32_whatever_comes_in():
  half = jnp.ones((2, 3), jnp.bfloat16)
  for out in (flow.add_noise(half, half, 0.3), flow.x0_from_velocity(half, half, 0.3)):
    assert out.dtype == jnp.float32, 'bfloat16 latents lose what 2 to 4 steps need'


def test_golden_levels_of_the_few_step_schedules():
  message = 'warped labels of Self-Forcing at shift 5; feeding 1000/750/500/250 unwarped gives mush'
  t = 1000 * flow.few_step_sigmas(4, 5.0)
  np.testing.assert_allclose(t, [1000, 937.5, 833.3333333, 625, 0], atol=1e-6, err_msg=message)
  t8 = 1000 * flow.few_step_sigmas(8, 5.0)
  wanted = [1000, 972.2222, 937.5, 892.8571, 833.3333, 750, 625, 416.6667, 0]
  np.testing.assert_allclose(t8, wanted, atol=1e-4, err_msg=message)
  assert set(np.round(t, 6)) <= set(np.round(t8, 6)), 'coarser schedules are subsets of denser ones'
  np.testing.assert_allclose(1000 * flow.few_step_sigmas(48, 5.0)[::12], t, atol=1e-9)


def test_padded_levels_have_one_shape_and_end_in_zeros():
  table = [flow.padded_sigmas(k, 5.0, 9) for k in (2, 4, 8)]
  assert {row.shape for row in table} == {(9,)} and {row.dtype for row in table} == {
    np.dtype('float32')
  }
  assert not table[0][2:].any() and not table[1][4:].any()


def test_the_two_guidance_conventions_differ_by_one():
  c, u = _random(4), _random(5)
  np.testing.assert_allclose(flow.guide_on_top(c, u, 3.0), flow.guide(c, u, 4.0), atol=1e-12)


def test_noise_depends_on_example_frame_and_draw_alone():
  keys = flow.example_keys(jax.random.key(0), jnp.arange(3))
  whole = flow.frame_noise(keys, jnp.arange(6), 0, (2, 2, 4))
  part = flow.frame_noise(keys[1:], jnp.arange(3, 6), 0, (2, 2, 4))
  np.testing.assert_array_equal(whole[1:, 3:], part)
  other = flow.frame_noise(keys, jnp.arange(6), 1, (2, 2, 4))
  flat = np.concatenate([np.ravel(whole), np.ravel(other)])
  assert len(np.unique(flat)) == flat.size, 'two places share their noise'
