"""A profile of chosen steps, for TensorBoard's profile plugin, XProf or Perfetto.

The operations in it stand under the names of networks: text, rollout, student, teacher, critic, consistency,
reference, alignment, optimizer.
"""

import logging
import os
import re
from typing import NamedTuple

import jax
from jaxtyping import PyTree

from salt_jax.errors import InputError

log = logging.getLogger(__name__)


class Steps(NamedTuple):
  """Steps from `first` to `last`, both included, counted from 1 as the log does; (0, 0) is none."""

  first: int = 0
  last: int = 0


def parse(text: str | None, total: int) -> Steps:
  """Reads 'FIRST:LAST'.

  Args:
    text: of the flag; None is none.
    total: steps of the run.

  Raises:
    InputError: it is not two numbers, or not steps of the run.
  """
  if text is None:
    return Steps()
  found = re.fullmatch(r'(\d+):(\d+)', text)
  if not found:
    raise InputError(
      f'--profile={text} must be the first and the last step, such as --profile=10:13.'
    )
  steps = Steps(*map(int, found.groups()))
  if not 1 <= steps.first <= steps.last <= total:
    raise InputError(
      f'--profile={text} must name steps between 1 and total_steps={total}, the first one first.'
    )
  return steps


def ahead(steps: Steps, start: int) -> Steps:
  """The steps, or none where a run that goes on behind step `start` has left them behind.

  The same command goes on, so it is a warning: whoever starts it again may not be able to change it.
  """
  if not 0 < steps.first <= start:
    return steps
  log.warning(
    'no profile: --profile=%d:%d begins before step %d, behind which the run goes on; choose from %d on.',
    *steps,
    start,
    start + 1,
  )
  return Steps()


class Profiler:
  """Traces the chosen steps on this process, into `folder`, one folder a process if there are several."""

  def __init__(self, steps: Steps, folder: str):
    self._steps = steps
    several = jax.process_count() > 1
    self._folder = os.path.join(folder, f'process{jax.process_index()}') if several else folder
    self._running = False

  def before(self, step: int, state: PyTree) -> None:
    """Starts ahead of the first chosen step, once the steps before it are done on the device."""
    if step != self._steps.first:
      return
    jax.block_until_ready(state)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # every Python call would drown what the device does
    jax.profiler.start_trace(self._folder, profiler_options=options)
    self._running = True

  def after(self, step: int, state: PyTree) -> bool:
    """Stops behind the last chosen step, once it is done on the device; says whether it did."""
    if not self._running or step < self._steps.last:
      return False
    jax.block_until_ready(state)
    self.close()
    log.info('profile of steps %d to %d in %s', *self._steps, self._folder)
    return True

  def close(self) -> None:
    """Stops a trace that is not finished, so that what there is of it is written."""
    if self._running:
      self._running = False
      jax.profiler.stop_trace()
