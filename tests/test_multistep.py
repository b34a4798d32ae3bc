"""UniPC, DPM++ and Euler: golden grids, diffusers step by step, and the order of convergence."""

import functools

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from salt_jax.diffusion import flow, multistep, solvers
from tests import tiny

SHAPE = (1, 2, 3, 4, 5)
OPTIONS = dict(prediction_type='flow_prediction', use_flow_sigmas=True, solver_order=2)


# wan.md 5.1, 5.2: measured on the original.
@pytest.mark.parametrize(
  'solver, steps, shift, first, last',
  [
    ('unipc', 50, 5.0, [999, 995, 991, 987, 982, 978], [302, 241, 172, 92]),
    ('unipc', 50, 3.0, [999, 992, 985, 978, 971, 963], [206, 160, 111, 57]),
    ('unipc', 40, 3.0, [999, 991, 982, 973, 963, 954], [249, 195, 136, 71]),
    ('unipc', 40, 5.0, [999, 994, 989, 983], [356, 288, 208, 113]),
    ('unipc', 50, 16.0, [999, 998, 997, 995], [581, 504, 399, 245]),
    ('euler', 50, 5.0, [999, 995, 991, 987, 982, 978], [302, 241, 172, 92]),
    ('dpmpp', 5, 3.0, [1000, 923, 818, 666, 428], [428]),
  ],
)
def test_golden_timesteps(solver, steps, shift, first, last):
  table = multistep.table(solver, steps, shift)
  assert table.t.tolist()[: len(first)] == first and table.t.tolist()[-len(last) :] == last
  assert len(table.t) == steps and all(np.isfinite(a).all() for a in table)
  # t is cut to a whole number; the levels of the conversions are not.
  assert (1000 * table.sigma - table.t >= -1e-4).all() and (table.t + 1 > 1000 * table.sigma).all()
  np.testing.assert_array_equal(table.sigma, table.sigma.astype(np.float32))


# wan.md 5.1, 5.2: x = 1, v = x / 2 - t / 10000; the states behind each step.
@pytest.mark.parametrize(
  'solver, steps, shift, states',
  [
    ('unipc', 5, 3.0, [0.969214, 0.928360, 0.871434, 0.785948, 0.635980]),
    (
      'unipc',
      8,
      5.0,
      [0.988880, 0.975125, 0.957639, 0.934592, 0.902875, 0.856425, 0.782051, 0.636554],
    ),
    ('dpmpp', 5, 3.0, [0.969231, 0.928079, 0.870795, 0.785058, 0.635174]),
  ],
)
def test_golden_states(solver, steps, shift, states):
  table = multistep.table(solver, steps, shift)
  got = [
    multistep.solve(
      lambda x, t: 0.5 * x - 0.0001 * t,
      jnp.ones(SHAPE),
      multistep.Table(*(column[:n] for column in table)),
    )
    for n in range(1, steps + 1)
  ]
  # The vectors have six decimals.
  np.testing.assert_allclose([float(x.mean()) for x in got], states, atol=2e-6)


def _ours(table, fields, noise, dtype):
  """Equations (1) to (3) in NumPy, one state a step."""
  x = accepted = noise.astype(dtype)
  m1 = m2 = np.zeros_like(x)
  rows = [column.astype(dtype) for column in table]
  states = []
  for i, v in enumerate(fields):
    m = x - rows[1][i] * v.astype(dtype)
    accepted = sum(w * term for w, term in zip(rows[2][i], (x, accepted, m, m1, m2), strict=True))
    x = sum(w * term for w, term in zip(rows[3][i], (accepted, m, m1), strict=True))
    m1, m2 = m, m1
    states.append(x)
  return states


def _theirs(scheduler, levels, fields, noise):
  """diffusers' states on our levels."""
  scheduler.set_timesteps(len(fields))
  scheduler.sigmas = torch.as_tensor(levels)
  scheduler.timesteps = torch.arange(len(fields), 0, -1).float()
  x, states = torch.as_tensor(noise), []
  for t, v in zip(scheduler.timesteps, fields, strict=True):
    x = scheduler.step(torch.as_tensor(v), t, x).prev_sample
    states.append(x.numpy())
  return states


SCHEDULERS = {
  'unipc': lambda: diffusers.UniPCMultistepScheduler(**OPTIONS, solver_type='bh2'),
  'dpmpp': lambda: diffusers.DPMSolverMultistepScheduler(
    **OPTIONS, algorithm_type='dpmsolver++', solver_type='midpoint'
  ),
  'euler': lambda: diffusers.FlowMatchEulerDiscreteScheduler(),
}


@pytest.mark.parametrize('steps', [1, 2, 3, 10, 20])
@pytest.mark.parametrize(
  'solver, dtype, tolerance',
  [
    ('unipc', np.float64, 1e-9),
    ('unipc', np.float32, 2e-5),
    ('dpmpp', np.float32, 2e-5),
    ('euler', np.float32, 2e-5),
  ],
)
def test_every_step_is_diffusers(solver, dtype, tolerance, steps):
  """Random outputs, larger than a model's: an error in any weight shows at once.

  In float32 the orders of summation differ; diffusers' DPM++ and Euler compute in nothing better.
  """
  rng = np.random.default_rng(steps)
  noise, *fields = (rng.standard_normal(SHAPE).astype(dtype) for _ in range(steps + 1))
  levels = multistep.sigmas(solver, steps, 3.0).astype(dtype)
  states = _theirs(SCHEDULERS[solver](), levels, fields, noise)
  table = multistep.on_levels(solver, levels)
  for got, expected in zip(_ours(table, fields, noise, dtype), states, strict=True):
    np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize('solver', multistep.SOLVERS)
def test_the_compiled_solver_is_its_equations(solver):
  rng = np.random.default_rng(0)
  noise, *fields = rng.standard_normal((8, *SHAPE))
  table = multistep.table(solver, 7, 5.0)
  stack = jnp.asarray(np.stack(fields), jnp.float32)
  number = {int(t): i for i, t in enumerate(table.t)}
  where = np.zeros(1001, np.int32)
  where[list(number)] = list(number.values())
  velocity = lambda x, t: stack[jnp.asarray(where)[t.astype(jnp.int32)]]  # noqa: E731
  got = jax.jit(functools.partial(multistep.solve, velocity))(jnp.asarray(noise), table)
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, _ours(table, fields, noise, np.float64)[-1], atol=2e-5)


def _gaussian(sigma, z, xp=np, mean=0.7, std=0.3):
  """Flow of a normal distribution: where a point of noise z is at a level, and its velocity."""
  spread = xp.sqrt((1 - sigma) ** 2 * std**2 + sigma**2)
  slope = (sigma - (1 - sigma) * std**2) / spread
  return (1 - sigma) * mean + spread * z, -mean + slope * z


def _error(solver, steps):
  levels = flow.shifted(np.linspace(0.999, 0, steps + 1), 3.0)
  z = np.linspace(-1.5, 2, 7)
  start, end = _gaussian(levels[0], z)[0], _gaussian(0.0, z)[0]
  table = multistep.on_levels(solver, levels)

  def velocity(x, t):
    sigma = t / 1000
    at, slope = _gaussian(sigma, 1.0, jnp)
    mean, drift = (1 - sigma) * 0.7, -0.7
    return drift + (x - mean) * (slope - drift) / (at - mean)

  got = multistep.solve(velocity, jnp.asarray(start)[None, None, None, None], table)
  return np.abs(np.ravel(got) - end).max()


@pytest.mark.parametrize('solver, order', [('euler', 1), ('dpmpp', 2), ('unipc', 2)])
def test_order_of_convergence(solver, order):
  """Halving the steps divides the error by 2^order, on a field whose solution is known."""
  errors = np.array([_error(solver, n) for n in (12, 24, 48)])
  slopes = np.log2(errors[:-1] / errors[1:])
  # UniPC's corrector does better than its order; nothing may do worse.
  assert (slopes > order - 0.35).all(), slopes
  assert errors[-1] > 1e-6, 'float32 hides the order'
  if solver == 'euler':
    assert (slopes < 1.35).all(), slopes
  else:
    assert errors[-1] < _error('euler', 48) / 5


def test_unipc_beats_dpm_on_the_same_levels():
  assert _error('unipc', 12) < _error('dpmpp', 12)


def test_dpm_of_order_1_is_euler():
  levels = multistep.wan_sigmas(1, 5.0)
  one, other = (multistep.on_levels(name, levels) for name in ('euler', 'dpmpp'))
  for a, b in zip(one, other, strict=True):
    np.testing.assert_array_equal(a, b)


def test_one_program_serves_every_solver_and_guidance():
  traces = []

  @jax.jit
  def run(noise, table, scale):
    traces.append(1)
    texts = tiny.text(1), tiny.text(2)

    def apply(params, x, t, text, ctx):
      del params, ctx
      return x * jnp.mean(text) + t[..., None, None, None] / 1000, {}

    def velocity(x, t):
      return solvers.guided_velocity(apply, None, x, t, texts, scale)

    return multistep.solve(velocity, noise, table)

  got = [
    run(tiny.latents(0), multistep.table(solver, 6, shift), jnp.float32(scale))
    for solver, shift, scale in (('unipc', 5.0, 5.0), ('dpmpp', 3.0, 5.0), ('euler', 3.0, 1.5))
  ]
  assert len(traces) == 1 and len({float(jnp.std(x)) for x in got}) == 3


def test_unknown_solvers_are_refused():
  with pytest.raises(ValueError, match='heun is no solver: choose one of unipc, dpmpp, euler.'):
    multistep.table('heun', 4, 5.0)
