"""First and last frame given: what network, VAE and CLIP tower get of two pictures, from the command and of a store."""

import types

import jax
import numpy as np
import pytest
from PIL import Image

from configs import dmd
from salt_jax import (
  cli,
  conversion,
  convert,
  generate,
  image_store,
  loading,
  recipe,
  sample,
  stages,
  step,
  teacher,
  weights,
)
from salt_jax.errors import InputError
from salt_jax.models import clip, vae
from salt_jax.store import Store
from tests import tiny_config
from tests.test_image_store import resized

PROMPT = ['a cat walks']


@pytest.fixture(scope='module')
def world(tmp_path_factory):
  """(config of the real size but for its numbers, recipe, folder of weights and pictures)."""
  folder = tmp_path_factory.mktemp('world')
  tiny_config.write_tokenizer(folder)
  config = tiny_config.get_pictured(dmd.get_config('14b,flf2v'), str(folder))
  config.rollout.chunk = 6
  rec = recipe.build(config)
  cfgs = {'vae': rec.vae, 'text': rec.text, 'clip': rec.clip, 'teacher': rec.teacher}
  for seed, (name, cfg) in enumerate(cfgs.items()):
    tiny_config._write(str(folder), name, cfg, seed)
  rng = np.random.default_rng(0)
  for name, size in (('first', (40, 60)), ('last', (40, 90)), ('other', (40, 60))):
    Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(folder / f'{name}.png')
  return config, rec, folder


def expected(config, rec, first, last):
  """(latents, rows) of pictures `[h w 3]` of one shape."""
  size = config.video.height, config.video.width
  video = np.zeros((1, 21, *size, 3), np.float32)
  video[:, 0], video[:, -1] = resized(first, size), resized(last, size)
  params = weights.load(config.weights.vae, 'vae', rec.vae)
  latents = jax.jit(lambda p, x: vae.encode(p, x, rec.vae))(params, video)[0]
  mean, deviation = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
  seen = np.concatenate([resized(x, (42, 42)) for x in (first, last)]) * 0.5 + 0.5
  tower = weights.load(config.weights.clip, 'clip', rec.clip)
  rows = clip.encode(tower, ((seen - mean) / deviation).astype(np.float32), rec.clip)
  return latents, np.concatenate(rows)


def given(world, last='last'):
  config, rec, folder = world
  paths = [str(folder / f'{name}.png') for name in ('first', last)]
  pictures = loading.given_pictures(paths, config, rec)
  config, rec, known = loading.fitted(config, rec, *pictures)
  return config, rec, pictures, sample._given(config, rec, known, pictures)


def test_both_frames_reach_vae_tower_and_mask(world):
  """The last picture is wider than the first: its middle is taken."""
  config, rec, (first, last), (condition, rows) = given(world)
  want, want_rows = expected(config, rec, first, last[:, 15:75])
  # Values of order one in float16.
  np.testing.assert_allclose(condition[0], want, atol=1e-2)
  np.testing.assert_allclose(rows[0], want_rows, atol=5e-3)
  ids, mask = stages.tokenizer(config, rec)(PROMPT)
  batch = {'ids': ids, 'mask': mask, 'condition': condition, 'image': rows}
  cond, uncond = step.conditioning(stages.serving(config, rec, 'text'), batch, rec)
  for prompt in (cond, uncond):
    masks = np.asarray(prompt.frames[0, :, ..., :4])
    assert (masks[0] == 1).all() and (masks[1:-1] == 0).all()
    assert (masks[-1, ..., :3] == 0).all() and (masks[-1, ..., 3] == 1).all()
    np.testing.assert_array_equal(prompt.frames[..., 4:], condition)
    np.testing.assert_array_equal(prompt.image, np.asarray(rows).astype(np.float32))


def test_a_clip_of_the_command_depends_on_the_last_picture(world, monkeypatch):
  config, _, folder = world
  monkeypatch.setattr(cli, 'config_is_given', lambda: True)
  flags = dict(checkpoint=config.weights.teacher, config=config, sampler='unipc', steps=2)
  flags |= dict(guidance=None, shift=None, negative=None, image=str(folder / 'first.png'))
  clips = []
  for last in ('last', 'other', 'last'):
    args = types.SimpleNamespace(last_image=str(folder / f'{last}.png'), **flags)
    made = sample.generator(args, PROMPT)
    clips.append(next(clip for _, clip in generate.clips(made, [(0, PROMPT[0])], 1)))
  one, other, again = clips
  assert one.shape == (21, 32, 48, 3) and (one != other).any()
  np.testing.assert_array_equal(one, again)


def test_a_store_has_both_frames_of_each_prompt(world, tmp_path):
  config, rec, folder = world
  (folder / 'p.csv').write_text('prompt,image,last_image\na cat walks,first.png,last.png\n')
  path = image_store.pictures_and_prompts(config, rec, str(folder / 'p.csv'), str(tmp_path), 1)
  record, (first, last) = Store(path)[0], given(world)[2]
  want, want_rows = expected(config, rec, first, last[:, 15:75])
  np.testing.assert_allclose(record['condition'], want, atol=1e-2)
  np.testing.assert_allclose(record['image'], want_rows, atol=5e-3)
  (folder / 'p.csv').write_text('prompt,image\na cat walks,first.png\n')
  with pytest.raises(
    InputError, match='names no last_image: .* the columns prompt, image, last_im'
  ):
    image_store.pictures_and_prompts(config, rec, str(folder / 'p.csv'), str(tmp_path), 1)


def test_the_real_size_is_the_published_one_and_its_defaults_are_wan_s():
  config = dmd.get_config('14b,flf2v')
  rec = recipe.build(config)
  names = convert.wan_shapes(weights.shapes('dit', rec.teacher), 'dit')
  assert names == conversion.expected('dit', 'flf2v_14b') and len(names) == 1304
  assert config.negative.startswith('镜头切换，镜头晃动，色调艳丽')
  args = types.SimpleNamespace(sampler='unipc', steps=None, shift=None, guidance=None)
  assert teacher.settings(args, config) == teacher.Settings('unipc', 50, 16.0, 5.0)
  with pytest.raises(InputError, match='nano has no first-and-last-frame form: choose one of 14b.'):
    dmd.get_config('nano,flf2v')
  with pytest.raises(InputError, match='arguments i2v and flf2v exclude each other: leave one of'):
    dmd.get_config('14b,i2v,flf2v')


def test_rows_for_one_picture_are_not_enough(world):
  config = world[0].copy_and_resolve_references()
  config.model.image_len = config.teacher.image_len = 10
  with pytest.raises(InputError, match='image_len=10 must equal 20, the rows for two pictures of'):
    recipe.build(config)


def test_a_last_picture_too_many_or_too_few_is_refused(world):
  config, rec, folder = world
  first, last = str(folder / 'first.png'), str(folder / 'last.png')
  with pytest.raises(InputError, match='pass --last_image: this network is given the last frame'):
    loading.given_pictures((first, None), config, rec)
  one = dmd.get_config('14b,i2v')
  with pytest.raises(InputError, match='--last_image=.*last.png has no use: this network is not'):
    loading.given_pictures((first, last), one, recipe.build(one))
  none = dmd.get_config('14b')
  with pytest.raises(InputError, match='--last_image=.*last.png has no use: this network is not'):
    loading.given_pictures((None, last), none, recipe.build(none))
