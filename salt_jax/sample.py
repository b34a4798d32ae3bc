"""From prompts to video, whole or chunk by chunk, with a few-step student or a many-step teacher.

  python -m salt_jax.sample --checkpoint=RUN_OR_FILE --prompt="a red sneaker moves left" --steps=4 --output=out.webp
  python -m salt_jax.sample --checkpoint=TEACHER --sampler=unipc --prompt="a red sneaker moves left" --output=out.mp4
  python -m salt_jax.sample --checkpoint=RUN_OR_FILE --stream --frames=84 --switch_at=42 \
    --prompt="a red sneaker moves left" --prompt="a red sneaker moves up"

A checkpoint is the workdir of a run, or a file that a run exported; either knows the config it was made with. For any
other file in Wan's names, --config says what it is.
"""

import dataclasses
import functools
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key, PyTree, UInt8
from ml_collections import ConfigDict

from salt_jax import (
  cli,
  codec,
  generate,
  hosts,
  images,
  precompute,
  recipe,
  sharding,
  stages,
  video,
  weights,
)
from salt_jax import teacher as teacher_model
from salt_jax.checks import MAX_STEPS
from salt_jax.diffusion import flow, rollout, solvers, streaming
from salt_jax.errors import InputError
from salt_jax.generate import STEPS, Generator
from salt_jax.loading import fitted, given_pictures, load, load_teacher
from salt_jax.models import rope, wan
from salt_jax.models.prompt import Prompt
from salt_jax.recipe import Recipe
from salt_jax.step import conditioning

log = logging.getLogger('salt_jax.sample')

# Draws `(ids, mask, index[, condition[, image]]) -> latents`, for I2V with what `precompute.given` makes; the noise
# of a clip depends on its index alone, not on who samples.
Sampler = Callable[..., Float[Array, 'b f h w c']]


def keys(rec: Recipe, index: Int[Array, 'b']) -> Key[Array, 'b']:
  """Keys of the noise of some clips: what every sampler of the student and the teacher starts from."""
  return flow.example_keys(jax.random.key(rec.seed + 1), index)


def encoded(frozen: PyTree, batch: tuple, rec: Recipe) -> tuple[Prompt, Prompt]:
  """(prompts, unconditional prompts) of a batch of a Sampler."""
  names = ('ids', 'mask', 'index', 'condition', 'image')
  return conditioning(frozen, dict(zip(names, batch, strict=False)), rec)


def few_step(rec: Recipe) -> Callable[..., Float[Array, 'b f h w c']]:
  """The program of `student`: `(params, frozen, sigmas, exit step, batch of a Sampler) -> latents`."""

  def run(params, frozen, sigmas, exit_step, batch):
    plan = rollout.student_plan(rec.chunking, sigmas, exit_step)
    text, _ = encoded(frozen, batch, rec)
    return rollout.rollout(wan.bind(rec.model), params, keys(rec, batch[2]), text, plan).x0

  return run


def student(rec: Recipe, frozen: PyTree) -> Callable[[PyTree, int], Sampler]:
  """Few-step sampling of causal students; every step count and student shares one program.

  Args:
    rec: sizes, chunking, shift.
    frozen: text encoder.

  Returns:
    `(params, steps) -> Sampler`.
  """
  run = jax.jit(few_step(rec))

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
      texts = encoded(frozen, batch, rec)
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
      texts = flow.paired(*encoded(frozen, batch, rec))
      return rollout.rollout(guided, params, both, texts, plan).x0[: len(batch[0])]

    return lambda *batch: run(params, frozen, batch)

  return with_steps


class Switch(NamedTuple):
  """A prompt that takes over at the first chunk that starts at a latent frame or behind it.

  Attributes:
    frame: of the video.
    ids, mask: the tokenised prompt.
    global_sink: whether the sink stays as the prompt before made it.
  """

  frame: int
  ids: Int[np.ndarray, 'b n']
  mask: Bool[np.ndarray, 'b n']
  global_sink: bool = True


def stream(
  rec: Recipe,
  params: PyTree,
  frozen: PyTree,
  vae_params: PyTree,
  batch: tuple,
  steps: int,
  switches: Sequence[Switch] = (),
) -> Iterator[UInt8[np.ndarray, 'b t h w 3']]:
  """Yields pixel frames as chunks are ready: 9 for the first chunk of 3 latents, 12 for each other.

  The cache holds what a chunk can see and no more; a window makes its size independent of the length, and as many
  latents are kept, for a switch. Switches are in the order of their frames.
  """
  index, chunking = batch[2], rec.chunking
  plan, apply = recipe.full_plan(rec, steps), wan.bind(rec.model)
  encode = jax.jit(lambda f, b: encoded(f, b, rec)[0])
  text = encode(frozen, tuple(batch))
  cache = streaming.empty_cache(chunking, len(index))
  noise, shape, features = keys(rec, index), chunking.latent, {}

  @functools.partial(jax.jit, static_argnames='global_sink')
  def recache(params, cache, latents, text, start, global_sink):
    noise = chunking.context_noise
    return streaming.recache(
      apply, params, cache, latents, text, start, global_sink=global_sink, context_noise=noise
    )

  last, waiting = jnp.zeros((len(index), 0, *shape)), list(switches)
  for start in range(0, chunking.frames, chunking.chunk):
    if waiting and start >= waiting[0].frame:
      switch = waiting.pop(0)
      text = encode(frozen, (switch.ids, switch.mask, *batch[2:]))
      first = np.int32(start - last.shape[1])
      cache = recache(params, cache, last, text, first, global_sink=switch.global_sink)
    x0, cache = streaming.next_chunk(apply, params, noise, text, plan, cache, np.int32(start))
    if waiting:
      last = jnp.concatenate([last, x0], axis=1)[:, -(chunking.window or chunking.frames) :]
    pixels, features = codec.decode_next(vae_params, x0, features, rec.vae, start == 0)
    yield pixels


def lengthened(config: ConfigDict, rec: Recipe, frames: int | None) -> Recipe:
  """The recipe for another number of latent frames; says what a cache that keeps all of them costs.

  Raises:
    InputError: frames that the student cannot make.
  """
  trained, chunk = rec.chunking.frames, rec.chunking.chunk
  if frames is None or frames == trained:
    return rec
  if not rec.chunking.causal:
    raise InputError(
      f'--frames={frames}: this student is bidirectional and makes {trained} frames.'
    )
  if rec.model.frame_channels:
    raise InputError(
      f'--frames={frames}: a student that is given a picture makes {trained} frames.'
    )
  if frames < 1 or frames % chunk:
    near = max(1, round(frames / chunk)) * chunk
    raise InputError(f'--frames={frames} does not divide into chunks of {chunk}: choose {near}.')
  if frames > rope.MAX_FRAMES:
    raise InputError(f'--frames={frames} exceeds the {rope.MAX_FRAMES} positions of RoPE.')
  chunking = recipe.chunking(config, frames)
  if chunking.window is None:
    size = 2 * math.prod(chunking.cache) * jnp.dtype(chunking.dtype).itemsize * frames / 2**20
    log.warning(
      'This student has no window: its cache keeps all %d frames, %.0f MiB a clip.', frames, size
    )
  return dataclasses.replace(rec, chunking=chunking)


def _check_switches(frames: list[int], rec: Recipe) -> None:
  """Every switch finds a chunk of its own to begin with."""
  chunking = rec.chunking
  if frames and chunking.chunk >= chunking.frames:
    raise InputError(f'--switch_at={frames[0]}: a clip of a single chunk cannot change its prompt.')
  starts = [-(-frame // chunking.chunk) * chunking.chunk for frame in frames]
  for frame, start, before in zip(frames, starts, [0, *starts], strict=False):
    if start >= chunking.frames:
      raise InputError(
        f'--switch_at={frame} is beyond the last chunk of {chunking.frames} latent frames, which starts at '
        f'{chunking.frames - chunking.chunk}: switch there at the latest, or give more --frames.'
      )
    if start <= before:
      raise InputError(
        f'--switch_at={frame} must be behind frame {before}, where the prompt before it begins.'
      )


def generator(
  args: flags.FlagValues, prompts: Sequence[str], seed: int | None = None, continues: bool = True
) -> Generator:
  """Loads what the flags name.

  Args:
    args: of `define_flags`.
    prompts: what will be asked for, to be refused before anything is compiled.
    seed: of the noise; by default the one that the network was trained with.
    continues: whether a network that continues a picture is of use.

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
  if cfg.frame_channels and not continues:
    raise InputError(
      f'{args.checkpoint} continues a picture, and the prompts of --vbench come without: pass a text-to-video network.'
    )
  pictures = given_pictures((args.image, args.last_image), config, rec)
  if pictures:
    config, rec, known = fitted(config, rec, *pictures)
  rec = rec if seed is None else dataclasses.replace(rec, seed=seed)
  names = 'vae', *({'text'} - networks.keys())
  weights.require(config, names)
  stages.tokenizer(config, rec)(list(prompts))
  given_image = _given(config, rec, known, pictures) if pictures else ()
  frozen = stages.serving(config, rec, *names)
  frozen |= {'text': networks.get('text', frozen.get('text'))} | _negative(args, config, rec)
  mesh, params, frozen = placed(config, networks['dit'], frozen)
  if many:
    chosen = teacher_model.settings(args, config)
    run = teacher_model.sampler(rec, cfg, frozen, recipe.latent_shape(config))(params, chosen)
    protocol = dataclasses.asdict(chosen) | {'negative': args.negative or 'default'}
  else:
    run = student(rec, frozen)(params, args.steps or STEPS)
    protocol = {'solver': 'student', 'steps': args.steps or STEPS}
  made = {'generator': params, 'text': frozen['text'], 'vae': frozen['vae']}
  draw = generate.drawer(rec, run, frozen['vae'], given_image, mesh)
  return Generator(config, rec, made, draw, protocol)


def placed(config: ConfigDict, params: PyTree, frozen: dict) -> tuple[Mesh, PyTree, dict]:
  """A mesh of this process's devices, and over it a DiT and what serves it, by the config's rules but the VAE whole."""
  mesh = sharding.local_mesh(config.mesh)
  rest = {name: x for name, x in frozen.items() if name != 'vae'}
  given = rest | {'generator': params}
  split = sharding.split_locally(given, mesh, config.rules, config.shard_min_size)
  vae = jax.device_put(frozen['vae'], sharding.replicated(mesh))
  return mesh, split.pop('generator'), split | {'vae': vae}


def _given(config: ConfigDict, rec: Recipe, known: Array, pictures: Sequence) -> tuple[Array, ...]:
  """What a batch of one clip is given of pictures: CLIP sees them whole, but the last in the shape of the first, the
  VAE as they were `fitted`."""
  seen = [images.cropped(picture, pictures[0].shape[:2])[None] for picture in pictures]
  return tuple(precompute.given(config, rec)(known, seen).values())


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
  flags.DEFINE_integer('frames', None, 'Latent frames of a stream; by default of a trained clip.')
  flags.DEFINE_multi_integer(
    'switch_at',
    [],
    'Latent frame of a stream from which the next --prompt holds; one for each but the first.',
  )
  flags.DEFINE_bool(
    'global_sink', True, 'Whether the first frames stay visible as the first prompt made them.'
  )


def _check(args) -> None:
  generate.check(args)
  if not args.prompt:
    raise InputError('pass at least one --prompt.')
  video.check_suffix('--output=', args.output)
  _check_stream(args)
  cli.check_folder('output', os.path.dirname(args.output))


def _check_stream(args) -> None:
  if args.stream and (args.sampler != 'student' or args.samples > 1 or args.multihost):
    raise InputError(
      '--stream is for one clip a prompt of a student in one process: leave out --sampler, --samples and --multihost.'
    )
  if not args.stream and (args.frames is not None or args.switch_at):
    raise InputError('--frames and --switch_at need --stream, which goes on chunk by chunk.')
  if args.switch_at and len(args.switch_at) != len(args.prompt) - 1:
    raise InputError(
      f'{len(args.prompt)} prompts need {len(args.prompt) - 1} of --switch_at, not {len(args.switch_at)}: '
      'one for each prompt but the first.'
    )


def program() -> None:
  args = flags.FLAGS
  _check(args)
  if args.stream:
    _stream(args)
    return
  with hosts.joined(args):
    _write(args)


def _write(args: flags.FlagValues) -> None:
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
  rec = lengthened(config, rec, args.frames)
  _check_switches(args.switch_at, rec)
  pictures = given_pictures((args.image, args.last_image), config, rec)
  if pictures:
    config, rec, known = fitted(config, rec, *pictures)
  frozen = stages.serving(config, rec, 'text', 'vae')
  mesh, params, frozen = placed(config, params, frozen)
  ids, mask = stages.tokenizer(config, rec)(list(args.prompt))
  switches = [
    Switch(frame, ids[i : i + 1], mask[i : i + 1], args.global_sink)
    for i, frame in enumerate(args.switch_at, 1)
  ]
  count = 1 if switches else len(ids)
  batch = ids[:count], mask[:count], args.seed + np.arange(count, dtype=np.int32)
  if pictures:
    fields = _given(config, rec, known, pictures)
    batch += tuple(np.repeat(np.asarray(x), count, axis=0) for x in fields)
  began = time.monotonic()
  parts = []
  with jax.set_mesh(mesh):
    for part in stream(rec, params, frozen, frozen['vae'], batch, args.steps or STEPS, switches):
      parts.append(part)
      log.info('%d frames after %.2f s', sum(p.shape[1] for p in parts), time.monotonic() - began)
  for i, clip in enumerate(np.concatenate(parts, axis=1)):
    path = _path(args.output, i, count)
    video.write(path, clip, config.video.fps)
    log.info('wrote %s', path)


if __name__ == '__main__':
  cli.run(program, define_flags)
