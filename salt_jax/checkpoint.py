"""Checkpoints on Orbax, and the config that belongs to a working directory.

One step is one folder with the items of the run (`state`, `ema`) and a small JSON item `info`.
Orbax writes it under a temporary name and renames it at the end: a killed save leaves no step
behind, and the next start removes the remainder. Orbax does not notice a flipped bit in the arrays;
the fingerprints kept in `info` do.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jaxtyping import Array, UInt32

from salt_jax.errors import InputError
from salt_jax.places import folder_of, is_bucket

ITEMS = ('state', 'ema')
_CHUNK_BYTES = 2**26  # of an array that are stored together; Orbax cuts the first axis first


class Checkpoints:
  """The checkpoints of one run: saved in the background, a few newest kept."""

  def __init__(self, folder: str, every: int = 1, keep: int = 2):
    """Opens or creates `folder` and removes what an unfinished save left.

    Args:
      folder: holds one folder per step; the same for all processes.
      every: `save` saves at multiples of this many steps.
      keep: how many newest steps stay.
    """
    self.folder = folder_of(folder)
    self._manager = ocp.CheckpointManager(
      self.folder,
      options=ocp.CheckpointManagerOptions(
        save_decision_policy=ocp.checkpoint_managers.FixedIntervalPolicy(every),
        preservation_policy=ocp.checkpoint_managers.LatestN(keep),
        cleanup_tmp_directories=True,
      ),
      handler_registry=_handlers(),
    )

  def latest_step(self) -> int | None:
    """The newest finished step, None while there is none."""
    return self._manager.latest_step()

  def save(
    self, step: int, items: Mapping[str, Any], info: Mapping[str, Any], force: bool = False
  ) -> bool:
    """Copies the items to the host and writes them in the background.

    The device arrays may be donated as soon as this returns.

    Args:
      step: the step they belong to.
      items: {'state': pytree, 'ema': pytree}.
      info: JSON values, such as the data position and the config's digest.
      force: save although `step` is not a multiple of `every`; for the last step.

    Returns:
      Whether the step is being saved; False when it is not due or already there.
    """
    if step == self.latest_step() or not (force or self._manager.should_save(step)):
      return False
    prints = {name: int(jax.device_get(fingerprint(tree))) for name, tree in items.items()}
    if jax.default_backend() == 'cpu':
      # There the host's view is the device's own memory: the writer would hold what is to be donated.
      items = jax.block_until_ready(_copied(dict(items)))
    args = {name: ocp.args.StandardSave(tree, _in_layers(tree)) for name, tree in items.items()}
    args['info'] = ocp.args.JsonSave(dict(info) | {'step': int(step), 'fingerprints': prints})
    with self._writing():
      return self._manager.save(step, args=ocp.args.Composite(**args), force=force)

  def restore(self, step: int, like: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the items named in `like`, and `info`.

    Args:
      step: a finished step.
      like: item name to a tree of ShapeDtypeStructs with shardings, of this or another mesh.

    Returns:
      item name to tree, and 'info' to the dict that was saved with them.

    Raises:
      InputError: the step is missing or damaged, or holds other shapes than `like`.
    """
    return _restore(self._manager, self.folder, step, like)

  def close(self) -> None:
    """Waits for the save in progress.

    Raises:
      InputError: it could not be written.
    """
    with self._writing():
      self._manager.close()

  @contextlib.contextmanager
  def _writing(self) -> Iterator[None]:
    """What fails in the background is raised by the next call."""
    try:
      yield
    except jax.errors.JaxRuntimeError:
      raise
    except Exception as error:
      steps = ocp.utils.checkpoint_steps(self.folder)
      mend = f'goes on from step {max(steps)}' if steps else 'starts anew'
      raise InputError(
        f'a checkpoint could not be written to {self.folder} ({_reason(error)}): mend that, and the same command '
        f'{mend}.'
      ) from error


def restore_ema(folder: str, like: Any, step: int | None = None) -> Any:
  """Reads the averaged weights alone, for samplers; changes nothing in `folder`.

  Args:
    folder: the checkpoints of a run.
    like: tree of ShapeDtypeStructs with shardings.
    step: by default the newest.

  Raises:
    InputError: nothing there, another size, or damaged files.
  """
  with reading(folder) as (manager, newest):
    step = newest if step is None else step
    return _restore(manager, folder_of(folder), step, {'ema': like})['ema']


def entries(folder: str) -> list[str]:
  """The networks in a run's newest checkpoint: NAME_ema for an averaged one, NAME as it was trained.

  Raises:
    InputError: nothing there.
  """
  with reading(folder) as (manager, step):
    averaged, trained = networks(manager, step)
    return [f'{name}_ema' for name in averaged] + list(trained)


@contextlib.contextmanager
def reading(folder: str) -> Iterator[tuple[ocp.CheckpointManager, int]]:
  """The manager of a run's checkpoints, and the newest step; changes nothing."""
  path = folder_of(folder)
  if not path.is_dir():
    raise InputError(f'there is no checkpoint folder {path}; pass the one a training run wrote.')
  options = ocp.CheckpointManagerOptions(
    read_only=True, create=False, multiprocessing_options=_alone()
  )
  with ocp.CheckpointManager(path, options=options, handler_registry=_handlers()) as manager:
    step = manager.latest_step()
    if step is None:
      raise InputError(f'{path} holds no finished checkpoint; train until one is saved.')
    yield manager, step


def _alone() -> ocp.options.MultiprocessingOptions:
  """A process that reads waits for no other: one may read where the others do not."""
  me = jax.process_index()
  return ocp.options.MultiprocessingOptions(
    primary_host=me, active_processes={me}, barrier_sync_key_prefix=f'reader-{me}'
  )


def networks(manager: ocp.CheckpointManager, step: int) -> tuple[dict, dict]:
  """What Orbax knows of the arrays of the averaged networks, and of those as they were trained.

  Raises:
    InputError: the step has lost the former.
  """
  stored = manager.metadata(step).item_metadata
  if not stored.get('ema'):
    raise damaged(manager.directory / str(step), 'it has no ema', sorted(manager.all_steps()))
  state = stored['state'].tree if stored.get('state') else {}
  return stored['ema'].tree, state.get('params', {})


def check_config(
  workdir: str, config: ml_collections.ConfigDict, may_change: tuple[str, ...] = ()
) -> None:
  """Compares the config with the one that `write_config` left in the workdir, if there is one.

  Args:
    workdir: the run's folder.
    config: the whole config; references are resolved.
    may_change: dotted keys, or sections, that a later start may set differently.

  Raises:
    InputError: the workdir cannot be written, a value differs, or the stored file cannot be read.
  """
  path = _writable(workdir) / 'config.json'
  if not path.exists():
    return
  try:
    stored = _flatten(json.loads(path.read_text()))
  except ValueError as error:
    raise InputError(
      f'{path} is damaged ({error}); delete it, or pass another --workdir.'
    ) from error
  given = flattened(config)
  for key in sorted(stored.keys() | given.keys()):
    free = any(key == name or key.startswith(name + '.') for name in may_change)
    old, new = stored.get(key, 'absent'), given.get(key, 'absent')
    if old != new and not free:
      raise InputError(
        f'config.{key} is {new}, but the run in {path.parent} has {old}: '
        'pass another --workdir or the same config.'
      )


def write_config(workdir: str, config: ml_collections.ConfigDict) -> None:
  """Writes `config.json` unless it is there; from the first checkpoint on a workdir belongs to its config."""
  path = folder_of(workdir) / 'config.json'
  if jax.process_index() == 0 and not path.exists():
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name('config.json.new')
    fresh.write_text(_config_text(config))
    fresh.replace(path)


def _writable(workdir: str) -> epath.Path:
  path = folder_of(workdir)
  probe = path / f'.writable-{jax.process_index()}'
  # Buckets answer with errors of their own libraries.
  try:
    path.mkdir(parents=True, exist_ok=True)
    probe.write_text('')
    probe.unlink()
  except Exception as error:
    reason = (
      getattr(error, 'strerror', None) or str(error).partition('\n')[0] or type(error).__name__
    )
    raise InputError(
      f'nothing can be written to {path} ({reason}): pass another folder.'
      if is_bucket(workdir)
      else f'nothing can be written to {path} ({reason}): pass another --workdir.'
    ) from error
  return path


def config_digest(config: ml_collections.ConfigDict) -> str:
  """A short hash of the resolved config, to be kept with a checkpoint."""
  return hashlib.sha256(_config_text(config).encode()).hexdigest()[:16]


@jax.jit
def fingerprint(tree: Any) -> UInt32[Array, '']:
  """Adds up the bits of all leaves modulo 2**32, leaf after leaf.

  Integer sums do not depend on their order, so neither on the mesh; one flipped bit changes them.
  """
  total = jnp.uint32(0)
  for leaf in jax.tree.leaves(tree):
    total = total * jnp.uint32(1000003) + _bit_sum(jnp.asarray(leaf))
  return total


@jax.jit
def _copied(tree: Any) -> Any:
  return jax.tree.map(jnp.copy, tree)


def _in_layers(tree: Any) -> Any:
  """Stacks of layers are stored layer by layer: `run_weights` reads one without the others."""
  stack = ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES, shard_axes=(0,))
  return jax.tree.map(lambda x: stack if np.ndim(x) > 2 else ocp.SaveArgs(), tree)


def _bit_sum(x: Array) -> UInt32[Array, '']:
  if x.dtype == jnp.bool_:
    return jnp.sum(x, dtype=jnp.uint32)
  word = jnp.dtype(f'uint{8 * min(x.dtype.itemsize, 4)}')
  return jnp.sum(jax.lax.bitcast_convert_type(x, word), dtype=jnp.uint32)


def _handlers() -> ocp.handlers.CheckpointHandlerRegistry:
  registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
  for item in ITEMS:
    arrays = ocp.StandardCheckpointHandler()
    registry.add(item, ocp.args.StandardSave, arrays)
    registry.add(item, ocp.args.StandardRestore, arrays)
  info = ocp.JsonCheckpointHandler()
  registry.add('info', ocp.args.JsonSave, info)
  registry.add('info', ocp.args.JsonRestore, info)
  return registry


def _restore(
  manager: ocp.CheckpointManager, folder: epath.Path, step: int, like: Mapping[str, Any]
) -> dict[str, Any]:
  steps = sorted(manager.all_steps())
  if step not in steps:
    raise InputError(f'{folder} holds no checkpoint of step {step}, only of {steps}.')
  path = folder / str(step)
  args = {name: ocp.args.StandardRestore(tree) for name, tree in like.items()}
  args['info'] = ocp.args.JsonRestore()
  # TensorStore reports a short read as a bare Exception.
  try:
    stored = manager.metadata(step).item_metadata
    for name, tree in like.items():
      _compare(path, name, stored[name].tree, tree)
    found = dict(manager.restore(step, args=ocp.args.Composite(**args)).items())
    prints = found['info'].pop('fingerprints')
  except (InputError, jax.errors.JaxRuntimeError):
    raise
  except Exception as error:
    raise damaged(path, str(error), steps) from error
  for name in like:
    if int(jax.device_get(fingerprint(found[name]))) != prints[name]:
      raise damaged(path, f'the bits of {name} are not those that were saved', steps)
  return found


def _compare(path: epath.Path, item: str, stored: Any, like: Any) -> None:
  held, asked = _leaves(stored), _leaves(like)
  for name in sorted(held.keys() | asked.keys()):
    one, other = held.get(name, 'nothing'), asked.get(name, 'nothing')
    if one != other:
      raise InputError(
        f'checkpoint {path} holds {one} at {item}/{name}, but the config asks for '
        f'{other}: pass the config it was trained with.'
      )


def _leaves(tree: Any) -> dict[str, str]:
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): f'{np.dtype(x.dtype)}{list(x.shape)}'
    for path, x in jax.tree_util.tree_leaves_with_path(tree)
  }


def damaged(path: epath.Path, reason: str, steps: Sequence[int] = ()) -> InputError:
  """What to say of a step whose files cannot be read; `steps` are those that there are."""
  before = [step for step in steps if step < int(path.name)]
  mend = f'go on from step {before[-1]}' if before else 'start anew'
  reason = reason.strip().partition('\n')[0].partition('. See full')[0][:200]
  return InputError(f'checkpoint {path} is damaged ({reason}); delete that folder to {mend}.')


def flattened(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Dotted key to JSON value; references are resolved."""
  return _flatten(json.loads(_config_text(config)))


def _reason(error: Exception) -> str:
  """What the file system said: the end of a chain of contexts, without the place in a source file."""
  text = str(error).strip().partition('\n')[0].partition(' [')[0]
  return text[-200:].rpartition(': ')[2] or type(error).__name__


def _config_text(config: ml_collections.ConfigDict) -> str:
  resolved = config.copy_and_resolve_references().to_dict()
  return json.dumps(resolved, indent=2, sort_keys=True) + '\n'


def _flatten(tree: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  flat = {}
  for key, value in tree.items():
    if isinstance(value, dict):
      flat |= _flatten(value, f'{prefix}{key}.')
    else:
      flat[prefix + key] = value
  return flat
