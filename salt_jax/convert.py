"""Wan, diffusers and transformers weights <-> parameter trees, and the files they live in.

The parameter path follows from Wan's name: a numeric component joins its predecessor ('ffn.0' ->
'ffn_0'), the layers of the transformers are stacked along a leading axis, and the leaf is named by
its layout in `wan_names`. As a program, `python -m salt_jax.convert` is `salt_jax.convert_cli`.
"""

import os
import re
from collections.abc import Mapping
from typing import Any

import einops
import ml_dtypes
import numpy as np

from salt_jax import names, tensor_files
from salt_jax.errors import InputError
from salt_jax.leaves import Leaf, of_array
from salt_jax.tensor_files import Tensor
from salt_jax.wan_names import Layout, find, layouts

Params = dict[str, Any]
Tensors = Mapping[str, np.ndarray]

DTYPES = {'float32': np.float32, 'float16': np.float16, 'bfloat16': ml_dtypes.bfloat16}
# Where the transformers keep their layers, which are stacked.
_STACKED = {'dit': 'blocks', 'umt5': 'blocks', 'clip': 'transformer'}


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


def _rearranged(key: str, tensor: Tensor, pattern: str, layout: Layout) -> Tensor:
  """The same, done when the tensor is read."""
  empty = np.broadcast_to(np.int8(0), tensor.shape)
  shape = _rearrange(key, empty, pattern, layout).shape
  return Tensor(shape, tensor.dtype, lambda: _rearrange(key, tensor.read(), pattern, layout))


def rename(tensors: Tensors, network: str, source: str) -> dict[str, np.ndarray]:
  """Gives tensors their Wan names; layouts stay torch's.

  Args:
    tensors: arrays by name in the naming of `source`.
    network: 'dit', 'vae', 'umt5' or 'clip'.
    source: 'wan', or 'diffusers' (dit, vae), or 'transformers' (umt5, clip).

  Returns:
    The same arrays under Wan's names, without wrappers' prefixes, a tied copy or unused heads.

  Raises:
    InputError: an unknown name, network or source.
  """
  lazy = {key: tensor_files.held(array) for key, array in tensors.items()}
  return {key: x.read() for key, x in _renamed(lazy, network, source).items()}


def _renamed(tensors: Mapping[str, Tensor], network: str, source: str) -> dict[str, Tensor]:
  found = names.match(tensors, network, source)
  names.log_unused(network, found.unused)
  names.refuse_unknown(network, found.unknown)
  return names.to_wan_names(tensors, found, source)


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
  lazy = {key: tensor_files.held(np.asarray(array)) for key, array in tensors.items()}
  return read(from_tensors(lazy, network), dtype)


def read(tree: Params, dtype: Any = None) -> Params:
  """A tree of leaves as one of arrays, cast to `dtype` if one is given."""
  return _nest({path: leaf.whole(dtype) for path, leaf in _flatten(tree).items()})


def from_tensors(tensors: Mapping[str, Tensor], network: str) -> Params:
  """As `from_wan`, but nothing is read: the tree is of `Leaf`."""
  table = layouts(network)
  tensors = {name: tensors[key] for key, name in names.strip(tensors, network).items()}
  found = {key: find(table, key) for key in tensors}
  names.refuse_unknown(network, [key for key, (row, _) in found.items() if not row])
  tree, layers = {}, {}
  for key, (row, index) in found.items():
    layout = table[row]
    tensor = _rearranged(key, tensors[key], f'{layout.torch} -> {layout.params}', layout)
    if network in _STACKED and index:
      layers.setdefault(row, {})[int(index)] = tensor
    else:
      tree[_path(key, layout)] = Leaf((tensor,), False)
  _refuse_gaps(network, layers)
  for row, stack in layers.items():
    path = _path(row, table[row])
    _refuse_uneven(path, stack)
    tree[path] = Leaf(tuple(stack[index] for index in range(len(stack))), True)
  return _nest(tree)


def _path(key: str, layout: Layout) -> tuple[str, ...]:
  """'a.b.0.weight' -> ('a', 'b_0', 'kernel'); a stacked layer's '*' leaves no trace."""
  module = key.replace('.*', '').rpartition('.')[0]
  nodes = re.sub(r'\.(\d+)(?=\.|$)', r'_\1', module).split('.')
  return (*filter(None, nodes), layout.leaf)


def _refuse_gaps(network: str, layers: Mapping[str, Mapping[int, Tensor]]):
  count = max((index for arrays in layers.values() for index in arrays), default=-1) + 1
  missing = [
    row.replace('*', str(index))
    for row, arrays in layers.items()
    for index in range(count)
    if index not in arrays
  ]
  if missing:
    raise InputError(
      f'the {network} weights lack {names.listed(missing)}; give every shard of the checkpoint.'
    )


def _refuse_uneven(path: tuple[str, ...], layers: Mapping[int, Tensor]):
  shapes = {layer.shape for layer in layers.values()}
  if len(shapes) > 1:
    raise InputError(
      f'{".".join(path)} differs in shape between layers: {sorted(shapes)}; '
      'use a checkpoint whose layers are alike.'
    )


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


def stacked(path: tuple[str, ...]) -> bool:
  """Whether the leaf at a path of any network is a stack of layers."""
  return path[0] in _STACKED.values()


def to_wan(params: Params, network: str) -> dict[str, np.ndarray]:
  """The exact inverse of `from_wan`: torch's layouts under Wan's names (views where possible).

  Raises:
    InputError: a leaf that the table of `network` does not know, or a shape that does not fit.
  """
  return {key: tensor.read() for key, tensor in to_tensors(_held(params), network).items()}


def to_tensors(tree: Params, network: str) -> dict[str, Tensor]:
  """As `to_wan`, but of a tree of `Leaf`, and nothing is read."""
  table, tensors, flat = layouts(network), {}, _flatten(tree)
  rows = {path: find(table, _wan_key(path, network))[0] for path in flat}
  names.refuse_unknown(
    network,
    ['.'.join(path) for path, row in rows.items() if not row or table[row].leaf != path[-1]],
  )
  for path, leaf in flat.items():
    key, layout = _wan_key(path, network), table[rows[path]]
    pattern = f'{layout.params} -> {layout.torch}'
    for index, layer in enumerate(leaf.layers):
      name = key.replace('*', str(index))
      tensors[name] = _rearranged('.'.join(path), layer, pattern, layout)
  return tensors


def _held(params: Params) -> Params:
  return _nest(
    {path: of_array(np.asarray(array), stacked(path)) for path, array in _flatten(params).items()}
  )


def wan_shapes(like: Params, network: str) -> dict[str, tuple[int, ...]]:
  """Wan's names and torch shapes of a tree of shapes; allocates nothing."""
  empty = {path: np.broadcast_to(0, leaf.shape) for path, leaf in _flatten(like).items()}
  tensors = to_tensors(_held(_nest(empty)), network)
  return {key: tensor.shape for key, tensor in tensors.items()}


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
      f'{word} {names.listed(leaves)}'
      for word, leaves in (('lacks', lost), ('has the unused', extra))
      if leaves
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
    raise InputError(f'a checkpoint of another size: {names.listed(wrong)}.')


def load_safetensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray]:
  """Reads every tensor of a file, bfloat16 included, and compares it with the checksum beside it.

  Raises:
    InputError: no such file, not a safetensors file, cut short, not the one that the checksum was
      made of, or numbers that are not finite.
  """
  path = os.fspath(path)
  tensors, _ = tensor_files.scan(path)
  tensor_files.verify(path)
  arrays = {name: tensor.read() for name, tensor in tensors.items()}
  tensor_files.refuse_nonfinite(path, arrays)
  return arrays


def save_safetensors(
  path: str | os.PathLike[str], tensors: Tensors, metadata: Mapping[str, str] | None = None
):
  """Writes a file all at once: a reader never sees half of it.

  Raises:
    InputError: a number is NaN or infinite.
  """
  held = {name: tensor_files.held(np.asarray(array)) for name, array in tensors.items()}
  tensor_files.write(os.fspath(path), held, metadata)


def load_params(
  path: str | os.PathLike[str], network: str, like: Params, source: str = 'wan'
) -> Params:
  """Reads a file into float32 parameters shaped like `like`.

  Raises:
    InputError: a damaged file, unknown or missing names, or another size; the path is named.
  """
  return read(open_params(path, network, like, source), np.float32)


def open_params(
  path: str | os.PathLike[str], network: str, like: Params, source: str = 'wan'
) -> Params:
  """The same as a tree of `Leaf`: names, shapes and checksum are compared, and no tensor is read."""
  path = os.fspath(path)
  tensors, _ = tensor_files.scan(path)
  tensor_files.verify(path)
  sound = {name: tensor_files.finite(path, name, tensor) for name, tensor in tensors.items()}
  try:
    tree = from_tensors(_renamed(sound, network, source), network)
    check(tree, like)
  except InputError as error:
    raise InputError(f'{path}: {error}') from error
  return tree


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


if __name__ == '__main__':
  from salt_jax import cli, convert_cli

  cli.run(convert_cli.program, convert_cli.define_flags)
