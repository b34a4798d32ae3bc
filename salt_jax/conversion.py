"""What a conversion of weights does to each tensor, decided from names and shapes alone, and its report.

The program is `salt_jax.convert_cli`.
"""

import dataclasses
import fnmatch
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from salt_jax import convert, lora, names, weights
from salt_jax.checks import section
from salt_jax.errors import InputError
from salt_jax.models import text, vae, wan
from salt_jax.names import listed
from salt_jax.sources import Source
from salt_jax.tensor_files import Tensor
from salt_jax.wan_names import clip_names, entries

SIZES: dict[str, dict[str, Callable[[], Any]]] = {
  'dit': {
    '1.3b': wan.wan_1_3b,
    '14b': wan.wan_14b,
    'i2v_14b': wan.wan_i2v_14b,
    'flf2v_14b': wan.wan_flf2v_14b,
    'nano': wan.wan_nano,
    'nano_i2v': wan.wan_nano_i2v,
  },
  'vae': {'wan': vae.wan_vae, 'nano': vae.nano_vae},
  'umt5': {'xxl': text.umt5_xxl, 'nano': text.nano_text},
  'clip': {'vit_h': lambda: None},
}
# The section of a config that describes a network, and its class.
_SECTIONS = {
  'dit': ('model', wan.WanConfig),
  'vae': ('vae', vae.VAEConfig),
  'umt5': ('text', text.TextConfig),
}
ORBAX = 'orbax'


@dataclasses.dataclass(frozen=True)
class Request:
  """What is asked of a conversion; see `define_flags`."""

  network: str = 'dit'
  naming: str = 'wan'
  dtype: str = 'keep'
  allow_unused: tuple[str, ...] = ()
  allow_missing: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Conversion:
  """Tensors under their new names, not yet read, and the report of how they came to them."""

  tensors: Mapping[str, Tensor]
  wan: Mapping[str, Tensor]
  report: dict[str, Any]


@functools.cache
def _published(network: str, size: str) -> Mapping[str, tuple[int, ...] | None]:
  return _shapes_of(network, SIZES[network][size]())


def _shapes_of(network: str, cfg: Any) -> Mapping[str, tuple[int, ...] | None]:
  # The names of CLIP are known, but its tower is not there to give shapes.
  if network == 'clip':
    return dict.fromkeys(clip_names())
  return convert.wan_shapes(weights.shapes(network, cfg), network)


def expected(
  network: str, size: str, config: ConfigDict | None = None
) -> Mapping[str, tuple[int, ...] | None]:
  """Wan's names and shapes of a network; None stands for a shape that is not known.

  Args:
    network: 'dit', 'vae', 'umt5' or 'clip'.
    size: one of `SIZES[network]`, or '' to take the config's, else the only published one.
    config: of a run.

  Raises:
    InputError: an unknown size, or none where there are several.
  """
  sizes = SIZES[network]
  if not size and config is not None and network in _SECTIONS:
    name, cls = _SECTIONS[network]
    return _shapes_of(network, section(cls, config, name))
  if network == 'dit' and not size:
    raise InputError(f'pass --size: one of {", ".join(sizes)}.')
  size = size or next(iter(sizes))
  if size not in sizes:
    raise InputError(f'--size={size} is not a size of {network}; choose {", ".join(sizes)}.')
  return _published(network, size)


def matches(name: str, patterns: Sequence[str]) -> bool:
  return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def convert_source(
  source: Source,
  want: Mapping[str, tuple[int, ...] | None],
  request: Request,
  updates: Callable[[Mapping[str, Tensor]], Mapping[str, lora.Update]] = lambda tensors: {},
) -> Conversion:
  """Plans a conversion; nothing is read but what decides whether it can be done.

  Args:
    source: the weights.
    want: Wan's names and shapes that they must have, as from `expected`.
    request: what to make of them.
    updates: the LoRA updates of the weights, under Wan's names, that it is given.

  Raises:
    InputError: names that are unused or missing and not allowed to be, another size, or LoRA
      tensors that do not fit. `error.report` says where each tensor went.
  """
  network = request.network
  naming = names.detect(source.tensors, network)
  found = names.match(source.tensors, network, naming)
  if not found.found:
    names.refuse_unknown(network, found.unknown or ['anything'])
  tensors = names.to_wan_names(source.tensors, found, naming)
  owner = {key: row.wan.replace('*', index) for key, (row, index) in found.found.items()}
  optional = {row.wan for row in entries(network) if not row.foreign}
  missing = [name for name in want if name not in tensors and name not in optional]
  shapes = {name: tensor.shape for name, tensor in tensors.items()}
  tensors = {name: tensor for name, tensor in tensors.items() if name in want}
  pairs = updates(tensors)
  merged = {k: lora.merged(t, pairs[k]) if k in pairs else t for k, t in tensors.items()}
  cast = {k: _as_dtype(t, request.dtype) for k, t in merged.items()}
  out, went = names.from_wan_names(cast, network, _file_names(request.naming))
  unused = {key: 'known to be no part of the network' for key in found.unused}
  unused |= {key: 'unknown' for key in found.unknown}
  unused |= {k: 'not in a network of this size' for k, name in owner.items() if name not in want}
  unused |= {
    k: f'known to have no place in {request.naming}' for k in owner if went.get(owner[k]) == []
  }
  report = _report(source, {k: went[name] for k, name in owner.items() if went.get(name)}, out)
  report |= _shortfall(source, unused, missing, request)
  report['lora'] = _lora_rows(pairs, went)
  report['names'] = {'from': naming, 'to': request.naming}
  _refuse(report, shapes, want, request)
  return Conversion(out, cast, report)


def _file_names(naming: str) -> str:
  return 'wan' if naming == ORBAX else naming


def _as_dtype(tensor: Tensor, dtype: str) -> Tensor:
  return tensor if dtype == 'keep' else tensor._replace(dtype=np.dtype(convert.DTYPES[dtype]))


def _report(
  source: Source, went: Mapping[str, list[str]], out: Mapping[str, Tensor]
) -> dict[str, Any]:
  """One row for each tensor that was taken, with what it became."""
  rows = [
    {'key': key, **_sizes(source.tensors[key]), 'to': to, 'dtype_out': str(out[to[0]].dtype)}
    for key, to in went.items()
  ]
  return {
    'files': source.files,
    'verified': list(source.verified),
    'entry': source.entry,
    'others': list(source.others),
    'tensors': rows,
    'parameters': sum(int(np.prod(t.shape, dtype=np.int64)) for t in out.values()),
  }


def _sizes(tensor: Tensor) -> dict[str, Any]:
  return {'shape': list(tensor.shape), 'dtype': str(tensor.dtype)}


def _shortfall(
  source: Source, unused: Mapping[str, str], missing: Sequence[str], request: Request
) -> dict[str, Any]:
  """What is unused or missing, and whether each is allowed to be."""
  return {
    'unused': [
      {
        'key': key,
        **_sizes(source.tensors[key]),
        'why': why,
        'allowed': why.startswith('known') or matches(key, request.allow_unused),
      }
      for key, why in unused.items()
    ],
    'missing': [{'wan': name, 'allowed': matches(name, request.allow_missing)} for name in missing],
  }


def _lora_rows(
  updates: Mapping[str, lora.Update], to: Mapping[str, list[str]]
) -> list[dict[str, Any]]:
  return [
    {
      'wan': name,
      'to': to.get(name, []),
      'keys': list(u.keys),
      'rank': u.down.shape[0],
      'scale': u.scale,
    }
    for name, u in updates.items()
  ]


def _refuse(
  report: Mapping[str, Any],
  shapes: Mapping[str, tuple[int, ...]],
  want: Mapping[str, tuple[int, ...] | None],
  request: Request,
) -> None:
  unused = [row['key'] for row in report['unused'] if not row['allowed']]
  missing = [row['wan'] for row in report['missing'] if not row['allowed']]
  wrong = [
    f'{name} is {shape} and not {want[name]}'
    for name, shape in shapes.items()
    if want.get(name) not in (None, shape)
  ]
  where = ', '.join(report['files'][:1])
  if wrong:
    raise Refused(
      f'{where} is of another size: {listed(wrong)}{_hint(shapes, want, request)}.', report
    )
  if unused or missing:
    parts = [
      f'{word} {listed(keys)}' for word, keys in (('unused', unused), ('missing', missing)) if keys
    ]
    patterns = ' and '.join(f'--allow_{part.split()[0]}=PATTERN' for part in parts)
    raise Refused(
      f'{where} does not fit{_hint(shapes, want, request)}: {"; ".join(parts)}; '
      f'name them with {patterns} if that is meant.',
      report,
    )


class Refused(InputError):
  """An InputError that knows the report of what was refused."""

  def __init__(self, sentence: str, report: Mapping[str, Any]):
    super().__init__(sentence)
    self.report = report


def _hint(
  shapes: Mapping[str, tuple[int, ...]],
  want: Mapping[str, tuple[int, ...] | None],
  request: Request,
) -> str:
  """The size that the tensors do fit, if it is another than was asked for."""
  if request.network == 'clip':
    return ''
  for size in SIZES[request.network]:
    published = _published(request.network, size)
    if published != want and published.items() <= shapes.items():
      return f' (it is of --size={size})'
  return ''


def lines(report: Mapping[str, Any]) -> list[str]:
  """The report as text, one line for each tensor."""
  text = [
    f'{", ".join(report["files"])}' + (f', {report["entry"]}' if report['entry'] else ''),
    f'checked: {", ".join(report["verified"]) or "nothing to check it with"}',
  ]
  merged = {name: row for row in report['lora'] for name in row['to']}
  for row in report['tensors']:
    update = merged.get(row['to'][0])
    extra = f' + LoRA of rank {update["rank"]}, scale {update["scale"]:g}' if update else ''
    to = ', '.join(row['to'])
    text.append(f'{row["key"]} {row["shape"]} {row["dtype"]}{extra} -> {to} {row["dtype_out"]}')
  for row in report['unused']:
    text.append(f'unused: {row["key"]} {row["shape"]} {row["dtype"]} ({row["why"]})')
  text += [f'unused: {name} (beside the weights)' for name in report['others']]
  text += [f'missing: {row["wan"]}' for row in report['missing']]
  text.append(
    f'{len(report["tensors"])} tensors in, {report["parameters"]:,} parameters out in names of '
    f'{report["names"]["to"]}; {len(report["unused"])} unused, {len(report["missing"])} missing'
  )
  return text
