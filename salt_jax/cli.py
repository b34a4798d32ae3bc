"""How every program of the package starts and how it refuses."""

import difflib
import gc
import glob
import importlib.metadata
import importlib.util
import logging
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable

import jax
from absl import app, flags
from absl import logging as absl_logging
from ml_collections import ConfigDict, config_flags

from salt_jax import splits
from salt_jax.errors import InputError, Preempted

# Exit code of a run that saved and left because it was told to; the same command goes on.
PREEMPTED = 75

# What the environment of a TPU's machine says of it; other names that start so are set by JAX wherever libtpu is.
OF_A_SLICE = ('TPU_WORKER_ID', 'TPU_WORKER_HOSTNAMES', 'TPU_ACCELERATOR_TYPE', 'TPU_TOPOLOGY')

_TRACEBACK = 'Traceback (most recent call last)'
_REWORDED = {
  'invalid literal for int() with base 10: ': 'a whole number is needed, not ',
  'could not convert string to float: ': 'a number is needed, not ',
  "('Non-boolean argument to boolean flag', ": 'true or false is needed, not (',
}


def run(program: Callable[[], None], define: Callable[[], None] = lambda: None) -> None:
  """Defines and parses the flags and runs; what the user can mend ends in one sentence and exit code 2, a run that was
  told to leave in one and 75."""

  def guarded(argv):
    try:
      if len(argv) > 1:
        raise InputError(f'the argument "{argv[1]}" is unknown; flags start with --.')
      _start_log()
      program()
    except InputError as error:
      sys.exit(_refuse(error))
    except Preempted as error:
      sys.stderr.write(f'salt_jax: {error}\n')
      sys.exit(PREEMPTED)

  def parse(argv):
    # Config files run and overrides are checked while flags are defined and parsed.
    try:
      define()
      return flags.FLAGS(argv)
    except (flags.Error, InputError) as error:
      if _is_crash(error):
        raise
      sys.exit(_refuse(error))

  leave_tpu_alone()
  if not gc.get_freeze_count():
    collect_less()
  app.run(guarded, flags_parser=parse)


def collect_less() -> None:
  """Keeps garbage collection off what was imported, which stays: with it, tracing takes an eighth longer."""
  gc.freeze()
  gc.set_threshold(50_000, 20, 100)


def leave_tpu_alone() -> None:
  """Where libtpu is installed and no TPU is, JAX would look for one, and print pages of warnings."""
  devices = glob.glob('/dev/accel*') + glob.glob('/dev/vfio/*')
  devices += [name for name in OF_A_SLICE if name in os.environ]
  plugins = importlib.metadata.entry_points(group='jax_plugins')  # those of GPUs
  if importlib.util.find_spec('libtpu') and not (devices or plugins or jax.config.jax_platforms):
    jax.config.update('jax_platforms', 'cpu')


def cpu_devices(config: ConfigDict) -> int:
  """Devices that a CPU should be to a config: for nano one a core, as far as they share its batches.

  XLA leaves half of a second core idle. What the environment or the mesh says holds.
  """
  told = 'JAX_NUM_CPU_DEVICES' in os.environ or 'device_count' in os.environ.get('XLA_FLAGS', '')
  free = dict(config.mesh) == {'data': -1, 'fsdp': 1, 'context': 1, 'tensor': 1}
  if told or config.size != 'nano' or not free:
    return jax.config.jax_num_cpu_devices
  # Where there is no affinity, as on macOS, all cores are ours.
  cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
  batches = [config[name].batch for name in ('latents', 'pairs') if name in config]
  part = config.batch // max(1, splits.parts(config))
  return math.gcd(2 ** (cores.bit_length() - 1), part, *batches)


def define_config(help_string: str, default: str | None = None) -> flags.FlagHolder[ConfigDict]:
  """The flag --config=FILE.py[:ARGUMENT], and --config.KEY=VALUE for every key of what the file makes."""
  holder = config_flags.DEFINE_config_file('config', None, help_string)
  flag = flags.FLAGS['config']
  flag.parser = _Experiment(flag.parser)
  if default:
    flags.set_default(holder, default)
  return holder


def config_is_given() -> bool:
  """Whether the command names a config or overrides a key of one; otherwise --config is the default alone."""
  return any(re.match(r'--?(no)?config([.=]|$)', word) for word in sys.argv[1:])


def check_folder(flag: str, folder: str) -> None:
  """Makes the folder that results go to, so that what took long is not lost at its end.

  Raises:
    InputError: nothing can be written there.
  """
  try:
    os.makedirs(folder or '.', exist_ok=True)
    tempfile.TemporaryFile(dir=folder or '.').close()
  except OSError as error:
    raise InputError(
      f'--{flag}: nothing can be written to {folder} ({error.strerror}); name another folder.'
    ) from error


class _Experiment(flags.ArgumentParser):
  """Loads a config file, and refuses what ml_collections would report without naming it."""

  def __init__(self, loader: flags.ArgumentParser):
    self._loader = loader

  def parse(self, argument):
    path = argument.partition(':')[0]
    if not path.endswith('.py') or not os.path.isfile(path):
      raise InputError(
        f'--config={argument}: there is no config file {path} here; pass one such as configs/selfforcing.py:nano.'
      )
    config = self._loader.parse(argument)
    for word in sys.argv[1:]:
      if override := re.match(r'--?(?:no)?config\.([^=]*)', word):
        _check_key(config, override[1])
    return config

  def flag_type(self):
    return self._loader.flag_type()


def _check_key(config: ConfigDict, path: str) -> None:
  node = config
  for depth, key in enumerate(parts := path.split('.')):
    where = '.'.join(['config', *parts[:depth]])
    if not isinstance(node, ConfigDict):
      raise InputError(f'--config.{path}: {where} is a value without keys; set --{where} itself.')
    if key not in node:
      near = ', '.join(difflib.get_close_matches(key, list(node), n=4, cutoff=0))
      raise InputError(f'--config.{path}: {where} has no key "{key}"; the nearest are {near}.')
    node = node[key]
  if isinstance(node, ConfigDict):
    raise InputError(
      f'--config.{path} is a section; set its keys, such as --config.{path}.{next(iter(node))}.'
    )


def _origin(error: BaseException) -> BaseException:
  """The InputError that libraries wrapped, with what our own code added to it; or the error itself."""
  link = error
  # A mistake in a config file comes back as an error of its own type whose message is the traceback.
  while link and not (isinstance(link, InputError) and _TRACEBACK not in str(link)):
    link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
  return link or error


def _is_crash(error: BaseException) -> bool:
  """A mistake in the code of a config file, which wants its traceback."""
  return _TRACEBACK in str(_origin(error))


def _refuse(error: Exception) -> int:
  sentence = ' '.join(str(_origin(error)).split()).removeprefix('flag ')
  for theirs, ours in _REWORDED.items():
    sentence = sentence.replace(theirs, ours)
  # In one call: other threads may write too.
  sys.stderr.write(f'salt_jax: {sentence}\n')
  return 2


def _start_log() -> None:
  """Our own lines to stderr; libraries keep to warnings."""
  absl_logging.set_verbosity(absl_logging.WARNING)
  # Each array of a save that fails would be reported besides the save itself.
  logging.getLogger('asyncio').setLevel(logging.CRITICAL)
  handler = logging.StreamHandler()
  handler.setFormatter(logging.Formatter('%(asctime)s  %(message)s', datefmt='%H:%M:%S'))
  logger = logging.getLogger('salt_jax')
  logger.setLevel(logging.INFO)
  logger.addHandler(handler)
  logger.propagate = False
