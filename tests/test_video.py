"""Video files and contact sheets."""

import os
import sys

import av
import numpy as np
import pytest
from PIL import Image

from salt_jax import clips, video
from salt_jax.errors import InputError


@pytest.fixture(scope='module')
def clip():
  return clips.render(clips.describe(0, 'train'), 21)


def test_webp_comes_back(tmp_path, clip):
  path = str(tmp_path / 'a.webp')
  video.write_webp(path, clip, fps=16)
  back = video.read_webp(path, fps=16)
  assert back.shape == clip.shape and back.dtype == np.uint8
  # Lossy at quality 90 with halved chroma: about 3 grey levels; frames in reverse give over 10.
  assert np.abs(back.astype(int) - clip).mean() < 5
  assert np.abs(back[::-1].astype(int) - clip).mean() > 10


@pytest.mark.parametrize('fps', [16, 24])
def test_webp_lasts_as_long_as_the_clip(tmp_path, clip, fps):
  path = str(tmp_path / 'a.webp')
  video.write_webp(path, clip, fps=fps)
  with Image.open(path) as file:
    total = 0
    for number in range(file.n_frames):
      file.seek(number)
      file.load()
      total += file.info['duration']
  assert abs(total - 21_000 / fps) <= 1


def test_frozen_frames_are_not_lost(tmp_path, clip):
  path = str(tmp_path / 'a.webp')
  video.write_webp(path, np.concatenate([clip[:5], clip[5:6].repeat(10, 0), clip[6:9]]))
  back = video.read_webp(path).astype(int)
  assert len(back) == 18
  assert np.abs(back[14] - clip[5]).mean() < np.abs(back[14] - clip[6]).mean()
  video.write_webp(path, clip[:1].repeat(21, 0))
  assert len(video.read_webp(path)) == 1  # WebP keeps a film of one picture as a still.


def test_upscaling_makes_squares(tmp_path, clip):
  path = str(tmp_path / 'a.webp')
  video.write_webp(path, clip, upscale=3)
  back = video.read_webp(path).astype(int)
  assert back.shape == (21, 192, 192, 3)
  assert np.abs(back[:, 1::3, 1::3] - clip).mean() < 5


def test_gif_has_all_frames_and_the_right_time(tmp_path, clip):
  path = str(tmp_path / 'a.gif')
  video.write_gif(path, clip, fps=16)
  with Image.open(path) as file:
    assert file.n_frames == 21
    times = []
    for number in range(21):
      file.seek(number)
      times.append(file.info['duration'])
    # A palette of 256 colours holds the brightness of two hues to a few levels.
    assert np.abs(np.asarray(file.convert('RGB')).astype(int) - clip[20]).mean() < 3
  assert abs(sum(times) - 21_000 / 16) <= 10


@pytest.mark.parametrize(
  'suffix, kind', [('.webp', 'WEBP'), ('.gif', 'GIF'), ('.png', 'PNG'), ('.WEBP', 'WEBP')]
)
def test_the_suffix_decides_the_format_and_nothing_else_is_left(tmp_path, clip, suffix, kind):
  path = str(tmp_path / 'new' / f'a{suffix}')
  video.write(path, clip, 16)
  with Image.open(path) as file:
    assert file.format == kind
  assert os.listdir(tmp_path / 'new') == [f'a{suffix}']


def test_an_unknown_suffix_is_refused(tmp_path, clip):
  with pytest.raises(InputError, match=r'a.avi must end in one of \.webp, \.gif, \.png, \.mp4.'):
    video.write(str(tmp_path / 'a.avi'), clip)
  assert not os.listdir(tmp_path)


def test_mp4_without_pyav_is_refused(tmp_path, clip, monkeypatch):
  monkeypatch.setitem(sys.modules, 'av', None)
  with pytest.raises(InputError, match=r"a.mp4 needs PyAV: pip install 'salt_jax\[video\]', or"):
    video.write(str(tmp_path / 'a.mp4'), clip)
  assert not os.listdir(tmp_path)


@pytest.mark.parametrize('fps', [16, 24, 29.97])
def test_mp4_comes_back_in_order_and_on_time(tmp_path, clip, fps):
  path = str(tmp_path / 'new' / 'a.mp4')
  video.write(path, clip, fps)
  assert os.listdir(tmp_path / 'new') == ['a.mp4']
  back = video.read_mp4(path).astype(int)
  assert back.shape == clip.shape
  # Halved chroma costs a few levels at the edges of colours; frames in reverse give over 10.
  assert np.abs(back - clip).mean() < 3 and np.abs(back[::-1] - clip).mean() > 10
  with av.open(path) as file:
    (stream,) = file.streams
    assert float(stream.average_rate) == pytest.approx(fps, rel=1e-4)
    assert float(stream.duration * stream.time_base) == pytest.approx(21 / fps, abs=1e-3)
    assert stream.codec_context.pix_fmt == 'yuv420p' and stream.codec_context.name == 'h264'


def test_the_same_video_makes_the_same_mp4(tmp_path, clip):
  files = [tmp_path / name for name in ('a.mp4', 'b.mp4')]
  for file in files:
    video.write(str(file), clip)
  assert files[0].read_bytes() == files[1].read_bytes()


def test_an_mp4_of_an_odd_side_is_refused(tmp_path, clip):
  with pytest.raises(InputError, match='an MP4 of 63x64 cannot be: both sides must be even.'):
    video.write(str(tmp_path / 'a.mp4'), clip[:, :, 1:])


def test_a_strip_shows_first_and_last_frame(tmp_path, clip):
  path = str(tmp_path / 'a.png')
  video.write_strip(path, clip, frames=5)
  pixels = np.asarray(Image.open(path))
  np.testing.assert_array_equal(pixels[:, :64], clip[0])
  np.testing.assert_array_equal(pixels[:, -64:], clip[-1])


def test_a_contact_sheet_gathers_captions_and_prints_text(tmp_path, clip):
  path = str(tmp_path / 'sheet.png')
  white, black = np.full_like(clip, 255), np.zeros_like(clip)
  rows = [
    ('teacher', 'a red bag moves left', white),
    ('teacher', 'a blue bag moves up', clip),
    ('student', 'a red bag moves left', black),
  ]
  video.contact_sheet(path, rows, frames=3, upscale=2)
  pixels = np.asarray(Image.open(path)).astype(int)
  left, films = pixels[:, : video.TEXT_WIDTH], pixels[:, video.TEXT_WIDTH :]
  assert films.shape[1] == 3 * 128 + 2 * video.GAP
  # White, then black of the same caption, then the other caption, though given in another order.
  tops = (0, 128 + video.GAP, 256 + 2 * video.GAP + video.BLOCK_GAP)
  assert (films[tops[0] : tops[0] + 128, :128] == 255).all() and not films[
    tops[1] : tops[1] + 128, :128
  ].any()
  np.testing.assert_array_equal(films[tops[2] : tops[2] + 128 : 2, :128:2], clip[0])
  for top in tops:
    assert (left[top : top + 60] > 200).any()


def test_two_clips_of_one_caption_are_two_blocks(tmp_path, clip):
  path = str(tmp_path / 'sheet.png')
  rows = [(label, 'a red bag moves left', clip) for label in ('teacher', 'student') * 2]
  video.contact_sheet(path, rows, frames=2, upscale=1)
  assert Image.open(path).height == 4 * (64 + video.GAP) + video.BLOCK_GAP


def test_a_contact_sheet_of_nothing_is_refused(tmp_path):
  with pytest.raises(InputError, match='no videos'):
    video.contact_sheet(str(tmp_path / 'sheet.png'), [])
