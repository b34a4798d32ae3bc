"""Videos and prompts encoded once: a record is what the VAE makes of its video, and Causal Forcing's stages take it."""

import os
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image

from configs import causal_init
from salt_jax import captioned, footage, precompute, recipe, tokens, video, video_store, weights
from salt_jax.errors import InputError
from salt_jax.models import vae
from salt_jax.store import Store
from tests import tiny_config

LINES = 'prompt,video\na cat,clips/0.mp4\n"grass, slowly",clips/1.mp4\nwalks,clips/2.mp4\n'


def config_of(folder):
  config = tiny_config.shrink(causal_init.get_config('1.3b,stage=ar'), folder)
  config = tiny_config._with_umt5(config, folder)
  config.video.update(height=32, width=48)
  return config


@pytest.fixture(scope='module')
def world(tmp_path_factory):
  """(config of a real size but for its numbers, recipe, folder of its VAE, videos and prompts)."""
  folder = tmp_path_factory.mktemp('world')
  tiny_config.write_tokenizer(folder)
  config = config_of(str(folder))
  rec = recipe.build(config)
  tiny_config._write(str(folder), 'vae', rec.vae, 0)
  rng = np.random.default_rng(0)
  for number, (rate, shape) in enumerate([(16, (32, 48)), (24, (40, 90)), (30, (64, 36))]):
    coarse = rng.integers(0, 256, (rate * 2, 4, 4, 3), np.uint8)
    clip = np.stack([Image.fromarray(frame).resize(shape[::-1]) for frame in coarse])
    video.write_mp4(str(folder / f'clips/{number}.mp4'), clip, rate)
  (folder / 'p.csv').write_text(LINES)
  config.data.path = str(folder / 'store')
  make(config, rec, folder, config.data.path)
  return config, rec, folder


def make(config, rec, folder, output, name='p.csv'):
  return video_store.videos_and_prompts(config, rec, str(folder / name), str(output), 2)


def test_a_record_is_what_the_vae_makes_of_its_video_and_stages_take_it(world):
  config, rec, folder = world
  assert precompute.given_latents(config, rec) == config.data.path
  store, words = Store(config.data.path, verify=True), tokens.tokenizer(config, rec)
  params = weights.load(config.weights.vae, 'vae', rec.vae)
  encode = jax.jit(lambda params, x: vae.encode(params, x, rec.vae))
  assert len(store) == 3
  for number, prompt in enumerate(['a cat', 'grass, slowly', 'walks']):
    clip = footage.frames(str(folder / f'clips/{number}.mp4'), 21, 16, (32, 48))
    (wanted,) = encode(params, clip[None] / np.float32(127.5) - 1)
    # Latents of order one in float16, of which encoding in parts changes the last bits.
    np.testing.assert_allclose(store[number]['latents'], wanted, atol=4e-3)
    ids, mask = words([prompt])
    np.testing.assert_array_equal(store[number]['ids'], ids[0])
    np.testing.assert_array_equal(store[number]['mask'], mask[0])


def test_a_killed_run_goes_on_and_another_video_is_refused(world, tmp_path, monkeypatch):
  config, rec, folder = world
  path = make(config, rec, folder, tmp_path / 'store')
  for name in ('index.json', 'shard-00001.json'):
    os.unlink(os.path.join(path, name))
  decoded, checked = [], []
  frames, check = footage.frames, footage.check
  with monkeypatch.context() as patch:
    patch.setattr(footage, 'frames', lambda x, *a, **k: (decoded.append(x), frames(x, *a, **k))[1])
    patch.setattr(footage, 'check', lambda x, *a, **k: (checked.append(x), check(x, *a, **k))[1])
    make(config, rec, folder, path)
  assert [os.path.basename(file) for file in decoded + checked] == ['2.mp4'] * 2
  for number in range(3):
    again, before = Store(path, verify=True)[number], Store(config.data.path)[number]
    jax.tree.map(np.testing.assert_array_equal, again, before)
  other = pathlib.Path(tmp_path, 'clips')
  other.mkdir()
  for number, source in enumerate((0, 1, 1)):
    (other / f'{number}.mp4').write_bytes((folder / f'clips/{source}.mp4').read_bytes())
  (tmp_path / 'p.csv').write_text(LINES)
  with pytest.raises(InputError, match='already holds shards made in another way'):
    make(config, rec, tmp_path, path)


@pytest.mark.parametrize(
  'content, sentence',
  [
    ('prompt\na cat\n', 'prompt 1 of .*q.csv names no video: a store of clips wants .jsonl of {'),
    ('prompt,video\na,clips/0.mp4\nb,\n', 'prompt 2 of .*q.csv names no video:'),
    ('prompt,video\na cat,none.mp4\n', r'none.mp4 cannot be read as a video \(.*\): name another'),
    ('prompt,video\na,clips/0.mp4\nb,short.mp4\n', 'short.mp4 lasts 1.25 of the 1.31 seconds of a'),
  ],
)
def test_what_is_no_clip_is_named_before_anything_is_written(world, tmp_path, content, sentence):
  config, rec, folder = world
  video.write_mp4(str(folder / 'short.mp4'), np.zeros((20, 32, 48, 3), np.uint8), 16)
  (folder / 'q.csv').write_text(content)
  with pytest.raises(InputError, match=sentence):
    make(config, rec, folder, tmp_path / 'store', 'q.csv')
  assert not (tmp_path / 'store').exists()


def test_a_store_of_another_rate_is_refused(world):
  config, rec, _ = world
  other = config.copy_and_resolve_references()
  other.video.fps = 8
  with pytest.raises(
    InputError, match='was made at 16 frames a second, and video.fps is 8: encode'
  ):
    precompute.given_latents(other, rec)


def test_large_files_are_told_apart_by_their_size_and_ends(tmp_path):
  path, mib = tmp_path / 'x', 2**20
  content = bytearray(3 * mib)

  def digest(place=None, more=0):
    other = content + bytes(more)
    if place is not None:
      other[place] = 1
    path.write_bytes(other)
    return captioned.digest([(str(path),)], 'video', captioned.ends)

  changed = [digest(place) for place in (0, mib - 1, 2 * mib, 3 * mib - 1)]
  assert len({digest(), digest(more=1), *changed}) == 6
  assert digest(mib) == digest()  # what stands between is not read


def test_pyav_is_asked_for_first(world, tmp_path, monkeypatch):
  config, rec, folder = world
  monkeypatch.setattr(video.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(InputError, match=r"p.csv needs PyAV: pip install 'salt_jax\[video\]'."):
    make(config, rec, folder, tmp_path / 'store')
