"""From prompts to video, whole or chunk by chunk, with a few-step student or a many-step teacher.

  python -m salt_jax.sample --checkpoint=RUN_OR_FILE --prompt="a red sneaker moves left" --steps=4 --output=out.webp
  python -m salt_jax.sample --checkpoint=TEACHER --sampler=unipc --prompt="a red sneaker moves left" --output=out.mp4

A checkpoint is the workdir of a run, or a file that a run exported; either knows the config it was made with. For any
other file in Wan's names, --config says what it is.
"""

import dataclasses
import functools
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

from salt_jax import cli, generate, precompute, recipe, stages, video, weights
from salt_jax import teacher as teacher_model
from salt_jax.checks import MAX_STEPS
from salt_jax.diffusion import flow, rollout, solvers
from salt_jax.errors import InputError
from salt_jax.generate import STEPS, Generator
from salt_jax.loading import first_image, load, load_teacher
from salt_jax.models import vae, wan
from salt_jax.models.prompt import Prompt
from salt_jax.recipe import Recipe
from salt_jax.sharding import on_local_devices
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


def generator(args: flags.FlagValues, prompts: Sequence[str], seed: int | None = None) -> Generator:
  """Loads what the flags name.

  Args:
    args: of `define_flags`.
    prompts: what will be asked for, to be refused before anything is compiled.
    seed: of the noise; by default the one that the network was trained with.

  Raises:
    InputError: a checkpoint or an image that does not fit the sampler, or a prompt that cannot be read.
  """
  given = args.config if cli.config_is_given() else None
  many = args.sampler != 'student'
  if many:
    config, rec, cfg, networks = load_teacher(args.checkpoint, given)
  else:
    config, rec, params = load(args.checkpoint, given)
    cfg, networks = rec.model, {'dit': params}
  rec = rec if seed is None else dataclasses.replace(rec, seed=seed)
  image = first_image(args.image, config, rec)
  stages.tokenizer(config, rec)(list(prompts))
  frozen = stages.serving(config, rec, 'vae', *({'text'} - networks.keys()))
  frozen |= {
    'text': weights.narrowed(networks.get('text', frozen.get('text')), rec.text.dtype)
  } | _negative(args, config, rec)
  params = weights.narrowed(networks['dit'], cfg.dtype) if many else networks['dit']
  params, frozen = on_local_devices((params, frozen))
  if many:
    chosen = teacher_model.settings(args, config)
    run = teacher_model.sampler(rec, cfg, frozen, recipe.latent_shape(config))(params, chosen)
    protocol = dataclasses.asdict(chosen) | {'negative': args.negative or 'default'}
  else:
    run = student(rec, frozen)(params, args.steps or STEPS)
    protocol = {'solver': 'student', 'steps': args.steps or STEPS}
  made = {'generator': params, 'text': frozen['text'], 'vae': frozen['vae']}
  return Generator(
    config, rec, made, generate.drawer(config, rec, run, frozen['vae'], image), protocol
  )


def _negative(args, config: ConfigDict, rec: Recipe) -> dict:
  if not args.negative:
    return {}
  ids, mask = stages.tokenizer(config, rec)([args.negative])
  return {'negative': {'ids': np.asarray(ids), 'mask': np.asarray(mask)}}


def define_flags() -> None:
  cli.define_config('What a file is that does not say so itself.')
  flags.DEFINE_string('checkpoint', None, 'Workdir of a run, an exported file, or assets:NAME.')
  flags.DEFINE_multi_string('prompt', [], 'What to show; may be given several times.')
  generate.define_flags(1)
  flags.DEFINE_string(
    'output',
    'out.webp',
    'File to write: .webp, .gif, .png or .mp4; several clips are numbered.',
  )
  flags.DEFINE_bool(
    'stream', False, 'Generate and decode chunk by chunk, and say when each is ready.'
  )


def _check(args) -> None:
  generate.check(args)
  if not args.prompt:
    raise InputError('pass at least one --prompt.')
  video.check_suffix('--output=', args.output)
  if args.stream and (args.sampler != 'student' or args.samples > 1 or args.multihost):
    raise InputError(
      '--stream is for one clip a prompt of a student in one process: leave out --sampler, --samples and --multihost.'
    )
  cli.check_folder('output', os.path.dirname(args.output))


def program() -> None:
  args = flags.FLAGS
  _check(args)
  generate.join(args)
  if args.stream:
    _stream(args)
    return
  made = generator(args, args.prompt)
  prompts = [prompt for prompt in args.prompt for _ in range(args.samples)]
  began = time.monotonic()
  mine = [(number, prompts[number]) for number in generate.share(len(prompts))]
  for number, clip in generate.clips(made, mine, args.batch, args.seed):
    path = _path(args.output, number, len(prompts))
    video.write(path, clip, made.config.video.fps)
    log.info('wrote %s after %.1f s', path, time.monotonic() - began)


def _path(output: str, number: int, count: int) -> str:
  root, suffix = os.path.splitext(output)
  return output if count == 1 else f'{root}-{number}{suffix}'


def _stream(args: flags.FlagValues) -> None:
  config, rec, params = load(args.checkpoint, args.config if cli.config_is_given() else None)
  image = first_image(args.image, config, rec)
  frozen = stages.serving(config, rec, 'text', 'vae')
  ids, mask = stages.tokenizer(config, rec)(list(args.prompt))
  batch = ids, mask, args.seed + np.arange(len(ids), dtype=np.int32)
  if image is not None:
    first = np.broadcast_to(image, (len(ids), 1, *image.shape))
    batch += (precompute.first_frames(rec, config.video.frames)(frozen['vae'], first),)
  began = time.monotonic()
  parts = []
  for part in stream(rec, params, frozen, frozen['vae'], batch, args.steps or STEPS):
    parts.append(part)
    log.info('%d frames after %.2f s', sum(p.shape[1] for p in parts), time.monotonic() - began)
  for i, clip in enumerate(np.concatenate(parts, axis=1)):
    path = _path(args.output, i, len(ids))
    video.write(path, clip, config.video.fps)
    log.info('wrote %s', path)


if __name__ == '__main__':
  cli.run(program, define_flags)
