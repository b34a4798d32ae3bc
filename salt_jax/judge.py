"""A small judge of the nano world: does a video show what its caption says?

Colour and motion are measured on the pixels: the mask of a colour is where its own channels exceed
the others, its centroid is the object's track. Light of other colours is stray: ghosts and bleeding.
The garment's class is read by a small perceptron from crops around the centroid; it is trained in
seconds on real clips of the 'train' split.
"""

import functools
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from einops import reduce
from flax import linen as nn
from jaxtyping import Array, Float, Int, UInt8

from salt_jax import clips
from salt_jax.errors import InputError

MEASURES = ('colour', 'class', 'direction', 'travel', 'drift', 'stray', 'sharpness')
STRIDE = 4  # Every fourth frame is looked at: one per latent frame.
PURE = 48  # Grey levels by which a colour's channels must exceed the others.
SMALLEST = 20  # Pixels of a mask below which the object is not there.
WIDEST = 12.0  # Spread of a mask above which it is no object: a garment has 8, noise 18.
FIRST_FRAMES = 24  # Inside the first leg, which lasts at least clips.FIRST_LEG.
LEAST_MOTION = 3.0  # Pixels over those frames; less is frozen.
CROP = 32
CHUNK = 512
BATCH = 64


class Track(NamedTuple):
  """One colour through the frames that are looked at."""

  pure: UInt8[np.ndarray, 'f h w']  # Its brightness.
  area: Int[np.ndarray, 'f']  # Pixels of its mask.
  centre: Float[np.ndarray, 'f 2']  # Row and column of the centroid; 0 where the mask is empty.
  spread: Float[np.ndarray, 'f']  # Root mean square distance from it an axis, in pixels.

  @property
  def there(self) -> np.ndarray:
    return (self.area >= SMALLEST) & (self.spread <= WIDEST)


class Network(nn.Module):
  """Class logits of crops: a perceptron on 2 x 2 means."""

  @nn.compact
  def __call__(self, crops: Float[Array, 'n 32 32']) -> Float[Array, 'n kinds']:
    x = reduce(crops, 'n (h two_h) (w two_w) -> n (h w)', 'mean', two_h=2, two_w=2)
    x = nn.relu(nn.Dense(256)(x))
    x = nn.relu(nn.Dense(64)(x))
    return nn.Dense(len(clips.KINDS))(x)


def purity(video: UInt8[np.ndarray, 'f h w 3'], colour: str) -> UInt8[np.ndarray, 'f h w']:
  """By how much a colour's own channels exceed the others; 0 where that is too little."""
  lit = clips.COLOURS[colour]
  own = functools.reduce(np.minimum, [video[..., c] for c in lit])
  other = functools.reduce(np.maximum, [video[..., c] for c in range(3) if c not in lit])
  excess = np.maximum(own, other) - other
  return np.where(excess > PURE, excess, np.uint8(0))


def track(video: UInt8[np.ndarray, 'f h w 3'], colour: str) -> Track:
  """Follows one colour."""
  pure = purity(video, colour)
  mass = np.maximum(pure.sum((1, 2), dtype=np.float64), 1)
  centres, variances = [], []
  for axis in (1, 2):
    profile = pure.sum(3 - axis, dtype=np.float64) / mass[:, None]
    places = np.arange(pure.shape[axis])
    centres.append(profile @ places)
    variances.append(profile @ places**2 - centres[-1] ** 2)
  spread = np.sqrt(np.maximum(np.mean(variances, 0), 0))
  return Track(pure, (pure > 0).sum((1, 2)), np.stack(centres, -1), spread)


def _crops(path: Track) -> UInt8[np.ndarray, 'f 32 32']:
  """The object's brightness around its centroid."""
  half = CROP // 2
  padded = np.pad(path.pure, ((0, 0), (half, half), (half, half)))
  corners = np.round(path.centre).astype(int)
  return np.stack(
    [f[y : y + CROP, x : x + CROP] for f, (y, x) in zip(padded, corners, strict=True)]
  )


def _looked_at(frames: int) -> np.ndarray:
  return np.arange(0, frames, STRIDE)


def _colours_shown(paths: Mapping[str, Track], count: int) -> set[str]:
  """The `count` colours with most pixels, as far as they are there in half of the frames."""
  strongest = sorted(paths, key=lambda colour: -paths[colour].area.mean())[:count]
  return {colour for colour in strongest if paths[colour].there.mean() >= 0.5}


def _moves(path: Track, direction: str) -> bool:
  """Whether the centroid's fitted motion over the first leg goes the captioned way."""
  last = FIRST_FRAMES // STRIDE + 1
  there, centre = path.there[:last], path.centre[:last]
  if there.sum() < 2 or there.mean() < 0.5:
    return False
  times = np.flatnonzero(there) - np.flatnonzero(there).mean()
  motion = times @ centre[there] / (times @ times) * (len(there) - 1)
  axis, sign = clips.DIRECTIONS[direction]
  frozen_below = LEAST_MOTION * (len(there) - 1) * STRIDE / FIRST_FRAMES
  return bool(np.argmax(np.abs(motion)) == axis and motion[axis] * sign >= frozen_below)


def _travel(path: Track) -> float:
  """Length of the centroid's path in pixels, between looks in which the object is there."""
  steps = np.linalg.norm(np.diff(path.centre, axis=0), axis=-1)
  return float(steps[path.there[1:] & path.there[:-1]].sum())


def travel(videos: UInt8[np.ndarray, 'b f h w 3'], captions: list[str]) -> Float[np.ndarray, 'b']:
  """The figure `travel` of `judge`, which needs no class network.

  Raises:
    InputError: a caption is not of the nano world.
  """
  looks = videos[:, _looked_at(videos.shape[1])]
  lengths = [
    np.mean([_travel(track(video, phrase.colour)) for phrase in clips.parse(caption)])
    for video, caption in zip(looks, captions, strict=True)
  ]
  return np.array(lengths, np.float32)


def _stray(video: UInt8[np.ndarray, 'f h w 3'], tracks: Mapping[str, Track], colours) -> float:
  """Share of the light that is in none of the captioned colours; 1 of a dark clip."""
  light = video.max(-1).astype(np.float64)
  light[light <= PURE] = 0
  captioned = np.any([tracks[colour].pure > 0 for colour in colours], axis=0)
  return 1 - float(light[captioned].sum() / max(light.sum(), 1))


def sharpness(video: UInt8[np.ndarray, 'f h w 3']) -> float:
  """Mean absolute difference of neighbouring pixels over mean brightness: the same at any size of the light."""
  light = video.max(-1).astype(np.float64)
  steps = sum(np.abs(np.diff(light, axis=axis)).sum() for axis in (1, 2))
  return float(steps / max(light.sum(), 1))


def _normalised(crops: UInt8[np.ndarray, 'n 32 32']) -> Float[np.ndarray, 'n 32 32']:
  return crops.astype(np.float32) / np.maximum(crops.max((1, 2), keepdims=True), 1)


@jax.jit
def _probabilities(params, crops):
  return jax.nn.softmax(Network().apply({'params': params}, crops))


def _classify(params, crops: UInt8[np.ndarray, 'n 32 32']) -> Float[np.ndarray, 'n kinds']:
  """Class probabilities, in chunks of one size so that only one program is compiled."""
  count = len(crops)
  padded = np.pad(_normalised(crops), ((0, -count % CHUNK), (0, 0), (0, 0)))
  parts = [_probabilities(params, padded[i : i + CHUNK]) for i in range(0, len(padded), CHUNK)]
  return np.concatenate(parts)[:count]


def _class_and_drift(path: Track, probabilities: np.ndarray, kind: str) -> tuple[bool, float]:
  """Whether the mean prediction is `kind`, and the share of looks off the majority."""
  seen = probabilities[path.there]
  if not len(seen):
    return False, 1.0
  votes = np.bincount(seen.argmax(-1), minlength=len(clips.KINDS))
  return clips.KINDS[int(seen.mean(0).argmax())] == kind, 1 - votes.max() / len(path.there)


def judge(
  params: Mapping, videos: UInt8[np.ndarray, 'b f h w 3'], captions: list[str]
) -> dict[str, Float[np.ndarray, 'b']]:
  """Judges videos against their captions; with two objects each figure is their mean.

  Args:
    params: of `train`.
    videos: any content; a missing object counts as wrong, with no travel and full drift.
    captions: one per video.

  Returns:
    colour: 1 if the captioned colour is among the strongest (as many as objects) and is there.
    class: 1 if the garment, averaged over frames, is the captioned one.
    direction: 1 if the first 24 frames move the captioned way by at least 3 pixels.
    travel: length of the centroid's path in pixels.
    drift: share of frames whose garment is not the clip's majority one, or is not there.
    stray: share of the light that has none of the captioned colours.
    sharpness: steps between neighbouring pixels over brightness; real clips have the right amount.

  Raises:
    InputError: a caption is not of the nano world, or their number is not that of the videos.
  """
  if len(captions) != len(videos):
    raise InputError(f'{len(videos)} videos came with {len(captions)} captions: give one each.')
  wanted = [clips.parse(caption) for caption in captions]
  looks = videos[:, _looked_at(videos.shape[1])]
  tracks = [{colour: track(video, colour) for colour in clips.COLOURS} for video in looks]
  crops = np.concatenate(
    [
      _crops(paths[phrase.colour])
      for paths, phrases in zip(tracks, wanted, strict=True)
      for phrase in phrases
    ]
  )
  probabilities = iter(np.split(_classify(params, crops), len(crops) // looks.shape[1]))
  rows = []
  for video, paths, phrases in zip(looks, tracks, wanted, strict=True):
    shown = _colours_shown(paths, len(phrases))
    verdicts = []
    for colour, kind, direction in phrases:
      path = paths[colour]
      right, drift = _class_and_drift(path, next(probabilities), kind)
      verdicts.append((colour in shown, right, _moves(path, direction), _travel(path), drift))
    stray = _stray(video, paths, [phrase.colour for phrase in phrases])
    rows.append([*np.mean(verdicts, 0), stray, sharpness(video)])
  return dict(zip(MEASURES, np.array(rows, np.float32).T, strict=True))


def _examples(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
  """Crops and class numbers of the objects in the first frame of `count` real training clips."""
  crops, kinds = [], []
  for index in range(count):
    scene = clips.describe(index, 'train', seed)
    frame = clips.render(scene, frames=1)
    for thing in scene.objects:
      crops.append(_crops(track(frame, thing.phrase.colour)))
      kinds.append(clips.KINDS.index(thing.phrase.kind))
  return _normalised(np.concatenate(crops)), np.array(kinds)


def _augmented(crops: Float[Array, 'n 32 32'], key: Array) -> Float[Array, 'n 32 32']:
  """Softens and soils crops as a decoder of latents would, and shifts them."""
  soft, shift, soil = jax.random.split(key, 3)
  blurred = crops
  for axis in (1, 2):
    blurred = blurred / 2 + (jnp.roll(blurred, 1, axis) + jnp.roll(blurred, -1, axis)) / 4
  amount = jax.random.uniform(soft, (len(crops), 1, 1))
  moves = jax.random.randint(shift, (2,), -2, 3)
  moved = jnp.roll(crops + amount * (blurred - crops), moves, (1, 2))
  return moved + 0.05 * jax.random.normal(soil, crops.shape)


def _optimizer(steps: int) -> optax.GradientTransformation:
  return optax.adam(optax.cosine_decay_schedule(2e-3, steps))


@functools.partial(jax.jit, static_argnames='steps', donate_argnums=(0, 1))
def _step(params, state, batch, key, steps: int):
  """One step of Adam on (crops, class numbers)."""
  crops, kinds = batch

  def loss(params):
    logits = Network().apply({'params': params}, _augmented(crops, key))
    return optax.softmax_cross_entropy_with_integer_labels(logits, kinds).mean()

  updates, state = _optimizer(steps).update(jax.grad(loss)(params), state)
  return optax.apply_updates(params, updates), state


def train(seed: int = 0, examples: int = 3000, steps: int = 1000) -> dict:
  """Trains the class network on real clips of the 'train' split.

  Args:
    seed: of the clips, the weights and the batches.
    examples: clips, of which the first frames are used.
    steps: of Adam.

  Returns:
    Parameters for `judge`.
  """
  crops, kinds = _examples(examples, seed)
  start, key = jax.random.split(jax.random.key(seed))
  params = Network().init(start, crops[:1])['params']
  state = _optimizer(steps).init(params)
  generator = np.random.Generator(np.random.Philox(seed))
  for step in range(steps):
    rows = generator.integers(len(crops), size=BATCH)
    params, state = _step(
      params, state, (crops[rows], kinds[rows]), jax.random.fold_in(key, step), steps
    )
  return params
