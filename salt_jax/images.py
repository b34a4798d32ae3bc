"""Pictures on their way to the VAE and to CLIP, resized as torch does it for Wan 2.1 (wan.md 4.6, 5.5)."""

import functools
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

CUBIC = -0.75  # torch's; jax.image.resize has -0.5, and blurs what it makes smaller
MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
STRIDE, PATCH = 8, 2  # of the VAE and the DiT


def _cubic(x: np.ndarray) -> np.ndarray:
  """Keys' cubic convolution kernel with a = `CUBIC`."""
  x, a = np.abs(x), CUBIC
  near = ((a + 2) * x - (a + 3)) * x * x + 1
  far = a * (((x - 5) * x + 8) * x - 4)
  return np.where(x <= 1, near, np.where(x < 2, far, 0))


def _weights(before: int, after: int) -> np.ndarray:
  """float32 `[after before]` of a resize along one axis: four taps around a pixel's centre, edges repeated."""
  centre = (np.arange(after) + 0.5) * (before / after) - 0.5
  taps = np.floor(centre).astype(int)[:, None] + np.arange(-1, 3)
  weights = np.zeros((after, before))
  rows = np.broadcast_to(np.arange(after)[:, None], taps.shape)
  np.add.at(weights, (rows, np.clip(taps, 0, before - 1)), _cubic(centre[:, None] - taps))
  return weights.astype(np.float32)


def bicubic(
  images: Float[Array | np.ndarray, '... h w c'], size: tuple[int, int]
) -> Float[Array | np.ndarray, '... rows columns c']:
  """Resizes to (rows, columns) without antialiasing and without clamping: values may leave their range.

  What is in NumPy stays there: photos all differ in size, and JAX would compile for each.
  """
  rows, columns = (_weights(*pair) for pair in zip(images.shape[-3:-1], size, strict=True))
  product = functools.partial(jnp.einsum, precision='highest')
  if isinstance(images, np.ndarray):
    # Without optimize it sums one by one.
    product = functools.partial(np.einsum, optimize=True)
  images = product('r h, ... h w c -> ... r w c', rows, images)
  return product('q w, ... r w c -> ... r q c', columns, images)


def clip_pixels(
  images: Float[Array | np.ndarray, 'b h w 3'], size: int
) -> Float[Array | np.ndarray, 'b n n 3']:
  """What the tower is given of pictures in [-1, 1]: squeezed to a square whatever their shape, then normalised."""
  squares = bicubic(images, (size, size)) * 0.5 + 0.5
  return (squares - np.array(MEAN, np.float32)) / np.array(DEVIATION, np.float32)


def resized(
  pictures: Sequence[UInt8[np.ndarray, 'h w 3']], size: tuple[int, int]
) -> Float[np.ndarray, '1 k rows columns 3']:
  """Pictures as the known frames of a clip of (rows, columns), of levels 0 .. 255 but for `bicubic`."""
  return np.stack([bicubic(picture.astype(np.float32), size) for picture in pictures])[None]


def cropped(picture: UInt8[np.ndarray, 'h w c'], size: tuple[int, int]) -> UInt8[np.ndarray, '...']:
  """The middle of a picture in the shape of (rows, columns), as large as it can be."""
  height, width = picture.shape[:2]
  rows = min(height, max(1, round(width * size[0] / size[1])))
  columns = min(width, max(1, round(height * size[1] / size[0])))
  top, left = (height - rows) // 2, (width - columns) // 2
  return picture[top : top + rows, left : left + columns]


def video_size(height: int, width: int, area: int) -> tuple[int, int]:
  """Rows and columns of a video that continues a picture, near `area` pixels.

  The divisions round down as the original's floats do: 480x832 at its own area becomes 464x832.
  """
  aspect = height / width
  cells = (np.sqrt(area * aspect), np.sqrt(area / aspect))
  rows, columns = (round(cell // STRIDE // PATCH * PATCH) for cell in cells)
  return rows * STRIDE, columns * STRIDE
