"""Frames of real videos, as training takes them: the first seconds of a file, at one rate and of one size.

Decoding is PyAV's, the extra `video`, and so is what a file may be: MP4, WebM, MKV, AVI and others.
"""

import contextlib
import math
from collections.abc import Iterator

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from salt_jax import images
from salt_jax.errors import InputError

_SLACK = 1e-3  # seconds that a time stamp may be late: containers round them


@contextlib.contextmanager
def _opened(path: str) -> Iterator:
  """(container, its first video stream); what FFmpeg says of a damaged file is said of `path`."""
  import av

  try:
    with av.open(path) as file:
      if not file.streams.video:
        raise InputError(f'{path} has no video in it: name another file.')
      file.streams.video[0].thread_type = 'AUTO'
      yield file, file.streams.video[0]
  except (av.FFmpegError, OSError) as error:
    raise InputError(f'{path} cannot be read as a video ({error}): name another file.') from error


def check(path: str, count: int, fps: float) -> None:
  """Refuses a file that is no video, or that says that it is too short for `frames`, without decoding it.

  Raises:
    InputError: naming the file and the mend.
  """
  with _opened(path) as (_, stream):
    if stream.duration is not None:
      length = float(stream.duration * stream.time_base)
      if _ticks(length, fps) < count:
        raise InputError(_short(path, length, count / fps))


def _short(path: str, length: float, seconds: float) -> str:
  return f'{path} lasts {length:.2f} of the {seconds:.2f} seconds of a clip: leave it out, or set fewer video.frames.'


def _ticks(seconds: float, fps: float) -> int:
  """Ticks of a clock from 0 on that are before a time."""
  return math.ceil((seconds - _SLACK) * fps)


def frames(
  path: str, count: int, fps: float, size: tuple[int, int]
) -> UInt8[np.ndarray, 'count rows columns 3']:
  """The frames that are shown at the first `count` ticks of a clock, from the first frame on.

  A faster video loses frames, and of a slower one some come twice. Of each the middle is taken, in the shape of `size`
  and as large as it can be, and resized by Pillow's bicubic filter, which is antialiased.

  Args:
    path: a file that FFmpeg reads; turned as it says that it is to be shown.
    count: of frames.
    fps: ticks a second.
    size: (rows, columns).

  Raises:
    InputError: no such file, no video, or one that ends before.
  """
  found, end = [], 0.0
  with _opened(path) as (file, stream):
    lasts = 1 / float(stream.average_rate or stream.guessed_rate or fps)
    for frame, end in _shown(path, file.decode(stream), lasts):
      times = min(count, _ticks(end, fps)) - len(found)
      if times > 0:
        found += [_sized(frame, size)] * times
      if len(found) == count:
        return np.stack(found)
  raise InputError(_short(path, end, count / fps))


def _shown(path: str, decoded: Iterator, lasts: float) -> Iterator[tuple]:
  """Each frame, and the seconds from the first until it is no longer shown; the last one `lasts`."""
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
    yield before, before.time - start + lasts


def _sized(frame, size: tuple[int, int]) -> UInt8[np.ndarray, 'rows columns 3']:
  upright = np.rot90(frame.to_ndarray(format='rgb24'), frame.rotation // 90)
  picture = Image.fromarray(np.ascontiguousarray(images.cropped(upright, size)))
  return np.asarray(picture.resize(size[::-1], Image.Resampling.BICUBIC))
