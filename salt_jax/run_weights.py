"""The networks of a run's checkpoints, read and written layer by layer.

Training saves and restores whole arrays on the devices (`checkpoint`); a conversion goes through the memory of one
host. A checkpoint of Orbax is a folder of arrays of TensorStore, of which any part can be read or written by itself.
"""

import dataclasses
import functools
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath
from jaxtyping import PyTree

from salt_jax import checkpoint, convert, places
from salt_jax.errors import InputError
from salt_jax.leaves import Leaf
from salt_jax.tensor_files import Tensor

_CHUNK = 2**24  # elements of an array that are stored together
_MODULUS, _FACTOR = 2**32, 1000003  # of `checkpoint.fingerprint`


def load(folder: str, entry: str) -> PyTree:
  """One network of a run's newest checkpoint as a tree of `Leaf`.

  Args:
    folder: the checkpoints of a run.
    entry: one of `checkpoint.entries`; an averaged network is read once and compared with its fingerprint, the others
      have none of their own.

  Raises:
    InputError: nothing there, no such entry, or damaged files; reading a leaf may also find these.
  """
  with checkpoint.reading(folder) as (manager, step):
    path = places.folder_of(folder) / str(step)
    averaged, trained = checkpoint.networks(manager, step)
    if entry in trained:
      return _opened(path, trained[entry])
    name = entry.removesuffix('_ema')
    if name == entry or name not in averaged:
      known = ', '.join(checkpoint.entries(folder))
      raise InputError(f'{path.parent} has no {entry}; name one of {known}.')
    tree = _opened(path, averaged)
    info = manager.restore(step, args=ocp.args.Composite(info=ocp.args.JsonRestore()))['info']
  if fingerprint(tree) != info['fingerprints']['ema']:
    raise checkpoint.damaged(path, 'the bits of ema are not those that were saved')
  return tree[name]


def _opened(path: epath.Path, stored: PyTree) -> PyTree:
  """The leaves of what Orbax knows of some arrays; only a little of them stays in memory."""
  context = ts.Context({'cache_pool': {'total_bytes_limit': 2**28}})

  def one(keys, known):
    names = [key.key for key in keys]
    stacked = any(convert.stacked((name,)) for name in names)
    array = functools.cache(functools.partial(_array, path, known, context))
    if not stacked:
      return Leaf((Tensor(known.shape, known.dtype, lambda: _part(path, array, ())),), False)
    return Leaf(
      tuple(
        Tensor(known.shape[1:], known.dtype, functools.partial(_part, path, array, (index,)))
        for index in range(known.shape[0])
      ),
      True,
    )

  return jax.tree_util.tree_map_with_path(one, stored)


def _array(path: epath.Path, known: Any, context: ts.Context) -> ts.TensorStore:
  folder = os.fspath(known.directory)
  url = folder if places.is_bucket(folder) else f'file://{folder}'
  if ocp.type_handlers.is_ocdbt_checkpoint(known.directory):
    where = {'driver': 'ocdbt', 'base': f'{url}/', 'path': f'{known.name}/'}
  else:
    where = f'{url}/{known.name}/'
  return ts.open({'driver': 'auto', 'kvstore': where}, read=True, context=context).result()


def _part(path: epath.Path, array, index: tuple[int, ...]) -> np.ndarray:
  try:
    return np.asarray(array()[index].read().result())
  except ValueError as error:
    raise checkpoint.damaged(path, str(error)) from error


def fingerprint(tree: PyTree) -> int:
  """`checkpoint.fingerprint` of a tree of `Leaf`."""
  total = 0
  for leaf in jax.tree.leaves(tree):
    bits = sum(_bit_sum(layer.read().astype(leaf.dtype, copy=False)) for layer in leaf.layers)
    total = (total * _FACTOR + bits) % _MODULUS
  return total


def _bit_sum(array: np.ndarray) -> int:
  words = np.ascontiguousarray(array).reshape(-1).view(f'uint{8 * min(array.itemsize, 4)}')
  return int(words.sum(dtype=np.uint64))


def write(folder: str, networks: Mapping[str, PyTree]) -> None:
  """Writes averaged networks as the checkpoint of step 0 of a run; each leaf is read twice.

  Args:
    folder: the checkpoints of the run, not there yet.
    networks: name to a tree of `Leaf`; they are written in float32.
  """
  networks = jax.tree.map(lambda leaf: _Float32(leaf), dict(networks))
  prints = {'ema': fingerprint(networks)}
  info = {'data_step': 0, 'step': 0, 'fingerprints': prints}
  options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
  with ocp.CheckpointManager(folder, options=options, handler_registry=_handlers()) as manager:
    items = {'ema': ocp.args.PyTreeSave(networks), 'info': ocp.args.JsonSave(info)}
    manager.save(0, args=ocp.args.Composite(**items))


@dataclasses.dataclass(frozen=True)
class _Float32:
  """A leaf whose layers are read as float32; a type of its own, that Orbax knows by `_Layers`."""

  leaf: Leaf
  dtype = np.dtype(np.float32)

  @property
  def shape(self) -> tuple[int, ...]:
    return self.leaf.shape

  @property
  def layers(self) -> tuple[Tensor, ...]:
    return self.leaf.layers


class _Layers(ocp.type_handlers.NumpyHandler):
  """Orbax's way of writing NumPy arrays, but for leaves, a layer at a time."""

  async def serialize(self, values, infos, args=None):
    for value, info in zip(values, infos, strict=True):
      await info.await_path_creation()
      store = await ts.open(_spec(info.path, value.shape), create=True)
      for index, layer in enumerate(value.layers):
        place = store[index] if value.leaf.stacked else store
        await place.write(layer.read().astype(value.dtype, copy=False))
    return []


def _spec(path: epath.Path, shape: tuple[int, ...]) -> dict[str, Any]:
  return {
    'driver': 'zarr',
    'kvstore': {'driver': 'file', 'path': f'{path}/'},
    'metadata': {
      'shape': list(shape),
      'chunks': _chunk(shape),
      'dtype': '<f4',
      'compressor': {'id': 'zstd', 'level': 1},
    },
  }


def _chunk(shape: tuple[int, ...]) -> list[int]:
  """What is stored together: of a stack at most a layer, and of that no more than `_CHUNK`."""
  chunk = [1, *shape[1:]] if len(shape) > 2 else list(shape)
  while np.prod(chunk, dtype=np.int64) > _CHUNK:
    axis = int(np.argmax(chunk))
    chunk[axis] = -(-chunk[axis] // 2)
  return [max(1, length) for length in chunk]


def _handlers() -> ocp.handlers.CheckpointHandlerRegistry:
  types = ocp.type_handlers.create_type_handler_registry((_Float32, _Layers()))
  registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
  handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, type_handler_registry=types)
  registry.add('ema', ocp.args.PyTreeSave, handler)
  registry.add('info', ocp.args.JsonSave, ocp.JsonCheckpointHandler())
  return registry
