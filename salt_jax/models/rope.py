"""Rotary position embedding over (frame, row, column), as in Wan 2.1.

The head width d is divided into three axes of widths d - 4*(d//6), 2*(d//6), 2*(d//6). Pair i of an axis of
width w turns by `position * 10000**(-2i/w)`; pairs are neighbouring elements (2i, 2i+1). Tables are made in
float64 on the host, so a dynamic first frame costs a slice and no precision.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int

MAX_FRAMES = 4096
_THETA = 10000.0


def axis_widths(head_dim: int) -> tuple[int, int, int]:
  """Real widths (frame, row, column) of one head; they sum to `head_dim`."""
  side = 2 * (head_dim // 6)
  return head_dim - 2 * side, side, side


@functools.cache
def _angles(positions: int, width: int) -> np.ndarray:
  """Angles `[positions, width // 2]` in float64."""
  frequencies = _THETA ** (-np.arange(0, width, 2, dtype=np.float64) / width)
  return np.arange(positions, dtype=np.float64)[:, None] * frequencies


def table(
  grid: tuple[int, int, int], head_dim: int, start: int | Int[Array, ''] = 0
) -> Float[Array, 'two f hw pair']:
  """Cosines and sines of every token of a clip.

  Args:
    grid: (frames, rows, columns) in patch units.
    head_dim: width of one head.
    start: absolute index of the first frame; an array does not recompile. `start + frames` may not exceed
      `MAX_FRAMES`, which callers check where the length is known.

  Returns:
    `[2, f, h*w, head_dim // 2]` float32, cosines first.
  """
  f, h, w = grid
  wf, wh, ww = axis_widths(head_dim)

  def cos_sin(angles):
    return jnp.asarray(np.stack([np.cos(angles), np.sin(angles)]), jnp.float32)

  frame = jax.lax.dynamic_slice_in_dim(cos_sin(_angles(MAX_FRAMES, wf)), start, f, axis=1)
  parts = [
    jnp.broadcast_to(frame[:, :, None, None], (2, f, h, w, wf // 2)),
    jnp.broadcast_to(cos_sin(_angles(h, wh))[:, None, :, None], (2, f, h, w, wh // 2)),
    jnp.broadcast_to(cos_sin(_angles(w, ww))[:, None, None, :], (2, f, h, w, ww // 2)),
  ]
  return rearrange(jnp.concatenate(parts, -1), 'two f h w pair -> two f (h w) pair')


def rotate(
  x: Float[Array, 'b f t n d'], cos_sin: Float[Array, 'two f t pair']
) -> Float[Array, 'b f t n d']:
  """Turns neighbouring pairs of the last axis; float32 inside and out."""
  cos, sin = cos_sin[:, None, :, :, None]
  pairs = rearrange(x.astype(jnp.float32), '... (pair two) -> ... pair two', two=2)
  a, b = pairs[..., 0], pairs[..., 1]
  turned = jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1)
  return rearrange(turned, '... pair two -> ... (pair two)')
