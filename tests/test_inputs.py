"""Bad input ends in one clear sentence and exit code 2, before anything is computed, and nothing is lost."""

import pathlib

import pytest
from absl import flags

from salt_jax import cli, evaluate, sample, train
from salt_jax.errors import InputError
from tests import tiny_config

ROOT = pathlib.Path(__file__).parents[1]
NANO = '--config=configs/selfforcing.py:nano'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tiny_config.write_weights(str(tmp_path_factory.mktemp('weights')))


def _sentence(error) -> str:
  text = str(error.value)
  assert '\n' not in text and 'Traceback' not in text and len(text) > 20
  return text


# Programs, as a user starts them.

WRONG_COMMANDS = {
  'main': (
    ([NANO, '--config.nosuch=1'], '--config.nosuch: config has no key "nosuch"; the nearest are '),
    (
      [NANO, '--config.optim.generator.lrr=1'],
      'config.optim.generator has no key "lrr"; the nearest are lr',
    ),
    (
      [NANO, '--config.batch.x=1'],
      'config.batch is a value without keys; set --config.batch itself.',
    ),
    (
      [NANO, '--config.dmd=3'],
      '--config.dmd is a section; set its keys, such as --config.dmd.guidance.',
    ),
    ([NANO, '--config.batch=abc'], "--config.batch=abc: a whole number is needed, not 'abc'"),
    (
      [NANO, '--config.rollout.chunk', '2.5'],
      "--config.rollout.chunk=2.5: a whole number is needed, not '2.5'",
    ),
    (
      [NANO, '--config.optim.generator.lr=x'],
      "--config.optim.generator.lr=x: a number is needed, not 'x'",
    ),
    ([NANO, '--config.rollout.unroll=3'], '--config.rollout.unroll=3: true or false is needed'),
    ([NANO + 'o'], 'the config argument "nanoo" is unknown; known are: 1.3b, 14b, nano, size=.'),
    (
      ['--config=configs/selforcing.py:nano'],
      'there is no config file configs/selforcing.py here; pass one such as',
    ),
    (
      ['--config=LICENSE'],
      'there is no config file LICENSE here; pass one such as configs/selfforcing.py:nano.',
    ),
    (
      ['--config=configs/pretrain.py:vae,steps=x'],
      'the config argument steps=x must be of type int.',
    ),
    ([], 'pass an experiment, such as --config=configs/selfforcing.py:nano.'),
    (['--config'], 'Missing value for flag --config'),
    (['--confg=1'], "Unknown command line flag 'confg'. Did you mean: config ?"),
    ([NANO, 'extra'], 'the argument "extra" is unknown; flags start with --.'),
    ([NANO, '--workdir=LICENSE/run'], 'LICENSE/run (Not a directory): pass another --workdir.'),
    ([NANO, '--workdir=gs://bucket/run'], 'gs://bucket/run is not a folder: mount the bucket'),
    ([NANO, '--config.mesh.data=3'], 'does not make up 1 devices'),
    ([NANO, '--config.seed=-1'], 'seed=-1 must be zero or positive.'),
  ),
  'sample': (
    (
      [],
      'pass --checkpoint: the workdir of a run, an exported file, or assets:nano_student.safetensors.',
    ),
    (['--checkpoint=x'], 'pass at least one --prompt.'),
    (['--checkpoint=x', '--prompt=a bag', '--steps=0'], '--steps=0 must be between 1 and 8.'),
    (['--checkpoint=x', '--prompt=a bag', '--steps=9'], '--steps=9 must be between 1 and 8.'),
    (
      ['--checkpoint=x', '--prompt=a bag', '--steps=x'],
      "--steps=x: a whole number is needed, not 'x'",
    ),
    (
      ['--checkpoint=x', '--prompt=a bag', '--seed=-1'],
      '--seed=-1: -1 is not an integer in the range',
    ),
    (
      ['--checkpoint=x', '--prompt=a bag', '--output=o.mp4'],
      '--output=o.mp4 must end in one of .webp, .gif, .png.',
    ),
    (
      ['--checkpoint=x', '--prompt=a bag', '--output=LICENSE/o.png'],
      '--output: nothing can be written to LICENSE',
    ),
    (
      ['--checkpoint=nowhere', '--prompt=a bag'],
      'nowhere is not there or not a file; check the path.',
    ),
    (
      ['--checkpoint=configs', '--prompt=a bag'],
      'configs has no config.json: pass the workdir of a run',
    ),
    (
      ['--checkpoint=assets:nano_vae.safetensors', '--prompt=a bag'],
      'the stage "vae", which has no few-step student.',
    ),
  ),
  'evaluate': (
    (['--config.nosuch=1'], '--config.nosuch: config has no key "nosuch"; the nearest are '),
    (['--clips=0'], '--clips=0: 0 is not a positive integer'),
    (['--split=test'], '--split=test: value should be one of <seen|unseen>'),
    (
      ['--config=configs/pretrain.py'],
      'pretrain-teacher cannot be judged: pass --config=configs/selfforcing.py:nano.',
    ),
    (['--output=LICENSE/out'], '--output: nothing can be written to LICENSE/out'),
    (['--config.weights.text=nowhere', '--output={tmp}'], 'not there: nowhere (weights.text)'),
  ),
}


def _define_main():
  flags.DEFINE_string('workdir', None, '')
  cli.define_config('')


def _main():
  if flags.FLAGS.config is None:
    raise InputError('pass an experiment, such as --config=configs/selfforcing.py:nano.')
  train.run(flags.FLAGS.config, flags.FLAGS.workdir or 'runs/unused')


PROGRAMS = {
  'main': (_main, _define_main),
  'sample': (sample.program, sample.define_flags),
  'evaluate': (evaluate.program, evaluate.define_flags),
}
