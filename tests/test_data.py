"""Pipelines: the batch is a function of the step, whatever the number of processes."""

import itertools
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from salt_jax import clips, data, store
from salt_jax.errors import InputError
from salt_jax.models.text import WordTokenizer
from salt_jax.prompts import read

SMALL = {'frames': 3, 'size': 16}


def take(stream, count):
  return list(itertools.islice(stream, count))


def assert_same(batches, others):
  assert len(batches) == len(others) > 0
  for batch, other in zip(batches, others, strict=True):
    assert batch.keys() == other.keys()
    for name, value in batch.items():
      np.testing.assert_array_equal(value, other[name], err_msg=name)
      assert value.dtype == other[name].dtype


@pytest.fixture(scope='module')
def prompts(tmp_path_factory):
  path = tmp_path_factory.mktemp('prompts') / 'prompts.txt'
  path.write_text('\n'.join(clips.captions('train', np.arange(7))) + '\n')
  return str(path)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  path = str(tmp_path_factory.mktemp('store'))
  writer = store.StoreWriter(path, {'value': store.Field((2,), 'int64')}, 2, {})
  for number in range(2):
    rows = np.arange(5) + 5 * number
    writer.write(number, {'value': np.stack([rows, rows**2], -1)})
  writer.finish()
  return path


@pytest.fixture(params=['clips', 'captions', 'text_file', 'store'])
def opened(request, prompts, folder):
  """Opens one of the pipelines on a Feed."""
  tokenize = WordTokenizer(clips.NANO_WORDS, 16)
  return {
    'clips': lambda feed: data.clips(feed, **SMALL),
    'captions': lambda feed: data.captions(feed),
    'text_file': lambda feed: data.token_batches(data.tokenized(prompts, tokenize), feed),
    'store': lambda feed: data.store_batches(folder, feed),
  }[request.param]


def test_four_processes_see_what_one_sees(opened):
  whole = take(opened(data.Feed(8, seed=3)), 5)
  parts = [take(opened(data.Feed(8, seed=3, rows=(2 * p, 2 * p + 1))), 5) for p in range(4)]
  joined = [
    {name: np.concatenate([part[s][name] for part in parts]) for name in whole[0]} for s in range(5)
  ]
  assert_same(whole, joined)


def test_resuming_at_a_step_continues_the_sequence(opened):
  whole = take(opened(data.Feed(4)), 9)
  assert_same(whole[6:], take(opened(data.Feed(4, start_step=6)), 3))


def test_positions_count_on_and_seeds_differ(opened):
  batches = take(opened(data.Feed(4, seed=1)), 5)
  np.testing.assert_array_equal(np.concatenate([b['index'] for b in batches]), np.arange(20))
  assert batches[0]['index'].dtype == np.int64
  other = take(opened(data.Feed(4, seed=2)), 5)
  name = 'ids' if 'ids' in other[0] else 'value'
  assert not all((a[name] == b[name]).all() for a, b in zip(batches, other, strict=True))


def test_clips_are_those_of_the_world_and_captions_agree():
  feed = data.Feed(3, seed=4)
  batch = take(data.clips(feed, 'seen', 5, 32), 2)[1]
  scenes = [clips.describe(i, 'seen', 4) for i in (3, 4, 5)]
  np.testing.assert_array_equal(batch['video'], np.stack([clips.render(s, 5, 32) for s in scenes]))
  ids, mask = WordTokenizer(clips.NANO_WORDS, 16)([clips.caption(s) for s in scenes])
  np.testing.assert_array_equal(batch['ids'], ids)
  np.testing.assert_array_equal(batch['mask'], mask)
  assert (batch['ids'].dtype, batch['mask'].dtype, batch['video'].dtype) == (
    np.int32,
    bool,
    np.uint8,
  )
  del batch['video']
  assert_same([batch], take(data.captions(feed, 'seen'), 2)[1:])


@pytest.mark.parametrize('pipeline, count', [('text_file', 7), ('store', 10)])
def test_every_epoch_is_another_order_of_everything(pipeline, count, prompts, folder):
  feed = data.Feed(count, seed=5)
  stream = (
    data.store_batches(folder, feed)
    if pipeline == 'store'
    else data.token_batches(data.tokenized(prompts, WordTokenizer(clips.NANO_WORDS, 16)), feed)
  )
  epochs = [batch['row'].tolist() for batch in take(stream, 4)]
  assert all(sorted(rows) == list(range(count)) for rows in epochs)
  assert len({tuple(rows) for rows in epochs}) == 4


def test_rows_name_the_prompt_and_the_record(prompts, folder):
  tokenize = WordTokenizer(clips.NANO_WORDS, 16)
  lines = [entry.prompt for entry in read(prompts)]
  batch = next(data.token_batches(data.tokenized(prompts, tokenize), data.Feed(20)))
  np.testing.assert_array_equal(batch['ids'], tokenize([lines[row] for row in batch['row']])[0])
  batch = next(data.store_batches(folder, data.Feed(20)))
  np.testing.assert_array_equal(batch['value'], np.stack([batch['row'], batch['row'] ** 2], -1))


def test_only_named_fields_are_read(folder):
  assert set(next(data.store_batches(folder, data.Feed(2), ('value',)))) == {
    'value',
    'index',
    'row',
  }
  with pytest.raises(InputError, match="no field 'text'.*value"):
    data.store_batches(folder, data.Feed(2), ('text',))


def test_worker_processes_give_the_same_batches(tmp_path):
  script = tmp_path / 'script.py'
  script.write_text(
    textwrap.dedent("""
      import itertools, sys
      from absl import app
      from salt_jax import data

      def main(argv):
        streams = [data.clips(data.Feed(2, workers=w), frames=2, size=16) for w in (0, 2)]
        for one, other in zip(*[itertools.islice(s, 5) for s in streams]):
          assert all((one[name] == other[name]).all() for name in one)
        print('same')

      if __name__ == '__main__':
        app.run(main)
      """)
  )
  done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
  assert done.stdout.strip() == 'same', done.stderr[-2000:]


@pytest.mark.parametrize(
  'content, sentence',
  [
    (None, 'is missing'),
    (b'', 'is empty'),
    (b'a red bag moves left\n\nx\n', 'line 2 of prompt file'),
    (b'\xff\xfe\x00', 'not UTF-8'),
  ],
)
def test_bad_prompt_files_are_refused(tmp_path, content, sentence):
  path = tmp_path / 'prompts.txt'
  if content is not None:
    path.write_bytes(content)
  with pytest.raises(InputError, match=sentence):
    data.tokenized(str(path), WordTokenizer(clips.NANO_WORDS, 16))


def test_an_empty_batch_is_refused():
  with pytest.raises(InputError, match='must be positive'):
    data.Feed(0)
