"""CLIP's vision tower as Wan 2.1's image-to-video uses it (wan.md 4.6): a pre-norm ViT, read before its last block.

Its parameters are the whole tower of the published file; the last block, `post_norm` and `head` make the embedding of
CLIP itself, which Wan does not ask for. Norms, softmax and the residual stream are float32, projections run in
`ClipConfig.dtype`.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jaxtyping import Array, Float, PRNGKeyArray

from salt_jax.errors import InputError
from salt_jax.models import modules
from salt_jax.models.wan import AffineLayerNorm


@dataclasses.dataclass(frozen=True)
class ClipConfig:
  """Sizes of a tower and its compute type; hashable, so it is static under jit."""

  size: int
  patch: int
  dim: int
  mlp_dim: int
  heads: int
  layers: int
  out_dim: int
  eps: float = 1e-5
  dtype: str = 'float32'

  def __post_init__(self):
    if self.dim % self.heads:
      raise InputError(f'clip.dim {self.dim} does not divide into {self.heads} heads.')
    if self.size % self.patch:
      raise InputError(f'clip.size {self.size} does not divide into patches of {self.patch}.')

  @property
  def rows(self) -> int:
    """The class token, and one row a patch."""
    return 1 + (self.size // self.patch) ** 2


def vit_h_14() -> ClipConfig:
  return ClipConfig(size=224, patch=14, dim=1280, mlp_dim=5120, heads=16, layers=32, out_dim=1024)


def _dense(features: int, cfg: ClipConfig, name: str) -> modules.Dense:
  return modules.Dense(
    features, dtype=cfg.dtype, kernel_init=nn.initializers.normal(0.02), name=name
  )


class Attention(modules.Module):
  cfg: ClipConfig

  @nn.compact
  def __call__(self, x):
    cfg = self.cfg
    qkv = _dense(3 * cfg.dim, cfg, 'to_qkv')(x)
    q, k, v = rearrange(qkv, 'b n (three h d) -> three b n h d', three=3, h=cfg.heads)
    logits = jnp.einsum('b q h d, b k h d -> b h q k', q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits * q.shape[-1] ** -0.5, axis=-1).astype(cfg.dtype)
    out = rearrange(jnp.einsum('b h q k, b k h d -> b q h d', weights, v), 'b n h d -> b n (h d)')
    return _dense(cfg.dim, cfg, 'proj')(out)


class Block(modules.Module):
  cfg: ClipConfig

  @nn.compact
  def __call__(self, x, _):
    cfg = self.cfg
    x = x + Attention(cfg, name='attn')(AffineLayerNorm(cfg.eps, name='norm1')(x))
    h = _dense(cfg.mlp_dim, cfg, 'mlp_0')(AffineLayerNorm(cfg.eps, name='norm2')(x))
    return x + _dense(cfg.dim, cfg, 'mlp_2')(jax.nn.gelu(h, approximate=False)), None


class VisionTower(modules.Module):
  """Pixels `[b h w 3]` to (the rows behind `depth` blocks, the embedding of their class token)."""

  cfg: ClipConfig
  depth: int

  @nn.compact
  def __call__(self, pixels):
    cfg, small = self.cfg, nn.initializers.normal(self.cfg.dim**-0.5)
    patches = modules.Conv(
      cfg.dim,
      (cfg.patch, cfg.patch),
      strides=cfg.patch,
      padding='VALID',
      use_bias=False,
      dtype=cfg.dtype,
      name='patch_embedding',
    )(pixels)
    x = rearrange(patches, 'b h w d -> b (h w) d').astype(jnp.float32)
    first = self.param('cls_embedding', small, (1, 1, cfg.dim))
    x = jnp.concatenate([jnp.broadcast_to(first, (x.shape[0], 1, cfg.dim)), x], axis=1)
    x = x + self.param('pos_embedding', small, (1, cfg.rows, cfg.dim))
    x = AffineLayerNorm(cfg.eps, name='pre_norm')(x)
    blocks = nn.scan(
      Block,
      variable_axes={'params': 0},
      split_rngs={'params': True},
      length=self.depth,
      check_constancy_invariants=False,
    )
    x, _ = blocks(cfg, name='transformer')(x, None)
    head = self.param('head', small, (cfg.dim, cfg.out_dim))
    return x, AffineLayerNorm(cfg.eps, name='post_norm')(x[:, 0]) @ head


def encode(
  params: dict, pixels: Float[Array, 'b h w 3'], cfg: ClipConfig
) -> Float[Array, 'b rows d']:
  """Rows behind the last block but one, class token first, float32: `Prompt.image`.

  Args:
    params: as `init_params` makes them; paths are Wan's own names behind 'visual.'.
    pixels: as `images.clip_pixels` makes them.
    cfg: sizes.
  """
  cut = params | {'transformer': jax.tree.map(lambda p: p[:-1], params['transformer'])}
  return VisionTower(cfg, cfg.layers - 1).apply({'params': cut}, pixels)[0]


def init_params(key: PRNGKeyArray, cfg: ClipConfig) -> dict:
  """Random float32 parameters."""
  pixels = jnp.zeros((1, cfg.size, cfg.size, 3))
  return VisionTower(cfg, cfg.layers).init(key, pixels)['params']


def param_shapes(cfg: ClipConfig) -> dict:
  """Shapes of the parameters, allocating nothing."""
  return jax.eval_shape(functools.partial(init_params, cfg=cfg), jax.random.key(0))
