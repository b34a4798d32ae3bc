"""From prompts to video, whole or chunk by chunk.

  python -m salt_jax.sample --checkpoint=RUN_OR_FILE --prompt="a red sneaker moves left" --steps=4 --output=out.webp

A checkpoint is the workdir of a run, or a file that a run exported; either knows the config it was made with.
"""

import dataclasses
import functools
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jaxtyping import Array, Float, Int, Key, PyTree, UInt8
from ml_collections import ConfigDict

from salt_jax import checkpoint, cli, precompute, recipe, stages, video, weights
from salt_jax.checks import FEW_STEP, MAX_STEPS
from salt_jax.codec import decoder
from salt_jax.diffusion import flow, rollout, solvers
from salt_jax.errors import InputError
from salt_jax.models import vae, wan
from salt_jax.models.prompt import Prompt
from salt_jax.recipe import Recipe
from salt_jax.step import conditioning, to_bytes

log = logging.getLogger('salt_jax.sample')

# Draws `(ids, mask, index[, condition]) -> latents`, condition for I2V as `precompute.first_frames` makes it; the noise
# of a clip depends on its index alone, not on who samples.
Sampler = Callable[..., Float[Array, 'b f h w c']]


def keys(rec: Recipe, index: Int[Array, 'b']) -> Key[Array, 'b']:
  """Keys of the noise of some clips: what every sampler of the student and the teacher starts from."""
  return flow.example_keys(jax.random.key(rec.seed + 1), index)


def _prompts(frozen: PyTree, batch: tuple, rec: Recipe) -> tuple[Prompt, Prompt]:
  names = ('ids', 'mask', 'index', 'condition')
  return conditioning(frozen, dict(zip(names, batch, strict=False)), rec)


def student(rec: Recipe, frozen: PyTree) -> Callable[[PyTree, int], Sampler]:
  """Few-step sampling of causal students; every step count and student shares one program.

  Args:
    rec: sizes, chunking, shift.
    frozen: text encoder.

  Returns:
    `(params, steps) -> Sampler`.
  """

  @jax.jit
  def run(params, frozen, sigmas, exit_step, batch):
    plan = rollout.student_plan(rec.chunking, sigmas, exit_step)
    text, _ = _prompts(frozen, batch, rec)
    return rollout.rollout(wan.bind(rec.model), params, keys(rec, batch[2]), text, plan).x0

  def with_steps(params, steps):
    sigmas = flow.padded_sigmas(steps, rec.schedule.shift, MAX_STEPS + 1)
    return lambda *batch: run(params, frozen, sigmas, np.int32(steps - 1), batch)

  return with_steps


def teacher(
  rec: Recipe, cfg: wan.WanConfig, frozen: PyTree, shape: Sequence[int], guidance: float
) -> Callable[[PyTree, int, float], Sampler]:
  """Euler sampling of a bidirectional model with guidance: `(params, steps, shift) -> Sampler`."""

  def with_steps(params, steps, shift):
    sigmas = flow.few_step_sigmas(steps, shift)

    @jax.jit
    def run(params, frozen, batch):
      texts = _prompts(frozen, batch, rec)
      noise = flow.frame_noise(keys(rec, batch[2]), jnp.arange(shape[0]), 0, tuple(shape[1:]))
      return solvers.euler_sample(wan.bind(cfg), params, noise, texts, sigmas, guidance)

    return lambda *batch: run(params, frozen, batch)

  return with_steps


def autoregressive(
  rec: Recipe, frozen: PyTree, guidance: float
) -> Callable[[PyTree, int], Sampler]:
  """Many-step sampling of an autoregressive model, chunk after chunk: Euler with guidance.

  Prompt and unconditional prompt are one batch of twice the size, so each has its own cache.

  Args:
    rec: sizes, chunking, shift.
    frozen: text encoder and the unconditional prompt.
    guidance: as uncond + guidance (cond - uncond).

  Returns:
    `(params, steps) -> Sampler`.
  """
  rec = dataclasses.replace(rec, chunking=dataclasses.replace(rec.chunking, mode='ode'))

  def guided(params, x, t, text, ctx):
    v, features = wan.apply(params, x, t, text, ctx, rec.model)
    v = flow.guide(*jnp.split(v, 2), guidance)
    return jnp.concatenate([v, v]), features

  def with_steps(params, steps):
    @jax.jit
    def run(params, frozen, batch):
      both = jnp.concatenate([keys(rec, batch[2])] * 2)
      plan = recipe.full_plan(rec, steps)
      texts = flow.paired(*_prompts(frozen, batch, rec))
      return rollout.rollout(guided, params, both, texts, plan).x0[: len(batch[0])]

    return lambda *batch: run(params, frozen, batch)

  return with_steps


@functools.partial(jax.jit, static_argnames=('cfg', 'first'))
def show(
  params: PyTree,
  latents: Float[Array, 'b f h w c'],
  features: PyTree,
  cfg: vae.VAEConfig,
  first: bool,
) -> tuple[UInt8[Array, 'b t h w 3'], PyTree]:
  """The next part of a video in uint8, and what the decoder carries on; arguments as `vae.decode_chunk`."""
  pixels, features = vae.decode_chunk(params, latents, features, cfg, first)
  return to_bytes(pixels), features


def stream(
  rec: Recipe, params: PyTree, frozen: PyTree, vae_params: PyTree, batch: tuple, steps: int
) -> Iterator[UInt8[np.ndarray, 'b t h w 3']]:
  """Yields pixel frames as chunks are ready: 9 for the first chunk of 3 latents, 12 for each other.

  The cache holds what a chunk can see and no more; a window makes its size independent of the length.
  """
  index, chunking = batch[2], rec.chunking
  plan = recipe.full_plan(rec, steps)
  text, _ = jax.jit(lambda f, b: _prompts(f, b, rec))(frozen, tuple(batch))
  cache = rollout.empty_cache(chunking, len(index), streaming=True)
  shape = chunking.latent
  features = vae.init_decode_cache(rec.vae, len(index), shape[0], shape[1])

  @jax.jit
  def generate(params, text, index, cache, start):
    x0, _, cache = rollout.denoise_chunk(
      wan.bind(rec.model), params, keys(rec, index), text, plan, (cache, start)
    )
    return x0, cache

  for start in range(0, chunking.frames, chunking.chunk):
    x0, cache = generate(params, text, index, cache, np.int32(start))
    pixels, features = show(vae_params, x0, features, rec.vae, start == 0)
    yield np.asarray(pixels)


def load(path: str) -> tuple[ConfigDict, Recipe, PyTree]:
  """The averaged generator of a run or an exported file, and the config that made it.

  Raises:
    InputError: nothing there, damaged, or of a stage without a few-step student.
  """
  if os.path.isdir(path):
    config = _config_of_run(path)
    rec = _student_recipe(config, path)
    like = {'generator': weights.shapes('dit', rec.model)}
    mesh_of_one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=mesh_of_one), like
    )
    return config, rec, checkpoint.restore_ema(os.path.join(path, 'checkpoints'), like)['generator']
  config = weights.config_of(weights.resolve(path))
  if path.startswith('assets:'):
    config.weights.update(weights.shipped(config.weights))
  rec = _student_recipe(config, path)
  return config, rec, weights.load(path, 'dit', rec.model)


def _config_of_run(path: str) -> ConfigDict:
  file = os.path.join(path, 'config.json')
  if not os.path.isfile(file):
    raise InputError(
      f'{path} has no config.json: pass the workdir of a run that has saved a checkpoint.'
    )
  with open(file, encoding='utf-8') as f:
    text = f.read()
  try:
    return ConfigDict(json.loads(text), convert_dict=True)
  except ValueError as error:
    raise InputError(f'{file} is damaged ({error}): pass a file that the run exported.') from error


def _student_recipe(config: ConfigDict, path: str) -> Recipe:
  if 'stage' not in config:
    raise InputError(f'{path} is no run of salt_jax: its config names no stage.')
  if config.stage not in FEW_STEP:
    raise InputError(
      f'{path} was made by the stage "{config.stage}", which has no few-step student.'
    )
  return recipe.build(config)


def define_flags() -> None:
  flags.DEFINE_string('checkpoint', None, 'Workdir of a run, an exported file, or assets:NAME.')
  flags.DEFINE_multi_string('prompt', [], 'What to show; may be given several times.')
  flags.DEFINE_string('image', None, 'First frame of the clips, for an image-to-video student.')
  flags.DEFINE_integer('steps', 4, f'Denoising steps a chunk, 1 to {MAX_STEPS}.')
  flags.DEFINE_integer(
    'seed', 0, 'Number of the first noise.', lower_bound=0, upper_bound=2**31 - 1000
  )
  flags.DEFINE_string(
    'output', 'out.webp', 'File to write: .webp, .gif or .png; several prompts are numbered.'
  )
  flags.DEFINE_bool(
    'stream', False, 'Generate and decode chunk by chunk, and say when each is ready.'
  )


def _check(args) -> None:
  if not args.checkpoint:
    raise InputError(
      'pass --checkpoint: the workdir of a run, an exported file, or assets:nano_student.safetensors.'
    )
  if not args.prompt:
    raise InputError('pass at least one --prompt.')
  if not 1 <= args.steps <= MAX_STEPS:
    raise InputError(f'--steps={args.steps} must be between 1 and {MAX_STEPS}.')
  if os.path.splitext(args.output)[1].lower() not in video.SUFFIXES:
    raise InputError(f'--output={args.output} must end in one of {", ".join(video.SUFFIXES)}.')
  cli.check_folder('output', os.path.dirname(args.output))


def first_image(
  path: str | None, config: ConfigDict, rec: Recipe
) -> UInt8[np.ndarray, 'h w 3'] | None:
  """The picture that an I2V student begins with.

  Raises:
    InputError: the student takes none or wants one, or it is no picture, or of another size.
  """
  if not rec.model.frame_channels:
    if path:
      raise InputError(f'--image={path} has no use: this student is given text alone.')
    return None
  size = config.video.height, config.video.width
  if not path:
    raise InputError(
      f'pass --image: this student continues a picture of {size[1]}x{size[0]} pixels.'
    )
  image = video.read_image(path)
  if image.shape[:2] != size:
    raise InputError(
      f'--image={path} is {image.shape[1]}x{image.shape[0]}: scale it to {size[1]}x{size[0]} pixels.'
    )
  return image


def program() -> None:
  args = flags.FLAGS
  _check(args)
  config, rec, params = load(args.checkpoint)
  image = first_image(args.image, config, rec)
  frozen = stages.serving(config, rec, 'text', 'vae')
  ids, mask = stages.tokenizer(config, rec)(list(args.prompt))
  batch = ids, mask, args.seed + np.arange(len(ids), dtype=np.int32)
  if image is not None:
    first = np.broadcast_to(image, (len(ids), 1, *image.shape))
    batch += (precompute.first_frames(rec, config.video.frames)(frozen['vae'], first),)
  began = time.monotonic()
  if args.stream:
    parts = []
    for part in stream(rec, params, frozen, frozen['vae'], batch, args.steps):
      parts.append(part)
      log.info('%d frames after %.2f s', sum(p.shape[1] for p in parts), time.monotonic() - began)
    videos = np.concatenate(parts, axis=1)
  else:
    videos = decoder(rec, frozen['vae'])(student(rec, frozen)(params, args.steps)(*batch))
  log.info('%d clips in %.1f s, compilation included', len(videos), time.monotonic() - began)
  root, suffix = os.path.splitext(args.output)
  for i, clip in enumerate(videos):
    path = args.output if len(videos) == 1 else f'{root}-{i}{suffix}'
    video.write(path, clip, config.video.fps)
    log.info('wrote %s', path)


if __name__ == '__main__':
  cli.run(program, define_flags)
