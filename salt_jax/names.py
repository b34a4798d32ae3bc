"""The names in a checkpoint, whoever wrote it, to and from Wan's, by the tables of `wan_names`.

ComfyUI reads a DiT under Wan's names, bare or behind 'model.diffusion_model.'; the prefixed form is
what its repackaged files have and what is written here, the bare one is that of Wan.
"""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import einops
import numpy as np
from absl import logging

from salt_jax.errors import InputError
from salt_jax.tensor_files import Tensor
from salt_jax.wan_names import (
  FOREIGN,
  Entry,
  counted_in_stages,
  counted_through,
  entries,
  find,
)

NAMINGS = ('wan', 'diffusers', 'comfyui')

WRAPPERS = re.compile(r'_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.|_orig_mod\.')
_PREFIXES = {'clip': r'(module\.|model\.|visual\.|vision_model\.)+'}
_ANY_PREFIX = r'(module\.|model\.|diffusion_model\.)+'
_WRITTEN = {
  ('dit', 'comfyui'): 'model.diffusion_model.',
  ('clip', 'wan'): 'visual.',
  ('clip', 'diffusers'): 'vision_model.',
}
# GAN heads of Self-Forcing forks, and a norm that diffusers itself never reads; the text tower of
# CLIP files; the table of transformers' CLIP that only counts.
_UNUSED = {
  'dit': r'(_cls_pred_branch|_register_tokens|_gan_ca_blocks)\b.*|blocks\.\d+\.attn2\.norm_added_q\..*',
  'clip': r'(textual|text_model|text_projection|visual_projection)\..*|log_scale|logit_scale'
  r'|embeddings\.position_ids',
}
_TIED, _COPY = 'shared.weight', 'encoder.embed_tokens.weight'


class Match(NamedTuple):
  """What the tensors of a checkpoint are.

  Attributes:
    found: their row in the table, and the index that its '*' stands for.
    unused: those known to be no part of the network.
    unknown: all others.
  """

  found: dict[str, tuple[Entry, str]]
  unused: list[str]
  unknown: list[str]


def listed(names: Iterable[str]) -> str:
  """The first four of some names, for a message."""
  names = sorted(names)
  more = f' and {len(names) - 4} more' if len(names) > 4 else ''
  return ', '.join(names[:4]) + more


def strip(keys: Iterable[str], network: str) -> dict[str, str]:
  """Maps keys to names without the prefixes that training and repackaging leave in front of them.

  Raises:
    InputError: two keys that differ in their prefixes alone.
  """
  prefix = re.compile(_PREFIXES.get(network, _ANY_PREFIX))
  bare, seen = {}, set()
  for key in keys:
    name = WRAPPERS.sub('', key)
    start = prefix.match(name)
    bare[key] = name[start.end() :] if start else name
    if bare[key] in seen:
      raise InputError(
        f'two weights are named {bare[key]} once prefixes are gone; keep one of them.'
      )
    seen.add(bare[key])
  return bare


def detect(keys: Iterable[str], network: str) -> str:
  """The naming of a checkpoint's keys: 'wan', or that of `FOREIGN`, whichever knows more of them."""
  keys = list(keys)
  counts = {source: len(match(keys, network, source).found) for source in ('wan', FOREIGN[network])}
  return max(counts, key=counts.get)


def match(keys: Iterable[str], network: str, source: str) -> Match:
  """Finds the keys of a checkpoint in the table.

  Args:
    keys: names in the naming of `source`; wrappers' prefixes may stand before them.
    network: 'dit', 'vae', 'umt5' or 'clip'.
    source: 'wan', or `FOREIGN[network]`.

  Raises:
    InputError: an unknown network or source, or names that differ in their prefixes alone.
  """
  rows = entries(network)
  if source not in ('wan', FOREIGN[network]):
    raise InputError(
      f'{network} weights come from wan or {FOREIGN[network]}, not {source!r}; name one of them.'
    )
  if source == 'wan':
    table = {row.wan: row._replace(part=0, parts=1) for row in rows}
  else:
    table = {row.foreign: row for row in rows if row.foreign}
  bare = strip(keys, network)
  unused = re.compile(_UNUSED.get(network, r'(?!)'))
  names = _untied(bare, source) if network == 'umt5' else bare
  out = Match({}, [], [])
  for key, name in _counted(names).items():
    row, index = find(table, name)
    if row:
      out.found[key] = table[row], index
    else:
      (out.unused if unused.fullmatch(name) else out.unknown).append(key)
  out.unused.extend(bare.keys() - names.keys())
  return out


def _counted(names: Mapping[str, str]) -> dict[str, str]:
  through = counted_through(names.values())
  return {key: through[name] for key, name in names.items()}


def _untied(bare: Mapping[str, str], source: str) -> dict[str, str]:
  """One name for the token embedding, which transformers may store under either of two or both."""
  if source == 'wan' or _COPY not in bare.values():
    return dict(bare)
  if _TIED in bare.values():
    return {key: name for key, name in bare.items() if name != _COPY}
  return {key: _TIED if name == _COPY else name for key, name in bare.items()}


def refuse_unknown(network: str, unknown: Iterable[str]) -> None:
  """Raises InputError if there are names that the table lacks."""
  if unknown := list(unknown):
    raise InputError(
      f'the {network} network has no weights named {listed(unknown)}; '
      'is it a file of another model, or in another naming?'
    )


def log_unused(network: str, unused: Iterable[str]) -> None:
  if unused := list(unused):
    logging.info('Leaving out %s: not part of the %s network.', listed(unused), network)


def _axes(row: Entry, source: str) -> str:
  return row.layout.torch if source == 'wan' else row.layout.foreign or row.layout.torch


def _rearranged(tensor: Tensor, have: str, want: str) -> Tensor:
  if have == want:
    return tensor
  pattern = f'{have} -> {want}'
  shape = einops.rearrange(np.broadcast_to(np.int8(0), tensor.shape), pattern).shape
  return Tensor(shape, tensor.dtype, lambda: einops.rearrange(tensor.read(), pattern))


def _joined(pieces: Mapping[int, Tensor]) -> Tensor:
  tensors = [pieces[part] for part in sorted(pieces)]
  shape = (sum(t.shape[0] for t in tensors), *tensors[0].shape[1:])
  return Tensor(shape, tensors[0].dtype, lambda: np.concatenate([t.read() for t in tensors]))


def _piece(tensor: Tensor, part: int, parts: int) -> Tensor:
  if parts == 1:
    return tensor
  size = tensor.shape[0] // parts
  shape = (size, *tensor.shape[1:])
  return Tensor(shape, tensor.dtype, lambda: tensor.read()[part * size : (part + 1) * size])


def to_wan_names(tensors: Mapping[str, Tensor], found: Match, source: str) -> dict[str, Tensor]:
  """The tensors that `match` found, under Wan's names and in Wan's shapes.

  Raises:
    InputError: a tensor that Wan has in one piece is there in part, or of another rank.
  """
  groups = {}
  for key, (row, index) in found.found.items():
    try:
      tensor = _rearranged(tensors[key], _axes(row, source), row.layout.torch)
    except einops.EinopsError as error:
      raise InputError(f'{key} has shape {tensors[key].shape}; is it of another model?') from error
    groups.setdefault((row.wan.replace('*', index), row.parts), {})[row.part] = tensor
  torn = [name for (name, parts), pieces in groups.items() if len(pieces) < parts]
  if torn:
    raise InputError(f'pieces of {listed(torn)} are not there; give every shard of the checkpoint.')
  return {
    name: _joined(pieces) if parts > 1 else pieces[0] for (name, parts), pieces in groups.items()
  }


def from_wan_names(
  tensors: Mapping[str, Tensor], network: str, naming: str
) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
  """Tensors as another program names and shapes them.

  Args:
    tensors: under Wan's names, without a prefix.
    network: 'dit', 'vae', 'umt5' or 'clip'.
    naming: 'wan'; 'diffusers', which is transformers' for umt5 and clip; or 'comfyui', for the DiT.

  Returns:
    The tensors under their new names, and the new names of each old one (none where the other model
    has no such tensor, three where it has it in pieces).

  Raises:
    InputError: a naming that the network does not have.
  """
  if naming not in NAMINGS or (naming == 'comfyui' and network != 'dit'):
    known = NAMINGS if network == 'dit' else NAMINGS[:2]
    raise InputError(f'the {network} has no names of {naming!r}; choose {" or ".join(known)}.')
  prefix = _WRITTEN.get((network, naming), '')
  if naming != 'diffusers':
    return {prefix + k: t for k, t in tensors.items()}, {k: [prefix + k] for k in tensors}
  rows, went, out = {}, {}, {}
  for row in entries(network):
    rows.setdefault(row.wan, []).append(row)
  for key, tensor in tensors.items():
    name, index = find(rows, key)
    went[key] = [row.foreign.replace('*', index) for row in rows[name] if row.foreign]
    for row, foreign in zip(rows[name], went[key], strict=False):
      piece = _piece(tensor, row.part, row.parts)
      out[foreign] = _rearranged(piece, row.layout.torch, _axes(row, 'foreign'))
  staged = counted_in_stages(out)
  renamed = {prefix + staged[name]: tensor for name, tensor in out.items()}
  return renamed, {key: [prefix + staged[name] for name in new] for key, new in went.items()}
