"""A generator and a critic step against the method written out (salt_method.md 7.2, 7.3), gradients included.

Here every chunk is asked by itself behind the past that its window shows, and each term is its equation; of the code
under test only the network, the draws and the noise are used, which have tests of their own.
"""

import dataclasses
import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from salt_jax import recipe as recipes
from salt_jax import stages, step
from salt_jax import state as states
from salt_jax import weights as files
from salt_jax.diffusion import flow
from salt_jax.losses import alignment, dmd
from salt_jax.models import wan
from salt_jax.models.cache import KVCache
from tests import tiny_config

CHUNK, FRAMES, LATENT = 3, 6, (4, 4, 16)
ROLES = {'generator': 'init', 'critic': 'student', 'average': 'ar', 'teacher': 'teacher'}
stop = jax.lax.stop_gradient


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tiny_config.write_weights(str(tmp_path_factory.mktemp('weights')))


def _world(folder, **changes):
  """A run whose four networks all differ, whose updates are gradients, and whose weights of the terms are large."""
  config = tiny_config.get_config(folder)
  config.batch = 2
  config.model.remat = config.teacher.remat = False
  config.losses.update(dmd=0.25, consistency=200.0, alignment=3.0)
  config.reference.coupling = 'aligned_b'
  config.update_from_flattened_dict(changes)
  rec = recipes.build(config)
  stage = stages.build(config, rec, '')
  rec = dataclasses.replace(rec, optimizers=dict.fromkeys(rec.optimizers, optax.sgd(1.0)))
  nets = {
    role: files.load(f'{folder}/{file}.safetensors', 'dit', rec.model)
    for role, file in ROLES.items()
  }
  nets = jax.tree.map(jnp.asarray, nets)
  params = {name: nets[name] for name in ('generator', 'critic')}
  state = states._new(params, rec.optimizers, ('generator',))
  state = state.replace(ema={'generator': nets['average']})
  ids = np.random.default_rng(1).integers(1, 20, (2, rec.text_length)).astype(np.int32)
  mask = np.broadcast_to(np.arange(rec.text_length) < 5, ids.shape)
  batch = {'index': jnp.arange(2), 'ids': jnp.asarray(ids), 'mask': jnp.asarray(mask)}
  frozen = stage.frozen | {'teacher': nets['teacher']}
  asked = jax.jit(functools.partial(wan.apply, cfg=rec.model))
  return types.SimpleNamespace(
    rec=rec,
    state=state,
    frozen=frozen,
    batch=batch,
    nets=nets,
    asked=asked,
    texts=step.conditioning(frozen, batch, rec),
    run=jax.jit(functools.partial(step.generator_step, recipe=rec)),
  )


@pytest.fixture(scope='module')
def released(folder):
  return _world(folder)


@pytest.fixture(scope='module')
def alternative(folder):
  """Every other way that concerns how the parts are put together."""
  return _world(
    folder,
    **{
      'consistency.target': 'ema',
      'consistency.warmup': 60,
      'reference.share_exit_input': True,
      'alignment.network': 'critic',
      # Caches alone make a small difference, which the released margin leaves free.
      'alignment.margin': 1e-3,
      'rollout.window': 5,
      'rollout.sink': 1,
      'rollout.context_noise': 0.1,
    },
  )


def _keys(world, n, stream):
  """(key of the draws, keys of the rollout, keys of the losses)."""
  shared, keys = step.step_keys(world.rec, n, stream, world.batch['index'])
  return shared, *jax.vmap(jax.random.split, out_axes=1)(keys)


def _find(world, kind):
  """The step with this term whose rollout is shortest, but not one pass alone."""
  found = []
  for n in range(40):
    drawn = recipes.draw(world.rec, _keys(world, n, 'generator')[0], jnp.int32(n))
    has = {'consistency': drawn.triple.active, 'alignment': drawn.has_reference}[kind]
    if has and drawn.plan.exit > 0:
      found.append((int(drawn.plan.exit), n))
  return min(found)[1]


def _levels(steps):
  u = 1 - np.arange(steps + 1) / steps
  return 5 * u / (1 + 4 * u)


class Past:
  """Keys and values of the chunks so far, frame by frame."""

  def __init__(self, world):
    self.window, self.sink = world.rec.chunking.window or FRAMES, world.rec.chunking.sink
    layers, tokens, heads, width = world.rec.chunking.cache
    self.k = self.v = jnp.zeros((layers, 2, FRAMES, tokens, heads, width))

  def before(self, start):
    frames = np.arange(FRAMES)
    recent = frames >= start + CHUNK - (self.window - self.sink)
    seen = (frames < start) & (recent | (frames < self.sink))
    return wan.Chunk(KVCache(self.k, self.v, jnp.where(seen, frames, -1)), jnp.int32(start))

  def add(self, start, features):
    part = slice(start, start + CHUNK)
    self.k = self.k.at[:, :, part].set(features.k)
    self.v = self.v.at[:, :, part].set(features.v)


def _velocity(world, params, x, sigma, past, text):
  return world.asked(params, x, jnp.full(x.shape[:2], 1000 * sigma, jnp.float32), text, past)


def _roll(world, params, keys, text, levels, exit_step, following):
  """[(input of the exit, x0, past)] of each chunk; `following(i, x0, v, x, noise)` leads to level i + 1."""
  past, chunks, c = Past(world), [], world.rec.chunking.context_noise
  for start in range(0, FRAMES, CHUNK):
    noise = functools.partial(flow.frame_noise, keys, jnp.arange(start, start + CHUNK))
    x, ctx = noise(0, LATENT), past.before(start)
    for i in range(exit_step):
      v = _velocity(world, params, x, levels[i], ctx, text)[0]
      x = following(i, x - levels[i] * v, v, x, lambda draw, noise=noise: noise(draw, LATENT))
    x0 = x - levels[exit_step] * _velocity(world, params, x, levels[exit_step], ctx, text)[0]
    clean = (1 - c) * x0 + c * noise(1000, LATENT)
    past.add(start, _velocity(world, params, clean, c, ctx, text)[1])
    chunks.append((x, x0, ctx))
  return chunks


def _student(world, keys, steps, exit_step):
  levels = _levels(steps)

  def renoise(i, x0, v, x, noise):
    return (1 - levels[i + 1]) * x0 + levels[i + 1] * noise(i + 1)

  text = world.texts[0]
  return _roll(world, world.nets['generator'], keys, text, levels, exit_step, renoise)


def _reference(world, keys, steps, dense, exit_step):
  """Noise that the student has at its own levels, Euler steps to the others."""
  levels, times = _levels(dense), dense // steps

  def aligned(i, x0, v, x, noise):
    if (i + 1) % times:
      return x - (levels[i] - levels[i + 1]) * v
    return (1 - levels[i + 1]) * x0 + levels[i + 1] * noise((i + 1) // times)

  text = world.texts[0]
  return _roll(world, world.nets['generator'], keys, text, levels, exit_step * times, aligned)


def _wide(sigma):
  return jnp.asarray(sigma, jnp.float32)[:, None, None, None, None]


def _scored(world, net, noisy, t, text):
  return noisy - _wide(t[:, 0] / 1000) * world.asked(net, noisy, t, text, wan.Clip())[0]


def _dmd(world, x0, keys):
  x = stop(x0)
  noisy, _, _, t = dmd._noised(x, keys, world.rec.dmd)
  cond, uncond = world.texts
  c, u = (_scored(world, world.nets['teacher'], noisy, t, text) for text in (cond, uncond))
  fake, real = _scored(world, world.nets['critic'], noisy, t, cond), c + 3.0 * (c - u)
  g = (fake - real) / jnp.abs(x - real).mean((1, 2, 3, 4), keepdims=True)
  return 0.5 * jnp.square(x0 - stop(x - g)).mean()


def _consistency(world, chunks, vs, triple):
  s, m, e = (float(y) for y in (triple.start, triple.middle, triple.end))
  online = world.rec.consistency.target == 'online'
  target = world.nets['generator' if online else 'average']
  errors = []
  for (x, _, ctx), v in zip(chunks, vs, strict=True):
    x_m = x - (s - m) * stop(v)
    v2 = _velocity(world, target, x_m, m, ctx, world.texts[0])[0]
    errors.append((x - (s - e) * v) - stop(x_m - (m - e) * v2))
  return (1 - s) * jnp.square(jnp.concatenate(errors, 1)).mean()


def _alignment(world, x0, aim, keys):
  cfg = world.rec.alignment
  keys = jax.vmap(jax.random.fold_in, (0, None))(keys, step._FEATURES)
  level, noise = jax.vmap(jax.random.split, out_axes=1)(keys)
  sigma = alignment.feature_level(level, cfg)
  eps = flow.frame_noise(noise, jnp.arange(FRAMES), 0, LATENT)
  t = jnp.broadcast_to(1000 * sigma[:, None], (2, FRAMES))
  net = world.nets[{'teacher': 'teacher', 'critic': 'critic'}[cfg.network]]

  def relations(x):
    noisy, taps = (1 - _wide(sigma)) * x + _wide(sigma) * eps, wan.Clip(taps=(cfg.layer,))
    h = world.asked(net, noisy, t, world.texts[0], taps)[1].taps[cfg.layer]
    h = h / jnp.linalg.norm(h, axis=-1, keepdims=True)
    return h @ jnp.moveaxis(h, -1, -2)

  difference = jnp.abs(relations(x0) - stop(relations(aim)))
  return jnp.maximum(difference - cfg.margin, 0).mean()


def _terms(world, n):
  """`params -> {term: loss}` of step n."""
  shared, rollout_keys, loss_keys = _keys(world, n, 'generator')
  drawn = recipes.draw(world.rec, shared, jnp.int32(n))
  steps, exit_step = int(drawn.steps), int(drawn.plan.exit)
  level, text = _levels(steps)[exit_step], world.texts[0]
  chunks = _student(world, rollout_keys, steps, exit_step)
  if drawn.has_reference:
    dense = steps * int(drawn.reference.exit) // exit_step
    others = _reference(world, rollout_keys, steps, dense, exit_step)
    aims = [x0 for _, x0, _ in others]
    if world.rec.reference.share_exit_input:
      aims = [
        x - level * _velocity(world, world.nets['generator'], x, level, ctx, text)[0]
        for (x, _, _), (_, _, ctx) in zip(chunks, others, strict=True)
      ]

  def terms(params):
    vs = [_velocity(world, params, x, level, ctx, text)[0] for x, _, ctx in chunks]
    x0 = jnp.concatenate([x - level * v for (x, _, _), v in zip(chunks, vs, strict=True)], 1)
    found = {'dmd': _dmd(world, x0, loss_keys), 'consistency': 0.0, 'alignment': 0.0}
    if drawn.triple.active:
      found['consistency'] = _consistency(world, chunks, vs, drawn.triple)
    if drawn.has_reference:
      found['alignment'] = _alignment(world, x0, jnp.concatenate(aims, 1), rollout_keys)
    return found

  return terms


def _weights(world, n):
  """The weight of each term in step n."""
  warmup = world.rec.consistency.warmup
  ramp = 0.5 - 0.5 * np.cos(np.pi * min(n / warmup, 1)) if warmup else 1.0
  return {'dmd': 0.25, 'consistency': 200.0 * ramp, 'alignment': 3.0}


def _norm(tree):
  return np.sqrt(sum(np.square(np.float64(x)).sum() for x in jax.tree.leaves(tree)))


def _apart(before, after, expected):
  """Distance of a step of gradient descent from the gradient, as a share of its norm."""
  moved = jax.tree.map(lambda a, b: np.float64(a) - np.float64(b), before, after)
  return _norm(jax.tree.map(lambda a, b: a - np.float64(b), moved, expected)) / _norm(expected)


@pytest.mark.parametrize('kind', ['consistency', 'alignment'])
@pytest.mark.parametrize('which', ['released', 'alternative'])
def test_a_generator_step_is_the_method_written_out(which, kind, request):
  world = request.getfixturevalue(which)
  n = _find(world, kind)
  new, metrics = world.run(world.state, world.frozen, world.batch, np.int32(n))
  terms, params = _terms(world, n), world.nets['generator']
  for term, value in terms(params).items():
    # Several passes in a row amplify float32 rounding, and the term of consistency is a square of differences.
    np.testing.assert_allclose(metrics[f'loss_{term}'], value, rtol=2e-3, err_msg=term)
  found = {}
  for term in ('dmd', kind):
    grad, weight = jax.grad(lambda p, term=term: terms(p)[term])(params), _weights(world, n)[term]
    found[term] = jax.tree.map(lambda g, weight=weight: weight * g, grad)
  one, other = (_norm(found[term]) for term in ('dmd', kind))
  assert 0.05 < other / one < 20, 'one term is lost beside the other, so this says nothing of it'
  expected = jax.tree.map(jnp.add, *found.values())
  assert _apart(params, new.params['generator'], expected) < 2e-3


def test_a_critic_step_is_the_method_written_out(released):
  """Another draw and other noise than the generator's of the same n, and the online student by the prompt alone."""
  world, n = released, 1
  shared, rollout_keys, loss_keys = _keys(world, n, 'critic')
  drawn = recipes.draw(world.rec, shared, jnp.int32(n))
  chunks = _student(world, rollout_keys, int(drawn.steps), int(drawn.plan.exit))
  x = jnp.concatenate([x0 for _, x0, _ in chunks], 1)
  noisy, eps, _, t = dmd._noised(x, loss_keys, world.rec.dmd)

  def loss(params):
    v = world.asked(params, noisy, t, world.texts[0], wan.Clip())[0]
    return jnp.square(v - (eps - x)).mean()

  run = jax.jit(functools.partial(step.critic_step, recipe=world.rec))
  new, metrics = run(world.state, world.frozen, world.batch, np.int32(n))
  value, expected = jax.value_and_grad(loss)(world.nets['critic'])
  np.testing.assert_allclose(metrics['loss'], value, rtol=1e-4)
  assert _apart(world.nets['critic'], new.params['critic'], expected) < 1e-3
