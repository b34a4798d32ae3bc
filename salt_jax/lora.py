"""Low-rank updates of a DiT, merged into its weights: W + (alpha / rank) up down (arXiv:2106.09685)."""

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from salt_jax.errors import InputError
from salt_jax.names import WRAPPERS, listed
from salt_jax.tensor_files import Tensor
from salt_jax.wan_names import entries, find

# The two factors as PEFT and as others name them, 'default' being an adapter's name.
_KEY = re.compile(r'(.+)\.(lora_A|lora_B|lora_down|lora_up|alpha)(\.default)?(\.weight)?')
_PART = {'lora_A': 'down', 'lora_down': 'down', 'lora_B': 'up', 'lora_up': 'up', 'alpha': 'alpha'}
_PREFIX = re.compile(
  r'(base_model\.model\.|module\.|model\.|transformer\.|unet\.|diffusion_model\.|lora_unet_)+'
)


class Update(NamedTuple):
  """One weight's update.

  Attributes:
    keys: its tensors' names in the file.
    down: `[rank in]`.
    up: `[out rank]`.
    alpha: numerator of the scale.
  """

  keys: tuple[str, ...]
  down: Tensor
  up: Tensor
  alpha: float

  @property
  def scale(self) -> float:
    return self.alpha / self.down.shape[0]


def _modules(names: Iterable[str]) -> dict[str, str]:
  """A weight's Wan name by its module's name in either naming, dots and underscores alike."""
  rows = {}
  for row in entries('dit'):
    rows.setdefault(row.wan, []).append(row)
  found = {}
  for name in names:
    row, index = find(rows, name)
    for entry in rows.get(row, ()):
      for module in (entry.wan, entry.foreign):
        if module.endswith('.weight'):
          flat = module.removesuffix('.weight').replace('*', index).replace('.', '_')
          found[flat] = name
  return found


def _module(text: str) -> str:
  text = WRAPPERS.sub('', text)
  start = _PREFIX.match(text)
  return (text[start.end() :] if start else text).replace('.', '_')


def updates(
  tensors: Mapping[str, Tensor], weights: Mapping[str, Tensor], alpha: float | None = None
) -> tuple[dict[str, Update], list[str]]:
  """Pairs the tensors of a LoRA file and finds the weights they belong to.

  Args:
    tensors: lora_A and lora_B (PEFT, diffusers), or lora_down, lora_up and perhaps alpha (kohya,
      ComfyUI), under Wan's or diffusers' names of the modules.
    weights: a DiT's tensors under Wan's names.
    alpha: for files that do not hold it; by default the rank, which makes the scale 1.

  Returns:
    The updates by Wan's name of the weight, and the keys that belong to none.

  Raises:
    InputError: half a pair, or shapes that do not fit.
  """
  modules, groups, unknown = _modules(weights), {}, []
  for key in tensors:
    parts = _KEY.fullmatch(key)
    name = modules.get(_module(parts[1])) if parts else None
    if not name:
      unknown.append(key)
      continue
    group = groups.setdefault(name, {})
    if _PART[parts[2]] in group:
      raise InputError(f'two of the LoRA tensors are for {name}; give one file at a time.')
    group[_PART[parts[2]]] = key
  halves = [group for group in groups.values() if not {'down', 'up'} <= group.keys()]
  torn = [key for group in halves for key in group.values()]
  if torn:
    raise InputError(f'{listed(torn)} lack the other half of a LoRA pair; give the whole file.')
  found = {name: _update(tensors, group, alpha) for name, group in groups.items()}
  for name, update in found.items():
    _refuse_shapes(name, weights[name], update)
  return found, unknown


def _update(tensors: Mapping[str, Tensor], group: Mapping[str, str], alpha: float | None) -> Update:
  down = tensors[group['down']]
  if 'alpha' in group:
    alpha = float(np.asarray(tensors[group['alpha']].read(), np.float64).reshape(-1)[0])
  elif alpha is None:
    alpha = float(down.shape[0]) if down.shape else 1.0
  return Update(tuple(group.values()), down, tensors[group['up']], alpha)


def _refuse_shapes(name: str, weight: Tensor, update: Update) -> None:
  down, up = update.down.shape, update.up.shape
  if (
    len(down) != 2
    or not down[0]
    or up != (*weight.shape[:1], down[0])
    or weight.shape[1:] != down[1:]
  ):
    raise InputError(
      f'the LoRA pair of {name} has shapes {down} and {up}, which do not make {weight.shape}; '
      'is it for a model of another size?'
    )


def merged(weight: Tensor, update: Update) -> Tensor:
  """W + (alpha / rank) up down, summed in float32 and rounded to W's dtype when it is written."""

  def read() -> np.ndarray:
    total = update.up.read().astype(np.float32) @ update.down.read().astype(np.float32)
    total *= np.float32(update.scale)
    total += weight.read()
    return total

  return Tensor(weight.shape, weight.dtype, read)
