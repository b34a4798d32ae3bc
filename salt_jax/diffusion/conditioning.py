"""The input channels by which a DiT is given frames of the clip: the first (I2V), or first and last (FLF2V).

The known pixel frames stand in a video that is grey elsewhere, which the VAE encodes as any other. Before its latents
go four channels of mask, one for each pixel frame of a latent frame (wan.md 5.5): the first latent frame holds one
pixel frame, which counts four times.
"""

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from salt_jax.errors import InputError

FOLD = 4  # pixel frames to a latent frame, behind the first
FIRST, FIRST_AND_LAST = (0,), (0, -1)
KNOWN = {1: FIRST, 2: FIRST_AND_LAST}  # by how many pictures a network is given


def known_video(
  images: Float[Array, 'b k h w c'], frames: int, known: tuple[int, ...] = FIRST
) -> Float[Array, 'b t h w c']:
  """A video of the known frames, and mid-grey.

  Args:
    images: pixels in [-1, 1], one image a known frame.
    frames: of the video.
    known: where the images belong; -1 is the last frame.

  Raises:
    InputError: another number of images than places.
  """
  if images.shape[1] != len(known):
    raise InputError(f'{images.shape[1]} images cannot be {len(known)} frames of a video.')
  grey = jnp.zeros((images.shape[0], frames, *images.shape[2:]), images.dtype)
  return grey.at[:, np.array(known)].set(images)


def known_mask(latent_frames: int, known: tuple[int, ...] = FIRST) -> Float[np.ndarray, 'f four']:
  """1 for the pixel frames that are known, folded by `FOLD` as the VAE folds them."""
  pixels = np.zeros(1 + FOLD * (latent_frames - 1), np.float32)
  pixels[list(known)] = 1
  return rearrange(
    np.append(np.repeat(pixels[:1], FOLD), pixels[1:]), '(f four) -> f four', four=FOLD
  )


def condition(
  latents: Float[Array, 'b f h w z'], known: tuple[int, ...] = FIRST
) -> Float[Array, 'b f h w c']:
  """`Prompt.frames`: four channels of mask, then the latents.

  Args:
    latents: normalised latents of `known_video`.
    known: the same places.
  """
  mask = jnp.asarray(known_mask(latents.shape[1], known))[None, :, None, None]
  mask = jnp.broadcast_to(mask, (*latents.shape[:-1], FOLD))
  return jnp.concatenate([mask, latents.astype(jnp.float32)], axis=-1)
