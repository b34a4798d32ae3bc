"""The training loop: mesh → stage → state → steps → metrics → save → export and report."""

import collections
import contextlib
import errno
import functools
import logging
import os

import jax
import numpy as np
from ml_collections import ConfigDict

from salt_jax import evaluate, hosts, monitor, sharding, stages, weights
from salt_jax import recipe as recipes
from salt_jax import state as states
from salt_jax.checkpoint import Checkpoints, check_config, config_digest, write_config
from salt_jax.checks import check_batch
from salt_jax.data import Feed
from salt_jax.errors import InputError, Preempted
from salt_jax.metrics import Progress, Writer, assert_finite, param_count, without_inactive
from salt_jax.places import check_local
from salt_jax.preemption import Notices

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


def run(config: ConfigDict, workdir: str) -> dict[str, int]:
  """Trains a stage to its last step, or goes on where a killed run of it stopped.

  Args:
    config: the whole experiment.
    workdir: checkpoints, metrics, exports and pictures go here.

  Returns:
    How often each step function was traced: 1 each, or it recompiles.

  Raises:
    InputError: for whatever in the config or the workdir cannot work.
    NonFiniteError: at the first loss that is not finite; nothing is saved from then on.
    Preempted: the run was told to leave, and is saved.
  """
  rec = recipes.build(config)
  mesh = sharding.make_mesh(config.mesh)
  check_batch(config.batch, mesh)
  root = config.checkpoint.folder or workdir
  hosts.together(lambda: check_local(workdir))
  for folder in dict.fromkeys((workdir, root)):
    hosts.together(functools.partial(check_config, folder, config, FREE))
  hosts.check_shared(root)
  with contextlib.closing(Notices()) as notices, hosts.holding(workdir):
    try:
      return _run(config, rec, mesh, workdir, notices)
    except OSError as error:
      if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        raise
      raise InputError(
        f'nothing more can be written to {workdir} ({error.strerror}): make room there, and the same command goes on.'
      ) from error


def _run(config: ConfigDict, rec, mesh, workdir: str, notices: Notices) -> dict[str, int]:
  root = config.checkpoint.folder or workdir
  stage = stages.build(config, rec, workdir)
  evaluate.check(config, rec)
  watch = monitor.watcher(config, rec, sharding.replicated(mesh))

  shapes = states.shapes_of(stage.shapes, rec.optimizers, stage.averaged, stage.stream)
  like, placed = states.with_shardings(shapes, mesh, config)
  checkpoints = Checkpoints(
    os.path.join(root, 'checkpoints'), config.checkpoint.every, config.checkpoint.keep
  )
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
  feeds = {spec.name: _feed(spec, config, start, mesh) for spec in stage.steps}
  writer, progress = Writer(workdir, start), Progress(config.total_steps, start)
  digest, waiting, left = config_digest(config), None, None

  def flush():
    if waiting is not None:
      _log(waiting, config, checkpoints, writer, progress)

  def save(step):
    items = {'state': state.replace(ema={}), 'ema': state.ema}
    for folder in dict.fromkeys((workdir, root)):
      write_config(folder, config)
    checkpoints.save(step, items, {'data_step': step, 'config': digest}, force=True)

  # Whatever stops the loop, a save in progress is waited for.
  with contextlib.closing(checkpoints), contextlib.closing(writer):
    for n in range(start, config.total_steps):
      if notices.due(n):
        left = n
        break
      scalars = {}
      for spec in stage.steps:
        if n % spec.every == 0:
          batch = _to_devices(next(feeds[spec.name]), mesh)
          state, metrics = jitted[spec.name](state, frozen, batch, np.int32(n))
          scalars |= {f'{spec.name}/{k}': v for k, v in metrics.items()}
      scalars |= watch(state.ema, frozen, n + 1)
      # The scalars of the step before are read only now, so the host never holds up the device.
      flush()
      waiting, notices.saving = (n + 1, scalars), True
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


def _feed(spec: stages.StepSpec, config: ConfigDict, start: int, mesh):
  done = -(-start // spec.every)  # calls of this step before `start`
  seed = config.seed + list('gcvd').index(spec.name[0])
  rows = sharding.rows_here(config.batch, mesh)
  return spec.feed(Feed(config.batch, seed, done, rows, config.workers))


def _to_devices(batch: dict, mesh) -> dict:
  batch = {k: v for k, v in batch.items() if k != 'row'}
  batch['index'] = batch['index'].astype(np.int32)
  return sharding.to_global(batch, mesh)


def _log(waiting, config, checkpoints, writer, progress) -> None:
  step, scalars = waiting
  scalars = without_inactive({k: float(v) for k, v in jax.device_get(scalars).items()})
  assert_finite(step, scalars, checkpoints.latest_step(), str(checkpoints.folder))
  writer.write(step, scalars)
  if step % config.log.every == 0 or step in (1, config.total_steps):
    shown = {
      k: v for k, v in scalars.items() if 'loss' in k or k.endswith('grad_norm') or 'active' in k
    }
    log.info('%s', progress.line(step, shown))


def _finish(config: ConfigDict, rec, state: states.TrainState, workdir: str) -> None:
  """Exports the averaged networks and reports on them; all processes take part, the first writes."""
  networks = sharding.to_host(state.ema)
  networks = evaluate.finished(config, rec, networks)
  if jax.process_index() == 0:
    for name, params in networks.items():
      log.info('wrote %s', weights.export(workdir, name, params, config))
  evaluate.report(config, rec, networks, workdir)
