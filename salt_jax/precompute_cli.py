"""The program of `salt_jax.precompute`: prompts, or prompts and their pictures, encoded once for training.

  python -m salt_jax.precompute --config=configs/selfforcing.py:1.3b --prompts=prompts.txt --output=texts
  python -m salt_jax.precompute --config=configs/selfforcing.py:14b,i2v --prompts=pictures.csv --output=first_frames

The first store is for `data.kind=text_store`; the second, of an image-to-video config, for `data.kind=store`.
"""

import logging

from absl import flags

from salt_jax import cli, hosts, image_store, recipe, text_store
from salt_jax.errors import InputError
from salt_jax.store import Store

log = logging.getLogger('salt_jax.precompute')


def define_flags() -> None:
  cli.define_config('Experiment whose encoders they are, such as configs/selfforcing.py:nano.')
  flags.DEFINE_string(
    'prompts',
    None,
    'File of prompts: lines of text, .jsonl or .csv; for image-to-video one of the latter, which names pictures.',
  )
  flags.DEFINE_string('output', None, 'Folder of the store.')
  flags.DEFINE_integer(
    'batch', 64, 'Prompts in a shard; without pictures they are encoded at once.', lower_bound=1
  )
  hosts.define_flags('Join the other hosts of a slice; each encodes its share of the shards.')


def program() -> None:
  args = flags.FLAGS
  for name, what in (('config', 'an experiment'), ('prompts', 'a file'), ('output', 'a folder')):
    if not args[name].value:
      raise InputError(f'pass {what} as --{name}.')
  config = args.config
  rec = recipe.build(config)
  cli.check_folder('output', args.output)
  pictures = rec.model is not None and rec.model.frame_channels
  make = image_store.pictures_and_prompts if pictures else text_store.texts
  with hosts.joined(args):
    hosts.check_same(config, args.output)
    store = Store(make(config, rec, args.prompts, args.output, args.batch))
    log.info('%d prompts are in %s', len(store), args.output)
