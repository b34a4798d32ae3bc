"""The stages a run can be: which networks it trains, from what, on which data, by which steps."""

import functools
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree
from ml_collections import ConfigDict

from salt_jax import causal_steps, clips, data, precompute, step, weights
from salt_jax.errors import InputError
from salt_jax.models import text, vae, wan
from salt_jax.models.text import WordTokenizer
from salt_jax.models.unigram import UnigramTokenizer
from salt_jax.recipe import Recipe

# An encoder's table may have rows that its tokenizer's files do not know: sentinels (300 in UMT5) and padding to 128.
SPARE_IDS = 512


class StepSpec(NamedTuple):
  """A step function, how often it runs, and its batches from a call on."""

  name: str
  run: Callable
  every: int
  feed: Callable[[data.Feed], Iterator]


class Stage(NamedTuple):
  """A training run but for its loop.

  Attributes:
    shapes: shapes of the trained networks, by name.
    start: makes their first parameters, on the host.
    frozen: networks and ids that only serve, on the host.
    averaged: trained networks that have a moving average.
    steps: what one iteration does, in order.
  """

  shapes: dict[str, PyTree]
  start: Callable[[], dict[str, PyTree]]
  frozen: dict[str, PyTree]
  averaged: tuple[str, ...]
  steps: tuple[StepSpec, ...]


def tokenizer(config: ConfigDict, rec: Recipe) -> WordTokenizer | UnigramTokenizer:
  """The nano world's words, or UMT5's pieces from the folder `weights.tokenizer`.

  Raises:
    InputError: no tokenizer there, or of another vocabulary than the text encoder's.
  """
  if config.size == 'nano':
    return WordTokenizer(clips.NANO_WORDS, rec.text_length)
  pieces = UnigramTokenizer(config.weights.tokenizer, rec.text_length)
  if not 0 <= rec.text.vocab - pieces.size < SPARE_IDS:
    raise InputError(
      f'the tokenizer in {config.weights.tokenizer} has {pieces.size} ids, but text.vocab={rec.text.vocab}: '
      'take the tokenizer of this encoder.'
    )
  return pieces


def serving(config: ConfigDict, rec: Recipe, *names: str) -> dict[str, PyTree]:
  """The frozen networks a stage asks for, and the unconditional prompt."""
  weights.require(config, names)
  frozen = {'negative': negative(config, rec)}
  for name in names:
    network = weights.NETWORKS.get(name, 'dit')
    cfg = {'vae': rec.vae, 'text': rec.text}.get(name, rec.teacher)
    params = weights.load(config.weights[name], network, cfg)
    frozen[name] = weights.narrowed(params, cfg.dtype)
  return frozen


def negative(config: ConfigDict, rec: Recipe) -> dict[str, np.ndarray]:
  """ids and mask `[1 n]` of the unconditional prompt: `config.negative`, and for nano, which has no such field, ''."""
  words = tokenizer(config, rec)
  text = '' if config.size == 'nano' else config.negative
  ids, mask = words([text]) if text else words.empty(1)
  return {'ids': ids, 'mask': mask}


def _random(cfgs: dict, seed: int) -> dict[str, PyTree]:
  modules = {'vae': vae, 'text': text, 'dit': wan}
  keys = jax.random.split(jax.random.key(seed), len(cfgs))
  return {
    name: jax.tree.map(
      np.asarray, jax.jit(functools.partial(modules[name].init_params, cfg=cfg))(key)
    )
    for key, (name, cfg) in zip(keys, cfgs.items(), strict=True)
  }


def _vae(config: ConfigDict, rec: Recipe, workdir: str) -> Stage:
  del workdir
  feed = functools.partial(
    data.clips, frames=config.data.frames, size=config.video.height, length=rec.text_length
  )
  return Stage(
    shapes={'vae': weights.shapes('vae', rec.vae)},
    start=lambda: _random({'vae': rec.vae}, config.seed),
    frozen={},
    averaged=('vae',),
    steps=(StepSpec('vae', step.vae_step, 1, feed),),
  )


def _towers(rec: Recipe) -> tuple[str, ...]:
  return ('clip',) if rec.model.image_dim else ()


def _flow(config: ConfigDict, rec: Recipe, workdir: str) -> Stage:
  weights.require(config, ('vae', *_towers(rec)))
  folder = precompute.latents(config, rec, os.path.join(workdir, 'latents'))
  return Stage(
    shapes={'dit': weights.shapes('dit', rec.model), 'text': weights.shapes('umt5', rec.text)},
    start=lambda: _random({'dit': rec.model, 'text': rec.text}, config.seed),
    frozen={'negative': negative(config, rec)},
    averaged=('dit', 'text'),
    steps=(StepSpec('dit', step.flow_step, 1, functools.partial(data.store_batches, folder)),),
  )


def _ode(config: ConfigDict, rec: Recipe, workdir: str) -> Stage:
  weights.require(config, ('text', 'teacher', 'vae', *_towers(rec)))
  # For I2V the clips are read, which have captions and a first frame.
  prompts = None if rec.model.frame_channels else _prompts(config, rec, workdir)
  frozen = serving(config, rec, 'text')
  folder = precompute.ode_pairs(config, rec, frozen, os.path.join(workdir, 'pairs'), prompts)
  return _generator(config, rec, 'teacher', frozen, (step.ode_step, folder))


def _generator(config: ConfigDict, rec: Recipe, start: str, frozen: dict, work: tuple) -> Stage:
  """One student that starts from the weights `start`; `work` is its step and the folder of its data."""
  run, folder = work
  return Stage(
    shapes={'generator': weights.shapes('dit', rec.model)},
    start=lambda: {'generator': weights.load(config.weights[start], 'dit', rec.model)},
    frozen=frozen,
    averaged=('generator',),
    steps=(StepSpec('generator', run, 1, functools.partial(data.store_batches, folder)),),
  )


def _ar(config: ConfigDict, rec: Recipe, workdir: str) -> Stage:
  weights.require(config, ('text', 'teacher', 'vae'))
  frozen = serving(config, rec, 'text')
  # Read once before the latents are made, so that a damaged file is not found behind them.
  weights.load(config.weights.teacher, 'dit', rec.model)
  folder = _clean_latents(config, rec, workdir)
  return _generator(config, rec, 'teacher', frozen, (causal_steps.ar_step, folder))


def _causal_ode(config: ConfigDict, rec: Recipe, workdir: str) -> Stage:
  weights.require(config, ('text', 'ar', 'vae'))
  frozen = serving(config, rec, 'text')
  ar = weights.load(config.weights.ar, 'dit', rec.teacher)
  clean = _clean_latents(config, rec, workdir)
  folder = precompute.causal_pairs(
    config, rec, frozen | {'ar': ar}, clean, os.path.join(workdir, 'pairs')
  )
  return _generator(config, rec, 'ar', frozen, (causal_steps.causal_ode_step, folder))


def _causal_cd(config: ConfigDict, rec: Recipe, workdir: str) -> Stage:
  weights.require(config, ('text', 'ar', 'vae'))
  frozen = serving(config, rec, 'text', 'ar')
  folder = _clean_latents(config, rec, workdir)
  return _generator(config, rec, 'ar', frozen, (causal_steps.causal_cd_step, folder))


def _clean_latents(config: ConfigDict, rec: Recipe, workdir: str) -> str:
  if config.data.kind == 'latents':
    return precompute.latents(config, rec, os.path.join(workdir, 'latents'))
  if config.data.kind == 'store':
    return precompute.given_latents(config, rec)
  raise InputError(f'data.kind={config.data.kind} is unknown: choose latents or store.')


def _selfforcing(config: ConfigDict, rec: Recipe, workdir: str) -> Stage:
  critic = 'critic' if 'critic' in config.weights else 'teacher'
  weights.require(config, sorted({'text', 'vae', 'teacher', 'init', critic, *_towers(rec)}))
  shapes = weights.shapes('dit', rec.model)

  def start():
    return {
      'generator': weights.load(config.weights.init, 'dit', rec.model),
      'critic': weights.load(config.weights[critic], 'dit', rec.model),
    }

  feed = _prompts(config, rec, workdir)
  return Stage(
    shapes={'generator': shapes, 'critic': shapes},
    start=start,
    frozen=serving(config, rec, 'teacher', 'text'),
    averaged=('generator',),
    steps=(
      StepSpec('generator', step.generator_step, config.generator_every, feed),
      StepSpec('critic', step.critic_step, 1, feed),
    ),
  )


def _prompts(config: ConfigDict, rec: Recipe, workdir: str) -> Callable[[data.Feed], Iterator]:
  if config.data.kind == 'clips':
    folder = precompute.conditions(config, rec, os.path.join(workdir, 'conditions'))
    return functools.partial(data.store_batches, folder)
  if config.data.kind == 'captions':
    return functools.partial(data.captions, length=rec.text_length)
  if config.data.kind == 'prompts':
    tokens = data.tokenized(config.data.path, tokenizer(config, rec))
    return functools.partial(data.token_batches, tokens)
  raise InputError(f'data.kind={config.data.kind} is unknown: choose captions, clips or prompts.')


def build(config: ConfigDict, rec: Recipe, workdir: str) -> Stage:
  """The config's stage; computes what it must precompute.

  Raises:
    InputError: an unknown stage, or missing files.
  """
  kinds = {
    'vae': _vae,
    'flow': _flow,
    'ode': _ode,
    'ar': _ar,
    'causal_ode': _causal_ode,
    'causal_cd': _causal_cd,
    'selfforcing': _selfforcing,
  }
  if config.stage not in kinds:
    raise InputError(f'stage={config.stage} is unknown: choose one of {", ".join(kinds)}.')
  return kinds[config.stage](config, rec, workdir)
