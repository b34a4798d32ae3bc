"""The rollout: equal to a plain sequential one, gradient where it belongs, one program for every draw."""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from salt_jax.diffusion import draws, flow, rollout
from salt_jax.errors import InputError
from salt_jax.models import attention, wan
from salt_jax.models import cache as caches
from tests import tiny

APPLY = wan.bind(tiny.WAN)
SIGMAS = flow.padded_sigmas(4, 5.0, 9)


@functools.partial(jax.jit, static_argnames=('chunking',))
def _roll(params, exit_step, chunking):
  plan = rollout.student_plan(chunking, jnp.asarray(SIGMAS), exit_step)
  return rollout.rollout(APPLY, params, tiny.keys(), tiny.prompt(), plan)


def _again(params, rolled, chunk=tiny.CHUNK):
  """The clip from its exits repeated in one pass."""
  v = rollout.velocity(APPLY, params, rolled.trace, tiny.prompt(), rolled.cache, chunk)
  return flow.x0_from_velocity(rolled.trace.x, v, rolled.trace.sigma)


@functools.partial(jax.jit, static_argnames=('chunk',))
def _exit(params, rolled, chunk=tiny.CHUNK):
  return _again(params, rolled, chunk)


def _sequential(exit_step: int, context_noise: float = 0.0, n: int = tiny.CHUNK):
  """Self-Forcing's loop written out: every pass by itself, full cache, sigma = t / 1000."""
  apply = jax.jit(APPLY, static_argnames=())
  text, keys = tiny.prompt(), tiny.keys()
  shape = (tiny.WAN.layers, tiny.BATCH, tiny.FRAMES, 6, tiny.WAN.heads, tiny.WAN.head_dim)
  cache, x0s, exits = caches.allocate(shape, jnp.float32), [], []
  for start in range(0, tiny.FRAMES, n):
    frames = jnp.arange(start, start + n)
    ctx = wan.Chunk(cache, jnp.int32(start))
    x = flow.frame_noise(keys, frames, 0, tiny.LATENT)
    for i in range(exit_step + 1):
      v, _ = apply(tiny.params(), x, jnp.full((tiny.BATCH, n), 1000 * SIGMAS[i]), text, ctx)
      x0 = x - SIGMAS[i] * v
      if i < exit_step:
        eps = flow.frame_noise(keys, frames, i + 1, tiny.LATENT)
        x = (1 - SIGMAS[i + 1]) * x0 + SIGMAS[i + 1] * eps
    eps = flow.frame_noise(keys, frames, rollout.CONTEXT_DRAW, tiny.LATENT)
    context = (1 - context_noise) * x0 + context_noise * eps
    t = jnp.full((tiny.BATCH, n), 1000 * context_noise, jnp.float32)
    _, features = apply(tiny.params(), context, t, text, ctx)
    cache = caches.write(cache, features.k, features.v, start)
    x0s.append(x0)
    exits.append(x)
  return jnp.concatenate(x0s, 1), jnp.concatenate(exits, 1), cache


@pytest.mark.parametrize(
  ('exit_step', 'noise', 'chunk'), [(0, 0.0, 2), (3, 0.0, 2), (2, 0.1, 2), (1, 0.0, 1)]
)
def test_equals_the_loop_written_out(exit_step, noise, chunk):
  x0, exits, cache = _sequential(exit_step, noise, chunk)
  chunking = tiny.chunking(context_noise=noise, chunk=chunk)
  got = _roll(tiny.params(), jnp.int32(exit_step), chunking)
  # Up to eight passes in a row amplify float32 rounding.
  np.testing.assert_allclose(got.x0, x0, atol=1e-4)
  np.testing.assert_allclose(got.trace.x, exits, atol=1e-4)
  np.testing.assert_allclose(got.cache.k, cache.k, atol=1e-4)
  assert float(got.trace.sigma) == SIGMAS[exit_step]


@pytest.mark.parametrize(
  ('sink', 'window'), [(0, None), pytest.param(0, 4, marks=pytest.mark.slow), (1, 4)]
)
def test_loop_and_unrolled_agree(sink, window):
  one, *others = (
    _roll(tiny.params(), jnp.int32(1), tiny.chunking(sink=sink, window=window, **ways))
    for ways in (dict(unroll=True), dict(unroll=False), dict(unroll=False, branches=False))
  )
  for other in others:
    np.testing.assert_allclose(one.x0, other.x0, atol=1e-4)
    np.testing.assert_allclose(one.cache.v, other.cache.v, atol=1e-4)


def test_a_window_as_long_as_the_clip_is_the_full_cache_and_a_short_one_is_not():
  full, long, short = (
    _roll(tiny.params(), jnp.int32(1), tiny.chunking(window=w, sink=s)).x0
    for w, s in ((None, 0), (tiny.FRAMES, 1), (3, 0))
  )
  np.testing.assert_array_equal(full, long)
  np.testing.assert_allclose(full[:, : tiny.CHUNK], short[:, : tiny.CHUNK], atol=1e-5)
  assert np.abs(full[:, -1] - short[:, -1]).max() > 1e-3


@pytest.mark.parametrize(('sink', 'window', 'chunk'), [(0, None, 2), (1, 4, 2), (1, 4, 1)])
def test_exits_repeated_in_one_pass_equal_the_rollout(sink, window, chunk):
  chunking = tiny.chunking(sink=sink, window=window, chunk=chunk)
  rolled = _roll(tiny.params(), jnp.int32(2), chunking)
  np.testing.assert_allclose(_exit(tiny.params(), rolled, chunk), rolled.x0, atol=1e-4)


@dataclasses.dataclass(frozen=True)
class _Interpreted(wan.WanConfig):
  """With the kernel of a TPU, run step by step."""

  @property
  def kernel(self):
    return attention.Kernel('splash', (128, 128, 128), interpret=True)


@pytest.mark.parametrize(
  ('sink', 'window'), [pytest.param(0, None, marks=pytest.mark.slow), (1, 4)]
)
def test_a_kernel_that_skips_hidden_keys_gives_the_same_clip_and_gradient(sink, window):
  """Splash, interpreted, reads the whole cache in the rollout and in the pass over its exits; dense reads slices."""
  sizes = dataclasses.asdict(tiny.WAN) | dict(dim=256, layers=2, remat=True)
  plain, splash = wan.WanConfig(**sizes), _Interpreted(**sizes)
  cache = (plain.layers, 6, plain.heads, plain.head_dim)
  chunking = tiny.chunking(sink=sink, window=window, cache=cache, unroll=False)
  params = tiny.params(0, plain)

  @functools.partial(jax.jit, static_argnames='cfg')
  def run(params, cfg):
    plan = rollout.student_plan(chunking, jnp.asarray(SIGMAS), jnp.int32(1))
    rolled = rollout.rollout(wan.bind(cfg), params, tiny.keys(), tiny.prompt(), plan)

    def again(params):
      args = rolled.trace, tiny.prompt(), rolled.cache, tiny.CHUNK
      return jnp.sum(jnp.square(rollout.velocity(wan.bind(cfg), params, *args)))

    return rolled.x0, jax.grad(again)(params)

  x0, grads = run(params, plain)
  assert 'splash' in str(jax.make_jaxpr(run, static_argnums=1)(params, splash))
  got_x0, got_grads = run(params, splash)
  # Two orders of summation in float32, through two layers, three chunks and two steps.
  np.testing.assert_allclose(got_x0, x0, atol=1e-4)
  for got, want in zip(jax.tree.leaves(got_grads), jax.tree.leaves(grads), strict=True):
    np.testing.assert_allclose(got, want, atol=1e-4 * float(jnp.abs(want).max()) + 1e-12)


def test_gradient_is_that_of_the_exit_step_alone():
  """Against the sequential definition: each chunk's exit with gradient, everything else a constant."""
  rolled = _roll(tiny.params(), jnp.int32(2), tiny.chunking())
  weight = tiny.latents(7)

  def parallel(params):
    return (_exit(params, rolled) * weight).sum()

  def sequential(params):
    total = 0.0
    for start in range(0, tiny.FRAMES, tiny.CHUNK):
      part = slice(start, start + tiny.CHUNK)
      x = rolled.trace.x[:, part]
      t = jnp.full(x.shape[:2], 1000 * rolled.trace.sigma)
      v, _ = APPLY(params, x, t, tiny.prompt(), wan.Chunk(rolled.cache, jnp.int32(start)))
      total += ((x - rolled.trace.sigma * v) * weight[:, part]).sum()
    return total

  one, other = (
    jax.jit(jax.grad(parallel))(tiny.params()),
    jax.jit(jax.grad(sequential))(tiny.params()),
  )
  scale = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(other))
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4 * scale)


def test_nothing_reaches_the_rollout_or_earlier_chunks():
  rolled = _roll(tiny.params(), jnp.int32(1), tiny.chunking())

  def loss(params, k):
    again = _roll(params, jnp.int32(1), tiny.chunking())
    again = again.replace(cache=again.cache.replace(k=again.cache.k + k))
    x0 = _again(jax.lax.stop_gradient(params), again)
    return jnp.square(x0).sum()

  grads = jax.jit(jax.grad(loss, argnums=(0, 1)))(tiny.params(), jnp.zeros_like(rolled.cache.k))
  assert not any(np.asarray(g).any() for g in jax.tree.leaves(grads)), 'the rollout has a gradient'


def test_one_program_serves_every_exit_and_step_count():
  before = _roll._cache_size()
  for exit_step in range(3):
    _roll(tiny.params(), jnp.int32(exit_step), tiny.chunking(mode='ode'))
  assert _roll._cache_size() == before + 1


def test_ode_mode_takes_euler_steps():
  rolled = _roll(tiny.params(), jnp.int32(1), tiny.chunking(mode='ode'))
  keys, frames = tiny.keys(), jnp.arange(tiny.CHUNK)
  x = flow.frame_noise(keys, frames, 0, tiny.LATENT)
  shape = (tiny.WAN.layers, tiny.BATCH, tiny.FRAMES, 6, tiny.WAN.heads, tiny.WAN.head_dim)
  ctx = wan.Chunk(caches.allocate(shape, jnp.float32), jnp.int32(0))
  v, _ = APPLY(tiny.params(), x, jnp.full(x.shape[:2], 1000.0), tiny.prompt(), ctx)
  np.testing.assert_allclose(rolled.trace.x[:, : tiny.CHUNK], x - (1 - SIGMAS[1]) * v, atol=1e-4)


def test_a_chunk_as_long_as_the_clip_is_the_bidirectional_student():
  """Against the loop written out with whole-clip passes; no cache is made."""
  rolled = _roll(tiny.params(), jnp.int32(2), tiny.chunking(chunk=tiny.FRAMES))
  keys, frames = tiny.keys(), jnp.arange(tiny.FRAMES)
  x = flow.frame_noise(keys, frames, 0, tiny.LATENT)
  for i in range(3):
    t = jnp.full((tiny.BATCH, tiny.FRAMES), 1000 * SIGMAS[i])
    x0 = x - SIGMAS[i] * APPLY(tiny.params(), x, t, tiny.prompt(), wan.Clip())[0]
    seen, s = x, SIGMAS[i + 1]
    x = (1 - s) * x0 + s * flow.frame_noise(keys, frames, i + 1, tiny.LATENT)
  np.testing.assert_allclose(rolled.x0, x0, atol=1e-4)
  np.testing.assert_allclose(rolled.trace.x, seen, atol=1e-4)
  assert rolled.cache is None
  np.testing.assert_allclose(_exit(tiny.params(), rolled, tiny.FRAMES), rolled.x0, atol=1e-4)


def test_a_bidirectional_rollout_asks_once_a_step():
  asked = []

  def apply(*args):
    jax.debug.callback(lambda: asked.append(1))
    return APPLY(*args)

  plan = rollout.student_plan(tiny.chunking(chunk=tiny.FRAMES), jnp.asarray(SIGMAS), jnp.int32(2))
  jax.block_until_ready(rollout.rollout(apply, tiny.params(), tiny.keys(), tiny.prompt(), plan))
  jax.effects_barrier()
  assert len(asked) == 3


def _reference_plan(exit_step, coupling, steps=2, reference=4):
  schedule = draws.Schedule((steps,), (1.0,), 5.0)
  cfg = draws.ReferenceConfig(map=((steps, (reference,)),), coupling=coupling)
  at = (tiny.chunking(), jnp.int32(0), jnp.int32(exit_step))
  return draws.draw_reference(jax.random.key(0), schedule, cfg, at, jnp.int32(0))[0]


@functools.partial(jax.jit)
def _follow(params, plan):
  return rollout.rollout(APPLY, params, tiny.keys(), tiny.prompt(), plan)


@pytest.mark.parametrize('coupling', draws.COUPLINGS)
def test_a_reference_equals_the_loop_written_out(coupling):
  """salt_method.md 7.2 for K=2, exit 1, behind four steps: levels 1, .9375, .8333, of which .8333 is the student's."""
  rolled = _follow(tiny.params(), _reference_plan(1, coupling))
  apply, keys, text, n = jax.jit(APPLY), tiny.keys(), tiny.prompt(), tiny.CHUNK
  levels = flow.few_step_sigmas(4, 5.0)
  cache, outs = rollout.empty_cache(tiny.chunking(), tiny.BATCH), []
  for start in range(0, tiny.FRAMES, n):
    frames, ctx = jnp.arange(start, start + n), wan.Chunk(cache, jnp.int32(start))
    y = flow.frame_noise(keys, frames, 0, tiny.LATENT)
    for i in range(3):
      a, b = levels[i], levels[i + 1]
      v, _ = apply(tiny.params(), y, jnp.full((tiny.BATCH, n), 1000 * a, jnp.float32), text, ctx)
      x0 = y - a * v
      memo = flow.frame_noise(keys, frames, 1, tiny.LATENT)  # the student's, on its way to .8333
      fresh = flow.frame_noise(keys, frames, 500 + i, tiny.LATENT)
      if coupling == 'aligned_b' and i == 0:
        y = y - (a - b) * v
      else:
        y = (1 - b) * x0 + b * (fresh if coupling == 'independent' else memo)
    _, features = apply(tiny.params(), x0, jnp.zeros((tiny.BATCH, n)), text, ctx)
    cache = caches.write(cache, features.k, features.v, start)
    outs.append(x0)
  np.testing.assert_allclose(rolled.x0, jnp.concatenate(outs, 1), atol=1e-4)


@pytest.mark.parametrize('coupling', draws.COUPLINGS)
def test_a_reference_of_the_same_steps_and_noise_is_the_student_bit_for_bit(coupling):
  """As the tables of references have it; a config refuses such a map, which aligns nothing."""
  schedule = draws.Schedule((4,), (1.0,), 5.0)
  cfg = types.SimpleNamespace(map=((4, (4,)),), coupling=coupling, start=0)
  at = (tiny.chunking(), jnp.int32(0), jnp.int32(2))
  reference = draws.draw_reference(jax.random.key(0), schedule, cfg, at, jnp.int32(0))[0]
  student = rollout.student_plan(tiny.chunking(), jnp.asarray(SIGMAS[:5]), jnp.int32(2))
  one, other = _follow(tiny.params(), student), _follow(tiny.params(), reference)
  if coupling == 'independent':
    assert np.abs(one.x0 - other.x0).max() > 1e-3
  else:
    np.testing.assert_array_equal(one.x0, other.x0)
    np.testing.assert_array_equal(one.cache.k, other.cache.k)


def test_streaming_cache_holds_what_is_visible_and_gives_the_same_clip():
  chunking = tiny.chunking(window=4, sink=1)
  whole = _roll(tiny.params(), jnp.int32(1), chunking)
  cache, outs = rollout.empty_cache(chunking, tiny.BATCH, streaming=True), []
  assert cache.capacity == 2
  plan = rollout.student_plan(chunking, jnp.asarray(SIGMAS), jnp.int32(1))
  for start in range(0, tiny.FRAMES, tiny.CHUNK):
    x0, _, cache = rollout.denoise_chunk(
      APPLY, tiny.params(), tiny.keys(), tiny.prompt(), plan, (cache, jnp.int32(start))
    )
    outs.append(x0)
  np.testing.assert_allclose(jnp.concatenate(outs, 1), whole.x0, atol=1e-4)


@functools.partial(jax.jit, static_argnames=('unroll',))
def _i2v(params, prompt, unroll):
  plan = rollout.student_plan(tiny.chunking(unroll=unroll), jnp.asarray(SIGMAS), jnp.int32(1))
  return rollout.rollout(wan.bind(tiny.I2V), params, tiny.keys(), prompt, plan)


def test_every_chunk_takes_its_own_of_the_given_frames():
  """Unrolled, in a loop, and repeated in one pass; and frames of one chunk reach it and the later ones alone."""
  params, prompt = tiny.params(0, tiny.I2V), tiny.prompt(tiny.I2V)
  one, other = (_i2v(params, prompt, unroll) for unroll in (True, False))
  np.testing.assert_allclose(one.x0, other.x0, atol=1e-4)
  ask = functools.partial(rollout.velocity, wan.bind(tiny.I2V))
  v = jax.jit(lambda p: ask(p, one.trace, prompt, one.cache, tiny.CHUNK))(params)
  again = flow.x0_from_velocity(one.trace.x, v, one.trace.sigma)
  np.testing.assert_allclose(again, one.x0, atol=1e-4)
  changed = prompt.replace(frames=prompt.frames.at[:, tiny.CHUNK].add(1.0))
  moved = np.abs(_i2v(params, changed, True).x0 - one.x0).max((0, 2, 3, 4)) > 1e-3
  np.testing.assert_array_equal(moved, [False] * 2 + [True] * 4)


@pytest.mark.parametrize(
  ('changes', 'sentence'),
  [
    (dict(frames=7), '7 latent frames do not divide'),
    (dict(mode='dde'), 'mode "dde" is unknown'),
    (dict(frames=6000), 'exceed the 4096 positions'),
  ],
)
def test_bad_plans_are_refused(changes, sentence):
  with pytest.raises(InputError, match=sentence):
    tiny.chunking(**changes)
