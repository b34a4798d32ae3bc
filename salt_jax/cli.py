"""How every program of the package starts and how it refuses."""

import logging
import sys
from collections.abc import Callable

from absl import app, flags
from absl import logging as absl_logging

from salt_jax.errors import InputError


def run(program: Callable[[], None]) -> None:
  """Parses the flags and runs; what the user can mend ends in one sentence and exit code 2."""

  def guarded(argv):
    try:
      if len(argv) > 1:
        raise InputError(f'the argument "{argv[1]}" is unknown; flags start with --.')
      _start_log()
      program()
    except InputError as error:
      sys.exit(_refuse(error))

  def parse(argv):
    # A config file runs while its flag is parsed, so whatever it refuses arrives here.
    try:
      return flags.FLAGS(argv)
    except (
      flags.Error,
      InputError,
      KeyError,
      AttributeError,
      TypeError,
      ValueError,
      OSError,
    ) as error:
      sys.exit(_refuse(error))

  app.run(guarded, flags_parser=parse)


def _refuse(error: Exception) -> int:
  sentence = ' '.join(str(error.args[0] if error.args else error).split())
  print(f'salt_jax: {sentence}', file=sys.stderr)
  return 2


def _start_log() -> None:
  """Our own lines to stderr; libraries keep to warnings."""
  absl_logging.set_verbosity(absl_logging.WARNING)
  handler = logging.StreamHandler()
  handler.setFormatter(logging.Formatter('%(asctime)s  %(message)s', datefmt='%H:%M:%S'))
  logger = logging.getLogger('salt_jax')
  logger.setLevel(logging.INFO)
  logger.addHandler(handler)
  logger.propagate = False
