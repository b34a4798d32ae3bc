"""CLIP's vision tower against transformers, its published names and counts, and the pictures it is given."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

from salt_jax import convert, images
from salt_jax.errors import InputError
from salt_jax.models import clip

TINY = clip.ClipConfig(size=42, patch=14, dim=24, mlp_dim=40, heads=3, layers=4, out_dim=10)
encode = jax.jit(clip.encode, static_argnums=2)


@functools.cache
def oracle() -> tuple[CLIPVisionModel, dict]:
  """transformers' tower with every parameter drawn anew, and the same for ours, by the names of wan.md 2.4."""
  config = CLIPVisionConfig(
    hidden_size=TINY.dim,
    intermediate_size=TINY.mlp_dim,
    num_hidden_layers=TINY.layers,
    num_attention_heads=TINY.heads,
    image_size=TINY.size,
    patch_size=TINY.patch,
    hidden_act='gelu',
    layer_norm_eps=1e-5,
  )
  model = CLIPVisionModel(config).eval()
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      around = 1.0 if 'norm' in name and name.endswith('weight') else 0.0
      parameter.copy_(around + 0.2 * torch.randn(parameter.shape, generator=generator))
  theirs = {name.removeprefix('vision_model.'): x.numpy() for name, x in model.state_dict().items()}
  return model, convert.from_wan(wan_names(theirs), 'clip')


def wan_names(theirs):
  ours = {
    'visual.cls_embedding': theirs['embeddings.class_embedding'][None, None],
    'visual.pos_embedding': theirs['embeddings.position_embedding.weight'][None],
    'visual.patch_embedding.weight': theirs['embeddings.patch_embedding.weight'],
    'visual.head': np.zeros((TINY.dim, TINY.out_dim), np.float32),
  }
  for leaf in ('weight', 'bias'):
    ours[f'visual.pre_norm.{leaf}'] = theirs[f'pre_layrnorm.{leaf}']
    ours[f'visual.post_norm.{leaf}'] = theirs[f'post_layernorm.{leaf}']
    for j in range(TINY.layers):
      layer, block = f'encoder.layers.{j}', f'visual.transformer.{j}'
      qkv = [theirs[f'{layer}.self_attn.{name}_proj.{leaf}'] for name in 'qkv']
      ours[f'{block}.attn.to_qkv.{leaf}'] = np.concatenate(qkv)
      for wan, other in (
        ('norm1', 'layer_norm1'),
        ('norm2', 'layer_norm2'),
        ('attn.proj', 'self_attn.out_proj'),
        ('mlp.0', 'mlp.fc1'),
        ('mlp.2', 'mlp.fc2'),
      ):
        ours[f'{block}.{wan}.{leaf}'] = theirs[f'{layer}.{other}.{leaf}']
  return ours


def pixels(batch=2):
  return np.random.default_rng(0).standard_normal((batch, TINY.size, TINY.size, 3), np.float32)


def test_rows_are_transformers_hidden_states_before_the_last_block():
  model, params = oracle()
  with torch.no_grad():
    given = torch.tensor(pixels()).permute(0, 3, 1, 2)
    want = model(given, output_hidden_states=True).hidden_states[-2].numpy()
  got = np.asarray(encode(params, pixels(), TINY))
  assert got.shape == (2, TINY.rows, TINY.dim) and got.dtype == np.float32
  # Float32 sums in another order; rows of order one.
  np.testing.assert_allclose(got, want, atol=2e-5, rtol=0)
  assert 0.3 < want.std() < 10


def test_the_last_block_the_last_norm_and_the_head_are_not_asked():
  _, params = oracle()
  spoilt = params | {
    'post_norm': jax.tree.map(lambda x: x * np.nan, params['post_norm']),
    'head': params['head'] * np.nan,
    'transformer': jax.tree.map(
      lambda x: np.concatenate([x[:-1], x[-1:] * np.nan]), params['transformer']
    ),
  }
  np.testing.assert_array_equal(encode(spoilt, pixels(), TINY), encode(params, pixels(), TINY))


def test_names_and_counts_are_those_of_the_published_file():
  """wan.md 2.4: 392 tensors of 632,076,800 parameters behind 'visual.'; nothing is allocated."""
  shapes = clip.param_shapes(clip.vit_h_14())
  named = convert.wan_shapes(shapes, 'clip')
  assert len(named) == 392
  assert sum(int(np.prod(shape)) for shape in named.values()) == 632_076_800
  for name, shape in {
    'cls_embedding': (1, 1, 1280),
    'pos_embedding': (1, 257, 1280),
    'patch_embedding.weight': (1280, 3, 14, 14),
    'pre_norm.bias': (1280,),
    'transformer.31.norm2.weight': (1280,),
    'transformer.0.attn.to_qkv.weight': (3840, 1280),
    'transformer.30.attn.to_qkv.bias': (3840,),
    'transformer.7.attn.proj.weight': (1280, 1280),
    'transformer.0.mlp.0.weight': (5120, 1280),
    'transformer.0.mlp.2.weight': (1280, 5120),
    'head': (1280, 1024),
  }.items():
    assert named[name] == shape, name
  assert clip.vit_h_14().rows == 257


def test_a_file_of_the_whole_clip_is_read_without_its_text_half(tmp_path):
  params = oracle()[1]
  tensors = {f'visual.{name}': x for name, x in convert.to_wan(params, 'clip').items()}
  tensors |= {'log_scale': np.zeros((), np.float32), 'textual.head.0.weight': np.zeros((2, 2))}
  path = tmp_path / 'clip.safetensors'
  convert.save_safetensors(path, tensors)
  loaded = convert.load_params(path, 'clip', clip.param_shapes(TINY))
  jax.tree.map(np.testing.assert_array_equal, loaded, params)


def test_sizes_that_do_not_fit_are_refused():
  for changes, words in (
    ({'heads': 5}, 'clip.dim 24 does not'),
    ({'size': 40}, 'clip.size 40 does'),
  ):
    with pytest.raises(InputError, match=words):
      clip.ClipConfig(**(TINY.__dict__ | changes))


@pytest.mark.parametrize('before', [(30, 47), (224, 224), (480, 832), (9, 300)])
@pytest.mark.parametrize('after', [(224, 224), (16, 33)])
def test_resizing_is_torch_s_without_antialiasing(before, after):
  given = np.random.default_rng(1).uniform(-1, 1, (2, *before, 3)).astype(np.float32)
  want = torch.nn.functional.interpolate(
    torch.tensor(given).permute(0, 3, 1, 2),
    size=after,
    mode='bicubic',
    align_corners=False,
    antialias=False,
  )
  got, on_device = images.bicubic(given, after), images.bicubic(jnp.asarray(given), after)
  assert isinstance(got, np.ndarray) and isinstance(on_device, jax.Array)
  # float32 sums of four taps of order one along each side, in another order.
  np.testing.assert_allclose(got, on_device, atol=2e-6, rtol=0)
  # Torch's taps are float32, whose places are off by 1e-7 of a few hundred pixels.
  np.testing.assert_allclose(got, want.permute(0, 2, 3, 1).numpy(), atol=2e-4, rtol=0)
  assert np.abs(got - jax.image.resize(given, got.shape, 'cubic')).max() > 0.01 or before == after


def test_pixels_are_squeezed_and_normalised():
  rng = np.random.default_rng(2)
  given = rng.uniform(-1, 1, (2, 20, 50, 3)).astype(np.float32)
  want = torch.nn.functional.interpolate(
    torch.tensor(given).permute(0, 3, 1, 2), size=(42, 42), mode='bicubic', align_corners=False
  )
  mean, std = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
  want = (want.permute(0, 2, 3, 1).numpy() * 0.5 + 0.5 - np.array(mean)) / np.array(std)
  np.testing.assert_allclose(images.clip_pixels(given, 42), want, atol=2e-4, rtol=0)
  black, white = (images.clip_pixels(np.full((1, 5, 5, 3), x, np.float32), 3) for x in (-1, 1))
  np.testing.assert_allclose(black[0, 0, 0], -np.array(mean) / std, atol=1e-5)
  np.testing.assert_allclose(white - black, np.broadcast_to(1 / np.array(std), (1, 3, 3, 3)), 1e-5)


@pytest.mark.parametrize(
  'picture, area, size',
  [
    ((480, 832), 480 * 832, (464, 832)),  # the square root falls below 480
    ((832, 480), 480 * 832, (832, 480)),
    ((720, 1280), 720 * 1280, (720, 1280)),
    ((100, 100), 480 * 832, (624, 624)),
    ((1000, 3000), 480 * 832, (352, 1088)),
  ],
)
def test_a_video_takes_the_shape_of_its_picture_as_the_original_computes_it(picture, area, size):
  assert images.video_size(*picture, area) == size
  assert all(side % 16 == 0 for side in size)
