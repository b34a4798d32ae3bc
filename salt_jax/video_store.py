"""Videos and prompts encoded once, for the stages that learn from real clips: what `salt_jax.precompute` makes of a
file that names both, for Causal Forcing's autoregressive model, its trajectories and its consistency.

Of each video the first `video.frames` frames at `video.fps` are taken, the middle of each, in the config's size.
"""

import concurrent.futures
import functools
import logging
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8
from ml_collections import ConfigDict

from salt_jax import (
  captioned,
  codec,
  data,
  footage,
  hosts,
  precompute,
  recipe,
  tokens,
  video,
  weights,
)
from salt_jax.recipe import Recipe
from salt_jax.store import Field, fill, sha256

log = logging.getLogger(__name__)


def _ahead(read: Callable, paths: Sequence[str]) -> Iterator[np.ndarray]:
  """`read` of each, the next one while this one is worked on."""
  with concurrent.futures.ThreadPoolExecutor(1) as pool:
    waiting = pool.submit(read, paths[0])
    for path in paths[1:]:
      found, waiting = waiting.result(), pool.submit(read, path)
      yield found
    yield waiting.result()


def _encoder(
  config: ConfigDict, rec: Recipe
) -> Callable[[UInt8[np.ndarray, 't h w 3']], Float[np.ndarray, 'f h w c']]:
  params = jax.device_put(weights.load(config.weights.vae, 'vae', rec.vae))
  return lambda clip: np.asarray(
    codec.encode(params, jnp.asarray(clip[None]), rec.vae)[0].astype(jnp.float16)
  )


def videos_and_prompts(config: ConfigDict, rec: Recipe, path: str, folder: str, batch: int) -> str:
  """Encodes the videos of a file of prompts, `batch` a shard, one after another; returns the folder.

  Fields as `precompute.latents` makes them: latents float16 `[f h w c]`, ids, mask. Negative prompts of the file are
  not kept: the stages that read this take the config's.

  Args:
    config: whose VAE and tokenizer they are, and the frames, rate and size of its clips.
    rec: the same, built.
    path: file of prompts (`prompts.read`) that names a video for each.
    folder: where the store goes; what a killed run left there is kept.
    batch: records of a shard.

  Raises:
    InputError: files that are missing, wrong or too short, or a folder that was made of others.
  """
  video.require_pyav(path)
  weights.require(config, ('vae',))
  named = captioned.files(path, ('video',), 'a store of clips wants')
  words = tokens.tokenizer(config, rec)
  rows, length = data.tokenized(path, words)
  count, fps = config.video.frames, config.video.fps
  size = config.video.height, config.video.width
  decode = functools.partial(footage.check, count=count, fps=fps)
  waiting = captioned.due(named, folder, batch)
  log.info('%s: decoding %d videos to see that each can be read …', folder, len(waiting))
  hosts.together(lambda: captioned.check(waiting, decode))
  facts = {
    'prompts': sha256(path),
    'videos': hosts.together(lambda: captioned.digest(named, 'video', captioned.ends)),
    'video': dict(config.video),
    'tokenizer': words.digest,
    'encoders': {'vae': sha256(weights.resolve(config.weights.vae))},
  }
  latents = Field(recipe.latent_shape(config), 'float16')
  encode = _encoder(config, rec)
  read = functools.partial(footage.frames, count=count, fps=fps, size=size)

  def make(number):
    part = slice(number * batch, (number + 1) * batch)
    clips = _ahead(read, [file for (file,) in named[part]])
    return {'latents': np.stack([encode(clip) for clip in clips])} | captioned.tokens(
      rows[part], length
    )

  fields = precompute.fields_of(config, rec, latents=latents)
  return fill(folder, fields, -(-len(rows) // batch), facts, make)
