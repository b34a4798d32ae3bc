"""The DiT: properties first, then diffusers as an independent network, then the published sizes."""

import dataclasses
import functools
import math
import re

import diffusers
import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from einops import rearrange

from salt_jax import convert, weights
from salt_jax.errors import InputError
from salt_jax.models import cache as caches
from salt_jax.models import rope, wan
from tests import tiny

APPLY = wan.bind(tiny.WAN)


@functools.partial(jax.jit, static_argnames=('chunk', 'cfg'))
def _clip(params, x, t, prompt, chunk=None, cfg=tiny.WAN):
  return wan.apply(params, x, t, prompt, wan.Clip(chunk=chunk), cfg)


def _influence(chunk):
  """[out frame, in frame]: does the output of one depend on the input of the other?"""
  x, t, text = tiny.latents(1), tiny.levels(2), tiny.prompt()

  @jax.jit
  def gradient(x, frame):
    def loss(x):
      v, _ = APPLY(tiny.params(), x, t, text, wan.Clip(chunk=chunk))
      return jnp.square(v[:, frame]).sum()

    return jnp.abs(jax.grad(loss)(x)).sum((0, 2, 3, 4))

  return np.stack([gradient(x, jnp.int32(frame)) for frame in range(tiny.FRAMES)]) > 0


def test_chunk_causal_by_gradient():
  frames = np.arange(tiny.FRAMES)
  same_or_earlier = frames[:, None] // tiny.CHUNK >= frames[None] // tiny.CHUNK
  np.testing.assert_array_equal(_influence(tiny.CHUNK), same_or_earlier)


def test_bidirectional_sees_everything():
  assert _influence(None).all()


def test_one_chunk_over_the_clip_is_bidirectional():
  x, t, text = tiny.latents(1), tiny.levels(2), tiny.prompt()
  whole, _ = _clip(tiny.params(), x, t, text, None)
  chunk, _ = _clip(tiny.params(), x, t, text, tiny.FRAMES)
  np.testing.assert_array_equal(whole, chunk)


@pytest.mark.parametrize('cfg', [tiny.WAN, tiny.I2V])
@pytest.mark.parametrize('static', [True, False])
def test_cached_chunks_equal_one_chunk_causal_pass(static, cfg):
  """With frames given, each chunk must take its own of them, by a static and by an array start."""
  params, x, t, prompt = tiny.params(0, cfg), tiny.latents(1), tiny.levels(2), tiny.prompt(cfg)
  expected, _ = _clip(params, x, t, prompt, tiny.CHUNK, cfg)
  shape = (tiny.WAN.layers, tiny.BATCH, tiny.FRAMES, 6, tiny.WAN.heads, tiny.WAN.head_dim)
  cache, outs = caches.allocate(shape, jnp.float32), []
  for start in range(0, tiny.FRAMES, tiny.CHUNK):
    part = slice(start, start + tiny.CHUNK)
    ctx = wan.Chunk(cache, start if static else jnp.int32(start))
    v, features = wan.apply(params, x[:, part], t[:, part], prompt, ctx, cfg)
    cache = caches.write(cache, features.k, features.v, start)
    outs.append(v)
  # The same sums in another order: float32 rounding of outputs of order one.
  np.testing.assert_allclose(jnp.concatenate(outs, 1), expected, atol=1e-5)


def test_reading_a_cache_leaves_it_alone_and_passes_no_gradient():
  x, t, text = tiny.latents(1), tiny.levels(2), tiny.prompt()
  _, features = _clip(tiny.params(), x, t, text, tiny.CHUNK)
  shape = (tiny.WAN.layers, tiny.BATCH, tiny.FRAMES, 6, tiny.WAN.heads, tiny.WAN.head_dim)
  empty = caches.allocate(shape, jnp.float32)

  def loss(k):
    cache = caches.write(empty, k, features.v, 0)
    chunk = wan.Chunk(cache, 4)
    return jnp.square(APPLY(tiny.params(), x[:, 4:], t[:, 4:], text, chunk)[0]).sum()

  value, grad = jax.value_and_grad(loss)(features.k)
  assert value > 0 and not np.asarray(grad).any(), 'a gradient flows through the cache'
  assert loss(features.k.at[:, :, 0].add(1.0)) != value, 'the cache is not read at all'


def test_remat_changes_nothing():
  x, t, text = tiny.latents(1), tiny.levels(2), tiny.prompt()

  def grads(remat):
    cfg = dataclasses.replace(tiny.WAN, remat=remat)
    loss = lambda p: jnp.square(wan.apply(p, x, t, text, wan.Clip(chunk=2), cfg)[0]).mean()  # noqa: E731
    return jax.jit(jax.grad(loss))(tiny.params())

  # Recomputation may fuse differently: a few float32 ulps of gradients below one.
  for a, b in zip(jax.tree.leaves(grads(True)), jax.tree.leaves(grads(False)), strict=True):
    np.testing.assert_allclose(a, b, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize('remat', [False, True])
def test_a_start_known_when_tracing_spares_what_is_hidden(remat):
  """A chunk at frame 2 of a cache of 60 reads two frames; at an array it reads the whole cache behind a mask."""
  cfg = dataclasses.replace(tiny.WAN, remat=remat)
  shape = (cfg.layers, tiny.BATCH, 60, 6, cfg.heads, cfg.head_dim)
  cache, x, t = caches.allocate(shape, jnp.float32), tiny.latents(1, 2), tiny.levels(2, 2)

  def longest(start):
    run = lambda p: wan.apply(p, x, t, tiny.prompt(), wan.Chunk(cache, start), cfg)[0]  # noqa: E731
    text = str(jax.make_jaxpr(run)(tiny.params()))
    keys = re.findall(r'f32\[2,2,12,(\d+)\] = (?:dot_general|concatenate)', text)
    return max(int(k) for k in keys)

  assert longest(2) == 6 * (2 + 2) and longest(jnp.int32(2)) == 6 * (2 + 60)


def test_taps_are_the_blocks_that_were_asked_for():
  x, t, text = tiny.latents(1), tiny.levels(2), tiny.prompt()
  _, features = APPLY(tiny.params(), x, t, text, wan.Clip(taps=(0, 2)))
  assert set(features.taps) == {0, 2} and features.taps[0].shape == (2, 6, 6, 48)
  short = dataclasses.replace(tiny.WAN, layers=1)
  first = tiny.params() | {'blocks': jax.tree.map(lambda p: p[:1], tiny.params()['blocks'])}
  _, alone = wan.apply(first, x, t, text, wan.Clip(taps=(0,)), short)
  np.testing.assert_allclose(features.taps[0], alone.taps[0], atol=1e-6)
  assert np.abs(features.taps[2] - features.taps[0]).max() > 0.1


def test_rope_start_moves_frames_only_and_golden_values():
  shifted = rope.table((2, 3, 4), 24, jnp.int32(5))
  whole = rope.table((7, 3, 4), 24)
  np.testing.assert_array_equal(shifted, whole[:, 5:])
  # Spot values of the complex table of Wan 2.1 at head width 128.
  table = rope.table((2, 30, 52), 128)
  spots = {
    (1, 0, 1): (0.7912577, 0.6114828),
    (0, 29 * 52, 22 + 3): (0.0740959, 0.9972511),
    (0, 51, 43 + 20): (0.9999687, 0.0079075),
  }
  for (f, token, pair), value in spots.items():
    np.testing.assert_allclose(
      table[:, f, token, pair], value, atol=1e-6, err_msg='per-axis widths 44/42/42'
    )


def test_sinusoid_golden_values():
  got = wan.sinusoid(jnp.full((1, 1), 999.0), 256)[0, 0, jnp.array([0, 1, 2, 127, 128, 129, 255])]
  wanted = [0.9996499, 0.9637825, -0.3989918, 0.9942432, -0.0264608, -0.2666896, 0.1071472]
  # 999 rad in float32 is known to 3e-5.
  np.testing.assert_allclose(got, wanted, atol=5e-5, err_msg='cosines first, t on 0…1000')


class _Masked(WanAttnProcessor):
  """diffusers' attention with a mask on self-attention, which its own processor cannot pass."""

  mask = None

  def __call__(
    self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None
  ):
    if encoder_hidden_states is None:
      attention_mask = self.mask
    return super().__call__(attn, hidden_states, encoder_hidden_states, attention_mask, rotary_emb)


@functools.cache
def _oracle(cfg):
  torch.manual_seed(0)
  image = dict(image_dim=cfg.image_dim, added_kv_proj_dim=cfg.dim) if cfg.image_dim else {}
  if cfg.image_positions:
    image['pos_embed_seq_len'] = cfg.image_len
  model = diffusers.WanTransformer3DModel(
    num_attention_heads=cfg.heads,
    attention_head_dim=cfg.head_dim,
    in_channels=cfg.in_channels,
    out_channels=cfg.out_channels,
    text_dim=cfg.text_dim,
    freq_dim=cfg.freq_dim,
    ffn_dim=cfg.ffn_dim,
    num_layers=cfg.layers,
    **image,
  )
  with torch.no_grad():
    for p in model.parameters():
      p.add_(0.1 * torch.randn_like(p))
  tensors = {k: v.numpy() for k, v in model.state_dict().items()}
  params = convert.from_wan(convert.rename(tensors, 'dit', 'diffusers'), 'dit')
  return model.eval(), params


def _padded(prompt):
  """The same prompt in 512 rows: how many of its rows are image rows, diffusers finds by counting 512 from the end."""
  rows = prompt.text.shape[1]
  return prompt.replace(text=jnp.pad(prompt.text, ((0, 0), (0, 512 - rows), (0, 0))))


@pytest.mark.parametrize(
  ('cfg', 'chunk'),
  [
    (tiny.WAN, None),
    (tiny.WAN, tiny.CHUNK),
    (tiny.FRAMES_ALONE, None),
    (tiny.I2V, None),
    (tiny.I2V, tiny.CHUNK),
    (tiny.FLF2V, None),
  ],
)
def test_parity_with_diffusers(cfg, chunk):
  """Per-frame timesteps, and a chunk-causal mask where asked. float32 sums of another order: 1e-4 of unit scale."""
  model, params = _oracle(cfg)
  x, t, prompt = tiny.latents(1), tiny.levels(2), tiny.prompt(cfg)
  prompt = _padded(prompt) if cfg.image_dim else prompt
  theirs = x if prompt.frames is None else jnp.concatenate([x, prompt.frames], axis=-1)
  image = prompt.image
  if cfg.image_positions:
    image = rearrange(image, 'b (two l) e -> (b two) l e', two=2)
  tokens = math.prod(tiny.LATENT[:2]) // 4
  blocks = np.arange(tiny.FRAMES * tokens) // (tokens * (chunk or tiny.FRAMES))
  _Masked.mask = torch.from_numpy(blocks[:, None] >= blocks[None])
  for block in model.blocks:
    block.attn1.set_processor(_Masked())
  per_token = np.repeat(np.asarray(t), tokens, axis=1)
  with torch.no_grad():
    expected = model(
      torch.from_numpy(np.moveaxis(np.asarray(theirs), -1, 1).copy()),
      torch.from_numpy(per_token),
      torch.from_numpy(np.array(prompt.text)),
      None if image is None else torch.from_numpy(np.array(image)),
      return_dict=False,
    )[0].numpy()
  got, _ = _clip(params, x, t, prompt, chunk, cfg)
  assert np.abs(expected).std() > 0.05
  np.testing.assert_allclose(np.moveaxis(np.asarray(got), -1, 1), expected, atol=1e-4)


@pytest.mark.parametrize(
  ('cfg', 'count', 'tensors'),
  [
    (wan.wan_1_3b(), 1_418_996_800, 825),
    (wan.wan_14b(), 14_288_491_584, 1095),
    (wan.wan_i2v_14b(), 16_394_878_784, 1303),
    (wan.wan_flf2v_14b(), 16_395_536_704, 1304),
  ],
)
def test_published_sizes(cfg, count, tensors):
  shapes = wan.param_shapes(cfg)
  assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) == count
  names = convert.wan_shapes(shapes, 'dit')
  assert len(names) == tensors
  assert names['patch_embedding.weight'] == (cfg.dim, cfg.in_channels, 1, 2, 2)
  assert names[f'blocks.{cfg.layers - 1}.ffn.0.weight'] == (cfg.ffn_dim, cfg.dim)


def test_heads_that_do_not_divide_are_refused():
  with pytest.raises(InputError, match='dim 100 does not divide into 3 heads'):
    dataclasses.replace(tiny.WAN, dim=100, heads=3)


@pytest.mark.parametrize('cfg', [tiny.FRAMES_ALONE, tiny.I2V])
def test_each_condition_reaches_the_output_and_each_frame_its_place(cfg):
  params, x, t, prompt = tiny.params(0, cfg), tiny.latents(1), tiny.levels(2), tiny.prompt(cfg)
  before, _ = _clip(params, x, t, prompt, tiny.CHUNK, cfg)
  if cfg.image_dim:
    after, _ = _clip(params, x, t, prompt.replace(image=prompt.image[::-1]), tiny.CHUNK, cfg)
    assert np.abs(after - before).max() > 1e-2
  other = prompt.frames.at[:, -1].add(1.0)
  after, _ = _clip(params, x, t, prompt.replace(frames=other), tiny.CHUNK, cfg)
  changed = np.abs(after - before).max((0, 2, 3, 4)) > 1e-3
  np.testing.assert_array_equal(changed, [False] * 4 + [True] * 2, err_msg='the last chunk alone')


def _start(cfg, **changes):
  """Shapes of a chunk's pass at frame 4."""
  shape = (cfg.layers, tiny.BATCH, tiny.FRAMES, 6, cfg.heads, cfg.head_dim)
  chunk = wan.Chunk(caches.allocate(shape, jnp.float32), 4)
  prompt = tiny.prompt(cfg).replace(**changes)
  x, t = tiny.latents(1, tiny.CHUNK), tiny.levels(2, tiny.CHUNK)
  return jax.eval_shape(lambda p: wan.apply(p, x, t, prompt, chunk, cfg), tiny.params(0, cfg))


@pytest.mark.parametrize(
  ('cfg', 'changes', 'sentence'),
  [
    (
      tiny.WAN,
      dict(frames=jnp.ones((2, 6, 4, 6, 20))),
      'frames of 0 channels but the prompt has 20',
    ),
    (tiny.I2V, dict(frames=None), 'frames of 20 channels but the prompt has 0'),
    (
      tiny.I2V,
      dict(frames=jnp.ones((2, 6, 4, 6, 16))),
      'frames of 20 channels but the prompt has 16',
    ),
    (
      tiny.I2V,
      dict(frames=jnp.ones((2, 5, 4, 6, 20))),
      "2 latent frames from frame 4 on do not fit the prompt's 5",
    ),
    (tiny.I2V, dict(image=None), 'takes 5 image rows but the prompt has 0'),
    (
      tiny.FRAMES_ALONE,
      dict(image=jnp.ones((2, 5, 20))),
      'takes 0 image rows but the prompt has 5',
    ),
  ],
)
def test_a_prompt_of_another_kind_is_refused(cfg, changes, sentence):
  _start(cfg)
  with pytest.raises(InputError, match=sentence):
    _start(cfg, **changes)


def test_frames_of_another_length_than_the_whole_clip_are_refused():
  prompt = tiny.prompt(tiny.I2V)
  prompt = prompt.replace(frames=jnp.concatenate([prompt.frames, prompt.frames], axis=1))
  with pytest.raises(
    InputError, match="6 latent frames from frame 0 on do not fit the prompt's 12"
  ):
    _clip(tiny.params(0, tiny.I2V), tiny.latents(1), tiny.levels(2), prompt, None, tiny.I2V)


@pytest.mark.parametrize('path', ['blocks.norm3.weight', 'blocks.ffn_0.kernel', 'head.modulation'])
def test_a_parameter_of_another_shape_is_refused(path):
  """Also one that would be broadcast."""
  *parents, last = path.split('.')
  params = jax.tree.map(lambda x: x, tiny.params())
  node = functools.reduce(lambda node, key: node[key], parents, params)
  node[last] = node[last][..., :1]
  with pytest.raises(flax.errors.ScopeParamShapeError, match=last):
    jax.eval_shape(_clip, params, tiny.latents(1), tiny.levels(2), tiny.prompt())


def test_more_outputs_than_inputs_are_refused():
  with pytest.raises(InputError, match='in_channels 8 must not be fewer than out_channels 16'):
    dataclasses.replace(tiny.WAN, in_channels=8)


def test_features_are_the_tap_of_the_whole_network_and_run_nothing_behind_it():
  params, prompt = tiny.params(), tiny.prompt()
  x, t, layer = tiny.latents(0), tiny.levels(1), 1
  whole = jax.jit(wan.bind(tiny.WAN))(params, x, t, prompt, wan.Clip(taps=(layer,)))[1].taps[layer]
  run = jax.jit(lambda p: wan.features(p, x, t, prompt, layer, tiny.WAN))
  np.testing.assert_allclose(run(params), whole, atol=1e-5)
  grads = jax.grad(lambda p: jnp.square(run(p)).sum())(params)
  for g in jax.tree.leaves(grads['blocks']):
    assert not np.asarray(g[layer + 1 :]).any() and np.asarray(g[: layer + 1]).any()
  assert not any(np.asarray(g).any() for g in jax.tree.leaves(grads['head']))
  # Its loop is as long as the tap is deep.
  (loop,) = (
    e
    for e in jax.make_jaxpr(run)(params).jaxpr.eqns[0].params['jaxpr'].eqns
    if e.primitive.name == 'scan'
  )
  assert loop.params['length'] == layer + 1


def test_one_program_serves_equal_sizes():
  """Functions of equal sizes are one static argument; those of others are another."""
  traced = []
  run = jax.jit(lambda apply, x: traced.append(apply) or x, static_argnums=0)
  for cfg in (tiny.WAN, dataclasses.replace(tiny.WAN), dataclasses.replace(tiny.WAN, layers=1)):
    run(wan.bind(cfg), 0.0)
  assert len(traced) == 2


def test_narrowed_parameters_make_the_same_bits():
  """What a sampler keeps narrow, the model would have rounded itself; time and head stay wide."""
  cfg = dataclasses.replace(tiny.WAN, dtype='bfloat16')
  x, t, text = tiny.latents(0), tiny.levels(1), tiny.prompt()
  run = jax.jit(lambda params: wan.apply(params, x, t, text, wan.Clip(), cfg)[0])
  params = tiny.params()
  narrow = weights.narrowed(params, cfg.dtype)
  assert narrow['blocks']['ffn_0']['kernel'].dtype == jnp.bfloat16
  np.testing.assert_array_equal(run(narrow), run(params))
