"""A student that is looked into, and the clips that it is asked for."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, Key, PyTree, UInt8
from ml_collections import ConfigDict

from salt_jax import clips, codec, judge, monitor, precompute, sample, stages, weights
from salt_jax.checks import MAX_STEPS
from salt_jax.diffusion import flow, rollout
from salt_jax.diffusion.rollout import Plan, Rollout
from salt_jax.models import wan
from salt_jax.models.prompt import Prompt
from salt_jax.recipe import Recipe
from salt_jax.sharding import over_local_devices

_roll = jax.jit(rollout.rollout, static_argnums=0)


class Asked(NamedTuple):
  """What clips a student is asked for.

  Attributes:
    captions: one a clip.
    batch: their ids and mask, the index of the clips, and what an I2V student is given of their first frames.
    split: that held-out captions of the nano world are of, which has real clips to them; None for other prompts.
  """

  captions: list[str]
  batch: tuple
  split: str | None = None

  def rows(self, chosen: Sequence[int], own: int) -> 'Asked':
    """Some of the clips; the first `own` of them count, and the others fill the batch up."""
    batch = tuple(np.asarray(x)[np.asarray(chosen)] for x in self.batch)
    return Asked([self.captions[i] for i in chosen[:own]], batch, self.split)


def captioned(config: ConfigDict, rec: Recipe, split: str, count: int) -> Asked:
  """Held-out captions of the nano world."""
  index = np.arange(count, dtype=np.int32)
  captions = clips.captions(split, index, config.seed)
  ids, mask = stages.tokenizer(config, rec)(captions)
  first = clips.films(index, split, config.seed, 1, config.video.height)
  given = precompute.given(config, rec)(first)
  return Asked(captions, (ids, mask, index, *given.values()), split)


def prompted(config: ConfigDict, rec: Recipe, prompts: Sequence[str]) -> Asked:
  """Any prompts, for a T2V student.

  Raises:
    InputError: text encoder or tokenizer are not there, or a prompt cannot be read.
  """
  weights.require(config, ('text', 'vae'))
  ids, mask = stages.tokenizer(config, rec)(list(prompts))
  return Asked(list(prompts), (ids, mask, np.arange(len(prompts), dtype=np.int32)))


@dataclasses.dataclass(frozen=True)
class Subject:
  """A student and the clips it is asked for, all of them or a batch.

  Attributes:
    config: seed, video and rollout.
    rec: the same, built.
    apply: the student, as rollouts take it.
    params: its parameters, over `mesh`.
    frozen: text encoder and VAE, over it too.
    mesh: of this process's devices.
    asked: the clips.
    encode: `(frozen, batch) -> Prompt`.
    size: clips at once.
    opinion: of `judge.train`; None where nothing is judged.
  """

  config: ConfigDict
  rec: Recipe
  apply: Callable
  params: PyTree
  frozen: PyTree
  mesh: Mesh
  asked: Asked
  encode: Callable
  size: int
  opinion: Any = None

  @property
  def chunk(self) -> int:
    return self.rec.chunking.chunk

  @property
  def captions(self) -> list[str]:
    return self.asked.captions

  @functools.cached_property
  def keys(self) -> Key[Array, 'b']:
    """Of the noise of the clips of a batch."""
    return sample.keys(self.rec, self.asked.batch[2])

  @functools.cached_property
  def text(self) -> Prompt:
    """Encoder rows of a batch, and its first frames."""
    return self.encode(self.frozen, self.asked.batch)

  def first(self, count: int) -> 'Subject':
    """The same student, asked for the first clips alone."""
    return dataclasses.replace(self, asked=self.asked.rows(range(count), count))

  def gathered(self, measure: Callable[['Subject'], PyTree]) -> PyTree:
    """What `measure` finds, batch by batch: arrays with clips first, joined in the order of the clips.

    All batches are of one size, so that one program serves them; what fills the last one up is cut off.
    """
    found = []
    with jax.set_mesh(self.mesh):
      for part in self._parts():
        own = len(part.captions)
        found.append(jax.tree.map(lambda x, own=own: np.asarray(x)[:own], measure(part)))
    return jax.tree.map(lambda *parts: np.concatenate(parts), *found)

  def _parts(self) -> Iterator['Subject']:
    count, devices = len(self.captions), self.mesh.size
    size = min(self.size, -(-count // devices) * devices)
    for start in range(0, count, size):
      own = list(range(start, min(start + size, count)))
      asked = self.asked.rows([*own, *[start] * (size - len(own))], len(own))
      placed = asked._replace(batch=over_local_devices(asked.batch, self.mesh))
      yield dataclasses.replace(self, asked=placed)

  def plan(self, steps: int, exit_step: int | None = None) -> Plan:
    """A rollout on the grid of `steps`, to its end or to an exit; all of them share one program."""
    sigmas = flow.padded_sigmas(steps, self.rec.schedule.shift, MAX_STEPS + 1)
    return rollout.student_plan(
      self.rec.chunking, sigmas, steps - 1 if exit_step is None else exit_step
    )

  def roll(self, plan: Plan) -> Rollout:
    return _roll(self.apply, self.params, self.keys, self.text, plan)

  def decode(self, latents: Float[Array, 'b f h w c']) -> UInt8[np.ndarray, 'b t h w 3']:
    """Videos of the clips of a batch, without those that fill it up; decoded as `codec.decoder` says."""
    own = np.asarray(latents)[: len(self.captions)]
    return codec.decoder(self.rec, self.frozen['vae'])(own)

  @property
  def figures(self) -> tuple[str, ...]:
    """Names of what `look` finds."""
    return monitor.LOOKS if self.opinion is None else judge.MEASURES

  def look(self, videos: UInt8[np.ndarray, 'b t h w 3']) -> dict[str, Float[np.ndarray, 'b']]:
    """Figures of the clips of a batch: the judge's, or those that need none."""
    if self.opinion is None:
      return monitor.looks(videos, self.config.video.fps)
    return judge.judge(self.opinion, videos, self.captions)


def subject(
  config: ConfigDict, rec: Recipe, params: PyTree, asked: Asked, size: int | None = None
) -> Subject:
  """Lays a student and what serves it over this process's devices.

  Args:
    config: of the student.
    rec: the same, built.
    params: of the student.
    asked: the clips.
    size: clips at once on each device; None is all of them.

  Raises:
    InputError: text encoder or VAE are not there.
  """
  frozen = stages.serving(config, rec, 'text', 'vae')
  mesh, params, frozen = sample.placed(config, params, frozen)
  devices = mesh.size
  most = -(-len(asked.captions) // devices)
  return Subject(
    config=config,
    rec=rec,
    apply=wan.bind(rec.model),
    params=params,
    frozen=frozen,
    mesh=mesh,
    asked=asked,
    encode=jax.jit(lambda frozen, batch: sample.encoded(frozen, batch, rec)[0]),
    size=(size or most) * devices,
  )
