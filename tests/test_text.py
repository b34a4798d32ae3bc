"""UMT5 against transformers, its position buckets and padding, and the word tokenizer."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import UMT5Config, UMT5EncoderModel
from transformers.models.umt5.modeling_umt5 import UMT5Attention

from salt_jax import clips, convert
from salt_jax.errors import InputError
from salt_jax.models import text

TINY = text.TextConfig(vocab=128, dim=32, dim_attn=32, heads=4, ffn_dim=64, layers=2)
# Wider than long, so that no two sizes that a mistake could swap are alike.
ODD = text.TextConfig(vocab=96, dim=24, dim_attn=40, heads=4, ffn_dim=56, layers=3)
LENGTH = 40

encode = jax.jit(text.encode, static_argnums=3)
init_params = jax.jit(text.init_params, static_argnums=1)


def oracle_config(cfg: text.TextConfig) -> UMT5Config:
  return UMT5Config(
    vocab_size=cfg.vocab,
    d_model=cfg.dim,
    d_kv=cfg.dim_attn // cfg.heads,
    d_ff=cfg.ffn_dim,
    num_layers=cfg.layers,
    num_heads=cfg.heads,
    feed_forward_proj='gated-gelu',
    dropout_rate=0,
  )


@functools.cache
def oracle(cfg: text.TextConfig) -> tuple[UMT5EncoderModel, dict]:
  """transformers' encoder with every parameter drawn anew, and the same parameters for ours."""
  model = UMT5EncoderModel(oracle_config(cfg)).eval()
  generator = torch.Generator().manual_seed(0)
  with torch.no_grad():
    for name, parameter in model.named_parameters():
      around = 1.0 if name.endswith('norm.weight') else 0.0
      # Attention far from uniform (logits spread by about 2) but not so sharp as to magnify noise.
      parameter.copy_(around + 0.15 * torch.randn(parameter.shape, generator=generator))
  tensors = {name: x.numpy() for name, x in model.state_dict().items()}
  params = convert.from_wan(convert.rename(tensors, 'umt5', 'transformers'), 'umt5')
  return model, params


def batch(cfg: text.TextConfig) -> tuple[np.ndarray, np.ndarray]:
  """Four rows of 1, 7, 29 and 40 tokens."""
  rng = np.random.default_rng(0)
  mask = np.arange(LENGTH)[None] < np.array([1, 7, 29, LENGTH])[:, None]
  return np.where(mask, rng.integers(3, cfg.vocab, mask.shape), text.PAD).astype(np.int32), mask


@pytest.mark.parametrize('cfg', [TINY, ODD])
def test_agrees_with_transformers_on_a_padded_batch(cfg):
  model, params = oracle(cfg)
  ids, mask = batch(cfg)
  with torch.no_grad():
    want = model(torch.tensor(ids).long(), torch.tensor(mask).long()).last_hidden_state.numpy()
  got = np.asarray(encode(params, ids, mask, cfg))
  # float32 sums in another order; rows have unit scale after the last norm.
  np.testing.assert_allclose(got[mask], want[mask], atol=2e-5, rtol=0)
  assert 0.3 < got[mask].std() < 3


def test_names_and_shapes_are_what_init_makes():
  for cfg in (TINY, ODD):
    convert.check(text.param_shapes(cfg), oracle(cfg)[1])


def test_rows_beyond_the_text_are_exactly_zero():
  _, params = oracle(TINY)
  ids, mask = batch(TINY)
  out = np.asarray(encode(params, ids, mask, TINY))
  assert np.all(out[~mask] == 0) and np.all(np.abs(out[mask]).sum(-1) > 0)


def test_padding_changes_nothing_for_the_text():
  """Neither what stands in it nor how much of it there is; only the order of sums may differ."""
  _, params = oracle(TINY)
  ids, mask = batch(TINY)
  out = np.asarray(encode(params, ids, mask, TINY))
  junk = np.where(mask, ids, 77)
  np.testing.assert_array_equal(encode(params, junk, mask, TINY), out)
  for row, length in ((0, 1), (2, 29)):
    alone = encode(params, ids[row : row + 1, :length], mask[row : row + 1, :length], TINY)
    np.testing.assert_allclose(alone[0], out[row, :length], atol=1e-5, rtol=0)


def test_buckets_are_those_of_the_definition():
  n = 600
  offset = torch.arange(n)[None] - torch.arange(n)[:, None]
  attention = UMT5Attention(oracle_config(TINY), has_relative_attention_bias=True)
  want = attention._relative_position_bucket(offset).numpy()
  np.testing.assert_array_equal(text.relative_buckets(n), want)
  assert text.relative_buckets(130)[0, [0, 1, 7, 8, 11, 12, 16, 32, 64, 90, 91, 129]].tolist() == [
    0,
    17,
    23,
    24,
    24,
    25,
    26,
    28,
    30,
    30,
    31,
    31,
  ]
  assert text.relative_buckets(130)[129, [129, 128, 38, 0]].tolist() == [0, 1, 15, 15]


def test_every_layer_has_a_bias_table_of_its_own():
  _, params = oracle(TINY)
  ids, mask = batch(TINY)

  def total(table):
    blocks = params['blocks'] | {'pos_embedding': {'embedding': {'embedding': table}}}
    return jnp.square(encode(params | {'blocks': blocks}, ids, mask, TINY)[:, :, 0]).sum()

  table = params['blocks']['pos_embedding']['embedding']['embedding']
  gradient = np.asarray(jax.jit(jax.grad(total))(table))
  assert np.abs(gradient).max(axis=(1, 2)).min() > 1e-3
  assert total(table) != total(np.stack([table[0], table[0]]))


def test_attention_is_not_scaled_and_gate_is_the_gelu_branch():
  """One layer by hand, without the network's own helpers."""
  cfg = dataclasses.replace(TINY, layers=1)
  p = jax.tree.map(lambda x: x[0], oracle(TINY)[1]['blocks'])
  x = np.random.default_rng(2).standard_normal((1, 5, cfg.dim), np.float32)

  def norm(x, weight):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + cfg.eps) * weight

  def heads(x, name):
    return (x @ p['attn'][name]['kernel']).reshape(5, cfg.heads, -1)

  h = norm(x[0], p['norm1']['weight'])
  bias = p['pos_embedding']['embedding']['embedding'][text.relative_buckets(5)]
  logits = np.einsum('qhd,khd->qkh', heads(h, 'q'), heads(h, 'k')) + bias
  weights = np.exp(logits - logits.max(1, keepdims=True))
  weights /= weights.sum(1, keepdims=True)
  attended = np.einsum('qkh,khd->qhd', weights, heads(h, 'v')).reshape(5, -1)
  y = x[0] + attended @ p['attn']['o']['kernel']
  h = norm(y, p['norm2']['weight'])
  gate = h @ p['ffn']['gate_0']['kernel']
  gate = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
  want = y + gate * (h @ p['ffn']['fc1']['kernel']) @ p['ffn']['fc2']['kernel']
  got, _ = text.Layer(cfg).apply({'params': p}, x, np.ones((1, 5), bool))
  np.testing.assert_allclose(got[0], want, atol=1e-4 * np.abs(want).max(), rtol=0)


def test_bfloat16_computes_close_to_float32_and_returns_float32():
  cfg = text.nano_text()
  params = init_params(jax.random.key(1), cfg)
  ids, mask = batch(cfg)
  exact = np.asarray(encode(params, ids, mask, cfg))
  rough = encode(params, ids, mask, dataclasses.replace(cfg, dtype='bfloat16'))
  assert rough.dtype == jnp.float32
  # 8 bits of mantissa through 2 layers; unit-scale rows.
  error = np.abs(np.asarray(rough) - exact)[mask]
  assert 1e-4 < error.mean() < 0.02 and error.max() < 0.2


def test_a_fresh_encoder_is_well_scaled():
  """Unscaled attention needs small queries: logits of unit variance, rows of unit scale."""
  cfg = text.nano_text()
  params = init_params(jax.random.key(0), cfg)
  h = np.random.default_rng(0).standard_normal((256, cfg.dim), np.float32)
  q, k = (
    np.asarray(h @ params['blocks']['attn'][name]['kernel'][1]).reshape(256, cfg.heads, -1)
    for name in 'qk'
  )
  assert 0.7 < np.einsum('qhd,khd->hqk', q, k).std() < 1.4
  ids, mask = batch(cfg)
  assert 0.9 < np.asarray(encode(params, ids, mask, cfg))[mask].std() < 1.1


def test_tokenizer_writes_words_then_end_then_padding():
  tokenize = text.WordTokenizer(clips.NANO_WORDS, 8)
  ids, mask = tokenize(['A red  T-Shirt, moves up!', 'up'])
  words = ('<pad>', '</s>', '<unk>') + clips.NANO_WORDS
  assert [words[i] for i in ids[0]] == [
    'a',
    'red',
    't-shirt',
    'moves',
    'up',
    '</s>',
    '<pad>',
    '<pad>',
  ]
  assert mask.sum(1).tolist() == [6, 2] and ids.dtype == np.int32 and mask.dtype == bool
  assert tokenize.size == text.nano_text().vocab


def test_empty_input_is_the_end_token_alone():
  ids, mask = text.WordTokenizer(clips.NANO_WORDS, 5).empty(2)
  assert ids.tolist() == [[1, 0, 0, 0, 0]] * 2 and mask.sum(1).tolist() == [1, 1]


@pytest.mark.parametrize(
  'prompt, words',
  [
    ('', 'prompt is empty'),
    (' . ', 'prompt is empty'),
    ('a rde bag', "'rde' in prompt 'a rde bag' is not in the vocabulary; .*red"),
    ('a bag <unk>', "'unk'"),
    ('a red bag and a blue bag', 'has 7 words but the limit is 6'),
  ],
)
def test_bad_prompts_are_refused_with_the_mend(prompt, words):
  with pytest.raises(InputError, match=words) as error:
    text.WordTokenizer(clips.NANO_WORDS, 7)(['up', prompt])
  assert '\n' not in str(error.value)


def test_prompt_of_exactly_the_limit_fits():
  ids, mask = text.WordTokenizer(clips.NANO_WORDS, 8)(['a red bag and a blue bag'])
  assert mask.all() and ids[0, -1] == text.EOS


def test_bad_vocabulary_or_heads_are_refused():
  for vocabulary in (('red', 'red'), ('Red',), ('two words',), ('dot.',)):
    with pytest.raises(InputError, match='vocabulary'):
      text.WordTokenizer(vocabulary, 8)
  with pytest.raises(InputError, match='heads'):
    dataclasses.replace(TINY, heads=5)
