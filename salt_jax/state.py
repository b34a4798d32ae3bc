"""The state of a training run, one pytree, and how it comes onto the devices."""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct
from jaxtyping import Array, Int, PyTree

from salt_jax import sharding
from salt_jax.models.axes import BATCH
from salt_jax.models.cache import LAYOUT


@struct.dataclass
class TrainState:
  """What a step changes.

  Attributes:
    params: trained networks by name, float32.
    opt: their optimizer states.
    ema: moving average of the networks that samplers load.
    updates: updates of those networks so far.
    stream: what a step leaves to the next besides networks (`diffusion.streaming.Carried`); {} is nothing.
  """

  params: dict[str, PyTree]
  opt: dict[str, optax.OptState]
  ema: dict[str, PyTree]
  updates: Int[Array, '']
  stream: PyTree = struct.field(default_factory=dict)


# Of what is carried, all that has a batch axis is split as batches are.
STREAM_RULES = (
  ('^stream/cache/[kv]$', LAYOUT),
  ('^stream/latents$', (BATCH, None, None, None, None)),
  ('^stream/prompts/', (BATCH, None)),
  ('^stream/', 'replicate'),
)


def place(tree: PyTree, shardings: PyTree) -> PyTree:
  """Host arrays onto the devices; every process hands over the slices of its own devices only."""

  def one(x, s):
    x = np.asarray(x)
    return jax.make_array_from_callback(x.shape, s, lambda index: x[index])

  return jax.tree.map(one, tree, shardings)


def shapes_of(
  params: Mapping[str, PyTree],
  optimizers: Mapping,
  averaged: tuple[str, ...],
  stream: Callable[[], PyTree] = dict,
) -> TrainState:
  """The state's shapes, from arrays or shapes of the parameters."""
  structs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.float32), dict(params))
  return jax.eval_shape(lambda p: _new(p, optimizers, averaged, stream), structs)


def create(
  params: Mapping[str, PyTree],
  optimizers: Mapping,
  averaged: tuple[str, ...],
  shardings: TrainState,
  stream: Callable[[], PyTree] = dict,
) -> TrainState:
  """A fresh state from host parameters, born sharded.

  Args:
    params: networks by name.
    optimizers: an optax transformation for each.
    averaged: names of the networks that have a moving average.
    shardings: of the whole state.
    stream: makes what the first step finds carried.
  """
  placed = place(jax.tree.map(lambda x: np.asarray(x, np.float32), dict(params)), shardings.params)
  # Donated, for what is freed later stays a hole before all that a run allocates.
  new = jax.jit(
    lambda p: _new(p, optimizers, averaged, stream), donate_argnums=0, out_shardings=shardings
  )
  return new(placed)


def _new(params, optimizers, averaged, stream=dict) -> TrainState:
  # A plain pass-through would share one buffer between parameters and average, and donation needs two.
  copy = jax.tree.map(jnp.copy, params)
  return TrainState(
    params=copy,
    opt={name: optimizers[name].init(params[name]) for name in params},
    ema={name: jax.tree.map(jnp.copy, params[name]) for name in averaged},
    updates=jnp.zeros((), jnp.int32),
    stream=stream(),
  )


def with_shardings(shapes: PyTree, mesh, config) -> tuple[PyTree, PyTree]:
  """(shapes that know their sharding, the shardings): what restoring and jitting need."""
  placed = sharding.shardings(shapes, mesh, (*STREAM_RULES, *config.rules), config.shard_min_size)
  structs = jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, placed
  )
  return structs, placed
