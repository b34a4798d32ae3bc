"""What a clip is conditioned on besides its noise: text, the image rows of a CLIP tower, given frames."""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from salt_jax.errors import InputError


@struct.dataclass
class Prompt:
  """Conditions of a batch of clips.

  Attributes:
    text: encoder rows, zero behind the prompt.
    image: rows of the CLIP tower, for two images one behind the other; None if the model has no such input.
    frames: input channels behind the latents, of the whole clip whatever part of it a pass sees
      (`diffusion.conditioning`); None for T2V.
  """

  text: Float[Array, 'b n d']
  image: Float[Array, 'b i e'] | None = None
  frames: Float[Array, 'b f h w c'] | None = None


def check(prompt: Prompt, image_len: int, frame_channels: int) -> None:
  """Compares a prompt with what a model takes; 0 is none.

  Raises:
    InputError: for less or more.
  """
  rows = 0 if prompt.image is None else prompt.image.shape[1]
  if rows != image_len:
    raise InputError(f'the model takes {image_len} image rows but the prompt has {rows}.')
  channels = 0 if prompt.frames is None else prompt.frames.shape[-1]
  if channels != frame_channels:
    raise InputError(
      f'the model takes frames of {frame_channels} channels but the prompt has {channels}.'
    )


def frames_behind(
  x: Float[Array, 'b f h w c'], prompt: Prompt, start: int | Int[Array, ''] | None
) -> Float[Array, 'b f h w d']:
  """Latents and, behind them on channels, the prompt's frames of the same place in the clip.

  Args:
    x: noisy latents.
    prompt: with frames of the whole clip, or without.
    start: absolute index of the first frame of x; None says that x is the whole clip. An array is not checked.

  Raises:
    InputError: if the prompt is of a clip of another length.
  """
  frames, count = prompt.frames, x.shape[1]
  if frames is None:
    return x
  if isinstance(start, int):
    frames = frames[:, start : start + count]
  elif start is not None:
    frames = jax.lax.dynamic_slice_in_dim(frames, start, count, axis=1)
  if frames.shape[1] != count:
    raise InputError(
      f"{count} latent frames from frame {start or 0} on do not fit the prompt's {prompt.frames.shape[1]}."
    )
  return jnp.concatenate([x, frames.astype(x.dtype)], axis=-1)
