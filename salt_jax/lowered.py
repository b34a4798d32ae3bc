"""The programs of a config from abstract shapes: nothing is read, and nothing lies on a device."""

import collections
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree
from ml_collections import ConfigDict

from salt_jax import codec, flops, outline, programs, sample, sharding, state, weights
from salt_jax.checks import MAX_STEPS
from salt_jax.generate import STEPS
from salt_jax.models import vae
from salt_jax.recipe import Recipe, latent_shape

NAMES = ('generator', 'critic', 'sample', 'decode')


class Program(NamedTuple):
  """A program to compile.

  Attributes:
    name: of the step, or sample or decode.
    lower: traces it.
    clips: that it works on.
    shards: parts that they are split into over devices.
    parts: FLOPs of a clip by formula; none for the VAE, whose convolutions the compiler counts.
    passes: of the loops whose length is drawn, in the mean.
    every: iterations from one run to the next; 0 is no part of training.
    steps: of an iteration of training; 0 if this is none of them.
    inputs: shapes of its arguments, with shardings.
    cache: bytes on a device of the keys and values that a rollout makes.
    options: what the compiler is told besides.
    accumulate: parts that a shard takes its clips in, one after another.
  """

  name: str
  lower: Callable[[], jax.stages.Lowered]
  clips: int
  shards: int
  parts: list[flops.Part]
  passes: float
  every: int
  steps: int
  inputs: PyTree
  cache: float = 0.0
  options: tuple[tuple[str, str], ...] = ()
  accumulate: int = 1

  @property
  def at_once(self) -> float:
    """Clips of a shard that are worked on at once."""
    return self.clips / (self.shards * self.accumulate)

  @property
  def held(self) -> float:
    """Bytes on a device of arguments and cache, without the padding of tiles: a lower bound of what is needed."""
    return resident(self.inputs) + self.cache


def of_config(config: ConfigDict, rec: Recipe, mesh: Mesh, host: list) -> dict[str, Program]:
  """The steps of a stage, and sampling and decoding of its student if it has one.

  Args:
    config: the experiment.
    rec: what it means on these devices.
    mesh: all devices.
    host: those of a host by itself, which decodes alone; numbered from 0, for libtpu ends the process otherwise.

  Raises:
    InputError: an unknown stage.
  """
  found = _steps(config, rec, mesh)
  if rec.chunking is not None:
    found['sample'] = _sample(config, rec, mesh)
    found['decode'] = _decode(config, rec, host)
  return found


def _struct(tree: PyTree, placed: NamedSharding) -> PyTree:
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=placed), tree)


def _steps(config: ConfigDict, rec: Recipe, mesh: Mesh) -> dict[str, Program]:
  what = outline.outline(config, rec)
  shapes = state.shapes_of(what.trained, rec.optimizers, what.averaged, what.stream)
  like, placed = state.with_shardings(shapes, mesh, config)
  frozen, frozen_placed = state.with_shardings(what.frozen, mesh, config)
  layout = programs.Layout(placed, frozen_placed, mesh)
  batch = _struct(what.batch, sharding.batch_sharding(mesh))
  n = _struct(jax.ShapeDtypeStruct((), np.int32), sharding.replicated(mesh))
  counts, inputs = flops.of_steps(config, rec), (like, frozen, batch, n)
  told = programs.options(rec, mesh.devices.flat[0].device_kind)
  passes = 1.0 if rec.schedule is None else flops.mean_steps(rec.schedule) + rec.chunking.causal

  def lower(work):
    # What a step does not read stays on the device too, so that all arguments are kept.
    run = programs.jitted(work, rec, layout, collections.Counter(), keep_unused=True)
    # Not `set_mesh`: what is computed while tracing belongs on this machine.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return run.lower(*inputs)

  return {
    work.name: Program(
      work.name,
      functools.partial(lower, work),
      config.batch,
      shards(mesh),
      counts.get(work.name, []),
      passes,
      work.every,
      len(what.work),
      inputs,
      _cache(rec, mesh, config.batch // rec.accumulate) if config.stage == 'selfforcing' else 0.0,
      tuple(told.items()),
      rec.accumulate,
    )
    for work in what.work
  }


def _cache(rec: Recipe, mesh: Mesh, clips: int) -> float:
  """Of a clip's rollout; a stream's cache is an argument."""
  if not rec.chunking.causal or rec.streaming is not None:
    return 0.0
  frames, tokens = rec.chunking.frames, rec.chunking.cache[1]
  whole = flops.cache_bytes(rec.model, frames, tokens, rec.chunking.dtype)
  return whole * clips / mesh.size


def shards(mesh: Mesh) -> int:
  """Parts that a batch is split into."""
  return mesh.shape['data'] * mesh.shape['fsdp']


def _sample(config: ConfigDict, rec: Recipe, mesh: Mesh) -> Program:
  """Few-step sampling with the sharded average, a clip for each part of a batch, as a run does while it trains."""
  clips = shards(mesh)
  average, _ = state.with_shardings({'ema': weights.shapes('dit', rec.model)}, mesh, config)
  text, _ = state.with_shardings(outline.frozen(rec, ('text',)), mesh, config)
  whole, rows = sharding.replicated(mesh), sharding.batch_sharding(mesh)
  frozen = text | {'negative': _struct(outline.prompts(rec, 1), whole)}
  given = tuple(_struct(x, rows) for x in outline.clips(config, rec, clips).values())
  sigmas = _struct(jax.ShapeDtypeStruct((MAX_STEPS + 1,), np.float32), whole)
  last = _struct(jax.ShapeDtypeStruct((), np.int32), whole)
  inputs = (average['ema'], frozen, sigmas, last, given)
  options = programs.options(rec, mesh.devices.flat[0].device_kind)
  jitted = jax.jit(sample.few_step(rec), out_shardings=rows, compiler_options=options)

  def lower():
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      return jitted.lower(*inputs)

  return Program(
    'sample',
    lower,
    clips,
    clips,
    flops.sampling(rec, STEPS),
    STEPS + rec.chunking.causal,
    0,
    0,
    inputs,
    _cache(rec, mesh, clips),
    tuple(options.items()),
  )


def _decode(config: ConfigDict, rec: Recipe, host: list) -> Program:
  """A later part of a clip on the devices of one host, the larger of the two programs of `codec.decode`."""
  frames, height, width, channels = latent_shape(config)
  where = codec.split(1, height, width, host)
  rows = where or NamedSharding(Mesh(np.array(host[:1]), ('clips',)), PartitionSpec('clips'))
  part = min(frames, codec.latents_at_once(height, width))
  latents = jax.ShapeDtypeStruct((1, part, height, width, channels), np.float32)
  params = weights.shapes('vae', rec.vae)
  begin = functools.partial(vae.decode_chunk, cfg=rec.vae, first=True)
  _, features = jax.eval_shape(lambda p, z: begin(p, z, {}), params, latents)
  inputs = (
    _struct(params, sharding.replicated(rows.mesh)),
    _struct(latents, rows),
    _struct(features, rows),
  )

  def lower():
    with jax.sharding.use_abstract_mesh(rows.mesh.abstract_mesh):
      return codec.decode_part.lower(*inputs, cfg=rec.vae, first=False, where=where)

  return Program('decode', lower, 1, 1, [], 1.0, 0, 0, inputs)


def resident(tree: PyTree) -> int:
  """Bytes of arguments on one device, without the padding of tiles: a lower bound."""
  return sum(
    int(np.prod(x.sharding.shard_shape(x.shape), dtype=np.int64)) * x.dtype.itemsize
    for x in jax.tree.leaves(tree)
  )
