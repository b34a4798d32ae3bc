"""Tiny models shared by the tests: every shape differs, and no parameter is zero."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from salt_jax.diffusion.rollout import Chunking
from salt_jax.models import wan

WAN = wan.WanConfig(
  dim=48, ffn_dim=80, heads=2, layers=3, text_dim=32, text_len=7, dtype='float32', remat=False
)
I2V = dataclasses.replace(WAN, in_channels=36, image_dim=20, image_len=5)
FLF2V = dataclasses.replace(I2V, image_len=514, image_positions=True)
FRAMES_ALONE = dataclasses.replace(WAN, in_channels=36)
LATENT = (4, 6, 16)
FRAMES, CHUNK, BATCH = 6, 2, 2
# salt_method.md 2.3, in labels before the shift: start -> {end: possible middles}.
TRIPLES = {
  1000: {750: {875}, 500: {875, 750, 625}},
  875: {500: {750, 625}, 250: {750, 625, 500, 375}},
  750: {500: {625}, 250: {625, 500, 375}},
  625: {250: {500, 375}, 0: {500, 375, 250, 125}},
  500: {250: {375}, 0: {375, 250, 125}},
  375: {0: {250, 125}},
  250: {0: {125}},
  125: {},
}


@functools.cache
def params(seed: int = 0, cfg: wan.WanConfig = WAN):
  """Random parameters with everything perturbed: zero heads and unit norms would hide mistakes."""
  rng = np.random.default_rng(seed)

  def noisy(path, x):
    centre = 1.0 if path[-1].key == 'weight' else 0.0
    spread = x.shape[-2] ** -0.5 if path[-1].key == 'kernel' else 0.1
    return (centre + spread * rng.standard_normal(x.shape)).astype(np.float32)

  return jax.tree_util.tree_map_with_path(noisy, wan.param_shapes(cfg))


def latents(seed: int, frames: int = FRAMES, batch: int = BATCH):
  return jax.random.normal(jax.random.key(seed), (batch, frames, *LATENT))


def text(seed: int = 9, batch: int = BATCH):
  rows = jax.random.normal(jax.random.key(seed), (batch, WAN.text_len, WAN.text_dim))
  return rows.at[:, 5:].set(0.0)


def prompt(cfg: wan.WanConfig = WAN, seed: int = 9, batch: int = BATCH) -> wan.Prompt:
  """Text, and image rows and frames where the model takes them; rows so small that a norm's eps shows."""
  image, frames = jax.random.split(jax.random.key(seed))
  rows = (batch, cfg.image_len, cfg.image_dim)
  shape = (batch, FRAMES, *LATENT[:2], cfg.frame_channels)
  return wan.Prompt(
    text=text(seed, batch),
    image=0.02 * jax.random.normal(image, rows) if cfg.image_dim else None,
    frames=jax.random.normal(frames, shape) if cfg.frame_channels else None,
  )


def levels(seed: int, frames: int = FRAMES, batch: int = BATCH):
  """An own timestep for every frame."""
  return 1000 * jax.random.uniform(jax.random.key(seed), (batch, frames))


def chunking(**changes) -> Chunking:
  tokens = LATENT[0] * LATENT[1] // 4
  cache = (WAN.layers, tokens, WAN.heads, WAN.head_dim)
  base = Chunking(frames=FRAMES, chunk=CHUNK, latent=LATENT, cache=cache, dtype='float32')
  return dataclasses.replace(base, **changes)


def keys(batch: int = BATCH, seed: int = 3):
  return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(batch))
