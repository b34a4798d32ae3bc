"""Wan, diffusers and transformers weights <-> parameter trees, and the files they live in.

The parameter path follows from Wan's name: a numeric component joins its predecessor ('ffn.0' ->
'ffn_0'), the layers of the transformers are stacked along a leading axis, and the leaf
is named by its layout in `wan_names`.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

import einops
import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy
from absl import logging

from salt_jax.errors import InputError
from salt_jax.wan_names import Layout, counted_through, entries, find, layouts

Params = dict[str, Any]
Tensors = Mapping[str, np.ndarray]

DTYPES = {'float32': np.float32, 'float16': np.float16, 'bfloat16': ml_dtypes.bfloat16}
FOREIGN = {'dit': 'diffusers', 'vae': 'diffusers', 'umt5': 'transformers', 'clip': 'wan'}

# Where the transformers keep their layers, which are stacked.
_STACKED = {'dit': 'blocks', 'umt5': 'blocks', 'clip': 'transformer'}
_WRAPPERS = re.compile(r'_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.|_orig_mod\.')
# GAN heads of Self-Forcing forks, and a norm that diffusers itself never reads.
_UNUSED = re.compile(
  r'(_cls_pred_branch|_register_tokens|_gan_ca_blocks)\b.*|blocks\.\d+\.attn2\.norm_added_q\..*'
  r'|log_scale|textual\..*'  # the other half of CLIP
)


def _listed(names: list[str]) -> str:
  more = f' and {len(names) - 4} more' if len(names) > 4 else ''
  return ', '.join(sorted(names)[:4]) + more


def _rearrange(key: str, array: np.ndarray, pattern: str, layout: Layout) -> np.ndarray:
  try:
    return einops.rearrange(array, pattern, **dict(layout.sizes))
  except einops.EinopsError as error:
    expected = pattern.split(' -> ')[0]
    sizes = ''.join(f', {name} = {size}' for name, size in layout.sizes)
    raise InputError(
      f'{key} has shape {array.shape} but must read as ({expected}){sizes}; '
      'is it a file of another model?'
    ) from error


def _strip(tensors: Tensors) -> dict[str, np.ndarray]:
  """Removes the prefixes that training and repackaging leave in front of a model's names."""
  stripped = {}
  for key, array in tensors.items():
    name = _WRAPPERS.sub('', key)
    for prefix in ('model.', 'diffusion_model.', 'visual.'):
      name = name.removeprefix(prefix)
    if name in stripped:
      raise InputError(f'two weights are named {name} once prefixes are gone; keep one of them.')
    stripped[name] = array
  return stripped


def rename(tensors: Tensors, network: str, source: str) -> dict[str, np.ndarray]:
  """Gives tensors their Wan names; layouts stay torch's.

  Args:
    tensors: arrays by name in the naming of `source`.
    network: 'dit', 'vae', 'umt5' or 'clip'.
    source: 'wan', or 'diffusers' (dit, vae), or 'transformers' (umt5).

  Returns:
    The same arrays under Wan's names, without wrappers' prefixes, a tied copy or unused heads.

  Raises:
    InputError: an unknown name, network or source.
  """
  table = {entry.wan if source == 'wan' else entry.foreign: entry.wan for entry in entries(network)}
  if source not in ('wan', FOREIGN[network]):
    raise InputError(
      f'{network} weights come from wan or {FOREIGN[network]}, not {source!r}; name one of them.'
    )
  tensors = _strip(tensors)
  if source == 'transformers' and 'encoder.embed_tokens.weight' in tensors:
    tensors.setdefault('shared.weight', tensors.pop('encoder.embed_tokens.weight'))
  unused = [key for key in tensors if _UNUSED.fullmatch(key)]
  if unused:
    logging.info('Leaving out %s: not part of the %s network.', _listed(unused), network)
  counted = counted_through(key for key in tensors if key not in unused)
  found = {key: find(table, name) for key, name in counted.items()}
  _refuse_unknown(network, [key for key, (name, _) in found.items() if not name])
  return {table[name].replace('*', index): tensors[key] for key, (name, index) in found.items()}


def _refuse_unknown(network: str, unknown: list[str]):
  if unknown:
    raise InputError(
      f'the {network} network has no weights named {_listed(unknown)}; '
      'is it a file of another model, or in another naming?'
    )


def from_wan(tensors: Tensors, network: str, dtype: Any = None) -> Params:
  """Builds a parameter tree from tensors under Wan's names.

  Args:
    tensors: arrays in torch's layouts; wrappers' prefixes may stand before the names.
    network: 'dit', 'vae', 'umt5' or 'clip'.
    dtype: if given, what every leaf is cast to; otherwise the tensors' own type is kept.

  Returns:
    Nested dicts; the layers of the transformers are stacked along a leading axis.

  Raises:
    InputError: a name outside the table, a layer that is missing, or a shape that does not fit.
  """
  tensors, table = _strip(tensors), layouts(network)
  found = {key: find(table, key) for key in tensors}
  _refuse_unknown(network, [key for key, (name, _) in found.items() if not name])
  leaves, layers = {}, {}
  for key, (name, index) in found.items():
    layout = table[name]
    array = _rearrange(key, tensors[key], f'{layout.torch} -> {layout.params}', layout)
    if network in _STACKED and index:
      layers.setdefault(name, {})[int(index)] = array
    else:
      leaves[_path(key, layout)] = np.asarray(array, dtype)
  _refuse_gaps(network, layers)
  for name, arrays in layers.items():
    path = _path(name, table[name])
    leaves[path] = _stack(path, arrays, dtype)
  return _nest(leaves)


def _path(key: str, layout: Layout) -> tuple[str, ...]:
  """'a.b.0.weight' -> ('a', 'b_0', 'kernel'); a stacked layer's '*' leaves no trace."""
  module = key.replace('.*', '').rpartition('.')[0]
  nodes = re.sub(r'\.(\d+)(?=\.|$)', r'_\1', module).split('.')
  return (*filter(None, nodes), layout.leaf)


def _refuse_gaps(network: str, layers: Mapping[str, Mapping[int, np.ndarray]]):
  count = max((index for arrays in layers.values() for index in arrays), default=-1) + 1
  missing = [
    name.replace('*', str(index))
    for name, arrays in layers.items()
    for index in range(count)
    if index not in arrays
  ]
  if missing:
    raise InputError(
      f'the {network} weights lack {_listed(missing)}; give every shard of the checkpoint.'
    )


def _stack(path: tuple[str, ...], arrays: Mapping[int, np.ndarray], dtype: Any) -> np.ndarray:
  shapes = {array.shape for array in arrays.values()}
  if len(shapes) > 1:
    raise InputError(
      f'{".".join(path)} differs in shape between layers: {sorted(shapes)}; '
      'use a checkpoint whose layers are alike.'
    )
  return np.stack([arrays[index] for index in range(len(arrays))], dtype=dtype)


def _nest(leaves: Mapping[tuple[str, ...], Any]) -> Params:
  tree = {}
  for path, leaf in leaves.items():
    node = tree
    for name in path[:-1]:
      node = node.setdefault(name, {})
    node[path[-1]] = leaf
  return tree


def _flatten(tree: Mapping[str, Any], above: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
  leaves = {}
  for name, node in tree.items():
    path = above + (name,)
    leaves.update(_flatten(node, path) if isinstance(node, Mapping) else {path: node})
  return leaves


def _wan_key(path: tuple[str, ...], network: str) -> str:
  stacked = path[0] == _STACKED.get(network)
  module = '.'.join((f'{path[0]}.*',) + path[1:-1] if stacked else path[:-1])
  leaf = 'weight' if path[-1] in ('kernel', 'embedding') else path[-1]
  return '.'.join(filter(None, (re.sub(r'_(\d+)(?=\.|$)', r'.\1', module), leaf)))


def to_wan(params: Params, network: str) -> dict[str, np.ndarray]:
  """The exact inverse of `from_wan`: torch's layouts under Wan's names (views where possible).

  Raises:
    InputError: a leaf that the table of `network` does not know, or a shape that does not fit.
  """
  table, tensors, leaves = layouts(network), {}, _flatten(params)
  names = {path: find(table, _wan_key(path, network))[0] for path in leaves}
  _refuse_unknown(
    network,
    ['.'.join(path) for path, name in names.items() if not name or table[name].leaf != path[-1]],
  )
  for path, leaf in leaves.items():
    key, array, layout = _wan_key(path, network), np.asarray(leaf), table[names[path]]
    pattern = f'{layout.params} -> {layout.torch}'
    for index, layer in enumerate(array if '*' in key else [array]):
      tensors[key.replace('*', str(index))] = _rearrange('.'.join(path), layer, pattern, layout)
  return tensors


def wan_shapes(like: Params, network: str) -> dict[str, tuple[int, ...]]:
  """Wan's names and torch shapes of a tree of shapes; allocates nothing."""
  empty = {path: np.broadcast_to(0, leaf.shape) for path, leaf in _flatten(like).items()}
  return {key: array.shape for key, array in to_wan(_nest(empty), network).items()}


def check(params: Params, like: Params):
  """Compares the names and shapes of `params` with those of `like` (anything with a shape).

  Raises:
    InputError: leaves that are missing, left over, or of another shape, by name.
  """
  have = {'.'.join(path): tuple(leaf.shape) for path, leaf in _flatten(params).items()}
  want = {'.'.join(path): tuple(leaf.shape) for path, leaf in _flatten(like).items()}
  lost, extra = sorted(want.keys() - have.keys()), sorted(have.keys() - want.keys())
  if lost or extra:
    parts = [
      f'{word} {_listed(names)}'
      for word, names in (('lacks', lost), ('has the unused', extra))
      if names
    ]
    raise InputError(
      f'a checkpoint of another model: it {" and ".join(parts)}; '
      'choose the config it was made with.'
    )
  wrong = [
    f'{name} is {have[name]} but the config asks for {want[name]}'
    for name in sorted(want)
    if have[name] != want[name]
  ]
  if wrong:
    raise InputError(f'a checkpoint of another size: {_listed(wrong)}.')


def _refuse_nonfinite(path: str, tensors: Tensors):
  spoilt = [name for name, array in tensors.items() if not np.all(np.isfinite(array))]
  if spoilt:
    raise InputError(
      f'{path} holds NaN or infinite numbers in {_listed(spoilt)}; '
      'use a checkpoint from before they appeared.'
    )


def load_safetensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
  """Reads every tensor of a file, bfloat16 included.

  Raises:
    InputError: no such file, not a safetensors file, cut short, or numbers that are not finite.
  """
  path = os.fspath(path)
  if not os.path.isfile(path):
    raise InputError(f'{path} is not there or not a file; check the path.')
  with open(path, 'rb') as file:
    start = file.read(9)
  if start[8:] != b'{':
    raise InputError(f'{path} is not a safetensors file; give one, or convert yours first.')
  try:
    with safetensors.safe_open(path, framework='np') as file:
      tensors = {name: file.get_tensor(name) for name in file.keys()}
  except safetensors.SafetensorError as error:
    raise InputError(f'{path} is cut short or damaged; copy or download it again.') from error
  _refuse_nonfinite(path, tensors)
  return tensors


def save_safetensors(
  path: str | os.PathLike[str], tensors: Tensors, metadata: Mapping[str, str] | None = None
):
  """Writes a file all at once: a reader never sees half of it.

  Raises:
    InputError: a number is NaN or infinite.
  """
  path = os.fspath(path)
  _refuse_nonfinite(path, tensors)
  os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
  # safetensors writes the buffer as it lies, so a transposed view would be stored scrambled.
  tensors = {name: np.ascontiguousarray(array) for name, array in tensors.items()}
  draft = f'{path}.{os.getpid()}.tmp'
  try:
    safetensors.numpy.save_file(tensors, draft, metadata=dict(metadata or {}))
    os.replace(draft, path)
  finally:
    if os.path.exists(draft):
      os.remove(draft)


def load_params(
  path: str | os.PathLike[str], network: str, like: Params, source: str = 'wan'
) -> Params:
  """Reads a file into float32 parameters shaped like `like`.

  Raises:
    InputError: a damaged file, unknown or missing names, or another size; the path is named.
  """
  tensors = load_safetensors(path)
  try:
    params = from_wan(rename(tensors, network, source), network, np.float32)
    check(params, like)
  except InputError as error:
    raise InputError(f'{os.fspath(path)}: {error}') from error
  return params


def save_params(
  path: str | os.PathLike[str],
  params: Params,
  network: str,
  dtype: str = 'float32',
  metadata: Mapping[str, str] | None = None,
):
  """Writes parameters under Wan's names and in torch's layouts.

  Raises:
    InputError: an unknown `dtype`, a leaf outside the table, or a number that is not finite.
  """
  if dtype not in DTYPES:
    raise InputError(f'weights cannot be saved as {dtype!r}; choose one of {", ".join(DTYPES)}.')
  tensors = {name: array.astype(DTYPES[dtype]) for name, array in to_wan(params, network).items()}
  save_safetensors(path, tensors, metadata)
