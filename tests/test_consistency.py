"""The consistency term against NumPy float64 by the formula, and the identities of the method."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from salt_jax.diffusion import draws, flow
from salt_jax.errors import InputError
from salt_jax.losses import consistency
from salt_jax.losses.consistency import ConsistencyConfig, consistency_loss
from tests import tiny

SIGMAS = flow.few_step_sigmas(8, 5.0)
# (s, m, e) as indices of the grid of eight.
TRIPLES = [(6, 7, 8), (5, 6, 8), (3, 5, 8), (2, 3, 4), (1, 4, 6)]


def _triple(indices, active=True):
  s, m, e = (jnp.float32(SIGMAS[i]) for i in indices)
  return draws.Triple(s, m, e, jnp.bool_(active))


def _curved(theta, x, sigma, xp=jnp):
  """A velocity that bends along the path; `xp` is the arithmetic it is computed in."""
  return theta * xp.tanh(x) + 0.3 * x * sigma + 0.1 * theta * sigma


def _loss(theta, x, triple, cfg):
  v = _curved(theta, x, triple.start)
  return consistency_loss(lambda y, sigma: _curved(theta, y, sigma), x, v, triple, cfg)


def _oracle(theta, x, indices):
  """Equation (4) of salt_method.md 2.2 in float64: (loss a clip, derivative of its mean in theta, defect)."""
  x, (s, m, e) = np.asarray(x, np.float64), (SIGMAS[i] for i in indices)
  v1 = _curved(theta, x, s, np)
  x_m = x - (s - m) * v1
  target = x_m - (m - e) * _curved(theta, x_m, m, np)
  pred = x - (s - e) * v1
  axes = (1, 2, 3, 4)
  loss = (1 - s) * np.square(pred - target).mean(axes)
  dv1 = np.tanh(x) + 0.1 * s
  grad = (1 - s) * (2 * (pred - target) * -(s - e) * dv1).mean()
  norm = lambda y: np.sqrt(np.square(y).sum(axes))  # noqa: E731
  return loss, grad, norm(pred - target) / norm(pred - x)


@pytest.mark.parametrize('indices', TRIPLES)
def test_released_form_and_its_gradient(indices):
  x, theta, cfg = tiny.latents(0), 0.7, ConsistencyConfig()
  triple = _triple(indices)
  value, aux = _loss(theta, x, triple, cfg)
  grad = jax.grad(lambda th: _loss(th, x, triple, cfg)[0].mean())(theta)
  loss, expected, defect = _oracle(theta, x, indices)
  # float32 differences of nearly equal endpoints.
  np.testing.assert_allclose(value, loss, rtol=2e-4)
  np.testing.assert_allclose(grad, expected, rtol=2e-4)
  np.testing.assert_allclose(aux['consistency_defect'], defect, rtol=2e-4)


@pytest.mark.parametrize('indices', TRIPLES)
def test_gradient_is_that_of_the_x0_form_with_kappa(indices):
  """salt_method.md 2.5: kappa = (m - e) / m x (s - e) / s, written out here anew."""
  x, theta = tiny.latents(1), 0.7
  triple = _triple(indices)
  s, m, e = (SIGMAS[i] for i in indices)
  kappa = (m - e) / m * (s - e) / s

  def x0_form(th):
    v1 = _curved(th, x, triple.start)
    x_m = x - (triple.start - triple.middle) * jax.lax.stop_gradient(v1)
    aim = x_m - triple.middle * _curved(0.7, x_m, triple.middle)
    student = x - triple.start * v1
    return (1 - s) * kappa * jnp.square(student - jax.lax.stop_gradient(aim)).mean()

  expected = jax.grad(x0_form)(theta)
  for form in ('endpoint', 'x0'):
    cfg = ConsistencyConfig(form=form)
    grad = jax.grad(lambda th, cfg=cfg: _loss(th, x, triple, cfg)[0].mean())(theta)
    np.testing.assert_allclose(grad, expected, rtol=1e-3)


@pytest.mark.parametrize('stop', consistency.STOPS)
def test_velocity_form_is_the_endpoint_form_over_the_squared_step(stop):
  """Its gradient too, wherever it stops."""
  x = tiny.latents(0)

  @functools.partial(jax.jit, static_argnums=2)
  @functools.partial(jax.value_and_grad, argnums=0)
  def run(theta, triple, form):
    return _loss(theta, x, triple, ConsistencyConfig(form=form, stop_grad=stop))[0].mean()

  for indices in TRIPLES:
    (endpoint, slope), (speed, steep) = (
      run(0.7, _triple(indices), form) for form in ('endpoint', 'velocity')
    )
    long = SIGMAS[indices[0]] - SIGMAS[indices[2]]
    np.testing.assert_allclose(speed * long**2, endpoint, rtol=1e-3)
    np.testing.assert_allclose(steep * long**2, slope, rtol=1e-3)


def test_a_straight_flow_has_no_defect():
  x = tiny.latents(0)
  constant = tiny.latents(1)
  for indices in TRIPLES:
    loss, aux = consistency_loss(
      lambda y, sigma: constant, x, constant, _triple(indices), ConsistencyConfig()
    )
    # Rounding of two short steps against one long one.
    assert float(loss.max()) < 1e-12 and float(aux['consistency_defect'].max()) < 1e-6


def test_which_way_the_gradient_goes():
  """Derivatives in three places: the first pass of the direct way, of the composed way, and the second pass."""
  x, triple = tiny.latents(2), _triple((5, 6, 8))

  def loss(direct, second, cfg):
    v = _curved(direct, x, triple.start)
    again = lambda y, sigma: _curved(second, y, sigma)  # noqa: E731
    return consistency_loss(again, x, v, triple, cfg)[0].mean()

  s, m, e = (SIGMAS[i] for i in (5, 6, 8))
  x64 = np.asarray(x, np.float64)
  v1 = _curved(0.7, x64, s, np)
  x_m = x64 - (s - m) * v1
  error = (x64 - (s - e) * v1) - (x_m - (m - e) * _curved(0.7, x_m, m, np))
  dv1, dv2 = np.tanh(x64) + 0.1 * s, np.tanh(x_m) + 0.1 * m
  slope = 0.7 / np.cosh(x_m) ** 2 + 0.3 * m  # of the second velocity in its input
  through_middle = {
    'composed': 0.0,
    'inner_live': -(s - m) * dv1,
    'none': -(s - m) * dv1 * (1 - (m - e) * slope),
  }
  for stop, inner in through_middle.items():
    cfg = ConsistencyConfig(stop_grad=stop)
    one, two = jax.grad(loss, argnums=(0, 1))(0.7, 0.7, cfg)
    expected = (1 - s) * (2 * error * (-(s - e) * dv1 - inner)).mean()
    np.testing.assert_allclose(one, expected, rtol=1e-3, err_msg=stop)
    second = (1 - s) * (2 * error * (m - e) * dv2).mean() if stop == 'none' else 0.0
    np.testing.assert_allclose(two, second, rtol=1e-3, atol=1e-12, err_msg=stop)


@pytest.mark.parametrize(('weight', 'power'), [('none', 0), ('linear', 1), ('square', 2)])
def test_weights(weight, power):
  x, triple = tiny.latents(0), _triple((3, 5, 8))
  plain, _ = _loss(0.7, x, triple, ConsistencyConfig(weight='none'))
  loss, _ = _loss(0.7, x, triple, ConsistencyConfig(weight=weight))
  np.testing.assert_allclose(loss, plain * (1 - SIGMAS[3]) ** power, rtol=1e-5)


@pytest.mark.parametrize('form', consistency.FORMS)
def test_an_inactive_term_is_zero_has_no_gradient_and_runs_no_pass(form):
  calls = []

  def loss(theta, active, indices):
    x, triple = tiny.latents(0), _triple(indices, active)

    def again(y, sigma):
      jax.debug.callback(lambda: calls.append(1))
      return _curved(theta, y, sigma)

    v = _curved(theta, x, triple.start)
    return consistency_loss(again, x, v, triple, ConsistencyConfig(form=form))[0].sum()

  run = jax.jit(jax.value_and_grad(loss), static_argnums=2)
  # The last two are degenerate, as exits without a triple leave them in the tables.
  for indices in ((5, 6, 8), (7, 8, 0), (0, 1, 0)):
    value, grad = run(0.7, False, indices)
    jax.effects_barrier()
    assert float(value) == 0 and float(grad) == 0 and not calls
  value, grad = run(0.7, True, (5, 6, 8))
  jax.effects_barrier()
  assert float(value) > 0 and float(grad) != 0 and len(calls) == 1


def test_ramp_is_half_a_cosine():
  assert float(consistency.ramp(jnp.int32(5), 0)) == 1
  got = [float(consistency.ramp(jnp.int32(n), 600)) for n in (0, 150, 300, 600, 900)]
  np.testing.assert_allclose(got, [0, 0.5 - 0.5 * np.cos(np.pi / 4), 0.5, 1, 1], atol=1e-6)


@pytest.mark.parametrize('field', ['form', 'stop_grad', 'weight', 'target'])
def test_unknown_words_are_refused(field):
  with pytest.raises(InputError, match=f'consistency.{field}=x is unknown'):
    ConsistencyConfig(**{field: 'x'})
