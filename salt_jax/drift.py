"""Figures over the length of a clip: by windows of it, at the trained length and beyond."""

import dataclasses
import functools
import itertools
import logging
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Float, UInt8
from ml_collections import ConfigDict

from salt_jax import codec, judge, monitor, recipe
from salt_jax.diffusion import streaming
from salt_jax.errors import InputError
from salt_jax.recipe import TIME, Recipe
from salt_jax.subject import Subject

log = logging.getLogger('salt_jax.diagnostics')

LENGTHS = (1, 4, 16)  # Times the trained length.
LEAST = 3  # Latent frames of a window: fewer hold no motion to measure.
# Of a window that is judged; others have `monitor.LOOKS`.
FIGURES = ('colour', 'class', 'drift', 'travel_per_second', 'brightness', 'saturation')
_FEWEST = 2  # Clips at the longest length, if there are as many.


def windows(frames: int, chunk: int) -> list[tuple[int, int]]:
  """Pixel frames [first, behind the last] of each window: whole chunks that make at least `LEAST` latent frames.

  What is left at the end belongs to the last window. Latent frame 0 is one pixel frame, each other one four.
  """
  length = chunk * -(-LEAST // chunk)
  starts = list(range(0, max(frames - length, 0) + 1, length))
  edges = [*starts, frames]
  return [(max(0, TIME * a - TIME + 1), TIME * b - TIME + 1) for a, b in itertools.pairwise(edges)]


def check(config: ConfigDict, rec: Recipe) -> None:
  """Refuses a student whose cache of the longest clip no device can hold.

  Raises:
    InputError: naming both sizes.
  """
  frames, limit = max(LENGTHS) * rec.chunking.frames, _memory()
  empty = functools.partial(streaming.empty_cache, recipe.chunking(config, frames), 1)
  size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(jax.eval_shape(empty)))
  if limit is not None and size > limit:
    raise InputError(
      f'--diagnose=drift: at {max(LENGTHS)} times its length the cache of this student takes {size / 2**30:.0f} GiB a '
      f'clip, and a device has {limit / 2**30:.0f}: leave drift out, or pass its --config with a window, such as '
      '--config.rollout.window=12 --config.rollout.sink=3.'
    )


def _memory() -> int | None:
  """Bytes of a device; None where it does not say, as a CPU, or has no limit and names 0."""
  return (jax.local_devices()[0].memory_stats() or {}).get('bytes_limit') or None


def by_window(
  subject: Subject, videos: UInt8[np.ndarray, 'b t h w 3'], spans: Sequence[tuple[int, int]]
) -> dict[str, Float[np.ndarray, 'b w']]:
  """Figures of each window of each clip.

  The judge's direction is left out: it is that of the first leg, and behind it objects turn at the walls.

  Args:
    subject: whose clips they are.
    videos: whole clips.
    spans: of `windows`.
  """
  look = subject.look if subject.opinion is None else functools.partial(_judged, subject)
  parts = [look(videos[:, first:behind]) for first, behind in spans]
  return {name: np.stack([part[name] for part in parts], 1) for name in figures(subject)}


def figures(subject: Subject) -> tuple[str, ...]:
  """Names of what `by_window` finds."""
  return subject.figures if subject.opinion is None else FIGURES


def _judged(subject: Subject, part: UInt8[np.ndarray, 'b t h w 3']) -> dict:
  found, looks = subject.look(part), -(-part.shape[1] // judge.STRIDE)
  speed = found['travel'] * subject.config.video.fps / ((looks - 1) * judge.STRIDE)
  own = {'brightness': monitor.brightness(part), 'saturation': monitor.saturation(part)}
  return found | own | {'travel_per_second': speed}


def means(
  found: dict[str, Float[np.ndarray, 'b w']], names: Sequence[str], count: int | None = None
) -> dict:
  """Of each window over the first `count` clips."""
  return {name: found[name][:count].mean(0).tolist() for name in names}


def drift(subject: Subject) -> dict:
  """Streams clips of the trained length and of longer ones: the longer, the fewer.

  `common` are the figures over those clips that every length has, so that lengths compare.
  """
  steps = subject.config.evaluate.steps[0]
  chunking, fewest = subject.rec.chunking, _clips_at(subject, max(LENGTHS))
  lengths = [_drift_of(subject, times, steps, fewest) for times in LENGTHS]
  note = 'direction is judged on the first frames alone: later, objects turn at the walls'
  return {
    'steps': steps,
    'cache': {'window': chunking.window, 'sink': chunking.sink},
    'common_clips': fewest,
    **({} if subject.opinion is None else {'note': note}),
    'lengths': lengths,
  }


def _clips_at(subject: Subject, times: int) -> int:
  count = len(subject.captions)
  return max(min(_FEWEST, count), count // times)


def _drift_of(subject: Subject, times: int, steps: int, common: int) -> dict:
  frames = times * subject.rec.chunking.frames
  rec = dataclasses.replace(subject.rec, chunking=recipe.chunking(subject.config, frames))
  count, spans = _clips_at(subject, times), windows(frames, subject.chunk)
  some = dataclasses.replace(subject.first(count), rec=rec)

  def measure(part: Subject) -> dict:
    videos = streamed(part, steps)
    found = {'figures': by_window(part, videos, spans)}
    if part.opinion is not None:
      found['direction'] = part.look(videos[:, : judge.FIRST_FRAMES + 1])['direction']
    return found

  found, names = some.gathered(measure), figures(subject)
  log.info('drift: %d clips of %d frames', count, spans[-1][1])
  return {
    'times': times,
    'latent_frames': frames,
    'clips': count,
    'windows': spans,
    **({'direction': float(found['direction'].mean())} if 'direction' in found else {}),
    'figures': means(found['figures'], names),
    'common': means(found['figures'], names, common),
  }


def streamed(part: Subject, steps: int) -> UInt8[np.ndarray, 'b t h w 3']:
  """Videos of a batch as `sample.stream` makes them; one program serves all batches."""
  plan, own = recipe.full_plan(part.rec, steps), len(part.captions)
  chunking = part.rec.chunking
  cache = streaming.empty_cache(chunking, part.keys.shape[0])
  features, videos = {}, []
  for start in range(0, chunking.frames, chunking.chunk):
    x0, cache = streaming.next_chunk(
      part.apply, part.params, part.keys, part.text, plan, cache, np.int32(start)
    )
    vae, latents = part.frozen['vae'], np.asarray(x0)[:own]
    pixels, features = codec.decode_next(vae, latents, features, part.rec.vae, start == 0)
    videos.append(pixels)
  return np.concatenate(videos, 1)
