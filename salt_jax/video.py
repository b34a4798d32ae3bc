"""Video files and contact sheets, with Pillow alone; MP4 with PyAV, which is the extra `video`."""

import collections
import fractions
import importlib.util
import os
import textwrap
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from salt_jax.errors import InputError

QUALITY = 90
SUFFIXES = ('.webp', '.gif', '.png', '.mp4')
# Evaluation reads these files, so their quality is high: crf 0 is lossless, 23 x264's default. With its tree of
# macroblocks, x264 now and then makes another file of the same video.
X264 = {'crf': '12', 'threads': '1', 'mbtree': '0'}
TEXT_SIZE = 14
TEXT_WIDTH = 190
GAP = 2
BLOCK_GAP = 10
INK, PAPER = (235, 235, 235), (32, 32, 32)

Row = tuple[str, str, UInt8[np.ndarray, 'f h w 3']]


def _images(video: UInt8[np.ndarray, 'f h w 3'], upscale: int) -> list[Image.Image]:
  """Frames as images, each pixel a square of `upscale` pixels."""
  large = video.repeat(upscale, 1).repeat(upscale, 2)
  return [Image.fromarray(np.ascontiguousarray(frame)) for frame in large]


def _durations(frames: int, fps: float, tick: int) -> list[int]:
  """Milliseconds of each frame, multiples of `tick` whose sum keeps to the true time."""
  ends = np.round(np.arange(frames + 1) * 1000 / (fps * tick)).astype(int) * tick
  return np.diff(ends).tolist()


def save(path: str, image: Image.Image, **options) -> None:
  """Writes an image beside the target and moves it there, so that no reader sees half a file."""
  os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
  temporary = f'{path}.{os.getpid()}.tmp'
  image.save(temporary, **options)
  os.replace(temporary, path)


def write_webp(
  path: str, video: UInt8[np.ndarray, 'f h w 3'], fps: float = 16, upscale: int = 1
) -> None:
  """Writes an endless animated WebP (lossy, quality 90)."""
  first, *rest = _images(video, upscale)
  save(
    path,
    first,
    format='WEBP',
    save_all=True,
    append_images=rest,
    duration=_durations(len(video), fps, 1),
    loop=0,
    quality=QUALITY,
    method=2,
  )


def write_gif(
  path: str, video: UInt8[np.ndarray, 'f h w 3'], fps: float = 16, upscale: int = 1
) -> None:
  """Writes an endless GIF; its clock ticks in hundredths of a second."""
  first, *rest = _images(video, upscale)
  save(
    path,
    first,
    format='GIF',
    save_all=True,
    append_images=rest,
    duration=_durations(len(video), fps, 10),
    loop=0,
  )


def check_suffix(name: str, path: str) -> None:
  """Refuses a path that `write` cannot serve, before anything is computed.

  Raises:
    InputError: an unknown suffix, or MP4 without PyAV; `name` is what the user wrote before the path.
  """
  suffix = os.path.splitext(path)[1].lower()
  if suffix not in SUFFIXES:
    raise InputError(f'{name}{path} must end in one of {", ".join(SUFFIXES)}.')
  if suffix == '.mp4':
    require_pyav(f'{name}{path}', f', or choose another of {", ".join(SUFFIXES[:-1])}')


def require_pyav(name: str, otherwise: str = '') -> None:
  """Refuses what needs MP4 where PyAV is missing.

  Raises:
    InputError: naming who needs it and, if there is one, the way around.
  """
  if importlib.util.find_spec('av') is None:
    raise InputError(f"{name} needs PyAV: pip install 'salt_jax[video]'{otherwise}.")


def write_mp4(path: str, video: UInt8[np.ndarray, 'f h w 3'], fps: float = 16) -> None:
  """Writes H.264 in 4:2:0, which every player and VBench's decoders read; the same video makes the same bytes.

  Raises:
    InputError: a side is odd.
  """
  import av

  frames, height, width, _ = video.shape
  if height % 2 or width % 2:
    raise InputError(f'{path}: an MP4 of {width}x{height} cannot be: both sides must be even.')
  os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
  temporary = f'{path}.{os.getpid()}.tmp'
  rate = fractions.Fraction(fps).limit_denominator(1001)
  with av.open(temporary, 'w', format='mp4') as file:
    stream = file.add_stream('libx264', rate=rate, options=X264)
    stream.width, stream.height, stream.pix_fmt = width, height, 'yuv420p'
    for number in range(frames):
      frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(video[number]), format='rgb24')
      file.mux(stream.encode(frame))
    file.mux(stream.encode())
  os.replace(temporary, path)


def read_mp4(path: str) -> UInt8[np.ndarray, 'f h w 3']:
  """All frames of an MP4."""
  import av

  with av.open(path) as file:
    return np.stack([frame.to_ndarray(format='rgb24') for frame in file.decode(video=0)])


def read_webp(path: str, fps: float = 16) -> UInt8[np.ndarray, 'f h w 3']:
  """Reads an animation at a constant rate: long frames are repeated, a still is one frame."""
  with Image.open(path) as file:
    if file.n_frames == 1:
      return np.asarray(file.convert('RGB'))[None]
    frames, shown = [], 0.0
    for number in range(file.n_frames):
      file.seek(number)
      frame = np.asarray(file.convert('RGB'))
      shown += file.info['duration']
      frames.extend([frame] * (round(shown * fps / 1000) - len(frames)))
  return np.stack(frames)


def read_image(path: str) -> UInt8[np.ndarray, 'h w 3']:
  """Reads a picture in any format that Pillow knows; transparency is dropped.

  Raises:
    InputError: no such file, or no picture.
  """
  try:
    with Image.open(path) as image:
      return np.asarray(image.convert('RGB'))
  except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
    raise InputError(f'{path} cannot be read as a picture: pass a PNG, JPEG or WebP.') from error


def _chosen(video: np.ndarray, frames: int) -> np.ndarray:
  """At most `frames` frames, evenly spread, first and last included."""
  return video[np.round(np.linspace(0, len(video) - 1, min(frames, len(video)))).astype(int)]


def _strip(video: np.ndarray, frames: int, upscale: int) -> Image.Image:
  """Chosen frames side by side."""
  images = _images(_chosen(video, frames), upscale)
  width, height = images[0].size
  strip = Image.new('RGB', (len(images) * (width + GAP) - GAP, height), PAPER)
  for column, image in enumerate(images):
    strip.paste(image, (column * (width + GAP), 0))
  return strip


def _line(label: str, caption: str, strip: Image.Image) -> Image.Image:
  """A strip with its label and caption printed at the left."""
  characters = TEXT_WIDTH * 2 // TEXT_SIZE
  text = '\n'.join(textwrap.wrap(label, characters) + textwrap.wrap(caption, characters))
  font = ImageFont.load_default(size=TEXT_SIZE)
  bottom = ImageDraw.Draw(strip).multiline_textbbox((0, 0), text, font)[3]
  height = max(strip.height, int(bottom) + 2 * GAP)
  line = Image.new('RGB', (TEXT_WIDTH + strip.width, height), PAPER)
  ImageDraw.Draw(line).multiline_text((GAP * 2, GAP), text, INK, font)
  line.paste(strip, (TEXT_WIDTH, 0))
  return line


def contact_sheet(path: str, rows: Sequence[Row], frames: int = 9, upscale: int = 2) -> None:
  """Writes a PNG with one row a video, gathered in blocks of one caption; a label's next video of it begins another.

  Args:
    path: PNG file to write.
    rows: (label such as the method, caption, video uint8 [f h w 3]).
    frames: frames shown of each video, evenly spread from the first to the last.
    upscale: side of a pixel.

  Raises:
    InputError: there are no rows.
  """
  if not rows:
    raise InputError(f'no videos were given for the contact sheet {path}: give at least one.')
  blocks, seen = collections.defaultdict(list), collections.Counter()
  for label, caption, video in rows:
    block = blocks[caption, seen[label, caption]]
    block.append(_line(label, caption, _strip(video, frames, upscale)))
    seen[label, caption] += 1
  lines = [line for block in blocks.values() for line in block]
  height = sum(line.height + GAP for line in lines) + BLOCK_GAP * (len(blocks) - 1)
  sheet = Image.new('RGB', (max(line.width for line in lines), height), PAPER)
  top = 0
  for block in blocks.values():
    for line in block:
      sheet.paste(line, (0, top))
      top += line.height + GAP
    top += BLOCK_GAP
  save(path, sheet, format='PNG')


def write_strip(path: str, video: UInt8[np.ndarray, 'f h w 3'], frames: int = 9) -> None:
  """Writes frames of one video side by side as a PNG."""
  save(path, _strip(video, frames, 1), format='PNG')


def write(path: str, video: UInt8[np.ndarray, 'f h w 3'], fps: float = 16) -> None:
  """Writes a video in the format of the path's suffix: .webp, .gif, .mp4, or .png (a strip of frames).

  Raises:
    InputError: the suffix is unknown, or MP4 without PyAV.
  """
  check_suffix('', path)
  match os.path.splitext(path)[1].lower():
    case '.mp4':
      write_mp4(path, video, fps)
    case '.webp':
      write_webp(path, video, fps)
    case '.gif':
      write_gif(path, video, fps)
    case '.png':
      write_strip(path, video)
