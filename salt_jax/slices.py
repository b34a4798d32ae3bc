"""TPU slices by name: how many chips, how they are wired, what a device holds and could do at most.

Cloud TPU names v4, v5p and TPU7x slices by TensorCores, two a chip, and v5e and v6e slices by chips. JAX sees one
device a chip, but two on TPU7x. Compute peaks are in `flops.PEAK_FLOPS`. HBM and network are those of the pages
docs.cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,tpu7x}; usable HBM is what the compiler of libtpu 0.0.42 leaves to a
program, as its out-of-memory message says.
"""

import dataclasses
import difflib
import math
import os
import re

import jax

from salt_jax.errors import InputError

GIB = 2**30
_FLAT = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))
_DEEP = (
  (2, 2, 1),
  (2, 2, 2),
  (2, 2, 4),
  (2, 4, 4),
  (4, 4, 4),
  (4, 4, 8),
  (4, 8, 8),
  (8, 8, 8),
  (8, 8, 16),
)


@dataclasses.dataclass(frozen=True)
class Generation:
  """What is common to the slices of a generation; rates are of one JAX device.

  Attributes:
    name: as in slice names and topologies.
    kind: `device_kind` of its devices.
    units: what a slice name counts, for each chip.
    cores: devices of a chip.
    layouts: chips along each axis of the slices, smallest first.
    hbm: usable bytes.
    hbm_rate: bytes/s of HBM.
    ici: bytes/s that leave a device over all links of a slice, half of the documented bidirectional rate.
    dcn: bytes/s between slices, None where it is not documented.
    options: what a topology needs to be told besides its layout.
  """

  name: str
  kind: str
  units: int
  cores: int
  layouts: tuple[tuple[int, ...], ...]
  hbm: float
  hbm_rate: float
  ici: float
  dcn: float | None
  options: tuple[tuple[str, object], ...] = ()


GENERATIONS = {
  g.name: g
  for g in (
    Generation(
      'v4',
      'TPU v4',
      2,
      1,
      _DEEP,
      30.75 * GIB,
      1228e9,
      300e9,
      None,
      (('chip_config_name', 'megacore'),),
    ),
    Generation('v5e', 'TPU v5 lite', 1, 1, _FLAT, 15.75 * GIB, 819e9, 200e9, 25e9 / 8),
    Generation('v5p', 'TPU v5', 2, 1, _DEEP, 95.74 * GIB, 2765e9, 600e9, 50e9 / 8),
    Generation('v6e', 'TPU v6 lite', 1, 1, _FLAT, 31.25 * GIB, 1638e9, 400e9, 100e9 / 8),
    Generation('tpu7x', 'TPU7x', 2, 2, _DEEP, 94.75 * GIB, 7380e9 / 2, 600e9 / 2, 100e9 / 8 / 2),
  )
}


@dataclasses.dataclass(frozen=True)
class Slice:
  """One or several equal slices, the latter joined by the data-centre network."""

  generation: Generation
  layout: tuple[int, ...]
  count: int = 1

  @property
  def chips(self) -> int:
    return math.prod(self.layout) * self.count

  @property
  def devices(self) -> int:
    return self.chips * self.generation.cores

  @property
  def host(self) -> 'Slice':
    """One of its machines by itself, of up to four chips, whose devices are numbered from 0."""
    one = (2, 2, 1)[: len(self.layout)]
    return Slice(self.generation, min(self.layout, one, key=math.prod))

  @property
  def name(self) -> str:
    size = math.prod(self.layout) * self.generation.units
    name = f'{self.generation.name}-{size}'
    return name if self.count == 1 else f'{self.count}x{name}'


def every(generation: str) -> list[Slice]:
  """The slices of a generation, smallest first.

  Raises:
    InputError: an unknown generation.
  """
  if generation not in GENERATIONS:
    raise InputError(
      f'the TPU generation "{generation}" is unknown: choose one of {", ".join(GENERATIONS)}.'
    )
  found = GENERATIONS[generation]
  return [Slice(found, layout) for layout in found.layouts]


def candidates(word: str) -> list[Slice]:
  """Slices to try, smallest first: all of a generation, or those from a slice on.

  Raises:
    InputError: an unknown generation or slice, or several slices.
  """
  if '-' not in word:
    return every(word)
  first = parse(word)
  if first.count > 1:
    raise InputError(f'--smallest={word} is several slices: begin with one.')
  return [s for s in every(first.generation.name) if s.chips >= first.chips]


def parse(name: str) -> Slice:
  """The slice of a name: v5p-64, or 2xv5p-64 for two of them.

  Raises:
    InputError: a name that is not known, with those nearest to it.
  """
  count, single = re.fullmatch(r'(?:(\d+)x)?(.*)', name, re.DOTALL).groups()
  known = {s.name: s for generation in GENERATIONS for s in every(generation)}
  if single not in known or count == '0':
    near = ', '.join(_near(single, list(known)))
    raise InputError(
      f'the slice "{name}" is unknown: the nearest are {near}; two of one are written 2x{near.split(",")[0]}.'
    )
  return dataclasses.replace(known[single], count=int(count or 1))


def _near(name: str, known: list[str]) -> list[str]:
  generation, _, size = name.partition('-')
  same = [k for k in known if k.startswith(generation + '-')]
  if same and size.isdecimal():
    return sorted(same, key=lambda k: abs(math.log(int(k.split('-')[1]) / max(int(size), 1))))[:3]
  return same or difflib.get_close_matches(name, known, n=3, cutoff=0)


def prepare() -> None:
  """Makes this process one that compiles for TPUs and has none: call it before any backend starts."""
  jax.config.update('jax_platforms', 'cpu')
  os.environ.update(
    TPU_SKIP_MDS_QUERY='1',
    # Compiling holds no device, so several processes may do it.
    ALLOW_MULTIPLE_LIBTPU_LOAD='1',
  )
  # Without these, libtpu asks a metadata server and complains that it has no answer.
  os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'v5p-8')
  os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')


def devices(slice_: Slice) -> list:
  """Descriptions of a slice's devices, which programs can be compiled for and not run on.

  Raises:
    InputError: libtpu is not installed.
  """
  from jax.experimental import topologies

  generation, options = slice_.generation, dict(slice_.generation.options)
  if math.prod(slice_.layout) == 1:
    options['chips_per_host_bounds'] = (1, 1, 1)
  if slice_.count > 1:
    options['num_slices'] = slice_.count
  topology = f'{generation.name}:{"x".join(map(str, slice_.layout))}'
  try:
    found = topologies.get_topology_desc(platform='tpu', topology_name=topology, **options)
  except RuntimeError as error:
    if 'libtpu' not in str(error).lower():
      raise
    raise InputError(
      "compiling for TPUs needs libtpu, which comes with pip install 'salt_jax[tpu]'."
    ) from error
  return list(found.devices)
