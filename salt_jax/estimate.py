"""What a compiled program needs on one device: memory, FLOPs, traffic, and from stated peaks a time."""

import dataclasses
import re
import resource
import time

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from salt_jax import flops, hlo, kept, lowered, splits
from salt_jax.slices import GIB, Slice

# Of peak FLOP/s in the likely time: what MaxDiffusion reports for training Wan 2.1 14B on v5p (135.9 of 459 TFLOP/s).
REACHED = 0.3


@dataclasses.dataclass(frozen=True)
class Seconds:
  """Times of one run. Compute, HBM and network each as if alone and at its peak.

  Attributes:
    compute: FLOPs, recomputed ones included, at the bfloat16 peak.
    memory: arguments read once, results and temporaries written, and temporaries read once.
    network: what collectives send, over all links of a device at once, and between slices over their network.
    least: the longest of the three.
    likely: compute at `REACHED` of the peak and the network behind it.
  """

  compute: float
  memory: float
  network: float
  least: float
  likely: float


@dataclasses.dataclass(frozen=True)
class Report:
  """A program on one device of a slice; bytes, FLOPs, seconds.

  Attributes:
    step: its name.
    fits: whether it can be compiled and run.
    needed: of HBM; a lower bound where the compiler gave up.
    usable: HBM.
    arguments, temporaries, code: parts of `needed`, the second with results and at its highest; None where the
      compiler gave up.
    clips: of a shard of the batch, at once.
    every: iterations from one run to the next; 0 is no part of training.
    steps: of an iteration of training, this one included.
    forward, backward, again: FLOPs by formula, and those spent on recomputation.
    collectives: count, bytes and sent bytes of each kind.
    crossing: bytes sent to other slices.
    seconds: None where the compiler gave up.
    compiling: wall seconds, and seconds of CPU.
    change: what to do if it does not fit.
  """

  step: str
  fits: bool
  needed: float
  usable: float
  arguments: float | None
  temporaries: float | None
  code: float | None
  clips: float
  every: int
  steps: int
  forward: float
  backward: float
  again: float
  collectives: dict
  crossing: float
  seconds: Seconds | None
  compiling: tuple[float, float]
  change: str = ''


def report(
  program: lowered.Program,
  config: ConfigDict,
  mesh: Mesh,
  slice_: Slice,
  reports: kept.Reports | None = None,
) -> Report:
  """Compiles a program and says what it needs; one that does not fit is a report too.

  Args:
    program: the program.
    config: what it is of.
    mesh: its devices.
    slice_: what these are.
    reports: earlier ones, of which an equal program's is taken; a new one is added.

  Raises:
    jax.errors.JaxRuntimeError: it cannot be compiled for another reason.
    InputError: an earlier report is damaged.
  """
  held = program.held
  made = _blank(program, mesh, slice_, held)
  if held <= slice_.generation.hbm:
    made = _measured(made, program, slice_, reports)
  if made.fits:
    return made
  return dataclasses.replace(made, change=_advice(config, program, mesh, held, made.needed))


def _measured(blank: Report, program, slice_: Slice, reports: kept.Reports | None) -> Report:
  """What the compiler says, or said of an equal program."""
  began, usage = time.monotonic(), _cpu()
  traced = program.lower()
  if reports is None:
    return _compiled(blank, program, traced, slice_, (began, usage))
  key = kept.key(traced.as_text(), program.options, program.passes, slice_.name, blank)
  if (found := reports.find(key, of_json)) is not None:
    # Peaks are no part of the key.
    return dataclasses.replace(found, seconds=found.seconds and seconds(found, slice_))
  made = _compiled(blank, program, traced, slice_, (began, usage))
  reports.keep(key, dataclasses.asdict(made))
  return made


def _compiled(blank: Report, program, traced, slice_: Slice, began: tuple[float, float]) -> Report:
  def compiling():
    return time.monotonic() - began[0], _cpu() - began[1]

  try:
    done = traced.compile()
  except jax.errors.JaxRuntimeError as error:
    needed = out_of_memory(str(error))
    if needed is None:
      raise
    return dataclasses.replace(blank, needed=needed, compiling=compiling())
  return _filled(blank, program, done, slice_, compiling())


def of_json(row: dict) -> Report:
  """A report that was written as `dataclasses.asdict` of it."""
  seconds = row['seconds'] and Seconds(**row['seconds'])
  return Report(**row | {'seconds': seconds, 'compiling': tuple(row['compiling'])})


def _cpu() -> float:
  used = resource.getrusage(resource.RUSAGE_SELF)
  return used.ru_utime + used.ru_stime


def _blank(program: lowered.Program, mesh: Mesh, slice_: Slice, held: float) -> Report:
  """A program that does not fit, before anything is known of its temporaries."""
  clips = program.clips / mesh.size
  totals = [clips * sum(part[i] for part in program.parts) for i in (1, 2, 3)]
  needed, again, backward = totals
  return Report(
    step=program.name,
    fits=False,
    needed=held,
    usable=slice_.generation.hbm,
    arguments=None,
    temporaries=None,
    code=None,
    clips=program.at_once,
    every=program.every,
    steps=program.steps,
    forward=needed - backward,
    backward=backward,
    again=again,
    collectives={},
    crossing=0.0,
    seconds=None,
    compiling=(0.0, 0.0),
  )


def _filled(blank: Report, program, done, slice_: Slice, compiling) -> Report:
  memory, text = done.memory_analysis(), done.as_text()
  found = hlo.collectives(text, program.passes)
  # Not `temp_size_in_bytes`: it counts buffers that share their place twice, and may exceed the HBM of what fits.
  parts = (
    memory.argument_size_in_bytes,
    memory.peak_memory_in_bytes - memory.argument_size_in_bytes,
    memory.generated_code_size_in_bytes,
  )
  forward = blank.forward or float((done.cost_analysis() or {}).get('flops', 0.0))
  made = dataclasses.replace(
    blank,
    fits=sum(parts) <= slice_.generation.hbm,
    needed=float(sum(parts)),
    arguments=parts[0],
    temporaries=parts[1],
    code=parts[2],
    forward=forward,
    collectives=hlo.summed(found),
    crossing=hlo.crossing(text, slice_.count, program.passes),
    compiling=compiling,
  )
  return dataclasses.replace(made, seconds=seconds(made, slice_))


def seconds(made: Report, slice_: Slice) -> Seconds:
  """Times from stated peaks (`slices.GENERATIONS`, `flops.PEAK_FLOPS`)."""
  generation = slice_.generation
  counted = made.forward + made.backward + made.again
  compute = counted / flops.PEAK_FLOPS[generation.kind]
  memory = (made.arguments + 2 * made.temporaries) / generation.hbm_rate
  sent = sum(row['sent'] for row in made.collectives.values())
  network = sent / generation.ici
  if made.crossing and generation.dcn:
    network += made.crossing / generation.dcn
  likely = compute / REACHED + network
  return Seconds(compute, memory, network, max(compute, memory, network), likely)


_UNITS = {'': 1, 'K': 2**10, 'M': 2**20, 'G': 2**30, 'T': 2**40}


def out_of_memory(message: str) -> float | None:
  """Bytes of HBM that the compiler says a program needs, arguments included; None if its error is another one."""
  for words in (
    r'Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm',
    r'temporaries \(([\d.]+)([KMGT]?)\) exceeds available',
  ):
    if found := re.search(words, message):
      return float(found[1]) * _UNITS[found[2]]
  return None


def _advice(
  config: ConfigDict, program: lowered.Program, mesh: Mesh, held: float, needed: float
) -> str:
  """What to change, for the largest part of what is needed."""
  if program.name == 'decode':
    return 'a host decodes one clip: lower --config.video.height and --config.video.width.'
  if 'model' in config and not config.model.remat and program.name != 'sample':
    return 'set --config.model.remat=true, so that activations are made anew for the backward pass.'
  lying, clips = lowered.resident(program.inputs), program.at_once
  # Parts make the cache smaller, and not what lies there.
  parted = clips > 1 and not splits.whole(config)
  if 2 * lying > needed or (2 * held > needed and not parted):
    cache = f' and caches {program.cache / GIB:.1f}' if program.cache else ''
    return (
      f'networks and optimizer states alone take {lying / GIB:.1f}{cache} GiB a device: take a larger slice, a smaller '
      'teacher or a smaller batch.'
    )
  if clips > 1:
    key, value = 'batch', program.shards
    if parted:
      key, value = 'accumulate', round(clips * program.accumulate)
    return f'a shard works on {clips:g} clips at once: take a larger slice, or set --config.{key}={value}.'
  return _longer(config, program, mesh)


def _longer(config: ConfigDict, program: lowered.Program, mesh: Mesh) -> str:
  """Where one clip at once is too much."""
  fsdp, context = mesh.shape['fsdp'], 2 * mesh.shape['context']
  words = 'a clip is too long for its devices: take '
  if not splits.context_splits(config, mesh.shape['tensor'], context):
    return f'{words}devices with more memory, or shorter or smaller clips.'
  words += f'a larger slice and set --config.mesh.context={context}'
  if program.every and fsdp % 2 == 0 and not splits.whole(config):
    # The same devices, twice as many for half of the clips.
    words += (
      f'; or on this one set that, --config.mesh.fsdp={fsdp // 2} and '
      f'--config.accumulate={2 * program.accumulate}'
    )
  return f'{words}.'
