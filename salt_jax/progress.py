"""What a run says of itself while it goes on: how it started, its rate, its use of the devices, their memory."""

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import jax

from salt_jax import compiled, flops
from salt_jax.metrics import quantity, seconds

log = logging.getLogger(__name__)

_GIB = 2**30
_HIT = '/jax/compilation_cache/cache_hits'


def memory(devices: Sequence[jax.Device]) -> dict[str, float]:
  """GiB in use, their peak and what there is, of the fullest device; {} where a device does not tell, as a CPU.

  An allocator that takes what there is, such as cuda_async, has no limit and names 0.
  """
  found = [device.memory_stats() for device in devices]
  names = {'hbm': 'bytes_in_use', 'hbm_peak': 'peak_bytes_in_use', 'hbm_limit': 'bytes_limit'}
  if not found or not all(stats and set(names.values()) <= set(stats) for stats in found):
    return {}
  return {name: max(stats[key] for stats in found) / _GIB for name, key in names.items()}


class Progress:
  """The line a person watches: 'step 120/400  3.1 step/s  left 1m30s  142 TFLOP/s a device  MFU 31%  loss 0.123'.

  The rate is measured from the end of the first step on, and anew behind what is no part of it: a compilation later
  on, or a profile.
  """

  def __init__(
    self,
    total: int,
    devices: Iterable[jax.Device] = (),
    clock: Callable[[], float] = time.monotonic,
  ):
    """Counts up to `total` steps.

    Args:
      total: the last step.
      devices: that share the work, all of one kind.
      clock: returns seconds.
    """
    self._total = total
    self._devices = tuple(devices)
    self._clock = clock
    self._began = clock()
    self._started = False
    self._mark = None

  def restart(self, step: int, spent: float) -> None:
    """Measures anew from here, where all up to `step` is done; `spent` as in `measure`."""
    self._mark = (step, self._clock(), spent)

  @property
  def is_first(self) -> bool:
    """Whether nothing was measured yet."""
    return not self._started

  @property
  def is_waiting(self) -> bool:
    """Whether the clock of the rate waits for the end of a step to start from."""
    return self._mark is None

  def announce(self, costs: Mapping[str, float]) -> None:
    """Says what a clip costs in each step, and what MFU is a share of.

    Args:
      costs: FLOPs of a step for one example, by the step's name.
    """
    if not costs:
      return
    each = ', '.join(f'{name} {quantity(cost)}FLOP' for name, cost in costs.items())
    kind, peak = self._peak()
    against = f'; MFU is of {quantity(peak)}FLOP/s, bfloat16 of a {kind}' if peak else ''
    log.info('by formula a clip takes: %s%s', each, against)

  @contextlib.contextmanager
  def compiling(self, name: str) -> Iterator[None]:
    """Times the first call of a step function of that name, which traces and compiles it."""
    hits = []

    def listen(event, **_):
      if event == _HIT:
        hits.append(event)

    jax.monitoring.register_event_listener(listen)
    began = self._clock()
    try:
      with compiled.marked(name):
        yield
    finally:
      jax.monitoring.unregister_event_listener(listen)
    self._mark = None
    verb = 'traced, and read from the compile cache,' if hits else 'traced and compiled'
    log.info('%s: %s in %s', name, verb, seconds(self._clock() - began))

  def measure(self, step: int, spent: float = 0.0) -> dict[str, float]:
    """Figures of the steps since the first, to be asked once `step` is done.

    Args:
      step: that is done.
      spent: FLOPs of the run up to then, over all devices.

    Returns:
      {'first_step_seconds'} at first, then {'steps_per_second', 'tflops_per_device', 'mfu'} as far as they are known;
      and the memory.
    """
    now, found = self._clock(), {}
    if not self._started:
      found['first_step_seconds'] = now - self._began
      self._started = True
    if self._mark is None:
      self._mark = (step, now, spent)
    elif step > self._mark[0] and now > self._mark[1]:
      marked, at, before = self._mark
      found['steps_per_second'] = (step - marked) / (now - at)
      found |= self._use((spent - before) / (now - at))
    local = [d for d in self._devices if d.process_index == jax.process_index()]
    return found | memory(local)

  def _peak(self) -> tuple[str, float | None]:
    kind = self._devices[0].device_kind if self._devices else ''
    return kind, flops.PEAK_FLOPS.get(kind)

  def _use(self, rate: float) -> dict[str, float]:
    if not rate or not self._devices:
      return {}
    each, (_, peak) = rate / len(self._devices), self._peak()
    return {'tflops_per_device': each / 1e12} | ({'mfu': each / peak} if peak else {})

  def line(self, step: int, measured: Mapping[str, float], scalars: Mapping[str, float]) -> str:
    """Describes `step`.

    Args:
      step: that is done.
      measured: what `measure` gave for it.
      scalars: to be shown behind.
    """
    parts = [f'step {step}/{self._total}']
    if 'first_step_seconds' in measured:
      parts.append(f'first step {seconds(measured["first_step_seconds"])}')
    if 'steps_per_second' in measured:
      rate = measured['steps_per_second']
      parts.append(f'{rate:.3g} step/s' if rate >= 1 else f'{1 / rate:.3g} s/step')
      parts.append(f'left {seconds((self._total - step) / rate)}')
    if 'tflops_per_device' in measured:
      parts.append(f'{quantity(measured["tflops_per_device"] * 1e12)}FLOP/s a device')
    if 'mfu' in measured:
      parts.append(f'MFU {measured["mfu"]:.1%}')
    if 'hbm' in measured:
      limit = f' of {measured["hbm_limit"]:.1f}' if measured['hbm_limit'] else ''
      parts.append('HBM {hbm:.1f}, peak {hbm_peak:.1f}{} GiB'.format(limit, **measured))
    parts += [f'{name} {float(value):.4g}' for name, value in scalars.items()]
    return '  '.join(parts)
