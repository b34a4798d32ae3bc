"""Where weights come from: files in one or many shards, torch files, and runs."""

import json
import os
import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from salt_jax import checkpoint, convert, pickles, places, run_weights, tensor_files
from salt_jax.errors import InputError
from salt_jax.tensor_files import Tensor

_SUFFIXES = ('.safetensors', '.pt', '.pth', '.bin')


class Source(NamedTuple):
  """Opened weights.

  Attributes:
    tensors: by their names in the source, not read yet.
    files: what they lie in.
    entry: which part of a torch file or a run they are.
    others: what else the part's container holds.
    verified: files that were compared with a checksum, or entries with a fingerprint.
    metadata: of a safetensors file.
    config: of the run that made them, if known.
  """

  tensors: dict[str, Tensor]
  files: list[str]
  entry: str = ''
  others: Sequence[str] = ()
  verified: Sequence[str] = ()
  metadata: Mapping[str, str] = types.MappingProxyType({})
  config: ConfigDict | None = None


def open_source(path: str, entry: str = '', network: str = 'dit', default: str = '') -> Source:
  """Opens weights of any kind.

  Args:
    path: a safetensors or torch file, the index of a sharded one, a folder that holds one of
      these, or the workdir of a run.
    entry: the part of a torch file or of a run, such as generator_ema.
    network: what a run's network is.
    default: the part of a torch file to take if none is named and it has this one.

  Raises:
    InputError: nothing there, damaged, not what its checksum says, or a part is to be named.
  """
  if places.is_run(path):
    return _open_run(path, entry, network)
  if os.path.isdir(path):
    path = _only_file(path)
  if path.endswith('.json'):
    return _refuse_entry(_open_shards(path), path, entry)
  torch = tensor_files.kind(path) == 'torch'
  verified = [path] if tensor_files.verify(path) else []
  if torch:
    content = pickles.load(path)
    if not entry and isinstance(content, Mapping) and default in content:
      entry = default
    tensors, entry, others = _part(path, content, entry)
    return Source(tensors, [path], entry, others, verified)
  tensors, metadata = tensor_files.scan(path)
  config = _config(metadata)
  source = Source(tensors, [path], verified=verified, metadata=metadata, config=config)
  return _refuse_entry(source, path, entry)


def _refuse_entry(source: Source, path: str, entry: str) -> Source:
  if entry:
    raise InputError(f'--entry={entry} has no use: {path} holds one network; leave it out.')
  return source


def _config(metadata: Mapping[str, str]) -> ConfigDict | None:
  text = metadata.get('config')
  return ConfigDict(json.loads(text), convert_dict=True) if text else None


def _only_file(folder: str) -> str:
  names = sorted(os.listdir(folder))
  found = [n for n in names if n.endswith('.index.json')]
  found = found or [n for n in names if n.endswith(_SUFFIXES)]
  if len(found) != 1:
    held = ', '.join(found[:4]) or 'none'
    raise InputError(f'{folder} must hold one file of weights or one index, not {held}; name one.')
  return os.path.join(folder, found[0])


def _open_shards(path: str) -> Source:
  folder, where = os.path.dirname(path), _weight_map(path)
  names = sorted(set(where.values()))
  absent = [name for name in names if not os.path.isfile(os.path.join(folder, name))]
  if absent:
    raise InputError(f'{path} names shards that are not there: {", ".join(absent)}; fetch them.')
  tensors, files, verified = {}, [], []
  for name in names:
    shard = open_source(os.path.join(folder, name))
    twice = tensors.keys() & shard.tensors.keys()
    lost = [k for k, owner in where.items() if owner == name and k not in shard.tensors]
    if twice or lost:
      wrong = f'lacks {min(lost)}' if lost else f'repeats {min(twice)}'
      raise InputError(f'{shard.files[0]} {wrong}, which {path} says otherwise; fetch both anew.')
    tensors |= shard.tensors
    files += shard.files
    verified += shard.verified
  return Source(tensors, files, verified=verified)


def _weight_map(path: str) -> dict[str, str]:
  """Names of tensors to names of files, from the index of a sharded checkpoint."""
  if not os.path.isfile(path):
    raise InputError(f'{path} is not there or not a file; check the path.')
  try:
    with open(path, encoding='utf-8') as file:
      where = json.load(file)['weight_map']
    sound = where and all(type(n) is str and n == os.path.basename(n) for n in where.values())
  except (ValueError, KeyError, TypeError, AttributeError):
    sound = False
  if not sound:
    raise InputError(f'{path} is no index of a sharded checkpoint; name the index or one file.')
  return where


def _part(path: str, content: Any, entry: str) -> tuple[dict[str, Tensor], str, list[str]]:
  """The tensors of one part of a torch file, the part's name, and the names of all the rest."""
  if not isinstance(content, Mapping):
    raise InputError(f'{path} holds no dictionary of weights; save a state dict.')
  parts = {name: _tensors(value) for name, value in content.items()}
  parts = {name: tensors for name, tensors in parts.items() if tensors}
  bare = _tensors(content)
  if not entry and not bare and len(parts) == 1:
    (entry,) = parts
  if entry and entry not in parts:
    known = ', '.join(map(str, parts)) or 'none: the file is one network'
    raise InputError(f'--entry={entry} is not in {path}; known are {known}.')
  if not entry and not bare and not parts:
    raise InputError(f'{path} holds no tensors; give a file of weights.')
  if not entry and not bare:
    raise InputError(f'{path} holds {", ".join(map(str, parts))}; name one with --entry.')
  taken = parts[entry] if entry else bare
  rest = [str(name) for name in content if name != entry and name not in taken]
  inner = content[entry] if entry else {}
  return taken, entry, rest + [f'{entry}.{key}' for key in inner if key not in taken]


def _tensors(value: Any) -> dict[str, Tensor]:
  if not isinstance(value, Mapping):
    return {}
  return {k: x for k, x in value.items() if isinstance(k, str) and isinstance(x, Tensor)}


def _open_run(path: str, entry: str, network: str) -> Source:
  file = places.folder_of(path) / 'config.json'
  try:
    config = ConfigDict(json.loads(file.read_text()), convert_dict=True)
  except (OSError, ValueError) as error:
    raise InputError(f'{file} is not there or damaged; pass the workdir of a run.') from error
  folder = places.home(path)
  known = checkpoint.entries(folder)
  averaged = [name for name in known if name.endswith('_ema')]
  if not entry and len(averaged) > 1:
    raise InputError(f'{path} holds {", ".join(known)}; name one with --entry.')
  entry = entry or averaged[0]
  tensors = convert.to_tensors(run_weights.load(folder, entry), network)
  verified = [entry] if entry.endswith('_ema') else []
  others = [name for name in known if name != entry]
  return Source(tensors, [path], entry, others, verified, config=config)
