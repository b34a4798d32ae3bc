"""What a stage is before any file is read: the shapes of its networks, its steps, and what their batches hold.

`stages` fills it with parameters and data; `plan` compiles it as it is.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree
from ml_collections import ConfigDict

from salt_jax import causal_steps, step, stream_steps, weights
from salt_jax.diffusion import streaming
from salt_jax.recipe import Recipe, latent_shape


class Work(NamedTuple):
  """A step function and how often it runs."""

  name: str
  run: Callable
  every: int = 1


class Outline(NamedTuple):
  """A stage without contents; every leaf is a ShapeDtypeStruct.

  Attributes:
    trained: the trained networks, by name.
    frozen: networks and the unconditional prompt that only serve, in the dtypes they are kept in.
    averaged: trained networks that have a moving average.
    work: what one iteration does, in order.
    batch: what every step is given, of the global batch.
    stream: makes what steps carry on besides networks.
  """

  trained: dict[str, PyTree]
  frozen: dict[str, PyTree]
  averaged: tuple[str, ...]
  work: tuple[Work, ...]
  batch: dict[str, jax.ShapeDtypeStruct]
  stream: Callable[[], PyTree] = dict


_STEPS = {
  'vae': (Work('vae', step.vae_step),),
  'flow': (Work('dit', step.flow_step),),
  'ode': (Work('generator', step.ode_step),),
  'ar': (Work('generator', causal_steps.ar_step),),
  'causal_ode': (Work('generator', causal_steps.causal_ode_step),),
  'causal_cd': (Work('generator', causal_steps.causal_cd_step),),
}


def work(config: ConfigDict, rec: Recipe) -> tuple[Work, ...]:
  """The steps of a stage."""
  if config.stage != 'selfforcing':
    return _STEPS[config.stage]
  steps = step if rec.streaming is None else stream_steps
  return (
    Work('generator', steps.generator_step, config.generator_every),
    Work('critic', steps.critic_step),
  )


def trained(config: ConfigDict, rec: Recipe) -> dict[str, PyTree]:
  """Shapes of the networks that a stage trains."""
  if config.stage == 'vae':
    return {'vae': weights.shapes('vae', rec.vae)}
  shapes = weights.shapes('dit', rec.model)
  if config.stage == 'flow':
    return {'dit': shapes, 'text': weights.shapes('umt5', rec.text)}
  if config.stage == 'selfforcing':
    return {'generator': shapes, 'critic': shapes}
  return {'generator': shapes}


def averaged(config: ConfigDict) -> tuple[str, ...]:
  """Names of the trained networks that have a moving average."""
  return {'vae': ('vae',), 'flow': ('dit', 'text')}.get(config.stage, ('generator',))


def served(config: ConfigDict, rec: Recipe) -> tuple[str, ...]:
  """Names of the networks that only serve."""
  if config.stage in ('vae', 'flow'):
    return ()
  if config.stage != 'selfforcing':
    return ('text', 'ar') if config.stage == 'causal_cd' else ('text',)
  encoder = () if config.data.kind == 'text_store' else ('text',)
  reencoded = rec.streaming is not None and rec.streaming.boundary == 'reencoded'
  return ('teacher', *encoder, *(('vae',) if reencoded else ()))


def stream(config: ConfigDict, rec: Recipe) -> Callable[[], PyTree]:
  """Makes what a stage's first step finds carried."""
  if rec.streaming is None:
    return dict
  return functools.partial(streaming.carry_nothing, rec.chunking, config.batch, rec.text_length)


def frozen(rec: Recipe, names: tuple[str, ...]) -> dict[str, PyTree]:
  """Shapes of networks that only serve, in the dtypes of `weights.narrowed`."""
  return {name: weights.narrowed_shapes(name, sizes(rec, name)) for name in names}


def sizes(rec: Recipe, name: str):
  """Sizes of a network that serves."""
  return {'vae': rec.vae, 'text': rec.text}.get(name, rec.teacher)


def prompts(rec: Recipe, rows: int, stored: bool = False) -> dict[str, jax.ShapeDtypeStruct]:
  """So many prompts as tokens, or as rows of a store."""
  length = rec.text_length
  if stored:
    return {'text': jax.ShapeDtypeStruct((rows, length, rec.text.dim), 'bfloat16')}
  return {
    'ids': jax.ShapeDtypeStruct((rows, length), np.int32),
    'mask': jax.ShapeDtypeStruct((rows, length), np.bool_),
  }


def given(config: ConfigDict, rec: Recipe, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
  """The fields of image-to-video (`precompute.given`); none for T2V."""
  fields = {}
  if rec.model.frame_channels:
    fields['condition'] = jax.ShapeDtypeStruct((rows, *latent_shape(config)), np.float16)
  if rec.model.image_dim:
    fields['image'] = jax.ShapeDtypeStruct((rows, rec.model.image_len, rec.clip.dim), np.float16)
  return fields


def clips(config: ConfigDict, rec: Recipe, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
  """What a sampler is given, in its order: prompts and numbers, and for I2V first frames."""
  numbers = {'index': jax.ShapeDtypeStruct((rows,), np.int32)}
  return prompts(rec, rows) | numbers | given(config, rec, rows)


def _data(config: ConfigDict, rec: Recipe, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
  """What the data of a stage has besides prompts and first frames."""
  latent = latent_shape(config)
  if config.stage in ('ode', 'causal_ode'):
    # Kept inputs and the end; behind clean chunks the clean clip too.
    more, dtype = (1, np.float16) if config.stage == 'ode' else (2, np.float32)
    kept = rec.schedule.steps[0] + more
    return {'trajectory': jax.ShapeDtypeStruct((rows, kept, *latent), dtype)}
  if config.stage == 'vae':
    side = config.video.height
    shape = (rows, config.data.frames, side, side, 3)
    return {'video': jax.ShapeDtypeStruct(shape, np.uint8)}
  if config.stage == 'selfforcing':
    return {}
  return {'latents': jax.ShapeDtypeStruct((rows, *latent), np.float16)}


def batch(config: ConfigDict, rec: Recipe) -> dict[str, jax.ShapeDtypeStruct]:
  """The global batch of a step, as `train` hands it over.

  A file of prompts may name negative ones besides; they are not known before it is read, and small.
  """
  rows = config.batch
  fields = {'index': jax.ShapeDtypeStruct((rows,), np.int32)}
  fields |= prompts(rec, rows, config.data.kind == 'text_store') | _data(config, rec, rows)
  if rec.model is not None:
    fields |= given(config, rec, rows)
  if rec.streaming is not None:
    fields |= {f'next_{name}': x for name, x in prompts(rec, rows).items()}
  return fields


def outline(config: ConfigDict, rec: Recipe) -> Outline:
  """The config's stage; nothing is read, loaded or allocated."""
  serving = {}
  if config.stage != 'vae':
    serving['negative'] = prompts(rec, 1, config.data.kind == 'text_store')
  return Outline(
    trained=trained(config, rec),
    frozen=serving | frozen(rec, served(config, rec)),
    averaged=averaged(config),
    work=work(config, rec),
    batch=batch(config, rec),
    stream=stream(config, rec),
  )
