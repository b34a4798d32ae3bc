"""Diagnostics against loops written from the formulas, and the identities that each of them must show."""

import dataclasses
import functools
import itertools
import json
import logging
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from PIL import Image

from salt_jax import cli, diagnostics, drift, evaluate, judge, recipe, sample
from salt_jax import subject as subjects
from salt_jax import weights as files
from salt_jax.diffusion import flow, probes, rollout
from salt_jax.errors import InputError
from salt_jax.models import cache as caches
from salt_jax.models import wan
from tests import tiny, tiny_config

APPLY = wan.bind(tiny.WAN)
SIGMAS = flow.few_step_sigmas(8, 5.0)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tiny_config.write_weights(str(tmp_path_factory.mktemp('weights')))


@pytest.fixture(scope='module')
def opinion():
  """A judge of hardly any training: it judges badly, and always the same."""
  return judge.train(examples=24, steps=2)


def _subject(config, opinion=None):
  rec = recipe.build(config)
  params = files.load(config.weights.student, 'dit', rec.model)
  subject = subjects.subject(config, rec, params, subjects.captioned(config, rec, 'seen', 2))
  return dataclasses.replace(subject, opinion=opinion)


@pytest.fixture(scope='module')
def subject(folder, opinion):
  """The tiny student of two chunks, asked for two clips."""
  return _subject(tiny_config.get_config(folder), opinion)


def _ignoring(subject):
  """The same student, blind to what lies before a chunk."""

  def apply(params, x, t, text, ctx):
    del ctx
    return wan.apply(params, x, t, text, wan.Clip(), subject.rec.model)

  return dataclasses.replace(subject, apply=apply)


# Defect.


def test_triples_are_the_table_of_the_method():
  got = [tuple(1000 - 125 * i for i in triple) for triple in probes.triples(8)]
  expected = [(s, m, e) for s, ends in tiny.TRIPLES.items() for e, ms in ends.items() for m in ms]
  assert len(got) == len(set(got)) == 27 and set(got) == set(expected)


def _apply(x, sigma, ctx):
  t = np.full(x.shape[:2], 1000 * sigma, np.float32)
  v, features = jax.jit(APPLY)(tiny.params(), jnp.float32(x), t, tiny.prompt(), ctx)
  return np.asarray(v, np.float64), features


def _oracle(exit_step, m, e, chunk):
  """salt_method.md 5.5 in NumPy, chunk by chunk: (ratio a clip, ratio a clip and chunk)."""
  shape = (tiny.WAN.layers, tiny.BATCH, tiny.FRAMES, 6, tiny.WAN.heads, tiny.WAN.head_dim)
  cache = caches.allocate(shape, jnp.float32)
  s, m, e = SIGMAS[exit_step], SIGMAS[m], SIGMAS[e]
  apart, moved = [], []
  for start in range(0, tiny.FRAMES, chunk):
    frames = jnp.arange(start, start + chunk)
    ctx = wan.Chunk(cache, start) if chunk < tiny.FRAMES else wan.Clip()
    x = np.asarray(flow.frame_noise(tiny.keys(), frames, 0, tiny.LATENT), np.float64)
    for i in range(exit_step):
      x0 = x - SIGMAS[i] * _apply(x, SIGMAS[i], ctx)[0]
      eps = np.asarray(flow.frame_noise(tiny.keys(), frames, i + 1, tiny.LATENT), np.float64)
      x = (1 - SIGMAS[i + 1]) * x0 + SIGMAS[i + 1] * eps
    v1 = _apply(x, s, ctx)[0]
    direct, x_m = x - (s - e) * v1, x - (s - m) * v1
    composed = x_m - (m - e) * _apply(x_m, m, ctx)[0]
    apart.append(np.square(direct - composed).sum((1, 2, 3, 4)))
    moved.append(np.square(direct - x).sum((1, 2, 3, 4)))
    if chunk < tiny.FRAMES:
      features = _apply(x - s * v1, 0.0, ctx)[1]
      cache = caches.write(cache, features.k, features.v, start)
  apart, moved = np.stack(apart, -1), np.stack(moved, -1)
  return np.sqrt(apart.sum(-1) / moved.sum(-1)), np.sqrt(apart / moved)


@pytest.mark.parametrize('chunk', [tiny.CHUNK, tiny.FRAMES])
@pytest.mark.parametrize('triple', [(1, 2, 4), (3, 5, 8)])
def test_defect_equals_the_loop_written_out(triple, chunk):
  s, m, e = triple
  plan = rollout.student_plan(
    tiny.chunking(chunk=chunk), jnp.asarray(flow.padded_sigmas(8, 5.0, 9)), s
  )
  rolled = jax.jit(rollout.rollout, static_argnums=0)(
    APPLY, tiny.params(), tiny.keys(), tiny.prompt(), plan
  )
  levels = tuple(np.float32(SIGMAS[i]) for i in triple)
  got = diagnostics.defects(APPLY, tiny.params(), tiny.prompt(), rolled, levels, chunk)
  whole, by_chunk = _oracle(s, m, e, chunk)
  assert by_chunk.shape == (tiny.BATCH, tiny.FRAMES // chunk) and whole.min() > 1e-3
  # Up to five passes in a row amplify float32 rounding, and the defect is a difference.
  np.testing.assert_allclose(got[0], whole, rtol=2e-3)
  np.testing.assert_allclose(got[1], by_chunk, rtol=2e-3)


def test_a_straight_flow_has_no_defect_and_all_triples_share_a_program(subject):
  def straight(params, x, t, text, ctx):
    """Every path leads to one point in a straight line."""
    sigma = jnp.maximum(t / 1000, 1e-3)[..., None, None, None]
    zeros = jnp.zeros((2, *x.shape[:2], 4, 2, 16))
    return (x - 0.7) / sigma, wan.Features(k=zeros, v=zeros, taps={})

  before = diagnostics.defects._cache_size(), subjects._roll._cache_size()
  found = diagnostics.defect(dataclasses.replace(subject, apply=straight))
  assert (diagnostics.defects._cache_size(), subjects._roll._cache_size()) == tuple(
    n + 1 for n in before
  )
  # Rounding of float32 positions against the displacement, which is at least 0.02 of them.
  assert max(row['defect'] for row in found['triples']) < 1e-4


def test_defect_averages_clips_and_triples(subject):
  found = diagnostics.defect(subject)
  rows = found['triples']
  assert len(rows) == 27 and found['clips'] == 2 and found['by_chunk'][0] > 0
  assert [row['labels'] for row in rows[:2]] == [[1000, 875, 750], [1000, 875, 500]]
  np.testing.assert_allclose(found['defect'][0], np.mean([row['defect'] for row in rows]))
  np.testing.assert_allclose(found['squared'][0], np.mean([row['squared'] for row in rows]))
  below = [row['defect'] for row in rows if row['labels'][0] < 1000]
  np.testing.assert_allclose(found['defect_below_noise'][0], np.mean(below))
  assert all(row['squared'] >= row['defect'] ** 2 * (1 - 1e-9) for row in rows)
  low, high = found['defect'][1:]
  assert low <= found['defect'][0] <= high


# Cache and swap.


@pytest.fixture(scope='module')
def made(subject):
  """Latents of each (history, steps), through the functions that `cache` calls."""
  histories = {k: subject.roll(subject.plan(k)).cache for k in diagnostics.STEPS}
  return {
    (h, k): np.asarray(diagnostics._sampled(subject, k, histories[h]))
    for h, k in itertools.product(diagnostics.STEPS, repeat=2)
  }


def test_the_diagonal_is_plain_generation_and_the_rest_is_not(subject, made):
  few = sample.student(subject.rec, subject.frozen)
  for k in diagnostics.STEPS:
    # Two programs round differently, and up to eight passes in a row amplify it.
    np.testing.assert_allclose(made[k, k], few(subject.params, k)(*subject.asked.batch), atol=1e-4)
  first, rest = np.split(np.stack([made[2, 4], made[4, 4]]), [3], axis=2)
  np.testing.assert_array_equal(first[0], first[1])
  assert np.abs(rest[0] - rest[1]).max() > 1e-2


@pytest.mark.parametrize('window', [None, 5])
def test_a_history_is_read_as_far_as_the_cache_shows_it(window):
  """One chunk behind another history, with the pass written out."""
  chunking = tiny.chunking(window=window, sink=1 if window else 0)
  plan = rollout.student_plan(chunking, jnp.asarray(flow.padded_sigmas(2, 5.0, 9)), 1)
  keys, text = tiny.keys(), tiny.prompt()
  latents = tiny.latents(5)
  history = probes.commit(APPLY, tiny.params(), keys, text, latents, chunking)
  got = probes.chunks_behind(APPLY, tiny.params(), keys, text, plan, history)
  cache = rollout.empty_cache(chunking, tiny.BATCH)
  for start in range(0, tiny.FRAMES, tiny.CHUNK):
    part, t = latents[:, start : start + tiny.CHUNK], jnp.zeros((tiny.BATCH, tiny.CHUNK))
    last, _, _ = rollout.denoise_chunk(APPLY, tiny.params(), keys, text, plan, (cache, start))
    np.testing.assert_allclose(got[:, start : start + tiny.CHUNK], last, atol=1e-4)
    _, features = APPLY(tiny.params(), part, t, text, wan.Chunk(cache, start))
    cache = caches.write(cache, features.k, features.v, start)
  np.testing.assert_allclose(history.k, cache.k, atol=1e-4)
  np.testing.assert_allclose(history.v, cache.v, atol=1e-4)


def test_own_latents_committed_as_real_are_the_own_cache(subject):
  rolled = subject.roll(subject.plan(4))
  model = subject.apply, subject.params, subject.keys, subject.text
  history = diagnostics._commit(*model, rolled.x0, subject.rec.chunking)
  np.testing.assert_allclose(history.k, rolled.cache.k, atol=1e-4)
  again = diagnostics._sampled(subject, 4, history)
  np.testing.assert_allclose(again, rolled.x0, atol=1e-4)
  # One grey level of rounding.
  pixels = diagnostics.decode_behind(subject, again, rolled.x0).astype(int)
  assert np.abs(pixels - subject.decode(rolled.x0)).max() <= 1


def test_a_chunk_is_decoded_behind_the_given_past(subject):
  """Each chunk alone behind the other clip's past, by a whole decoding of the two put together."""
  one, other = np.asarray(tiny.latents(1)[:, :, :, :4]), np.asarray(tiny.latents(2)[:, :, :, :4])
  got = diagnostics.decode_behind(subject, one, other).astype(int)
  mixed = np.concatenate([other[:, :3], one[:, 3:]], 1)
  assert np.abs(got[:, :9] - subject.decode(one)[:, :9]).max() <= 1
  assert np.abs(got[:, 9:] - subject.decode(mixed)[:, 9:]).max() <= 1
  assert np.abs(got[:, 9:] - subject.decode(one)[:, 9:].astype(int)).max() > 10


def test_a_student_that_ignores_its_cache_has_equal_histories(subject):
  blind = diagnostics.cache(_ignoring(subject))
  for pair in blind['pairs']:
    twin = next(p for p in blind['pairs'] if p['history'] == p['steps'] == pair['steps'])
    assert pair['distance_by_chunk'] == [0, 0] and pair['figures'] == twin['figures']


def test_a_student_that_ignores_its_cache_is_swapped_in_vain(subject):
  blind = _ignoring(subject)
  real = diagnostics.real_latents(subject)
  model = blind.apply, blind.params, blind.keys, blind.text
  history = diagnostics._commit(*model, real, blind.rec.chunking)
  own = blind.roll(blind.plan(2)).x0
  np.testing.assert_allclose(diagnostics._sampled(blind, 2, history), own, atol=1e-4)
  # Whereas the student itself looks at its past.
  history = diagnostics._commit(subject.apply, *model[1:], real, subject.rec.chunking)
  seeing = diagnostics._sampled(subject, 2, history)
  assert np.abs(seeing - subject.roll(subject.plan(2)).x0)[:, 3:].max() > 1e-2


def test_a_student_of_first_frames_is_looked_into_behind_those_of_its_clips(
  tmp_path_factory, opinion
):
  folder = tiny_config.write_weights(str(tmp_path_factory.mktemp('i2v')), i2v=True)
  subject = _subject(tiny_config.get_i2v(folder), opinion)
  few = sample.student(subject.rec, subject.frozen)(subject.params, 2)
  *prompts, condition = subject.asked.batch
  rolled = subject.roll(subject.plan(2))
  made = np.asarray(diagnostics._sampled(subject, 2, rolled.cache))
  np.testing.assert_allclose(made, few(*prompts, condition), atol=1e-4)
  assert np.abs(made - few(*prompts, condition[::-1])).max() > 1e-2
  levels = tuple(np.float32(SIGMAS[i]) for i in (4, 5, 6))
  args = subject.apply, subject.params, subject.text, subject.roll(subject.plan(8, 4)), levels, 3
  assert np.asarray(diagnostics.defects(*args)[1]).min() > 1e-3
  diagnostics.check(('defect', 'cache', 'swap'), subject.config, subject.rec, False)
  with pytest.raises(InputError, match='--diagnose=drift needs longer clips'):
    diagnostics.check(('defect', 'drift'), subject.config, subject.rec, False)


# Drift.


@pytest.mark.parametrize('frames, chunk', [(21, 3), (84, 3), (21, 1), (20, 2), (6, 2), (2, 1)])
def test_windows_cover_all_frames_once(frames, chunk):
  spans = drift.windows(frames, chunk)
  covered = np.concatenate([np.arange(a, b) for a, b in spans])
  np.testing.assert_array_equal(covered, np.arange(4 * frames - 3))
  assert min(b - a for a, b in spans) >= min(9, 4 * frames - 3)
  # Borders lie between chunks: behind 1, 5, 9, … pixel frames, so many latents a chunk.
  assert all(((b + 3) // 4) % chunk == 0 and b % 4 == 1 for _, b in spans)


def test_a_window_is_judged_as_a_clip_by_itself(subject):
  captions = ['a red bag moves right', 'a blue boot moves up and a green dress moves down']
  videos = np.random.default_rng(0).integers(0, 255, (2, 21, 32, 32, 3), np.uint8)
  videos[0, 9:] = 0
  videos[0, 9:, 4:20, 4:20, 0] = 200
  subject = dataclasses.replace(subject, asked=subjects.Asked(captions, ()))
  found = drift.by_window(subject, videos, [(0, 9), (9, 21)])
  assert set(found) == set(drift.FIGURES) and 'direction' not in found
  second = judge.judge(subject.opinion, videos[:, 9:], captions)
  for name in ('colour', 'class', 'drift'):
    np.testing.assert_array_equal(found[name][:, 1], second[name])
  assert found['colour'].shape == (2, 2) and found['colour'][0, 1] == 1
  # Looks at frames 9, 13 and 17 are half a second apart.
  np.testing.assert_allclose(found['travel_per_second'][:, 1], second['travel'] / 0.5)
  assert found['saturation'][0, 1] == 1 > found['saturation'][0, 0]


def test_longer_clips_begin_like_the_trained_ones(subject, monkeypatch):
  """With a full cache a chunk does not know how many will follow."""
  monkeypatch.setattr(drift, 'LENGTHS', (1, 2))
  one, two = drift.drift(subject)['lengths']
  assert (one['latent_frames'], two['latent_frames']) == (6, 12)
  assert one['windows'] == two['windows'][:2] == [(0, 9), (9, 21)] and len(two['windows']) == 4
  for name in ('brightness', 'saturation'):
    np.testing.assert_allclose(one['figures'][name], two['figures'][name][:2], atol=1e-3)


def test_lengths_are_compared_on_the_clips_that_all_have(subject, monkeypatch):
  monkeypatch.setattr(drift, 'LENGTHS', (1, 2))
  monkeypatch.setattr(drift, '_FEWEST', 1)
  found = drift.drift(subject)
  one, two = found['lengths']
  assert (one['clips'], two['clips'], found['common_clips']) == (2, 1, 1)
  assert two['common'] == two['figures']
  apart = np.abs(np.subtract(one['figures']['brightness'], two['figures']['brightness'][:2]))
  together = np.subtract(one['common']['brightness'], two['figures']['brightness'][:2])
  assert apart.min() > 10 * np.abs(together).max()


# The program.


@pytest.fixture
def program(monkeypatch):
  """Runs `evaluate` in this process; afterwards flags and log are as before."""
  known, logger = set(flags.FLAGS), logging.getLogger('salt_jax')
  handlers = list(logger.handlers)
  monkeypatch.chdir(pathlib.Path(__file__).parents[1])

  def run(*args):
    monkeypatch.setattr(sys, 'argv', ['evaluate', *args])
    with pytest.raises(SystemExit) as stop:
      cli.run(evaluate.program, evaluate.define_flags)
    return stop.value.code

  yield run
  for name in set(flags.FLAGS) - known:
    delattr(flags.FLAGS, name)
  flags.FLAGS.unparse_flags()
  logger.handlers, logger.propagate = handlers, True


@functools.cache
def _exported(folder, chunk):
  """A file of a student with chunks of `chunk`."""
  config = tiny_config.get_config(folder)
  config.rollout.chunk = chunk
  config.losses.alignment = 0.0
  rec = recipe.build(config)
  params = files.load(config.weights.student, 'dit', rec.model)
  return files.export(f'{folder}/{chunk}', 'generator', params, config)


def test_the_program_writes_numbers_and_pictures(folder, opinion, program, tmp_path, monkeypatch):
  monkeypatch.setattr(judge, 'train', lambda: opinion)
  monkeypatch.setattr(drift, 'LENGTHS', (1, 2))
  args = (f'--checkpoint={_exported(folder, 3)}', '--clips=2', f'--output={tmp_path}')
  assert not program('--diagnose=defect,cache,swap,drift', *args)
  found = {name: json.loads((tmp_path / f'{name}.json').read_text()) for name in diagnostics.NAMES}
  assert [len(row['by_chunk']) for row in found['defect']['triples']] == [2] * 27
  pairs = found['cache']['pairs']
  assert [(p['history'], p['steps']) for p in pairs] == [
    (h, k) for h in (2, 4, 8) for k in (2, 4, 8)
  ]
  assert all(set(p['figures']) == set(judge.MEASURES) for p in pairs)
  assert all(len(x) == 3 for p in pairs for x in p['figures'].values())
  assert all(len(p['distance_by_chunk']) == 2 and p['distance_by_chunk'][0] == 0 for p in pairs)
  assert all((p['distance_by_chunk'][1] == 0) == (p['history'] == p['steps']) for p in pairs)
  rows = found['swap']['rows']
  assert [(row['cache'], row['steps']) for row in rows] == [('clips themselves', None)] + [
    (kind, k) for k in (2, 4, 8) for kind in ('own', 'real')
  ]
  assert all(len(values) == 2 for row in rows for values in row['figures'].values())
  # No history lies behind the first chunk.
  for own, real in zip(rows[1::2], rows[2::2], strict=True):
    one, other = (row['figures']['brightness'] for row in (own, real))
    assert one[0] == pytest.approx(other[0], abs=1e-3) and abs(one[1] - other[1]) > 1e-3
  lengths = found['drift']['lengths']
  assert [len(row['windows']) for row in lengths] == [2, 4]
  for row, part in itertools.product(lengths, ('figures', 'common')):
    assert set(row[part]) == set(drift.FIGURES)
    assert all(len(values) == len(row['windows']) for values in row[part].values())
  for name in diagnostics.NAMES:
    with Image.open(tmp_path / f'{name}.png') as picture:
      colours = picture.convert('RGB').getcolors(2**20)
      assert picture.width > 300 and len(colours) > 20, 'the picture is blank'


def test_a_bidirectional_student_has_a_defect_and_no_cache(folder, program, tmp_path, capsys):
  path = _exported(folder, 6)
  args = (f'--checkpoint={path}', '--clips=1', f'--output={tmp_path}')
  assert not program('--diagnose=defect', *args)
  found = json.loads((tmp_path / 'defect.json').read_text())
  assert all(row['by_chunk'] == [pytest.approx(row['defect'])] for row in found['triples'])


@pytest.mark.parametrize(
  'chunk, args, words',
  [
    (6, ['--diagnose=defect,swap,cache'], '--diagnose=swap,cache needs chunks and a cache, but this'),
    (6, ['--diagnose=drift'], 'this student is bidirectional: ask for --diagnose=defect.'),
    (6, ['--diagnose=defect', '--config=configs/selfforcing.py:nano'], 'is a bidirectional student, which'),
    (3, ['--diagnose=defect', '--config=configs/dmd.py:nano'], 'is a causal student, which dmd-nano-sc_dmd'),
    (3, ['--diagnose=drift', '--config.seed=1'], '--config do not fit: a checkpoint of another size'),
    (3, ['--diagnose=defect,cash'], '--diagnose: "cash" is unknown; choose from defect, cache, swap, drift.'),
    (3, ['--diagnose='], '--diagnose: "" is unknown; choose from'),
    (3, ['--diagnose=defect', '--output=LICENSE/x'], '--output: nothing can be written to LICENSE/x'),
  ],
)  # fmt: skip
def test_what_cannot_be_diagnosed_is_refused(
  folder, program, capsys, monkeypatch, chunk, args, words
):
  monkeypatch.setattr(diagnostics, 'run', lambda *_: pytest.fail('it began'))
  assert program(*args, f'--checkpoint={_exported(folder, chunk)}') == 2
  (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith('salt_jax: ')]
  assert words in line


def test_a_checkpoint_is_needed(program, capsys):
  assert program('--diagnose=defect') == 2
  assert 'looks into one student: pass --checkpoint' in capsys.readouterr().err


def test_a_shipped_student_belongs_to_the_networks_that_ship():
  """Its own config names files of the machine that made it."""
  config, rec, _ = sample.load('assets:nano_init.safetensors')
  for name in ('text', 'vae', 'teacher'):
    assert files.load(config.weights[name], files.NETWORKS.get(name, 'dit'), {
      'vae': rec.vae, 'text': rec.text, 'teacher': rec.teacher}[name])  # fmt: skip


def test_unknown_names_are_refused():
  assert diagnostics.names('drift, defect,drift') == ('drift', 'defect')
  with pytest.raises(InputError, match='"x" is unknown'):
    diagnostics.names('defect,x')
