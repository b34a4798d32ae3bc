"""Scalars to disk and to the terminal, and the guard against NaN."""

import json
import math
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import tensorboardX

from salt_jax.errors import NonFiniteError


class Writer:
  """Appends scalars to `metrics.jsonl` and to TensorBoard files; only process 0 writes.

  Attributes:
    path: the lines, one JSON object per step: {"step": 12, "loss": 0.5, ...}.
  """

  def __init__(self, workdir: str, resume_step: int = 0):
    """Opens the files and drops what a killed run wrote after the step it goes on from."""
    self.path = pathlib.Path(workdir) / 'metrics.jsonl'
    self._writes = jax.process_index() == 0
    if not self._writes:
      return
    self.path.parent.mkdir(parents=True, exist_ok=True)
    _drop_after(self.path, resume_step)
    self._lines = self.path.open('a', buffering=1, encoding='utf-8')
    self._board = tensorboardX.SummaryWriter(
      str(self.path.parent / 'tensorboard'), purge_step=resume_step + 1
    )

  def write(self, step: int, scalars: Mapping[str, float]) -> None:
    """Writes one line and one point per curve; what is not finite becomes null in the line."""
    if not self._writes:
      return
    values = {name: float(value) for name, value in scalars.items()}
    line = {name: value if math.isfinite(value) else None for name, value in values.items()}
    self._lines.write(json.dumps({'step': int(step)} | line) + '\n')
    for name, value in values.items():
      self._board.add_scalar(name, value, int(step))

  def close(self) -> None:
    """Flushes and closes both files."""
    if self._writes:
      self._lines.close()
      self._board.close()


class Progress:
  """The line a person watches: 'step 120/400  3.1 step/s  left 1m30s  loss 0.123'."""

  def __init__(self, total: int, start: int = 0, clock: Callable[[], float] = time.monotonic):
    """Counts from `start` to `total` steps; `clock` returns seconds."""
    self._total = total
    self._clock = clock
    self._mark = None

  def line(self, step: int, scalars: Mapping[str, float]) -> str:
    """Describes `step`; the rate is measured from the first call on, so compilation is left out."""
    now = self._clock()
    parts = [f'step {step}/{self._total}']
    if self._mark is None:
      self._mark = (step, now)
    elif step > self._mark[0] and now > self._mark[1]:
      rate = (step - self._mark[0]) / (now - self._mark[1])
      parts += [f'{rate:.3g} step/s', f'left {seconds((self._total - step) / rate)}']
    parts += [f'{name} {float(value):.4g}' for name, value in scalars.items()]
    return '  '.join(parts)


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
