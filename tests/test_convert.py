"""Names and layouts against the networks of diffusers and transformers, and files good and bad."""

import functools
import math

import einops
import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from transformers import UMT5Config, UMT5EncoderModel

from salt_jax import convert, wan_names
from salt_jax.errors import InputError
from salt_jax.models import text, vae, wan
from tests import tiny

TINY_DIT = dict(
  num_attention_heads=2,
  attention_head_dim=12,
  in_channels=16,
  out_channels=16,
  text_dim=32,
  freq_dim=256,
  ffn_dim=32,
  num_layers=2,
)
IMAGE = dict(in_channels=36, image_dim=16, added_kv_proj_dim=24)
TINY_UMT5 = dict(vocab_size=128, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
FULL_DIT = dict(
  text_dim=4096, freq_dim=256, in_channels=16, out_channels=16, attention_head_dim=128
)
WAN_1_3B = FULL_DIT | dict(num_attention_heads=12, ffn_dim=8960, num_layers=30)
WAN_14B = FULL_DIT | dict(num_attention_heads=40, ffn_dim=13824, num_layers=40)
WAN_I2V = WAN_14B | dict(in_channels=36, image_dim=1280, added_kv_proj_dim=5120)

MODELS = {
  't2v': ('dit', lambda: WanTransformer3DModel(**TINY_DIT)),
  'i2v': ('dit', lambda: WanTransformer3DModel(**TINY_DIT | IMAGE)),
  'flf2v': ('dit', lambda: WanTransformer3DModel(**TINY_DIT | IMAGE, pos_embed_seq_len=514)),
  'vae': ('vae', lambda: AutoencoderKLWan(base_dim=4)),
  'vae_small': ('vae', lambda: AutoencoderKLWan(base_dim=4, num_res_blocks=1)),
  'umt5': ('umt5', lambda: UMT5EncoderModel(UMT5Config(**TINY_UMT5))),
}


@functools.cache
def weights(name: str) -> dict[str, np.ndarray]:
  """Random tensors, different everywhere, in the foreign naming."""
  torch.manual_seed(0)
  shapes = {key: tuple(x.shape) for key, x in MODELS[name][1]().state_dict().items()}
  rng = np.random.default_rng(0)
  return {key: rng.standard_normal(shape, np.float32) for key, shape in shapes.items()}


@functools.cache
def wan_weights(name: str) -> dict[str, np.ndarray]:
  network = MODELS[name][0]
  return convert.rename(weights(name), network, wan_names.FOREIGN[network])


def shapes_on_meta(make, network: str) -> dict[str, tuple[int, ...]]:
  """Wan's names and torch shapes of a full-size foreign model, nothing allocated."""
  with torch.device('meta'):
    state = make().state_dict()
  empty = {key: np.broadcast_to(np.float32(0), tuple(x.shape)) for key, x in state.items()}
  renamed = convert.rename(empty, network, wan_names.FOREIGN[network])
  return {key: x.shape for key, x in renamed.items()}


def vae_shapes(cfg: vae.VAEConfig):
  return jax.eval_shape(functools.partial(vae.init_params, cfg=cfg), jax.random.key(0))


def leaf(params, path: str):
  for name in path.split('/'):
    params = params[name]
  return params


def one_sentence(message: str):
  assert message.endswith(('.', '?')) and '\n' not in message and '. ' not in message, message


@pytest.mark.parametrize('name', MODELS)
def test_every_foreign_key_becomes_one_wan_key(name):
  foreign = weights(name).keys() - {'encoder.embed_tokens.weight'}
  assert len(wan_weights(name)) == len(foreign)
  assert {id(x) for x in wan_weights(name).values()} <= {id(x) for x in weights(name).values()}


@pytest.mark.parametrize('network', ['dit', 'vae', 'umt5'])
def test_every_row_of_the_table_is_used_and_none_twice(network):
  rows = wan_names.entries(network)
  assert len({row.wan for row in rows}) == len({row.foreign for row in rows}) == len(rows)
  seen = {
    wan_names.find(wan_names.layouts(network), key)[0]
    for name, (owner, _) in MODELS.items()
    if owner == network
    for key in wan_weights(name)
  }
  # The middle keeps its width, so its residual blocks never need a shortcut.
  absent = {
    'vae': {
      f'{coder}.middle.{k}.shortcut.{leaf}'
      for leaf in ('weight', 'bias')
      for coder in ('encoder', 'decoder')
      for k in (0, 2)
    }
  }
  assert {row.wan for row in rows} - seen == absent.get(network, set())


@pytest.mark.parametrize(
  'name, foreign, layer',
  [
    ('vae', '0.resnets.2', 2),
    ('vae', '0.upsamplers.0', 3),
    ('vae', '1.resnets.0', 4),
    ('vae', '2.upsamplers.0', 11),
    ('vae', '3.resnets.2', 14),
    ('vae_small', '0.upsamplers.0', 2),
    ('vae_small', '1.resnets.1', 4),
    ('vae_small', '1.upsamplers.0', 5),
    ('vae_small', '3.resnets.1', 10),
  ],
)
def test_stages_of_the_decoder_are_counted_through(name, foreign, layer):
  theirs = {
    id(x) for key, x in weights(name).items() if key.startswith(f'decoder.up_blocks.{foreign}.')
  }
  assert (
    theirs
    == {
      id(x) for key, x in wan_weights(name).items() if key.startswith(f'decoder.upsamples.{layer}.')
    }
    != set()
  )


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('dtype', [np.float32, ml_dtypes.bfloat16])
def test_round_trip_is_exact(name, dtype):
  network, tensors = MODELS[name][0], {k: x.astype(dtype) for k, x in wan_weights(name).items()}
  params = convert.from_wan(tensors, network)
  back = convert.to_wan(params, network)
  assert back.keys() == tensors.keys()
  for key in tensors:
    assert back[key].dtype == dtype and np.array_equal(back[key], tensors[key]), key
  again = convert.from_wan(back, network)
  assert jax.tree.all(jax.tree.map(np.array_equal, params, again))


@pytest.mark.parametrize('cfg', [tiny.WAN, tiny.I2V, tiny.FLF2V, tiny.FRAMES_ALONE])
def test_parameters_of_every_form_of_the_dit_survive_a_file(cfg, tmp_path):
  params = tiny.params(0, cfg)
  convert.save_params(tmp_path / 'dit.safetensors', params, 'dit')
  back = convert.load_params(tmp_path / 'dit.safetensors', 'dit', params)
  assert jax.tree.all(jax.tree.map(np.array_equal, params, back))


def test_paths_follow_the_naming_rule():
  coder = convert.from_wan(wan_weights('vae'), 'vae')
  dit = convert.from_wan(wan_weights('i2v'), 'dit')
  umt5 = convert.from_wan(wan_weights('umt5'), 'umt5')
  assert leaf(coder, 'decoder/upsamples_3/resample_1/kernel').shape == (3, 3, 16, 8)
  assert leaf(coder, 'decoder/upsamples_3/time_conv/kernel').shape == (3, 1, 1, 16, 32)
  assert leaf(coder, 'encoder/downsamples_0/residual_0/gamma').shape == (4,)
  assert leaf(coder, 'encoder/middle_1/norm/gamma').shape == (16,)
  assert leaf(dit, 'blocks/ffn_0/kernel').shape == (2, 24, 32)
  assert leaf(dit, 'blocks/modulation').shape == (2, 1, 6, 24)
  assert leaf(dit, 'blocks/cross_attn/norm_k_img/weight').shape == (2, 24)
  assert leaf(dit, 'patch_embedding/kernel').shape == (36 * 4, 24)
  assert leaf(umt5, 'blocks/ffn/gate_0/kernel').shape == (2, 32, 64)
  assert leaf(umt5, 'blocks/pos_embedding/embedding/embedding').shape == (2, 32, 4)
  assert leaf(umt5, 'token_embedding/embedding').shape == (128, 32)


def test_layers_are_stacked_by_number_not_by_order():
  shuffled = dict(reversed(wan_weights('t2v').items()))
  params = convert.from_wan(shuffled, 'dit')
  for i in range(2):
    np.testing.assert_array_equal(
      leaf(params, 'blocks/ffn_2/kernel')[i], wan_weights('t2v')[f'blocks.{i}.ffn.2.weight'].T
    )


def test_kernels_compute_what_torch_computes():
  """Linear, patch, 2-D and 3-D convolution, each against torch; float32 sums of < 1000 terms."""
  rng = np.random.default_rng(1)
  dit, coder = (convert.from_wan(wan_weights(n), n2) for n, n2 in (('t2v', 'dit'), ('vae', 'vae')))
  x = rng.standard_normal((1, 16, 1, 4, 6), np.float32)
  want = torch.conv3d(
    *map(torch.tensor, (x, wan_weights('t2v')['patch_embedding.weight'])), stride=(1, 2, 2)
  ).numpy()
  patches = einops.rearrange(x, 'b c f (h ph) (w pw) -> b f h w (c ph pw)', ph=2, pw=2)
  got = einops.rearrange(patches @ dit['patch_embedding']['kernel'], 'b f h w d -> b d f h w')
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)

  key, path = 'decoder.upsamples.3.resample.1', 'decoder/upsamples_3/resample_1'
  x = rng.standard_normal((1, 16, 5, 6), np.float32)
  want = torch.conv2d(torch.tensor(x), torch.tensor(wan_weights('vae')[f'{key}.weight'])).numpy()
  got = jax.lax.conv_general_dilated(
    x, leaf(coder, f'{path}/kernel'), (1, 1), 'VALID', dimension_numbers=('NCHW', 'HWIO', 'NCHW')
  )
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)

  x = rng.standard_normal((1, 16, 4, 5, 6), np.float32)
  want = torch.conv3d(*map(torch.tensor, (x, wan_weights('vae')['decoder.conv1.weight']))).numpy()
  got = jax.lax.conv_general_dilated(
    x,
    leaf(coder, 'decoder/conv1/kernel'),
    (1, 1, 1),
    'VALID',
    dimension_numbers=('NCDHW', 'DHWIO', 'NCDHW'),
  )
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)

  x = rng.standard_normal((3, 24), np.float32)
  want = x @ wan_weights('t2v')['blocks.1.ffn.0.weight'].T
  np.testing.assert_allclose(x @ dit['blocks']['ffn_0']['kernel'][1], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  'ours, theirs, tensors, count',
  [
    (wan.wan_1_3b, WAN_1_3B, 825, 1_418_996_800),
    (wan.wan_14b, WAN_14B, 1095, 14_288_491_584),
    (wan.wan_i2v_14b, WAN_I2V, 1303, 16_394_878_784),
    (wan.wan_flf2v_14b, WAN_I2V | dict(pos_embed_seq_len=514), 1304, 16_395_536_704),
  ],
)
def test_full_size_dit_has_the_published_names_and_shapes(ours, theirs, tensors, count):
  shapes = convert.wan_shapes(wan.param_shapes(ours()), 'dit')
  assert len(shapes) == tensors and sum(map(math.prod, shapes.values())) == count
  assert shapes == shapes_on_meta(lambda: WanTransformer3DModel(**theirs), 'dit')


def test_full_size_vae_has_the_published_names_and_shapes():
  shapes = convert.wan_shapes(vae_shapes(vae.wan_vae()), 'vae')
  assert len(shapes) == 194 and sum(map(math.prod, shapes.values())) == 126_892_531
  assert shapes == shapes_on_meta(AutoencoderKLWan, 'vae')


def test_nano_vae_has_the_names_and_shapes_of_a_small_oracle():
  cfg = vae.nano_vae()
  theirs = functools.partial(AutoencoderKLWan, base_dim=cfg.dim, num_res_blocks=cfg.num_res_blocks)
  assert convert.wan_shapes(vae_shapes(cfg), 'vae') == shapes_on_meta(theirs, 'vae')


def test_full_size_umt5_has_the_published_names_and_shapes():
  shapes = convert.wan_shapes(text.param_shapes(text.umt5_xxl()), 'umt5')
  assert len(shapes) == 242 and sum(map(math.prod, shapes.values())) == 5_680_910_336
  config = UMT5Config(
    vocab_size=256384, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64
  )
  assert shapes == shapes_on_meta(lambda: UMT5EncoderModel(config), 'umt5')


@pytest.mark.parametrize(
  'prefix', ['model.', 'model.diffusion_model.', 'model._fsdp_wrapped_module.', '_orig_mod.']
)
def test_prefixes_and_unused_heads_do_not_matter(prefix):
  inner = {
    k.replace('blocks.0.', 'blocks.0._checkpoint_wrapped_module.'): x
    for k, x in wan_weights('t2v').items()
  }
  wrapped = {prefix + k: x for k, x in inner.items()}
  head = {'model._cls_pred_branch.0.weight': np.ones(2)}
  renamed = convert.rename(wrapped | head, 'dit', 'wan')
  assert renamed.keys() == wan_weights('t2v').keys()
  convert.check(convert.from_wan(wrapped, 'dit'), convert.from_wan(wan_weights('t2v'), 'dit'))
  with pytest.raises(InputError, match='two weights are named'):
    convert.rename(wrapped | renamed, 'dit', 'wan')


def test_tied_embedding_may_stand_under_either_name():
  untied = {k: x for k, x in weights('umt5').items() if k != 'encoder.embed_tokens.weight'}
  only_copy = {k.replace('shared.', 'encoder.embed_tokens.'): x for k, x in untied.items()}
  for tensors in (untied, only_copy):
    renamed = convert.rename(tensors, 'umt5', 'transformers')
    assert renamed['token_embedding.weight'] is weights('umt5')['shared.weight']
    assert len(renamed) == 2 + 2 * 10


def changed(name, **changes):
  """The Wan tensors of `name` with some replaced (or, by None, removed); '__' stands for '.'."""
  tensors = wan_weights(name) | {key.replace('__', '.'): x for key, x in changes.items()}
  return {key: x for key, x in tensors.items() if x is not None}


@pytest.mark.parametrize(
  'name, changes, words',
  [
    ('t2v', {'blocks__0__attn1__to_q__weight': np.ones((2, 2))}, 'blocks.0.attn1.to_q.weight'),
    ('t2v', {'nonsense': np.ones(1)}, 'nonsense'),
    ('t2v', {'blocks__0__ffn__0__bias': None}, 'lack blocks.0.ffn.0.bias'),
    ('t2v', {'blocks__3__ffn__0__bias': np.ones(32)}, 'lack blocks.2.cross_attn.k.bias'),
    ('t2v', {'blocks__1__ffn__0__bias': np.ones(31)}, 'blocks.ffn_0.bias differs in shape'),
    ('t2v', {'head__head__weight': np.ones(4)}, 'head.head.weight has shape (4,)'),
    ('t2v', {'patch_embedding__weight': np.ones((24, 16, 2, 2, 2))}, 't = 1, h = 2, w = 2'),
    ('vae', {'encoder__head__0__gamma': np.ones((16, 1, 2, 1))}, 'encoder.head.0.gamma'),
  ],
)
def test_surprises_are_named(name, changes, words):
  with pytest.raises(InputError) as error:
    convert.from_wan(changed(name, **changes), MODELS[name][0])
  assert words in str(error.value)
  one_sentence(str(error.value))


def test_wrong_naming_or_network_is_refused():
  with pytest.raises(InputError, match='another naming'):
    convert.rename(weights('t2v'), 'dit', 'wan')
  with pytest.raises(InputError, match='another naming'):
    convert.rename(wan_weights('t2v'), 'dit', 'diffusers')
  with pytest.raises(InputError, match="not 'transformers'"):
    convert.rename(weights('t2v'), 'dit', 'transformers')
  with pytest.raises(InputError, match='unknown network'):
    convert.from_wan({}, 'audio')
  with pytest.raises(InputError, match='blocks.ffn_0.gamma'):
    convert.to_wan({'blocks': {'ffn_0': {'gamma': np.ones((2, 3))}}}, 'dit')
  with pytest.raises(InputError, match='norm3.kernel'):
    convert.to_wan({'blocks': {'norm3': {'kernel': np.ones((2, 3))}}}, 'dit')


def test_check_names_what_is_missing_unused_or_of_another_size():
  params = convert.from_wan(wan_weights('t2v'), 'dit')
  like = jax.eval_shape(lambda: params)
  convert.check(params, like)
  with pytest.raises(InputError, match='lacks head.head.bias, head.head.kernel, head.modulation'):
    convert.check({k: x for k, x in params.items() if k != 'head'}, like)
  with pytest.raises(InputError, match='unused new.kernel'):
    convert.check(params | {'new': {'kernel': np.ones(2)}}, like)
  wider = like | {'text_embedding_0': {'kernel': np.ones((64, 24)), 'bias': np.ones(24)}}
  with pytest.raises(InputError) as error:
    convert.check(params, wider)
  assert str(error.value) == (
    'a checkpoint of another size: text_embedding_0.kernel is (32, 24) '
    'but the config asks for (64, 24).'
  )
