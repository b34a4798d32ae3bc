"""Numbered clips of many prompts, batch after batch, by this process's share of the work; and the flags for it."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from absl import flags
from jax.sharding import Mesh
from jaxtyping import Array, PyTree, UInt8
from ml_collections import ConfigDict

from salt_jax import codec, hosts, stages, teacher
from salt_jax.checks import MAX_STEPS
from salt_jax.diffusion import multistep
from salt_jax.errors import InputError
from salt_jax.recipe import Recipe
from salt_jax.sharding import over_local_devices

STEPS = 4  # of a student, by default


class Generator(NamedTuple):
  """A network that is ready to sample, and what a report says of it.

  Attributes:
    config: what made it.
    rec: its recipe.
    networks: generator, text encoder and VAE.
    draw: `(ids, mask, index) -> uint8 videos [b t h w 3]`.
    protocol: sampler, steps and, for a teacher, guidance, shift and negative prompt.
  """

  config: ConfigDict
  rec: Recipe
  networks: dict[str, PyTree]
  draw: Callable
  protocol: dict


def drawer(
  rec: Recipe, run: Callable, vae_params: PyTree, given: tuple[Array, ...], mesh: Mesh
) -> Callable:
  """Sampling and decoding over the local devices, a clip a device decoded at once.

  Args:
    rec: sizes of the VAE.
    run: sampler of latents.
    vae_params: of the VAE.
    given: for I2V the fields of `precompute.given` of one clip `[1 ...]`, which all clips share.
    mesh: of the local devices, that the parameters of `run` lie over.
  """
  own, decode = [np.asarray(x) for x in given], codec.decoder(rec, vae_params)

  def draw(ids, mask, index):
    batch = (ids, mask, index, *(np.broadcast_to(x, (len(ids), *x.shape[1:])) for x in own))
    with jax.set_mesh(mesh):
      latents = np.asarray(run(*over_local_devices(batch, mesh)))
    return decode(latents)

  return draw


def clips(
  made: Generator, prompts: Sequence[tuple[int, str]], batch: int, seed: int = 0
) -> Iterator[tuple[int, UInt8[np.ndarray, 't h w 3']]]:
  """Yields (number, video) of numbered prompts; the noise of a clip is that of its number and `seed`.

  Args:
    made: of `sample.generator`.
    prompts: (number, text).
    batch: clips at once on each local device; a last batch is filled up, so that one program is compiled.
    seed: number of the first noise.
  """
  size = batch * len(jax.local_devices())
  words = stages.tokenizer(made.config, made.rec)
  for start in range(0, len(prompts), size):
    numbers, texts = zip(*prompts[start : start + size], strict=True)
    filled = [*range(len(texts))] + [0] * (size - len(texts))
    ids, mask = words([texts[i] for i in filled])
    index = seed + np.array([numbers[i] for i in filled], np.int32)
    yield from zip(numbers, made.draw(ids, mask, index), strict=False)


def share(count: int) -> range:
  """The numbers below `count` that this process makes; no process waits for another."""
  return range(jax.process_index(), count, jax.process_count())


def define_flags(samples: int) -> None:
  """Flags of `sample.generator` and `clips`; `samples` is the default number of clips a prompt."""
  flags.DEFINE_enum(
    'sampler',
    'student',
    ['student', *multistep.SOLVERS],
    'Few-step student, or solver of a bidirectional teacher.',
  )
  flags.DEFINE_integer(
    'steps',
    None,
    f'Denoising steps: 1 to {MAX_STEPS} of a student (by default {STEPS}), or of a teacher '
    f'({teacher.STEPS}, from its first frame {teacher.STEPS_I2V}).',
  )
  flags.DEFINE_float('guidance', None, 'Of a teacher: uncond + guidance (cond - uncond).')
  flags.DEFINE_float('shift', None, "Of a teacher's grid; by default Wan's for the size.")
  flags.DEFINE_string('negative', None, 'Unconditional prompt of a teacher; by default its own.')
  flags.DEFINE_string('image', None, 'First frame of the clips, for an image-to-video network.')
  flags.DEFINE_string('last_image', None, 'Last frame besides, for a network that is given both.')
  flags.DEFINE_integer('samples', samples, 'Clips a prompt.', lower_bound=1)
  flags.DEFINE_integer('batch', 1, 'Clips at once on each device.', lower_bound=1)
  flags.DEFINE_integer(
    'seed', 0, 'Number of the first noise.', lower_bound=0, upper_bound=2**31 - 2**20
  )
  hosts.define_flags('Join the other hosts of a slice; each makes its share of the clips.')


def check(args: flags.FlagValues) -> None:
  """Refuses flags of `define_flags` that do not fit each other.

  Raises:
    InputError: naming the flag and what it may be.
  """
  if not args.checkpoint:
    raise InputError(
      'pass --checkpoint: the workdir of a run, an exported file, or assets:nano_student.safetensors.'
    )
  student_alone = args.sampler == 'student'
  most = MAX_STEPS if student_alone else teacher.MAX_STEPS
  if args.steps is not None and not 1 <= args.steps <= most:
    raise InputError(f'--steps={args.steps} must be between 1 and {most}.')
  for name in ('guidance', 'shift', 'negative'):
    if student_alone and getattr(args, name) is not None:
      raise InputError(
        f'--{name} has no use with --sampler=student: choose one of {", ".join(multistep.SOLVERS)}, or leave it out.'
      )
  if args.guidance is not None and not 0 <= args.guidance < np.inf:
    raise InputError(
      f'--guidance={args.guidance} must be zero or positive: 1 is the conditional model alone.'
    )
  if args.shift is not None and not 0 < args.shift < np.inf:
    raise InputError(f'--shift={args.shift} must be positive: 1 leaves the grid as it is.')
