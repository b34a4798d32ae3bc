"""Diagnostics of a student of a real size's kind on prompts of a file, against direct computations."""

import dataclasses
import functools
import itertools
import json
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from salt_jax import (
  codec,
  diagnostics,
  drift,
  judge,
  monitor,
  recipe,
  sample,
  stages,
  tensor_files,
  weights,
)
from salt_jax import subject as subjects
from salt_jax.diffusion import flow, probes
from salt_jax.errors import InputError
from salt_jax.models import cache as caches
from salt_jax.models import wan
from salt_jax.step import conditioning
from tests import commands, tiny_config
from tests.processes import ROOT, devices_of

PROMPTS = ['a cat walks on the grass', 'a dog, slowly', 'the sea', 'a fourth one']
SIGMAS = flow.few_step_sigmas(8, 5.0)
ASKED = '--diagnose=defect,cache,drift'


@pytest.fixture(scope='module')
def world(tmp_path_factory):
  """(folder, config, recipe, exported student, file of four prompts) of random tiny networks."""
  folder = tmp_path_factory.mktemp('wan')
  tiny_config.write_tokenizer(folder)
  tiny_config.write_weights(str(folder), wan_like=True)
  config = tiny_config.get_wan(str(folder))
  rec = recipe.build(config)
  student = weights.load(config.weights.student, 'dit', rec.model)
  path = weights.export(str(folder), 'generator', student, config)
  (folder / 'p.txt').write_text('\n'.join(PROMPTS))
  return str(folder), config, rec, path, str(folder / 'p.txt')


@pytest.fixture(scope='module')
def found(world, tmp_path_factory):
  """What the program writes of three prompts, two at once, by name; and its folder."""
  out = tmp_path_factory.mktemp('found')
  patch = pytest.MonkeyPatch()
  programs = commands.programs()
  patch.chdir(ROOT)
  patch.setattr(drift, 'LENGTHS', (1, 2))
  patch.setattr(judge, 'train', lambda: pytest.fail('there is nothing to judge'))
  args = [ASKED, f'--checkpoint={world[3]}', f'--prompts={world[4]}', '--clips=3', '--batch=2']
  commands.finished(next(programs)['evaluate'], [*args, f'--output={out}'], patch)
  patch.undo()
  next(programs, None)
  return {name: json.loads((out / f'{name}.json').read_text()) for name in _names()}, out


def _names():
  return ASKED.partition('=')[2].split(',')


@pytest.fixture(scope='module')
def parts(world):
  """(student, frozen, (ids, mask, index)) of the three prompts, put together without `subject`."""
  _, config, rec, *_ = world
  student = weights.load(config.weights.student, 'dit', rec.model)
  words = stages.tokenizer(config, rec)(PROMPTS[:3])
  return student, stages.serving(config, rec, 'text', 'vae'), (*words, np.arange(3, dtype=np.int32))


@pytest.fixture(scope='module')
def subject(world, parts):
  _, config, rec, *_ = world
  return subjects.subject(config, rec, parts[0], subjects.prompted(config, rec, PROMPTS[:3]), 1)


# The program, against direct computations.


def _defects(world, parts):
  """salt_method.md 5.5 chunk by chunk for every triple: [clip, triple]."""
  (_, _, rec, *_), (student, frozen, (ids, mask, index)) = world, parts
  text = jax.jit(lambda f, b: conditioning(f, b, rec)[0])(frozen, {'ids': ids, 'mask': mask})
  keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(rec.seed + 1), index)
  latent, chunk = rec.chunking.latent, rec.chunking.chunk
  shape = (rec.model.layers, 3, 6, 4, rec.model.heads, rec.model.head_dim)
  run = jax.jit(wan.bind(rec.model))

  def ask(x, sigma, ctx):
    v, features = run(
      student, jnp.float32(x), np.full(x.shape[:2], 1000 * sigma, np.float32), text, ctx
    )
    return np.asarray(v, np.float64), features

  def noise(frames, draw):
    return np.asarray(flow.frame_noise(keys, frames, draw, latent), np.float64)

  ratios = []
  for s, group in itertools.groupby(probes.triples(8), lambda triple: triple[0]):
    group = list(group)
    sums, cache = np.zeros((len(group), 2, 3)), caches.allocate(shape, jnp.float32)
    for start in (0, chunk):
      ctx, frames = wan.Chunk(cache, jnp.int32(start)), start + jnp.arange(chunk)
      x = noise(frames, 0)
      for i in range(s):
        x0 = x - SIGMAS[i] * ask(x, SIGMAS[i], ctx)[0]
        x = (1 - SIGMAS[i + 1]) * x0 + SIGMAS[i + 1] * noise(frames, i + 1)
      v = ask(x, SIGMAS[s], ctx)[0]
      for row, (_, m, e) in enumerate(group):
        direct, x_m = x - (SIGMAS[s] - SIGMAS[e]) * v, x - (SIGMAS[s] - SIGMAS[m]) * v
        composed = x_m - (SIGMAS[m] - SIGMAS[e]) * ask(x_m, SIGMAS[m], ctx)[0]
        sums[row, 0] += np.square(direct - composed).sum((1, 2, 3, 4))
        sums[row, 1] += np.square(direct - x).sum((1, 2, 3, 4))
      features = ask(x - SIGMAS[s] * v, 0.0, ctx)[1]
      cache = caches.write(cache, features.k, features.v, start)
    ratios += list(np.sqrt(sums[:, 0] / sums[:, 1]))
  return np.stack(ratios, 1)


def test_the_defect_is_that_of_the_first_prompts_each_with_the_noise_of_its_number(
  world, parts, found
):
  want, got = _defects(world, parts), found[0]['defect']
  assert got['clips'] == 3 and want.min() > 1e-3
  # Up to nine passes in a row amplify float32 rounding, and the defect is a difference.
  np.testing.assert_allclose([row['defect'] for row in got['triples']], want.mean(0), rtol=2e-3)
  np.testing.assert_allclose(got['defect'][0], want.mean(), rtol=1e-3)
  squared = [row['squared'] for row in got['triples']]
  np.testing.assert_allclose(squared, np.square(want).mean(0), rtol=4e-3)


def test_equal_numbers_of_steps_are_plain_samples_seen_without_a_judge(world, parts, found):
  _, _, rec, *_ = world
  student, frozen, batch = parts
  for pair in found[0]['cache']['pairs']:
    assert list(pair['figures']) == list(monitor.LOOKS) and len(pair['distance_by_chunk']) == 2
    distances = pair['distance_by_chunk']
    assert distances[0] == 0 and (distances[1] == 0) == (pair['history'] == pair['steps'])
  diagonal = next(p for p in found[0]['cache']['pairs'] if p['history'] == p['steps'] == 2)
  latents = sample.student(rec, frozen)(student, 2)(*batch)
  videos = codec.decode(frozen['vae'], latents, rec.vae)
  change = np.abs(np.diff(videos.astype(float), axis=1)).mean() * 16 / 255
  light = videos[:, ::4].max(-1).astype(float)
  steps = sum(np.abs(np.diff(light, axis=axis)).sum((1, 2, 3)) for axis in (2, 3))
  want = {
    'brightness': videos.mean() / 255,
    'change_per_second': change,
    'sharpness': np.mean(steps / light.sum((1, 2, 3))),
  }
  for name, value in want.items():
    # One grey level of rounding in few pixels.
    np.testing.assert_allclose(diagonal['figures'][name][0], value, rtol=1e-3)


def test_drift_is_seen_window_by_window_of_streams(world, parts, found):
  """Two of three clips are as long as two; all of them are streamed whole here."""
  _, config, rec, *_ = world
  student, frozen, batch = parts
  lengths = found[0]['drift']['lengths']
  assert [(row['latent_frames'], row['clips']) for row in lengths] == [(6, 3), (12, 2)]
  assert 'note' not in found[0]['drift'] and all('direction' not in row for row in lengths)
  long = sample.lengthened(config, rec, 12)
  few = tuple(x[:2] for x in batch)
  videos = list(sample.stream(long, student, frozen, frozen['vae'], few, 4))
  assert lengths[1]['windows'] == [[0, 9], [9, 21], [21, 33], [33, 45]]
  want = {
    'brightness': [part.mean() / 255 for part in videos],
    'change_per_second': [
      np.abs(np.diff(part.astype(float), axis=1)).mean() * 16 / 255 for part in videos
    ],
  }
  assert np.abs(np.diff(want['brightness'])).min() > 1e-4, 'windows do not differ'
  for name, values in want.items():
    np.testing.assert_allclose(lengths[1]['figures'][name], values, rtol=1e-3)
  assert lengths[1]['common'] == lengths[1]['figures'] != lengths[0]['common']
  for row, part in itertools.product(lengths, ('figures', 'common')):
    assert list(row[part]) == list(monitor.LOOKS)


def test_each_has_a_picture(found):
  for name in _names():
    with Image.open(found[1] / f'{name}.png') as picture:
      colours = picture.convert('RGB').getcolors(2**20)
      assert picture.width > 300 and len(colours) > 20, 'the picture is blank'


@pytest.mark.slow
def test_four_devices_find_what_one_does(world, found, tmp_path):
  """Three prompts fill a batch of four; each device holds a quarter of all parameters."""
  _, _, _, path, prompts = world
  command = [sys.executable, '-m', 'salt_jax.evaluate', '--diagnose=defect,cache', '--clips=3']
  command += [f'--checkpoint={path}', f'--prompts={prompts}', f'--output={tmp_path}']
  subprocess.run(command, cwd=ROOT, env=os.environ | devices_of(4), check=True, timeout=300)
  one, four = (
    json.loads((folder / 'defect.json').read_text())['triples'] for folder in (found[1], tmp_path)
  )
  _assert_near([row['by_chunk'] for row in four], [row['by_chunk'] for row in one])
  one, four = (
    json.loads((folder / 'cache.json').read_text())['pairs'] for folder in (found[1], tmp_path)
  )
  _assert_near([p['distance_by_chunk'] for p in four], [p['distance_by_chunk'] for p in one])
  for name in monitor.LOOKS:
    _assert_near([p['figures'][name] for p in four], [p['figures'][name] for p in one])


# Float32 rounding of other shapes, through up to nine passes in a row and a difference.
_assert_near = functools.partial(np.testing.assert_allclose, rtol=2e-3, atol=1e-9)


# Batches.


@pytest.mark.parametrize('ask', [diagnostics.defect, diagnostics.cache], ids=['defect', 'cache'])
def test_clips_one_at_a_time_are_clips_at_once(subject, ask):
  one = jax.tree.leaves(ask(subject))
  all_at_once = jax.tree.leaves(ask(dataclasses.replace(subject, size=3)))
  assert len(one) > 100
  _assert_near(all_at_once, one)


def test_batches_are_joined_in_the_order_of_clips_without_what_fills_them(subject):
  seen = []

  def measure(part):
    seen.append((part.captions, np.asarray(part.asked.batch[2]).tolist()))
    return {'index': part.asked.batch[2], 'keys': jax.random.key_data(part.keys)}

  found = dataclasses.replace(subject, size=2).gathered(measure)
  assert seen == [(PROMPTS[:2], [0, 1]), (PROMPTS[2:3], [2, 2])]
  np.testing.assert_array_equal(found['index'], [0, 1, 2])
  np.testing.assert_array_equal(found['keys'], jax.random.key_data(subject.keys))
  # Fewer clips than a batch has room for need no filling.
  seen.clear()
  dataclasses.replace(subject, size=8).first(2).gathered(measure)
  assert seen == [(PROMPTS[:2], [0, 1])]


def test_no_two_caches_are_alive_at_once(subject, monkeypatch):
  """At a real size one alone takes gigabytes."""
  alive, plain = [], subjects._roll

  def roll(*args):
    shape = (2, 1, 6, 4, 2, 16)  # of keys and of values
    alive.append(sum(x.shape == shape for x in jax.live_arrays()))
    return plain(*args)

  monkeypatch.setattr(subjects, '_roll', roll)
  one = subject.first(1)
  diagnostics.defect(one)
  diagnostics.cache(one)
  assert alive == [0] * (7 + 3)


def test_looks_are_those_of_the_judge_where_it_has_them():
  videos = np.random.default_rng(0).integers(0, 255, (2, 21, 32, 32, 3), np.uint8)
  found = monitor.looks(videos, 16)
  assert tuple(found) == monitor.LOOKS
  opinion = judge.train(examples=24, steps=2)
  captions = ['a red bag moves right', 'a blue boot moves up']
  np.testing.assert_allclose(
    found['sharpness'], judge.judge(opinion, videos, captions)['sharpness'], rtol=1e-6
  )
  # Twice the frames a second, twice the change; a frozen clip has none.
  np.testing.assert_allclose(
    monitor.looks(videos, 32)['change_per_second'], 2 * found['change_per_second']
  )
  assert not monitor.looks(videos[:, :1].repeat(5, 1), 16)['change_per_second'].any()


# What is said and refused.


def test_fewer_prompts_than_clips_are_all_there_is(world, programs, monkeypatch, capsys, tmp_path):
  asked = []
  monkeypatch.setattr(diagnostics, 'run', lambda names, subject, folder: asked.append(subject))
  args = ['--diagnose=defect', f'--checkpoint={world[3]}', f'--prompts={world[4]}']
  commands.finished(programs['evaluate'], [*args, f'--output={tmp_path}'], monkeypatch)
  assert asked[0].captions == PROMPTS and asked[0].size == 1
  assert 'p.txt has 4 prompts: no more clips are made.' in capsys.readouterr().err


@pytest.mark.parametrize(
  'args, captions, size',
  [
    (['--prompts={tmp}/p.txt', '--batch=3'], ['a bag', 'a red boot'], 3),
    (['--batch=2'], None, 2),
    ([], None, 5),
  ],
)
def test_nano_takes_prompts_too_unjudged_and_otherwise_all_clips_at_once(
  programs, monkeypatch, tmp_path, args, captions, size
):
  asked, opinion = [], object()
  monkeypatch.setattr(diagnostics, 'run', lambda names, subject, folder: asked.append(subject))
  monkeypatch.setattr(judge, 'train', lambda: opinion)
  (tmp_path / 'p.txt').write_text('a bag\na red boot\na dress\n')
  args = [ASKED, f'--checkpoint={commands.STUDENT}', *(arg.format(tmp=tmp_path) for arg in args)]
  args += ['--clips=2' if captions else '--clips=5', f'--output={tmp_path}']
  commands.finished(programs['evaluate'], args, monkeypatch)
  assert asked[0].size == size and len(asked[0].captions) == (2 if captions else 5)
  assert asked[0].opinion is (None if captions else opinion)
  assert captions is None or asked[0].captions == captions


def test_a_config_describes_a_file_that_does_not_itself(world, programs, monkeypatch, tmp_path):
  """Such as a published student, converted."""
  folder, _, rec, _, prompts = world
  asked = []
  monkeypatch.chdir(ROOT)
  monkeypatch.setattr(diagnostics, 'run', lambda names, subject, folder: asked.append(subject))
  args = [ASKED, f'--checkpoint={folder}/student.safetensors', f'--prompts={prompts}']
  args += [f'--config=tests/tiny_config.py:{folder},wan', '--config.rollout.window=5']
  commands.finished(programs['evaluate'], [*args, f'--output={tmp_path}'], monkeypatch)
  assert asked[0].rec.model == rec.model and asked[0].rec.chunking.window == 5


@pytest.mark.parametrize(
  'args, words',
  [
    (['--diagnose=defect'], 'this one is of selfforcing-1.3b: pass --prompts, a file with one'),
    (['--diagnose=defect,swap', '--prompts={prompts}'], 'swap needs real clips, and --prompts come'),
    (['--diagnose=defect', '--prompts={prompts}', '--split=seen'], 'leave it out, or --prompts'),
    (['--diagnose=defect', '--prompts=none.txt'], 'prompt file none.txt is missing'),
  ],
)  # fmt: skip
def test_what_a_student_without_captions_cannot_be_asked_is_refused(
  world, programs, monkeypatch, capsys, tmp_path, args, words
):
  monkeypatch.setattr(weights, 'load', lambda *_: pytest.fail('something was loaded'))
  args = [arg.format(prompts=world[4]) for arg in args]
  args += [f'--checkpoint={world[3]}', f'--output={tmp_path}']
  assert words in commands.refusal(programs['evaluate'], args, monkeypatch, capsys)


def _exported(path, config):
  """A file that says it is of the config, and holds nothing."""
  tensor_files.write(str(path), {}, {'config': config.to_json_best_effort()})
  return str(path)


@pytest.mark.parametrize(
  'size, mend', [('nano', 'leave --prompts out.'), ('1.3b', 'look into a text-to-video student.')]
)
def test_students_that_continue_a_picture_take_no_prompts(
  world, programs, monkeypatch, capsys, tmp_path, size, mend
):
  config = tiny_config.get_i2v(str(tmp_path))
  config.update(size=size, negative='', data=dict(kind='store', path=''))
  args = ['--diagnose=defect', f'--checkpoint={_exported(tmp_path / "a.safetensors", config)}']
  args += [f'--prompts={world[4]}'] if size == 'nano' else []
  line = commands.refusal(programs['evaluate'], args, monkeypatch, capsys)
  assert f'this student continues a picture, and prompts come without: {mend}' in line


def test_words_that_nano_does_not_know_are_refused(world, programs, monkeypatch, capsys, tmp_path):
  args = ['--diagnose=defect', f'--checkpoint={commands.STUDENT}', f'--prompts={world[4]}']
  monkeypatch.setattr(weights, 'load', lambda *_: pytest.fail('something was loaded'))
  line = commands.refusal(
    programs['evaluate'], [*args, f'--output={tmp_path}'], monkeypatch, capsys
  )
  assert "the word 'cat' in prompt 'a cat walks on the grass' is not in the vocabulary" in line


@pytest.mark.parametrize('told', [None, {'bytes_in_use': 7}, {'bytes_limit': 0}])
def test_a_device_without_a_limit_holds_every_drift(told, world, monkeypatch):
  device = types.SimpleNamespace(memory_stats=lambda: told)
  monkeypatch.setattr(drift.jax, 'local_devices', lambda: [device])
  assert drift._memory() is None
  drift.check(*world[1:3])


def test_a_drift_whose_cache_no_device_holds_is_refused(world, monkeypatch):
  """Keys and values of 2 layers, 96 frames of 4 tokens, 32 numbers of 4 bytes: 192 KiB a clip."""
  _, config, rec, *_ = world
  size = 2 * 2 * 96 * 4 * 32 * 4
  monkeypatch.setattr(drift, '_memory', lambda: size + 400)
  drift.check(config, rec)
  monkeypatch.setattr(drift, '_memory', lambda: size)
  with pytest.raises(InputError, match='at 16 times its length .* --config with a window'):
    drift.check(config, rec)
  monkeypatch.setattr(drift, '_memory', lambda: None)
  drift.check(config, rec)
  windowed = config.copy_and_resolve_references()
  windowed.rollout.update(window=5, sink=1)
  monkeypatch.setattr(drift, '_memory', lambda: size // 10)
  drift.check(windowed, recipe.build(windowed))
