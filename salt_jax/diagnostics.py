"""Whether Salt works: what a student does against its own consistency, its cache, and the length of a clip.

  python -m salt_jax.evaluate --diagnose=defect,cache,swap,drift --checkpoint=RUN --clips=16 --output=FOLDER
  python -m salt_jax.evaluate --diagnose=defect,cache,drift --checkpoint=RUN --prompts=FILE --clips=16 --output=FOLDER

defect  how far one long step is from two short ones, over all time triples (salt_method.md 2.3, 5.5)
cache   chunks sampled with K steps behind a history that was made with K' (salt_method.md 3.1)
swap    chunks sampled behind real clips, against behind the student's own
drift   quality and motion over the clip, at the trained length and beyond

Every student is asked for the same step counts and triples, whatever it was trained on, so that students compare.
Noise belongs to the clip, so two students see the same noise. A student of the nano world is asked for held-out
captions and judged by `judge`; any other one for given prompts, and figures are then those of `monitor.looks`.
"""

import functools
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, reduce
from jaxtyping import Array, Float, PyTree, UInt8
from ml_collections import ConfigDict

from salt_jax import (
  charts,
  clips,
  codec,
  drift,
  statistics,
)
from salt_jax.diffusion import flow, probes
from salt_jax.diffusion.rollout import Rollout
from salt_jax.errors import InputError
from salt_jax.losses.consistency import defect as normalised_defect
from salt_jax.models import vae
from salt_jax.models.cache import KVCache
from salt_jax.recipe import Recipe
from salt_jax.step import to_unit
from salt_jax.subject import Subject

log = logging.getLogger('salt_jax.diagnostics')

NAMES = ('defect', 'cache', 'swap', 'drift')
GRID = 8  # Steps of the grid that triples lie on.
STEPS = (2, 4, 8)


def names(text: str) -> tuple[str, ...]:
  """Reads a comma list of diagnostics.

  Raises:
    InputError: one is unknown, or there is none.
  """
  found = tuple(dict.fromkeys(word.strip() for word in text.split(',') if word.strip()))
  for word in found or (text,):
    if word not in NAMES:
      raise InputError(f'--diagnose: "{word}" is unknown; choose from {", ".join(NAMES)}.')
  return found


def check(asked: Sequence[str], config: ConfigDict, rec: Recipe, prompts: bool) -> None:
  """Refuses what a student does not have.

  Args:
    asked: diagnostics.
    config: of the student.
    rec: the same, built.
    prompts: whether the clips are of given prompts.

  Raises:
    InputError: a student without the clips, the pictures, the cache or the memory that is asked for.
  """
  _check_clips(asked, config, rec, prompts)
  if rec.model.frame_channels and 'drift' in asked:
    raise InputError(
      '--diagnose=drift needs longer clips, and a student that is given first frames makes those of its own length: '
      'leave drift out.'
    )
  without = [name for name in asked if name != 'defect']
  if without and not rec.chunking.causal:
    raise InputError(
      f'--diagnose={",".join(without)} needs chunks and a cache, but this student is bidirectional: '
      'ask for --diagnose=defect.'
    )
  if 'drift' in asked:
    drift.check(config, rec)


def _check_clips(asked: Sequence[str], config: ConfigDict, rec: Recipe, prompts: bool) -> None:
  nano = config.size == 'nano'
  if rec.model.frame_channels and (prompts or not nano):
    mend = 'leave --prompts out' if nano else 'look into a text-to-video student'
    raise InputError(
      f'--diagnose: this student continues a picture, and prompts come without: {mend}.'
    )
  if not (nano or prompts):
    raise InputError(
      f'--diagnose has captions for nano students alone, and this one is of {config.name}: pass --prompts, a file '
      'with one prompt a line.'
    )
  if prompts and 'swap' in asked:
    raise InputError(
      '--diagnose=swap needs real clips, and --prompts come without: leave swap out.'
    )


_behind = jax.jit(probes.chunks_behind, static_argnums=0)
_commit = jax.jit(probes.commit, static_argnums=(0, 5))


# Defect.


@functools.partial(jax.jit, static_argnums=(0, 5))
def defects(
  apply: Callable,
  params: PyTree,
  text: Float[Array, 'b n d'],
  rolled: Rollout,
  levels: tuple,
  chunk: int,
) -> tuple[Float[Array, 'b'], Float[Array, 'b n']]:
  """The normalised defect of each clip, and of each chunk of it; arguments as for `probes.two_ways`."""
  ways = probes.two_ways(apply, params, text, rolled, levels, chunk)
  parts = (rearrange(y, 'b (n f) h w c -> (b n) f h w c', f=chunk) for y in ways)
  by_chunk = rearrange(normalised_defect(*parts), '(b n) -> b n', b=rolled.trace.x.shape[0])
  return normalised_defect(*ways), by_chunk


def defect(subject: Subject) -> dict:
  """The semigroup defect on the student's own x_s: rollouts of eight steps with the exit at s."""
  levels = _levels(subject)
  found, rows = subject.gathered(_defects_of), []
  for triple, (whole, by_chunk) in zip(probes.triples(GRID), found, strict=True):
    rows.append(
      {
        'labels': [1000 - 1000 * i / GRID for i in triple],
        'sigmas': [float(levels[i]) for i in triple],
        'defect': float(whole.mean()),
        'squared': float(np.square(whole).mean()),
        'by_chunk': by_chunk.mean(0).tolist(),
      }
    )
  values = np.stack([whole for whole, _ in found], -1)
  trained = np.array([row['sigmas'][0] < 1 for row in rows])
  return {
    'clips': len(values),
    'defect': _interval(values.mean(-1)),
    'squared': _interval(np.square(values).mean(-1)),
    # Pure noise has no weight in training.
    'defect_below_noise': _interval(values[:, trained].mean(-1)),
    'by_chunk': np.mean([row['by_chunk'] for row in rows], 0).tolist(),
    'triples': rows,
  }


def _levels(subject: Subject) -> Float[np.ndarray, 's']:
  return np.float32(flow.few_step_sigmas(GRID, subject.rec.schedule.shift))


def _defects_of(part: Subject) -> list[tuple]:
  """`defects` of each triple."""
  groups = itertools.groupby(probes.triples(GRID), lambda triple: triple[0])
  return [found for start, group in groups for found in _defects_from(part, start, group)]


def _defects_from(part: Subject, start: int, group: Iterable[tuple]) -> list[tuple]:
  """The same of triples with one s; a function of its own, so that one cache is alive at a time."""
  levels, rolled = _levels(part), part.roll(part.plan(GRID, start))
  found = []
  for triple in group:
    sigmas = tuple(levels[i] for i in triple)
    ratios = defects(part.apply, part.params, part.text, rolled, sigmas, part.chunk)
    found.append(tuple(np.asarray(x, np.float64) for x in ratios))
  return found


def _interval(values: Float[np.ndarray, 'b']) -> list[float]:
  """[mean, low, high], 95 % over the clips."""
  return list(statistics.summary({'value': values})['value'])


# Cache.


def _sampled(subject: Subject, steps: int, history: KVCache) -> Float[Array, 'b f h w c']:
  plan = subject.plan(steps)
  return _behind(subject.apply, subject.params, subject.keys, subject.text, plan, history)


def cache(subject: Subject) -> dict:
  """Each number of steps behind a history of each number of steps; equal numbers are plain generation."""
  found, pairs = subject.gathered(_pairs_of), []
  for history, steps in itertools.product(STEPS, STEPS):
    figures, distance = found[history, steps]
    pairs.append(
      {
        'history': history,
        'steps': steps,
        'figures': {name: _interval(figures[name]) for name in subject.figures},
        'distance_by_chunk': distance.mean(0).tolist(),
      }
    )
  return {'clips': len(subject.captions), 'step_counts': list(STEPS), 'pairs': pairs}


def _pairs_of(part: Subject) -> dict[tuple[int, int], tuple]:
  """Of each (history, steps): figures `[b]`, and by chunk the squared distance `[b n]` to equal numbers."""
  made = {history: _behind_history(part, history) for history in STEPS}
  found = {}
  for history, steps in itertools.product(STEPS, STEPS):
    x0 = made[history][steps]
    gap = np.square(x0 - made[steps][steps])
    by_chunk = reduce(gap, 'b (n f) h w c -> b n', 'mean', f=part.chunk)
    found[history, steps] = part.look(part.decode(x0)), by_chunk
  return found


def _behind_history(part: Subject, steps: int) -> dict[int, Float[np.ndarray, 'b f h w c']]:
  """Latents of each number of steps; a function of its own, so that one cache is alive at a time."""
  history = part.roll(part.plan(steps)).cache
  return {k: np.asarray(_sampled(part, k, history)) for k in STEPS}


# Swap.


def decode_behind(
  subject: Subject, made: Float[Array, 'b f h w c'], past: Float[Array, 'b f h w c']
) -> UInt8[np.ndarray, 'b t h w 3']:
  """Decodes each chunk of `made` as the one that follows the chunks of `past` before it."""
  params, cfg = subject.frozen['vae'], subject.rec.vae
  features, parts = {}, []
  for start in range(0, made.shape[1], subject.chunk):
    part = slice(start, start + subject.chunk)
    own = jax.tree.map(jnp.copy, features)
    parts.append(codec.decode_next(params, made[:, part], own, cfg, start == 0)[0])
    features = codec.decode_next(params, past[:, part], features, cfg, start == 0)[1]
  return np.concatenate(parts, 1)


def real_latents(subject: Subject) -> Float[np.ndarray, 'b f h w c']:
  """The VAE's latents of the clips that the captions describe."""
  video, index = subject.config.video, np.asarray(subject.asked.batch[2])
  films = clips.films(index, subject.asked.split, subject.config.seed, video.frames, video.height)
  run = jax.jit(lambda params, x: vae.encode(params, to_unit(x), subject.rec.vae))
  return np.concatenate([run(subject.frozen['vae'], film[None]) for film in films])


def swap(subject: Subject) -> dict:
  """Sampling behind the student's own cache and behind that of real clips, judged chunk by chunk.

  A chunk behind a real past is also decoded behind it, as it would follow there.
  """
  spans = drift.windows(subject.rec.chunking.frames, subject.chunk)
  found = subject.gathered(functools.partial(_swapped, spans=spans))
  rows = [
    {'cache': kind, 'steps': steps, 'figures': drift.means(figures, drift.figures(subject))}
    for (kind, steps), figures in zip(_swap_rows(), found, strict=True)
  ]
  return {
    'clips': len(subject.captions),
    'split': subject.asked.split,
    'windows': spans,
    'rows': rows,
  }


def _swap_rows() -> list[tuple[str, int | None]]:
  """(cache, steps) of what `_swapped` finds."""
  return [
    ('clips themselves', None),
    *((kind, steps) for steps in STEPS for kind in ('own', 'real')),
  ]


def _swapped(part: Subject, spans: Sequence[tuple[int, int]]) -> list[dict]:
  """Figures by window of each row."""
  real = real_latents(part)
  model = part.apply, part.params, part.keys, part.text
  history = _commit(*model, real, part.rec.chunking)
  videos = [part.decode(real)]
  for steps in STEPS:
    videos.append(part.decode(part.roll(part.plan(steps)).x0))
    videos.append(decode_behind(part, _sampled(part, steps, history), real))
  own = len(part.captions)
  return [drift.by_window(part, video[:own], spans) for video in videos]


def run(asked: Sequence[str], subject: Subject, folder: str) -> dict[str, dict]:
  """Makes `NAME.json` and `NAME.png` of each diagnostic in a folder, and returns the numbers."""
  makers = {
    'defect': (defect, charts.defect),
    'cache': (cache, charts.cache),
    'swap': (swap, charts.swap),
    'drift': (drift.drift, charts.drift),
  }
  os.makedirs(folder, exist_ok=True)
  results = {}
  for name in asked:
    measure, draw = makers[name]
    results[name] = measure(subject)
    with open(os.path.join(folder, f'{name}.json'), 'w', encoding='utf-8') as file:
      json.dump(results[name], file, indent=1)
    charts.write(os.path.join(folder, f'{name}.png'), draw(results[name]))
    log.info('wrote %s.json and %s.png to %s', name, name, folder)
  return results
