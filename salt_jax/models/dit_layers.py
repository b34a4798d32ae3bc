"""Layers of the DiT that know nothing of frames: norms, projections, embeddings of time and of image rows.

Norms have float32 statistics; projections run in the model's dtype unless told otherwise.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float

from salt_jax.models import modules

PATCH = 2  # rows, and columns, of latents to a token


def layer_norm(x: Float[Array, '... d'], eps: float) -> Float[Array, '... d']:
  """LayerNorm without parameters, statistics in float32, result in float32."""
  x = x.astype(jnp.float32)
  centred = x - x.mean(-1, keepdims=True)
  return centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + eps)


def sinusoid(t: Float[Array, 'b f'], dim: int) -> Float[Array, 'b f {dim}']:
  """Time embedding of t in [0, 1000]: cosines first, then sines, frequencies 10000**(-i / (dim/2))."""
  frequencies = 10000.0 ** (-np.arange(dim // 2, dtype=np.float64) / (dim // 2))
  angles = t.astype(jnp.float32)[..., None] * jnp.asarray(frequencies, jnp.float32)
  return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class RMSNorm(modules.Module):
  """RMS over the whole width, before the head split; the weight multiplies after the cast back."""

  eps: float

  @nn.compact
  def __call__(self, x):
    weight = self.param('weight', nn.initializers.ones, (x.shape[-1],))
    x32 = x.astype(jnp.float32)
    x32 = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + self.eps)
    return x32.astype(x.dtype) * weight


class AffineLayerNorm(modules.Module):
  """`layer_norm` with weight and bias."""

  eps: float

  @nn.compact
  def __call__(self, x):
    weight = self.param('weight', nn.initializers.ones, (x.shape[-1],))
    bias = self.param('bias', nn.initializers.zeros, (x.shape[-1],))
    return layer_norm(x, self.eps) * weight + bias


def project(features: int, cfg, name: str, std: float | None = None, dtype=None) -> modules.Dense:
  """A dense layer in `cfg.dtype`: Xavier uniform, or normal with `std`."""
  init = nn.initializers.xavier_uniform() if std is None else nn.initializers.normal(std)
  return modules.Dense(features, dtype=dtype or cfg.dtype, kernel_init=init, name=name)


class ImageEmbedding(modules.Module):
  """CLIP rows to the model's width (wan.md 1.9): eps 1e-5, and the exact GELU."""

  cfg: object

  @nn.compact
  def __call__(self, rows):
    cfg = self.cfg
    if cfg.image_positions:
      shape = (1, cfg.image_len, cfg.image_dim)
      rows = rows + self.param('emb_pos', nn.initializers.zeros, shape)
    h = project(cfg.image_dim, cfg, 'proj_1')(AffineLayerNorm(1e-5, name='proj_0')(rows))
    h = project(cfg.dim, cfg, 'proj_3')(jax.nn.gelu(h, approximate=False))
    return AffineLayerNorm(1e-5, name='proj_4')(h)


class Head(modules.Module):
  """Modulated norm and the patches of the velocity (wan.md 1.7)."""

  cfg: object

  @nn.compact
  def __call__(self, x, time):
    cfg = self.cfg
    modulation = self.param('modulation', nn.initializers.normal(cfg.dim**-0.5), (1, 2, cfg.dim))
    shift, scale = jnp.split(modulation[:, None] + time[:, :, None], 2, axis=2)
    h = layer_norm(x, cfg.eps) * (1 + scale) + shift
    out = modules.Dense(
      cfg.out_channels * PATCH**2, dtype=jnp.float32, kernel_init=nn.initializers.zeros, name='head'
    )
    return out(h)
