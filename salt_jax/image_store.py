"""Pictures and prompts encoded once, for image-to-video: what `salt_jax.precompute` makes of a file that names both.

A batch has one shape, so of each picture the middle is taken, in the config's: CLIP sees that, and the VAE the same
resized as torch does it. When sampling nothing is cut, and the video takes the picture's shape (`loading.fitted`).
"""

import concurrent.futures
import hashlib
import itertools
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Float, UInt8
from ml_collections import ConfigDict

from salt_jax import data, hosts, images, precompute, prompts, tokens, video, weights
from salt_jax.errors import InputError
from salt_jax.models.text import pad
from salt_jax.recipe import Recipe
from salt_jax.store import Field, fill, owed, sha256


def _pictures(path: str, count: int) -> list[tuple[str, ...]]:
  """The picture of each prompt of a file, or first and last.

  Raises:
    InputError: a prompt without, or whose picture is no name of a file.
  """
  names = ('image', 'last_image')[:count]
  pictures = [tuple(getattr(entry, name) for name in names) for entry in prompts.read(path)]
  for number, files in enumerate(pictures, 1):
    if None in files:
      keys = ', '.join(f'"{name}": "FILE"' for name in names)
      raise InputError(
        f'prompt {number} of {path} names no {names[files.index(None)]}: image-to-video wants .jsonl of '
        f'{{"prompt": "...", {keys}}}, or .csv with the columns prompt, {", ".join(names)}.'
      )
    for name, file in zip(names, files, strict=True):
      if not isinstance(file, str):
        raise InputError(
          f'prompt {number} of {path}: "{name}" must be a string, the name of a file.'
        )
  return pictures


def _due(pictures: Sequence[tuple[str, ...]], folder: str, batch: int) -> list[str]:
  """Those that this process has still to encode, `batch` prompts a shard."""
  shards = owed(folder, -(-len(pictures) // batch))
  return [file for n in shards for files in pictures[n * batch : (n + 1) * batch] for file in files]


def _check(pictures: Sequence[str]) -> None:
  """Decodes each, so that a damaged one is not found behind hours of work.

  Raises:
    InputError: no such file, or no picture.
  """

  def one(path: str) -> None:
    video.read_image(path)

  with concurrent.futures.ThreadPoolExecutor() as pool:
    list(pool.map(one, pictures))


def _digest(pictures: Sequence[str]) -> str:
  """SHA-256 of all files.

  Raises:
    InputError: one that cannot be read.
  """

  def one(path: str) -> str:
    try:
      return sha256(path)
    except OSError as error:
      raise InputError(f'{path} cannot be read: put the picture there.') from error

  with concurrent.futures.ThreadPoolExecutor() as pool:
    return hashlib.sha256(''.join(pool.map(one, pictures)).encode()).hexdigest()


def _prompts(rows: Sequence[tuple], length: int) -> dict[str, np.ndarray]:
  ids, mask = pad([own for own, _ in rows], length)
  return {'ids': ids, 'mask': mask}


def _negatives(rows: Sequence[tuple], length: int) -> dict[str, np.ndarray]:
  ids, mask = pad([() if other is None else other for _, other in rows], length)
  return {'negative_ids': ids, 'negative_mask': mask, 'has_negative': mask.any(1)}


def framed(
  pictures: Sequence[UInt8[np.ndarray, 'h w 3']], size: tuple[int, int]
) -> tuple[Float[np.ndarray, '1 k rows columns 3'], list[UInt8[np.ndarray, '1 m n 3']]]:
  """The known frames of a video of (rows, columns), of levels 0 .. 255, and what CLIP sees."""
  parts = [images.cropped(picture, size) for picture in pictures]
  return images.resized(parts, size), [part[None] for part in parts]


def pictures_and_prompts(
  config: ConfigDict, rec: Recipe, path: str, folder: str, batch: int
) -> str:
  """Encodes the pictures of a file of prompts, `batch` a shard, one after another; returns the folder.

  Fields as `precompute.conditions` makes them: ids, mask, condition, and image if the model takes rows of CLIP; and if
  any prompt has a negative one, negative_ids, negative_mask and has_negative.

  Args:
    config: whose VAE, CLIP tower and tokenizer they are, and the size of the first frames.
    rec: the same, built.
    path: file of prompts (`prompts.read`) that names a picture for each, or first and last.
    folder: where the store goes; what a killed run left there is kept.
    batch: records of a shard.

  Raises:
    InputError: files that are missing or wrong, or a folder that was made of others.
  """
  needed = ('vae', 'clip') if rec.model.image_dim else ('vae',)
  weights.require(config, needed)
  pictures, words = _pictures(path, rec.model.pictures), tokens.tokenizer(config, rec)
  rows, length = data.tokenized(path, words)
  negatives = any(other is not None for _, other in rows)
  size = config.video.height, config.video.width
  hosts.together(lambda: _check(_due(pictures, folder, batch)))
  facts = {
    'prompts': sha256(path),
    'pictures': _digest(list(itertools.chain(*pictures))),
    'video': dict(config.video),
    'tokenizer': words.digest,
    'encoders': {name: sha256(weights.resolve(config.weights[name])) for name in needed},
  }
  fields, encode = precompute.fields_of(config, rec), precompute.given(config, rec)
  if negatives:
    fields |= {
      'negative_ids': fields['ids'],
      'negative_mask': fields['mask'],
      'has_negative': Field((), 'bool'),
    }

  def make(number):
    part = slice(number * batch, (number + 1) * batch)
    made = [
      jax.tree.map(np.asarray, encode(*framed([video.read_image(file) for file in files], size)))
      for files in pictures[part]
    ]
    record = {name: np.concatenate([one[name] for one in made]) for name in made[0]}
    return (
      record | _prompts(rows[part], length) | (_negatives(rows[part], length) if negatives else {})
    )

  return fill(folder, fields, -(-len(rows) // batch), facts, make)
