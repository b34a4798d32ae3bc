"""What is computed once and kept: latents of clips and trajectories of the teacher in a stage's workdir, and texts.

  python -m salt_jax.precompute --config=configs/selfforcing.py:1.3b --prompts=prompts.txt --output=texts

is `precompute_cli`. Each process writes the shards whose number is its own modulo the process count; a killed run goes
on at the first missing shard.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from salt_jax import codec, data, images, recipe, tokens, weights
from salt_jax.diffusion import flow, forcing, solvers
from salt_jax.errors import InputError
from salt_jax.models import clip, wan
from salt_jax.recipe import Recipe
from salt_jax.sharding import local_mesh, over_local_devices, split_locally
from salt_jax.step import conditioning, to_unit
from salt_jax.store import Field, Store, fill


def _shards(count: int, shard: int) -> int:
  if count % shard:
    raise InputError(
      f'{count} records do not divide into shards of {shard}: change count or batch.'
    )
  return count // shard


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
  """`(VAE parameters, uint8 known frames [b k h w 3]) -> float16 [b f h w z]`: a batch's field `condition`.

  They are the latents of a video of `frames` that is grey but for these (`codec.encode_known`).
  """
  return lambda params, first: codec.encode_known(params, first, frames, rec.vae).astype(
    jnp.float16
  )


def image_rows(rec: Recipe) -> Callable:
  """`(CLIP parameters, uint8 pictures [b h w 3]) -> float16 [b rows d]`: a batch's field `image`.

  The tower is one program, whatever shape the pictures have.
  """
  encode = jax.jit(lambda params, x: clip.encode(params, x, rec.clip).astype(jnp.float16))
  return lambda params, pictures: encode(
    params, images.clip_pixels(to_unit(pictures), rec.clip.size)
  )


def given(config: ConfigDict, rec: Recipe) -> Callable[..., dict]:
  """`(uint8 known frames [b k h w 3], k pictures [b h w 3] if CLIP is to see others) -> fields of a batch`.

  They are `condition`, and `image` if the model takes rows of CLIP, of first and last frame one behind the other; for
  T2V there are none.

  Raises:
    InputError: a missing, damaged or other-sized file.
  """
  if not rec.model.frame_channels:
    return lambda first, pictures=None: {}
  weights.require(config, ('vae', 'clip') if rec.model.image_dim else ('vae',))
  vae_params = jax.device_put(weights.load(config.weights.vae, 'vae', rec.vae))
  encode = first_frames(rec, config.video.frames)
  if not rec.model.image_dim:
    return lambda first, pictures=None: {'condition': encode(vae_params, first)}
  clip_params = jax.device_put(weights.load(config.weights.clip, 'clip', rec.clip))
  see = image_rows(rec)

  def both(first, pictures=None):
    pictures = jnp.moveaxis(first, 1, 0) if pictures is None else pictures
    rows = [see(clip_params, picture) for picture in pictures]
    return {'condition': encode(vae_params, first), 'image': jnp.concatenate(rows, axis=1)}

  return both


def fields_of(config: ConfigDict, rec: Recipe, **own: Field) -> dict[str, Field]:
  """A store's own fields, the prompts, and for I2V what conditions on the first frame."""
  length = rec.text_length
  fields = own | {'ids': Field((length,), 'int32'), 'mask': Field((length,), 'bool')}
  if rec.model.frame_channels:
    fields['condition'] = Field(recipe.latent_shape(config), 'float16')
  if rec.model.image_dim:
    fields['image'] = Field((rec.model.image_len, rec.clip.dim), 'float16')
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
  fields = given(config, rec)

  def make(item):
    found = fields(over_local_devices(item['video'][:, :1]))
    return {'ids': item['ids'], 'mask': item['mask']} | jax.tree.map(np.asarray, found)

  return make


def _taken(names: tuple[str, ...], item: dict) -> dict:
  return {name: item[name] for name in names}


def conditions(config: ConfigDict, rec: Recipe, folder: str) -> str:
  """Captions of `latents.count` training clips and their first frames; fields condition, ids, mask."""
  batch, facts = config.latents.batch, {'seed': config.seed, 'video': dict(config.video)}
  clips, common = _clips(config, rec, 1, batch), _conditioner(config, rec)
  fields = fields_of(config, rec)
  return fill(
    folder, fields, _shards(config.latents.count, batch), facts, lambda n: common(clips(n))
  )


def latents(config: ConfigDict, rec: Recipe, folder: str) -> str:
  """Encodes `latents.count` training clips; fields latents float16 `[f h w c]`, ids, mask, for I2V condition, image."""
  weights.require(config, ['vae'])
  params = weights.load(config.weights.vae, 'vae', rec.vae)
  batch, facts = config.latents.batch, {'seed': config.seed, 'video': dict(config.video)}
  clips, common = _clips(config, rec, config.video.frames, batch), _conditioner(config, rec)

  def run(video):
    return codec.encode(params, over_local_devices(video), rec.vae).astype(jnp.float16)

  def make(number):
    item = clips(number)
    return {'latents': np.asarray(run(item['video']))} | common(item)

  fields = fields_of(config, rec, latents=Field(recipe.latent_shape(config), 'float16'))
  return fill(folder, fields, _shards(config.latents.count, batch), facts, make)


def given_store(config: ConfigDict, rec: Recipe, **own: Field) -> str:
  """The folder of the config's store, of another run or of `image_store`: fields as of `conditions`, and a stage's own.

  Raises:
    InputError: no finished store, records of another shape, or prompts of another tokenizer or frames of another rate
      than the config's.
  """
  folder = config.data.path
  store = Store(folder)
  have = store.fields
  for name, field in fields_of(config, rec, **own).items():
    if name not in have or have[name].shape != field.shape:
      found = have[name].shape if name in have else 'absent'
      raise InputError(
        f'data.path={folder}: {name} is {found}, but the config asks for {field.shape}.'
      )
  made = store.config.get('tokenizer')
  if made is not None and made != tokens.tokenizer(config, rec).digest:
    raise InputError(
      f'data.path={folder} was made with another tokenizer than that of the config: encode the prompts again, or set '
      'weights.tokenizer back.'
    )
  rate = store.config.get('video', {}).get('fps', config.video.fps)
  if rate != config.video.fps:
    raise InputError(
      f'data.path={folder} was made at {rate} frames a second, and video.fps is {config.video.fps}: encode it again, '
      f'or set --config.video.fps={rate}.'
    )
  return folder


def given_latents(config: ConfigDict, rec: Recipe) -> str:
  """The same of latents, as `latents` makes them."""
  return given_store(config, rec, latents=Field(recipe.latent_shape(config), 'float16'))


def ode_pairs(
  config: ConfigDict,
  rec: Recipe,
  frozen: dict,
  folder: str,
  prompts: Callable[[data.Feed], Iterator] | None,
) -> str:
  """Teacher trajectories; fields trajectory float16 `[p f h w c]` (kept inputs, then the end) and ids, mask, for I2V
  condition and image.

  The kept levels are those of the student's schedule, which the teacher's grid contains.

  Args:
    config: the stage.
    rec: its recipe.
    frozen: text encoder and unconditional prompt.
    folder: where the pairs go.
    prompts: batches of tokenised prompts, for I2V with what is given; None reads clips.
  """
  keep, pairs = rec.schedule.steps[0], config.pairs
  weights.require(config, ['teacher'])
  mesh = local_mesh(config.mesh)
  teacher = weights.load_narrowed(config.weights.teacher, 'dit', rec.teacher)
  served = {'teacher': teacher, 'frozen': frozen}
  served = split_locally(served, mesh, config.rules, config.shard_min_size)
  shape = recipe.latent_shape(config)
  fields = fields_of(config, rec, trajectory=Field((keep + 1, *shape), 'float16'))
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

  if prompts is None:
    batches, common = _clips(config, rec, 1, pairs.batch), _conditioner(config, rec)
  else:
    batches = _from(prompts, pairs.batch, config)
    common = functools.partial(_taken, tuple(fields_of(config, rec)))

  def make(number):
    item = batches(number)
    record = common(item)
    given = {name: x for name, x in item.items() if name not in ('video', 'row')}
    batch = over_local_devices(given | record | {'index': item['index'].astype(np.int32)}, mesh)
    with jax.set_mesh(mesh):
      trajectory = np.asarray(run(**served, batch=batch))
    return {'trajectory': trajectory} | record

  facts = {'seed': config.seed, 'pairs': dict(pairs), 'shift': rec.schedule.shift}
  return fill(folder, fields, _shards(pairs.count, pairs.batch), facts, make)


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
    raise InputError(
      f'pairs.count={pairs.count} exceeds the {len(clips)} clips in {clean}: set --config.pairs.count, a multiple of '
      f'{pairs.batch}.'
    )
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

  fields = fields_of(config, rec, trajectory=Field((keep + 2, *shape), 'float32'))
  facts = {'seed': config.seed, 'pairs': dict(pairs), 'shift': rec.schedule.shift}
  return fill(folder, fields, _shards(pairs.count, pairs.batch), facts, make)


if __name__ == '__main__':
  from salt_jax import cli, precompute_cli

  cli.run(precompute_cli.program, precompute_cli.define_flags)
