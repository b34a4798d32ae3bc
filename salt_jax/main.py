"""Entry point of training: flags, start-up, one call.

python -m salt_jax.main --config=configs/selfforcing.py:nano [--workdir=DIR] [--config.key=value …]
"""

import logging
import os

import jax
from absl import flags

from salt_jax import cli, hosts, train
from salt_jax.errors import InputError


def define_flags() -> None:
  cli.define_config('Experiment, such as configs/selfforcing.py:nano.')
  flags.DEFINE_string('workdir', None, 'Where the run lives; runs/NAME by default.')
  hosts.define_flags('Join the other hosts of a slice before anything else.')


def program() -> None:
  args = flags.FLAGS
  if args.config is None:
    raise InputError('pass an experiment, such as --config=configs/selfforcing.py:nano.')
  workdir = args.workdir or os.path.join('runs', args.config.name)
  with hosts.joined(args):
    if jax.process_index():
      logging.getLogger('salt_jax').setLevel(logging.WARNING)
    hosts.check_same(args.config, workdir)
    train.run(args.config, workdir)


if __name__ == '__main__':
  cli.run(program, define_flags)
