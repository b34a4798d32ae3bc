"""The training loop: mesh → stage → state → steps → metrics → save → export and report."""

import collections
import contextlib
import functools
import logging
import os

import jax
import numpy as np
from ml_collections import ConfigDict

from salt_jax import evaluate, flops, monitor, profiling, sharding, stages, weights
from salt_jax import recipe as recipes
from salt_jax import state as states
from salt_jax.checkpoint import Checkpoints, check_config, config_digest, write_config
from salt_jax.checks import check_batch
from salt_jax.data import Feed
from salt_jax.errors import InputError
from salt_jax.metrics import Writer, assert_finite, param_count, without_inactive
from salt_jax.profiling import Profiler
from salt_jax.progress import Progress

log = logging.getLogger(__name__)

# What a later start of the same run may set differently.
FREE = (
  'total_steps',
  'checkpoint',
  'log',
  'evaluate',
  'workers',
  'mesh',
  'rules',
  'shard_min_size',
)


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
  """
  rec = recipes.build(config)
  profiled = profiling.parse(profile, config.total_steps)
  mesh = sharding.make_mesh(config.mesh)
  check_batch(config.batch, mesh)
  check_config(workdir, config, FREE)
  stage = stages.build(config, rec, workdir)
  evaluate.check(config, rec)
  watch = monitor.watcher(config, rec, sharding.replicated(mesh))

  shapes = states.shapes_of(stage.shapes, rec.optimizers, stage.averaged, stage.stream)
  like, placed = states.with_shardings(shapes, mesh, config)
  checkpoints = Checkpoints(
    os.path.join(workdir, 'checkpoints'), config.checkpoint.every, config.checkpoint.keep
  )
  if checkpoints.latest_step() == 0:
    raise InputError(
      f'{workdir} holds converted weights and no run: pass another --workdir, and '
      f'--config.weights.NAME={workdir} to start from them.'
    )
  start = checkpoints.latest_step() or 0
  if start > config.total_steps:
    raise InputError(
      f'{workdir} is at step {start}, beyond total_steps={config.total_steps}: pass another --workdir.'
    )
  profiling.check_ahead(profiled, start)
  state = (
    _restore(checkpoints, start, like)
    if start
    else states.create(stage.start(), rec.optimizers, stage.averaged, placed, stage.stream)
  )
  _, frozen_placed = states.with_shardings(stage.frozen, mesh, config)
  frozen = states.place(stage.frozen, frozen_placed)
  log.info(
    '%s: %s parameters in training, %s frozen, on %d %s; step %d of %d',
    config.name,
    f'{param_count(state.params):,}',
    f'{param_count(frozen):,}',
    mesh.size,
    jax.devices()[0].platform,
    start,
    config.total_steps,
  )

  traces = collections.Counter()
  jitted = {spec.name: _jit(spec, rec, placed, mesh, traces) for spec in stage.steps}
  feeds = {spec.name: _feed(spec, config, start) for spec in stage.steps}
  writer = Writer(workdir, start)
  progress = Progress(config.total_steps, mesh.devices.flatten())
  progress.announce(_costs(config, rec, start))
  profiler = Profiler(profiled, os.path.join(workdir, 'profile'))
  spent = 0.0
  digest, waiting = config_digest(config), None

  def flush():
    if waiting is not None:
      _log(waiting, config, checkpoints, writer, progress)

  # Whatever stops the loop, a save in progress is waited for.
  with (
    contextlib.closing(checkpoints),
    contextlib.closing(writer),
    contextlib.closing(profiler),
  ):
    for n in range(start, config.total_steps):
      scalars, costs = {}, _costs(config, rec, n)
      profiler.before(n + 1, state)
      with jax.profiler.StepTraceAnnotation('train', step_num=n + 1):
        for spec in stage.steps:
          if n % spec.every == 0:
            # All that goes to the devices goes there here.
            batch = _to_devices(next(feeds[spec.name]), mesh)
            at = states.place(np.int32(n), sharding.replicated(mesh))
            with _guarded(spec, traces, progress):
              state, metrics = jitted[spec.name](state, frozen, batch, at)
            scalars |= {f'{spec.name}/{k}': v for k, v in metrics.items()}
            spent += config.batch * costs.get(spec.name, 0.0)
      if profiler.after(n + 1, state):
        progress.restart(n + 1, spent)
      scalars |= watch(state.ema, frozen, n + 1)
      # The scalars of the step before are read only now, so the host never holds up the device.
      flush()
      waiting = (n + 1, scalars, spent)
      if (n + 1) % config.checkpoint.every == 0 or n + 1 == config.total_steps:
        flush()
        waiting = None
        items = {'state': state.replace(ema={}), 'ema': state.ema}
        write_config(workdir, config)
        checkpoints.save(n + 1, items, {'data_step': n + 1, 'config': digest}, force=True)
  for name, count in traces.items():
    if count > 1:
      log.warning('%s_step was compiled %d times.', name, count)
  _finish(config, rec, state, workdir)
  return dict(traces)


def _restore(checkpoints: Checkpoints, step: int, like) -> states.TrainState:
  got = checkpoints.restore(step, {'state': like.replace(ema={}), 'ema': like.ema})
  return got['state'].replace(ema=got['ema'])


def _jit(spec: stages.StepSpec, rec, placed, mesh, traces):
  """The step with its shardings, the state donated; counts how often it is traced."""

  def counted(state, frozen, batch, n):
    traces[spec.name] += 1
    return spec.run(state, frozen, batch, n, recipe=rec)

  functools.update_wrapper(counted, spec.run)
  return jax.jit(counted, donate_argnums=0, out_shardings=(placed, sharding.replicated(mesh)))


@contextlib.contextmanager
def _guarded(spec: stages.StepSpec, traces: collections.Counter, progress: Progress):
  """Around one call of a step: a silent copy between host and devices is an error, and the first call is timed."""
  timed = contextlib.nullcontext() if traces[spec.name] else progress.compiling(spec.run.__name__)
  with timed, jax.transfer_guard('disallow'):
    yield


def _costs(config: ConfigDict, rec, n: int) -> dict[str, float]:
  """FLOPs of each step for one example, at iteration n."""
  parts = flops.of_steps(config, rec, n)
  return {name: sum(part.flops for part in found) for name, found in parts.items()}


def _feed(spec: stages.StepSpec, config: ConfigDict, start: int):
  done = -(-start // spec.every)  # calls of this step before `start`
  seed = config.seed + list('gcvd').index(spec.name[0])
  feed = Feed(config.batch, seed, done, jax.process_index(), jax.process_count(), config.workers)
  return spec.feed(feed)


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


def _finish(config: ConfigDict, rec, state: states.TrainState, workdir: str) -> None:
  """Exports the averaged networks and reports on them; all processes take part, the first writes."""
  networks = jax.tree.map(np.asarray, jax.device_get(state.ema))
  networks = evaluate.finished(config, rec, networks)
  if jax.process_index() == 0:
    for name, params in networks.items():
      log.info('wrote %s', weights.export(workdir, name, params, config))
  evaluate.report(config, rec, networks, workdir)
