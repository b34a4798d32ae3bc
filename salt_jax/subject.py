"""A student that is looked into, and the clips that it is asked for."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jaxtyping import Array, Key, PyTree
from ml_collections import ConfigDict

from salt_jax import clips, codec, precompute, sample, stages
from salt_jax.checks import MAX_STEPS
from salt_jax.diffusion import flow, rollout
from salt_jax.diffusion.rollout import Plan, Rollout
from salt_jax.models import wan
from salt_jax.models.prompt import Prompt
from salt_jax.recipe import Recipe
from salt_jax.step import conditioning

_roll = jax.jit(rollout.rollout, static_argnums=0)


@dataclasses.dataclass(frozen=True)
class Subject:
  """A student and the held-out clips it is asked for.

  Attributes:
    config: seed, video and rollout.
    rec: the same, built.
    apply: the student, as rollouts take it.
    params: its parameters.
    frozen: text encoder and VAE.
    opinion: of `judge.train`; None where nothing is judged.
    split: of the clips.
    captions: one a clip.
    batch: their ids and mask, the index of the clips, and what an I2V student is given of their first frames.
    keys: of the noise.
    text: encoder rows, and those first frames.
    decode: latents to uint8 video.
  """

  config: ConfigDict
  rec: Recipe
  apply: Callable
  params: PyTree
  frozen: PyTree
  opinion: Any
  split: str
  captions: list[str]
  batch: tuple
  keys: Key[Array, 'b']
  text: Prompt
  decode: Callable

  @property
  def chunk(self) -> int:
    return self.rec.chunking.chunk

  def plan(self, steps: int, exit_step: int | None = None) -> Plan:
    """A rollout on the grid of `steps`, to its end or to an exit; all of them share one program."""
    sigmas = flow.padded_sigmas(steps, self.rec.schedule.shift, MAX_STEPS + 1)
    return rollout.student_plan(
      self.rec.chunking, sigmas, steps - 1 if exit_step is None else exit_step
    )

  def roll(self, plan: Plan) -> Rollout:
    return _roll(self.apply, self.params, self.keys, self.text, plan)


def subject(
  config: ConfigDict, rec: Recipe, params: PyTree, clip_set: tuple[str, int], opinion: Any = None
) -> Subject:
  """Puts a student and its captions together.

  Args:
    config: of the student.
    rec: the same, built.
    params: of the student.
    clip_set: (split, number of clips).
    opinion: of `judge.train`.

  Raises:
    InputError: text encoder or VAE are not there.
  """
  split, count = clip_set
  index = np.arange(count, dtype=np.int32)
  frozen = stages.serving(config, rec, 'text', 'vae')
  captions = clips.captions(split, index, config.seed)
  ids, mask = stages.tokenizer(config, rec)(captions)
  first = clips.films(index, split, config.seed, 1, config.video.height)
  given = precompute.given(config, rec)(first)
  fields = {'ids': ids, 'mask': mask} | given
  return Subject(
    config=config,
    rec=rec,
    apply=wan.bind(rec.model),
    params=params,
    frozen=frozen,
    opinion=opinion,
    split=split,
    captions=captions,
    batch=(ids, mask, index, *given.values()),
    keys=sample.keys(rec, index),
    text=jax.jit(lambda f, fields: conditioning(f, fields, rec)[0])(frozen, fields),
    decode=codec.decoder(rec, frozen['vae']),
  )
