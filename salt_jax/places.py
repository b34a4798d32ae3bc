"""Folders of this machine and of buckets, and where the parts of a run lie."""

import contextlib
import importlib.util
import json
import os

from etils import epath

from salt_jax.errors import InputError


def is_bucket(path: str) -> bool:
  """Whether a path is the address of a bucket and not of a folder of this machine."""
  return '://' in str(path)


def check_local(path: str) -> None:
  """Refuses a bucket where only a folder of this machine can be.

  Raises:
    InputError: saying what can be a bucket.
  """
  if is_bucket(path):
    raise InputError(
      f'{path} is not a folder: mount the bucket, for example with gcsfuse, and pass the mounted folder; or set '
      '--config.checkpoint.folder, which may be a bucket.'
    )


def folder_of(path: str) -> epath.Path:
  """The absolute path of a folder, or a bucket's address; either is read and written in the same way.

  Raises:
    InputError: an address that is not of a bucket, or the library for it is missing.
  """
  if not is_bucket(path):
    return epath.Path(path).expanduser().absolute()
  if not str(path).startswith('gs://'):
    raise InputError(
      f'{path} is neither a folder nor a bucket: pass a folder or gs://BUCKET/FOLDER.'
    )
  if importlib.util.find_spec('gcsfs') is None:
    raise InputError(f"{path} needs gcsfs: pip install -e '.[gcs]'.")
  return epath.Path(path)


def home(run: str) -> str:
  """The folder of a run's checkpoints, which its config may have put into a bucket."""
  file, config = folder_of(run) / 'config.json', {}
  if file.exists():
    with contextlib.suppress(ValueError):
      config = json.loads(file.read_text())
  return os.path.join(config.get('checkpoint', {}).get('folder') or run, 'checkpoints')


def is_run(path: str) -> bool:
  """Whether a path is the working directory of a run, or the bucket that holds its checkpoints."""
  return folder_of(path).is_dir() and folder_of(home(path)).is_dir()
