"""The persistent compile cache: a run that is started again need not compile again."""

import os

import jax
from etils import epath

from salt_jax import cli
from salt_jax.errors import InputError

OFF = 'off'
_NAME = 'compile_cache'


def keep(folder: str | None, workdir: str) -> str | None:
  """Has JAX keep every compiled program, and look there first; to be called before anything is compiled.

  Args:
    folder: a folder or a bucket (gs://…) that runs may share; 'off' is none. None is the environment's
      JAX_COMPILATION_CACHE_DIR with what else the environment says, or else a folder in the workdir, where a run that
      is killed and started again finds it.
    workdir: of the run.

  Returns:
    where the programs are kept.

  Raises:
    InputError: nothing can be written to the folder.
  """
  if folder is None and jax.config.jax_compilation_cache_dir:
    return jax.config.jax_compilation_cache_dir
  jax.config.update('jax_enable_compilation_cache', folder != OFF)
  if folder == OFF:
    return None
  if folder:
    _check_writable(folder)
  where = folder or os.path.join(workdir, _NAME)
  jax.config.update('jax_compilation_cache_dir', where)
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
  return where


def _check_writable(folder: str) -> None:
  if '://' not in folder:
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
