"""Wan 2.1's video VAE: causal in time, 4x smaller in time and 8x in space.

The first frame stands alone, so 1 + 4n frames make 1 + n latents. Frames, and latents, can be given
at once or chunk by chunk with the same result.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from salt_jax.errors import InputError
from salt_jax.models import modules
from salt_jax.models import vae_layers as part

WAN_MEAN = (
  -0.7571,
  -0.7089,
  -0.9113,
  0.1075,
  -0.1745,
  0.9653,
  -0.1517,
  1.5508,
  0.4134,
  -0.0715,
  0.5517,
  -0.3632,
  -0.1922,
  -0.9497,
  0.2503,
  -0.2921,
)
WAN_STD = (
  2.8184,
  1.4541,
  2.3275,
  2.6558,
  1.2196,
  1.7708,
  2.6052,
  2.0743,
  3.2687,
  2.1526,
  2.8652,
  1.5579,
  1.6382,
  1.1253,
  2.8251,
  1.9160,
)


@dataclasses.dataclass(frozen=True)
class VAEConfig:
  """Sizes; hashable, so it is static under jit.

  Attributes:
    dim: width at full resolution.
    z_dim: channels of a latent.
    dim_mult: width at each resolution in units of `dim`, finest first.
    num_res_blocks: residual blocks at a resolution of the encoder; the decoder has one more.
    temporal_downsample: for each halving of space, whether time is halved too.
    latent_mean: of each channel; `encode` subtracts it.
    latent_std: of each channel; `encode` divides by it.
    dtype: compute type; parameters, norms, softmax and results are float32.
  """

  dim: int
  z_dim: int
  dim_mult: tuple[int, ...]
  num_res_blocks: int
  temporal_downsample: tuple[bool, ...]
  latent_mean: tuple[float, ...]
  latent_std: tuple[float, ...]
  dtype: str = 'float32'

  def __post_init__(self):
    if len(self.temporal_downsample) != len(self.dim_mult) - 1:
      raise InputError(
        f'vae.temporal_downsample must hold {len(self.dim_mult) - 1} flags, one '
        'fewer than dim_mult has widths.'
      )
    if not len(self.latent_mean) == len(self.latent_std) == self.z_dim:
      raise InputError(
        f'vae.latent_mean and vae.latent_std must hold {self.z_dim} numbers each, as many as z_dim.'
      )

  @property
  def time(self) -> int:
    """Frames to a latent, behind the first."""
    return 2 ** sum(self.temporal_downsample)

  @property
  def space(self) -> int:
    """Pixels to a latent along each side."""
    return 2 ** len(self.temporal_downsample)


def wan_vae() -> VAEConfig:
  """Wan 2.1's, which the original runs in float32."""
  return VAEConfig(
    dim=96,
    z_dim=16,
    dim_mult=(1, 2, 4, 4),
    num_res_blocks=2,
    temporal_downsample=(False, True, True),
    latent_mean=WAN_MEAN,
    latent_std=WAN_STD,
  )


def nano_vae() -> VAEConfig:
  """The miniature, with its statistics folded into its weights."""
  return dataclasses.replace(wan_vae(), dim=8, latent_mean=(0.0,) * 16, latent_std=(1.0,) * 16)


class Encoder(modules.Module):
  cfg: VAEConfig

  @nn.compact
  def __call__(self, x, past):
    cfg, layers = self.cfg, []
    widths = [cfg.dim * mult for mult in cfg.dim_mult]
    for width, temporal in zip(widths, (*cfg.temporal_downsample, None), strict=True):
      for _ in range(cfg.num_res_blocks):
        layers.append(part.Residual(width, cfg.dtype, name=f'downsamples_{len(layers)}'))
      if temporal is not None:
        layers.append(part.Down(temporal, cfg.dtype, name=f'downsamples_{len(layers)}'))
    layers += part.middle(widths[-1], cfg.dtype)
    return part.through(layers, (cfg.dim, 2 * cfg.z_dim), cfg.dtype, x, past)


class Decoder(modules.Module):
  cfg: VAEConfig

  @nn.compact
  def __call__(self, x, past):
    cfg, layers = self.cfg, []
    widths = [cfg.dim * mult for mult in reversed(cfg.dim_mult)]
    for width, temporal in zip(widths, (*reversed(cfg.temporal_downsample), None), strict=True):
      for _ in range(cfg.num_res_blocks + 1):
        layers.append(part.Residual(width, cfg.dtype, name=f'upsamples_{len(layers)}'))
      if temporal is not None:
        layers.append(part.Up(temporal, cfg.dtype, name=f'upsamples_{len(layers)}'))
    layers = part.middle(widths[0], cfg.dtype) + layers
    return part.through(layers, (widths[0], 3), cfg.dtype, x, past)


class VAE(modules.Module):
  """Both halves; latents here are as the network makes them, not normalised."""

  cfg: VAEConfig

  def setup(self):
    self.encoder, self.decoder = Encoder(self.cfg), Decoder(self.cfg)
    self.conv1 = part.pointwise(2 * self.cfg.z_dim, self.cfg.dtype, None)
    self.conv2 = part.pointwise(self.cfg.z_dim, self.cfg.dtype, None)

  def encode(self, x, past):
    x, past = self.encoder(x.astype(self.cfg.dtype), past)
    mean, logvar = jnp.split(self.conv1(x).astype(jnp.float32), 2, axis=-1)
    return mean, logvar, past

  def decode(self, z, past):
    x, past = self.decoder(self.conv2(z.astype(self.cfg.dtype)), past)
    return x.astype(jnp.float32), past

  def both(self, x):
    return self.decode(self.encode(x, None)[0], None)


def param_shapes(cfg: VAEConfig) -> dict:
  """Shapes of the parameters, allocating nothing."""
  shape = (1, 1 + cfg.time, cfg.space, cfg.space, 3)
  init = functools.partial(VAE(cfg).init, method='both')
  return jax.eval_shape(init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))['params']


def init_params(key: PRNGKeyArray, cfg: VAEConfig) -> dict:
  """Random float32 parameters: each convolution keeps the variance, attention starts as nothing.

  The posterior starts narrow (log-variance -6): noise as wide as the signal would hide it from the
  decoder at first.
  """
  leaves, tree = jax.tree_util.tree_flatten_with_path(param_shapes(cfg))
  ends = np.cumsum([leaf.size for _, leaf in leaves])
  # One draw, kept whole by the barrier: XLA takes most of a minute to compile a hundred.
  noise = jax.lax.optimization_barrier(jax.random.normal(key, (ends[-1],)))
  return tree.unflatten(
    [
      _initial(path, noise[end - leaf.size : end].reshape(leaf.shape))
      for (path, leaf), end in zip(leaves, ends, strict=True)
    ]
  )


def _initial(path, noise):
  name, above = path[-1].key, path[-2].key
  if name == 'gamma':
    return jnp.ones_like(noise)
  if [key.key for key in path] == ['conv1', 'bias']:
    return jnp.where(jnp.arange(noise.size) < noise.size // 2, 0.0, -6.0)
  if name == 'bias' or above == 'proj':
    return jnp.zeros_like(noise)
  return noise * (noise.size // noise.shape[-1]) ** -0.5


def _check_video(shape, cfg: VAEConfig, first: bool):
  _, frames, height, width, _ = shape
  if (frames - first) % cfg.time:
    rule = f'1 + {cfg.time}n' if first else f'a multiple of {cfg.time}'
    near = first + cfg.time * max((frames - first) // cfg.time, 1 - first)
    raise InputError(
      f'a video of {frames} frames cannot be encoded: the number of frames must be '
      f'{rule}, such as {near}.'
    )
  if height % cfg.space or width % cfg.space:
    raise InputError(
      f'a video of {height}x{width} pixels cannot be encoded: both sides must be '
      f'multiples of {cfg.space}.'
    )


def _check_latents(shape, cfg: VAEConfig):
  if shape[-1] != cfg.z_dim:
    raise InputError(
      f'latents of {shape[-1]} channels cannot be decoded: this VAE has {cfg.z_dim}.'
    )


def _statistics(cfg: VAEConfig):
  mean, std = np.float32(cfg.latent_mean), np.float32(cfg.latent_std)
  return mean[None, None, None, None], std[None, None, None, None]


def posterior(
  params: PyTree, video: Float[Array, 'b t h w 3'], cfg: VAEConfig
) -> tuple[Float[Array, 'b f h w z'], Float[Array, 'b f h w z']]:
  """Mean and log-variance of the latents, not normalised.

  Args:
    params: as `init_params` makes them; paths are Wan's own names.
    video: pixels in [-1, 1].
    cfg: sizes.

  Raises:
    InputError: frames that are not 1 + 4n, or sides that are not multiples of 8.
  """
  _check_video(video.shape, cfg, True)
  return VAE(cfg).apply({'params': params}, video, None, method='encode')[:2]


def encode(
  params: PyTree, video: Float[Array, 'b t h w 3'], cfg: VAEConfig
) -> Float[Array, 'b f h w z']:
  """Normalised latents of 1 + 4n frames: (posterior mean - latent_mean) / latent_std.

  Raises:
    InputError: as for `posterior`.
  """
  mean, std = _statistics(cfg)
  return (posterior(params, video, cfg)[0] - mean) / std


def decode_raw(
  params: PyTree, latents: Float[Array, 'b f h w z'], cfg: VAEConfig
) -> Float[Array, 'b t h w 3']:
  """Video of latents as `posterior` gives them, not clamped: what a loss compares.

  Raises:
    InputError: latents of another number of channels.
  """
  _check_latents(latents.shape, cfg)
  return VAE(cfg).apply({'params': params}, latents, None, method='decode')[0]


def decode(
  params: PyTree, latents: Float[Array, 'b f h w z'], cfg: VAEConfig
) -> Float[Array, 'b t h w 3']:
  """Video in [-1, 1] of normalised latents: 1 + 4 (f - 1) frames.

  Raises:
    InputError: latents of another number of channels.
  """
  return decode_chunk(params, latents, {}, cfg, True)[0]


def decode_chunk(
  params: PyTree, latents: Float[Array, 'b f h w z'], cache: PyTree, cfg: VAEConfig, first: bool
) -> tuple[Float[Array, 'b t h w 3'], PyTree]:
  """The next part of a video.

  Args:
    params: parameters.
    latents: any number of normalised latents.
    cache: of `init_decode_cache`, or of the call before; its shapes never change.
    cfg: sizes.
    first: static; starts a new video, whatever `cache` holds.

  Returns:
    Frames in [-1, 1], 4 a latent but 1 for the first, and the cache for the next call.

  Raises:
    InputError: latents of another number of channels.
  """
  _check_latents(latents.shape, cfg)
  mean, std = _statistics(cfg)
  past = None if first else cache
  video, cache = VAE(cfg).apply({'params': params}, latents * std + mean, past, method='decode')
  return jnp.clip(video, -1, 1), cache


def encode_chunk(
  params: PyTree, video: Float[Array, 'b t h w 3'], cache: PyTree, cfg: VAEConfig, first: bool
) -> tuple[Float[Array, 'b f h w z'], PyTree]:
  """Latents of the next part of a video: of 1 + 4n frames if it is the first, else of 4n.

  Arguments and returns as for `decode_chunk`.

  Raises:
    InputError: another number of frames, or sides that are not multiples of 8.
  """
  _check_video(video.shape, cfg, first)
  mean, std = _statistics(cfg)
  past = None if first else cache
  latents, _, cache = VAE(cfg).apply({'params': params}, video, past, method='encode')
  return (latents - mean) / std, cache


def _empty(call, cfg: VAEConfig, shape: tuple[int, ...]) -> PyTree:
  start = functools.partial(call, cache={}, cfg=cfg, first=True)
  shapes = jax.eval_shape(start, param_shapes(cfg), jax.ShapeDtypeStruct(shape, jnp.float32))[1]
  return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def init_decode_cache(cfg: VAEConfig, batch: int, h: int, w: int) -> PyTree:
  """What `decode_chunk` carries for latents of h by w: two frames a convolution, all zeros."""
  return _empty(decode_chunk, cfg, (batch, 1, h, w, cfg.z_dim))


def init_encode_cache(cfg: VAEConfig, batch: int, h: int, w: int) -> PyTree:
  """What `encode_chunk` carries for frames of h by w pixels, all zeros."""
  return _empty(encode_chunk, cfg, (batch, 1, h, w, 3))
