"""Entry point of training: flags, start-up, one call.

python -m salt_jax.main --config=configs/selfforcing.py:nano [--workdir=DIR] [--config.key=value …]
  [--profile=10:13] [--compile_cache=DIR]
"""

import logging
import os

import jax
from absl import flags

from salt_jax import cli, compiled, hosts, train
from salt_jax.errors import InputError


def define_flags() -> None:
  cli.define_config('Experiment, such as configs/selfforcing.py:nano.')
  flags.DEFINE_string('workdir', None, 'Where the run lives; runs/NAME by default.')
  flags.DEFINE_string('profile', None, 'First and last step of a profile, such as 10:13.')
  flags.DEFINE_string(
    'compile_cache',
    None,
    'Folder or bucket (gs://…) that keeps compiled programs; by default beside the checkpoints, "off" is none.',
  )
  hosts.define_flags('Join the other hosts of a slice before anything else.')


def process() -> None:
  """The program in a process of its own."""
  args = flags.FLAGS
  if args.config is not None and not args.multihost:
    jax.config.update('jax_num_cpu_devices', cli.cpu_devices(args.config))
  program()


def program() -> None:
  args = flags.FLAGS
  if args.config is None:
    raise InputError('pass an experiment, such as --config=configs/selfforcing.py:nano.')
  # Shells leave the ~ of --workdir=~/run as it is.
  workdir = os.path.expanduser(args.workdir or os.path.join('runs', args.config.name))
  with hosts.joined(args):
    if jax.process_index():
      logging.getLogger('salt_jax').setLevel(logging.WARNING)
    hosts.check_same(args.config, workdir)
    compiled.keep(args.compile_cache, args.config.checkpoint.folder or workdir)
    train.run(args.config, workdir, args.profile)


if __name__ == '__main__':
  cli.run(process, define_flags)
