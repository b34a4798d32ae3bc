"""Scalars to disk and to the terminal, and the guard against NaN."""

import json
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from salt_jax.errors import NonFiniteError


class Writer:
  """Appends scalars to `metrics.jsonl` and to TensorBoard files; only process 0 writes.

  How long steps took goes into `timing.jsonl`, so that the other file is the same for the same run.

  Attributes:
    path: the lines, one JSON object per step: {"step": 12, "loss": 0.5, ...}.
    timing_path: likewise, for some steps.
  """

  def __init__(self, workdir: str, resume_step: int = 0):
    """Opens the files and drops what a killed run wrote after the step it goes on from."""
    self.path = pathlib.Path(workdir) / 'metrics.jsonl'
    self.timing_path = self.path.with_name('timing.jsonl')
    self._writes = jax.process_index() == 0
    if not self._writes:
      return
    self.path.parent.mkdir(parents=True, exist_ok=True)
    self._lines, self._timing = (
      _continued(path, resume_step) for path in (self.path, self.timing_path)
    )
    import tensorboardX  # takes torch along where that is installed, which takes a second

    self._board = tensorboardX.SummaryWriter(
      str(self.path.parent / 'tensorboard'), purge_step=resume_step + 1
    )

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    """Writes one line and one point per curve; what is not finite becomes null in the line."""
    if self._writes:
      self._write(self._lines, step, scalars)

  def write_timing(self, step: int, measured: Mapping[str, float]) -> None:
    """The same for what `Progress.measure` found; its curves stand under 'run/'."""
    if self._writes and measured:
      self._write(self._timing, step, measured, 'run/')

  def _write(self, file, step, scalars, prefix=''):
    values = {name: float(value) for name, value in scalars.items()}
    line = {name: value if math.isfinite(value) else None for name, value in values.items()}
    file.write(json.dumps({'step': int(step)} | line) + '\n')
    for name, value in values.items():
      self._board.add_scalar(prefix + name, value, int(step))

  def close(self) -> None:
    """Flushes and closes all files."""
    if self._writes:
      for file in (self._lines, self._timing, self._board):
        file.close()


def without_inactive(scalars: Mapping[str, float]) -> dict[str, float]:
  """Drops what belongs to a term that slept: for 'STEP/active_TERM' 0 its 'STEP/loss_TERM' and 'STEP/TERM_…'."""
  asleep = tuple(
    f'{step}/{prefix}'
    for name, value in scalars.items()
    for step, _, term in [name.partition('/active_')]
    if term and not value
    for prefix in (f'loss_{term}', f'{term}_')
  )
  return {name: value for name, value in scalars.items() if not name.startswith(asleep)}


def assert_finite(
  step: int, scalars: Mapping[str, float], last_good: int | None, folder: str
) -> None:
  """Stops the run at the first NaN or infinity.

  Args:
    step: the step the scalars belong to.
    scalars: name to value.
    last_good: step of the newest checkpoint, None while there is none.
    folder: where the checkpoints lie.

  Raises:
    NonFiniteError: naming the scalar, the step and the checkpoint to go back to.
  """
  for name, value in scalars.items():
    if not math.isfinite(float(value)):
      kept = 'there is no' if last_good is None else 'the last good'
      at = '' if last_good is None else f' is step {last_good}'
      raise NonFiniteError(
        f'step {step}: {name} is {float(value)}; stopped, {kept} checkpoint{at} in {folder}.'
      )


def param_count(tree: Any) -> int:
  """Number of scalars in a tree of arrays or ShapeDtypeStructs."""
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def seconds(duration: float) -> str:
  """Formats a duration in seconds as '45s', '1m30s', '2h05m' or '3d04h'."""
  whole = round(duration)
  if whole < 60:
    return f'{whole}s'
  if whole < 3600:
    return f'{whole // 60}m{whole % 60:02d}s'
  if whole < 86400:
    return f'{whole // 3600}h{whole % 3600 // 60:02d}m'
  return f'{whole // 86400}d{whole % 86400 // 3600:02d}h'


def quantity(value: float) -> str:
  """Three digits and a prefix for the unit behind them: '5.51 P', '31 G', '950 '."""
  exponent = 0
  while value >= 999.5 and exponent < 6:
    value, exponent = value / 1000, exponent + 1
  return f'{value:.3g} {" kMGTPE"[exponent].strip()}'


def _continued(path: pathlib.Path, step: int):
  """The file, opened to append behind the lines up to `step`."""
  _drop_after(path, step)
  return path.open('a', buffering=1, encoding='utf-8')


def _drop_after(path: pathlib.Path, step: int) -> None:
  if not path.exists():
    return
  lines = path.read_text(encoding='utf-8').splitlines(keepends=True)
  # A killed writer can leave half a line at the end.
  whole = [line for line in lines if line.endswith('}\n')]
  kept = [line for line in whole if json.loads(line)['step'] <= step]
  fresh = path.with_name(path.name + '.new')
  fresh.write_text(''.join(kept), encoding='utf-8')
  fresh.replace(path)
