"""The nano world: clips are pure functions of their index, and show what their captions say."""

import collections
import hashlib
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from salt_jax import clips
from salt_jax.errors import InputError

MANY = 1000


def many(split):
  return [clips.describe(index, split) for index in range(MANY)]


def centroids(video):
  """Brightness-weighted (row, column) of every frame, without the judge's masks."""
  grey = video.max(-1).astype(np.float64)
  mass = grey.sum((1, 2))
  return np.stack([grey.sum(2) @ np.arange(64), grey.sum(1) @ np.arange(64)], -1) / mass[:, None]


def alone(thing, frames=81, size=64):
  return clips.render(clips.Scene((thing,)), frames, size)


def digest(indices):
  content = b''.join(clips.render(clips.describe(i, 'train')).tobytes() for i in indices)
  return hashlib.sha256(content).hexdigest()


def test_a_clip_is_the_same_bits_in_every_call_and_process():
  code = 'import test_clips; print(test_clips.digest(range(6)))'
  here = pathlib.Path(__file__).parent
  other = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=here
  )
  assert digest(range(6)) == digest(range(6)) == other.stdout.strip()


def test_index_seed_and_split_each_change_the_scene():
  base = clips.describe(5, 'train')
  assert base not in (
    clips.describe(6, 'train'),
    clips.describe(5, 'train', seed=1),
    clips.describe(5, 'seen'),
  )
  assert clips.describe(2**62, 'train') == clips.describe(2**62, 'train')


@pytest.mark.parametrize('split', clips.SPLITS)
def test_splits_hold_out_images_and_combinations(split):
  for thing in (thing for scene in many(split) for thing in scene.objects):
    assert (thing.image % 10 == 0) == (split != 'train')
    assert (thing.phrase in clips.HELD_OUT) == (split == 'unseen')
    assert thing.image < len(clips.photographs()[thing.phrase.kind])


def test_held_out_combinations_are_balanced():
  assert len(set(clips.HELD_OUT)) == 12
  for field, times in enumerate((2, 2, 3)):
    assert set(collections.Counter(phrase[field] for phrase in clips.HELD_OUT).values()) == {times}


def test_training_clips_cover_the_world_evenly():
  phrases = collections.Counter(thing.phrase for scene in many('train') for thing in scene.objects)
  assert len(phrases) == 132


@pytest.mark.parametrize('split, share', [('train', 0.5), ('seen', 0.25), ('unseen', 0.25)])
def test_training_has_more_clips_of_two_objects_than_judging(split, share):
  pairs = [len(scene.objects) == 2 for scene in many(split)]
  # Four deviations of a binomial.
  assert abs(np.mean(pairs) - share) < 4 * (share * (1 - share) / len(pairs)) ** 0.5


def test_captions_are_read_back_and_use_every_word():
  scenes = many('train')
  captions = [clips.caption(scene) for scene in scenes]
  assert [clips.parse(text) for text in captions] == [
    tuple(o.phrase for o in scene.objects) for scene in scenes
  ]
  assert set(' '.join(captions).split()) == set(clips.NANO_WORDS)
  assert clips.NANO_WORDS == tuple(sorted(clips.NANO_WORDS)) and len(clips.NANO_WORDS) == 19
  assert clips.captions('train', np.arange(3)) == captions[:3]


@pytest.mark.parametrize(
  'text, named',
  [
    ('a purple bag moves left', "'purple'"),
    ('a red bag moves', 'no caption'),
    ('', 'no caption'),
    ('a bag red moves left', 'no caption'),
    ('a red bag moves left and', 'no caption'),
    ('a red bag moves left and a red boot moves left', 'different colours'),
    (
      'a red bag moves left and a blue bag moves left and a cyan bag moves left',
      'one object, or two',
    ),
  ],
)
def test_other_sentences_are_refused(text, named):
  with pytest.raises(InputError, match=named):
    clips.parse(text)


def test_an_unknown_split_is_refused():
  with pytest.raises(InputError, match='train, seen, unseen'):
    clips.describe(0, 'test')


def test_the_first_leg_moves_as_captioned_on_the_pixels():
  for thing in (thing for i in range(60) for thing in clips.describe(i, 'train').objects):
    track = centroids(alone(thing, clips.FIRST_LEG + 1))
    axis, sign = {'left': (1, -1), 'right': (1, 1), 'up': (0, -1), 'down': (0, 1)}[
      thing.phrase.direction
    ]
    steps = np.diff(track, axis=0)
    # 8-bit rounding moves the centroid of 150 bright pixels by far less than 0.05.
    np.testing.assert_allclose(steps[:, axis] * sign, abs(thing.speed), atol=0.05)
    assert np.abs(steps[:, 1 - axis]).max() < 0.05
    assert 0.5 <= abs(thing.speed) <= 1.1


def test_bounces_keep_the_whole_object_inside():
  for thing in (thing for i in range(30) for thing in clips.describe(i, 'train').objects):
    video = alone(thing, 400)
    mass = video.sum((1, 2, 3), dtype=np.float64)
    # A pixel cut off at a wall would take its brightness along; rounding alone stays within 0.5 %.
    np.testing.assert_allclose(mass, mass[0], rtol=0.005)
    edges = clips.positions(thing, 400)
    assert 0 <= edges.min() < 1.1 and 34.9 < edges.max() <= 36


def test_motion_between_bounces_is_smooth():
  for i in range(20):
    thing = clips.describe(i, 'train').objects[0]
    steps = np.linalg.norm(np.diff(centroids(alone(thing, 28)), axis=0), axis=-1)
    # Whole-pixel placement at 0.5 to 1.1 pixels a frame has deviations of 0.3 and more.
    assert steps.std() < 0.02


def test_rendering_is_bilinear_placement():
  for index in (0, 1, 4):
    thing = clips.describe(index, 'train').objects[0]
    image = clips.photographs()[thing.phrase.kind][thing.image].astype(np.float64)
    vertical = thing.phrase.direction in ('up', 'down')
    along = clips.positions(thing, 40)[39]
    place = (along, thing.lane) if vertical else (thing.lane, along)
    canvas = np.zeros((65, 65))
    (y, dy), (x, dx) = [divmod(v, 1) for v in place]
    for j, wy in ((0, 1 - dy), (1, dy)):
      for i, wx in ((0, 1 - dx), (1, dx)):
        canvas[int(y) + j : int(y) + j + 28, int(x) + i : int(x) + i + 28] += wy * wx * image
    # Positions are rounded to 1/256 pixel: at most 255/512 grey levels an axis, plus rounding.
    np.testing.assert_allclose(alone(thing, 40)[39].max(-1), canvas[:64, :64], atol=1.5)


def test_two_objects_share_an_axis_and_never_touch():
  pairs = [
    scene for split in clips.SPLITS for scene in many(split)[:300] if len(scene.objects) == 2
  ]
  assert len(pairs) > 100
  for number, scene in enumerate(pairs):
    first, second = scene.objects
    assert first.phrase.colour != second.phrase.colour
    assert (
      clips.DIRECTIONS[first.phrase.direction][0] == clips.DIRECTIONS[second.phrase.direction][0]
    )
    if number < 30:
      one, other = alone(first, 20), alone(second, 20)
      assert not (one.any(-1) & other.any(-1)).any()
      np.testing.assert_array_equal(one + other, clips.render(scene, 20))


def test_a_longer_clip_begins_with_the_shorter_one():
  scene = clips.describe(0, 'train')
  np.testing.assert_array_equal(clips.render(scene, 81)[:9], clips.render(scene, 9))


def test_another_size_is_the_same_world():
  scene = clips.describe(2, 'train')
  large, small = (
    clips.render(scene, 9).astype(np.float64),
    clips.render(scene, 9, 32).astype(np.float64),
  )
  pooled = large.reshape(9, 32, 2, 32, 2, 3).mean((2, 4))
  # The tent filter is a little softer than 2 x 2 means.
  assert np.abs(pooled - small).mean() < 0.05 * large.max() * (large > 0).mean() + 2
  assert np.corrcoef(pooled.ravel(), small.ravel())[0, 1] > 0.97


def test_colours_are_pure():
  lit = {
    'red': (1, 0, 0),
    'green': (0, 1, 0),
    'blue': (0, 0, 1),
    'yellow': (1, 1, 0),
    'cyan': (0, 1, 1),
    'magenta': (1, 0, 1),
  }
  for thing in (clips.describe(i, 'train').objects[0] for i in range(40)):
    video = alone(thing, 1)
    grey = video.max(-1, keepdims=True)
    np.testing.assert_array_equal(video, grey * np.array(lit[thing.phrase.colour], np.uint8))


def test_the_world_is_the_one_the_shipped_models_were_trained_on():
  # Not an oracle: when this changes, every nano model and every published figure must be made anew.
  held_out = hashlib.sha256(repr([tuple(p) for p in clips.HELD_OUT]).encode()).hexdigest()
  assert (digest(range(6))[:16], held_out[:16]) == ('885c820e06fee15a', '94d905c90e185af7')


def test_the_committed_photographs_are_small_and_licensed():
  assets = pathlib.Path(clips.__file__).parent / 'assets'
  assert (assets / 'fashion_mnist.npz').stat().st_size < 1_200_000
  assert 'MIT License' in (assets / 'fashion_mnist_LICENSE.txt').read_text()
  for images in clips.photographs().values():
    assert images.shape == (360, 28, 28) and images.dtype == np.uint8
    assert len({image.tobytes() for image in images}) == 360
