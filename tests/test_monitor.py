"""Figures of sampled clips: known values, and a run that logs them is the run that does not."""

import json
import pathlib

import numpy as np
import pytest
from safetensors.numpy import load_file

from salt_jax import clips, judge, monitor, train
from salt_jax.errors import InputError
from tests import tiny_config


def _flat(*pixels):
  """One clip a colour, of three frames."""
  return np.array(pixels, np.uint8)[:, None, None, None].repeat(3, 1).repeat(4, 2).repeat(4, 3)


def test_brightness_and_saturation_of_known_colours():
  videos = _flat((0, 0, 0), (255, 255, 255), (255, 0, 0), (200, 100, 100), (100, 50, 50))
  np.testing.assert_allclose(monitor.brightness(videos), [0, 1, 1 / 3, 400 / 765, 200 / 765])
  # Half as bright is as saturated.
  np.testing.assert_allclose(monitor.saturation(videos), [0, 0, 1, 0.5, 0.5])


def test_dark_noise_is_not_saturated():
  videos = _flat((200, 200, 200))
  videos[:, :, :2] = (1, 0, 0)
  assert monitor.saturation(videos)[0] < 0.01


def test_travel_of_any_video_is_its_change():
  videos = _flat((10, 10, 10), (250, 0, 5))
  videos[0, 1] = 40  # 30 up and 30 down again
  np.testing.assert_allclose(monitor.flicker(videos), [30, 0])
  found = monitor.monitor(videos)
  assert set(found) == {'brightness', 'saturation', 'travel'} and found['travel'] == 15


def test_travel_of_the_nano_world_is_the_judges():
  index = np.arange(6)
  videos, captions = clips.films(index, 'seen', 9), clips.captions('seen', index, 9)
  expected = judge.judge(judge.train(examples=8, steps=1), videos, captions)['travel']
  np.testing.assert_array_equal(judge.travel(videos, captions), expected)
  assert monitor.monitor(videos, captions)['travel'] == pytest.approx(expected.mean())
  assert expected.min() > 30


@pytest.fixture(scope='module')
def weights(tmp_path_factory):
  return tiny_config.write_weights(str(tmp_path_factory.mktemp('weights')))


def _run(weights, workdir, **log):
  config = tiny_config.get_config(weights)
  config.total_steps = 4
  config.log.update(log)
  return train.run(config, str(workdir))


def _lines(workdir):
  lines = (pathlib.Path(workdir) / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


def _split(lines):
  """(what the training logs, what the samples log)."""
  return (
    [{k: v for k, v in line.items() if not k.startswith('samples/')} for line in lines],
    [{k: v for k, v in line.items() if k.startswith('samples/')} for line in lines],
  )


@pytest.fixture(scope='module')
def watched(weights, tmp_path_factory):
  workdir = tmp_path_factory.mktemp('watched')
  return workdir, _run(weights, workdir, samples_every=2, samples=2)


def test_samples_are_logged_when_due_and_change_with_the_student(watched):
  workdir, traces = watched
  assert traces == {'generator': 1, 'critic': 1}
  samples = _split(_lines(workdir))[1]
  names = {f'samples/{name}' for name in ('brightness', 'saturation', 'travel')}
  assert [set(line) for line in samples] == [set(), names, set(), names]
  assert 0 < samples[1]['samples/brightness'] < 1
  assert samples[1]['samples/brightness'] != samples[3]['samples/brightness']


def test_a_run_that_samples_is_the_run_that_does_not(weights, watched, tmp_path):
  _run(weights, tmp_path)
  training, none = _split(_lines(tmp_path))
  assert training == _split(_lines(watched[0]))[0] and not any(none)
  one, other = (load_file(next((path / 'export').iterdir())) for path in (tmp_path, watched[0]))
  for name in one:
    np.testing.assert_array_equal(one[name], other[name], err_msg=name)


@pytest.mark.slow
def test_a_resumed_run_logs_the_same_samples(weights, watched, tmp_path):
  config = tiny_config.get_config(weights)
  config.total_steps = 2
  config.log.update(samples_every=2, samples=2)
  train.run(config, str(tmp_path))
  _run(weights, tmp_path, samples_every=2, samples=2)
  assert _lines(tmp_path) == _lines(watched[0])


def test_only_a_student_can_be_sampled(weights, tmp_path):
  config = tiny_config.stage('teacher', weights)
  config.log.samples_every = 5
  with pytest.raises(InputError, match='log.samples_every=5 needs a few-step student, which'):
    train.run(config, str(tmp_path))
