"""Names of every network at full size, and round trips byte for byte through each naming."""

import ml_dtypes
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from salt_jax import conversion, convert, names, tensor_files, wan_names
from salt_jax.conversion import Request
from salt_jax.errors import InputError
from salt_jax.models import wan
from salt_jax.sources import open_source
from salt_jax.tensor_files import held
from tests import test_convert
from tests.checkpoints import (
  CLIP,
  PT,
  SHAPES,
  arrays,
  assert_same,
  clip_shapes,
  lazily,
  run,
  values,
  write,
)

# Names.


def on_meta(make) -> dict[str, tuple[int, ...]]:
  with torch.device('meta'):
    return {key: tuple(x.shape) for key, x in make().state_dict().items()}


def dit_on_meta(**sizes):
  return on_meta(lambda: WanTransformer3DModel(**sizes))


def umt5_on_meta():
  sizes = dict(vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64)
  state = on_meta(lambda: UMT5EncoderModel(UMT5Config(**sizes)))
  return {key: shape for key, shape in state.items() if key != 'encoder.embed_tokens.weight'}


def clip_on_meta():
  sizes = dict(
    hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=16
  )
  state = on_meta(lambda: CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=224, patch_size=14)))
  return {
    f'vision_model.{key.removeprefix("vision_model.")}': shape for key, shape in state.items()
  }


@pytest.mark.parametrize(
  'network, size, count, theirs',
  [
    ('dit', '1.3b', 825, lambda: dit_on_meta(**test_convert.WAN_1_3B)),
    ('dit', '14b', 1095, lambda: dit_on_meta(**test_convert.WAN_14B)),
    ('dit', 'i2v_14b', 1303, lambda: dit_on_meta(**test_convert.WAN_I2V)),
    ('dit', 'flf2v_14b', 1304, lambda: dit_on_meta(**test_convert.WAN_I2V, pos_embed_seq_len=514)),
    ('vae', 'wan', 194, lambda: on_meta(AutoencoderKLWan)),
    ('umt5', 'xxl', 242, umt5_on_meta),
  ],
)
def test_full_size_names_are_a_bijection_both_ways(network, size, count, theirs):
  shapes = conversion.expected(network, size)
  empty = {k: held(np.broadcast_to(np.float32(0), shape)) for k, shape in shapes.items()}
  assert len(shapes) == count
  for naming in ('wan', 'diffusers') + ('comfyui',) * (network == 'dit'):
    out, went = names.from_wan_names(empty, network, naming)
    assert len(out) == count and sorted(sum(went.values(), [])) == sorted(out)
    if naming == 'diffusers':
      assert {key: tensor.shape for key, tensor in out.items()} == theirs()
    source = names.detect(out, network)
    assert source == ('wan' if naming != 'diffusers' else wan_names.FOREIGN[network])
    found = names.match(out, network, source)
    assert not found.unused and not found.unknown
    back = names.to_wan_names(out, found, source)
    assert {key: tensor.shape for key, tensor in back.items()} == shapes


def test_full_size_clip_names_are_those_of_transformers():
  """392 tensors, of which `head` has no place there and 64 are there in thirds."""
  found = conversion.expected('clip', '')
  assert len(found) == 392
  layer = {k: v for k, v in clip_shapes().items() if k.startswith('transformer.1.')}
  assert {k.replace('transformer.1.', 'transformer.31.') for k in layer} <= found.keys()
  small = {key: clip_shapes()[_first_layer(key)] for key in found}
  empty = {key: held(np.broadcast_to(np.float32(0), shape)) for key, shape in small.items()}
  out, went = names.from_wan_names(empty, 'clip', 'diffusers')
  theirs = clip_on_meta()
  assert out.keys() == theirs.keys() and len(out) == 391 + 2 * 64
  assert [key for key, new in went.items() if not new] == ['head']
  assert all(len(t.shape) == len(theirs[key]) for key, t in out.items())


def _first_layer(key: str) -> str:
  parts = key.split('.')
  return '.'.join([parts[0], '0', *parts[2:]]) if parts[0] == 'transformer' else key


def test_comfyui_names_are_wans_behind_one_prefix():
  out, _ = names.from_wan_names(lazily(arrays('dit')), 'dit', 'comfyui')
  assert out.keys() == {f'model.diffusion_model.{key}' for key in arrays('dit')}


@pytest.mark.parametrize('network, naming', [('vae', 'comfyui'), ('dit', 'hf')])
def test_a_naming_that_a_network_lacks_is_refused(network, naming):
  with pytest.raises(InputError, match='choose wan'):
    names.from_wan_names({}, network, naming)


def test_clip_is_joined_and_split_by_rows(tmp_path):
  """Against a tower of transformers, which also loads what we write."""
  torch.manual_seed(0)
  theirs = CLIPVisionModel(CLIPVisionConfig(**CLIP))
  state = {k.removeprefix('vision_model.'): x.numpy() for k, x in theirs.state_dict().items()}
  done = run(write(tmp_path / 'a.safetensors', state), 'clip')
  got = values(done)
  block, layer = 'visual.transformer.1.', 'encoder.layers.1.self_attn.'
  thirds = [state[f'{layer}{name}_proj.weight'] for name in 'qkv']
  np.testing.assert_array_equal(got[block + 'attn.to_qkv.weight'], np.concatenate(thirds))
  np.testing.assert_array_equal(
    got['visual.cls_embedding'][0, 0], state['embeddings.class_embedding']
  )
  assert {k.removeprefix('visual.'): x.shape for k, x in got.items()} == {
    k: s for k, s in clip_shapes().items() if k != 'head'
  }
  folder = tmp_path / 'hf'
  theirs.save_pretrained(folder)
  for file in folder.glob('*.safetensors'):
    file.unlink()
  first = write(tmp_path / 'b.safetensors', got)
  again = run(first, 'clip', naming='diffusers')
  tensor_files.write(str(folder / 'model.safetensors'), again.tensors, PT)
  loaded, info = CLIPVisionModel.from_pretrained(folder, output_loading_info=True)
  assert not info['missing_keys'] and not info['unexpected_keys']
  for key, x in loaded.state_dict().items():
    np.testing.assert_array_equal(x.numpy(), state[key.removeprefix('vision_model.')])


# Round trips.


@pytest.mark.parametrize(
  'model, naming',
  [(model, naming) for model in SHAPES for naming in ('wan', 'diffusers')]
  + [(model, 'comfyui') for model in SHAPES if model.startswith('dit')],
)
@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16])
def test_out_and_in_again_gives_the_same_bytes(tmp_path, model, naming, dtype):
  tensors = {k: x for k, x in arrays(model, dtype).items() if k != 'head'}
  prefix = 'visual.' if model == 'clip' else ''
  first = write(tmp_path / 'a.safetensors', {prefix + k: x for k, x in tensors.items()})
  there, back = str(tmp_path / 'b.safetensors'), str(tmp_path / 'c.safetensors')
  tensor_files.write(there, run(first, model, naming=naming).tensors, PT)
  tensor_files.write(back, run(there, model).tensors, PT)
  first, there, back = (open(path, 'rb').read() for path in (first, there, back))
  assert back == first
  assert (there == first) == (naming == 'wan')


def test_diffusers_loads_what_is_written(tmp_path):
  model = WanTransformer3DModel(**test_convert.TINY_DIT)
  cfg = wan.WanConfig(dim=24, ffn_dim=32, heads=2, layers=2, text_dim=32)
  want = convert.wan_shapes(wan.param_shapes(cfg), 'dit')
  rng = np.random.default_rng(0)
  mine = {k: rng.standard_normal(s, np.float32) for k, s in want.items()}
  source = open_source(write(tmp_path / 'x.safetensors', mine))
  done = conversion.convert_source(source, want, Request('dit', naming='diffusers'))
  tensor_files.write(str(tmp_path / 'y.safetensors'), done.tensors, PT)
  model.load_state_dict(load_file(tmp_path / 'y.safetensors'), strict=True)
  np.testing.assert_array_equal(
    model.blocks[1].norm2.weight.detach().numpy(), mine['blocks.1.norm3.weight']
  )


def test_the_dtype_is_what_was_asked_for(tmp_path):
  first = write(tmp_path / 'a.safetensors', arrays('dit'))
  for dtype, want in convert.DTYPES.items():
    path = str(tmp_path / f'{dtype}.safetensors')
    tensor_files.write(path, run(first, dtype=dtype).tensors)
    got, _ = tensor_files.scan(path)
    assert_same(
      {k: t.read() for k, t in got.items()}, {k: x.astype(want) for k, x in arrays('dit').items()}
    )
    assert {t.dtype for t in got.values()} == {np.dtype(want)}
