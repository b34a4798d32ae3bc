"""Exports for VBench: names, resuming, refusals; its results: totals, pairs, intervals."""

import json
import os
import pathlib
import stat
import subprocess
import sys
import types

import numpy as np
import pytest

from salt_jax import benchmark, sample, statistics, vbench, video
from salt_jax.errors import InputError
from tests import tiny_config

ROOT = pathlib.Path(__file__).parents[1]
SHORT = ['one red bag', 'one blue bag', 'one red boot']  # 'one' is no word of the nano world
LONG = ['a red bag moves left', 'a blue bag moves up', 'a red boot moves down']


def _write(path, content):
  path.write_text(content if isinstance(content, str) else json.dumps(content), encoding='utf-8')
  return str(path)


def test_a_text_and_vbenchs_own_json_are_one_prompt_set(tmp_path):
  lines = _write(tmp_path / 'a.txt', '\n'.join(SHORT) + '\n\n')
  full = [{'prompt_en': p, 'dimension': ['scene']} for p in SHORT]
  own, plain = (_write(tmp_path / f'{i}.json', x) for i, x in enumerate((full, SHORT)))
  sets = [benchmark.items(path, None, 5) for path in (lines, own, plain)]
  assert [[item.name for item in found] for found in sets] == [SHORT] * 3
  assert {benchmark.hash_of_prompts([i.name for i in found]) for found in sets} == {
    # sha256 of the three lines, each with its line break
    __import__('hashlib').sha256(('\n'.join(SHORT) + '\n').encode()).hexdigest()
  }
  assert [item.dimensions for item in sets[1]] == [('scene',)] * 3
  assert sets[0][0].file(4) == 'one red bag-4.mp4'


def test_long_prompts_are_generated_and_short_ones_name(tmp_path):
  lines = _write(tmp_path / 'a.txt', '\n'.join(SHORT))
  longer = _write(tmp_path / 'b.txt', '\n'.join(text * 40 for text in LONG))
  found = benchmark.items(lines, longer, 2)
  assert [(i.name, i.text) for i in found] == [
    (s, t * 40) for s, t in zip(SHORT, LONG, strict=True)
  ]
  with pytest.raises(InputError, match='makes a file name of .* bytes, and 255 are allowed: give'):
    benchmark.items(longer, None, 2)


def test_a_prompt_that_comes_twice_is_one_with_all_its_dimensions(tmp_path):
  entries = [('a', ['scene']), ('b', ['temporal_flickering']), ('a', ['color', 'scene'])]
  path = _write(tmp_path / 'a.json', [{'prompt_en': p, 'dimension': d} for p, d in entries])
  found = benchmark.items(path, None, 5, 25)
  assert [tuple(i[:1] + i[2:]) for i in found] == [
    ('a', ('scene', 'color'), 5),
    ('b', ('temporal_flickering',), 25),
  ]


@pytest.mark.parametrize(
  'prompt',
  [
    'Ünïcode: 猫が走る',
    '"quoted", (brackets) & $HOME; *',
    "it's 50% - fast-1",
    '.hidden',
    'x' * 249,
  ],
)
def test_odd_prompts_name_files_that_come_back(tmp_path, prompt):
  (item,) = benchmark.items(_write(tmp_path / 'a.json', [prompt]), None, 5)
  (tmp_path / 'videos').mkdir()
  for index in range(5):
    (tmp_path / 'videos' / item.file(index)).touch()
  record = {'items': [{'prompt': prompt, 'dimensions': [], 'samples': 5}]}
  _write(tmp_path / 'vbench.json', record)
  assert benchmark.check_complete(str(tmp_path)) == record
  assert set(benchmark.expected(record)) == set(os.listdir(tmp_path / 'videos'))


@pytest.mark.parametrize(
  'name, content, words',
  [
    ('a.txt', '', 'holds no prompt: give one a line.'),
    ('a.txt', ' \n\n', 'holds no prompt: give one a line.'),
    ('a.json', [], 'holds no prompt: give one a line.'),
    ('a.json', '{"a": ', 'is no prompt set: give a .txt'),
    ('a.json', {'a': 1}, 'is no prompt set: give a .txt'),
    ('a.json', [{'prompt': 'a'}], 'is no prompt set: give a .txt'),
    ('a.json', ['a', ''], 'is no prompt set: give a .txt'),
    ('a.json', ['a/b'], 'the prompt "a/b" holds a slash or a line break, so it can name no file'),
    ('a.json', ['a\nb'], 'holds a slash or a line break'),
    ('a.json', ['猫' * 84], 'makes a file name of 258 bytes, and 255 are allowed'),
  ],
)
def test_prompt_sets_that_cannot_be_used_are_refused(tmp_path, name, content, words):
  with pytest.raises(InputError) as error:
    benchmark.items(_write(tmp_path / name, content), None, 5)
  assert words in str(error.value) and '\n' not in str(error.value)


def test_sets_of_other_lengths_and_missing_files_are_refused(tmp_path):
  one, two = (_write(tmp_path / f'{n}.txt', 'a\n' * n + 'b') for n in (1, 2))
  with pytest.raises(InputError, match='has 3 prompts, but --vbench=.* has 2: give one for each'):
    benchmark.items(one, two, 5)
  with pytest.raises(InputError, match=r'--extended=nowhere.txt cannot be read \(No such file'):
    benchmark.items(one, 'nowhere.txt', 5)


# Exports of a tiny student.


@pytest.fixture(scope='module')
def student(tmp_path_factory):
  from salt_jax import recipe, weights

  folder = tmp_path_factory.mktemp('student')
  config = tiny_config.get_config(tiny_config.write_weights(str(folder)))
  rec = recipe.build(config)
  params = weights.load(config.weights.student, 'dit', rec.model)
  return weights.export(str(folder), 'generator', params, config)


def _args(student, folder, **changes):
  prompts, longer = folder / 'short.txt', folder / 'long.txt'
  _write(prompts, '\n'.join(SHORT)), _write(longer, '\n'.join(LONG))
  fields = dict(
    checkpoint=student,
    vbench=str(prompts),
    extended=str(longer),
    output=str(folder / 'out'),
    **dict(samples=2, flicker_samples=None, sampler='student', steps=1, guidance=None, shift=None),
    **dict(negative=None, image=None, last_image=None, batch=2, seed=0, config=None),
    **dict(multihost=False, coordinator=None, host_count=None, host=None),
  )
  return types.SimpleNamespace(**(fields | changes))


def _bytes(folder):
  place = folder / 'out' / 'videos'
  return {path.name: path.read_bytes() for path in place.iterdir()}


def test_an_export_is_complete_resumes_and_knows_its_protocol(student, tmp_path, monkeypatch):
  args = _args(student, tmp_path)
  benchmark.export(args)
  first = _bytes(tmp_path)
  assert set(first) == {f'{prompt}-{i}.mp4' for prompt in SHORT for i in range(2)}
  assert len(set(first.values())) == 6, 'each video has its own noise'
  assert video.read_mp4(str(tmp_path / 'out/videos/one red bag-0.mp4')).shape == (21, 32, 32, 3)
  assert sorted(os.listdir(tmp_path / 'out')) == ['vbench.json', 'videos']

  record = benchmark.check_complete(str(tmp_path / 'out'))
  assert record['sampler'] == {'solver': 'student', 'steps': 1} and record['seed'] == 0
  assert record['video'] == {'frames': 21, 'height': 32, 'width': 32, 'fps': 16}
  assert record['prompts_sha256'] == benchmark.hash_of_prompts(SHORT)
  assert record['texts_sha256'] == benchmark.hash_of_prompts(LONG)
  assert all(len(record['networks'][name]) == 64 for name in ('generator', 'text', 'vae'))

  # What was lost is made again in the same bits, and nothing else is.
  lost = tmp_path / 'out' / 'videos' / 'one blue bag-1.mp4'
  lost.unlink()
  with pytest.raises(
    InputError, match='lacks 1 of 6 videos, such as "one blue bag-1.mp4": run the'
  ):
    benchmark.check_complete(str(tmp_path / 'out'))
  made = []
  write = video.write
  monkeypatch.setattr(video, 'write', lambda path, *rest: made.append(path) or write(path, *rest))
  benchmark.export(args)
  assert len(made) == 1 and _bytes(tmp_path) == first
  benchmark.export(args)
  assert len(made) == 1

  for changes, words in (
    (dict(steps=2), 'of another protocol (sampler.steps is 1 there and 2 here): export into'),
    (dict(seed=3), 'of another protocol (seed is 0 there and 3 here)'),
    (dict(extended=None, vbench=args.extended), 'which is not of this prompt set'),
    (
      dict(samples=1),
      'one blue bag-1.mp4", which is not of this prompt set: export into another folder.',
    ),
    (dict(samples=3), 'of another protocol (items differ)'),
  ):
    with pytest.raises(InputError) as error:
      benchmark.export(_args(student, tmp_path, **changes))
    assert words in str(error.value) and '\n' not in str(error.value)
  assert _bytes(tmp_path) == first


def test_the_noise_is_the_seeds_and_the_numbers(student, tmp_path):
  """Not the run's own seed: two checkpoints are compared on the same noise."""
  folders = [tmp_path / name for name in ('a', 'b', 'c')]
  for folder, seed in zip(folders, (0, 0, 1), strict=True):
    folder.mkdir()
    benchmark.export(_args(student, folder, seed=seed, samples=1))
  one, same, other = (_bytes(folder) for folder in folders)
  assert one == same and all(one[name] != other[name] for name in one)


def test_foreign_folders_are_refused_before_anything_is_loaded(student, tmp_path, monkeypatch):
  monkeypatch.setattr(sample, 'generator', lambda *_, **__: pytest.fail('something was loaded'))
  (tmp_path / 'out' / 'videos').mkdir(parents=True)
  (tmp_path / 'out' / 'videos' / 'one red bag-0.mp4').touch()
  with pytest.raises(InputError, match='holds videos but no vbench.json, so nobody knows how'):
    benchmark.export(_args(student, tmp_path))
  (tmp_path / 'out' / 'videos' / 'holiday.mp4').touch()
  with pytest.raises(InputError, match='holds "holiday.mp4", which is not of this prompt set'):
    benchmark.export(_args(student, tmp_path))


def test_a_network_that_continues_a_picture_is_refused(tmp_path):
  from salt_jax import recipe, weights

  config = tiny_config.get_i2v(tiny_config.write_weights(str(tmp_path), i2v=True))
  params = weights.load(config.weights.student, 'dit', recipe.build(config).model)
  path = weights.export(str(tmp_path), 'generator', params, config)
  with pytest.raises(
    InputError, match='continues a picture, and the prompts of --vbench come with'
  ):
    benchmark.export(_args(path, tmp_path))


def test_an_export_without_pyav_is_refused(student, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'av', None)
  with pytest.raises(InputError, match=r"--vbench needs PyAV: pip install 'salt_jax\[video\]'."):
    benchmark.export(_args(student, tmp_path))


# Results.

NAMES = list(vbench.DIMENSIONS)


def _export(folder, prompts=12, samples=3, dimensions=NAMES):
  """A folder as an export leaves it; prompt n serves every dimension but number n modulo 16."""
  (folder / 'videos').mkdir(parents=True)
  items = []
  for n in range(prompts):
    serves = [name for i, name in enumerate(dimensions) if i != n % 16]
    items.append({'prompt': f'prompt {n}', 'dimensions': serves, 'samples': samples})
  same = dict(
    networks={'generator': folder.name}, texts_sha256='', seed=0, sampler={}, video={}, codec={}
  )
  _write(folder / 'vbench.json', {'items': items} | same)
  for item in items:
    for index in range(samples):
      (folder / 'videos' / f'{item["prompt"]}-{index}.mp4').touch()
  return items


def _figures(items, seed, offset=0.0, spread=0.02):
  """{dimension: [(file, figure)]}: prompts differ much, samples of one little."""
  rng = np.random.default_rng(seed)
  hard = np.random.default_rng(99).uniform(0.3, 0.7, len(items))
  return {
    name: [
      (f'{item["prompt"]}-{index}.mp4', float(h + offset + spread * rng.standard_normal()))
      for item, h in zip(items, hard, strict=True)
      if name in item['dimensions']
      for index in range(item['samples'])
    ]
    for name in NAMES
  }


def _score(folder, figures):
  for name, entries in figures.items():
    place = folder / 'scores' / name
    place.mkdir(parents=True)
    scale = 100 if name == 'imaging_quality' else 1
    videos = [{'video_path': f'/elsewhere/{f}', 'video_results': scale * x} for f, x in entries]
    mean = float(np.mean([x for _, x in entries]))
    _write(place / 'results_2025-01-01-00:00:00_eval_results.json', {name: [mean, videos]})


def test_totals_are_vbenchs_formula():
  """Wan2.1-1.3B of the leaderboard's kind, worked out by hand in float64 from the published scripts."""
  ones = {name: d.high for name, d in vbench.DIMENSIONS.items()}
  assert vbench.totals(ones) == pytest.approx({'quality': 1, 'semantic': 1, 'total': 1})
  zeros = {name: d.low for name, d in vbench.DIMENSIONS.items()}
  assert vbench.totals(zeros) == pytest.approx({'quality': 0, 'semantic': 0, 'total': 0})
  # Leverage of +0.01 raw in points of the total (users_and_peers.md 2.2).
  leverage = {
    'motion_smoothness': 0.42,
    'temporal_flickering': 0.33,
    'background_consistency': 0.17,
    'subject_consistency': 0.14,
    'aesthetic_quality': 0.12,
    'imaging_quality': 0.12,
    'dynamic_degree': 0.06,
    'appearance_style': 0.08,
    'temporal_style': 0.06,
    'overall_consistency': 0.06,
    'scene': 0.03,
    'color': 0.02,
  }
  for name, points in leverage.items():
    moved = vbench.totals(ones | {name: ones[name] + 0.01})['total'] - 1
    assert 100 * moved == pytest.approx(points, abs=0.0051), name
  assert vbench.totals({'color': 1.0}) == {}


def test_results_become_figures_with_intervals(tmp_path):
  items = _export(tmp_path / 'a', prompts=64)
  figures = _figures(items, 0)
  _score(tmp_path / 'a', figures)
  found = vbench.estimates(vbench.read(str(tmp_path / 'a')))
  for name in NAMES:
    values = np.array([x for _, x in figures[name]])
    assert found[name].mean == pytest.approx(values.mean(), abs=1e-9)
    # Samples of one prompt agree, so prompts are what counts, not videos.
    means = values.reshape(-1, 3).mean(1)
    width = found[name].high - found[name].low
    assert width == pytest.approx(2 * 1.96 * means.std() / len(means) ** 0.5, rel=0.1)
    assert found[name].low < found[name].mean < found[name].high
  raw = {name: found[name].mean for name in NAMES}
  assert {name: found[name].mean for name in vbench.TOTALS} == pytest.approx(vbench.totals(raw))
  # Prompts are shared by the dimensions, so their luck does not average out over them.
  total = found['total'].high - found['total'].low
  assert total > 0.8 * (found['aesthetic_quality'].high - found['aesthetic_quality'].low)


def test_pairs_are_far_surer_than_either(tmp_path):
  for name, seed, offset in (('a', 0, 0.03), ('b', 1, 0.0)):
    _score(tmp_path / name, _figures(_export(tmp_path / name, prompts=64), seed, offset))
  one, other = (vbench.read(str(tmp_path / name)) for name in 'ab')
  gaps, own = vbench.differences(one, other), vbench.estimates(one)
  for name in NAMES:
    assert gaps[name].low < 0.03 < gaps[name].high or abs(gaps[name].mean - 0.03) < 0.006
    assert gaps[name].high - gaps[name].low < 0.25 * (own[name].high - own[name].low)
  same = vbench.differences(one, one)
  assert all(estimate == statistics.Estimate(0.0, 0.0, 0.0) for estimate in same.values())
  text = vbench.table(one, other)
  assert text.count('\n| ') == 19 and 'the exports differ in networks.' in text
  assert f'| total | {100 * own["total"].mean:.2f} |' in text
  assert f'{100 * gaps["color"].mean:+.2f}' in text


def test_a_part_of_the_dimensions_makes_no_total(tmp_path):
  figures = _figures(_export(tmp_path), 0)
  _score(tmp_path, {name: figures[name] for name in ('color', 'dynamic_degree')})
  text = vbench.table(vbench.read(str(tmp_path)))
  assert (
    '| color |' in text and '| total |' not in text and 'No totals: subject_consistency,' in text
  )


def test_a_figure_that_its_videos_do_not_bear_out_is_told(tmp_path, caplog):
  _score(tmp_path, {'scene': _figures(_export(tmp_path), 0)['scene']})
  (path,) = (tmp_path / 'scores' / 'scene').iterdir()
  found = json.loads(path.read_text())
  found['scene'][0] += 0.02
  _write(path, found)
  assert vbench.read(str(tmp_path)).reported['scene'] == found['scene'][0]
  assert 'scene: VBench reports' in caplog.text


def _spoil(folder, how):
  place = folder / 'scores' / 'scene'
  (path,) = place.iterdir()
  found = json.loads(path.read_text())
  match how:
    case 'none':
      path.unlink()
    case 'damaged':
      path.write_text('{"scene": [0.5')
    case 'unknown':
      _write(path, {'beauty': found['scene']})
    case 'twice':
      _write(place / 'results_x_eval_results.json', found)
    case 'missing':
      found['scene'][1] = [e for e in found['scene'][1] if 'prompt 3-' not in e['video_path']]
      _write(path, found)
    case 'foreign':
      found['scene'][1][0]['video_path'] = 'holiday-0.mp4'
      _write(path, found)
    case 'lost':
      (folder / 'videos' / 'prompt 0-0.mp4').unlink()
    case 'extra':
      (folder / 'videos' / 'holiday.mp4').touch()
    case 'record':
      (folder / 'vbench.json').unlink()


@pytest.mark.parametrize(
  'how, words',
  [
    ('none', 'holds no *_eval_results.json: run launch/vbench.sh'),
    ('damaged', 'is no result of VBench, or damaged: score it again.'),
    ('unknown', 'is no result of VBench, or damaged: score it again.'),
    ('twice', 'scores scene twice: keep one of the files.'),
    ('missing', 'lacks videos of 1 of 12 prompts of scene, such as "prompt 3": score it again.'),
    ('foreign', 'scores "holiday-0.mp4", which is not of this export: score this folder.'),
    ('lost', 'lacks 1 of 36 videos, such as "prompt 0-0.mp4"'),
    ('extra', 'holds "holiday.mp4", which is not of this prompt set'),
    ('record', 'has no vbench.json: pass a folder that salt_jax.evaluate --vbench has written.'),
  ],
)
def test_results_that_cannot_be_trusted_are_refused(tmp_path, how, words):
  items = _export(tmp_path)
  _score(tmp_path, {'scene': _figures(items, 0)['scene']})
  _spoil(tmp_path, how)
  with pytest.raises(InputError) as error:
    vbench.read(str(tmp_path))
  assert words in str(error.value) and '\n' not in str(error.value)


def test_exports_of_other_prompts_are_no_pair(tmp_path):
  for name, samples in (('a', 2), ('b', 3)):
    items = _export(tmp_path / name, samples=samples)
    _score(tmp_path / name, {'scene': _figures(items, 0)['scene']})
  with pytest.raises(InputError, match='are no pair: their prompts or samples differ'):
    vbench.differences(*(vbench.read(str(tmp_path / name)) for name in 'ab'))


FAKE = """#!{python}
import json, os, sys
words = sys.argv[1:]
if words[0] == '-c':
  print('/package')
  sys.exit()
given = dict(zip(words, words[1:]))
name, place = given['--dimension'], given['--output_path']
os.makedirs(place)
videos = sorted(os.listdir(given['--videos_path']))
if name == 'scene':
  videos = [v for v in videos if not v.startswith('prompt ' + str({scene}) + '-')]
entries = [{{'video_path': v, 'video_results': 0.5}} for v in videos]
with open(place + '/results_now_eval_results.json', 'w') as file:
  json.dump({{name: [0.5, entries]}}, file)
with open({log!r}, 'a') as file:
  print(name, file=file)
"""


def test_the_runner_scores_what_is_missing_in_its_own_environment(tmp_path):
  folder, home = tmp_path / 'out dir', tmp_path / 'env'
  _export(folder, prompts=3)
  (home / 'bin').mkdir(parents=True)
  (home / 'ready').touch()
  fake = home / 'bin' / 'python'
  log = str(tmp_path / 'log')
  fake.write_text(FAKE.format(python=sys.executable, log=log, scene=99))
  fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
  env = os.environ | {'VBENCH_ENV': str(home), 'PYTHON': sys.executable}

  def run(*words):
    command = ['bash', 'launch/vbench.sh', str(folder), *words]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)

  done = run('scene', 'color')
  assert done.returncode == 0, done.stderr[-2000:]
  assert '| color | 50.00 |' in done.stdout and 'No totals' in done.stdout
  done = run('scene', 'dynamic_degree')
  assert 'scene: scored already' in done.stdout and '| dynamic_degree | 50.00 |' in done.stdout
  assert pathlib.Path(log).read_text().split() == ['scene', 'color', 'dynamic_degree']
  assert json.loads((folder / 'table.json').read_text())['scores']['color'] == [0.5, 0.5, 0.5]

  (folder / 'videos' / 'prompt 0-0.mp4').unlink()
  done = run()
  assert done.returncode == 2 and 'lacks 1 of 9 videos' in done.stderr
  assert len(pathlib.Path(log).read_text().split()) == 3
