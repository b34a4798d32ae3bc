"""Pictures and prompts encoded once, for image-to-video: what `salt_jax.precompute` makes of a file that names both.

A batch has one shape, so of each picture the middle is taken, in the config's: CLIP sees that, and the VAE the same
resized as torch does it. When sampling nothing is cut, and the video takes the picture's shape (`loading.fitted`).
"""

from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Float, UInt8
from ml_collections import ConfigDict

from salt_jax import captioned, data, hosts, images, precompute, tokens, video, weights
from salt_jax.models.text import pad
from salt_jax.recipe import Recipe
from salt_jax.store import Field, fill, sha256


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
  named = ('image', 'last_image')[: rec.model.pictures]
  pictures = captioned.files(path, named, 'image-to-video wants')
  words = tokens.tokenizer(config, rec)
  rows, length = data.tokenized(path, words)
  negatives = any(other is not None for _, other in rows)
  size = config.video.height, config.video.width
  hosts.together(lambda: captioned.check(captioned.due(pictures, folder, batch), video.read_image))
  facts = {
    'prompts': sha256(path),
    'pictures': hosts.together(lambda: captioned.digest(pictures, 'picture')),
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
      record
      | captioned.tokens(rows[part], length)
      | (_negatives(rows[part], length) if negatives else {})
    )

  return fill(folder, fields, -(-len(rows) // batch), facts, make)
