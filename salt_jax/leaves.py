"""Arrays of a parameter tree that are not read yet; stacked ones are read layer by layer.

A layer of a 14B network is 0.3 GB in float32 and a stack of its forty 11 GB, so what passes through a program in layers
passes through a small one.
"""

import dataclasses
from concurrent import futures

import numpy as np

from salt_jax.tensor_files import Tensor, cast_into, held

_THREADS = 8  # layers in memory at a time, besides the array that they become


@dataclasses.dataclass(frozen=True)
class Leaf:
  """One array; to `jax.tree` it is a leaf.

  Attributes:
    layers: its entries along a leading axis, or if it is not stacked itself alone.
    stacked: whether there is that axis.
  """

  layers: tuple[Tensor, ...]
  stacked: bool

  @property
  def shape(self) -> tuple[int, ...]:
    return (len(self.layers), *self.layers[0].shape) if self.stacked else self.layers[0].shape

  @property
  def dtype(self) -> np.dtype:
    return np.result_type(*(layer.dtype for layer in self.layers))

  def whole(self, dtype: np.dtype | None = None) -> np.ndarray:
    """All of it in memory, cast to `dtype` if one is given; layers are read side by side."""
    out = np.empty(self.shape, dtype or self.dtype)
    places = [out[i, ...] for i in range(len(out))] if self.stacked else [out]
    with futures.ThreadPoolExecutor(_THREADS) as pool:
      list(pool.map(_read_into, places, self.layers))
    return out


def _read_into(place: np.ndarray, layer: Tensor) -> None:
  cast_into(place, layer.read())


def of_array(array: np.ndarray, stacked: bool) -> Leaf:
  """The leaf of an array in memory."""
  return Leaf(tuple(map(held, array)) if stacked else (held(array),), stacked)
