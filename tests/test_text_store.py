"""Prompts encoded once: the store holds the encoder's rows, and training on it equals encoding as one goes."""

import json
import os
import sys

import jax
import numpy as np
import pytest
import safetensors.numpy
from absl import flags
from PIL import Image

from configs import selfforcing
from salt_jax import cli, convert, data, precompute_cli, recipe, stages, text_store, tokens, train
from salt_jax.errors import InputError
from salt_jax.models import text
from salt_jax.store import Store
from salt_jax.video import write_mp4
from tests import tiny_config

LINES = [
  {'prompt': 'a red sneaker moves left'},
  {'prompt': 'a blue bag moves up and a green dress moves down', 'negative': 'a red bag'},
  {'prompt': 'bag'},
  {'prompt': 'a cyan boot moves right', 'negative': 'moves'},
  {'prompt': 'a yellow boot moves right'},
]


@pytest.fixture(scope='module')
def world(tmp_path_factory):
  """(config that reads texts from a store, recipe, file of prompts), of an encoder that computes in bfloat16."""
  folder = tmp_path_factory.mktemp('world')
  config = tiny_config.get_config(tiny_config.write_weights(str(folder)))
  config.text.dtype = 'bfloat16'
  prompts = folder / 'prompts.jsonl'
  prompts.write_text('\n'.join(json.dumps(line) for line in LINES))
  config.data = dict(kind='text_store', path=str(folder / 'texts'))
  rec = recipe.build(config)
  text_store.texts(config, rec, str(prompts), config.data.path, 2)
  return config, rec, str(prompts)


def encoded(config, rec, prompt):
  """Rows of one prompt, encoded alone and without padding."""
  ids, mask = tokens.tokenizer(config, rec)([prompt]) if prompt else text.pad([[text.EOS]], 1)
  params = convert.load_params(config.weights.text, 'umt5', text.param_shapes(rec.text))
  count = mask.sum()
  return np.asarray(text.encode(params, ids[:, :count], mask[:, :count], rec.text))[0]


def test_records_are_the_rows_of_each_prompt_without_padding(world):
  config, rec, _ = world
  store = Store(config.data.path, verify=True)
  assert len(store) == 5 and store.fields['text'].shape == (None, 64)
  for i, line in enumerate(LINES):
    want = encoded(config, rec, line['prompt'])
    assert store[i]['text'].shape == want.shape == (len(line['prompt'].split()) + 1, 64)
    # Rows of order one; bfloat16 has 8 bits, and padding changes the order of sums.
    np.testing.assert_allclose(store[i]['text'].astype(np.float32), want, atol=0.05, rtol=0)
    negative = store[i]['negative'].astype(np.float32)
    if 'negative' in line:
      np.testing.assert_allclose(negative, encoded(config, rec, line['negative']), atol=0.05)
    else:
      assert negative.shape == (0, 64)
  np.testing.assert_allclose(
    text_store.negative_rows(config, rec).astype(np.float32), encoded(config, rec, ''), atol=0.05
  )


def test_batches_are_zero_behind_the_rows(world):
  config, rec, _ = world
  store = Store(config.data.path)
  batch = next(data.text_store(config.data.path, 16, data.Feed(5)))
  assert sorted(batch['row'].tolist()) == list(range(5)) and batch['text'].shape == (5, 16, 64)
  for i, row in enumerate(batch['row']):
    for name, field in (('text', 'text'), ('negative_text', 'negative')):
      rows = store[int(row)][field]
      np.testing.assert_array_equal(batch[name][i, : len(rows)], rows)
      assert not batch[name][i, len(rows) :].any()
    assert batch['has_negative'][i] == ('negative' in LINES[row])


def test_a_killed_run_goes_on_and_other_prompts_are_refused(world, tmp_path):
  config, rec, prompts = world
  folder = tmp_path / 'texts'
  text_store.texts(config, rec, prompts, str(folder), 2)
  before = [Store(str(folder))[i]['text'] for i in range(5)]
  for name in ('index.json', 'shard-00001.json'):
    (folder / name).unlink()
  kept = os.stat(folder / 'shard-00000.array_record').st_mtime_ns
  with pytest.raises(InputError, match='the store is unfinished'):
    data.text_store(str(folder), 16, data.Feed(1))
  text_store.texts(config, rec, prompts, str(folder), 2)
  assert os.stat(folder / 'shard-00000.array_record').st_mtime_ns == kept
  for i, rows in enumerate(before):
    np.testing.assert_array_equal(Store(str(folder), verify=True)[i]['text'], rows)
  other = tmp_path / 'other.txt'
  other.write_text('a red bag\n' * 5)
  with pytest.raises(InputError, match='already holds shards made in another way'):
    text_store.texts(config, rec, str(other), str(folder), 2)


def test_training_on_the_store_equals_encoding_as_one_goes(world, tmp_path):
  """The same prompts in the same order with the same negative ones; and the encoder is not on the device."""
  config, rec, prompts = world
  exports = []
  for kind, path in (('text_store', config.data.path), ('prompts', prompts)):
    own = config.copy_and_resolve_references()
    own.data, own.total_steps = dict(kind=kind, path=path), 2
    own.losses.update(consistency=0.0, alignment=0.0)  # which ask the same rows
    own.optim.generator.lr = 1e-2
    run = tmp_path / kind
    assert train.run(own, str(run)) == {'generator': 1, 'critic': 1}
    lines = [json.loads(line) for line in (run / 'metrics.jsonl').read_text().splitlines()]
    exports.append((lines, safetensors.numpy.load_file(next((run / 'export').iterdir()))))
  (one, weights), (other, others) = exports
  assert len(one) == len(other) == 2
  # The stored bfloat16 is what the encoder computes with, but a program of its own rounds at other places.
  for name in (n for n in one[0] if 'loss' in n or 'norm' in n):
    assert one[0][name] == pytest.approx(other[0][name], rel=5e-3), name
  start = safetensors.numpy.load_file(config.weights.init)
  apart, moved = (
    np.mean(np.concatenate([np.abs(weights[name] - x[name]).ravel() for name in weights]))
    for x in (others, start)
  )
  assert moved > 1e-4 and apart < 0.03 * moved


def test_the_encoder_is_not_among_the_frozen_networks(world, tmp_path):
  config, rec, _ = world
  stage = stages.build(config, rec, str(tmp_path))
  assert set(stage.frozen) == {'teacher', 'negative'} and set(stage.frozen['negative']) == {'text'}
  batch = next(stage.steps[0].feed(data.Feed(4)))
  assert 'ids' not in batch and batch['text'].shape == (4, 16, 64)


@pytest.fixture(scope='module')
def real(tmp_path_factory):
  """A config of a real size with a tiny encoder and a tiny tokenizer in files."""
  folder = tmp_path_factory.mktemp('real')
  tiny_config.write_tokenizer(folder)
  config = selfforcing.get_config('1.3b')
  config.text.update(vocab=256, dim=64, dim_attn=64, heads=4, ffn_dim=32, layers=2)
  for name in ('model', 'teacher'):
    config[name].update(dim=32, ffn_dim=48, heads=2, layers=2, text_dim=64)
  config.alignment.layer = 1
  config.weights.update(text=str(folder / 'text.safetensors'), tokenizer=str(folder))
  rec = recipe.build(config)
  params = jax.jit(text.init_params, static_argnums=1)(jax.random.key(0), rec.text)
  convert.save_params(config.weights.text, params, 'umt5')
  return config, rec, folder


def test_a_real_size_stores_wan_s_negative_prompt_and_needs_no_encoder_afterwards(real):
  config, rec, folder = real
  (folder / 'p.csv').write_text(
    'prompt,negative\n"A cat &amp; a  dog",\n' + 'cat ' * 700 + ',grass\n'
  )
  config.data = dict(kind='text_store', path=str(folder / 'texts'))
  text_store.texts(config, rec, str(folder / 'p.csv'), config.data.path, 4)
  store, words = Store(config.data.path), tokens.tokenizer(config, rec)
  counts = words(['A cat & a dog', 'cat ' * 700, 'grass', config.negative])[1].sum(1).tolist()
  assert counts[1] == 512
  found = [
    store[0]['text'],
    store[1]['text'],
    store[1]['negative'],
    text_store.negative_rows(config, rec),
  ]
  assert [len(rows) for rows in found] == counts
  os.rename(folder / 'text.safetensors', folder / 'away.safetensors')
  batch = next(data.text_store(config.data.path, rec.text_length, data.Feed(2)))
  assert batch['text'].shape == (2, 512, 64)
  with pytest.raises(InputError, match='needs weights that are not there') as error:
    stages.build(config, rec, str(folder))
  os.rename(folder / 'away.safetensors', folder / 'text.safetensors')
  assert 'weights.text' not in str(error.value) and 'weights.tokenizer' not in str(error.value)


def test_a_store_of_another_negative_prompt_or_encoder_is_refused(world, real, tmp_path):
  config, rec, folder = real
  (folder / 'q.txt').write_text('a cat\n')
  own = config.copy_and_resolve_references()
  own.data = dict(kind='text_store', path=str(tmp_path / 'texts'))
  text_store.texts(own, rec, str(folder / 'q.txt'), own.data.path, 1)
  own.negative = 'blur'
  with pytest.raises(
    InputError, match="made with negative .* but the config has 'blur': encode the prompts again"
  ):
    text_store.negative_rows(own, rec)
  nano = world[0].copy_and_resolve_references()
  nano.text.dim = nano.model.text_dim = nano.teacher.text_dim = 32
  with pytest.raises(
    InputError, match='is no store of texts 32 wide: make it by salt_jax.precompute.'
  ):
    text_store.negative_rows(nano, recipe.build(nano))
  own.data.path = str(tmp_path / 'none')
  with pytest.raises(InputError, match='the store is unfinished, run its writer to the end'):
    text_store.negative_rows(own, rec)


@pytest.fixture
def arguments(monkeypatch):
  """Runs `python -m salt_jax.precompute` in this process."""
  known = set(flags.FLAGS)

  def run(*args):
    monkeypatch.setattr(sys, 'argv', ['precompute', *args])
    cli.run(precompute_cli.program, precompute_cli.define_flags)

  yield run
  for name in set(flags.FLAGS) - known:
    delattr(flags.FLAGS, name)
  flags.FLAGS.unparse_flags()


def _encoded(arguments, config, prompts, output, file='selfforcing'):
  with pytest.raises(SystemExit) as stop:
    arguments(
      f'--config=configs/{file}.py:{config}',
      f'--prompts={prompts}',
      f'--output={output}',
      '--batch=2',
    )
  assert not stop.value.code


def test_the_program_encodes_with_the_weights_that_ship(arguments, tmp_path):
  (tmp_path / 'p.txt').write_text('a red bag moves left\na blue bag moves up\na bag\n')
  _encoded(arguments, 'nano', tmp_path / 'p.txt', tmp_path / 'texts')
  assert [len(Store(f'{tmp_path}/texts')[i]['text']) for i in range(3)] == [6, 6, 3]


def test_the_program_encodes_pictures_for_a_network_that_is_given_them(arguments, tmp_path):
  Image.new('RGB', (90, 50), 'red').save(tmp_path / 'red.png')
  (tmp_path / 'p.csv').write_text('prompt,image\na red bag moves left,red.png\n')
  _encoded(arguments, 'nano,i2v', tmp_path / 'p.csv', tmp_path / 'first_frames')
  store = Store(f'{tmp_path}/first_frames')
  assert set(store.fields) == {'ids', 'mask', 'condition'}
  assert store[0]['condition'].shape == (21, 8, 8, 16) and store[0]['mask'].sum() == 6


def test_the_program_encodes_videos_for_a_stage_behind_real_clips(arguments, tmp_path):
  write_mp4(str(tmp_path / 'red.mp4'), np.full((82, 70, 90, 3), (250, 0, 0), np.uint8), 16)
  (tmp_path / 'p.csv').write_text('prompt,video\na red bag moves left,red.mp4\n')
  _encoded(arguments, 'nano,stage=ar', tmp_path / 'p.csv', tmp_path / 'latents', 'causal_init')
  store = Store(f'{tmp_path}/latents')
  assert set(store.fields) == {'ids', 'mask', 'latents'}
  assert store[0]['latents'].shape == (21, 8, 8, 16) and store[0]['mask'].sum() == 6


@pytest.mark.parametrize(
  'args, sentence',
  [
    ([], 'pass an experiment as --config.'),
    (['--config=configs/selfforcing.py:nano'], 'pass a file as --prompts.'),
    (['--config=configs/selfforcing.py:nano', '--prompts=p.txt'], 'pass a folder as --output.'),
    (
      ['--config=configs/selfforcing.py:nano', '--prompts=no.txt', '--output={tmp}'],
      'prompt file no.txt is missing: write one prompt a line there.',
    ),
    (
      ['--config=configs/selfforcing.py:nano,i2v', '--prompts={tmp}/p.txt', '--output={tmp}/out'],
      'p.txt names no image: image-to-video wants .jsonl of',
    ),
    (
      [
        '--config=configs/causal_init.py:nano,stage=ar',
        '--prompts={tmp}/p.txt',
        '--output={tmp}/o',
      ],
      'p.txt names no video: a store of clips wants .jsonl of',
    ),
  ],
)
def test_wrong_commands_are_refused(args, sentence, arguments, tmp_path, capsys):
  (tmp_path / 'p.txt').write_text('a bag\n')
  with pytest.raises(SystemExit) as stop:
    arguments(*(arg.format(tmp=tmp_path) for arg in args))
  assert stop.value.code == 2 and sentence in capsys.readouterr().err
