"""Cheap figures of sampled clips that show early when a student goes wrong.

A student that is trained too long or too hard grows brighter and more saturated, or freezes. None of that needs a
trained judge, so a run can log it while it trains.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jaxtyping import Float, PyTree, UInt8
from ml_collections import ConfigDict

from salt_jax import clips, judge, recipe, sample, stages, weights
from salt_jax.diffusion import rollout
from salt_jax.models import axes, vae, wan
from salt_jax.models.prompt import Prompt
from salt_jax.recipe import Recipe
from salt_jax.step import encode, to_bytes

LOOKS = ('brightness', 'saturation', 'sharpness', 'change_per_second')

# `(averaged networks, frozen networks, finished steps) -> scalars`, none where no samples are due.
Watcher = Callable[[PyTree, PyTree, int], dict[str, float]]


def brightness(videos: UInt8[np.ndarray, 'b f h w 3']) -> Float[np.ndarray, 'b']:
  """Mean of all channels, 0 is black and 1 is white."""
  return videos.mean((1, 2, 3, 4), dtype=np.float64) / 255


def saturation(videos: UInt8[np.ndarray, 'b f h w 3']) -> Float[np.ndarray, 'b']:
  """Saturation of HSV averaged over the pixels by their brightness: sum (max - min) / sum max over channels.

  0 is grey, 1 is pure colour. Dark pixels, whose own saturation is noise, hardly count; a black clip has 0.
  """
  strongest = videos.max(-1).sum((1, 2, 3), dtype=np.float64)
  weakest = videos.min(-1).sum((1, 2, 3), dtype=np.float64)
  return (strongest - weakest) / np.maximum(strongest, 1)


def flicker(videos: UInt8[np.ndarray, 'b f h w 3']) -> Float[np.ndarray, 'b']:
  """Mean absolute difference of neighbouring frames, of 255: motion of any video, whatever it shows."""
  later, earlier = videos[:, 1:], videos[:, :-1]
  change = np.maximum(later, earlier) - np.minimum(later, earlier)
  return change.mean((1, 2, 3, 4), dtype=np.float64)


def looks(videos: UInt8[np.ndarray, 'b f h w 3'], fps: float) -> dict[str, np.ndarray]:
  """What can be said of any clips without a judge; two frames or more.

  Returns:
    brightness: see there.
    saturation: see there.
    sharpness: as the judge's, of every fourth frame.
    change_per_second: mean absolute difference of neighbouring frames times their number a second, of the range from
      black to white: motion and flicker together.
  """
  seen = videos[:, :: judge.STRIDE]
  found = (
    brightness(videos),
    saturation(videos),
    np.array([judge.sharpness(video) for video in seen]),
    flicker(videos) * fps / 255,
  )
  return dict(zip(LOOKS, found, strict=True))


def monitor(
  videos: UInt8[np.ndarray, 'b f h w 3'], captions: Sequence[str] | None = None
) -> dict[str, float]:
  """Means of brightness, saturation and travel over some clips.

  Args:
    videos: two frames or more.
    captions: of the nano world: travel is then the way of the captioned objects in pixels. Without them it is the
      mean absolute difference of neighbouring frames.
  """
  travel = flicker(videos) if captions is None else judge.travel(videos, list(captions))
  found = {'brightness': brightness(videos), 'saturation': saturation(videos), 'travel': travel}
  return {name: float(values.mean()) for name, values in found.items()}


def watcher(config: ConfigDict, rec: Recipe, placed: jax.sharding.NamedSharding) -> Watcher:
  """Samples `log.samples` clips of the averaged student every `log.samples_every` steps and monitors them.

  Captions and noise are the same each time, and nothing of the training is touched. The program is its own, so the
  steps are not compiled again.

  Args:
    config: the experiment.
    rec: the same, built.
    placed: where every process can read the clips: replicated.

  Raises:
    InputError: samples are asked for, but their VAE or tokenizer is not there.
  """
  count, every = config.log.samples, config.log.samples_every
  if not every:
    return lambda ema, frozen, step: {}
  captions = clips.captions('seen', np.arange(count), config.seed)
  batch = (*stages.tokenizer(config, rec)(captions), np.arange(count, dtype=np.int32))
  vae_params = weights.load(config.weights.vae, 'vae', rec.vae)
  draw = jax.jit(functools.partial(_draw, config, rec), out_shardings=placed)

  def watch(ema, frozen, step):
    if step % every:
      return {}
    with jax.set_mesh(placed.mesh):
      videos = draw(ema['generator'], {'text': frozen['text']}, vae_params, batch)
    return {f'samples/{name}': x for name, x in monitor(np.asarray(videos), captions).items()}

  return watch


def _draw(config, rec, params, frozen, vae_params, batch):
  ids, mask, index = (axes.split(x, axes.BATCH, *(None,) * (x.ndim - 1)) for x in batch)
  text = Prompt(encode(frozen, ids, mask, rec))
  plan = recipe.full_plan(rec, config.evaluate.steps[0])
  x0 = rollout.rollout(wan.bind(rec.model), params, sample.keys(rec, index), text, plan).x0

  def decoded(latents):
    # One clip at a time on each device: decoding takes far more memory than sampling.
    return jax.lax.map(lambda z: to_bytes(vae.decode(vae_params, z[None], rec.vae))[0], latents)

  own = (axes.BATCH, *(None,) * 4)
  return axes.per_device(decoded, (own,), own)(x0)
