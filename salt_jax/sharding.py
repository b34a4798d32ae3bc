"""Mesh and shardings as data: four axes with sizes, and an ordered table of (pattern, rule).

A rule is one of
  'replicate'              every device holds the whole array
  'fsdp'                   the largest dimension that fits is split over `fsdp` and `context` together
  'columns', 'rows'        the same, but the last dimension ('rows': the one before it) is split over `tensor`
  (None, 'fsdp', 'tensor') a spec written out, one entry per dimension
and the first pattern found in an array's '/'-joined path decides.
"""

import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from salt_jax.errors import InputError
from salt_jax.models.axes import AXES, BATCH

# For each rule by name, the dimension from the end that `tensor` splits.
_TENSOR = {'fsdp': None, 'columns': 1, 'rows': 2}
_SLICE = 2**28  # bytes of an array of several hosts that are put together at once

Rule = str | tuple[str | tuple[str, ...] | None, ...]


def make_mesh(axes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
  """Lays the devices out over the four axes.

  Args:
    axes: size of each of `AXES`; one of them may be -1 and takes what is left.
    devices: the devices to use, by default all of them.

  Raises:
    InputError: an axis is missing, unknown or not positive, or the sizes do not make up the
      device count.
  """
  if set(axes) != set(AXES):
    raise InputError(f'a mesh needs the sizes of exactly {AXES}, not of {tuple(axes)}.')
  devices = jax.devices() if devices is None else list(devices)
  sizes = {axis: int(axes[axis]) for axis in AXES}
  asked = ', '.join(f'{axis}={size}' for axis, size in sizes.items())
  free = [axis for axis in AXES if sizes[axis] == -1]
  fixed = math.prod(size for size in sizes.values() if size != -1)
  if len(free) > 1 or any(size < 1 for size in sizes.values() if size != -1):
    raise InputError(f'mesh {asked}: sizes must be positive, and at most one may be -1.')
  if len(devices) % fixed or (not free and fixed != len(devices)):
    raise InputError(
      f'mesh {asked} does not make up {len(devices)} devices: the product of the sizes must be '
      f'{len(devices)}; set one size to -1 to take what is left.'
    )
  sizes.update({axis: len(devices) // fixed for axis in free})
  shape = tuple(sizes[axis] for axis in AXES)
  types = (AxisType.Auto,) * len(AXES)
  if devices[0].platform != 'tpu':
    return jax.make_mesh(shape, AXES, axis_types=types, devices=devices)
  return Mesh(_wired(shape, devices, asked), AXES, axis_types=types)


def _wired(shape: tuple[int, ...], devices: Sequence[jax.Device], asked: str) -> np.ndarray:
  """TPUs as they are wired: neighbours along an axis are neighbours, and `data` goes over the slices.

  Raises:
    InputError: `data` cannot go over the slices.
  """
  slices = len({getattr(device, 'slice_index', 0) for device in devices})
  if shape[0] % slices:
    raise InputError(
      f'mesh {asked} cannot be laid over {slices} slices: make data a multiple of {slices}.'
    )
  inner, outer = (shape[0] // slices, *shape[1:]), (slices, 1, 1, 1)
  make = functools.partial(mesh_utils.create_hybrid_device_mesh, inner, outer, devices)
  if slices == 1:
    make = functools.partial(mesh_utils.create_device_mesh, shape, devices)
  try:
    return make()
  except NotImplementedError:
    # A side of the slice is shared by two axes.
    return make(allow_split_physical_axes=True)


def shardings(
  shapes: Any, mesh: Mesh, rules: Sequence[tuple[str, Rule]], min_size: int = 2**16
) -> Any:
  """Applies the rule table to a tree of arrays or ShapeDtypeStructs.

  Args:
    shapes: any pytree whose leaves have a shape.
    mesh: the mesh of `make_mesh`.
    rules: (regular expression, rule) in order of priority.
    min_size: arrays of fewer elements stay replicated under the 'fsdp' rule.

  Returns:
    The same tree with a NamedSharding at each leaf.

  Raises:
    InputError: a pattern is none, no pattern matches a path, or a written-out spec does not fit its array.
  """
  patterns = [(_compiled(pattern), rule) for pattern, rule in rules]

  def place(path, leaf) -> NamedSharding:
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    for pattern, rule in patterns:
      if pattern.search(name):
        return NamedSharding(mesh, _spec(rule, name, leaf.shape, mesh, min_size))
    raise InputError(f"no sharding rule matches '{name}'; add one, such as ('.*', 'replicate').")

  return jax.tree_util.tree_map_with_path(place, shapes)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The leading axis over data and fsdp together, the rest whole."""
  return NamedSharding(mesh, PartitionSpec(BATCH))


def replicated(mesh: Mesh) -> NamedSharding:
  """The whole array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def to_global(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """Joins each process's rows into global arrays that are sharded over data and fsdp.

  Args:
    batch: this process's examples in the order of `rows_here`, [rows, ...] for every key.
    mesh: the mesh of `make_mesh`.

  Raises:
    InputError: the rows cannot be split evenly over data x fsdp.
  """
  shards, here = _blocks(mesh)
  return {name: _joined(name, np.asarray(rows), shards, here, mesh) for name, rows in batch.items()}


def _joined(name: str, rows: np.ndarray, shards: int, here: list[int], mesh: Mesh) -> jax.Array:
  if len(rows) % len(here):
    raise InputError(
      f"'{name}': a batch of {len(rows) * shards // len(here)} cannot be split over data x fsdp = "
      f'{shards} shards; make the batch a multiple of {shards}.'
    )
  each = len(rows) // len(here)

  def part(index):
    at = here.index((index[0].start or 0) // each) * each
    return rows[at : at + each]

  shape = (each * shards, *rows.shape[1:])
  return jax.make_array_from_callback(shape, batch_sharding(mesh), part)


def _blocks(mesh: Mesh) -> tuple[int, list[int]]:
  """Into how many blocks a batch's rows are split, and which of them this process's devices hold."""
  shards = math.prod(mesh.shape[axis] for axis in BATCH)
  spans = batch_sharding(mesh).addressable_devices_indices_map((shards,)).values()
  return shards, sorted({span[0].start or 0 for span in spans})


def rows_here(batch: int, mesh: Mesh) -> tuple[int, ...]:
  """Rows of a global batch that this process's devices hold, in order.

  Processes hold the same rows where only `context` or `tensor` is between them, and a mesh that follows the wires of a
  slice need not number its devices process after process.

  Raises:
    InputError: the batch cannot be split evenly.
  """
  shards, here = _blocks(mesh)
  if batch % shards:
    raise InputError(f'a batch of {batch} cannot be split over data x fsdp = {shards} shards.')
  each = batch // shards
  return tuple(row for block in here for row in range(block * each, (block + 1) * each))


def to_host(tree: Any) -> Any:
  """Whole arrays on every host, also of what is spread over several.

  All processes take part. An array that no process holds whole comes slice after slice, so that a device never has to
  hold it whole either.
  """
  return jax.tree.map(_whole, tree)


def _whole(x: jax.Array) -> np.ndarray:
  if x.is_fully_addressable or x.is_fully_replicated:
    return np.asarray(x)
  spec = (*x.sharding.spec, *(None,) * (x.ndim - len(x.sharding.spec)))
  free = [(length, axis) for axis, length in enumerate(x.shape) if spec[axis] is None]
  if not free or x.nbytes <= _SLICE:
    return np.asarray(_replicated(x.sharding.mesh)(x))
  length, axis = max(free)
  # As many slices as it takes, of one length, so that there is one program.
  size = max(1, length * _SLICE // x.nbytes)
  while length % size:
    size -= 1
  take = _slices(x.sharding.mesh, axis, size)
  return np.concatenate([np.asarray(take(x, np.int32(at))) for at in range(0, length, size)], axis)


@functools.cache
def _replicated(mesh: Mesh):
  return jax.jit(lambda x: x, out_shardings=replicated(mesh))


@functools.cache
def _slices(mesh: Mesh, axis: int, size: int):
  def take(x, start):
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis)

  return jax.jit(take, out_shardings=replicated(mesh))


def over_local_devices(batch: Any, mesh: Mesh | None = None) -> Any:
  """Splits the leading axis over this process's devices: for work that processes do each by itself.

  Args:
    batch: arrays with as many rows each.
    mesh: of `local_mesh`, if the rows go to parameters that lie over it.

  Raises:
    InputError: the rows cannot be split evenly.
  """
  devices = jax.local_devices()
  rows = jax.tree.leaves(batch)[0].shape[0]
  if rows % len(devices):
    raise InputError(
      f'a batch of {rows} cannot be split over {len(devices)} local devices: make it a multiple.'
    )
  rows = NamedSharding(_local_mesh(), PartitionSpec('rows'))
  return jax.device_put(batch, batch_sharding(mesh) if mesh else rows)


def local_mesh(axes: Mapping[str, int]) -> Mesh:
  """This process's devices, over which parameters are split as a config splits them over all devices.

  Whatever axis splits parameters there is `fsdp` here, as far as this process has devices for it; the rest is `data`,
  and examples lie over both.

  Args:
    axes: sizes as for `make_mesh`.
  """
  devices = np.array(jax.local_devices())
  sizes = [size for axis, size in axes.items() if axis != 'data']
  parts = len(devices) if -1 in sizes else math.gcd(math.prod(sizes), len(devices))
  return Mesh(devices.reshape(-1, parts, 1, 1), AXES)


def split_locally(
  tree: Any, mesh: Mesh, rules: Sequence[tuple[str, Rule]], min_size: int = 2**16
) -> Any:
  """Parameters over the devices of `mesh`; arguments as for `shardings`."""
  return jax.device_put(tree, shardings(tree, mesh, rules, min_size))


def over_space(
  clips: int, rows: int, columns: int, devices: Sequence[jax.Device] | None = None
) -> NamedSharding:
  """Splits clips `[b t h w c]` over devices along one side of a frame.

  Args:
    clips: how many there are; they are split over the devices that the side leaves, if they can be evenly.
    rows, columns: of the coarsest resolution; the side that can be cut into more parts is split.
    devices: by default those of this process.
  """
  devices = np.array(jax.local_devices() if devices is None else devices)
  down, across = _parts(rows, len(devices)), _parts(columns, len(devices))
  mesh = Mesh(devices.reshape(-1, max(down, across)), ('clips', 'space'))
  sides = (None, 'space') if across >= down else ('space', None)
  shared = clips % mesh.shape['clips'] == 0
  return NamedSharding(mesh, PartitionSpec('clips' if shared else None, None, *sides))


def _parts(length: int, devices: int) -> int:
  """Equal parts of two or more: XLA gets a convolution of 2 rows wrong where two devices hold one each."""
  common = (parts for parts in range(2, devices + 1) if devices % parts == length % parts == 0)
  return max((parts for parts in common if parts < length), default=1)


def _local_mesh() -> Mesh:
  return Mesh(np.array(jax.local_devices()), ('rows',))


def _compiled(pattern: str) -> re.Pattern:
  try:
    return re.compile(pattern)
  except re.error as error:
    raise InputError(
      f"the pattern '{pattern}' of a sharding rule is no regular expression: {error}."
    ) from error


def _spec(
  rule: Rule, name: str, shape: tuple[int, ...], mesh: Mesh, min_size: int
) -> PartitionSpec:
  if rule == 'replicate':
    return PartitionSpec()
  if rule in _TENSOR:
    return _fsdp_spec(shape, mesh, min_size, _TENSOR[rule])
  if isinstance(rule, str):
    raise InputError(
      f"sharding rule '{rule}' is unknown; use 'replicate', {', '.join(map(repr, _TENSOR))} or a tuple."
    )
  return _written_spec(tuple(rule), name, shape, mesh)


def _fsdp_spec(
  shape: tuple[int, ...], mesh: Mesh, min_size: int, tensor: int | None
) -> PartitionSpec:
  """`tensor` is the dimension, from the end, that the axis of this name splits if it can."""
  if math.prod(shape) < min_size:
    return PartitionSpec()
  entries: list = [None] * len(shape)
  if tensor is not None and mesh.shape['tensor'] > 1 and len(shape) >= tensor:
    if shape[-tensor] % mesh.shape['tensor'] == 0:
      entries[-tensor] = 'tensor'
  for axes in (('fsdp', 'context'), ('fsdp',), ('context',)):
    size = math.prod(mesh.shape[axis] for axis in axes)
    free = [(n, i) for i, n in enumerate(shape) if entries[i] is None and n % size == 0]
    if size > 1 and free:
      kept = tuple(axis for axis in axes if mesh.shape[axis] > 1)
      entries[max(free)[1]] = kept if len(kept) > 1 else kept[0]
      break
  while entries and entries[-1] is None:
    entries.pop()
  return PartitionSpec(*entries)


def _written_spec(
  rule: tuple[str | tuple[str, ...] | None, ...], name: str, shape: tuple[int, ...], mesh: Mesh
) -> PartitionSpec:
  if len(rule) != len(shape):
    raise InputError(
      f"'{name}' has shape {shape}, but its sharding rule {rule} has {len(rule)} "
      'entries; write one per dimension.'
    )
  for length, entry in zip(shape, rule, strict=True):
    names = entry if isinstance(entry, tuple) else (entry,) if entry else ()
    if not set(names) <= set(AXES):
      raise InputError(f"'{name}': sharding rule {rule} names an axis that is not in {AXES}.")
    shards = math.prod(mesh.shape[axis] for axis in names)
    if length % shards:
      raise InputError(
        f"'{name}' has shape {shape}: {length} cannot be split over {entry} = "
        f'{shards}; change the rule or the mesh.'
      )
  return PartitionSpec(*rule)
