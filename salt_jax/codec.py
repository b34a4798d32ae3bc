"""Videos to latents and back, part by part: a whole video of a real size would hold several activations of 6 GB.

Between parts the causal convolutions carry their last two frames on, so a video in parts is the whole video but for the
order of float32 sums. There is no spatial tiling: the VAE attends over a whole frame, so that tiles, which the original
does not have either, could only approximate it (wan.md 3.6).
"""

import functools
from collections.abc import Callable, Iterable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree, UInt8

from salt_jax.models import vae
from salt_jax.recipe import Recipe
from salt_jax.step import to_bytes, to_unit

POSITIONS = (
  2**13
)  # latent positions in a part: one frame of 480x832 has 6,240, all of a nano clip 1,344


def latents_at_once(rows: int, columns: int) -> int:
  """Latent frames in a part; at least one."""
  return max(1, POSITIONS // (rows * columns))


@functools.partial(jax.jit, static_argnames=('cfg', 'first'), donate_argnames='features')
def decode_part(params, latents, features, cfg, first):
  """The program of `decode`: uint8 frames of some latents, and what the decoder carries on."""
  pixels, features = vae.decode_chunk(params, latents, features, cfg, first)
  return to_bytes(pixels), features


@functools.partial(jax.jit, static_argnames=('cfg', 'first'), donate_argnames='features')
def _encode_part(params, pixels, features, cfg, first):
  return vae.encode_chunk(params, pixels, features, cfg, first)


def decode(
  params: PyTree, latents: Float[Array, 'b f h w z'], cfg: vae.VAEConfig, part: int = 0
) -> UInt8[np.ndarray, 'b t h w 3']:
  """Video in uint8, quantised on the device.

  Args:
    params: of the VAE.
    latents: normalised; all clips are decoded at once.
    cfg: sizes.
    part: latent frames at once, by default what `latents_at_once` says.
  """
  part = part or latents_at_once(*latents.shape[2:4])
  features, parts = {}, []
  for start in range(0, latents.shape[1], part):
    some = latents[:, start : start + part]
    pixels, features = decode_part(params, some, features, cfg, start == 0)
    parts.append(np.asarray(pixels))
  return np.concatenate(parts, axis=1)


def encode_parts(
  params: PyTree, parts: Iterable[Float[Array, 'b t h w 3']], cfg: vae.VAEConfig
) -> Float[Array, 'b f h w z']:
  """Normalised latents of a video that comes in parts: 1 + 4n frames, then 4n each, pixels in [-1, 1].

  Raises:
    InputError: another number of frames, or sides that are not multiples of 8.
  """
  features, made = {}, []
  for number, pixels in enumerate(parts):
    latents, features = _encode_part(params, pixels, features, cfg, number == 0)
    made.append(latents)
  return jnp.concatenate(made, axis=1)


def encode(
  params: PyTree, video: UInt8[Array, 'b t h w 3'], cfg: vae.VAEConfig, part: int = 0
) -> Float[Array, 'b f h w z']:
  """Normalised latents of a uint8 video of 1 + 4n frames; `part` as for `decode`.

  Raises:
    InputError: as for `encode_parts`.
  """
  parts = (to_unit(video[:, a:b]) for a, b in spans(video.shape, cfg, part))
  return encode_parts(params, parts, cfg)


def encode_known(
  params: PyTree,
  images: UInt8[Array, 'b 1 h w 3'] | Float[Array, 'b 1 h w 3'],
  frames: int,
  cfg: vae.VAEConfig,
  part: int = 0,
) -> Float[Array, 'b f h w z']:
  """Normalised latents of a video that is mid-grey behind its first frame, of levels 0 .. 255 (wan.md 5.5)."""
  shape = images.shape[0], frames, *images.shape[2:]

  def parts():
    for start, end in spans(shape, cfg, part):
      grey = jnp.zeros((shape[0], end - max(start, 1), *shape[2:]), jnp.float32)
      yield grey if start else jnp.concatenate([to_unit(images), grey], axis=1)

  return encode_parts(params, parts(), cfg)


def spans(shape: tuple[int, ...], cfg: vae.VAEConfig, part: int = 0) -> Iterator[tuple[int, int]]:
  """Frames (from, to) of the parts that a video `[b t h w 3]` is encoded in."""
  _, frames, height, width, _ = shape
  part = part or latents_at_once(height // cfg.space, width // cfg.space)
  start, end = 0, 1 + cfg.time * (part - 1)
  while start < frames:
    yield start, min(end, frames)
    start, end = end, end + cfg.time * part


def decoder(
  rec: Recipe, params: PyTree
) -> Callable[[Float[Array, 'b f h w c']], UInt8[np.ndarray, 'b t h w 3']]:
  """Latents to uint8 video, one clip at a time on the device."""
  return lambda latents: np.concatenate([decode(params, z[None], rec.vae) for z in latents])
