"""Conversions: names of every network at full size, round trips byte for byte, LoRA, entries, reports."""

import functools
import json
import os

import ml_dtypes
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from safetensors.torch import load_file
from transformers import CLIPVisionConfig, CLIPVisionModel, UMT5Config, UMT5EncoderModel

from salt_jax import conversion, convert, lora, names, tensor_files, wan_names
from salt_jax.conversion import Request
from salt_jax.errors import InputError
from salt_jax.models import text, vae, wan
from salt_jax.sources import open_source
from salt_jax.tensor_files import Tensor, held
from tests import test_convert, tiny

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


# Torch files.

WRAPPED = {
  'bare': lambda k: k,
  'Self-Forcing': lambda k: 'model.' + k,
  'its EMA': lambda k: 'model._fsdp_wrapped_module.' + k,
  'FSDP': lambda k: '_fsdp_wrapped_module.' + k,
  'checkpointed': lambda k: '_checkpoint_wrapped_module.' + k,
  'nested': lambda k: (
    'model._fsdp_wrapped_module.'
    + k.replace('blocks.1.', 'blocks.1._fsdp_wrapped_module._checkpoint_wrapped_module.')
  ),
  'compiled': lambda k: '_orig_mod.' + k,
  'DDP': lambda k: 'module.model.' + k,
  'repackaged': lambda k: 'model.diffusion_model.' + k,
}


def torch_state(model='dit', wrap=lambda k: k, factor=1.0, dtype=torch.float32):
  return {wrap(k): (factor * torch.tensor(x)).to(dtype) for k, x in arrays(model).items()}


@pytest.mark.parametrize('prefix', WRAPPED)
@pytest.mark.parametrize('entry', ['generator', 'generator_ema', 'critic', 'model', ''])
def test_checkpoints_of_the_self_forcing_family(tmp_path, prefix, entry):
  state = torch_state(wrap=WRAPPED[prefix])
  path = tmp_path / 'model.pt'
  torch.save({entry: state, 'step': 3} if entry else state, path)
  done = run(path)
  assert_same(values(done), arrays('dit'))
  assert done.report['entry'] == entry and done.report['others'] == (['step'] if entry else [])


def test_the_entry_is_taken_that_was_named(tmp_path):
  path = tmp_path / 'model.pt'
  parts = {
    name: torch_state(factor=n)
    for n, name in enumerate(('critic', 'generator', 'generator_ema'), 1)
  }
  torch.save(parts | {'optimizer': {'state': {0: {'exp_avg': torch.ones(2)}}}}, path)
  for n, name in enumerate(parts, 1):
    assert_same(
      values(run(path, entry=name)), {k: np.float32(n) * x for k, x in arrays('dit').items()}
    )
  with pytest.raises(
    InputError, match='holds critic, generator, generator_ema; name one with --entry.'
  ):
    run(path)
  with pytest.raises(
    InputError, match='--entry=ema is not in .*; known are critic, generator,'
  ) as error:
    run(path, entry='ema')
  sentence(error)


def test_heads_of_a_gan_are_left_out_and_reported(tmp_path):
  path = tmp_path / 'model.pt'
  head = {'model._cls_pred_branch.0.weight': torch.ones(2), 'model._register_tokens': torch.ones(3)}
  torch.save({'critic': torch_state(wrap=WRAPPED['Self-Forcing']) | head}, path)
  done = run(path)
  assert_same(values(done), arrays('dit'))
  assert {row['key'] for row in done.report['unused']} == head.keys()


@pytest.mark.parametrize(
  'content, words',
  [
    ([torch.ones(2)], 'holds no dictionary of weights'),
    ({'step': 3}, 'holds no tensors; name one with --entry.'),
    ({'a': torch.ones(2)}, 'the dit network has no weights named a; is it a file of another model'),
  ],
)
def test_a_torch_file_without_a_network_is_refused(tmp_path, content, words):
  torch.save(content, tmp_path / 'x.pt')
  with pytest.raises(InputError, match=words) as error:
    run(tmp_path / 'x.pt')
  sentence(error)


# Shards.


def shard(folder, tensors, kinds=('safetensors', 'safetensors', 'pt')):
  """Writes tensors in as many shards as kinds, with an index; returns the index."""
  folder.mkdir(exist_ok=True)
  where = {}
  for n, kind in enumerate(kinds):
    part = dict(sorted(tensors.items())[n :: len(kinds)])
    name = f'model-{n + 1:05d}-of-{len(kinds):05d}.{kind}'
    where |= dict.fromkeys(part, name)
    if kind == 'pt':
      torch.save({k: torch.tensor(x) for k, x in part.items()}, folder / name)
    else:
      write(folder / name, part)
  index = folder / 'model.safetensors.index.json'
  index.write_text(json.dumps({'metadata': {}, 'weight_map': where}))
  return index


def test_shards_are_read_by_index_or_by_folder(tmp_path):
  index = shard(tmp_path / 'sharded', arrays('dit'))
  for path in (index, index.parent):
    done = run(path)
    assert_same(values(done), arrays('dit'))
    assert len(done.report['files']) == 3


def _edit(index, edit):
  content = json.loads(index.read_text())
  edit(content)
  index.write_text(json.dumps(content))


@pytest.mark.parametrize(
  'damage, words',
  [
    (
      lambda i: (i.parent / 'model-00002-of-00003.safetensors').unlink(),
      'names shards that are not there: model-00002',
    ),
    (lambda i: i.write_text('{"weight_map": '), 'is no index of a sharded checkpoint'),
    (lambda i: i.write_text('[1]'), 'is no index of a sharded checkpoint'),
    (
      lambda i: _edit(i, lambda c: c['weight_map'].update(a='../../etc/passwd')),
      'is no index of a sharded',
    ),
    (
      lambda i: _edit(i, lambda c: c['weight_map'].update(a='model-00001-of-00003.safetensors')),
      'lacks a, which',
    ),
    (lambda i: write(i.parent / 'model-00002-of-00003.safetensors', arrays('dit')), 'repeats '),
    (
      lambda i: (i.parent / 'other.index.json').write_text('{}'),
      'must hold one file of weights or one index, not',
    ),
  ],
)
def test_shards_that_do_not_fit_are_refused(tmp_path, damage, words):
  index = shard(tmp_path / 'sharded', arrays('dit'))
  damage(index)
  with pytest.raises(InputError, match=words) as error:
    run(index if 'must hold' not in words else index.parent)
  sentence(error)


def test_a_shard_is_compared_with_its_checksum(tmp_path):
  index = shard(tmp_path, arrays('dit'))
  name = str(tmp_path / 'model-00002-of-00003.safetensors')
  tensor_files.write_checksum(name, tensor_files.checksum(name))
  assert run(index).report['verified'] == [name]
  tensor_files.write_checksum(name, '0' * 64)
  with pytest.raises(InputError, match='is not the file that'):
    run(index)


# What is unused, missing, or of another size.


def test_unused_and_missing_weights_are_errors_unless_named(tmp_path):
  tensors = arrays('dit') | {
    'extra.a': np.ones(2),
    'extra.b': np.ones(3),
    'img_emb.emb_pos': np.ones((1, 2, 3)),
  }
  del tensors['head.head.bias']
  path = write(tmp_path / 'x.safetensors', tensors)
  with pytest.raises(conversion.Refused) as error:
    run(path)
  text = sentence(error)
  assert 'unused extra.a, extra.b, img_emb.emb_pos; missing head.head.bias; name them with ' in text
  assert '--allow_unused=PATTERN and --allow_missing=PATTERN' in text
  assert [row['wan'] for row in error.value.report['missing']] == ['head.head.bias']
  with pytest.raises(
    InputError, match='unused img_emb.emb_pos; name them with --allow_unused=PATTERN if'
  ):
    run(path, allow_unused=('extra.*',), allow_missing=('head.*',))
  done = run(path, allow_unused=('extra.*', 'img_emb.*'), allow_missing=('head.head.bias',))
  assert_same(values(done), {k: x for k, x in arrays('dit').items() if k != 'head.head.bias'})
  assert {row['key'] for row in done.report['unused']} == tensors.keys() - arrays('dit').keys()


def test_pieces_of_a_tensor_are_not_enough(tmp_path):
  out, _ = names.from_wan_names(lazily(arrays('clip')), 'clip', 'diffusers')
  del out['vision_model.encoder.layers.1.self_attn.k_proj.bias']
  tensor_files.write(str(tmp_path / 'x.safetensors'), out)
  with pytest.raises(InputError, match='pieces of transformer.1.attn.to_qkv.bias are not there'):
    run(tmp_path / 'x.safetensors', 'clip')


def test_another_size_is_named(tmp_path):
  path = write(tmp_path / 'x.safetensors', arrays('dit_i2v'))
  with pytest.raises(
    InputError, match=r'is of another size: patch_embedding.weight is .* and not'
  ) as error:
    run(path)
  sentence(error)
  nano = convert.wan_shapes(wan.param_shapes(wan.wan_nano()), 'dit')
  path = write(tmp_path / 'n.safetensors', {k: np.zeros(s, np.float32) for k, s in nano.items()})
  with pytest.raises(InputError, match=r'and \d+ more \(it is of --size=nano\)\.'):
    run(path)


def test_sizes_are_named(tmp_path):
  with pytest.raises(
    InputError, match='pass --size: one of 1.3b, 14b, i2v_14b, flf2v_14b, nano, nano_i2v.'
  ):
    conversion.expected('dit', '')
  with pytest.raises(InputError, match='--size=7b is not a size of dit; choose'):
    conversion.expected('dit', '7b')


# LoRA.

RANK = 3
TARGETS = {
  'blocks.0.self_attn.q': (48, 48),
  'blocks.2.cross_attn.o': (48, 48),
  'blocks.1.ffn.0': (80, 48),
}
FOREIGN_TARGETS = ('blocks.0.attn1.to_q', 'blocks.2.attn2.to_out.0', 'blocks.1.ffn.net.0.proj')


def pairs(seed=5):
  rng = np.random.default_rng(seed)
  return {
    name: (rng.standard_normal((RANK, n), np.float32), rng.standard_normal((m, RANK), np.float32))
    for name, (m, n) in TARGETS.items()
  }


def named(down: str, up: str, prefix: str = '', alpha=None, modules=tuple(TARGETS), flat=False):
  out = {}
  for module, (a, b) in zip(modules, pairs().values(), strict=True):
    name = prefix + (module.replace('.', '_') if flat else module)
    out |= {name + down: a, name + up: b}
    if alpha is not None:
      out[f'{name}.alpha'] = np.float32(alpha)
  return out


FORMS = {
  'PEFT': (named('.lora_A.weight', '.lora_B.weight', 'base_model.model.'), 1.0),
  'PEFT with an adapter': (
    named('.lora_A.default.weight', '.lora_B.default.weight', 'base_model.model.model.'),
    1.0,
  ),
  'LongLive': (named('.lora_A.weight', '.lora_B.weight', 'model._fsdp_wrapped_module.'), 1.0),
  'diffusers': (
    named('.lora_A.weight', '.lora_B.weight', 'transformer.', modules=FOREIGN_TARGETS),
    1.0,
  ),
  'ComfyUI': (named('.lora_down.weight', '.lora_up.weight', 'diffusion_model.', alpha=1.5), 0.5),
  'kohya': (named('.lora_down.weight', '.lora_up.weight', 'lora_unet_', alpha=6, flat=True), 2.0),
}


@pytest.mark.parametrize('form', FORMS)
def test_a_lora_is_merged_by_its_formula(tmp_path, form):
  """W + alpha / rank * up down in float64; float32 sums of 3 products of size 1: 1e-5."""
  content, scale = FORMS[form]
  found, unknown = lora.updates(lazily(content), lazily(arrays('dit')))
  assert not unknown and found.keys() == {f'{name}.weight' for name in TARGETS}
  done = run(write(tmp_path / 'x.safetensors', arrays('dit')), updates=lambda _: found)
  got = values(done)
  for name, (a, b) in pairs().items():
    weight = arrays('dit')[f'{name}.weight'].astype(np.float64)
    want = weight + scale * b.astype(np.float64) @ a.astype(np.float64)
    np.testing.assert_allclose(got.pop(f'{name}.weight'), want, atol=1e-5)
  assert_same(got, {k: x for k, x in arrays('dit').items() if k in got})
  assert {(row['wan'], row['rank'], row['scale']) for row in done.report['lora']} == {
    (f'{name}.weight', RANK, scale) for name in TARGETS
  }
  assert any(
    f'+ LoRA of rank 3, scale {scale:g} -> ' in line for line in conversion.lines(done.report)
  )


def test_alpha_can_be_given_for_files_without_it():
  found, _ = lora.updates(lazily(FORMS['PEFT'][0]), lazily(arrays('dit')), alpha=12.0)
  assert {update.scale for update in found.values()} == {4.0}
  found, _ = lora.updates(lazily(FORMS['ComfyUI'][0]), lazily(arrays('dit')), alpha=12.0)
  assert {update.scale for update in found.values()} == {0.5}


def test_a_merged_weight_is_rounded_once(tmp_path):
  """bfloat16 weights and pairs: the float32 sum is rounded, not its parts."""
  half = {k: x.astype(ml_dtypes.bfloat16) for k, x in FORMS['PEFT'][0].items()}
  found, _ = lora.updates(lazily(half), lazily(arrays('dit')))
  path = write(tmp_path / 'x.safetensors', arrays('dit', ml_dtypes.bfloat16))
  tensor_files.write(str(tmp_path / 'y.safetensors'), run(path, updates=lambda _: found).tensors)
  got, _ = tensor_files.scan(str(tmp_path / 'y.safetensors'))
  name = 'blocks.1.ffn.0'
  a, b = (x.astype(ml_dtypes.bfloat16).astype(np.float32) for x in pairs()[name])
  want = (b @ a + arrays('dit', ml_dtypes.bfloat16)[f'{name}.weight']).astype(ml_dtypes.bfloat16)
  np.testing.assert_array_equal(got[f'{name}.weight'].read(), want)


@pytest.mark.parametrize(
  'change, words',
  [
    (
      lambda c: c.pop('blocks.1.ffn.0.lora_B.weight'),
      'blocks.1.ffn.0.lora_A.weight lack the other half',
    ),
    (
      lambda c: c.update({'blocks.1.ffn.0.lora_B.weight': np.ones((80, 4))}),
      r'\(3, 48\) and \(80, 4\)',
    ),
    (lambda c: c.update({'blocks.1.ffn.0.lora_A.weight': np.ones((3, 80))}), 'do not make'),
    (
      lambda c: c.update(
        {
          'blocks.1.ffn.0.lora_A.weight': np.ones((0, 48)),
          'blocks.1.ffn.0.lora_B.weight': np.ones((80, 0)),
        }
      ),
      'do not make',
    ),
    (
      lambda c: c.update({'model.blocks.1.ffn.0.lora_B.weight': np.ones((80, 3))}),
      'two of the LoRA tensors',
    ),
  ],
)
def test_a_lora_that_does_not_fit_is_refused(change, words):
  content = named('.lora_A.weight', '.lora_B.weight')
  change(content)
  with pytest.raises(InputError, match=words) as error:
    lora.updates(lazily(content), lazily(arrays('dit')))
  sentence(error)


def test_lora_tensors_of_no_weight_are_told():
  content = named('.lora_A.weight', '.lora_B.weight') | {
    'blocks.7.ffn.0.lora_A.weight': np.ones((3, 48)),
    'blocks.0.norm3.diff_b': np.ones(48),
  }
  _, unknown = lora.updates(lazily(content), lazily(arrays('dit')))
  assert unknown == ['blocks.7.ffn.0.lora_A.weight', 'blocks.0.norm3.diff_b']


# The report.


def test_the_report_says_where_every_tensor_went(tmp_path):
  path = tmp_path / 'model.pt'
  state = torch_state(wrap=WRAPPED['Self-Forcing']) | {'model._register_tokens': torch.ones(3)}
  torch.save({'generator_ema': state, 'critic': torch_state(), 'step': 7}, path)
  done = run(path, entry='generator_ema', naming='diffusers', dtype='bfloat16')
  report = json.loads(json.dumps(done.report))
  rows = {row['key']: row for row in report['tensors']}
  assert rows.keys() == {f'model.{key}' for key in arrays('dit')}
  assert rows['model.blocks.1.norm3.bias'] == {
    'key': 'model.blocks.1.norm3.bias',
    'shape': [48],
    'dtype': 'float32',
    'to': ['blocks.1.norm2.bias'],
    'dtype_out': 'bfloat16',
  }
  assert report['unused'] == [
    {
      'key': 'model._register_tokens',
      'shape': [3],
      'dtype': 'float32',
      'why': 'known to be no part of the network',
      'allowed': True,
    }
  ]
  assert report['others'] == ['critic', 'step'] and report['missing'] == []
  assert report['names'] == {'from': 'wan', 'to': 'diffusers'} and report['files'] == [str(path)]
  assert report['parameters'] == sum(x.size for x in arrays('dit').values())
  lines = conversion.lines(report)
  assert 'model.blocks.1.norm3.bias [48] float32 -> blocks.1.norm2.bias bfloat16' in lines
  assert 'unused: model._register_tokens [3] float32 (known to be no part of the network)' in lines
  assert {'unused: critic (beside the weights)', 'unused: step (beside the weights)'} <= set(lines)
  assert len(lines) == 2 + len(rows) + 1 + 2 + 1


def test_planning_reads_no_tensor(tmp_path, monkeypatch):
  path = write(tmp_path / 'x.safetensors', arrays('dit'))
  monkeypatch.setattr(np, 'fromfile', lambda *_, **__: pytest.fail('a tensor was read'))
  assert isinstance(next(iter(run(path, naming='diffusers').tensors.values())), Tensor)
  assert os.listdir(tmp_path) == ['x.safetensors']
