"""Conversions: torch files, shards, what does not fit, and reports."""

import json
import os

import numpy as np
import pytest
import torch

from salt_jax import conversion, convert, names, tensor_files
from salt_jax.errors import InputError
from salt_jax.models import wan
from salt_jax.tensor_files import Tensor
from tests.checkpoints import arrays, assert_same, lazily, run, sentence, values, write

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
    ({'step': 3}, 'holds no tensors; give a file of weights.'),
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
