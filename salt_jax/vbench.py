"""What VBench said of exported videos: its table, with intervals, and paired with another export's.

  python -m salt_jax.vbench --results=runs/vbench [--against=runs/other]

VBench itself runs elsewhere (`launch/vbench.sh`). A dimension is normalised between fixed ends, and

  quality = weighted mean of 7 dimensions    semantic = mean of 9    total = (4 quality + semantic) / 5

The ends and weights are those of VBench's own score scripts (Vchitect/VBench: scripts/constant.py,
scripts/cal_final_score.py). Intervals are 95 % by a bootstrap over prompts, each resampled among those that serve the
same dimensions and alike for both sides of a pair; a prompt takes all of its videos along.
"""

import glob
import json
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from absl import flags
from jaxtyping import Float

from salt_jax import benchmark, cli, statistics
from salt_jax.errors import InputError

log = logging.getLogger('salt_jax.vbench')

SCORES = 'scores'
READ = 5  # samples of a prompt that VBench reads
SMALLEST = 20  # prompts of a stratum; smaller ones are resampled together
CLOSE = 5e-3  # between its figure and the mean over its videos


class Dimension(NamedTuple):
  """Ends of the normalisation, weight, and whether it counts to quality or to semantic."""

  low: float
  high: float
  quality: bool
  weight: float = 1.0


DIMENSIONS = {
  'subject_consistency': Dimension(0.1462, 1.0, True),
  'background_consistency': Dimension(0.2615, 1.0, True),
  'temporal_flickering': Dimension(0.6293, 1.0, True),
  'motion_smoothness': Dimension(0.706, 0.9975, True),
  'dynamic_degree': Dimension(0.0, 1.0, True, weight=0.5),
  'aesthetic_quality': Dimension(0.0, 1.0, True),
  'imaging_quality': Dimension(0.0, 1.0, True),
  'object_class': Dimension(0.0, 1.0, False),
  'multiple_objects': Dimension(0.0, 1.0, False),
  'human_action': Dimension(0.0, 1.0, False),
  'color': Dimension(0.0, 1.0, False),
  'spatial_relationship': Dimension(0.0, 1.0, False),
  'scene': Dimension(0.0, 0.8222, False),
  'appearance_style': Dimension(0.0009, 0.2855, False),
  'temporal_style': Dimension(0.0, 0.364, False),
  'overall_consistency': Dimension(0.0, 0.364, False),
}
TOTALS = ('quality', 'semantic', 'total')
# Of these a video's figure is out of 100 and the whole one out of 1.
_PERCENT = ('imaging_quality',)
_PARTIAL = ('color', 'temporal_flickering')  # videos without the object, or that move, are left out


class Results(NamedTuple):
  """What VBench said of one export.

  Attributes:
    folder: of the export.
    record: how it was made.
    reported: VBench's own figure of each dimension.
    videos: {dimension: {prompt: figures of its videos}}.
  """

  folder: str
  record: dict
  reported: dict[str, float]
  videos: dict[str, dict[str, list[float]]]


def read(folder: str) -> Results:
  """Reads the results beside an export.

  Raises:
    InputError: an incomplete or foreign folder, no results, a damaged file, a dimension that is scored twice, or
      results of other videos.
  """
  record = benchmark.check_complete(folder)
  paths = sorted(
    glob.glob(f'{glob.escape(folder)}/{SCORES}/**/*_eval_results.json', recursive=True)
  )
  if not paths:
    raise InputError(
      f'{folder}/{SCORES} holds no *_eval_results.json: run launch/vbench.sh {folder} first.'
    )
  reported: dict[str, float] = {}
  videos: dict[str, dict[str, list[float]]] = {}
  for path in paths:
    for name, (figure, entries) in _load(path).items():
      if name in reported:
        raise InputError(f'{folder}/{SCORES} scores {name} twice: keep one of the files.')
      reported[name] = float(figure)
      videos[name] = _by_prompt(path, name, entries, record)
      _check_mean(name, reported[name], videos[name])
  return Results(folder, record, reported, videos)


def _load(path: str) -> dict[str, tuple[float, list]]:
  try:
    with open(path, encoding='utf-8') as file:
      found = json.load(file)
    scores = {}
    for name, (figure, entries) in found.items():
      DIMENSIONS[name]
      scores[name] = float(figure), [(e['video_path'], float(e['video_results'])) for e in entries]
    return scores
  except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
    raise InputError(f'{path} is no result of VBench, or damaged: score it again.') from error


def _by_prompt(path: str, name: str, entries: list, record: dict) -> dict[str, list[float]]:
  """Figures of the videos of each prompt; every video that VBench had to read must be there."""
  owner = benchmark.expected(record)
  found: dict[str, dict[str, float]] = defaultdict(dict)
  for video, figure in entries:
    file = os.path.basename(video)
    if file not in owner:
      raise InputError(f'{path} scores "{file}", which is not of this export: score this folder.')
    found[owner[file]][file] = figure / 100 if name in _PERCENT else figure
  wanted = {
    e['prompt']: min(e['samples'], READ) for e in record['items'] if name in e['dimensions']
  }
  short = [prompt for prompt, count in wanted.items() if len(found.get(prompt, ())) < count]
  if short and name not in _PARTIAL:
    raise InputError(
      f'{path} lacks videos of {len(short)} of {len(wanted)} prompts of {name}, such as "{short[0]}": score it again.'
    )
  if not found:
    raise InputError(f'{path} scores no video of {name}: score it again.')
  return {prompt: list(files.values()) for prompt, files in found.items()}


def _check_mean(name: str, figure: float, videos: Mapping[str, list[float]]) -> None:
  mean = float(np.mean(sum(videos.values(), [])))
  if abs(mean - figure) > CLOSE:
    log.warning(
      '%s: VBench reports %.4f but its videos have the mean %.4f; the table shows the former.',
      name,
      figure,
      mean,
    )


def normalised(name: str, figure):
  """Between the fixed ends of a dimension; not clipped, as VBench does not."""
  ends = DIMENSIONS[name]
  return (figure - ends.low) / (ends.high - ends.low)


def totals(figures: Mapping[str, float]) -> dict[str, float]:
  """Quality, semantic and total of raw figures (or arrays of them); empty unless all 16 dimensions are there."""
  if figures.keys() != DIMENSIONS.keys():
    return {}
  means = {}
  for title, quality in (('quality', True), ('semantic', False)):
    names = [name for name, d in DIMENSIONS.items() if d.quality == quality]
    weights = [DIMENSIONS[name].weight for name in names]
    parts = [w * normalised(n, figures[n]) for n, w in zip(names, weights, strict=True)]
    means[title] = sum(parts) / sum(weights)
  return means | {'total': (4 * means['quality'] + means['semantic']) / 5}


def resampled(
  results: Results, prompts: Sequence[str], counts: Float[np.ndarray, 'draws prompts']
) -> dict[str, Float[np.ndarray, 'draws']]:
  """Every dimension and total, were prompts drawn `counts` times."""
  figures = {}
  for name, videos in results.videos.items():
    sums = np.array([sum(videos.get(prompt, ())) for prompt in prompts])
    sizes = np.array([len(videos.get(prompt, ())) for prompt in prompts])
    figures[name] = (counts @ sums) / np.maximum(counts @ sizes, 1)
  return figures | totals(figures)


def _draws(sets: Sequence[Results], seed: int) -> tuple[list[str], np.ndarray]:
  """Prompts of all results, and how often each is drawn."""
  serves: dict[str, set[str]] = defaultdict(set)
  for results in sets:
    for name, videos in results.videos.items():
      for prompt in videos:
        serves[prompt].add(name)
  strata = [tuple(sorted(names)) for names in serves.values()]
  sizes = Counter(strata)
  # A stratum of one would always be drawn once, as if nothing were uncertain about it.
  strata = [stratum if sizes[stratum] >= SMALLEST else () for stratum in strata]
  return list(serves), statistics.multiplicities(strata, seed=seed)


def estimates(results: Results, seed: int = 0) -> dict[str, statistics.Estimate]:
  """Each dimension, raw, and the totals, with intervals."""
  drawn = resampled(results, *_draws([results], seed))
  return _with_intervals(results.reported | totals(results.reported), drawn)


def differences(one: Results, other: Results, seed: int = 0) -> dict[str, statistics.Estimate]:
  """`one` minus `other`, paired by prompt, of every figure that both have.

  Raises:
    InputError: the exports are of other prompts or numbers of samples.
  """
  if one.record['items'] != other.record['items']:
    raise InputError(
      f'{one.folder} and {other.folder} are no pair: their prompts or samples differ, so export both from one --vbench.'
    )
  drawn = [resampled(results, *_draws([one, other], seed)) for results in (one, other)]
  figures = [results.reported | totals(results.reported) for results in (one, other)]
  shared = [name for name in figures[0] if name in figures[1]]
  return _with_intervals(
    {name: figures[0][name] - figures[1][name] for name in shared},
    {name: drawn[0][name] - drawn[1][name] for name in shared},
  )


def _with_intervals(figures: Mapping, drawn: Mapping) -> dict[str, statistics.Estimate]:
  return {name: statistics.estimate(value, drawn[name]) for name, value in figures.items()}


def table(results: Results, other: Results | None = None) -> str:
  """Markdown in points of 100: raw figure with its interval, normalised figure, and the paired difference."""
  own = estimates(results)
  gaps = differences(results, other) if other else {}
  head = ['| dimension | score | 95 % | normalised |' + (' difference | 95 % |' if other else '')]
  head.append('|---' * (6 if other else 4) + '|')
  rows = [name for name in (*TOTALS, *DIMENSIONS) if name in own]
  lines = head + [_row(name, own[name], gaps.get(name), bool(other)) for name in rows]
  missing = [name for name in DIMENSIONS if name not in own]
  notes = [f'No totals: {", ".join(missing)} not scored.'] if missing else []
  if other:
    notes.append(f'Difference to {other.folder}; {_protocols(results.record, other.record)}')
  return '\n'.join([*lines, '', *notes]).rstrip() + '\n'


def _row(name: str, own: statistics.Estimate, gap: statistics.Estimate | None, paired: bool) -> str:
  scaled = '' if name in TOTALS else f'{100 * normalised(name, own.mean):.2f}'
  cells = [name, f'{100 * own.mean:.2f}', f'{100 * own.low:.2f} to {100 * own.high:.2f}', scaled]
  if paired and gap:
    cells += [f'{100 * gap.mean:+.2f}', f'{100 * gap.low:+.2f} to {100 * gap.high:+.2f}']
  elif paired:
    cells += ['', '']
  return '| ' + ' | '.join(cells) + ' |'


def _protocols(one: dict, other: dict) -> str:
  keys = [
    k
    for k in ('networks', 'texts_sha256', 'seed', 'sampler', 'video', 'codec')
    if one[k] != other[k]
  ]
  return f'the exports differ in {", ".join(keys)}.' if keys else 'the exports are of one protocol.'


def define_flags() -> None:
  flags.DEFINE_string('results', None, 'Folder of an export that VBench has scored.')
  flags.DEFINE_string('against', None, 'Another one, to which it is compared prompt by prompt.')
  flags.DEFINE_bool('check', False, 'Only see whether all videos of --results are there.')


def program() -> None:
  args = flags.FLAGS
  if not args.results:
    raise InputError('pass --results: a folder that salt_jax.evaluate --vbench has written.')
  if args.check:
    record = benchmark.check_complete(args.results)
    log.info('%s is complete: %d videos.', args.results, len(benchmark.expected(record)))
    return
  results = read(args.results)
  other = read(args.against) if args.against else None
  text = table(results, other)
  found = {'record': results.record, 'scores': estimates(results)}
  if other:
    found |= {'against': other.record, 'differences': differences(results, other)}
  with open(os.path.join(args.results, 'table.md'), 'w', encoding='utf-8') as file:
    file.write(text)
  with open(os.path.join(args.results, 'table.json'), 'w', encoding='utf-8') as file:
    json.dump(found, file, indent=1, ensure_ascii=False)
  print(text)


if __name__ == '__main__':
  cli.run(program, define_flags)
