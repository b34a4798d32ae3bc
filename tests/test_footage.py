"""Frames of real videos: which are taken, how they are cropped, turned and resized, and what is refused."""

import math
from fractions import Fraction

import av
import numpy as np
import pytest
from av.video.reformatter import Colorspace
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


def write(path, pictures, times, base=1000, last=0, wide=1, **tags):
  """A file whose frames are shown at these times, in parts of a second, from the first one on.

  The last one says that it lasts so long; pixels are `wide` times as wide as high; `tags` are text.
  """
  with av.open(str(path), 'w', metadata_encoding='latin-1') as file:
    file.metadata.update(tags)
    stream = file.add_stream('libx264', rate=base, options={'crf': '10', 'bf': '0'})
    stream.codec_context.sample_aspect_ratio = Fraction(wide)
    stream.height, stream.width, stream.pix_fmt = *pictures.shape[1:3], 'yuv420p'
    stream.time_base = stream.codec_context.time_base = Fraction(1, base)
    for picture, time in zip(pictures, times, strict=True):
      frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format='rgb24')
      frame.pts, frame.time_base = time, Fraction(1, base)
      file.mux(stream.encode(frame))
    for packet in stream.encode():
      if last and packet.pts == times[-1] * packet.time_base.denominator // base:
        packet.duration = last * packet.time_base.denominator // base
      file.mux(packet)


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


@pytest.mark.parametrize('degrees, wanted', [(0, (40, 80)), (90, (40, 20))])
def test_pixels_that_are_not_square(tmp_path, degrees, wanted):
  """A square of 40 stored pixels, twice as wide as high, in a frame of 64; turned it is twice as high."""
  path = tmp_path / 'x.mp4'
  picture = np.zeros((2, 64, 64, 3), np.uint8)
  picture[:, 12:52, 12:52] = 250
  write(path, picture, [0, 100], wide=2)
  if degrees:
    turned(path, degrees)
  size = (64, 128) if not degrees else (64, 32)
  (found,) = footage.frames(str(path), 1, 16, size)
  bright = found.mean(-1) > 125
  assert abs(bright.any(1).sum() - wanted[0]) <= 1 and abs(bright.any(0).sum() - wanted[1]) <= 1


# Tags of H.273: BT.709, BT.601 of 625 lines, and none.
@pytest.mark.parametrize(
  'height, matrix, tag',
  [(480, 'ITU601', 2), (720, 'ITU709', 2), (720, 'ITU601', 5), (480, 'ITU709', 1)],
)
def test_colours_are_what_the_file_says_or_else_what_players_take(tmp_path, height, matrix, tag):
  path = str(tmp_path / 'x.mp4')
  red = np.full((height, 64, 3), (200, 40, 40), np.uint8)
  with av.open(path, 'w') as file:
    stream = file.add_stream('libx264', rate=16, options={'crf': '1'})
    stream.width, stream.height, stream.pix_fmt = 64, height, 'yuv420p'
    frame = av.VideoFrame.from_ndarray(red, format='rgb24')
    frame = frame.reformat(format='yuv420p', dst_colorspace=Colorspace[matrix])
    stream.codec_context.colorspace = frame.colorspace = tag
    file.mux(stream.encode(frame))
    file.mux(stream.encode())
  (found,) = footage.frames(path, 1, 16, (16, 16))
  np.testing.assert_allclose(found.mean((0, 1)), (200, 40, 40), atol=4)


@pytest.mark.parametrize('suffix', ['mp4', 'mkv'])
def test_a_still_at_the_end_lasts_as_long_as_it_says(tmp_path, suffix):
  path = tmp_path / f'x.{suffix}'
  write(path, greys(4), [0, 100, 200, 300], last=500)
  assert numbers(footage.frames(str(path), 8, 10, (16, 16))) == [0, 1, 2, 3, 3, 3, 3, 3]
  with pytest.raises(InputError, match='lasts 0.80 of the 0.90 seconds'):
    footage.check(str(path), 9, 10)


def test_names_with_a_colon_and_titles_in_latin_letters(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  write('./a:b.mkv', greys(4), [0, 100, 200, 300], title='café')
  assert 'caf\xe9'.encode('latin-1') in (tmp_path / 'a:b.mkv').read_bytes()
  footage.check('a:b.mkv', 3, 10)


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


@pytest.mark.parametrize('suffix', ['mp4', 'mkv'])
def test_a_download_that_broke_off_is_named_whatever_its_head_says(tmp_path, suffix):
  path = tmp_path / f'x.{suffix}'
  noise = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), np.uint8)
  write(path, noise, range(0, 1000, 50))
  footage.check(str(path), 16, 16)
  content = path.read_bytes()
  middle = content.index(b'mdat') if suffix == 'mp4' else len(content) // 4
  broken = bytearray(content[: middle + 6000])
  if suffix == 'mp4':  # its index stands behind
    broken += (
      bytes(content.index(b'moov') - 4 - len(broken)) + content[content.index(b'moov') - 4 :]
    )
  path.write_bytes(broken)
  with pytest.raises(InputError, match='x.m(p4|kv) (cannot be read as a video|lasts)'):
    footage.check(str(path), 16, 16)
