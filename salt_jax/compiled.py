"""The persistent compile cache: a run that is started again need not compile again."""

import contextlib
import os
import pathlib
from collections.abc import Iterator

import jax
from etils import epath

from salt_jax import cli
from salt_jax.errors import InputError
from salt_jax.places import is_bucket

OFF = 'off'
_NAME = 'compile_cache'
_MARK = '.unfinished'


def keep(folder: str | None, home: str) -> str | None:
  """Has JAX keep every compiled program, and look there first; to be called before anything is compiled.

  Args:
    folder: a folder or a bucket (gs://…) that runs may share; 'off' is none. None is the environment's
      JAX_COMPILATION_CACHE_DIR with what else the environment says, or else a folder in `home`, where a run that
      is killed and started again finds it.
    home: where the run's checkpoints lie. Of several hosts the first one alone writes, so the others find its programs
      only where all read.

  Returns:
    where the programs are kept.

  Raises:
    InputError: nothing can be written to the folder.
  """
  if folder is None and jax.config.jax_compilation_cache_dir:
    _mend(jax.config.jax_compilation_cache_dir)
    return jax.config.jax_compilation_cache_dir
  jax.config.update('jax_enable_compilation_cache', folder != OFF)
  if folder == OFF:
    return None
  where = os.path.expanduser(folder or os.path.join(home, _NAME))
  if folder:
    _check_writable(where)
  jax.config.update('jax_compilation_cache_dir', where)
  # Small programs are compiled sooner than a bucket takes them.
  jax.config.update('jax_persistent_cache_min_compile_time_secs', int(is_bucket(where)))
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
  _mend(where)
  return where


def _check_writable(folder: str) -> None:
  if not is_bucket(folder):
    cli.check_folder(_NAME, folder)
    return
  probe = epath.Path(folder) / f'.probe-{os.getpid()}'
  try:
    probe.parent.mkdir(parents=True, exist_ok=True)
    probe.write_text('')
    probe.unlink()
  except Exception as error:  # each kind of bucket has its own
    raise InputError(
      f'--{_NAME}={folder}: nothing can be written there ({error}); name a bucket that this machine may write to.'
    ) from error


@contextlib.contextmanager
def marked(program: str) -> Iterator[None]:
  """While a program is compiled: who is killed meanwhile leaves a mark, and `keep` drops what may be half an entry.

  JAX would warn of such an entry at every start, compile again, and never replace it. In a bucket there is none.

  Args:
    program: name of the function that is jitted.
  """
  folder = jax.config.jax_compilation_cache_dir
  if not folder or is_bucket(folder) or jax.process_index():
    yield
    return
  mark = pathlib.Path(folder, program + _MARK)
  mark.parent.mkdir(parents=True, exist_ok=True)
  mark.touch()
  try:
    yield
  finally:
    mark.unlink(missing_ok=True)


def _mend(folder: str) -> None:
  if is_bucket(folder):
    return
  for mark in pathlib.Path(folder).glob(f'*{_MARK}'):
    with contextlib.suppress(FileNotFoundError):  # other processes mend too
      since = mark.stat().st_mtime_ns
      for entry in mark.parent.glob(f'jit_{mark.name.removesuffix(_MARK)}-*'):
        if entry.stat().st_mtime_ns >= since:
          entry.unlink()
      mark.unlink()
