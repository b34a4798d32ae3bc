"""What the published networks hold: one table each of names, foreign names and layouts.

A row reads (Wan's module, the foreign module, kind); '*' stands for a layer's index, and the kind
says which tensors the module holds and how each is laid out in torch and in the parameters. Foreign
is diffusers for the DiT and the VAE, transformers for UMT5 and CLIP. Three foreign modules, joined
by spaces, are the thirds of Wan's. diffusers groups the layers of the VAE's decoder in stages; the
table counts them through, as Wan does (`counted_through`, and back `counted_in_stages`).
"""

import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from salt_jax.errors import InputError


class Layout(NamedTuple):
  """A tensor's name in the parameters and its axes in torch and in the parameters.

  `foreign` are its axes in the foreign model where they are not those of Wan.
  """

  leaf: str
  torch: str
  params: str
  sizes: tuple[tuple[str, int], ...] = ()
  foreign: str = ''


class Entry(NamedTuple):
  """One tensor (or one for each layer, '*'): its Wan name, its foreign name, its layout.

  `foreign` is '' where the foreign model has no such tensor. With `parts` above 1 the foreign
  tensor is the one numbered `part` of that many equal pieces along the first axis of Wan's.
  """

  wan: str
  foreign: str
  layout: Layout
  part: int = 0
  parts: int = 1


_KERNEL = Layout('kernel', 'output input', 'input output')
_BIAS = Layout('bias', 'c', 'c')
_SCALE = Layout('weight', 'c', 'c')
_CONV2D = Layout('kernel', 'output input h w', 'h w input output')
_KINDS = {
  'linear': {'.weight': _KERNEL, '.bias': _BIAS},
  'matrix': {'.weight': _KERNEL},
  'norm': {'.weight': _SCALE, '.bias': _BIAS},
  'rms': {'.weight': _SCALE},
  'gamma_video': {'.gamma': Layout('gamma', 'c 1 1 1', 'c')},
  'gamma_image': {'.gamma': Layout('gamma', 'c 1 1', 'c')},
  'embedding': {'.weight': Layout('embedding', 'n d', 'n d')},
  'modulation': {'': Layout('modulation', '1 n d', '1 n d')},
  'emb_pos': {'': Layout('emb_pos', '1 n d', '1 n d')},
  'conv2d': {'.weight': _CONV2D, '.bias': _BIAS},
  'conv2d_matrix': {'.weight': _CONV2D},
  'class_token': {'': Layout('cls_embedding', '1 1 d', '1 1 d', foreign='d')},
  'positions': {'': Layout('pos_embedding', '1 n d', '1 n d', foreign='n d')},
  'projection': {'': Layout('head', 'input output', 'input output')},
  'conv3d': {
    '.weight': Layout('kernel', 'output input t h w', 't h w input output'),
    '.bias': _BIAS,
  },
  'patch': {
    '.weight': Layout('kernel', 'd c t h w', '(c t h w) d', (('t', 1), ('h', 2), ('w', 2))),
    '.bias': _BIAS,
  },
}

_DIT = (
  ('patch_embedding', 'patch_embedding', 'patch'),
  ('text_embedding.0', 'condition_embedder.text_embedder.linear_1', 'linear'),
  ('text_embedding.2', 'condition_embedder.text_embedder.linear_2', 'linear'),
  ('time_embedding.0', 'condition_embedder.time_embedder.linear_1', 'linear'),
  ('time_embedding.2', 'condition_embedder.time_embedder.linear_2', 'linear'),
  ('time_projection.1', 'condition_embedder.time_proj', 'linear'),
  ('blocks.*.modulation', 'blocks.*.scale_shift_table', 'modulation'),
  *(
    (f'blocks.*.{wan}_attn.{name}', f'blocks.*.{foreign}.{to}', kind)
    for wan, foreign in (('self', 'attn1'), ('cross', 'attn2'))
    for name, to, kind in (
      ('q', 'to_q', 'linear'),
      ('k', 'to_k', 'linear'),
      ('v', 'to_v', 'linear'),
      ('o', 'to_out.0', 'linear'),
      ('norm_q', 'norm_q', 'rms'),
      ('norm_k', 'norm_k', 'rms'),
    )
  ),
  ('blocks.*.cross_attn.k_img', 'blocks.*.attn2.add_k_proj', 'linear'),
  ('blocks.*.cross_attn.v_img', 'blocks.*.attn2.add_v_proj', 'linear'),
  ('blocks.*.cross_attn.norm_k_img', 'blocks.*.attn2.norm_added_k', 'rms'),
  ('blocks.*.norm3', 'blocks.*.norm2', 'norm'),
  ('blocks.*.ffn.0', 'blocks.*.ffn.net.0.proj', 'linear'),
  ('blocks.*.ffn.2', 'blocks.*.ffn.net.2', 'linear'),
  ('head.modulation', 'scale_shift_table', 'modulation'),
  ('head.head', 'proj_out', 'linear'),
  ('img_emb.emb_pos', 'condition_embedder.image_embedder.pos_embed', 'emb_pos'),
  ('img_emb.proj.0', 'condition_embedder.image_embedder.norm1', 'norm'),
  ('img_emb.proj.1', 'condition_embedder.image_embedder.ff.net.0.proj', 'linear'),
  ('img_emb.proj.3', 'condition_embedder.image_embedder.ff.net.2', 'linear'),
  ('img_emb.proj.4', 'condition_embedder.image_embedder.norm2', 'norm'),
)

_UMT5 = (
  ('token_embedding', 'shared', 'embedding'),
  *(
    (f'blocks.*.{wan}', f'encoder.block.*.layer.{foreign}', kind)
    for wan, foreign, kind in (
      ('norm1', '0.layer_norm', 'rms'),
      ('attn.q', '0.SelfAttention.q', 'matrix'),
      ('attn.k', '0.SelfAttention.k', 'matrix'),
      ('attn.v', '0.SelfAttention.v', 'matrix'),
      ('attn.o', '0.SelfAttention.o', 'matrix'),
      ('pos_embedding.embedding', '0.SelfAttention.relative_attention_bias', 'embedding'),
      ('norm2', '1.layer_norm', 'rms'),
      ('ffn.gate.0', '1.DenseReluDense.wi_0', 'matrix'),
      ('ffn.fc1', '1.DenseReluDense.wi_1', 'matrix'),
      ('ffn.fc2', '1.DenseReluDense.wo', 'matrix'),
    )
  ),
  ('norm', 'encoder.final_layer_norm', 'rms'),
)


def _residual(wan: str, foreign: str) -> Iterator[tuple[str, str, str]]:
  yield f'{wan}.residual.0', f'{foreign}.norm1', 'gamma_video'
  yield f'{wan}.residual.2', f'{foreign}.conv1', 'conv3d'
  yield f'{wan}.residual.3', f'{foreign}.norm2', 'gamma_video'
  yield f'{wan}.residual.6', f'{foreign}.conv2', 'conv3d'
  yield f'{wan}.shortcut', f'{foreign}.conv_shortcut', 'conv3d'


def _resample(wan: str, foreign: str) -> Iterator[tuple[str, str, str]]:
  yield f'{wan}.resample.1', f'{foreign}.resample.1', 'conv2d'
  yield f'{wan}.time_conv', f'{foreign}.time_conv', 'conv3d'


def _coder(name: str) -> Iterator[tuple[str, str, str]]:
  yield f'{name}.conv1', f'{name}.conv_in', 'conv3d'
  yield from _residual(f'{name}.middle.0', f'{name}.mid_block.resnets.0')
  yield f'{name}.middle.1.norm', f'{name}.mid_block.attentions.0.norm', 'gamma_image'
  yield f'{name}.middle.1.to_qkv', f'{name}.mid_block.attentions.0.to_qkv', 'conv2d'
  yield f'{name}.middle.1.proj', f'{name}.mid_block.attentions.0.proj', 'conv2d'
  yield from _residual(f'{name}.middle.2', f'{name}.mid_block.resnets.1')
  yield f'{name}.head.0', f'{name}.norm_out', 'gamma_video'
  yield f'{name}.head.2', f'{name}.conv_out', 'conv3d'


_VAE = (
  *_coder('encoder'),
  *_residual('encoder.downsamples.*', 'encoder.down_blocks.*'),
  *_resample('encoder.downsamples.*', 'encoder.down_blocks.*'),
  ('conv1', 'quant_conv', 'conv3d'),
  ('conv2', 'post_quant_conv', 'conv3d'),
  *_coder('decoder'),
  *_residual('decoder.upsamples.*', 'decoder.up_blocks.*'),
  *_resample('decoder.upsamples.*', 'decoder.up_blocks.*'),
)
# The vision tower; Wan's names stand behind 'visual.', those of transformers behind 'vision_model.'.
_CLIP = (
  ('cls_embedding', 'embeddings.class_embedding', 'class_token'),
  ('pos_embedding', 'embeddings.position_embedding.weight', 'positions'),
  ('patch_embedding', 'embeddings.patch_embedding', 'conv2d_matrix'),
  ('pre_norm', 'pre_layrnorm', 'norm'),
  *(
    (f'transformer.*.{wan}', ' '.join(f'encoder.layers.*.{name}' for name in foreign), kind)
    for wan, foreign, kind in (
      ('norm1', ('layer_norm1',), 'norm'),
      ('attn.to_qkv', ('self_attn.q_proj', 'self_attn.k_proj', 'self_attn.v_proj'), 'linear'),
      ('attn.proj', ('self_attn.out_proj',), 'linear'),
      ('norm2', ('layer_norm2',), 'norm'),
      ('mlp.0', ('mlp.fc1',), 'linear'),
      ('mlp.2', ('mlp.fc2',), 'linear'),
    )
  ),
  ('post_norm', 'post_layernorm', 'norm'),
  ('head', '', 'projection'),
)
CLIP_LAYERS = 32

_TABLES = {'dit': _DIT, 'vae': _VAE, 'umt5': _UMT5, 'clip': _CLIP}
NETWORKS = tuple(_TABLES)
FOREIGN = {'dit': 'diffusers', 'vae': 'diffusers', 'umt5': 'transformers', 'clip': 'transformers'}


def entries(network: str) -> list[Entry]:
  """Every tensor that a checkpoint of `network` may hold, one entry for all layers."""
  if network not in _TABLES:
    raise InputError(f'unknown network {network!r}; choose one of {", ".join(_TABLES)}.')
  found = []
  for wan, foreign, kind in _TABLES[network]:
    pieces = foreign.split() or ['']
    for leaf, layout in _KINDS[kind].items():
      found += [
        Entry(wan + leaf, piece and piece + leaf, layout, part, len(pieces))
        for part, piece in enumerate(pieces)
      ]
  return found


def clip_names() -> list[str]:
  """Wan's names of the whole vision tower, without 'visual.'."""
  rows = dict.fromkeys(entry.wan for entry in entries('clip'))
  layers = range(CLIP_LAYERS)
  return [row.replace('*', str(n)) for row in rows for n in (layers if '*' in row else (0,))]


@functools.cache
def layouts(network: str) -> dict[str, Layout]:
  return {entry.wan: entry.layout for entry in entries(network)}


def counted_through(keys: Iterable[str]) -> dict[str, str]:
  """Maps each key to itself without diffusers' stages, e.g. '.0.upsamplers.0.' to '.3.'."""
  stage = re.compile(r'decoder\.up_blocks\.(\d+)\.(?:resnets\.(\d+)|upsamplers\.0)\.(.*)')
  found = {key: stage.fullmatch(key) for key in keys}
  blocks = max((int(m[2]) + 1 for m in found.values() if m and m[2]), default=0)
  return {
    key: f'decoder.up_blocks.{int(m[1]) * (blocks + 1) + int(m[2] or blocks)}.{m[3]}' if m else key
    for key, m in found.items()
  }


def counted_in_stages(keys: Iterable[str]) -> dict[str, str]:
  """The inverse of `counted_through`; a stage ends with the layer that resamples."""
  keys = list(keys)
  layer = re.compile(r'decoder\.up_blocks\.(\d+)\.(.*)')
  found = {key: layer.fullmatch(key) for key in keys}
  ends = [int(m[1]) for m in found.values() if m and m[2].startswith('resample.')]
  blocks = min(ends, default=len(keys))

  def staged(index: int, rest: str) -> str:
    stage, place = divmod(index, blocks + 1)
    part = 'upsamplers.0' if place == blocks else f'resnets.{place}'
    return f'decoder.up_blocks.{stage}.{part}.{rest}'

  return {key: staged(int(m[1]), m[2]) if m else key for key, m in found.items()}


def find(table: Mapping[str, Any], key: str) -> tuple[str, str]:
  """The table's name for `key` ('' if it has none) and the index its '*' stands for."""
  if key in table:
    return key, ''
  index = re.search(r'\.(\d+)\.', key)
  name = f'{key[: index.start(1)]}*{key[index.end(1) :]}' if index else ''
  return (name, index[1]) if name in table else ('', '')
