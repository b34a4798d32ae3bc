"""Causal Forcing's initial stages from end to end, each from the files and on the data of the one before it."""

import dataclasses
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from salt_jax import causal_steps, evaluate, precompute, recipe, sample, stages, train
from salt_jax import state as states
from salt_jax import weights as files
from salt_jax.diffusion import flow, forcing
from salt_jax.errors import InputError
from salt_jax.losses import causal
from salt_jax.models import wan
from salt_jax.step import conditioning, step_keys
from salt_jax.store import Field, Store, StoreWriter
from tests import tiny_config


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
  return tiny_config.write_weights(str(tmp_path_factory.mktemp('weights')))


def _config(name, weights, **data):
  config = tiny_config.stage(name, weights)
  config.optim.generator.warmup = 0
  if 'pairs' in config:
    config.pairs.update(count=8, steps=8, batch=4)
  config.latents.update(count=8, batch=8)
  config.data.update(data)
  return config


@pytest.fixture(scope='module')
def ar(weights, tmp_path_factory):
  """Stage `ar`: (workdir, its config)."""
  workdir, config = str(tmp_path_factory.mktemp('ar')), _config('ar', weights)
  assert train.run(config, workdir) == {'generator': 1}
  return workdir, config


@pytest.fixture(scope='module')
def later(ar, weights, tmp_path_factory):
  """The stages that follow, on what `ar` left: name -> (workdir, config)."""
  runs = {}
  for name in ('causal_ode', 'causal_cd'):
    config = _config(name, weights, kind='store', path=f'{ar[0]}/latents')
    config.weights.ar = f'{ar[0]}/export/ar-nano-generator.safetensors'
    runs[name] = str(tmp_path_factory.mktemp(name)), config
    assert train.run(config, runs[name][0]) == {'generator': 1}
  return runs


def _metrics(workdir):
  lines = (pathlib.Path(workdir) / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def _moved(workdir, before):
  (file,) = pathlib.Path(workdir, 'export').iterdir()
  after, before = load_file(file), load_file(before)
  return max(np.abs(after[name] - before[name]).max() for name in after)


def test_each_stage_starts_from_its_file_and_moves(ar, later):
  for name, (workdir, config) in {
    'teacher': ar,
    **{f'ar {k}': v for k, v in later.items()},
  }.items():
    file = config.weights[name.split()[0]]
    rec = recipe.build(config)
    start = stages.build(config, rec, workdir).start()['generator']
    jax.tree.map(np.testing.assert_array_equal, start, files.load(file, 'dit', rec.model))
    assert 0 < _moved(workdir, file) < 0.05
    lines = _metrics(workdir)
    assert [line['step'] for line in lines] == [1, 2]
    assert all(line['generator/loss'] > 0 for line in lines)


def test_pairs_hold_the_noise_the_trajectory_its_end_and_the_real_clip(ar, later):
  workdir, config = later['causal_ode']
  pairs, clips = Store(f'{workdir}/pairs'), Store(f'{ar[0]}/latents')
  assert len(pairs) == 8 and pairs.fields['trajectory'] == Field((6, 6, 4, 4, 16), 'float32')
  records = np.stack([pairs[i]['trajectory'] for i in range(8)])
  np.testing.assert_allclose([records[:, 0].mean(), records[:, 0].std()], [0, 1], atol=0.03)
  for i in range(8):
    np.testing.assert_array_equal(records[i, 5], clips[i]['latents'].astype(np.float32))
    np.testing.assert_array_equal(pairs[i]['ids'], clips[i]['ids'])
  # An Euler loop of its own, whose context is made anew at every step and for each prompt.
  rec = recipe.build(config)
  frozen = stages.serving(config, rec, 'text', 'ar')
  ids, mask = (np.stack([clips[i][name] for i in range(4)]) for name in ('ids', 'mask'))
  texts = conditioning(frozen, {'ids': ids, 'mask': mask}, rec)
  model = functools.partial(wan.apply, frozen['ar'], cfg=rec.model)
  velocity = jax.jit(forcing.forced(model, 3))
  clean, x = records[:4, 5], records[:4, 0]
  sigmas = flow.few_step_sigmas(8, 5.0)
  for step in range(8):
    if step % 2 == 0:
      # Eight steps of float32 whose sums run in another order.
      np.testing.assert_allclose(records[:4, step // 2], x, atol=2e-3)
    t = jnp.full((4, 6), 1000 * sigmas[step])
    c, u = (velocity(x, t, text, clean, jnp.zeros((4, 6))) for text in texts)
    x = x + (sigmas[step + 1] - sigmas[step]) * (u + 4.0 * (c - u))
  np.testing.assert_allclose(records[:4, 4], x, atol=2e-3)


def _step_inputs(rec):
  """A state whose average differs from its parameters, a teacher that differs from both, and a batch."""

  def network(seed):
    rng = np.random.default_rng(seed)
    shapes = files.shapes('dit', rec.model)
    return jax.tree.map(lambda x: 0.2 * rng.standard_normal(x.shape).astype(np.float32), shapes)

  state = states._new({'generator': network(0)}, rec.optimizers, ('generator',))
  state = state.replace(ema={'generator': network(1)})
  rng = np.random.default_rng(3)
  batch = {
    'index': np.arange(2, dtype=np.int32),
    'ids': rng.integers(1, 9, (2, 16), dtype=np.int32),
    'mask': np.arange(16) < np.array([[5], [9]]),
    'latents': rng.standard_normal((2, 6, 4, 4, 16)).astype(np.float16),
    'trajectory': rng.standard_normal((2, 6, 6, 4, 4, 16)).astype(np.float32),
  }
  return state, network(2), batch


def _loss_of(name, rec):
  """`(params, average, frozen, batch) -> loss` put together from the pieces, with a gradient through both halves."""

  def forced(params):
    return forcing.forced(functools.partial(wan.apply, params, cfg=rec.model), 3, live=True)

  def free(params):
    clip = wan.Clip(chunk=3)
    return lambda x, t, text, *_: wan.apply(params, x, t, text, clip, rec.model)[0]

  def loss(params, average, frozen, batch):
    keys = step_keys(rec, 0, 'generator', batch['index'])[1]
    texts = text, _ = conditioning(frozen, batch, rec)
    x0 = batch['latents'].astype(np.float32)
    if name == 'causal_ode':
      sigmas = jnp.asarray(flow.few_step_sigmas(4, 5.0), jnp.float32)
      return causal.causal_ode_loss(forced(params), batch['trajectory'], text, keys, sigmas)[0]
    if name == 'causal_cd':
      fns = causal.Fns(*map(forced, (params, average, frozen['ar'])))
      return causal.causal_consistency_loss(fns, x0, texts, keys, rec.causal_consistency, 5.0)[0]
    model = (free if rec.forcing.context == 'diffusion' else forced)(params)
    return causal.causal_flow_loss(model, x0, text, keys, rec.forcing, chunk=3, shift=5.0)[0]

  return lambda *args: loss(*args).mean()


@pytest.mark.parametrize(
  'name, changes',
  [
    ('ar', {}),
    pytest.param('ar', {'forcing.context': 'diffusion'}, marks=pytest.mark.slow),
    pytest.param('causal_ode', {}, marks=pytest.mark.slow),
    ('causal_cd', {}),
  ],
)
def test_a_step_descends_its_loss_and_moves_the_average(name, changes, weights):
  config = _config(name, weights)
  config.update_from_flattened_dict(changes | {'model.remat': False, 'teacher.remat': False})
  rec = recipe.build(config)
  state, ar, batch = _step_inputs(rec)
  frozen = stages.serving(config, rec, 'text') | {'ar': ar}
  step = getattr(causal_steps, f'{name}_step')
  new, metrics = jax.jit(functools.partial(step, recipe=rec))(state, frozen, batch, np.int32(0))
  loss, grads = jax.jit(jax.value_and_grad(_loss_of(name, rec)))(
    state.params['generator'], state.ema['generator'], frozen, batch
  )
  # Two programs of the same arithmetic.
  np.testing.assert_allclose(metrics['loss'], loss, rtol=1e-4)
  np.testing.assert_allclose(metrics['grad_norm'], optax.tree.norm(grads), rtol=1e-3)
  for before, params, after in zip(
    *map(jax.tree.leaves, (state.ema, new.params, new.ema)), strict=True
  ):
    np.testing.assert_allclose(after, 0.99 * before + 0.01 * params, atol=1e-6)


@pytest.fixture(scope='module')
def tiny_sampler(ar):
  config = ar[1]
  rec = recipe.build(config)
  frozen = stages.serving(config, rec, 'text', 'teacher')
  ids, mask = stages.tokenizer(config, rec)(['a red bag moves left', 'a blue dress moves up'])
  return rec, frozen, (ids, mask, np.arange(2, dtype=np.int32))


def test_many_step_causal_sampling_without_guidance_is_a_rollout(tiny_sampler):
  """Guidance 1 is the prompt alone, guidance 0 the unconditional prompt alone."""
  rec, frozen, (ids, mask, index) = tiny_sampler
  plain = dataclasses.replace(rec, chunking=dataclasses.replace(rec.chunking, mode='ode'))
  few = sample.student(plain, frozen)(frozen['teacher'], 3)
  empty = [np.broadcast_to(frozen['negative'][name], ids.shape) for name in ('ids', 'mask')]
  for guidance, expected in ((1.0, few(ids, mask, index)), (0.0, few(*empty, index))):
    got = sample.autoregressive(rec, frozen, guidance)(frozen['teacher'], 3)(ids, mask, index)
    np.testing.assert_allclose(got, expected, atol=1e-4)
  assert np.abs(got - few(ids, mask, index)).max() > 0.05, 'the prompts make no difference here'


@pytest.mark.parametrize(
  'name, labels',
  [
    ('ar', ['teacher, 24 steps', 'AR diffusion, 24 steps']),
    ('causal_ode', ['AR diffusion, 24 steps', 'causal init, 4 steps', 'causal init, 2 steps']),
    ('causal_cd', ['AR diffusion, 24 steps', 'causal init, 4 steps', 'causal init, 2 steps']),
  ],
)
def test_every_method_of_the_reports_samples(name, labels, ar, later):
  _, config = {'ar': ar, **later}[name]
  rec = recipe.build(config)
  networks = {
    'generator': files.load(
      config.weights.ar if name != 'ar' else config.weights.teacher, 'dit', rec.model
    )
  }
  ids, mask = stages.tokenizer(config, rec)(['a red bag moves left'])
  rows = evaluate.methods(config, rec, networks)
  assert [row.label for row in rows] == labels
  made = [np.asarray(row.run(ids, mask, np.arange(1, dtype=np.int32))) for row in rows]
  assert all(x.shape == (1, 6, 4, 4, 16) and np.isfinite(x).all() for x in made)
  assert all(np.abs(a - b).max() > 1e-3 for a, b in zip(made, made[1:], strict=False))


def test_students_can_be_sampled_and_the_autoregressive_model_has_none(ar, later):
  for workdir, _ in later.values():
    assert sample.load(workdir)[1].model.dim == tiny_config.DIT['dim']
  with pytest.raises(InputError, match='the stage "ar", which has no few-step student'):
    sample.load(ar[0])


def test_latents_from_elsewhere_must_fit(ar, weights, tmp_path):
  config = _config('causal_cd', weights, kind='store', path=str(tmp_path / 'store'))
  rec = recipe.build(config)
  with pytest.raises(InputError, match='index.json is missing or unreadable'):
    precompute.given_latents(config, rec)
  writer = StoreWriter(config.data.path, {'latents': Field((3, 4, 4, 16), 'float16')}, 1, {})
  writer.write(0, {'latents': np.zeros((2, 3, 4, 4, 16), np.float16)})
  writer.finish()
  with pytest.raises(
    InputError, match=r'latents is \(3, 4, 4, 16\), but the config asks for \(6, 4, 4, 16\)'
  ):
    precompute.given_latents(config, rec)
  config.data.path = f'{ar[0]}/latents'
  assert precompute.given_latents(config, rec) == config.data.path
  config = _config('causal_ode', weights, kind='store', path=config.data.path)
  config.pairs.count = 12
  del config.latents
  with pytest.raises(InputError, match='pairs.count=12 exceeds the 8 clips in'):
    train.run(config, str(tmp_path / 'run'))
