"""Checkpoints of tiny random networks, shared by the tests of conversions."""

import functools

import numpy as np

from salt_jax import conversion, convert, tensor_files
from salt_jax.conversion import Request
from salt_jax.models import text, vae, wan
from salt_jax.sources import open_source
from salt_jax.tensor_files import held
from tests import tiny

TEXT = text.TextConfig(vocab=48, dim=16, dim_attn=24, heads=4, ffn_dim=40, layers=2)
CLIP = dict(
  hidden_size=12,
  intermediate_size=20,
  num_hidden_layers=2,
  num_attention_heads=2,
  image_size=28,
  patch_size=14,
)
PT = {'format': 'pt'}


def clip_shapes() -> dict[str, tuple[int, ...]]:
  """Wan's shapes of the tower that `CLIP` describes, by the table of wan.md 2.4."""
  d, f = 12, 20
  shapes = {'cls_embedding': (1, 1, d), 'pos_embedding': (1, 5, d), 'head': (d, 7)}
  shapes['patch_embedding.weight'] = (d, 3, 14, 14)
  layer = {'norm1': (d,), 'norm2': (d,), 'attn.to_qkv': (3 * d, d), 'attn.proj': (d, d)}
  layer |= {'mlp.0': (f, d), 'mlp.2': (d, f)}
  rows = {'pre_norm': (d,), 'post_norm': (d,)}
  rows |= {f'transformer.{n}.{name}': shape for n in range(2) for name, shape in layer.items()}
  for name, shape in rows.items():
    shapes |= {f'{name}.weight': shape, f'{name}.bias': shape[:1]}
  return shapes


SHAPES = {
  'dit': lambda: convert.wan_shapes(wan.param_shapes(tiny.WAN), 'dit'),
  'dit_i2v': lambda: convert.wan_shapes(wan.param_shapes(tiny.I2V), 'dit'),
  'dit_flf2v': lambda: convert.wan_shapes(wan.param_shapes(tiny.FLF2V), 'dit'),
  'vae': lambda: convert.wan_shapes(vae.param_shapes(vae.nano_vae()), 'vae'),
  'umt5': lambda: convert.wan_shapes(text.param_shapes(TEXT), 'umt5'),
  'clip': clip_shapes,
}


def wanted(model: str):
  return SHAPES[model]()


@functools.cache
def arrays(model: str, dtype=np.float32) -> dict[str, np.ndarray]:
  """Random tensors under Wan's names, different everywhere."""
  rng = np.random.default_rng(0)
  return {k: rng.standard_normal(s, np.float32).astype(dtype) for k, s in wanted(model).items()}


def lazily(tensors):
  return {key: held(array) for key, array in tensors.items()}


def write(path, tensors) -> str:
  tensor_files.write(str(path), lazily(tensors), PT)
  return str(path)


def run(path, model='dit', entry='', updates=lambda found: {}, **request):
  """Plans the conversion of a file of one of the models above."""
  network = model.partition('_')[0]
  source = open_source(str(path), entry, network)
  return conversion.convert_source(source, wanted(model), Request(network, **request), updates)


def values(done) -> dict[str, np.ndarray]:
  return {key: tensor.read() for key, tensor in done.tensors.items()}


def assert_same(got, want):
  assert got.keys() == want.keys()
  for key in want:
    np.testing.assert_array_equal(got[key], want[key], err_msg=key)


def sentence(error) -> str:
  message = str(error.value)
  assert message.endswith(('.', '?')) and '\n' not in message and '. ' not in message, message
  return message
