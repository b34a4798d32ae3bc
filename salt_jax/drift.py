"""Figures over the length of a clip: by windows of it, at the trained length and beyond."""

import dataclasses
import itertools
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from salt_jax import judge, monitor, recipe, sample
from salt_jax.recipe import TIME
from salt_jax.subject import Subject

log = logging.getLogger('salt_jax.diagnostics')

LENGTHS = (1, 4, 16)  # Times the trained length.
LEAST = 3  # Latent frames of a window: fewer hold no motion to measure.
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


def judged_windows(
  opinion: Any,
  videos: UInt8[np.ndarray, 'b t h w 3'],
  captions: list[str],
  spans: Sequence[tuple[int, int]],
  fps: float,
) -> dict[str, Float[np.ndarray, 'w b']]:
  """Figures of each window of each clip.

  The judge's direction is left out: it is that of the first leg, and behind it objects turn at the walls.

  Args:
    opinion: of `judge.train`.
    videos: whole clips.
    captions: one a clip.
    spans: of `windows`.
    fps: frames a second.
  """
  rows = {name: [] for name in FIGURES}
  for first, behind in spans:
    part = videos[:, first:behind]
    found = judge.judge(opinion, part, captions)
    looks = -(-(behind - first) // judge.STRIDE)
    found['travel_per_second'] = found['travel'] * fps / ((looks - 1) * judge.STRIDE)
    found['brightness'], found['saturation'] = monitor.brightness(part), monitor.saturation(part)
    for name, values in rows.items():
      values.append(found[name])
  return {name: np.stack(values) for name, values in rows.items()}


def means(figures: dict[str, Float[np.ndarray, 'w b']], count: int | None = None) -> dict:
  """Of each window over the first `count` clips."""
  return {name: values[:, :count].mean(1).tolist() for name, values in figures.items()}


def drift(subject: Subject) -> dict:
  """Streams clips of the trained length and of longer ones: the longer, the fewer.

  `common` are the figures over those clips that every length has, so that lengths compare.
  """
  steps = subject.config.evaluate.steps[0]
  chunking, fewest = subject.rec.chunking, _clips_at(subject, max(LENGTHS))
  lengths = [_drift_of(subject, times, steps, fewest) for times in LENGTHS]
  return {
    'steps': steps,
    'cache': {'window': chunking.window, 'sink': chunking.sink},
    'common_clips': fewest,
    'note': 'direction is judged on the first frames alone: later, objects turn at the walls',
    'lengths': lengths,
  }


def _clips_at(subject: Subject, times: int) -> int:
  count = len(subject.captions)
  return max(min(_FEWEST, count), count // times)


def _drift_of(subject: Subject, times: int, steps: int, common: int) -> dict:
  frames = times * subject.rec.chunking.frames
  rec = dataclasses.replace(subject.rec, chunking=recipe.chunking(subject.config, frames))
  count = _clips_at(subject, times)
  batch = tuple(x[:count] for x in subject.batch)
  parts = sample.stream(rec, subject.params, subject.frozen, subject.frozen['vae'], batch, steps)
  videos, captions = np.concatenate(list(parts), 1), subject.captions[:count]
  spans = windows(frames, subject.chunk)
  fps = subject.config.video.fps
  figures = judged_windows(subject.opinion, videos, captions, spans, fps)
  start = judge.judge(subject.opinion, videos[:, : judge.FIRST_FRAMES + 1], captions)
  log.info('drift: %d clips of %d frames', count, videos.shape[1])
  return {
    'times': times,
    'latent_frames': frames,
    'clips': count,
    'windows': spans,
    'direction': float(start['direction'].mean()),
    'figures': means(figures),
    'common': means(figures, common),
  }
