"""Frames of real videos: which are taken, how they are cropped, turned and resized, and what is refused."""

import math
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from salt_jax import footage, video
from salt_jax.errors import InputError

STEP = 6  # grey levels between one frame and the next; H.264 moves flat ones by 2 at most


def greys(count, height=16, width=16):
  levels = (STEP * (1 + np.arange(count))).astype(np.uint8)
  return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3))


def numbers(frames):
  """Which frames of `greys` these are."""
  means = frames.reshape(len(frames), -1).mean(1)
  assert np.abs(means / STEP - np.round(means / STEP)).max() < 0.4
  return [round(mean / STEP) - 1 for mean in means]


@pytest.mark.parametrize('rate', [16, 24, 8, 30, 12.5, 15, Fraction(24000, 1001)])
def test_what_is_shown_at_each_tick_is_taken(tmp_path, rate):
  path = str(tmp_path / 'x.mp4')
  video.write_mp4(path, greys(40), float(rate))
  count = math.floor(39 / rate * 16)
  found = footage.frames(path, count, 16, (16, 16))
  # A time stamp may be late by a millisecond.
  wanted = [math.floor((tick / 16 + 1e-3) * rate) for tick in range(count)]
  assert numbers(found) == wanted


def write(path, pictures, times, base=1000):
  """A file whose frames are shown at these times, in parts of a second, from the first one on."""
  with av.open(str(path), 'w') as file:
    stream = file.add_stream('libx264', rate=base, options={'crf': '10'})
    stream.height, stream.width, stream.pix_fmt = *pictures.shape[1:3], 'yuv420p'
    stream.time_base = stream.codec_context.time_base = Fraction(1, base)
    for picture, time in zip(pictures, times, strict=True):
      frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format='rgb24')
      frame.pts, frame.time_base = time, Fraction(1, base)
      file.mux(stream.encode(frame))
    file.mux(stream.encode())


@pytest.mark.parametrize('suffix', ['mp4', 'mkv'])
def test_frames_that_come_at_uneven_times_and_late(tmp_path, suffix):
  path = tmp_path / f'x.{suffix}'
  # 0, 150, 210, 290, 405 and 800 behind the first: the third came and went between two ticks of a tenth.
  write(path, greys(6), [500, 650, 710, 790, 905, 1300])
  assert numbers(footage.frames(str(path), 8, 10, (16, 16))) == [0, 0, 1, 3, 3, 4, 4, 4]


@pytest.mark.parametrize(
  'shape, box',
  [((48, 160), (32, 0, 128, 48)), ((160, 48), (0, 68, 48, 92)), ((96, 192), (0, 0, 192, 96))],
)
def test_the_middle_is_taken_in_the_shape_that_is_wanted(tmp_path, shape, box):
  path = str(tmp_path / 'x.mp4')
  noise = np.random.default_rng(0).integers(0, 256, (2, *shape, 3), np.uint8)
  video.write_mp4(path, noise, 16)
  whole = video.read_mp4(path)
  found = footage.frames(path, 2, 16, (16, 32))
  for frame, one in zip(whole, found, strict=True):
    wanted = Image.fromarray(frame).resize((32, 16), Image.Resampling.BICUBIC, box=box)
    # Cutting first and resizing a box differ where the filter reaches over the edge, and by rounding.
    np.testing.assert_allclose(one[2:-2, 2:-2], np.asarray(wanted)[2:-2, 2:-2], atol=1)


def turned(path, degrees):
  """Writes into an MP4 that it is to be shown turned clockwise by so much."""
  content = bytearray(path.read_bytes())
  at = content.index(b'tkhd') + 44  # ISO 14496-12, 8.3.2: the matrix behind 40 bytes of fields
  turn = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[degrees]
  for place, value in zip((0, 4, 12, 16), turn, strict=True):
    content[at + place : at + place + 4] = (value << 16).to_bytes(4, 'big', signed=True)
  path.write_bytes(content)


@pytest.mark.parametrize('degrees', [90, 180, 270])
def test_a_video_of_a_phone_is_upright(tmp_path, degrees):
  path = tmp_path / 'x.mp4'
  picture = np.zeros((1, 32, 32, 3), np.uint8)
  picture[:, :16, :16] = 250  # bright at the upper left
  video.write_mp4(str(path), picture, 16)
  turned(path, degrees)
  (found,) = footage.frames(str(path), 1, 16, (32, 32))
  corners = found.reshape(2, 16, 2, 16, 3).mean((1, 3, 4))
  wanted = {90: (0, 1), 180: (1, 1), 270: (1, 0)}[degrees]
  assert corners[wanted] > 200 and corners.sum() < corners[wanted] + 30


def test_what_is_too_short_is_refused_by_its_length(tmp_path):
  path = str(tmp_path / 'x.mp4')
  video.write_mp4(path, greys(20), 16)
  assert numbers(footage.frames(path, 20, 16, (16, 16))) == list(range(20))
  footage.check(path, 20, 16)
  for refuse in (
    lambda: footage.frames(path, 21, 16, (16, 16)),
    lambda: footage.check(path, 21, 16),
  ):
    with pytest.raises(
      InputError, match=r'x.mp4 lasts 1.25 of the 1.31 seconds of a clip: leave it'
    ):
      refuse()


def _sound(path):
  with av.open(str(path), 'w', format='mp4') as file:
    stream = file.add_stream('aac', rate=16000)
    frame = av.AudioFrame.from_ndarray(
      np.zeros((1, 1024), np.float32), format='fltp', layout='mono'
    )
    frame.rate = 16000
    file.mux(stream.encode(frame))
    file.mux(stream.encode())


@pytest.mark.parametrize(
  'name, make, sentence',
  [
    ('none.mp4', lambda path: None, 'none.mp4 cannot be read as a video (.*No such file'),
    ('text.mp4', lambda path: path.write_text('a cat'), 'text.mp4 cannot be read as a video ('),
    ('folder.mp4', lambda path: path.mkdir(), 'folder.mp4 cannot be read as a video ('),
    ('sound.mp4', _sound, 'sound.mp4 has no video in it: name another file.'),
  ],
)
def test_what_is_no_video_is_named(tmp_path, name, make, sentence):
  path = tmp_path / name
  make(path)
  for refuse in (footage.frames, footage.check):
    with pytest.raises(InputError, match=sentence.replace('(', r'\(', 1)):
      refuse(str(path), 4, 16, *([(16, 16)] if refuse is footage.frames else []))


def test_a_video_that_is_cut_off_is_named_when_it_is_decoded(tmp_path):
  path = tmp_path / 'x.mp4'
  noise = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), np.uint8)
  write(path, noise, range(0, 1000, 50))
  content = bytearray(path.read_bytes())
  middle = content.index(b'mdat') + 4
  content[middle + 2000 : middle + 12000] = bytes(10000)
  path.write_bytes(content)
  footage.check(str(path), 10, 16)
  with pytest.raises(InputError, match='x.mp4 (cannot be read as a video|lasts)'):
    footage.frames(str(path), 16, 16, (16, 16))
