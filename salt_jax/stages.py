"""The stages a run can be: which networks it trains, from what, on which data, by which steps."""

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree
from ml_collections import ConfigDict

from salt_jax import data, outline, precompute, text_store, weights
from salt_jax.errors import InputError
from salt_jax.models import text, vae, wan
from salt_jax.recipe import Recipe
from salt_jax.tokens import negative, tokenizer


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
    stream: makes what steps carry on besides networks.
  """

  shapes: dict[str, PyTree]
  start: Callable[[], dict[str, PyTree]]
  frozen: dict[str, PyTree]
  averaged: tuple[str, ...]
  steps: tuple[StepSpec, ...]
  stream: Callable[[], PyTree] = dict


def serving(config: ConfigDict, rec: Recipe, *names: str) -> dict[str, PyTree]:
  """The frozen networks a stage asks for, and the unconditional prompt."""
  weights.require(config, names)
  return {'negative': negative(config, rec)} | _networks(config, rec, names)


def _stored(config: ConfigDict, rec: Recipe, *names: str) -> dict[str, PyTree]:
  """The same for prompts that were encoded before."""
  rows = data.padded([text_store.negative_rows(config, rec)], rec.text_length)
  return {'negative': {'text': rows}} | _networks(config, rec, names)


def _networks(config: ConfigDict, rec: Recipe, names: Sequence[str]) -> dict[str, PyTree]:
  frozen = {}
  for name in names:
    network = weights.NETWORKS.get(name, 'dit')
    frozen[name] = weights.load_narrowed(config.weights[name], network, outline.sizes(rec, name))
  return frozen


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
    shapes=outline.trained(config, rec),
    start=lambda: _random({'vae': rec.vae}, config.seed),
    frozen={},
    averaged=outline.averaged(config),
    steps=_steps(config, rec, feed),
  )


def _towers(rec: Recipe) -> tuple[str, ...]:
  return ('clip',) if rec.model.image_dim else ()


def _flow(config: ConfigDict, rec: Recipe, workdir: str) -> Stage:
  weights.require(config, ('vae', *_towers(rec)))
  folder = precompute.latents(config, rec, os.path.join(workdir, 'latents'))
  return Stage(
    shapes=outline.trained(config, rec),
    start=lambda: _random({'dit': rec.model, 'text': rec.text}, config.seed),
    frozen={'negative': negative(config, rec)},
    averaged=outline.averaged(config),
    steps=_steps(config, rec, functools.partial(data.store_batches, folder)),
  )


def _steps(config: ConfigDict, rec: Recipe, feed: Callable) -> tuple[StepSpec, ...]:
  return tuple(StepSpec(*work, feed) for work in outline.work(config, rec))


def _ode(config: ConfigDict, rec: Recipe, workdir: str) -> Stage:
  weights.require(config, ('text', 'teacher', 'vae', *_towers(rec)))
  # For I2V the clips are read, which have captions and first frames, unless a store has both.
  clips = rec.model.frame_channels and config.data.kind != 'store'
  prompts = None if clips else _prompts(config, rec, workdir)
  frozen = serving(config, rec, *outline.served(config, rec))
  folder = precompute.ode_pairs(config, rec, frozen, os.path.join(workdir, 'pairs'), prompts)
  return _generator(config, rec, 'teacher', frozen, folder)


def _generator(config: ConfigDict, rec: Recipe, start: str, frozen: dict, folder: str) -> Stage:
  """One student that starts from the weights `start`; `folder` has its data."""
  return Stage(
    shapes=outline.trained(config, rec),
    start=lambda: {'generator': weights.load(config.weights[start], 'dit', rec.model)},
    frozen=frozen,
    averaged=outline.averaged(config),
    steps=_steps(config, rec, functools.partial(data.store_batches, folder)),
  )


def _ar(config: ConfigDict, rec: Recipe, workdir: str) -> Stage:
  weights.require(config, ('text', 'teacher', 'vae'))
  frozen = serving(config, rec, *outline.served(config, rec))
  # Read once before the latents are made, so that a damaged file is not found behind them.
  weights.load(config.weights.teacher, 'dit', rec.model)
  folder = _clean_latents(config, rec, workdir)
  return _generator(config, rec, 'teacher', frozen, folder)


def _causal_ode(config: ConfigDict, rec: Recipe, workdir: str) -> Stage:
  weights.require(config, ('text', 'ar', 'vae'))
  frozen = serving(config, rec, *outline.served(config, rec))
  ar = weights.load(config.weights.ar, 'dit', rec.teacher)
  clean = _clean_latents(config, rec, workdir)
  folder = precompute.causal_pairs(
    config, rec, frozen | {'ar': ar}, clean, os.path.join(workdir, 'pairs')
  )
  return _generator(config, rec, 'ar', frozen, folder)


def _causal_cd(config: ConfigDict, rec: Recipe, workdir: str) -> Stage:
  weights.require(config, ('text', 'ar', 'vae'))
  frozen = serving(config, rec, *outline.served(config, rec))
  folder = _clean_latents(config, rec, workdir)
  return _generator(config, rec, 'ar', frozen, folder)


def _clean_latents(config: ConfigDict, rec: Recipe, workdir: str) -> str:
  if config.data.kind == 'latents':
    return precompute.latents(config, rec, os.path.join(workdir, 'latents'))
  if config.data.kind == 'store':
    return precompute.given_latents(config, rec)
  raise InputError(f'data.kind={config.data.kind} is unknown: choose latents or store.')


def _selfforcing(config: ConfigDict, rec: Recipe, workdir: str) -> Stage:
  critic = 'critic' if 'critic' in config.weights else 'teacher'
  # Of a store's rows the encoder is not needed, but for the report of nano.
  stored = config.data.kind == 'text_store'
  encoder = () if stored and config.size != 'nano' else ('text',)
  weights.require(config, sorted({'vae', 'teacher', 'init', critic, *encoder, *_towers(rec)}))
  serve = _stored if stored else serving

  def start():
    return {
      'generator': weights.load(config.weights.init, 'dit', rec.model),
      'critic': weights.load(config.weights[critic], 'dit', rec.model),
    }

  feed = _prompts(config, rec, workdir)
  if rec.streaming is not None:
    feed = functools.partial(data.prompt_pairs, make=feed)
  return Stage(
    shapes=outline.trained(config, rec),
    start=start,
    frozen=serve(config, rec, *outline.served(config, rec)),
    averaged=outline.averaged(config),
    steps=_steps(config, rec, feed),
    stream=outline.stream(config, rec),
  )


def _prompts(config: ConfigDict, rec: Recipe, workdir: str) -> Callable[[data.Feed], Iterator]:
  if config.data.kind == 'clips':
    folder = precompute.conditions(config, rec, os.path.join(workdir, 'conditions'))
    return functools.partial(data.store_batches, folder)
  if config.data.kind == 'store':
    return functools.partial(data.store_batches, precompute.given_store(config, rec))
  if config.data.kind == 'captions':
    return functools.partial(data.captions, length=rec.text_length)
  if config.data.kind == 'prompts':
    tokens = data.tokenized(config.data.path, tokenizer(config, rec))
    return functools.partial(data.token_batches, tokens)
  if config.data.kind == 'text_store':
    text_store.negative_rows(config, rec)
    return functools.partial(data.text_store, config.data.path, rec.text_length)
  raise InputError(
    f'data.kind={config.data.kind} is unknown: choose captions, clips, prompts, store or text_store.'
  )


def build(config: ConfigDict, rec: Recipe, workdir: str) -> Stage:
  """The config's stage; computes what it must precompute.

  Raises:
    InputError: missing files.
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
  return kinds[config.stage](config, rec, workdir)
