"""Image to video end to end: the first frame reaches every network of every step, and stages hand over."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from configs import selfforcing
from salt_jax import (
  clips,
  codec,
  evaluate,
  loading,
  precompute,
  recipe,
  sample,
  stages,
  step,
  train,
  weights,
)
from salt_jax.errors import InputError
from salt_jax.models import vae
from salt_jax.state import TrainState
from salt_jax.store import Store
from tests import tiny_config

PROMPTS = ['a red sneaker moves left', 'a blue bag moves up']


@pytest.fixture(scope='module')
def world(tmp_path_factory):
  """(config, recipe, frozen, batch) of random tiny networks that are given first frames."""
  folder = tiny_config.write_weights(str(tmp_path_factory.mktemp('weights')), i2v=True)
  config = tiny_config.get_i2v(folder)
  rec = recipe.build(config)
  frozen = stages.serving(config, rec, 'text', 'teacher', 'vae')
  ids, mask = stages.tokenizer(config, rec)(PROMPTS)
  latents = recipe.latent_shape(config)
  batch = {
    'ids': ids,
    'mask': mask,
    'index': np.arange(2, dtype=np.int32),
    'condition': jax.random.normal(jax.random.key(0), (2, *latents)),
    'latents': jax.random.normal(jax.random.key(1), (2, *latents)),
    'trajectory': jax.random.normal(jax.random.key(2), (2, 5, *latents)),
  }
  return config, rec, frozen, batch


def _blind(params):
  """The network with the weights of the given frames at 0; channels are the slowest axis of the kernel."""
  kernel = params['patch_embedding']['kernel']
  assert kernel.shape[0] == 36 * 4
  return params | {
    'patch_embedding': params['patch_embedding']
    | {'kernel': jnp.asarray(kernel).at[16 * 4 :].set(0)}
  }


def _state(rec, params):
  opt = {name: rec.optimizers[name].init(params[name]) for name in params}
  return TrainState(params=params, opt=opt, ema={}, updates=jnp.int32(0))


def _both(run, rec):
  """Scalars of a step, and the weights of the given frames behind it."""

  @jax.jit
  def both(*args):
    state, metrics = run(*args, recipe=rec)
    nets = {name: net for name, net in state.params.items() if 'patch_embedding' in net}
    return metrics, {name: net['patch_embedding']['kernel'][16 * 4 :] for name, net in nets.items()}

  return both


def _difference(both, state, frozen, batch):
  """How far the scalars of a step move when another first frame is given, and the weights of the given frames."""
  other = batch | {'condition': batch['condition'].at[:, 0].add(1.0)}
  (one, weights), (two, _) = (both(state, frozen, b, jnp.int32(0)) for b in (batch, other))
  return {name: abs(float(one[name]) - float(two[name])) for name in one}, weights


@pytest.fixture(scope='module')
def steps(world):
  """Steps by name, compiled once."""
  rec = world[1]
  optimizers = {'dit': rec.optimizers['generator'], 'text': rec.optimizers['generator']}
  flow = dataclasses.replace(rec, optimizers=optimizers, text_dropout=0.5, flow_shift=3.0)
  made = {
    name: _both(getattr(step, f'{name}_step'), rec) for name in ('generator', 'critic', 'ode')
  }
  return made | {'flow': _both(step.flow_step, flow)}, flow


SEES = [('generator',), ('teacher',), ('critic',), ()]


@pytest.mark.parametrize('seeing', SEES)
def test_the_first_frame_reaches_generator_teacher_and_critic(world, steps, seeing):
  """Each network in turn is the only one that is not blind to it: the loss depends on it all the same.

  And a blind one learns to see: its differentiated pass is given the frames too, mask and latents.
  """
  config, rec, frozen, batch = world
  nets = {
    name: weights.load(config.weights[file], 'dit', rec.model)
    for name, file in (('generator', 'init'), ('teacher', 'teacher'), ('critic', 'student'))
  }
  nets = {name: net if name in seeing else _blind(net) for name, net in nets.items()}
  state = _state(rec, {name: nets[name] for name in ('generator', 'critic')})
  frozen = frozen | {'teacher': nets['teacher']}
  moved, learnt = _difference(steps[0]['generator'], state, frozen, batch)
  assert np.abs(learnt['generator']).max(1).all(), 'the exit step is not given the frames'
  assert (moved['loss_dmd'] > 1e-4) == bool(seeing), moved
  moved, learnt = _difference(steps[0]['critic'], state, frozen, batch)
  assert np.abs(learnt['critic']).max(1).all(), 'the critic is not given the frames'
  assert (moved['loss'] > 1e-4) == bool({'generator', 'critic'} & set(seeing)), moved


@pytest.mark.parametrize('seeing', [True, False])
def test_the_first_frame_reaches_the_steps_before_distillation(world, steps, seeing):
  config, rec, frozen, batch = world
  net = weights.load(config.weights.init, 'dit', rec.model)
  net = net if seeing else _blind(net)
  made, flow = steps
  moved, _ = _difference(made['ode'], _state(rec, {'generator': net}), frozen, batch)
  assert (moved['loss'] > 1e-4) == seeing
  state = _state(flow, {'dit': net, 'text': frozen['text']})
  moved, _ = _difference(made['flow'], state, frozen, batch)
  assert (moved['loss'] > 1e-4) == seeing


def test_the_unconditional_prompt_keeps_the_frames_and_loses_the_text(world):
  _, rec, frozen, batch = world
  cond, uncond = step.conditioning(frozen, batch, rec)
  np.testing.assert_array_equal(cond.frames, uncond.frames)
  np.testing.assert_array_equal(cond.frames[..., 4:], batch['condition'])
  assert cond.frames.shape[-1] == 20 and np.abs(cond.text - uncond.text).max() > 0.1


def test_what_is_stored_is_the_first_frame_of_its_clip_before_grey(world, tmp_path):
  config, rec, frozen, _ = world
  store = Store(precompute.conditions(config, rec, str(tmp_path / 'conditions')))
  record = store[3]
  first = clips.render(clips.describe(3, 'train', config.seed), 21, 32)[:1]
  video = np.concatenate([first / 127.5 - 1, np.zeros((20, 32, 32, 3))]).astype(np.float32)
  expected = jax.jit(lambda p, x: vae.encode(p, x, rec.vae))(frozen['vae'], video[None])[0]
  # Latents of order one in float16.
  np.testing.assert_allclose(record['condition'], expected, atol=1e-2)
  whole = Store(precompute.latents(config, rec, str(tmp_path / 'latents')))[3]
  np.testing.assert_allclose(whole['condition'], expected, atol=1e-2)
  np.testing.assert_allclose(whole['latents'][0], expected[0], atol=1e-2)
  assert np.abs(whole['latents'] - whole['condition'])[1:].max() > 0.1
  ids, _ = stages.tokenizer(config, rec)(clips.captions('train', np.array([3]), config.seed))
  np.testing.assert_array_equal(record['ids'], ids[0])


def test_sampling_depends_on_the_picture_and_streams_alike(world):
  config, rec, frozen, batch = world
  student = weights.load(config.weights.student, 'dit', rec.model)
  few = sample.student(rec, frozen)(student, 2)
  args = batch['ids'], batch['mask'], batch['index']
  one, other = few(*args, batch['condition']), few(*args, batch['condition'] + 1)
  assert np.abs(one - other).max() > 1e-2
  whole = codec.decoder(rec, frozen['vae'])(one)
  parts = sample.stream(rec, student, frozen, frozen['vae'], (*args, batch['condition']), 2)
  # float32 rounding may tip a pixel over to the next of 256 levels.
  assert np.abs(np.concatenate(list(parts), axis=1).astype(int) - whole).max() <= 1


def test_pictures_that_do_not_fit_are_refused(world, tmp_path):
  config, rec, _, _ = world
  Image.new('RGB', (32, 32), 'red').save(tmp_path / 'red.png')
  Image.new('RGB', (48, 32)).save(tmp_path / 'wide.png')
  (tmp_path / 'text.png').write_text('no picture')
  (tmp_path / 'cut.png').write_bytes((tmp_path / 'red.png').read_bytes()[:50])
  (tmp_path / 'folder.png').mkdir()
  assert loading.first_image(str(tmp_path / 'red.png'), config, rec)[0, 0].tolist() == [255, 0, 0]
  text_alone = dataclasses.replace(rec, model=dataclasses.replace(rec.model, in_channels=16))
  for path, given, sentence in (
    (None, rec, 'pass --image: this network continues a picture of 32x32 pixels.'),
    (tmp_path / 'wide.png', rec, 'wide.png is 48x32: scale it to 32x32 pixels.'),
    (tmp_path / 'text.png', rec, 'text.png cannot be read as a picture'),
    (tmp_path / 'cut.png', rec, 'cut.png cannot be read as a picture'),
    (tmp_path / 'folder.png', rec, 'folder.png cannot be read as a picture'),
    (tmp_path / 'none.png', rec, 'none.png cannot be read as a picture'),
    (tmp_path / 'red.png', text_alone, 'has no use: this network is given text alone.'),
  ):
    with pytest.raises(InputError, match=sentence):
      loading.first_image(path and str(path), config, given)
  assert loading.first_image(None, config, text_alone) is None
  Image.new('RGB', (4000, 1)).save(tmp_path / 'line.png')
  real = selfforcing.get_config('14b,i2v')
  with pytest.raises(InputError, match='line.png is 4000x1, too narrow for a video of its shape'):
    loading.first_image(str(tmp_path / 'line.png'), real, rec)
  assert loading.first_image(str(tmp_path / 'wide.png'), real, rec).shape == (32, 48, 3)
  with pytest.raises(InputError, match='pass --image: this network continues a picture.$'):
    loading.first_image(None, real, rec)


@pytest.mark.slow
def test_stages_run_and_hand_over(world, tmp_path):
  """A teacher on stored first frames, a causal init on its trajectories, and distillation from the two."""
  folder = world[0].weights.init.rpartition('/')[0]
  teacher = tiny_config.stage('teacher,i2v', folder)
  teacher.latents.update(count=16, batch=8)
  for net in ('dit', 'text'):
    teacher.optim[net].warmup = 0
  assert teacher.model.in_channels == 36
  assert train.run(teacher, str(tmp_path / 'teacher')) == {'dit': 1}
  exported = str(tmp_path / 'teacher' / 'export' / 'pretrain-teacher-i2v-dit.safetensors')

  ode = tiny_config.stage('ode', folder)
  ode.model.in_channels = ode.teacher.in_channels = 36
  ode.pairs.update(count=16, steps=8, batch=8)
  ode.optim.generator.warmup = 0
  ode.weights.teacher = exported
  assert train.run(ode, str(tmp_path / 'ode')) == {'generator': 1}

  distil = tiny_config.get_i2v(folder)
  distil.update(total_steps=2)
  distil.weights.update(teacher=exported)
  distil.weights.init = str(tmp_path / 'ode' / 'export' / 'causal_init-nano-generator.safetensors')
  assert train.run(distil, str(tmp_path / 'distil')) == {'generator': 1, 'critic': 1}
  _, rec, student = sample.load(str(tmp_path / 'distil'))
  assert rec.model.frame_channels == 20 and student['patch_embedding']['kernel'].shape[0] == 36 * 4


def test_the_report_gives_each_clip_the_first_frame_of_its_own(world):
  config, rec, frozen, batch = world
  params = weights.load(config.weights.student, 'dit', rec.model)
  rows = evaluate.methods(config, rec, {'generator': params})
  student = next(row for row in rows if row.label == 'student, 2 steps')
  args = batch['ids'][:1], batch['mask'][:1], np.array([5], np.int32)
  few, encode = sample.student(rec, frozen)(params, 2), precompute.first_frames(rec, 21)

  def expected(clip):
    first = clips.render(clips.describe(clip, 'seen', config.seed), 21, 32)[None, :1]
    return few(*args, encode(frozen['vae'], first))

  got = student.run(*args)
  np.testing.assert_allclose(got, expected(5), atol=1e-4)
  assert np.abs(got - expected(6)).max() > 1e-2
