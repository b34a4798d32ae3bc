"""Heat maps and line charts, drawn with Pillow alone, and the pictures of the diagnostics made of them."""

from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont

from salt_jax.video import INK, PAPER, save

Panels = list[list[Image.Image]]  # Rows of a page.

FAINT = (90, 90, 90)
# From low to high: dark blue, violet, red, orange, pale yellow.
_STOPS = np.array(
  [(24, 24, 72), (92, 36, 128), (184, 52, 92), (236, 124, 52), (252, 232, 140)], np.float64
)
_SERIES = (
  (102, 194, 255),
  (255, 170, 70),
  (130, 220, 120),
  (240, 110, 150),
  (190, 150, 255),
  (230, 220, 100),
)
CELL, ROW = 62, 20
WIDTH, HEIGHT = 340, 170  # of the plotted area
MARGIN = 8
_FONT = ImageFont.load_default(size=12)


def _text(draw: ImageDraw.ImageDraw, at: tuple[float, float], text: str, anchor='lm', ink=INK):
  draw.text(at, text, ink, _FONT, anchor=anchor)


def _width(text: str) -> int:
  return int(_FONT.getlength(text)) + 1


def _number(value: float) -> str:
  return f'{value:.3g}' if np.isfinite(value) else '-'


def _scaled(values: np.ndarray) -> np.ndarray:
  """To [0, 1] between the smallest and the largest finite value."""
  finite = values[np.isfinite(values)]
  low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
  return np.clip((values - low) / max(high - low, 1e-12), 0, 1)


def _colour(share: float) -> tuple[int, int, int]:
  if not np.isfinite(share):
    return FAINT
  places = np.linspace(0, 1, len(_STOPS))
  return tuple(int(np.interp(share, places, channel)) for channel in _STOPS.T)


def heat_map(
  title: str, rows: Sequence[str], columns: Sequence[str], values: Float[np.ndarray, 'r c']
) -> Image.Image:
  """A table whose cells are coloured from the smallest to the largest value, with the values printed."""
  values = np.asarray(values, np.float64)
  left = max(map(_width, rows)) + 2 * MARGIN
  cell = max(CELL, *(_width(column) + MARGIN for column in columns))
  top = 2 * ROW + MARGIN
  width = max(left + cell * len(columns), _width(title) + MARGIN) + MARGIN
  image = Image.new('RGB', (width, top + ROW * len(rows) + MARGIN), PAPER)
  draw = ImageDraw.Draw(image)
  _text(draw, (MARGIN, ROW / 2 + 4), title)
  for c, column in enumerate(columns):
    _text(draw, (left + (c + 0.5) * cell, 1.5 * ROW + 4), column, 'mm')
  for r, (row, shares) in enumerate(zip(rows, _scaled(values), strict=True)):
    y = top + r * ROW
    _text(draw, (MARGIN, y + ROW / 2), row)
    for c, share in enumerate(shares):
      x = left + c * cell
      draw.rectangle((x, y, x + cell - 2, y + ROW - 2), _colour(share))
      ink = PAPER if share > 0.6 else INK
      _text(draw, (x + cell / 2, y + ROW / 2), _number(values[r, c]), 'mm', ink)
  return image


def _range(arrays: Sequence[np.ndarray]) -> tuple[float, float]:
  """Smallest and largest value, with some room, but none below zero if nothing is."""
  every = np.concatenate(arrays)
  every = every[np.isfinite(every)]
  low, high = (float(every.min()), float(every.max())) if every.size else (0.0, 1.0)
  room = 0.06 * (high - low) or max(abs(high), 1.0) * 0.5
  return (max(low - room, 0.0) if low >= 0 else low - room), high + room


def line_chart(
  title: str, series: Mapping[str, tuple[Sequence[float], Sequence[float]]], log_x: bool = False
) -> Image.Image:
  """Lines with a dot at each point.

  Args:
    title: also says what the axes are.
    series: label to (x, y); y that is not finite is left out.
    log_x: x on a logarithmic scale; it must then be positive.
  """
  curves = {label: (np.asarray(x, float), np.asarray(y, float)) for label, (x, y) in series.items()}
  left, top = 52 + MARGIN, 2 * ROW + MARGIN
  size = (left + WIDTH + 2 * MARGIN, top + HEIGHT + ROW + MARGIN)
  image = Image.new('RGB', size, PAPER)
  draw = ImageDraw.Draw(image)
  _text(draw, (MARGIN, ROW / 2 + 4), title)
  scale = np.log2 if log_x else np.asarray
  x_range, y_range = (
    _range([scale(x) for x, _ in curves.values()]),
    _range([y for _, y in curves.values()]),
  )
  _axes(draw, (left, top), [x for x, _ in curves.values()], y_range, (scale, x_range))
  at = left
  for colour, (label, (x, y)) in zip(_SERIES * 8, curves.items(), strict=False):
    draw.rectangle((at, 1.5 * ROW, at + 8, 1.5 * ROW + 8), colour)
    _text(draw, (at + 12, 1.5 * ROW + 4), label)
    at += 12 + _width(label) + MARGIN
    points = [
      (left + _share(scale(a), x_range) * WIDTH, top + HEIGHT * (1 - _share(b, y_range)))
      for a, b in zip(x, y, strict=True)
      if np.isfinite(b)
    ]
    draw.line(points, colour, 2)
    for px, py in points:
      draw.ellipse((px - 2, py - 2, px + 2, py + 2), colour)
  return image


def _share(value, bounds):
  return (value - bounds[0]) / (bounds[1] - bounds[0])


def _axes(draw, corner, xs, y_range, x_axis) -> None:
  """A frame, three marks at the left and up to eight below."""
  left, top = corner
  scale, x_range = x_axis
  draw.rectangle((left, top, left + WIDTH, top + HEIGHT), outline=FAINT)
  for share in (0.0, 0.5, 1.0):
    value = y_range[0] + share * (y_range[1] - y_range[0])
    y = top + HEIGHT * (1 - share)
    draw.line((left, y, left + WIDTH, y), FAINT)
    _text(draw, (left - 4, y), _number(value), 'rm')
  last = -np.inf
  for x in np.unique(np.concatenate(xs)):
    place = left + _share(scale(x), x_range) * WIDTH
    if place - last > _width(_number(x)) + MARGIN:
      _text(draw, (place, top + HEIGHT + ROW / 2), _number(x), 'mm')
      last = place


def write(path: str, panels: Panels) -> None:
  """Writes panels as a PNG, row below row."""
  rows = []
  for line in panels:
    width, height = sum(p.width + MARGIN for p in line), max(p.height for p in line)
    row = Image.new('RGB', (width, height), PAPER)
    at = 0
    for panel in line:
      row.paste(panel, (at, 0))
      at += panel.width + MARGIN
    rows.append(row)
  page = Image.new('RGB', (max(r.width for r in rows), sum(r.height for r in rows)), PAPER)
  at = 0
  for row in rows:
    page.paste(row, (0, at))
    at += row.height
  save(path, page, format='PNG')


# Pictures of the numbers that `diagnostics` makes.


def defect(found: Mapping) -> Panels:
  """One row a triple, one column a chunk."""
  rows = ['>'.join(f'{label:g}' for label in row['labels']) for row in found['triples']]
  values = [[row['defect'], *row['by_chunk']] for row in found['triples']]
  values.append([found['defect'][0], *found['by_chunk']])
  columns = ['clip', *(f'chunk {i}' for i in range(len(found['by_chunk'])))]
  title = f'semigroup defect of s>m>e, {found["clips"]} clips'
  return [[heat_map(title, [*rows, 'mean'], columns, np.array(values))]]


def cache(found: Mapping) -> Panels:
  """A table a figure, rows are the history; then the distance to the diagonal by chunk."""
  steps = found['step_counts']
  rows, columns = [f'history {k}' for k in steps], [f'{k} steps' for k in steps]
  pairs = {(pair['history'], pair['steps']): pair for pair in found['pairs']}

  def table(title, value):
    return heat_map(title, rows, columns, [[value(pairs[h, k]) for k in steps] for h in steps])

  def lines(k):
    distances = {h: pairs[h, k]['distance_by_chunk'] for h in steps if h != k}
    curves = {f'history {h}': (np.arange(len(d)), d) for h, d in distances.items()}
    return line_chart(f'{k} steps: distance to history {k} by chunk', curves)

  judged = [
    table(name, lambda pair, name=name: pair['figures'][name][0])
    for name in found['pairs'][0]['figures']
  ]
  distance = table(
    'mean squared distance to the diagonal', lambda pair: np.mean(pair['distance_by_chunk'])
  )
  return [judged[:3], [*judged[3:], distance], [lines(k) for k in steps]]


def swap(found: Mapping) -> Panels:
  """One row a number of steps, one chart a figure."""
  places = np.arange(len(found['windows']))

  def chart(name, steps):
    rows = [row for row in found['rows'] if row['steps'] in (steps, None)]
    curves = {row['cache']: (places, row['figures'][name]) for row in rows}
    return line_chart(f'{name} by window, {steps} steps', curves)

  counts = dict.fromkeys(row['steps'] for row in found['rows'] if row['steps'])
  return [[chart(name, k) for name in found['rows'][0]['figures']] for k in counts]


def drift(found: Mapping) -> Panels:
  """Lengths over the clips that all have, each in as many points as the first has windows: few clips make a thicket."""
  points = len(found['lengths'][0]['windows'])

  def thinned(values):
    return [part.mean() for part in np.array_split(np.asarray(values), points)]

  def chart(name):
    curves = {
      f'{row["times"]}x': (thinned(np.mean(row['windows'], 1)), thinned(row['common'][name]))
      for row in found['lengths']
    }
    title = f'{name} over pixel frames, the same {found["common_clips"]} clips'
    return line_chart(title, curves, log_x=True)

  panels = [chart(name) for name in found['lengths'][0]['figures']]
  return [panels[:3], panels[3:]]
