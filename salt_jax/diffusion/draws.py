"""What a generator or critic step draws: a step count, an exit, a time triple, a denser reference. All as arrays.

Every draw is a look-up in tables made at start, so none of them recompiles. Grids are told by their step count K:
level i of K has the label 1000 (1 - i / K) before the shift, so the grids of 2, 4 and 8 steps share their levels.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from salt_jax.diffusion import flow
from salt_jax.diffusion.rollout import Chunking, Plan, student_plan
from salt_jax.errors import InputError

COUPLINGS = ('aligned_b', 'aligned_a', 'independent')
# First draw of a reference's own noise, behind those of every student.
_INDEPENDENT = 500


@dataclasses.dataclass(frozen=True)
class Schedule:
  """Step counts of a student's rollouts, the probability of each, and the shift of their levels."""

  steps: tuple[int, ...]
  probs: tuple[float, ...]
  shift: float

  def __post_init__(self):
    if len(self.steps) != len(self.probs):
      raise InputError(
        f'schedule.steps {self.steps} and schedule.probs {self.probs} differ in length.'
      )
    if len(set(self.steps)) != len(self.steps):
      raise InputError(f'schedule.steps {self.steps} names a step count twice.')
    if not math.isclose(sum(self.probs), 1.0, abs_tol=1e-6) or min(self.probs) < 0:
      raise InputError(f'schedule.probs {self.probs} must be positive and sum to 1.')


@dataclasses.dataclass(frozen=True)
class TripleConfig:
  """Which triples (s, m, e) the consistency term is taken on (salt_method.md 2.3).

  Attributes:
    steps: step counts whose rollouts have the term.
    segments: equal segments of the grid whose ends, and level 0, are the possible ends e.
    candidates: e is one of so many largest ends below the level behind s; 0 is all of them.
    first_step: the term sleeps before this training step.
    last_step: and from this one on; 0 is never.
    skip_first: whether pure noise, whose weight is zero, is left out.
  """

  steps: tuple[int, ...] = (8,)
  segments: int = 4
  candidates: int = 2
  first_step: int = 0
  last_step: int = 0
  skip_first: bool = True


@dataclasses.dataclass(frozen=True)
class ReferenceConfig:
  """Which denser rollout a student is compared with (salt_method.md 3.4).

  Attributes:
    map: (step count, its references) pairs; one of the references is drawn, 0 stands for none.
    start: first training step that has one.
    coupling: of the noise between steps. 'aligned_b' shares it at the student's levels and takes Euler steps to the
      others; 'aligned_a' takes the student's noise of the enclosing segment everywhere; 'independent' draws anew.
    share_exit_input: whether the reference's last pass sees the student's own input, behind the reference's cache.
  """

  map: tuple[tuple[int, tuple[int, ...]], ...] = ((2, (4,)),)
  start: int = 0
  coupling: str = 'aligned_b'
  share_exit_input: bool = False

  def __post_init__(self):
    if self.coupling not in COUPLINGS:
      raise InputError(
        f'reference.coupling={self.coupling} is unknown: choose one of {", ".join(COUPLINGS)}.'
      )
    _check_pairs(self.map)
    if len(dict(self.map)) < len(self.map):
      raise InputError(
        f'reference.map {self.map} names a step count twice: give it one tuple of references.'
      )
    for steps, references in self.map:
      for reference in references:
        if reference and (reference <= steps or reference % steps):
          raise InputError(
            f'reference.map: {reference} steps are no denser form of {steps}; take a multiple, such as {2 * steps}.'
          )


def _check_pairs(pairs) -> None:
  """Refuses a map that is empty, or not made of (step count, references) with whole numbers."""
  fits = isinstance(pairs, tuple) and all(
    isinstance(pair, tuple)
    and len(pair) == 2
    and isinstance(pair[1], tuple)
    and pair[1]
    and all(isinstance(number, int) for number in (pair[0], *pair[1]))
    for pair in pairs
  )
  if not pairs or not fits:
    raise InputError(
      f'reference.map {pairs} must hold pairs of a step count and its references, such as ((2, (4,)),); '
      'without a reference set losses.alignment=0.'
    )


@struct.dataclass
class Triple:
  """Levels of a consistency term, sigma_s > sigma_m > sigma_e, and whether this step has one."""

  start: Float[Array, '']
  middle: Float[Array, '']
  end: Float[Array, '']
  active: Bool[Array, '']


@struct.dataclass
class Draw:
  """A step's draw.

  Attributes:
    steps: the step count.
    plan: the student's rollout.
    triple: of the consistency term, None without one.
    reference: rollout of the reference, to the student's exit level; None without one.
    has_reference: whether this step compares with it.
  """

  steps: Int[Array, '']
  plan: Plan
  triple: Triple | None
  reference: Plan | None
  has_reference: Bool[Array, '']


def level_table(steps: tuple[int, ...], shift: float) -> Float[np.ndarray, 'k s']:
  """Levels of each step count, padded with zeros to one length."""
  return np.stack([flow.padded_sigmas(k, shift, max(steps) + 1) for k in steps])


def ends(steps: int, exit_step: int, cfg: TripleConfig) -> list[int]:
  """Indices of the levels at which a triple that starts at `exit_step` may end, of the grid of `steps`.

  An end lies strictly below the level behind the start, so that at least one level is left between them.
  """
  if steps not in cfg.steps or (cfg.skip_first and exit_step == 0):
    return []
  stride = steps // cfg.segments
  below = [i for i in range(0, steps + 1, stride) if i > exit_step + 1]
  return below[: cfg.candidates] if cfg.candidates else below


def _end_table(schedule: Schedule, cfg: TripleConfig):
  """(end indices `[k exit c]`, how many there are `[k exit]`)."""
  longest, width = max(schedule.steps), cfg.segments
  table = np.zeros((len(schedule.steps), longest, width), np.int32)
  counts = np.zeros(table.shape[:2], np.int32)
  for row, steps in enumerate(schedule.steps):
    for exit_step in range(steps):
      found = ends(steps, exit_step, cfg)
      counts[row, exit_step] = len(found)
      table[row, exit_step, : len(found)] = found
  return table, counts


def draw_triple(
  key: PRNGKeyArray,
  schedule: Schedule,
  cfg: TripleConfig,
  at: tuple[Int[Array, ''], Int[Array, '']],
  n: Int[Array, ''],
) -> Triple:
  """A triple that starts at the exit: e uniform over its ends, m uniform over the levels between.

  Args:
    key: of the step.
    schedule: the grids.
    cfg: the rule.
    at: (row of the schedule, exit).
    n: training step.
  """
  row, exit_step = at
  table, counts = (jnp.asarray(x) for x in _end_table(schedule, cfg))
  count = counts[row, exit_step]
  end_key, middle_key = jax.random.split(key)
  end = table[row, exit_step, jax.random.randint(end_key, (), 0, jnp.maximum(count, 1))]
  middle = jax.random.randint(middle_key, (), exit_step + 1, jnp.maximum(end, exit_step + 2))
  levels = jnp.asarray(level_table(schedule.steps, schedule.shift))[row]
  active = (count > 0) & (n >= cfg.first_step)
  if cfg.last_step:
    active &= n < cfg.last_step
  return Triple(levels[exit_step], levels[middle], levels[end], active)


def _steps_of_noise(steps: int, reference: int, coupling: str):
  """For each step of a reference: which draw its noise is, and whether it is an Euler step instead."""
  share = (np.arange(1, reference + 1) * steps) / reference  # student steps done by then
  if coupling == 'independent':
    return _INDEPENDENT + np.arange(reference), np.zeros(reference, bool)
  between = share != np.floor(share)
  return np.ceil(share).astype(int), between & (coupling == 'aligned_b')


def _reference_tables(schedule: Schedule, cfg: ReferenceConfig):
  """Tables `[k r …]` over step counts and their references: count of references, steps, levels, draws, Euler."""
  options: Mapping[int, tuple[int, ...]] = dict(cfg.map)
  width = max(1, *(len(r) for r in options.values()))
  length = max(max(r) for r in options.values()) + 1
  shape = (len(schedule.steps), width)
  counts, steps = np.zeros(shape[0], np.int32), np.zeros(shape, np.int32)
  levels = np.zeros((*shape, length), np.float32)
  draws, euler = np.zeros((*shape, length), np.int32), np.zeros((*shape, length), bool)
  for row, k in enumerate(schedule.steps):
    counts[row] = len(options.get(k, ()))
    for column, reference in enumerate(options.get(k, ())):
      steps[row, column] = reference
      if reference:
        levels[row, column] = flow.padded_sigmas(reference, schedule.shift, length)
        found = _steps_of_noise(k, reference, cfg.coupling)
        draws[row, column, :reference], euler[row, column, :reference] = found
  return counts, steps, levels, draws, euler


def draw_reference(
  key: PRNGKeyArray,
  schedule: Schedule,
  cfg: ReferenceConfig,
  student: tuple[Chunking, Int[Array, ''], Int[Array, '']],
  n: Int[Array, ''],
) -> tuple[Plan, Bool[Array, '']]:
  """(rollout of a denser reference up to the student's exit level, whether this step has one).

  There is none at exit 0, where both would see the same noise.

  Args:
    key: of the step.
    schedule: the student's grids.
    cfg: which reference.
    student: (chunking, row of the schedule, exit).
    n: training step.
  """
  chunking, row, exit_step = student
  counts, steps, levels, draws, euler = (jnp.asarray(x) for x in _reference_tables(schedule, cfg))
  column = jax.random.randint(key, (), 0, jnp.maximum(counts[row], 1))
  reference = steps[row, column]
  plan = Plan(
    chunking=chunking,
    sigmas=levels[row, column],
    exit=exit_step * reference // jnp.asarray(schedule.steps)[row],
    draws=draws[row, column],
    euler=euler[row, column] | (chunking.mode == 'ode'),
  )
  return plan, (reference > 0) & (exit_step > 0) & (n >= cfg.start)


def draw(
  key: PRNGKeyArray,
  n: Int[Array, ''],
  schedule: Schedule,
  chunking: Chunking,
  triples: TripleConfig | None = None,
  reference: ReferenceConfig | None = None,
) -> Draw:
  """A step count by its probability, a uniform exit below it, and what the terms need.

  Args:
    key: of the step, the same for all examples and on every host.
    n: training step.
    schedule: step counts and probabilities.
    chunking: static part of the rollouts.
    triples: rule of the consistency term, if there is one.
    reference: rule of the alignment term, if there is one.
  """
  count_key, exit_key, triple_key, reference_key = jax.random.split(key, 4)
  row = jax.random.choice(count_key, len(schedule.steps), p=jnp.asarray(schedule.probs))
  steps = jnp.asarray(schedule.steps)[row]
  exit_step = jax.random.randint(exit_key, (), 0, steps)
  levels = jnp.asarray(level_table(schedule.steps, schedule.shift))[row]
  at = functools.partial(draw_triple, triple_key, schedule, at=(row, exit_step), n=n)
  other, has = None, jnp.bool_(False)
  if reference is not None:
    other, has = draw_reference(reference_key, schedule, reference, (chunking, row, exit_step), n)
  return Draw(
    steps=steps,
    plan=student_plan(chunking, levels, exit_step),
    triple=None if triples is None else at(cfg=triples),
    reference=other,
    has_reference=has,
  )
