"""Frames of real videos, as training takes them: the first seconds of a file, at one rate and of one size.

Decoding is PyAV's, the extra `video`, and so is what a file may be: MP4, WebM, MKV, AVI and others.
"""

import contextlib
import fractions
import math
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from salt_jax import images
from salt_jax.errors import InputError

_SLACK = 1e-3  # seconds that a time stamp may be late: containers round them
_UNSPECIFIED = 2  # colour matrix of ITU-T H.273
_HD = 720  # rows from which on players take BT.709 for a matrix that is not named


@contextlib.contextmanager
def _opened(path: str) -> Iterator[tuple[Any, Any]]:
  """(container, its video stream); what FFmpeg says of a damaged file is said of `path`."""
  import av

  try:
    # A bare name may hold a colon, which FFmpeg takes for a protocol.
    with av.open(os.path.abspath(path), metadata_errors='replace') as file:
      stream = file.streams.best('video')
      if stream is None:
        raise InputError(f'{path} has no video in it: name another file.')
      stream.thread_type = 'AUTO'
      yield file, stream
  except (av.FFmpegError, OSError) as error:
    raise InputError(f'{path} cannot be read as a video ({error}): name another file.') from error


def check(path: str, count: int, fps: float) -> None:
  """Decodes what `frames` does, and keeps nothing.

  Args:
    path, count, fps: as for `frames`.

  Raises:
    InputError: as there.
  """
  with _opened(path) as (file, stream):
    for _ in _chosen(path, file, stream, count, fps):
      pass


def frames(
  path: str, count: int, fps: float, size: tuple[int, int]
) -> UInt8[np.ndarray, 'count rows columns 3']:
  """The frames that are shown at the first `count` ticks of a clock, from the first frame on.

  A faster video loses frames, and of a slower one some come twice. Of each the middle is taken, in the shape of `size`
  and as large as it can be, and resized by Pillow's bicubic filter, which is antialiased.

  Args:
    path: a file that FFmpeg reads; its pixels need not be square, and it is turned as it says that it is to be shown.
    count: of frames.
    fps: ticks a second.
    size: (rows, columns).

  Raises:
    InputError: no such file, no video, or one that ends before.
  """
  found = []
  with _opened(path) as (file, stream):
    # Of a width that is not named FFmpeg says 0 or nothing.
    wide = stream.sample_aspect_ratio or fractions.Fraction(1)
    for frame, times in _chosen(path, file, stream, count, fps):
      found += [_sized(frame, size, wide)] * times
  return np.stack(found)


def _chosen(path: str, file, stream, count: int, fps: float) -> Iterator[tuple[Any, int]]:
  """Each frame that is shown at one of the first `count` ticks or more, and at how many."""
  ticks, end = 0, 0.0
  lasts = 1 / float(stream.average_rate or stream.guessed_rate or fps)
  for frame, end in _shown(path, file.decode(stream), lasts):
    times = min(count, math.ceil((end - _SLACK) * fps)) - ticks
    if times > 0:
      ticks += times
      yield frame, times
    if ticks == count:
      return
  raise InputError(
    f'{path} lasts {end:.2f} of the {count / fps:.2f} seconds of a clip: leave it out, or set fewer video.frames.'
  )


def _shown(path: str, decoded: Iterator, lasts: float) -> Iterator[tuple[Any, float]]:
  """Each frame, and the seconds from the first until it is no longer shown; the last one `lasts` if it says nothing."""
  before, start = None, 0.0
  for frame in decoded:
    if frame.time is None:
      raise InputError(f'{path} does not say when its frames are shown: convert it to MP4.')
    if before is None:
      start = frame.time
    else:
      yield before, frame.time - start
    before = frame
  if before is not None:
    own = float((before.duration or 0) * before.time_base)
    yield before, before.time - start + (own or lasts)


def _sized(
  frame, size: tuple[int, int], wide: fractions.Fraction
) -> UInt8[np.ndarray, 'rows columns 3']:
  """A frame upright, in RGB, cropped and resized; a stored pixel is `wide` times as wide as it is high."""
  guessed = frame.colorspace == _UNSPECIFIED and frame.height >= _HD
  matrix = {'src_colorspace': 'ITU709'} if guessed else {}
  turns = frame.rotation // 90
  upright = np.rot90(frame.to_ndarray(format='rgb24', **matrix), turns)
  shape = (size[0] / wide, size[1]) if turns % 2 else (size[0] * wide, size[1])
  picture = Image.fromarray(np.ascontiguousarray(images.cropped(upright, shape)))
  return np.asarray(picture.resize(size[::-1], Image.Resampling.BICUBIC))
