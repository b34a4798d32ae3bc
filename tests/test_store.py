"""The array store: what is written comes back, kills are resumed, damage is found."""

import multiprocessing
import os

import ml_dtypes
import numpy as np
import pytest

from salt_jax import data, store
from salt_jax.errors import InputError

FIELDS = {
  'flag': store.Field((3,), 'uint8'),
  'latent': store.Field((2, 4), 'bfloat16'),
  'pair': store.Field((2, 3), 'float32'),
  'number': store.Field((), 'int64'),
}
CONFIG = {'seed': 1, 'shape': (2, 4)}


def records(number, count=3):
  generator = np.random.default_rng(number)
  return {
    'flag': generator.integers(0, 255, (count, 3), np.uint8),
    'latent': generator.normal(size=(count, 2, 4)).astype(ml_dtypes.bfloat16),
    'pair': generator.normal(size=(count, 2, 3)).astype(np.float32),
    'number': np.arange(count) + 10 * number,
  }


def writer(folder, **changes):
  return store.StoreWriter(
    **({'folder': str(folder), 'fields': FIELDS, 'shards': 3, 'config': CONFIG} | changes)
  )


def written(folder):
  opened = writer(folder)
  for number in opened.missing():
    opened.write(number, records(number, 3 + number))
  opened.finish()
  return str(folder)


def test_records_come_back_bit_for_bit(tmp_path):
  opened = store.Store(written(tmp_path), verify=True)
  assert len(opened) == 3 + 4 + 5 and opened.config == {'seed': 1, 'shape': [2, 4]}
  row = 0
  for number in range(3):
    given = records(number, 3 + number)
    for i in range(3 + number):
      for name, value in opened[row].items():
        assert value.dtype == given[name].dtype and value.shape == given[name].shape[1:]
        assert value.tobytes() == given[name][i].tobytes()
      row += 1


def _killed_in_shard_1(folder):
  opened = writer(folder)
  opened.write(0, records(0, 3))
  real = store.ArrayRecordWriter

  class Dying:
    """Kills the process after the second record."""

    def __init__(self, *args):
      self.writer, self.count = real(*args), 0

    def write(self, record):
      self.writer.write(record)
      self.count += 1
      if self.count == 2:
        os._exit(9)

  store.ArrayRecordWriter = Dying
  opened.write(1, records(1, 4))


def test_a_killed_writer_goes_on_at_the_first_missing_shard(tmp_path):
  process = multiprocessing.get_context('spawn').Process(
    target=_killed_in_shard_1, args=(tmp_path / 'a',)
  )
  process.start()
  process.join()
  assert process.exitcode == 9
  with pytest.raises(InputError, match='unfinished'):
    store.Store(str(tmp_path / 'a'))
  before = os.stat(tmp_path / 'a' / 'shard-00000.array_record').st_mtime_ns
  assert writer(tmp_path / 'a').missing() == [1, 2]
  resumed, straight = written(tmp_path / 'a'), written(tmp_path / 'b')
  assert os.stat(tmp_path / 'a' / 'shard-00000.array_record').st_mtime_ns == before
  one, other = store.Store(resumed, verify=True), store.Store(straight, verify=True)
  assert all(
    one[i][name].tobytes() == other[i][name].tobytes() for i in range(12) for name in FIELDS
  )


def test_two_writers_share_a_store(tmp_path):
  first, second = writer(tmp_path), writer(tmp_path)
  second.write(1, records(1))
  first.write(0, records(0))
  with pytest.raises(InputError, match='shard-00002'):
    first.finish()
  second.write(2, records(2))
  first.finish()
  numbers = [store.Store(str(tmp_path))[i]['number'] for i in range(9)]
  assert numbers == [0, 1, 2, 10, 11, 12, 20, 21, 22]


def test_resuming_with_another_recipe_is_refused(tmp_path):
  writer(tmp_path).write(0, records(0))
  for change in ({'config': {'seed': 2}}, {'fields': {'flag': FIELDS['flag']}}):
    with pytest.raises(InputError, match='another way'):
      writer(tmp_path, **change)


def _truncate(path):
  os.truncate(path, os.path.getsize(path) - 1)


def _flip(path):
  with open(path, 'r+b') as file:
    file.seek(os.path.getsize(path) // 2)
    byte = file.read(1)
    file.seek(-1, os.SEEK_CUR)
    file.write(bytes([byte[0] ^ 1]))


@pytest.mark.parametrize(
  'damage, sentence',
  [
    (os.remove, 'shard-00001.array_record is missing'),
    (_truncate, 'bytes instead of'),
    (_flip, 'SHA-256'),
  ],
)
def test_damage_is_found_and_the_mend_works(tmp_path, damage, sentence):
  folder = written(tmp_path)
  damage(tmp_path / 'shard-00001.array_record')
  with pytest.raises(InputError, match=f'{sentence}.*delete shard-00001'):
    store.Store(folder, verify=True)
  for path in tmp_path.glob('shard-00001.*'):
    path.unlink()
  store.Store(written(tmp_path), verify=True)


def test_a_damaged_index_is_refused(tmp_path):
  folder = written(tmp_path)
  _truncate(tmp_path / 'index.json')
  with pytest.raises(InputError, match='index.json'):
    store.Store(folder)


@pytest.mark.parametrize(
  'change, sentence',
  [
    ({'pair': np.zeros((3, 2, 3))}, "'pair' is float64"),
    ({'pair': np.zeros((3, 2, 4), np.float32)}, r"'pair' is float32 \(2, 4\)"),
    ({'number': np.arange(4)}, 'different numbers'),
    ({'extra': np.arange(3)}, 'extra'),
  ],
)
def test_records_of_another_form_are_refused(tmp_path, change, sentence):
  with pytest.raises(InputError, match=sentence):
    writer(tmp_path).write(0, records(0) | change)
  assert not [name for name in os.listdir(tmp_path) if name.startswith('shard')]


def test_an_unknown_shard_is_refused(tmp_path):
  with pytest.raises(InputError, match='shard 3'):
    writer(tmp_path).write(3, records(0))


VARYING = {'rows': store.Field((None, 2), 'bfloat16'), 'flag': store.Field((3,), 'bool')}


def varying(folder, rows):
  flags = np.arange(3 * len(rows)).reshape(-1, 3) % 2 == 0
  opened = store.StoreWriter(str(folder), VARYING, 1, {})
  opened.write(0, {'rows': rows, 'flag': flags})
  opened.finish()
  return store.Store(str(folder), verify=True), flags


def test_arrays_whose_leading_size_varies_come_back(tmp_path):
  given = [np.arange(2 * n).reshape(n, 2).astype(ml_dtypes.bfloat16) for n in (3, 0, 1, 300)]
  opened, flags = varying(tmp_path, given)
  assert opened.fields == VARYING
  for i, rows in enumerate(given):
    record = opened[i]
    assert record['rows'].dtype == rows.dtype and record['rows'].shape == rows.shape
    np.testing.assert_array_equal(record['rows'], rows)
    np.testing.assert_array_equal(record['flag'], flags[i])
    assert len(VARYING['rows'].pack(rows)) == rows.nbytes + 4, 'nothing is padded'


@pytest.mark.parametrize(
  'rows', [np.zeros((2, 3), ml_dtypes.bfloat16), np.zeros((2, 2)), np.zeros(2, ml_dtypes.bfloat16)]
)
def test_varying_arrays_of_another_form_are_refused(tmp_path, rows):
  good = np.zeros((1, 2), ml_dtypes.bfloat16)
  with pytest.raises(InputError, match="field 'rows' is .* a record, but the store has bfloat16"):
    varying(tmp_path, [good, rows])


def test_texts_are_not_read_as_fixed_records(tmp_path):
  varying(tmp_path, [np.zeros((1, 2), ml_dtypes.bfloat16)])
  with pytest.raises(InputError, match="has texts in its field 'rows': set data.kind=text_store."):
    data.store_batches(str(tmp_path), data.Feed(1))
