"""Pictures and prompts encoded once: a record holds what the original makes of the picture's middle, and trains."""

import json
import os

import jax
import numpy as np
import pytest
import torch
from PIL import Image

from configs import selfforcing
from salt_jax import (
  captioned,
  data,
  image_store,
  precompute,
  recipe,
  stages,
  step,
  tokens,
  video,
  weights,
)
from salt_jax.errors import InputError
from salt_jax.models import clip, vae
from salt_jax.store import Store
from tests import tiny_config

# Wide, tall, as they are to be, and smaller.
SIZES = ((40, 90), (70, 30), (32, 48), (8, 12))
LINES = [
  {'prompt': 'a cat', 'image': 'pictures/0.png'},
  {'prompt': 'grass, slowly', 'image': 'pictures/1.png', 'negative': 'the grass'},
  {'prompt': 'a cat walks on the grass', 'image': 'pictures/2.png'},
  {'prompt': 'walks', 'image': 'pictures/3.png', 'negative': ''},
]


@pytest.fixture(scope='module')
def world(tmp_path_factory):
  """(config of a real size but for its numbers, recipe, folder of its weights, pictures and prompts)."""
  folder = tmp_path_factory.mktemp('world')
  tiny_config.write_tokenizer(folder)
  config = tiny_config.get_pictured(selfforcing.get_config('14b,i2v'), str(folder))
  rng = np.random.default_rng(0)
  (folder / 'pictures').mkdir()
  for i, size in enumerate(SIZES):
    Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(folder / f'pictures/{i}.png')
  (folder / 'p.jsonl').write_text('\n'.join(map(json.dumps, LINES)))
  config.data.path = str(folder / 'store')
  rec = recipe.build(config)
  for seed, (name, cfg) in enumerate({'vae': rec.vae, 'text': rec.text, 'clip': rec.clip}.items()):
    tiny_config._write(str(folder), name, cfg, seed)
  make(config, rec, folder, config.data.path)
  return config, rec, folder


def make(config, rec, folder, output, name='p.jsonl'):
  return image_store.pictures_and_prompts(config, rec, str(folder / name), str(output), 3)


def resized(picture, size):
  x = torch.tensor(np.moveaxis(picture / 127.5 - 1, -1, 0)[None], dtype=torch.float32)
  x = torch.nn.functional.interpolate(x, size=size, mode='bicubic', align_corners=False)
  return np.moveaxis(x.numpy(), 1, -1)


# Rows and columns of the middle of each picture that has the shape 32:48.
@pytest.mark.parametrize(
  'row, part',
  [(0, (0, 40, 15, 75)), (1, (25, 45, 0, 30)), (2, (0, 32, 0, 48)), (3, (0, 8, 0, 12))],
)
def test_a_record_is_the_middle_of_its_picture_as_torch_resizes_it(world, row, part):
  config, rec, folder = world
  record = Store(config.data.path, verify=True)[row]
  top, bottom, left, right = part
  picture = np.asarray(Image.open(folder / f'pictures/{row}.png'))[top:bottom, left:right]
  grey = np.zeros((1, 20, 32, 48, 3), np.float32)
  pixels = np.concatenate([resized(picture, (32, 48))[:, None], grey], axis=1)
  params = weights.load(config.weights.vae, 'vae', rec.vae)
  want = jax.jit(lambda p, x: vae.encode(p, x, rec.vae))(params, pixels)[0]
  # Latents of order one in float16.
  np.testing.assert_allclose(record['condition'], want, atol=1e-2)
  mean, deviation = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
  seen = (resized(picture, (42, 42)) * 0.5 + 0.5 - mean) / deviation
  tower = weights.load(config.weights.clip, 'clip', rec.clip)
  want = clip.encode(tower, seen.astype(np.float32), rec.clip)[0]
  np.testing.assert_allclose(record['image'], want, atol=5e-3, rtol=0)


def test_a_picture_of_another_size_compiles_nothing(world, caplog):
  config, rec, _ = world
  encode, rng = precompute.given(config, rec), np.random.default_rng(1)

  def compiled(size):
    picture = rng.integers(0, 256, (*size, 3), np.uint8)
    caplog.clear()
    with jax.log_compiles():
      jax.block_until_ready(encode(*image_store.framed([picture], (32, 48))))
    return [r.getMessage() for r in caplog.records if r.getMessage().startswith('Compiling')]

  assert compiled((50, 70)), 'the log does not tell what is compiled'
  assert compiled((37, 61)) == []


def test_prompts_stand_beside_their_pictures_and_negative_ones_reach_guidance(world):
  config, rec, _ = world
  store, words = Store(config.data.path), tokens.tokenizer(config, rec)
  assert len(store) == 4
  for i, line in enumerate(LINES):
    ids, mask = words([line['prompt']])
    np.testing.assert_array_equal(store[i]['ids'], ids[0])
    np.testing.assert_array_equal(store[i]['mask'], mask[0])
    assert store[i]['has_negative'] == (i == 1)
  np.testing.assert_array_equal(store[1]['negative_ids'], words(['the grass'])[0][0])
  frozen = stages.serving(config, rec, 'text')
  feed = data.Feed(4, config.seed)
  batch = next(stages._prompts(config, rec, '')(feed))
  _, uncond = step.conditioning(frozen, batch, rec)
  own = list(batch['row']).index(1)
  others = [i for i in range(4) if i != own]
  same = np.asarray(uncond.text[np.array(others)])
  np.testing.assert_array_equal(same, np.repeat(same[:1], 3, axis=0))
  assert np.abs(uncond.text[own] - same[0]).max() > 0.1
  assert batch['condition'].shape == (4, 6, 4, 6, 16) and batch['image'].shape == (4, 10, 24)


def test_prompts_of_another_tokenizer_are_refused(world, tmp_path):
  config, rec, _ = world
  tiny_config.write_tokenizer(tmp_path, 'the quick brown fox')
  other = config.copy_and_resolve_references()
  other.weights.tokenizer = str(tmp_path)
  assert precompute.given_store(config, rec) == config.data.path
  with pytest.raises(
    InputError, match='made with another tokenizer than .*: encode the prompts ag'
  ):
    precompute.given_store(other, rec)


def test_each_process_checks_the_pictures_that_it_has_still_to_encode(tmp_path, monkeypatch):
  pictures = [(f'{i}.png', f'{i}.jpg') for i in range(7)]
  for suffix in ('array_record', 'json'):
    (tmp_path / f'shard-00001.{suffix}').touch()
  monkeypatch.setattr(jax, 'process_count', lambda: 2)
  for host, numbers in ((0, (0, 1, 4, 5)), (1, (6,))):
    monkeypatch.setattr(jax, 'process_index', lambda host=host: host)
    want = [f'{i}.{suffix}' for i in numbers for suffix in ('png', 'jpg')]
    assert captioned.due(pictures, str(tmp_path), 2) == want


def test_a_picture_of_a_shard_that_is_there_must_be_there_too(world, tmp_path):
  config, rec, folder = world
  (folder / 'gone.png').write_bytes((folder / 'pictures/0.png').read_bytes())
  (folder / 'gone.csv').write_text('prompt,image\na cat,gone.png\n')
  make(config, rec, folder, tmp_path, 'gone.csv')
  (folder / 'gone.png').unlink()
  with pytest.raises(InputError, match='gone.png cannot be read: put the picture there.'):
    make(config, rec, folder, tmp_path, 'gone.csv')


def test_a_killed_run_goes_on_and_another_picture_is_refused(world, tmp_path, monkeypatch):
  config, rec, folder = world
  path = make(config, rec, folder, tmp_path / 'store')
  for name in ('index.json', 'shard-00001.json'):
    os.unlink(os.path.join(path, name))
  kept = os.stat(os.path.join(path, 'shard-00000.array_record')).st_mtime_ns
  decoded, read = [], video.read_image
  with monkeypatch.context() as patch:
    patch.setattr(video, 'read_image', lambda file: (decoded.append(file), read(file))[1])
    make(config, rec, folder, path)
    assert [os.path.basename(file) for file in decoded] == ['3.png'] * 2  # checked, and encoded
    make(config, rec, folder, path)
    assert len(decoded) == 2
  assert os.stat(os.path.join(path, 'shard-00000.array_record')).st_mtime_ns == kept
  for i, record in enumerate(map(Store(path, verify=True).__getitem__, range(4))):
    jax.tree.map(np.testing.assert_array_equal, record, Store(config.data.path)[i])
  before = (folder / 'pictures/3.png').read_bytes()
  try:
    Image.new('RGB', (20, 20)).save(folder / 'pictures/3.png')
    with pytest.raises(InputError, match='already holds shards made in another way'):
      make(config, rec, folder, path)
  finally:
    (folder / 'pictures/3.png').write_bytes(before)


@pytest.mark.parametrize(
  'name, content, sentence',
  [
    ('q.txt', 'a cat', r'prompt 1 of .*q.txt names no image: image-to-video wants .jsonl of'),
    ('q.csv', 'prompt,image\na cat,pictures/0.png\ngrass,\n', 'prompt 2 of .*q.csv names no image:'),
    ('q.jsonl', '"a"\n{"prompt": "a", "image": 3}', 'prompt 1 of .*q.jsonl names no image:'),
    ('q.jsonl', '{"prompt": "a", "image": 3}', 'prompt 1 of .*q.jsonl: "image" must be a string, th'),
    ('q.jsonl', '{"prompt": "a", "image": ["0.png"]}', 'prompt 1 of .*: "image" must be a string'),
    ('q.csv', 'prompt,image\na cat,none.png\n', 'none.png cannot be read as a picture: pass a PNG'),
    ('q.csv', 'prompt,image\na cat,cut.png\n', 'cut.png cannot be read as a picture: pass a PNG'),
  ],
)  # fmt: skip
def test_what_is_no_picture_is_named_before_anything_is_written(
  world, tmp_path, name, content, sentence
):
  config, rec, folder = world
  (folder / 'cut.png').write_bytes((folder / 'pictures/0.png').read_bytes()[:-2000])
  (folder / name).write_text(content)
  with pytest.raises(InputError, match=sentence):
    make(config, rec, folder, tmp_path / 'store', name)
  assert not (tmp_path / 'store').exists()
