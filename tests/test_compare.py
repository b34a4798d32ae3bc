"""Comparisons: fair by construction, paired in their statistics, trained once."""

import os

import numpy as np
import pytest

from salt_jax import compare
from salt_jax.errors import InputError
from tests import tiny_config

DMD, SALT = 'dmd=configs/selfforcing.py:nano,method=dmd', 'salt=configs/selfforcing.py:nano'


def _runs(*experiments, seeds=(0,), assignments=(), folder='out'):
  return compare.runs_of(experiments, seeds, assignments, folder)


def test_runs_are_paired_by_seed():
  runs = _runs(DMD, SALT, seeds=(3, 4), assignments=['total_steps=8', 'optim.generator.lr=1e-5'])
  assert [(run.label, run.seed) for run in runs] == [
    ('dmd', 3),
    ('salt', 3),
    ('dmd', 4),
    ('salt', 4),
  ]
  assert len({run.workdir for run in runs}) == 4
  assert all(run.config.total_steps == 8 and run.config.seed == run.seed for run in runs)
  one, other = runs[0].config, runs[1].config
  differ = {key for key in one if one[key] != other[key]}
  assert differ == {'losses', 'schedule', 'name'}, (
    'a baseline is Salt but for config lines of the method'
  )


def test_regression_and_consistency_may_stand_beside():
  others = [
    f'{stage}=configs/causal_init.py:nano,stage={stage},steps=300' for stage in ('ode', 'causal_cd')
  ]
  runs = _runs(DMD, *others, assignments=['batch=4', 'total_steps=300'])
  assert [run.config.stage for run in runs] == ['selfforcing', 'ode', 'causal_cd']


@pytest.mark.parametrize(
  ('arguments', 'sentence'),
  [
    (dict(experiments=['dmd']), '--experiment=dmd must be LABEL=FILE:ARGUMENT'),
    (dict(experiments=['a=nosuch.py:nano']), 'there is no config file nosuch.py'),
    (dict(experiments=[DMD, DMD]), 'two experiments have one label'),
    (dict(experiments=[DMD], assignments=['batch=x']), '--set=batch=x does not fit'),
    (dict(experiments=[DMD], assignments=['nosuch=1']), '--set=nosuch=1 does not fit'),
    (dict(experiments=[DMD], assignments=['batch']), '--set=batch does not fit'),
    (
      dict(experiments=[DMD, 'bi=configs/dmd.py:nano'], assignments=['total_steps=50']),
      'bi and dmd are no fair pair: weights.init is assets:nano_teacher.safetensors in one',
    ),
    (
      dict(experiments=[DMD, 'ode=configs/causal_init.py:nano']),
      'ode and dmd are no fair pair: total_steps is 300 in one and 80 in the other',
    ),
    (
      dict(experiments=[DMD, 'teacher=configs/pretrain.py:teacher']),
      'teacher is of the stage flow, which makes no few-step student: choose configs of ode,',
    ),
    (
      dict(experiments=[DMD, 'i2v=configs/selfforcing.py:nano,i2v']),
      'i2v and dmd are no fair pair: data is',
    ),
  ],
)
def test_what_cannot_be_compared_is_refused(arguments, sentence):
  experiments = arguments.pop('experiments')
  with pytest.raises(InputError) as error:
    _runs(*experiments, **arguments)
  assert sentence in str(error.value) and '\n' not in str(error.value)


def test_table_shows_figures_and_differences():
  rng = np.random.default_rng(0)
  measures = compare.evaluate.MEASURES
  found = {
    (label, 4): {m: rng.uniform(0, 1, (2, 8)) + shift for m in measures}
    for label, shift in (('dmd', 0), ('salt', 10))
  }
  entries = compare.summary(found, 'dmd')
  text = compare.table(entries, 'dmd')
  assert text.count('\n| salt, 4 steps |') == 2 and text.count('\n| dmd, 4 steps |') == 1
  salt = next(entry for entry in entries if entry['label'] == 'salt')
  expected = (found['salt', 4]['colour'] - found['dmd', 4]['colour']).mean()
  assert salt['colour - dmd'][0] == pytest.approx(expected) and expected > 9


def test_finished_runs_are_not_trained_again(tmp_path, monkeypatch):
  folder = tiny_config.write_weights(str(tmp_path))
  monkeypatch.chdir(os.path.dirname(os.path.dirname(__file__)))
  experiments = [f'tiny=tests/tiny_config.py:{folder}']
  runs = _runs(*experiments, assignments=['total_steps=1'], folder=str(tmp_path / 'runs'))
  compare.train_missing(runs)
  assert os.path.isfile(runs[0].student)
  monkeypatch.setattr(compare.train, 'run', lambda *_: pytest.fail('trained twice'))
  compare.train_missing(runs)


def test_a_table_has_every_seed_and_the_picture_the_first_one(tmp_path, monkeypatch):
  folder = tiny_config.write_weights(str(tmp_path))
  monkeypatch.chdir(os.path.dirname(os.path.dirname(__file__)))
  names = [f'{label}=tests/tiny_config.py:{folder}' for label in ('dmd', 'salt')]
  runs = compare.runs_of(names, [3, 4], [], str(tmp_path))
  monkeypatch.setattr(compare.weights, 'load', lambda path, *_: path)
  monkeypatch.setattr(compare.stages, 'serving', lambda *_: {'vae': None})
  monkeypatch.setattr(compare.sample, 'student', lambda *_: lambda params, n: (params, n))

  made = []

  def measure(config, rec, vae, methods, count):
    made.extend(method.run for method in methods)
    # The figure of a clip says which student made it.
    figures = [np.full(count, number) for number in range(len(methods))]
    return [
      compare.evaluate.Row(m.label, None, dict.fromkeys(compare.evaluate.MEASURES, figure), 0)
      for m, figure in zip(methods, figures, strict=True)
    ]

  monkeypatch.setattr(compare.evaluate, 'measure', measure)
  found, rows = compare.judged(runs, 5, [4, 2])
  assert [row.label for row in rows] == [
    f'{label}, seed 3, {n} steps' for label in ('dmd', 'salt') for n in (4, 2)
  ]
  for label in ('dmd', 'salt'):
    for n in (4, 2):
      students = [run.student for run in runs if run.label == label]
      expected = [[made.index((student, n))] * 5 for student in students]
      np.testing.assert_array_equal(found[label, n]['colour'], expected)
