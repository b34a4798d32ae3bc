"""The generator step with all terms: one program for every draw, sleeping terms cost nothing and change nothing."""

import collections
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import dmd as bidirectional
from salt_jax import recipe as recipes
from salt_jax import stages, step, weights
from salt_jax import state as states
from salt_jax.models import wan
from tests import tiny_config

CHUNKS, FRAMES = 2, 6


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tiny_config.write_weights(str(tmp_path_factory.mktemp('weights')))


def _setup(folder, config=None, **changes):
  """(recipe, state, frozen, batch) of a tiny run."""
  config = config or tiny_config.get_config(folder)
  config.batch = 2
  config.update_from_flattened_dict(changes)
  rec = recipes.build(config)
  stage = stages.build(config, rec, '')
  state = states._new(jax.tree.map(jnp.asarray, stage.start()), rec.optimizers, stage.averaged)
  batch = {
    'index': jnp.arange(2),
    'ids': jnp.ones((2, rec.text_length), jnp.int32),
    'mask': jnp.arange(rec.text_length)[None].repeat(2, 0) < 5,
  }
  return rec, state, stage.frozen, batch


def _draw(rec, n):
  shared, _ = step.step_keys(rec, n, 'generator', jnp.arange(2))
  return recipes.draw(rec, shared, jnp.int32(n))


def _drawn(rec, n):
  drawn = _draw(rec, n)
  kind = 'consistency' if drawn.triple.active else 'alignment' if drawn.has_reference else 'none'
  return kind, int(drawn.plan.exit), int(drawn.reference.exit)


@pytest.fixture(scope='module')
def draws_of_steps(folder):
  rec = _setup(folder)[0]
  return {n: _drawn(rec, n) for n in range(40)}


@pytest.fixture(scope='module')
def counted(folder):
  """Runs steps and counts how often networks are asked, by kind of context, and how often a step is traced."""
  rec, state, frozen, batch = _setup(folder)
  calls, traces = collections.Counter(), []
  plain = wan.apply

  def apply(params, x, t, text, ctx, cfg):
    part = 'features' if getattr(ctx, 'taps', ()) else type(ctx).__name__
    causal = part == 'Clip' and ctx.chunk is not None
    jax.debug.callback(lambda: calls.update(['parallel' if causal else part]))
    return plain(params, x, t, text, ctx, cfg)

  def traced(state, frozen, batch, n):
    traces.append(1)
    return step.generator_step(state, frozen, batch, n, recipe=rec)

  run = jax.jit(traced)

  def once(n):
    calls.clear()
    done = run(state, frozen, batch, np.int32(n))
    jax.effects_barrier()
    return done, dict(calls)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(wan, 'apply', apply)
    once(0)
  # What is traced from here on, by others, is not counted.
  yield once, traces


def _steps_of(draws_of_steps, kind):
  found = [n for n, drawn in draws_of_steps.items() if drawn[0] == kind]
  assert found, f'no step of 40 draws {kind}, so this test says nothing'
  return found


@pytest.mark.parametrize('kind', ['none', 'consistency', 'alignment'])
def test_a_step_asks_its_networks_as_often_as_its_draw_needs(counted, draws_of_steps, kind):
  """Rollout: exit + 1 passes and one for the cache, each chunk; then one parallel pass, teacher, critic."""
  once, traces = counted
  for n in _steps_of(draws_of_steps, kind)[:3]:
    _, exit_step, reference_exit = draws_of_steps[n]
    (_, metrics), calls = once(n)
    expected = {'Chunk': CHUNKS * (exit_step + 2), 'parallel': 1, 'Clip': 2}
    if kind == 'consistency':
      expected['parallel'] += 1
    if kind == 'alignment':
      expected['Chunk'] += CHUNKS * (reference_exit + 2)
      expected['features'] = 2
    assert calls == expected, (n, draws_of_steps[n])
    for term in ('consistency', 'alignment'):
      assert (metrics[f'active_{term}'] == 1) == (term == kind)
      assert (metrics[f'loss_{term}'] > 0) == (term == kind)
  assert len(traces) == 1, 'a draw recompiled the step'


def test_other_terms_leave_the_rollout_and_the_dmd_loss_alone(folder, counted, draws_of_steps):
  """If a second pass or a reference touched the student's cache, the clip that DMD sees would change."""
  alone = {'losses.consistency': 0.0, 'losses.alignment': 0.0}
  rec, start, frozen, batch = _setup(folder, **alone)
  run = jax.jit(functools.partial(step.generator_step, recipe=rec))
  for kind in ('consistency', 'alignment'):
    n = _steps_of(draws_of_steps, kind)[0]
    (state, one), _ = counted[0](n)
    other_state, other = run(start, frozen, batch, np.int32(n))
    np.testing.assert_array_equal(one['exit'], other['exit'])
    # Two programs: reductions in another order.
    np.testing.assert_allclose(one['loss_dmd'], other['loss_dmd'], rtol=1e-5)
    moved = [
      np.abs(a - b).max()
      for a, b in zip(
        jax.tree.leaves(state.params['generator']),
        jax.tree.leaves(other_state.params['generator']),
        strict=True,
      )
    ]
    assert max(moved) > 1e-6, 'the term had no effect on the update'


def test_generator_and_critic_draw_apart_and_alike_on_every_host(folder):
  rec = _setup(folder)[0]

  def drawn(stream, index):
    shared, _ = step.step_keys(rec, 3, stream, jnp.asarray(index))
    return jax.random.key_data(shared).tolist()

  assert drawn('generator', [0, 1]) == drawn('generator', [6, 7])
  assert drawn('generator', [0, 1]) != drawn('critic', [0, 1])


@pytest.mark.parametrize(
  'changes',
  [
    pytest.param({'consistency.target': 'ema'}, marks=pytest.mark.slow),
    pytest.param({'consistency.stop_grad': 'none'}, marks=pytest.mark.slow),
    pytest.param(
      {'reference.share_exit_input': True, 'alignment.margin': 0.0}, marks=pytest.mark.slow
    ),
    pytest.param({'alignment.kind': 'latents'}, marks=pytest.mark.slow),
    {
      'alignment.network': 'student',
      'alignment.kind': 'mmd',
      'reference.map': ((2, (4,)), (4, (8,))),
    },
  ],
)
def test_alternatives_run_and_train(folder, draws_of_steps, changes):
  rec, state, frozen, batch = _setup(folder, **changes)
  kind = 'consistency' if 'consistency' in next(iter(changes)) else 'alignment'
  n = _steps_of(draws_of_steps, kind)[0]
  if 'reference.map' in changes:
    # By the other map, four steps have a reference too.
    drawn = {n: _draw(rec, n) for n in range(40)}
    n = next(n for n, d in drawn.items() if d.steps == 4 and d.has_reference)
  _, metrics = jax.jit(functools.partial(step.generator_step, recipe=rec))(
    state, frozen, batch, np.int32(n)
  )
  assert metrics[f'active_{kind}'] == 1 and metrics[f'loss_{kind}'] > 0
  assert np.isfinite(metrics['grad_norm']) and metrics['grad_norm'] > 0


@pytest.mark.slow
def test_the_frame_wise_student(folder):
  """Six chunks of one frame: the rollout asks once a frame and step, and both networks are trained."""
  rec, state, frozen, batch = _setup(folder, **{'rollout.chunk': 1})
  new, metrics = jax.jit(functools.partial(step.generator_step, recipe=rec))(
    state, frozen, batch, np.int32(0)
  )
  assert 0 < metrics['grad_norm'] < 100 and metrics['loss_dmd'] > 0
  threes = _setup(folder)
  _, other = jax.jit(functools.partial(step.generator_step, recipe=threes[0]))(
    *threes[1:], np.int32(0)
  )
  # The same noise, levels and exit, in another clip.
  assert metrics['exit'] == other['exit'] and metrics['dmd_sigma'] == other['dmd_sigma']
  assert metrics['loss_dmd'] != other['loss_dmd']
  _, metrics = jax.jit(functools.partial(step.critic_step, recipe=rec))(
    new, frozen, batch, np.int32(0)
  )
  assert 0 < metrics['grad_norm'] < 100 and metrics['loss'] > 0


def _assert_each_step_moves_its_own(state, moved, fitted):
  """The generator's moves the student and, by its decay of 0.95, the average; the critic's the critic alone."""
  same = functools.partial(jax.tree.map, np.testing.assert_array_equal)
  same(moved.params['critic'], state.params['critic'])
  jax.tree.map(
    lambda got, old, new: np.testing.assert_allclose(got, 0.95 * old + 0.05 * new, atol=1e-7),
    moved.ema['generator'],
    state.ema['generator'],
    moved.params['generator'],
  )
  same((fitted.ema, fitted.updates), (moved.ema, moved.updates))
  same(fitted.params['generator'], moved.params['generator'])
  for before, after, name in ((state, moved, 'generator'), (moved, fitted, 'critic')):
    pairs = zip(*map(jax.tree.leaves, (before.params[name], after.params[name])), strict=True)
    assert max(np.abs(a - b).max() for a, b in pairs) > 1e-6


def test_the_bidirectional_student(folder):
  config = tiny_config.shrink(bidirectional.get_config('nano'), folder)
  config.rollout.chunk = FRAMES
  rec, state, frozen, batch = _setup(folder, config)
  run = jax.jit(functools.partial(step.generator_step, recipe=rec))
  seen = [run(state, frozen, batch, np.int32(n))[1] for n in range(12)]
  active = [float(m['active_consistency']) for m in seen]
  assert [a == 1 for a in active] == [0 < m['exit'] < 7 for m in seen] and 0 < sum(active) < 12
  assert run._cache_size() == 1
  fit = jax.jit(functools.partial(step.critic_step, recipe=rec))
  moved, _ = run(state, frozen, batch, np.int32(0))
  fitted, metrics = fit(moved, frozen, batch, np.int32(0))
  assert np.isfinite(metrics['loss'])
  _assert_each_step_moves_its_own(state, moved, fitted)


def test_dropped_texts_are_the_unconditional_prompt(folder):
  """All of them at a share of 1, none at 0: told by the loss of flow matching, whose noise knows no text."""
  config = tiny_config.stage('teacher', folder)
  config.batch = 2
  rec = recipes.build(config)
  frozen = {'negative': stages.serving(config, rec)['negative']}
  rows = (config.batch, rec.text_length)
  nets = {
    'dit': weights.load(f'{folder}/teacher.safetensors', 'dit', rec.model),
    'text': weights.load(f'{folder}/text.safetensors', 'umt5', rec.text),
  }
  state = states._new(jax.tree.map(jnp.asarray, nets), rec.optimizers, ('dit', 'text'))
  latents = jax.random.normal(jax.random.key(0), (config.batch, *recipes.latent_shape(config)))
  batch = {'index': jnp.arange(config.batch), 'latents': latents}
  one, other = (
    {'ids': jnp.full(rows, word, jnp.int32), 'mask': jnp.arange(rows[1]) < jnp.full(rows, 5)}
    for word in (3, 7)
  )
  none = {name: jnp.broadcast_to(x, rows) for name, x in frozen['negative'].items()}

  def losses(share, *prompts):
    at = dataclasses.replace(rec, text_dropout=share)
    run = jax.jit(functools.partial(step.flow_step, recipe=at))
    return [float(run(state, frozen, batch | text, np.int32(0))[1]['loss']) for text in prompts]

  kept_one, kept_other, kept_none = losses(0.0, one, other, none)
  assert len({kept_one, kept_other, kept_none}) == 3
  assert losses(1.0, one, other) == pytest.approx([kept_none] * 2, rel=1e-6)


def test_a_profile_names_networks_and_optimizer(folder):
  """In the paths of a lowered step's operations; those of the generator's networks are in tests/test_flops.py."""
  rec, *args = _setup(folder)
  lowered = jax.jit(functools.partial(step.critic_step, recipe=rec)).lower(*args, np.int32(0))
  paths = set(re.findall(r'loc\("([^"]*)"', lowered.as_text(debug_info=True)))
  scopes = {scope for path in paths for scope in re.split(r'[/()]', path)}
  assert {'text', 'rollout', 'critic', 'optimizer'} <= scopes
  assert not {'student', 'teacher', 'reference'} & scopes
  assert any('transpose(jvp(critic))' in path for path in paths)
