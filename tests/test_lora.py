"""Low-rank updates in the form of each program that makes them, merged by their formula."""

import ml_dtypes
import numpy as np
import pytest

from salt_jax import conversion, lora, tensor_files
from salt_jax.errors import InputError
from tests.checkpoints import arrays, assert_same, lazily, run, sentence, values, write

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
