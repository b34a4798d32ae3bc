"""Mesh and shardings as data: four axes with sizes, and an ordered table of (pattern, rule).

A rule is one of
  'replicate'              every device holds the whole array
  'fsdp'                   the largest dimension that the `fsdp` axis divides is split over it
  (None, 'fsdp', 'tensor') a spec written out, one entry per dimension
and the first pattern found in an array's '/'-joined path decides.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from salt_jax.errors import InputError

AXES = ('data', 'fsdp', 'context', 'tensor')
BATCH_AXES = ('data', 'fsdp')

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
  return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


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
    InputError: no pattern matches a path, or a written-out spec does not fit its array.
  """
  patterns = [(re.compile(pattern), rule) for pattern, rule in rules]

  def place(path, leaf) -> NamedSharding:
    name = jax.tree_util.keystr(path, simple=True, separator='/')
    for pattern, rule in patterns:
      if pattern.search(name):
        return NamedSharding(mesh, _spec(rule, name, leaf.shape, mesh, min_size))
    raise InputError(f"no sharding rule matches '{name}'; add one, such as ('.*', 'replicate').")

  return jax.tree_util.tree_map_with_path(place, shapes)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """The leading axis over data and fsdp together, the rest whole."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
  """The whole array on every device."""
  return NamedSharding(mesh, PartitionSpec())


def to_global(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
  """Joins each process's rows into global arrays that are sharded over data and fsdp.

  Args:
    batch: this process's examples, [rows, ...] for every key.
    mesh: the mesh of `make_mesh`.

  Raises:
    InputError: the rows cannot be split evenly over data x fsdp.
  """
  sharding = batch_sharding(mesh)
  shards = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
  spans = sharding.addressable_devices_indices_map((shards,)).values()
  held = len({span[0].start for span in spans})
  for name, rows in batch.items():
    if len(rows) % held:
      raise InputError(
        f"'{name}': a batch of {len(rows) * shards // held} cannot be split over data x fsdp = "
        f'{shards} shards; make the batch a multiple of {shards}.'
      )
  return {
    name: jax.make_array_from_process_local_data(sharding, np.asarray(rows))
    for name, rows in batch.items()
  }


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


def _spec(
  rule: Rule, name: str, shape: tuple[int, ...], mesh: Mesh, min_size: int
) -> PartitionSpec:
  if rule == 'replicate':
    return PartitionSpec()
  if rule == 'fsdp':
    return _fsdp_spec(shape, mesh.shape['fsdp'], min_size)
  if isinstance(rule, str):
    raise InputError(f"sharding rule '{rule}' is unknown; use 'replicate', 'fsdp' or a tuple.")
  return _written_spec(tuple(rule), name, shape, mesh)


def _fsdp_spec(shape: tuple[int, ...], size: int, min_size: int) -> PartitionSpec:
  divisible = [(length, axis) for axis, length in enumerate(shape) if length % size == 0]
  if size == 1 or math.prod(shape) < min_size or not divisible:
    return PartitionSpec()
  axis = max(divisible)[1]
  return PartitionSpec(*(None,) * axis, 'fsdp')


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
