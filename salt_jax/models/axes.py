"""The axes of the mesh, and which of them splits which dimension of an activation.

A model knows no devices: it names axes, and the mesh that is set around the trace (`jax.set_mesh`) gives them sizes.
Without one, or on a single device, nothing here does anything.

Examples lie over `data` and `fsdp`, the tokens of a frame over `context`, heads and widths over `tensor`. Attention
needs all tokens of a head: there `context` splits heads too, so that it moves from tokens to heads and back (DeepSpeed
Ulysses, arXiv 2309.14509) and a cache is kept as attention reads it.
"""

import math
from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec
from jaxtyping import Array

AXES = ('data', 'fsdp', 'context', 'tensor')
BATCH = ('data', 'fsdp')
TOKENS = 'context'
WIDTH = 'tensor'
HEADS = ('tensor', 'context')


def size(axes: str | tuple[str, ...] | None) -> int:
  """Devices along these axes of the mesh that is set; 1 without a mesh."""
  names = axes if isinstance(axes, tuple) else (axes,) if axes else ()
  shape = jax.sharding.get_abstract_mesh().shape
  return math.prod(shape.get(name, 1) for name in names)


def spread() -> bool:
  """Whether a mesh of several devices with these axes is set."""
  return size(AXES) > 1


def spec(shape: tuple[int, ...], *names) -> PartitionSpec:
  """One entry a dimension; a batch that its axes do not divide stays whole, as when few clips are sampled."""
  return PartitionSpec(
    *(
      None if name == BATCH and length % size(BATCH) else name
      for length, name in zip(shape, names, strict=True)
    )
  )


def split(x: Array, *names) -> Array:
  """Lays x out over the mesh that is set: for each dimension an axis, several, or None."""
  if not spread():
    return x
  return jax.lax.with_sharding_constraint(x, spec(x.shape, *names))


def per_device(fn: Callable, names: tuple[tuple, ...], out: tuple) -> Callable:
  """`fn` on each device's own part of its arrays: for kernels that the compiler cannot split.

  Args:
    fn: of arrays, or None.
    names: for each argument an entry a dimension, as for `split`.
    out: the same for the result.
  """

  def run(*arrays):
    if not spread():
      return fn(*arrays)
    given = [i for i, x in enumerate(arrays) if x is not None]
    specs = tuple(spec(arrays[i].shape, *names[i]) for i in given)

    def some(*parts):
      whole = list(arrays)
      for i, part in zip(given, parts, strict=True):
        whole[i] = part
      return fn(*whole)

    result = spec((*arrays[0].shape[:1], *(0 for _ in out[1:])), *out)
    mapped = jax.shard_map(some, in_specs=specs, out_specs=result, check_vma=False)
    return mapped(*(arrays[i] for i in given))

  return run
