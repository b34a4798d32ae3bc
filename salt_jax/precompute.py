"""What a stage computes once and keeps in its workdir: latents of clips, and trajectories of the teacher.

Each process writes the shards whose number is its own modulo the process count; a killed run goes on at the first
missing shard.
"""

import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from salt_jax import codec, data, recipe, weights
from salt_jax.diffusion import flow, forcing, solvers
from salt_jax.errors import InputError
from salt_jax.models import wan
from salt_jax.recipe import Recipe
from salt_jax.sharding import over_local_devices
from salt_jax.step import conditioning
from salt_jax.store import Field, Store, StoreWriter

log = logging.getLogger(__name__)


def _fill(
  folder: str, fields: dict, count: int, shard: int, facts: dict, make: Callable[[int], dict]
) -> str:
  """Writes the missing shards of a store with `make(number)`, and finishes it."""
  if count % shard:
    raise InputError(
      f'{count} records do not divide into shards of {shard}: change count or batch.'
    )
  writer = StoreWriter(folder, fields, count // shard, facts)
  if not os.path.exists(os.path.join(folder, 'index.json')):
    todo = [n for n in writer.missing() if n % jax.process_count() == jax.process_index()]
    for done, number in enumerate(todo, 1):
      writer.write(number, make(number))
      if done % 10 == 0 or done == len(todo):
        log.info('precompute: %d of %d shards', done, len(todo))
    if jax.process_count() > 1:
      from jax.experimental import multihost_utils

      multihost_utils.sync_global_devices('precompute')
    if jax.process_index() == 0:
      writer.finish()
  return folder


def _from(
  feed: Callable[[data.Feed], Iterator], batch: int, config: ConfigDict
) -> Callable[[int], dict]:
  """Batch number n of a pipeline, cheap when asked for in order."""
  state = {'at': None, 'iterator': None}

  def get(number: int) -> dict:
    if state['at'] != number:
      state['iterator'] = feed(data.Feed(batch, config.seed, number, workers=config.workers))
    state['at'] = number + 1
    return next(state['iterator'])

  return get


def first_frames(rec: Recipe, frames: int) -> Callable:
  """`(VAE parameters, uint8 first frames [b 1 h w 3]) -> float16 [b f h w z]`: a batch's field `condition`.

  They are the latents of a video of `frames` that is grey behind its first frame (wan.md 5.5).
  """
  return lambda params, first: codec.encode_known(params, first, frames, rec.vae).astype(
    jnp.float16
  )


def _fields(config: ConfigDict, rec: Recipe, **own: Field) -> dict[str, Field]:
  """A store's own fields, the prompts, and for I2V what conditions on the first frame."""
  length = rec.text_length
  fields = own | {'ids': Field((length,), 'int32'), 'mask': Field((length,), 'bool')}
  if rec.model.frame_channels:
    fields['condition'] = Field(recipe.latent_shape(config), 'float16')
  return fields


def _clips(config: ConfigDict, rec: Recipe, frames: int, batch: int) -> Callable[[int], dict]:
  feed = functools.partial(
    data.clips, frames=frames, size=config.video.height, length=rec.text_length
  )
  return _from(feed, batch, config)


def _conditioner(config: ConfigDict, rec: Recipe) -> Callable[[dict], dict]:
  """The fields that every store has, of a batch of clips or captions."""
  if not rec.model.frame_channels:
    return lambda item: {'ids': item['ids'], 'mask': item['mask']}
  params = weights.load(config.weights.vae, 'vae', rec.vae)
  encode = first_frames(rec, config.video.frames)

  def make(item):
    latents = encode(params, over_local_devices(item['video'][:, :1]))
    return {'ids': item['ids'], 'mask': item['mask'], 'condition': np.asarray(latents)}

  return make


def conditions(config: ConfigDict, rec: Recipe, folder: str) -> str:
  """Captions of `latents.count` training clips and their first frames; fields condition, ids, mask."""
  batch, facts = config.latents.batch, {'seed': config.seed, 'video': dict(config.video)}
  clips, common = _clips(config, rec, 1, batch), _conditioner(config, rec)
  fields = _fields(config, rec)
  return _fill(folder, fields, config.latents.count, batch, facts, lambda n: common(clips(n)))


def latents(config: ConfigDict, rec: Recipe, folder: str) -> str:
  """Encodes `latents.count` training clips; fields latents float16 `[f h w c]`, ids, mask, for I2V condition."""
  weights.require(config, ['vae'])
  params = weights.load(config.weights.vae, 'vae', rec.vae)
  batch, facts = config.latents.batch, {'seed': config.seed, 'video': dict(config.video)}
  clips, common = _clips(config, rec, config.video.frames, batch), _conditioner(config, rec)

  def run(video):
    return codec.encode(params, over_local_devices(video), rec.vae).astype(jnp.float16)

  def make(number):
    item = clips(number)
    return {'latents': np.asarray(run(item['video']))} | common(item)

  fields = _fields(config, rec, latents=Field(recipe.latent_shape(config), 'float16'))
  return _fill(folder, fields, config.latents.count, batch, facts, make)


def given_latents(config: ConfigDict, rec: Recipe) -> str:
  """The folder of latents that were made elsewhere, as `latents` makes them.

  Raises:
    InputError: no finished store, or records of another shape.
  """
  folder = config.data.path
  have = Store(folder).fields
  wanted = _fields(config, rec, latents=Field(recipe.latent_shape(config), 'float16'))
  for name, field in wanted.items():
    if name not in have or have[name].shape != field.shape:
      found = have[name].shape if name in have else 'absent'
      raise InputError(
        f'data.path={folder}: {name} is {found}, but the config asks for {field.shape}.'
      )
  return folder


def ode_pairs(config: ConfigDict, rec: Recipe, frozen: dict, folder: str) -> str:
  """Teacher trajectories; fields trajectory float16 `[p f h w c]` (kept inputs, then the end) and ids, mask, for I2V
  condition.

  The kept levels are those of the student's schedule, which the teacher's grid contains.
  """
  keep, pairs = rec.schedule.steps[0], config.pairs
  weights.require(config, ['teacher'])
  teacher = weights.load(config.weights.teacher, 'dit', rec.teacher)
  shape = recipe.latent_shape(config)
  fields = _fields(config, rec, trajectory=Field((keep + 1, *shape), 'float16'))
  sigmas = flow.few_step_sigmas(pairs.steps, rec.schedule.shift)

  @jax.jit
  def run(teacher, frozen, batch):
    texts = conditioning(frozen, batch, rec)
    keys = flow.example_keys(jax.random.key(rec.seed), batch['index'])
    noise = flow.frame_noise(keys, jnp.arange(shape[0]), 0, shape[1:])
    apply = wan.bind(rec.teacher)
    return solvers.euler_trajectory(
      apply, teacher, noise, texts, sigmas, pairs.guidance, keep=keep
    ).astype(jnp.float16)

  common = _conditioner(config, rec)
  if rec.model.frame_channels:
    batches = _clips(config, rec, 1, pairs.batch)
  else:
    captions = functools.partial(data.captions, length=rec.text_length)
    batches = _from(captions, pairs.batch, config)

  def make(number):
    item = batches(number)
    record = common(item)
    batch = over_local_devices(record | {'index': item['index'].astype(np.int32)})
    return {'trajectory': np.asarray(run(teacher, frozen, batch))} | record

  facts = {'seed': config.seed, 'pairs': dict(pairs), 'shift': rec.schedule.shift}
  return _fill(folder, fields, pairs.count, pairs.batch, facts, make)


def causal_pairs(config: ConfigDict, rec: Recipe, frozen: dict, clean: str, folder: str) -> str:
  """Trajectories of the autoregressive model, every chunk behind the clean chunks of a real clip.

  Fields trajectory float32 `[p f h w c]` (kept inputs, the end, the clean clip), ids, mask. The model computes in
  float32 whatever the config says: 48 steps add up.

  Args:
    config: the stage.
    rec: its recipe.
    frozen: text encoder, unconditional prompt, and the model as 'ar' in float32.
    clean: store of latents.
    folder: where the pairs go.
  """
  keep, pairs, clips = rec.schedule.steps[0], config.pairs, Store(clean)
  if len(clips) < pairs.count:
    raise InputError(f'pairs.count={pairs.count} exceeds the {len(clips)} clips in {clean}.')
  shape, sigmas = (
    clips.fields['latents'].shape,
    flow.few_step_sigmas(pairs.steps, rec.schedule.shift),
  )
  cfg = dataclasses.replace(rec.teacher, dtype='float32', attention='dense')

  @jax.jit
  def run(frozen, batch):
    texts = conditioning(frozen, batch, rec)
    keys = flow.example_keys(jax.random.key(rec.seed), batch['index'])
    noise = flow.frame_noise(keys, jnp.arange(shape[0]), 0, shape[1:])
    model = functools.partial(wan.bind(cfg), frozen['ar'])
    latents = batch['latents'].astype(jnp.float32)
    velocity = forcing.guided(model, latents, texts, rec.chunking.chunk, pairs.guidance)
    kept = solvers.trajectory(velocity, noise, sigmas, keep)
    return jnp.concatenate([kept, latents[:, None]], axis=1)

  def make(number):
    rows = number * pairs.batch + np.arange(pairs.batch, dtype=np.int32)
    records = [clips[int(row)] for row in rows]
    batch = {name: np.stack([r[name] for r in records]) for name in ('latents', 'ids', 'mask')}
    trajectory = run(frozen, over_local_devices(batch | {'index': rows}))
    return {
      'trajectory': np.asarray(trajectory),
      'ids': batch['ids'],
      'mask': batch['mask'],
    }

  fields = _fields(config, rec, trajectory=Field((keep + 2, *shape), 'float32'))
  facts = {'seed': config.seed, 'pairs': dict(pairs), 'shift': rec.schedule.shift}
  return _fill(folder, fields, pairs.count, pairs.batch, facts, make)
