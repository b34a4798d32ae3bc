"""The program of `salt_jax.precompute`: prompts, or prompts and their pictures or videos, encoded once for training.

  python -m salt_jax.precompute --config=configs/selfforcing.py:1.3b --prompts=prompts.txt --output=texts
  python -m salt_jax.precompute --config=configs/selfforcing.py:14b,i2v --prompts=pictures.csv --output=first_frames
  python -m salt_jax.precompute --config=configs/causal_init.py:1.3b,stage=ar --prompts=videos.csv --output=latents

The first store is for `data.kind=text_store`; the others, of an image-to-video config and of a stage that learns from
real clips, for `data.kind=store`.
"""

import logging
from collections.abc import Callable

from absl import flags
from ml_collections import ConfigDict

from salt_jax import checks, cli, hosts, image_store, recipe, text_store, video_store
from salt_jax.errors import InputError
from salt_jax.recipe import Recipe
from salt_jax.store import Store

log = logging.getLogger('salt_jax.precompute')


def define_flags() -> None:
  cli.define_config('Experiment whose encoders they are, such as configs/selfforcing.py:nano.')
  flags.DEFINE_string(
    'prompts',
    None,
    'File of prompts: lines of text, .jsonl or .csv; for image-to-video, and for stages behind real clips, one of the '
    'latter, which names pictures, or videos.',
  )
  flags.DEFINE_string('output', None, 'Folder of the store.')
  flags.DEFINE_integer(
    'batch', 64, 'Prompts in a shard, encoded at once if they name no files.', lower_bound=1
  )
  hosts.define_flags('Join the other hosts of a slice; each encodes its share of the shards.')


def _maker(config: ConfigDict, rec: Recipe) -> Callable[..., str]:
  if config.stage in checks.FORCED:
    return video_store.videos_and_prompts
  if rec.model is not None and rec.model.frame_channels:
    return image_store.pictures_and_prompts
  return text_store.texts


def program() -> None:
  args = flags.FLAGS
  for name, what in (('config', 'an experiment'), ('prompts', 'a file'), ('output', 'a folder')):
    if not args[name].value:
      raise InputError(f'pass {what} as --{name}.')
  config = args.config
  rec = recipe.build(config)
  cli.check_folder('output', args.output)
  make = _maker(config, rec)
  with hosts.joined(args):
    hosts.check_same(config, args.output)
    store = Store(make(config, rec, args.prompts, args.output, args.batch))
    log.info('%d prompts are in %s', len(store), args.output)
