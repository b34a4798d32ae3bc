"""Image-to-video with CLIP: what the tower sees of the first frame is stored, and reaches every network."""

import types

import jax
import numpy as np
import pytest
import torch
from PIL import Image

from configs import selfforcing
from salt_jax import (
  cli,
  clips,
  codec,
  data,
  evaluate,
  generate,
  images,
  precompute,
  recipe,
  sample,
  stages,
  step,
  teacher,
  train,
  weights,
)
from salt_jax.errors import InputError
from salt_jax.models import clip
from salt_jax.store import Store
from tests import tiny_config

PROMPTS = ['a red sneaker moves left', 'a blue bag moves up']


@pytest.fixture(scope='module')
def world(tmp_path_factory):
  folder = tiny_config.write_weights(str(tmp_path_factory.mktemp('weights')), tower=True)
  config = tiny_config.get_tower(folder)
  rec = recipe.build(config)
  return config, rec, stages.serving(config, rec, 'text', 'teacher', 'vae')


def batch_of(config, rec):
  first = np.stack([clips.render(clips.describe(i, 'train', config.seed), 1, 32) for i in range(2)])
  ids, mask = stages.tokenizer(config, rec)(PROMPTS)
  batch = {'ids': ids, 'mask': mask, 'index': np.arange(2, dtype=np.int32)}
  return batch | precompute.given(config, rec)(first), first


def test_what_is_stored_is_what_the_tower_sees_of_the_first_frame(world, tmp_path):
  config, rec, _ = world
  store = Store(precompute.conditions(config, rec, str(tmp_path)))
  assert set(store.fields) == {'ids', 'mask', 'condition', 'image'}
  first = clips.render(clips.describe(3, 'train', config.seed), 1, 32)
  pixels = images.clip_pixels(first / np.float32(127.5) - 1, rec.clip.size)
  params = weights.load(config.weights.clip, 'clip', rec.clip)
  # Rows of order one in float16.
  np.testing.assert_allclose(
    store[3]['image'], clip.encode(params, pixels, rec.clip)[0], atol=5e-3, rtol=0
  )
  assert np.abs(store[3]['image'] - store[4]['image']).max() > 0.1


def test_both_prompts_have_the_picture_s_rows(world):
  config, rec, frozen = world
  batch, _ = batch_of(config, rec)
  cond, uncond = step.conditioning(frozen, batch, rec)
  np.testing.assert_array_equal(cond.image, np.asarray(batch['image']).astype(np.float32))
  np.testing.assert_array_equal(cond.image, uncond.image)
  assert cond.image.shape == (2, 10, 24) and cond.frames.shape[-1] == 20


def test_clip_may_see_another_picture_than_the_frame_it_was_fitted_to(world):
  config, rec, _ = world
  given = precompute.given(config, rec)
  rng = np.random.default_rng(0)
  first, wide = (
    rng.integers(0, 256, shape, np.uint8) for shape in ((1, 1, 32, 32, 3), (1, 20, 60, 3))
  )
  one, other = given(first), given(first, [wide])
  np.testing.assert_array_equal(one['condition'], other['condition'])
  assert np.abs(np.asarray(one['image'] - other['image'])).max() > 0.1


def test_sampling_depends_on_the_rows(world):
  config, rec, frozen = world
  batch, _ = batch_of(config, rec)
  few = sample.student(rec, frozen)(weights.load(config.weights.student, 'dit', rec.model), 2)
  args = batch['ids'], batch['mask'], batch['index'], batch['condition']
  one, other = few(*args, batch['image']), few(*args, -batch['image'])
  assert np.abs(np.asarray(one - other)).max() > 1e-2


@pytest.mark.parametrize('sampler', ['student', 'unipc'])
def test_a_program_s_clips_are_given_the_frame_and_the_rows(world, tmp_path, monkeypatch, sampler):
  config, rec, frozen = world
  monkeypatch.setattr(cli, 'config_is_given', lambda: True)
  picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
  Image.fromarray(picture).save(tmp_path / 'first.png')
  flags = dict(steps=2, guidance=None, shift=None, negative=None, last_image=None)
  flags['image'] = str(tmp_path / 'first.png')
  path = config.weights['student' if sampler == 'student' else 'teacher']
  args = types.SimpleNamespace(checkpoint=path, config=config, sampler=sampler, **flags)
  made = sample.generator(args, PROMPTS)
  got = np.stack([clip for _, clip in generate.clips(made, list(enumerate(PROMPTS)), 2)])

  params = weights.load(path, 'dit', rec.model)
  if sampler == 'student':
    run = sample.student(rec, frozen)(params, 2)
  else:
    shape = recipe.latent_shape(config)
    run = teacher.sampler(rec, rec.teacher, frozen, shape)(params, teacher.settings(args, config))
  given = precompute.given(config, rec)(np.stack([picture[None]] * 2))
  words = *stages.tokenizer(config, rec)(PROMPTS), np.arange(2, dtype=np.int32)
  decode = codec.decoder(rec, frozen['vae'])
  # Clips decoded two at once, or one, may round to a neighbouring level of 256.
  want = decode(run(*words, given['condition'], given['image']))
  assert np.abs(got.astype(int) - want).max() <= 1
  for condition, image in (
    (-given['condition'], given['image']),
    (given['condition'], -given['image']),
  ):
    assert np.abs(got.astype(int) - decode(run(*words, condition, image))).max() > 3


@pytest.mark.slow
def test_a_distillation_trains_the_image_branch_and_its_student_is_reported(world, tmp_path):
  config = world[0].copy_and_resolve_references()
  config.update(total_steps=2)
  for net in ('generator', 'critic'):
    config.optim[net].lr = 1e-2
  assert train.run(config, str(tmp_path / 'run')) == {'generator': 1, 'critic': 1}
  _, rec, student = sample.load(str(tmp_path / 'run'))
  before = weights.load(config.weights.init, 'dit', rec.model)
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), student['img_emb'], before['img_emb'])
  assert min(jax.tree.leaves(moved)) > 0
  rows = evaluate.methods(config, rec, {'generator': student})
  ids, mask = stages.tokenizer(config, rec)(PROMPTS)
  row = next(row for row in rows if row.label.startswith('student'))
  assert np.isfinite(row.run(ids, mask, np.arange(2, dtype=np.int32))).all()


def test_a_missing_tower_is_named_at_the_start(world, tmp_path):
  config = world[0].copy_and_resolve_references()
  config.weights.clip = str(tmp_path / 'clip.safetensors')
  with pytest.raises(InputError, match=r'clip.safetensors \(weights.clip\)'):
    train.run(config, str(tmp_path / 'run'))


def test_a_real_size_takes_the_picture_s_shape_and_nano_keeps_its_own(world):
  """wan.md 5.5: the first frame is the picture as torch resizes it, for a video of its shape."""
  config, rec, _ = world
  real = selfforcing.get_config('14b,i2v')
  picture = np.random.default_rng(0).integers(0, 256, (100, 150, 3), np.uint8)
  own, own_rec, first = sample.fitted(real, recipe.build(real), picture)
  size = images.video_size(100, 150, 480 * 832)
  assert (own.video.height, own.video.width) == size == (512, 768)
  assert own_rec.chunking.latent == (64, 96, 16) and real.video.height == 480
  want = torch.nn.functional.interpolate(
    torch.tensor(picture / 127.5 - 1, dtype=torch.float32).permute(2, 0, 1)[None],
    size=size,
    mode='bicubic',
    align_corners=False,
  )
  np.testing.assert_allclose(
    step.to_unit(first)[0, 0], want[0].permute(1, 2, 0).numpy(), atol=2e-4, rtol=0
  )
  square = picture[:32, :32]
  same, same_rec, first = sample.fitted(config, rec, square)
  assert same is config and same_rec is rec
  np.testing.assert_array_equal(first[0, 0], square)


def test_a_store_made_elsewhere_serves_a_real_size(world, tmp_path):
  config, rec, _ = world
  own = config.copy_and_resolve_references()
  folder = precompute.conditions(own, rec, str(tmp_path / 'conditions'))
  own.data = dict(kind='store', path=folder)
  stage = stages.build(own, rec, str(tmp_path))
  batch = next(stage.steps[0].feed(data.Feed(4)))
  assert batch['image'].shape == (4, 10, 24) and batch['condition'].shape == (4, 6, 4, 4, 16)
  ode = tiny_config.stage('ode', config.weights.init.rpartition('/')[0])
  ode.model, ode.teacher, ode.clip, ode.data = own.model, own.teacher, own.clip, own.data
  ode.weights.clip = config.weights.clip
  ode.pairs.update(count=8, steps=4, batch=8)
  stages.build(ode, recipe.build(ode), str(tmp_path))
  pairs, given = Store(str(tmp_path / 'pairs')), Store(folder)
  order = [int(row) for row in next(data.store_batches(folder, data.Feed(8, ode.seed)))['row']]
  for i, row in enumerate(order):
    np.testing.assert_array_equal(pairs[i]['image'], given[row]['image'])
  own.clip.size = 56
  own.model.image_len = own.teacher.image_len = 17
  with pytest.raises(InputError, match=r'image is \(10, 24\), but the config asks for \(17, 24\).'):
    stages.build(own, recipe.build(own), str(tmp_path))
