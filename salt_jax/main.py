"""Entry point of training: flags, start-up, one call.

python -m salt_jax.main --config=configs/selfforcing.py:nano [--workdir=DIR] [--config.key=value …]
"""

import logging
import os

import jax
from absl import flags

from salt_jax import cli, train
from salt_jax.errors import InputError


def define_flags() -> None:
  cli.define_config('Experiment, such as configs/selfforcing.py:nano.')
  flags.DEFINE_string('workdir', None, 'Where the run lives; runs/NAME by default.')
  flags.DEFINE_bool('multihost', False, 'Join the other hosts of a slice before anything else.')


def program() -> None:
  args = flags.FLAGS
  if args.config is None:
    raise InputError('pass an experiment, such as --config=configs/selfforcing.py:nano.')
  if args.multihost:
    jax.distributed.initialize()
    if jax.process_index():
      logging.getLogger('salt_jax').setLevel(logging.WARNING)
  train.run(args.config, args.workdir or os.path.join('runs', args.config.name))


if __name__ == '__main__':
  cli.run(program, define_flags)
