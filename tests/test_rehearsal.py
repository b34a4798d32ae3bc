"""What a rehearsal makes up is read as Wan's files are, and real files are left alone."""

import os

import numpy as np
import pytest

from salt_jax import recipe, stages, weights
from tests import rehearsal, tiny_config
from tests.commands import NANO, finished, refusal


def test_made_up_files_serve_as_those_of_wan(tmp_path, monkeypatch, programs):
  del programs  # which tidies up the flags
  monkeypatch.setattr(rehearsal, '_POOL', 1009)
  rehearsal.normals.cache_clear()
  words = [
    f'--config=tests/tiny_config.py:{tmp_path},wan',
    f'--config.data.path={tmp_path}/some.txt',
  ]
  (tmp_path / 'some.txt').write_text('mine')
  finished(rehearsal, words, monkeypatch)
  config = tiny_config.get_wan(str(tmp_path))
  rec = recipe.build(config)
  frozen = stages.serving(config, rec, 'text', 'teacher', 'vae')
  assert set(frozen) == {'negative', 'text', 'teacher', 'vae'}
  kernel = weights.load(config.weights.init, 'dit', rec.model)['blocks']['ffn_0']['kernel']
  # A thousand numbers or more: their deviation is known to a few percent.
  np.testing.assert_allclose(kernel.std(), rec.model.dim**-0.5, rtol=0.1)
  ids, mask = stages.tokenizer(config, rec)(['a cat'])
  assert mask.sum() == len('▁a▁cat') + 1 and ids.max() < rec.text.vocab
  assert (tmp_path / 'some.txt').read_text() == 'mine'
  # Again: what is there stays.
  before = {path: os.stat(path).st_mtime_ns for path in tmp_path.glob('*.safetensors')}
  rehearsal.program()
  assert before == {path: os.stat(path).st_mtime_ns for path in tmp_path.glob('*.safetensors')}


@pytest.mark.parametrize('words', [[], [NANO]])
def test_nano_has_files_of_its_own(monkeypatch, capsys, programs, words):
  del programs
  line = refusal(rehearsal, words, monkeypatch, capsys)
  assert 'pass an experiment of a real size' in line
