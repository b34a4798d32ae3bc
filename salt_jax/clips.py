"""The nano world: captioned clips of moving garments, each a pure function of its index.

A clip shows one or two photographs of garments (Fashion-MNIST), each in one colour, moving at a
constant speed and reflected at the walls. Its caption is a sentence of a closed language:

  a red sneaker moves left
  a red sneaker moves left and a blue bag moves right

The caption names the direction of the first leg. Randomness is the raw output of Philox, keyed by
split, seed and index, whose stream NumPy guarantees; rendering is in integers held exactly by
float32. A clip is therefore the same bits in every call, process and machine.
"""

import dataclasses
import functools
import pathlib
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from salt_jax.errors import InputError

# Channels that a colour lights.
COLOURS = {
  'red': (0,),
  'green': (1,),
  'blue': (2,),
  'yellow': (0, 1),
  'cyan': (1, 2),
  'magenta': (0, 2),
}
KINDS = ('t-shirt', 'trouser', 'dress', 'sneaker', 'bag', 'boot')
# (axis: 0 vertical, 1 horizontal; sign of the first leg).
DIRECTIONS = {'left': (1, -1), 'right': (1, 1), 'up': (0, -1), 'down': (0, 1)}
NANO_WORDS = tuple(sorted(('a', 'and', 'moves', *COLOURS, *KINDS, *DIRECTIONS)))
SPLITS = ('train', 'seen', 'unseen')

WORLD = 64  # Side of the world in its own pixels; `render` may sample it at another size.
SPRITE = 28
SPAN = WORLD - SPRITE  # Free way between the walls.
LANE = WORLD // 2
SLOWEST, FASTEST = 0.5, 1.1  # World pixels a frame.
FIRST_LEG = 28  # Frames that the first leg lasts at least.
HEADROOM = 6.0  # Largest distance of the start from the wall behind the object.
# Share of clips with two objects: they are the harder ones to learn.
TWO_OBJECTS = {'train': 0.5, 'seen': 0.25, 'unseen': 0.25}
HOLD_OUT_EVERY = 10
# Bilinear weights are multiples of 1/256, so 8-bit values times two weights fit float32.
GRAIN = 256


class Phrase(NamedTuple):
  """What a caption says of one object."""

  colour: str
  kind: str
  direction: str


@dataclasses.dataclass(frozen=True)
class Object:
  """One moving garment; lengths are in pixels of the 64-pixel world.

  Attributes:
    phrase: what the caption says of it.
    image: number of its photograph within its kind.
    start: its near edge along the moving axis at frame 0, in [0, SPAN].
    speed: pixels a frame, signed: positive is right or down.
    lane: its near edge across the moving axis, constant.
  """

  phrase: Phrase
  image: int
  start: float
  speed: float
  lane: float


@dataclasses.dataclass(frozen=True)
class Scene:
  """Everything that a clip shows, in the order of the caption."""

  objects: tuple[Object, ...]


@functools.lru_cache(maxsize=1)
def photographs() -> dict[str, UInt8[np.ndarray, 'n 28 28']]:
  """The committed photographs of each kind."""
  with np.load(pathlib.Path(__file__).parent / 'assets' / 'fashion_mnist.npz') as file:
    return {kind: file[kind] for kind in KINDS}


def _uniform(key: tuple[int, int], count: int) -> np.ndarray:
  """`count` uniform float64 in [0, 1) from a 128-bit key."""
  raw = np.random.Philox(key=np.array(key, np.uint64)).random_raw(count)
  return (raw >> np.uint64(11)) * 2.0**-53


def _hold_out() -> tuple[Phrase, ...]:
  """Twelve combinations: every colour and kind occurs twice, every direction three times."""
  order = np.argsort(_uniform((2026, 0), 6))
  ways = np.argsort(_uniform((2026, 1), 12)) % 4
  pairs = [(i, order[(i + step) % 6]) for step in (0, 1) for i in range(6)]
  colours, directions = tuple(COLOURS), tuple(DIRECTIONS)
  return tuple(
    Phrase(colours[c], KINDS[k], directions[w]) for (c, k), w in zip(pairs, ways, strict=True)
  )


HELD_OUT = _hold_out()
_ALL = tuple(Phrase(c, k, d) for c in COLOURS for k in KINDS for d in DIRECTIONS)
_SEEN = tuple(phrase for phrase in _ALL if phrase not in HELD_OUT)


def _compatible(first: Phrase, pool: tuple[Phrase, ...]) -> tuple[Phrase, ...]:
  """The phrases that may share a clip with `first`: same axis, another colour."""
  axis = DIRECTIONS[first.direction][0]
  return tuple(p for p in pool if DIRECTIONS[p.direction][0] == axis and p.colour != first.colour)


def _pick(options, u: float):
  return options[int(u * len(options))]


def _place(phrase: Phrase, split: str, lane: float, u: np.ndarray) -> Object:
  """Draws photograph, start and speed from three uniforms."""
  count = len(photographs()[phrase.kind])
  for_train = [i for i in range(count) if i % HOLD_OUT_EVERY]
  image = _pick(for_train if split == 'train' else range(0, count, HOLD_OUT_EVERY), u[0])
  speed = SLOWEST + (FASTEST - SLOWEST) * u[1]
  behind = u[2] * min(HEADROOM, SPAN - FIRST_LEG * speed)
  sign = DIRECTIONS[phrase.direction][1]
  start = behind if sign > 0 else SPAN - behind
  return Object(phrase, image, float(start), float(sign * speed), float(lane))


def describe(index: int, split: str, seed: int = 0) -> Scene:
  """The scene of a clip.

  Args:
    index: number of the clip, any integer in [0, 2^63).
    split: 'train' (no held-out image, no held-out combination), 'seen' (held-out images,
      combinations as in 'train') or 'unseen' (held-out images, only held-out combinations).
    seed: another seed is another world of clips.

  Raises:
    InputError: the split is unknown.
  """
  if split not in SPLITS:
    raise InputError(f"split '{split}' is unknown: take one of {', '.join(SPLITS)}.")
  u = _uniform((seed * len(SPLITS) + SPLITS.index(split), index), 12)
  pool = HELD_OUT if split == 'unseen' else _SEEN
  first = _pick(pool, u[0])
  if u[1] >= TWO_OBJECTS[split]:
    return Scene((_place(first, split, SPAN / 2 + 16 * (u[2] - 0.5), u[4:7]),))
  second = _pick(_compatible(first, pool), u[3])
  lanes = [u[10] * (LANE - SPRITE), LANE + u[11] * (LANE - SPRITE)]
  near, far = lanes if u[2] < 0.5 else lanes[::-1]
  return Scene((_place(first, split, near, u[4:7]), _place(second, split, far, u[7:10])))


def positions(thing: Object, frames: int) -> Float[np.ndarray, 'f']:
  """Near edge along the moving axis at each frame: a triangle wave between 0 and SPAN."""
  free = thing.start + thing.speed * np.arange(frames)
  return SPAN - np.abs(free % (2 * SPAN) - SPAN)


def _weights(edges: np.ndarray, size: int) -> Float[np.ndarray, 'f size 28']:
  """Weights, in whole 1/256, with which each output pixel sees each sprite pixel."""
  edges = np.round(edges * GRAIN) / GRAIN
  reach = max(1.0, WORLD / size)
  seen = (np.arange(size) + 0.5) * (WORLD / size)
  offset = seen[:, None] - (np.arange(SPRITE) + 0.5)
  distance = np.abs(offset.astype(np.float32) - edges.astype(np.float32)[:, None, None])
  return np.round(np.maximum(0, 1 - distance / np.float32(reach)) * np.float32(GRAIN / reach))


def _film(thing: Object, frames: int, size: int) -> tuple[UInt8[np.ndarray, 'f h w'], slice]:
  """Brightness of one object, and the rows (or columns) across its way that it touches."""
  image = photographs()[thing.phrase.kind][thing.image].astype(np.float32)
  vertical = DIRECTIONS[thing.phrase.direction][0] == 0
  across = _weights(np.array([thing.lane]), size)[0]
  touched = np.flatnonzero(across.any(1))
  touched = slice(touched[0], touched[-1] + 1)
  lane = (image if vertical else image.T) @ across[touched].T  # [along, across]
  along = _weights(positions(thing, frames), size)
  film = along.reshape(frames * size, SPRITE) @ lane
  film = ((film + GRAIN * GRAIN // 2) * np.float32(1 / (GRAIN * GRAIN))).astype(np.uint8)
  film = film.reshape(frames, size, -1)
  return (film if vertical else film.transpose(0, 2, 1)), touched


def render(scene: Scene, frames: int = 81, size: int = WORLD) -> UInt8[np.ndarray, 'f size size 3']:
  """Films a scene on black; another `size` is the same world, sampled more coarsely or finely."""
  video = np.zeros((frames, size, size, 3), np.uint8)
  for thing in scene.objects:
    film, touched = _film(thing, frames, size)
    vertical = DIRECTIONS[thing.phrase.direction][0] == 0
    part = video[:, :, touched] if vertical else video[:, touched]
    for channel in COLOURS[thing.phrase.colour]:
      np.maximum(part[..., channel], film, out=part[..., channel])
  return video


def films(
  index: Int[np.ndarray, 'b'], split: str, seed: int, frames: int = 81, size: int = WORLD
) -> UInt8[np.ndarray, 'b f size size 3']:
  """Some rendered clips; arguments as for `describe` and `render`."""
  return np.stack([render(describe(int(i), split, seed), frames, size) for i in index])


def sentence(phrases: list[Phrase] | tuple[Phrase, ...]) -> str:
  """The caption that says these phrases."""
  return ' and '.join(f'a {p.colour} {p.kind} moves {p.direction}' for p in phrases)


def caption(scene: Scene) -> str:
  """The sentence that describes a scene."""
  return sentence([thing.phrase for thing in scene.objects])


def parse(text: str) -> tuple[Phrase, ...]:
  """Reads a caption back.

  Raises:
    InputError: a word is unknown, the sentence has another form, or two objects share a colour.
  """
  words = text.split()
  unknown = [word for word in words if word not in NANO_WORDS]
  if unknown:
    raise InputError(
      f"'{unknown[0]}' in prompt '{text}' is unknown here: use {', '.join(NANO_WORDS)}."
    )
  phrases = []
  for part in ' '.join(words).split(' and '):
    match part.split():
      case ['a', colour, kind, 'moves', way] if (
        colour in COLOURS and kind in KINDS and way in DIRECTIONS
      ):
        phrases.append(Phrase(colour, kind, way))
      case _:
        raise InputError(
          f"prompt '{text}' is no caption of the nano world: write it like '{sentence(_ALL[:1])}'."
        )
  if len(phrases) > 2 or len({p.colour for p in phrases}) < len(phrases):
    raise InputError(f"prompt '{text}' must name one object, or two of different colours.")
  return tuple(phrases)


def captions(split: str, indices: Int[np.ndarray, 'b'], seed: int = 0) -> list[str]:
  """The captions of some clips, without rendering them."""
  return [caption(describe(int(index), split, seed)) for index in indices]
