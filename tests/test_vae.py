"""The VAE looks back in time only, streams exactly and is Wan's; its loss and folding hold."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from einops import rearrange

from salt_jax import convert
from salt_jax.errors import InputError
from salt_jax.losses.reconstruction import fold_statistics, vae_loss
from salt_jax.models import vae, vae_layers

NANO = vae.nano_vae()
# One block a resolution and odd statistics: quick to compile, and nothing is 0 or 1 by chance.
TINY = dataclasses.replace(vae.wan_vae(), dim=4, num_res_blocks=1)
# Float32 through some 30 convolutions whose sums are ordered differently for other shapes.
EXACT = dict(rtol=0, atol=2e-5)


def perturbed(shapes, seed=0):
  """Every parameter random: zero biases, unit gammas and zero projections would hide mistakes."""
  rng = np.random.default_rng(seed)

  def one(path, x):
    noise = rng.standard_normal(x.shape, np.float32)
    if path[-1].key == 'kernel':
      return noise * np.float32(np.prod(x.shape[:-1]) ** -0.5)
    return np.float32(path[-1].key == 'gamma') + 0.2 * noise

  return jax.tree_util.tree_map_with_path(one, shapes)


@functools.cache
def tiny_params():
  return perturbed(vae.param_shapes(TINY))


def normal(seed, *shape, scale=1.0):
  return scale * np.random.default_rng(seed).standard_normal(shape, np.float32)


def pixels(seed, *shape):
  return np.tanh(normal(seed, *shape))


encode = jax.jit(vae.encode, static_argnums=2)
posterior = jax.jit(vae.posterior, static_argnums=2)
decode = jax.jit(vae.decode, static_argnums=2)
decode_raw = jax.jit(vae.decode_raw, static_argnums=2)
encode_chunk = jax.jit(vae.encode_chunk, static_argnums=(3, 4))
decode_chunk = jax.jit(vae.decode_chunk, static_argnums=(3, 4))
loss = jax.jit(functools.partial(vae_loss, l1_weight=0.7, kl_weight=0.3), static_argnums=3)


def count(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


def test_full_size_is_the_published_one():
  shapes = vae.param_shapes(vae.wan_vae())
  assert len(jax.tree.leaves(shapes)) == 194
  assert count(shapes) == 126_892_531
  assert count(shapes['encoder']) == 53_595_872 and count(shapes['decoder']) == 73_295_331


def test_full_size_cache_is_two_frames_a_convolution():
  cache = jax.tree.leaves(jax.eval_shape(lambda: vae.init_decode_cache(vae.wan_vae(), 1, 60, 104)))
  assert len(cache) == 32 and count(cache) == 944_286_720
  assert {x.shape[:2] for x in cache} == {(1, 2)}


@pytest.mark.parametrize('frames, latents', [(1, 1), (5, 2), (9, 3), (81, 21)])
def test_frames_and_latents(frames, latents):
  shapes = vae.param_shapes(NANO)
  video = jax.ShapeDtypeStruct((2, frames, 24, 16, 3), jnp.float32)
  z = jax.eval_shape(functools.partial(vae.encode, cfg=NANO), shapes, video)
  assert z.shape == (2, latents, 3, 2, 16)
  assert jax.eval_shape(functools.partial(vae.decode, cfg=NANO), shapes, z).shape == video.shape


@pytest.mark.parametrize(
  'call, shape, words',
  [
    (vae.encode, (1, 4, 8, 8, 3), ('4 frames', '1 + 4n', 'such as 1.')),
    (vae.encode, (1, 80, 8, 8, 3), ('80 frames', 'such as 77.')),
    (vae.encode, (1, 5, 12, 8, 3), ('12x8', 'multiples of 8')),
    (vae.decode, (1, 2, 1, 1, 4), ('4 channels', '16')),
  ],
)
def test_bad_shapes_are_named_with_the_mend(call, shape, words):
  with pytest.raises(InputError) as error:
    call(tiny_params(), np.zeros(shape), TINY)
  assert all(word in str(error.value) for word in words)


def test_later_chunks_must_be_whole_latents():
  with pytest.raises(InputError, match='5 frames.*a multiple of 4, such as 4'):
    vae.encode_chunk(tiny_params(), np.zeros((1, 5, 8, 8, 3)), {}, TINY, False)


@pytest.mark.parametrize('change', [dict(temporal_downsample=(True,)), dict(latent_std=(1.0,))])
def test_a_config_that_does_not_fit_itself_is_refused(change):
  with pytest.raises(InputError, match='must hold'):
    dataclasses.replace(TINY, **change)


def influence(call, x, cfg):
  """Largest gradient of a mixture of each output frame by each input frame, `[output input]`."""
  shape = jax.eval_shape(lambda: call(tiny_params(), x, cfg)).shape
  mixture = normal(1, *shape)

  def one(frame):
    return jax.grad(lambda x: (call(tiny_params(), x, cfg) * mixture)[:, frame].sum())(x)

  gradients = jax.jit(jax.vmap(one))(jnp.arange(shape[1]))
  return np.asarray(jnp.abs(gradients).max(axis=(1, 3, 4, 5)))


def test_no_latent_depends_on_later_frames():
  got = influence(vae.encode, pixels(0, 1, 9, 8, 8, 3), TINY)
  frame, latent = np.arange(9), np.arange(3)
  # Latent n ends at frame 4n; what it may see it does see, or this would say nothing.
  np.testing.assert_array_equal(got > 0, frame[None] <= 4 * latent[:, None])


def test_no_frame_depends_on_later_latents():
  got = influence(vae.decode_raw, normal(0, 1, 3, 2, 2, 16), TINY)
  frame, latent = np.arange(9), np.arange(3)
  np.testing.assert_array_equal(got > 0, latent[None] <= -(-frame[:, None] // 4))


def test_attention_keeps_frames_apart():
  layer, x = vae_layers.Attention('float32'), normal(0, 2, 3, 4, 4, 8)
  variables = perturbed(jax.eval_shape(layer.init, jax.random.key(0), x, None))
  whole = layer.apply(variables, x, None)[0]
  assert np.abs(whole - x).max() > 0.1
  alone = [layer.apply(variables, x[:, t : t + 1], None)[0] for t in range(3)]
  # The same products; a batch of another size may sum them in another order.
  np.testing.assert_allclose(whole, np.concatenate(alone, axis=1), rtol=0, atol=1e-5)


def in_chunks(call, x, sizes, cache, params=None):
  parts, shapes, at = [], jax.eval_shape(lambda: cache), 0
  for size in sizes:
    part, cache = call(params or tiny_params(), x[:, at : at + size], cache, TINY, at == 0)
    assert jax.eval_shape(lambda cache=cache: cache) == shapes
    parts.append(part)
    at += size
  assert at == x.shape[1]
  return np.concatenate(parts, axis=1)


@pytest.mark.parametrize('sizes', [(1, 1, 1, 1), (2, 1, 1), (1, 3)])
def test_streamed_video_is_the_whole_video(sizes):
  z = normal(0, 2, 4, 2, 3, 16, scale=0.5)
  whole = decode(tiny_params(), z, TINY)
  # Clamped pixels agree by themselves.
  assert whole.shape == (2, 13, 16, 24, 3) and (np.abs(whole) < 1).mean() > 0.5
  got = in_chunks(decode_chunk, z, sizes, vae.init_decode_cache(TINY, 2, 2, 3))
  np.testing.assert_allclose(got, whole, **EXACT)


@pytest.mark.parametrize('sizes', [(1, 4, 4), (5, 4)])
def test_streamed_latents_are_the_whole_latents(sizes):
  x = pixels(0, 2, 9, 16, 24, 3)
  got = in_chunks(encode_chunk, x, sizes, vae.init_encode_cache(TINY, 2, 16, 24))
  np.testing.assert_allclose(got, encode(tiny_params(), x, TINY), **EXACT)


def test_a_first_chunk_forgets_the_video_before():
  z = normal(0, 2, 1, 2, 3, 16)
  clean = vae.init_decode_cache(TINY, 2, 2, 3)
  spoilt = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), clean)
  got, want = (decode_chunk(tiny_params(), z, cache, TINY, True) for cache in (spoilt, clean))
  jax.tree.map(np.testing.assert_array_equal, got, want)


@functools.cache
def oracle():
  """diffusers' VAE with every parameter random, and the same parameters here."""
  model = AutoencoderKLWan(base_dim=TINY.dim, num_res_blocks=TINY.num_res_blocks).eval()
  rng = np.random.default_rng(0)
  for name, x in model.named_parameters():
    noise = rng.standard_normal(tuple(x.shape), np.float32)
    kernel, gamma = name.endswith('weight'), name.endswith('gamma')
    noise = noise * np.prod(x.shape[1:]) ** -0.5 if kernel else gamma + 0.2 * noise
    x.data = torch.tensor(noise, dtype=torch.float32)
  tensors = {name: x.numpy() for name, x in model.state_dict().items()}
  return model, convert.from_wan(convert.rename(tensors, 'vae', source='diffusers'), 'vae')


def to_torch(x):
  return torch.tensor(rearrange(np.asarray(x), 'b t h w c -> b c t h w'))


def from_torch(x):
  return rearrange(x.numpy(), 'b c t h w -> b t h w c')


@torch.no_grad()
def test_posterior_is_diffusers():
  model, params = oracle()
  x = pixels(3, 2, 9, 16, 24, 3)
  want = model.encode(to_torch(x)).latent_dist
  mean, logvar = posterior(params, x, TINY)
  # Unit-scale numbers in float32 on both sides; 2e-6 measured.
  np.testing.assert_allclose(mean, from_torch(want.mean), **EXACT)
  np.testing.assert_allclose(logvar, from_torch(want.logvar), **EXACT)
  mean, std = model.config.latents_mean, model.config.latents_std
  want = (from_torch(want.mean) - np.float32(mean)) / np.float32(std)
  np.testing.assert_allclose(encode(params, x, TINY), want, **EXACT)


@torch.no_grad()
def test_decoded_video_is_diffusers():
  model, params = oracle()
  z = normal(4, 2, 4, 2, 3, 16, scale=0.3)
  raw = z * np.float32(vae.WAN_STD) + np.float32(vae.WAN_MEAN)
  want = from_torch(model.decode(to_torch(raw)).sample)
  assert want.shape == (2, 13, 16, 24, 3) and (np.abs(want) < 1).mean() > 0.5
  np.testing.assert_allclose(decode(params, z, TINY), want, **EXACT)
  got = in_chunks(decode_chunk, z, (1, 3), vae.init_decode_cache(TINY, 2, 2, 3), params)
  np.testing.assert_allclose(got, want, **EXACT)


def test_start_is_lively_and_keys_count():
  params = jax.jit(vae.init_params, static_argnums=1)(jax.random.key(0), TINY)
  jax.tree.map(
    lambda x, like: np.testing.assert_equal(x.shape, like.shape), params, vae.param_shapes(TINY)
  )
  mean, logvar = posterior(params, pixels(0, 2, 5, 8, 8, 3), TINY)
  assert 0.1 < mean.std() < 2 and -7 < logvar.mean() < -5
  assert 0.1 < decode_raw(params, normal(0, 2, 2, 1, 1, 16), TINY).std() < 2
  kernels = [
    np.ravel(x)[0]
    for path, x in jax.tree_util.tree_leaves_with_path(params)
    if path[-1].key == 'kernel' and path[-2].key != 'proj'
  ]
  assert len(set(map(float, kernels))) == len(kernels)


def test_norm_has_a_gradient_at_zero():
  norm, x = vae_layers.Norm('float32'), jnp.zeros((1, 1, 1, 1, 4))
  variables = norm.init(jax.random.key(0), x)
  # A root of the square would give NaN; the original's bound on the root gives a finite slope.
  assert np.isfinite(jax.grad(lambda x: norm.apply(variables, x).sum())(x)).all()


def test_bfloat16_follows_float32():
  cfg = dataclasses.replace(TINY, dtype='bfloat16')
  z = normal(0, 2, 4, 2, 3, 16)
  got, cache = decode_chunk(tiny_params(), z, vae.init_decode_cache(cfg, 2, 2, 3), cfg, True)
  assert got.dtype == jnp.float32 and {x.dtype.name for x in jax.tree.leaves(cache)} == {'bfloat16'}
  # 8 bits of mantissa, 2^-9 a rounding, over some 30 layers: a few percent.
  assert np.sqrt(np.mean((got - decode(tiny_params(), z, TINY)) ** 2)) < 0.05


def test_loss_is_its_formula():
  video, key, cfg = pixels(0, 2, 5, 8, 8, 3), jax.random.key(7), TINY
  got, parts = loss(tiny_params(), video, key, cfg)
  mean, logvar = (np.asarray(x, np.float64) for x in posterior(tiny_params(), video, cfg))
  z = mean + np.exp(logvar / 2) * np.asarray(jax.random.normal(key, mean.shape))
  error = np.asarray(decode_raw(tiny_params(), z.astype(np.float32), cfg), np.float64) - video
  theirs = torch.distributions.Normal(torch.tensor(mean), torch.tensor(np.exp(logvar / 2)))
  unit = torch.distributions.Normal(torch.zeros(1), torch.ones(1))
  kl = torch.distributions.kl_divergence(theirs, unit).numpy()
  want = {
    name: x.reshape(2, -1).mean(axis=1)
    for name, x in (('l1', np.abs(error)), ('mse', error**2), ('kl', kl))
  }
  assert parts.keys() == want.keys()
  # Float32 means of unit-scale numbers.
  for name in want:
    np.testing.assert_allclose(parts[name], want[name], rtol=1e-4, err_msg=name)
  total = want['mse'] + 0.7 * want['l1'] + 0.3 * want['kl']
  np.testing.assert_allclose(got, total, rtol=1e-4)


@pytest.mark.parametrize('logvar, clipped', [(1e4, 20), (-1e4, -30)])
def test_loss_clips_the_logarithm(logvar, clipped):
  bias = np.concatenate([np.zeros(16), np.full(16, logvar)]).astype(np.float32)
  kernel = np.zeros((1, 1, 1, 32, 32), np.float32)
  params = tiny_params() | {'conv1': {'kernel': kernel, 'bias': bias}}
  got, parts = loss(params, pixels(0, 2, 5, 8, 8, 3), jax.random.key(0), TINY)
  assert np.isfinite(got).all()
  np.testing.assert_allclose(parts['kl'], 0.5 * (np.exp(clipped) - 1 - clipped), rtol=1e-5)


def test_folded_statistics_normalise_and_change_nothing_else():
  x = pixels(0, 2, 9, 16, 24, 3)
  mean, logvar = posterior(tiny_params(), x, TINY)
  axes = (0, 1, 2, 3)
  folded = fold_statistics(tiny_params(), mean.mean(axes), mean.std(axes))
  z, folded_logvar = posterior(folded, x, TINY)
  np.testing.assert_allclose(z.mean(axes), np.zeros(16), atol=1e-5)
  np.testing.assert_allclose(z.std(axes), np.ones(16), rtol=1e-5)
  # A sample at the same noise is the same point of the old space, hence the same video.
  for deviations in (0, 1.5):
    old = decode_raw(tiny_params(), mean + deviations * jnp.exp(logvar / 2), TINY)
    new = decode_raw(folded, z + deviations * jnp.exp(folded_logvar / 2), TINY)
    # Rounding of latents as large as 5 through the decoder.
    np.testing.assert_allclose(new, old, rtol=0, atol=1e-4)


def test_a_dead_channel_cannot_be_folded():
  with pytest.raises(InputError, match='latent channels 3 never vary'):
    fold_statistics(tiny_params(), jnp.zeros(16), jnp.ones(16).at[3].set(0))
