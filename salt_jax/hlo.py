"""What a compiled program sends between devices, read from its HLO text.

The text holds each loop once, so what is inside is multiplied by the trip count of the loop. A scan's is the constant
its counter is compared with; a loop whose end is an array has none, and the caller says what to take. Both branches of
a condition are counted, for the other one of a term that sleeps is empty; of a switch of more, each as often as the
others, for it is that of a loop over chunks. A collective that goes on behind other work is written down again in every
fusion that it passes through, as links of one chain, and counts once.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

KINDS = (
  'all-gather',
  'reduce-scatter',
  'all-reduce',
  'all-to-all',
  'collective-permute',
  'collective-broadcast',
  'ragged-all-to-all',
)
_SHAPE = re.compile(r'\b(pred|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]')
_HEAD = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$')
_LINE = re.compile(r'^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$')
_CALLS = re.compile(
  r'\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)'
)
_CHAIN = re.compile(r'channel_id=(\d+).*chain_id="?(\d+)')
_BRANCHES = re.compile(r'\b(?:branch_computations|called_computations)=\{([^}]*)\}')


@dataclasses.dataclass(frozen=True)
class Collective:
  """An operation of the program.

  Attributes:
    kind: one of KINDS.
    bytes: on one device: what an all-gather makes, a reduce-scatter takes, the others move.
    group: devices of the first group, by their place in the mesh; for a permutation a source and its target.
    times: how often it runs.
  """

  kind: str
  bytes: int
  group: tuple[int, ...]
  times: float

  @property
  def sent(self) -> float:
    """Bytes that one device sends each time: (n - 1) / n of all in a ring of n, twice for an all-reduce."""
    n = len(self.group)
    if self.kind == 'collective-permute':
      return float(self.bytes)
    return self.bytes * (n - 1) / n * (2 if self.kind == 'all-reduce' else 1)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """Name, shape, opcode, and what stands behind it: operands and attributes."""

  name: str
  shape: str
  code: str
  rest: str


def collectives(text: str, loops: float = 1.0) -> list[Collective]:
  """The collectives of a program.

  Args:
    text: of `compiled.as_text()`.
    loops: trips of a loop whose number is not known when compiling.
  """
  found, chains = [], {}
  for where, one, times in executed(text, loops):
    made, chain = _collective(where, one, times), _CHAIN.search(one.rest)
    if made is not None and chain:
      chains.setdefault(chain.groups(), []).append(made)
    elif made is not None:
      found.append(made)
  # A link may stand in a loop, begin and end of the chain do not.
  return found + [min(links, key=lambda one: one.times) for links in chains.values()]


def executed(text: str, loops: float = 1.0) -> Iterator[tuple[str, Instruction, float]]:
  """(computation, instruction, how often it runs) of all of a program; arguments as `collectives`."""
  entry, bodies = _computations(text)
  stack = [(entry, 1.0)]
  while stack:
    name, times = stack.pop()
    for one in bodies[name]:
      yield name, one, times
      inner = times
      if one.code == 'while':
        inner = times * _trips(one, bodies[name], bodies, loops)
      elif one.code == 'conditional' and len(_called(one)) > 2:
        inner = times / len(_called(one))
      stack += [(called, inner) for called in _called(one) if called in bodies]


def summed(found: Sequence[Collective]) -> dict[str, dict[str, float]]:
  """count, bytes and sent bytes of each kind, on one device over the whole program."""
  table = {}
  for one in found:
    row = table.setdefault(one.kind, {'count': 0.0, 'bytes': 0.0, 'sent': 0.0})
    row['count'] += one.times
    row['bytes'] += one.times * one.bytes
    row['sent'] += one.times * one.sent
  return {kind: table[kind] for kind in KINDS if kind in table}


def crossing(text: str, slices: int, loops: float = 1.0) -> float:
  """Bytes that a device sends to other slices: what it hands to the network between them, by a ring of slices.

  Args:
    text: of `compiled.as_text()`.
    slices: their number.
    loops: as in `collectives`.
  """
  total = 0.0
  for _, one, times in executed(text, loops):
    if one.code == 'send' and 'xla_megascale' in one.rest:
      twice = 2 if '"ALL_REDUCE"' in one.rest else 1
      # A send has what it hands over, and tokens.
      size, dims = _parsed(one.shape)[0]
      total += times * twice * (slices - 1) / slices * size * math.prod(dims)
  return total


def _computations(text: str) -> tuple[str, dict[str, list[Instruction]]]:
  """(name of the entry, instructions of every computation)."""
  bodies, entry, current = {}, '', None
  for line in text.splitlines():
    if head := _HEAD.match(line):
      current = bodies.setdefault(head[2], [])
      entry = head[2] if head[1] else entry
    elif current is not None and (found := _LINE.match(line)):
      current.append(_instruction(found[1], found[2]))
  return entry, bodies


def _instruction(name: str, text: str) -> Instruction:
  """'f32[2]{0} add(%a, %b), attributes' or '(f32[2], s32[]) while(…)' in parts."""
  end = _closing(text) if text.startswith('(') else text.find(' ')
  code, _, rest = text[end:].lstrip().partition('(')
  return Instruction(name, text[:end], code, rest)


def _closing(text: str) -> int:
  depth = 0
  for i, mark in enumerate(text):
    depth += (mark == '(') - (mark == ')')
    if depth == 0:
      return i + 1
  return len(text)


def _collective(where: str, one: Instruction, times: float) -> Collective | None:
  """The instruction as a collective of more than one device, if it is one."""
  kind = one.code.removesuffix('-start')
  if kind not in KINDS:
    return None
  # On TPU a reduce-scatter may be a fusion of an all-reduce and the slice of its result.
  if kind == 'all-reduce' and where.startswith('all-reduce-scatter'):
    kind = 'reduce-scatter'
  group = _group(one)
  whole = len(group) if one.code.startswith('reduce-scatter') else 1
  size = whole * _bytes(_moved(one))
  return Collective(kind, int(size), group, times) if len(group) > 1 else None


def _called(one: Instruction) -> list[str]:
  found = _CALLS.findall(one.rest)
  for names in _BRANCHES.findall(one.rest):
    found += [name.strip().lstrip('%') for name in names.split(',')]
  return found


def _trips(one: Instruction, around: list, bodies: Mapping, loops: float) -> float:
  """Trips of `for (i = start; i < end; i++)`; `loops` if they are not constants."""
  known = re.search(r'known_trip_count"?:?\{"?n"?:"?(\d+)', one.rest)
  if known:
    return float(known[1])
  condition = {i.name: i for i in bodies[re.search(r'condition=%?([\w.\-]+)', one.rest)[1]]}
  root = next(reversed(condition.values()))
  if root.code != 'compare' or 'direction=LT' not in root.rest:
    return loops
  left, right = (condition.get(name) for name in _operands(root)[:2])
  if left is None or right is None or left.code != 'get-tuple-element':
    return loops
  end = re.match(r'(-?\d+)\)', right.rest) if right.code == 'constant' else None
  start = _start(one, int(re.search(r'index=(\d+)', left.rest)[1]), around)
  return loops if end is None or start is None else float(max(0, int(end[1]) - start))


def _start(one: Instruction, index: int, around: list) -> int | None:
  """What a loop's counter begins with, if it is a constant."""
  names = {i.name: i for i in around}
  carried = names.get(_operands(one)[0])
  if carried is None or carried.code != 'tuple':
    return None
  value = names.get(_operands(carried)[index])
  while value is not None and value.code == 'copy':
    value = names.get(_operands(value)[0])
  found = (
    re.match(r'(-?\d+)\)', value.rest) if value is not None and value.code == 'constant' else None
  )
  return int(found[1]) if found else None


def _operands(one: Instruction) -> list[str]:
  return re.findall(r'%([\w.\-]+)', one.rest[: _closing('(' + one.rest)])


def _moved(one: Instruction) -> str:
  """The shapes that count: of an asynchronous gather or permutation the result, not the operand beside it."""
  if one.code not in ('all-gather-start', 'collective-permute-start'):
    return one.shape
  parts, depth, last = [], 0, 1
  for i, mark in enumerate(one.shape):
    depth += (mark in '([{') - (mark in ')]}')
    if (mark == ',' and depth == 1) or depth == 0:
      parts.append(one.shape[last:i])
      last = i + 1
  return parts[1]


def _bytes(shapes: str) -> int:
  return sum(math.prod(dims) * size for size, dims in _parsed(shapes))


def _parsed(shapes: str) -> list[tuple[float, tuple[int, ...]]]:
  """(bytes of an element, dimensions) of every array in a shape."""
  found = []
  for dtype, dims in _SHAPE.findall(shapes):
    bits = 8 if dtype == 'pred' else int(re.search(r'\d+', dtype)[0])
    found.append((bits / 8, tuple(int(n) for n in dims.split(',') if n)))
  return found


def _group(one: Instruction) -> tuple[int, ...]:
  """The first group with more than one device, in any of the three ways of writing groups."""
  if pairs := re.search(r'source_target_pairs=\{(.*?)\}\}', one.rest):
    ends = [tuple(map(int, p)) for p in re.findall(r'\{(\d+),(\d+)', '{' + pairs[1])]
    return next((pair for pair in ends if pair[0] != pair[1]), ())
  if mesh := re.search(r'replica_groups=mesh\[([^\]]*)\](.*?)\{([^}]*)\}', one.rest):
    return _mesh_group(*mesh.groups())
  if iota := re.search(r'replica_groups=\[(\d+),(\d+)\]<=(\S+?), ', one.rest):
    return tuple(_iota(iota[3]).reshape(int(iota[1]), int(iota[2]))[0].tolist())
  if listed := re.search(r'replica_groups=\{\{([\d,]+)\}', one.rest):
    return tuple(int(i) for i in listed[1].split(','))
  return ()


def _iota(text: str) -> np.ndarray:
  """Devices of '[2,4]T(1,0)': 0, 1, … in that shape, transposed."""
  dims = [int(n) for n in re.match(r'\(?\[([\d,]+)\]', text)[1].split(',')]
  order = re.search(r'T\(([\d,]+)\)', text)
  devices = np.arange(math.prod(dims)).reshape(dims)
  return devices.transpose([int(n) for n in order[1].split(',')]) if order else devices


def _mesh_group(axes: str, order: str, used: str) -> tuple[int, ...]:
  """Devices along the used axes of a mesh written as 'axis_0'=2,'axis_1'=4; an axis may be used in part, as :(2)2."""
  names = re.findall(r"'([^']+)'=(\d+)", axes)
  sizes = [int(size) for _, size in names]
  devices = _iota(order.split('=', 1)[1]).ravel() if 'device_ids=' in order else None
  devices = np.arange(math.prod(sizes)) if devices is None else devices
  grid, cut = devices.reshape(sizes), []
  wanted = {
    n: (before, size) for n, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", used)
  }
  for name, size in names:
    if name not in wanted:
      cut.append(slice(0, 1))
    elif wanted[name][1]:
      before, part = map(int, wanted[name])
      after = int(size) // (before * part)
      cut.append(slice(0, part * after, after))
    else:
      cut.append(slice(None))
  return tuple(grid[tuple(cut)].ravel().tolist())
