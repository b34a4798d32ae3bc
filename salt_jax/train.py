"""The training loop: mesh → stage → state → steps → metrics → save → export and report."""

import collections
import contextlib
import errno
import functools
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from salt_jax import (
  evaluate,
  flops,
  hosts,
  monitor,
  profiling,
  programs,
  sharding,
  splits,
  stages,
  weights,
)
from salt_jax import recipe as recipes
from salt_jax import state as states
from salt_jax.checkpoint import Checkpoints, check_config, config_digest, write_config
from salt_jax.data import Feed
from salt_jax.errors import InputError, Preempted
from salt_jax.metrics import Writer, assert_finite, param_count, without_inactive
from salt_jax.places import check_local
from salt_jax.preemption import Notices
from salt_jax.profiling import Profiler
from salt_jax.progress import Progress
from salt_jax.step import STREAMS

log = logging.getLogger(__name__)

# What a later start of the same run may set differently.
FREE = (
  'total_steps',
  'accumulate',
  'checkpoint',
  'log',
  'evaluate',
  'workers',
  'mesh',
  'rules',
  'shard_min_size',
)


class _Call(NamedTuple):
  """A step of an iteration: how often, its compiled function and its batches."""

  name: str
  every: int
  run: Callable
  batches: Iterator


def run(config: ConfigDict, workdir: str, profile: str | None = None) -> dict[str, int]:
  """Trains a stage to its last step, or goes on where a killed run of it stopped.

  Args:
    config: the whole experiment.
    workdir: checkpoints, metrics, exports and pictures go here.
    profile: steps to make a profile of, such as '10:13'.

  Returns:
    How often each step function was traced: 1 each, or it recompiles.

  Raises:
    InputError: for whatever in the config or the workdir cannot work.
    NonFiniteError: at the first loss that is not finite; nothing is saved from then on.
    Preempted: the run was told to leave, and is saved.
  """
  rec = recipes.build(config)
  profiled = profiling.parse(profile, config.total_steps)
  mesh = sharding.make_mesh(config.mesh)
  splits.check_mesh(config, mesh)
  hosts.together(lambda: check_local(workdir))
  for folder in _folders(config, workdir):
    hosts.together(functools.partial(check_config, folder, config, FREE))
  hosts.check_shared(_folders(config, workdir)[-1])
  with contextlib.closing(Notices()) as notices, hosts.holding(workdir):
    try:
      return _run(config, rec, mesh, workdir, (notices, profiled))
    except OSError as error:
      if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        raise
      raise InputError(
        f'nothing more can be written to {workdir} ({error.strerror}): make room there, and the same command goes on.'
      ) from error


def _folders(config: ConfigDict, workdir: str) -> tuple[str, ...]:
  """Where the config is written: the workdir, and the folder of the checkpoints if it is another."""
  return tuple(dict.fromkeys((workdir, config.checkpoint.folder or workdir)))


def _run(config: ConfigDict, rec, mesh, workdir: str, outside: tuple) -> dict[str, int]:
  notices, profiled = outside
  stage = stages.build(config, rec, workdir)
  evaluate.check(config, rec)
  watch = monitor.watcher(config, rec, sharding.replicated(mesh))
  shapes = states.shapes_of(stage.shapes, rec.optimizers, stage.averaged, stage.stream)
  like, placed = states.with_shardings(shapes, mesh, config)
  checkpoints, start = _checkpoints(config, workdir)
  profiled = profiling.ahead(profiled, start)
  state = (
    _restore(checkpoints, start, like)
    if start
    else states.create(stage.start(), rec.optimizers, stage.averaged, placed, stage.stream)
  )
  _, frozen_placed = states.with_shardings(stage.frozen, mesh, config)
  frozen = states.place(stage.frozen, frozen_placed)
  stage = stage._replace(frozen={})  # the host needs them no more
  _announce(config, mesh, start, (state.params, frozen))

  traces = collections.Counter()
  layout = programs.Layout(placed, frozen_placed, mesh)
  calls = [
    _Call(
      spec.name,
      spec.every,
      programs.step(spec, rec, layout, traces),
      _feed(spec, config, start, mesh),
    )
    for spec in stage.steps
  ]
  writer, progress = Writer(workdir, start), Progress(config.total_steps, mesh.devices.flatten())
  progress.announce(_costs(config, rec, start))
  profiler = Profiler(profiled, os.path.join(workdir, 'profile'))
  guard = functools.partial(_guarded, traces=traces, progress=progress)
  waiting, spent, left = None, 0.0, None

  def flush():
    if waiting is not None:
      _log(waiting, config, checkpoints, writer, progress)

  def save(step):
    items = {'state': state.replace(ema={}), 'ema': state.ema}
    for folder in _folders(config, workdir):
      write_config(folder, config)
    extra = {'data_step': step, 'config': config_digest(config)}
    checkpoints.save(step, items, extra, force=True)

  # Whatever stops the loop, a save in progress is waited for.
  with (
    contextlib.closing(checkpoints),
    contextlib.closing(writer),
    contextlib.closing(profiler),
  ):
    for n in range(start, config.total_steps):
      if notices.due(n):
        left = n
        break
      profiler.before(n + 1, state)
      state, scalars = _iterate(n, state, frozen, calls, (mesh, guard))
      costs = _costs(config, rec, n)
      due = (call.name for call in calls if n % call.every == 0)
      spent += config.batch * sum(costs.get(name, 0.0) for name in due)
      if profiler.after(n + 1, state):
        progress.restart(n + 1, spent)
      scalars |= watch(state.ema, frozen, n + 1)
      # The scalars of the step before are read only now, so the host never holds up the device.
      flush()
      waiting, notices.saving = (n + 1, scalars, spent), True
      if progress.is_waiting:  # the clock starts at the end of this step, not behind the next
        flush()
        waiting = None
      if (n + 1) % config.checkpoint.every == 0 or n + 1 == config.total_steps:
        flush()
        waiting = None
        save(n + 1)
    if left is not None and left > start:
      flush()
      save(left)
  notices.saving = False
  if left is not None:
    raise Preempted(
      f'told to leave and saved step {left} of {config.total_steps}; the same command goes on from there.'
    )
  for name, count in traces.items():
    if count > 1:
      log.warning('%s_step was compiled %d times.', name, count)
  _finish(config, rec, state, workdir)
  return dict(traces)


def _checkpoints(config: ConfigDict, workdir: str) -> tuple[Checkpoints, int]:
  """The run's checkpoints, and the step of the newest."""
  root = _folders(config, workdir)[-1]
  folder = os.path.join(root, 'checkpoints')
  checkpoints = Checkpoints(folder, config.checkpoint.every, config.checkpoint.keep)
  if checkpoints.latest_step() == 0:
    raise InputError(
      f'{workdir} holds converted weights and no run: pass another --workdir, and '
      f'--config.weights.NAME={workdir} to start from them.'
    )
  start = checkpoints.latest_step() or 0
  hosts.check_agreed(f'the newest checkpoint in {workdir}', start)
  if start > config.total_steps:
    raise InputError(
      f'{workdir} is at step {start}, beyond total_steps={config.total_steps}: pass another --workdir.'
    )
  return checkpoints, start


def _restore(checkpoints: Checkpoints, step: int, like) -> states.TrainState:
  got = checkpoints.restore(step, {'state': like.replace(ema={}), 'ema': like.ema})
  return got['state'].replace(ema=got['ema'])


def _announce(config: ConfigDict, mesh, start: int, networks: tuple) -> None:
  log.info(
    '%s: %s parameters in training, %s frozen, on %d %s; step %d of %d',
    config.name,
    *(f'{param_count(params):,}' for params in networks),
    mesh.size,
    jax.devices()[0].platform,
    start,
    config.total_steps,
  )


def _costs(config: ConfigDict, rec, n: int) -> dict[str, float]:
  """FLOPs of each step for one example, at iteration n."""
  parts = flops.of_steps(config, rec, n)
  return {name: sum(part.flops for part in found) for name, found in parts.items()}


def _iterate(n: int, state, frozen, calls: Sequence[_Call], around: tuple) -> tuple:
  """All steps that iteration n has: (state, scalars by step and name)."""
  (mesh, guard), scalars = around, {}
  with jax.profiler.StepTraceAnnotation('train', step_num=n + 1):
    for call in calls:
      if n % call.every == 0:
        # All that goes to the devices goes there here.
        batch = _to_devices(next(call.batches), mesh)
        at = states.place(np.int32(n), sharding.replicated(mesh))
        with guard(call):
          state, metrics = call.run(state, frozen, batch, at)
        scalars |= {f'{call.name}/{k}': v for k, v in metrics.items()}
  return state, scalars


@contextlib.contextmanager
def _guarded(call: _Call, traces: collections.Counter, progress: Progress):
  """Around one call of a step: a silent copy between host and devices is an error, and the first call is timed."""
  timed = contextlib.nullcontext() if traces[call.name] else progress.compiling(call.run.__name__)
  with timed, jax.transfer_guard('disallow'):
    yield


def _feed(spec: stages.StepSpec, config: ConfigDict, start: int, mesh):
  done = -(-start // spec.every)  # calls of this step before `start`
  seed = config.seed + STREAMS[spec.name]
  rows = sharding.rows_here(config.batch, mesh)
  return spec.feed(Feed(config.batch, seed, done, rows, config.workers))


def _to_devices(batch: dict, mesh) -> dict:
  batch = {k: v for k, v in batch.items() if k != 'row'}
  batch['index'] = batch['index'].astype(np.int32)
  return sharding.to_global(batch, mesh)


def _log(waiting, config, checkpoints, writer, progress) -> None:
  step, scalars, spent = waiting
  scalars = without_inactive({k: float(v) for k, v in jax.device_get(scalars).items()})
  assert_finite(step, scalars, checkpoints.latest_step(), str(checkpoints.folder))
  writer.write(step, scalars)
  if progress.is_first or step % config.log.every == 0 or step == config.total_steps:
    measured = progress.measure(step, spent)
    writer.write_timing(step, measured)
    shown = {
      k: v for k, v in scalars.items() if 'loss' in k or k.endswith('grad_norm') or 'active' in k
    }
    log.info('%s', progress.line(step, measured, shown))
  elif progress.is_waiting:
    progress.restart(step, spent)


def _finish(config: ConfigDict, rec, state: states.TrainState, workdir: str) -> None:
  """Exports the averaged networks and reports on them; all processes take part, the first writes."""
  networks = sharding.to_host(state.ema)
  networks = evaluate.finished(config, rec, networks)
  if jax.process_index() == 0:
    for name, params in networks.items():
      log.info('wrote %s', weights.export(workdir, name, params, config))
  evaluate.report(config, rec, networks, workdir)
