"""Trains several experiments over paired seeds and prints one table with intervals.

  python -m salt_jax.compare --experiment=dmd=configs/selfforcing.py:nano,method=dmd \\
    --experiment=salt=configs/selfforcing.py:nano --seeds=0,1,2 --output=runs/compare

Runs of one seed see the same captions in the same order, start from the same weights and the same noise; all students
are judged on the same held-out captions from the same noise, and a picture shows clips of the first seed's. A killed
comparison goes on where it was; runs that are there already are not trained again, so several processes may share the
work with --train_only and other experiments. ODE regression and consistency distillation (configs/causal_init.py with
stage=ode, causal_ode or causal_cd, and as many steps=) may stand beside them: they train on their own data, from the
weights that their stage starts from.
"""

import ast
import dataclasses
import importlib.util
import json
import logging
import os
from collections.abc import Sequence

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from salt_jax import cli, clips, evaluate, recipe, sample, stages, train, weights
from salt_jax.checks import FEW_STEP
from salt_jax.errors import InputError
from salt_jax.statistics import interval

log = logging.getLogger('salt_jax.compare')

_PICTURED = 4  # clips in the picture

# What must agree for a difference to be the method's.
SAME = ('size', 'total_steps', 'batch', 'video', 'vae', 'text')
SAME_IN_A_STAGE = ('generator_every', 'data')
SAME_WEIGHTS = ('init', 'teacher', 'text', 'vae')


@dataclasses.dataclass(frozen=True)
class Run:
  """One training run of the comparison."""

  label: str
  seed: int
  config: ConfigDict
  workdir: str

  @property
  def student(self) -> str:
    """The file that the finished run exports."""
    return os.path.join(self.workdir, 'export', f'{self.config.name}-generator.safetensors')


def load_config(argument: str) -> ConfigDict:
  """The config of 'FILE.py:ARGUMENT'.

  Raises:
    InputError: no such file.
  """
  path, _, arg = argument.partition(':')
  if not path.endswith('.py') or not os.path.isfile(path):
    raise InputError(
      f'there is no config file {path}; name one such as configs/selfforcing.py:nano.'
    )
  spec = importlib.util.spec_from_file_location('compared_config', path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module.get_config(arg or None)


def override(config: ConfigDict, assignment: str) -> None:
  """Sets one field from 'a.b=value'.

  Raises:
    InputError: no such field, or a value of another type.
  """
  key, equals, text = assignment.partition('=')
  try:
    value = ast.literal_eval(text)
  except (ValueError, SyntaxError):
    value = text
  *sections, field = key.split('.')
  node = config
  try:
    for section in sections:
      node = node[section]
    if not equals or field not in node:
      raise KeyError(field)
    node[field] = value
  except (KeyError, TypeError) as error:
    raise InputError(
      f'--set={assignment} does not fit the config of {config.name}: give KEY=VALUE of a field and its type.'
    ) from error


def runs_of(
  experiments: Sequence[str], seeds: Sequence[int], assignments: Sequence[str], folder: str
) -> list[Run]:
  """All runs, seed by seed.

  Raises:
    InputError: an experiment that is not LABEL=FILE:ARGUMENT, a label given twice, or experiments that differ in more
      than their method.
  """
  runs = []
  for experiment in experiments:
    label, equals, argument = experiment.partition('=')
    if not equals or not label.replace('_', '').replace('-', '').isalnum():
      raise InputError(
        f'--experiment={experiment} must be LABEL=FILE:ARGUMENT, such as dmd=configs/dmd.py:nano.'
      )
    for seed in seeds:
      config = load_config(argument)
      for assignment in assignments:
        override(config, assignment)
      config.seed = seed
      runs.append(Run(label, seed, config, os.path.join(folder, label, f'seed-{seed}')))
  if len({(run.label, run.seed) for run in runs}) < len(runs):
    raise InputError('two experiments have one label, or a seed is named twice.')
  for run in runs:
    _check_fair(runs[0], run)
  return sorted(runs, key=lambda run: run.seed)


def _check_fair(first: Run, other: Run) -> None:
  if other.config.stage not in FEW_STEP:
    raise InputError(
      f'{other.label} is of the stage {other.config.stage}, which makes no few-step student: '
      f'choose configs of {", ".join(FEW_STEP)}.'
    )
  keys = SAME + (SAME_IN_A_STAGE if other.config.stage == first.config.stage else ())
  pairs = [(key, first.config[key], other.config[key]) for key in keys]
  pairs += [
    (f'weights.{key}', first.config.weights[key], other.config.weights[key]) for key in SAME_WEIGHTS
  ]
  for key, one, two in pairs:
    if one != two:
      raise InputError(
        f'{other.label} and {first.label} are no fair pair: {key} is {_shown(two)} in one and {_shown(one)} in the '
        f'other; set it for all with --set={key}=VALUE.'
      )


def _shown(value) -> str:
  return str(value.to_dict() if isinstance(value, ConfigDict) else value)


def train_missing(runs: Sequence[Run]) -> None:
  """Trains what has not been exported yet."""
  for number, run in enumerate(runs, 1):
    log.info('run %d of %d: %s, seed %d', number, len(runs), run.label, run.seed)
    if not os.path.isfile(run.student):
      run.config.evaluate.clips = 0  # judged together, at the end
      train.run(run.config, run.workdir)


def judged(
  runs: Sequence[Run], count: int, steps: Sequence[int]
) -> tuple[dict, list[evaluate.Row]]:
  """Judges all students: {(label, steps): {measure: `[seed clip]`}}, and the clips of the first seed."""
  config = runs[0].config
  rec = recipe.build(config)
  frozen = stages.serving(config, rec, 'text', 'vae')
  few = {}
  methods, keys = [], []
  for run in runs:
    own = recipe.build(run.config)
    # The noise of the judged clips is one for all: it is drawn from the first seed.
    own = dataclasses.replace(own, seed=rec.seed)
    same = (own.model, own.chunking, own.schedule.shift)
    make = few.setdefault(same, sample.student(own, frozen))
    params = weights.load(run.student, 'dit', own.model)
    for n in steps:
      methods.append(evaluate.Method(f'{run.label}, seed {run.seed}, {n} steps', make(params, n)))
      keys.append((run.label, n))
  rows = evaluate.measure(config, rec, frozen['vae'], methods, count)
  found: dict = {}
  for key, row in zip(keys, rows, strict=True):
    for measure in evaluate.MEASURES:
      found.setdefault(key, {}).setdefault(measure, []).append(row.results[measure])
  stacked = {
    key: {measure: np.stack(values) for measure, values in results.items()}
    for key, results in found.items()
  }
  first = len({run.label for run in runs}) * len(steps)  # runs are sorted by seed
  return stacked, rows[:first]


def summary(found: dict, first: str) -> list[dict]:
  """One entry a row of the table: intervals of each measure, and of its paired difference to the first experiment."""
  entries = []
  for (label, steps), results in found.items():
    entry = {'label': label, 'steps': steps, 'seeds': len(next(iter(results.values())))}
    for measure, values in results.items():
      entry[measure] = interval(values)
      entry[f'{measure} - {first}'] = interval(values - found[first, steps][measure])
    entries.append(entry)
  return sorted(entries, key=lambda entry: -entry['steps'])


def table(entries: list[dict], first: str) -> str:
  """Markdown: the figures, then the paired differences."""
  parts = []
  for title, suffix in (('', ''), (f'difference to {first}', f' - {first}')):
    head = f'| {title or "experiment"} | ' + ' | '.join(evaluate.MEASURES) + ' |'
    lines = [head, '|---' * (len(evaluate.MEASURES) + 1) + '|']
    for entry in entries:
      if suffix and entry['label'] == first:
        continue
      cells = [
        _cell(entry[measure + suffix], measure, bool(suffix)) for measure in evaluate.MEASURES
      ]
      lines.append(f'| {entry["label"]}, {entry["steps"]} steps | ' + ' | '.join(cells) + ' |')
    parts.append('\n'.join(lines))
  return '\n\n'.join(parts) + '\n'


def _cell(estimate, measure: str, signed: bool) -> str:
  digits, sign = (1 if measure == 'travel' else 3), '+' if signed else ''
  mean, low, high = (f'{x:{sign}.{digits}f}' for x in estimate)
  return f'{mean} [{low}, {high}]'


def define_flags() -> None:
  flags.DEFINE_multi_string('experiment', [], 'LABEL=FILE:ARGUMENT; the first is the baseline.')
  flags.DEFINE_list('seeds', ['0', '1', '2'], 'Seeds that every experiment is trained with.')
  flags.DEFINE_multi_string('set', [], 'KEY=VALUE of a config field, for all experiments.')
  flags.DEFINE_integer('clips', 256, 'Clips that each student is judged on.', lower_bound=2)
  flags.DEFINE_list('steps', ['4', '2'], 'Step counts that it is judged at.')
  flags.DEFINE_bool('train_only', False, 'Leave the judging to another call.')
  flags.DEFINE_string(
    'output', 'runs/compare', 'Folder of the runs, compare.md, compare.json and compare.png.'
  )


def _whole(flag: str, words: Sequence[str]) -> list[int]:
  try:
    return [int(word) for word in words]
  except ValueError as error:
    raise InputError(f'--{flag}={",".join(words)} must be whole numbers, such as 0,1,2.') from error


def program() -> None:
  args = flags.FLAGS
  if not args.experiment:
    raise InputError('pass at least one --experiment=LABEL=FILE:ARGUMENT.')
  steps = _whole('steps', args.steps)
  runs = runs_of(args.experiment, _whole('seeds', args.seeds), args.set, args.output)
  if runs[0].config.size != 'nano':
    raise InputError('only students of the nano world can be judged: pass configs with :nano.')
  cli.check_folder('output', args.output)
  train_missing(runs)
  if args.train_only:
    return
  first = args.experiment[0].partition('=')[0]
  found, rows = judged(runs, args.clips, steps)
  entries = summary(found, first)
  text = table(entries, first)
  captions = clips.captions('seen', np.arange(args.clips), runs[0].config.seed)
  evaluate.picture(os.path.join(args.output, 'compare.png'), rows, captions, _PICTURED)
  with open(os.path.join(args.output, 'compare.md'), 'w', encoding='utf-8') as file:
    file.write(text)
  with open(os.path.join(args.output, 'compare.json'), 'w', encoding='utf-8') as file:
    json.dump(
      {'clips': args.clips, 'seeds': args.seeds, 'set': args.set, 'rows': entries}, file, indent=1
    )
  print(text)


if __name__ == '__main__':
  cli.run(program, define_flags)
