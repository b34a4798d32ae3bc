"""Random weights under Wan's names, a tokenizer and prompts: text to video at a real size with nothing downloaded.

  python -m tests.rehearsal --config=configs/selfforcing.py
  python -m salt_jax.main --config=configs/selfforcing.py --config.total_steps=4 --workdir=/tmp/rehearsal

writes the files that `config.weights` and `config.data.path` name, in bfloat16, and keeps those that are there. The
videos show nothing; memory, time, sharding, checkpoints and what a pod needs around them are those of Wan's weights.
"""

import functools
import math
import os
import zlib
from concurrent import futures

import ml_dtypes
import numpy as np
from absl import flags
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from salt_jax import cli, convert, recipe, tensor_files, weights
from salt_jax.errors import InputError
from salt_jax.models import unigram
from salt_jax.tensor_files import Tensor

PROMPTS = ('a cat walks on wet grass', 'waves break at night', 'a red kite over a field', 'steam')
_POOL = 2**24 + 43  # normals that all tensors are cut from; prime to every width


@functools.cache
def normals(deviation: float) -> np.ndarray:
  """The bits of normals in bfloat16."""
  drawn = np.random.default_rng(0).standard_normal(_POOL, np.float32)
  return (drawn * np.float32(deviation)).astype(ml_dtypes.bfloat16).view(np.uint16)


def tensor(name: str, shape: tuple[int, ...]) -> Tensor:
  """A tensor of normals over the square root of its fan-in; scales of norms are 1, biases 0."""

  def read():
    if len(shape) < 2 or name.endswith('gamma'):
      return np.full(shape, 0.0 if name.endswith('bias') else 1.0, ml_dtypes.bfloat16)
    start = zlib.crc32(name.encode()) % _POOL
    bits = np.roll(normals(math.prod(shape[1:]) ** -0.5), start)
    return np.resize(bits, shape).view(ml_dtypes.bfloat16)

  return Tensor(shape, np.dtype(ml_dtypes.bfloat16), read)


def write_network(path: str, name: str, cfg) -> None:
  """A file of random weights for a network of these sizes."""
  network = weights.NETWORKS.get(name, 'dit')
  shapes = convert.wan_shapes(weights.shapes(network, cfg), network)
  tensor_files.write(path, {key: tensor(key, shape) for key, shape in shapes.items()})


def write_tokenizer(folder: str, size: int) -> None:
  """A `tokenizer.json` of `size` ids: UMT5's symbols at their places, letters, and ids that no text has."""
  symbols = ('<pad>', '</s>', '<s>', '<unk>')
  pieces = [(symbol, 0.0) for symbol in symbols]
  pieces += [(mark, -5.0) for mark in sorted(set('▁abcdefghijklmnopqrstuvwxyz,.'))]
  pieces += [(f'<unused_{number}>', -99.0) for number in range(len(pieces), size)]
  made = Tokenizer(models.Unigram(pieces, unk_id=symbols.index('<unk>')))
  made.pre_tokenizer = pre_tokenizers.Metaspace()
  made.decoder = decoders.Metaspace()
  made.add_special_tokens(list(symbols))
  os.makedirs(folder, exist_ok=True)
  made.save(os.path.join(folder, 'tokenizer.json'))


def define_flags() -> None:
  cli.define_config('Experiment whose files to make up, such as configs/selfforcing.py.')


def program() -> None:
  config = flags.FLAGS.config
  if config is None or config.size == 'nano':
    raise InputError(
      'pass an experiment of a real size, such as --config=configs/selfforcing.py: nano has files of its own.'
    )
  rec, files = recipe.build(config), config.weights
  sizes = {'vae': rec.vae, 'text': rec.text, 'clip': rec.clip, 'teacher': rec.teacher}
  sizes |= dict.fromkeys(('init', 'critic'), rec.model)
  # Teacher and critic may be one file.
  missing = {
    files[name]: name
    for name in files
    if sizes.get(name) is not None and not os.path.exists(files[name])
  }
  with futures.ThreadPoolExecutor() as pool:
    for done in [pool.submit(write_network, *item, sizes[item[1]]) for item in missing.items()]:
      done.result()
  print('\n'.join(f'wrote {path}' for path in missing), flush=True)
  if not unigram.find(files.tokenizer):
    write_tokenizer(files.tokenizer, rec.text.vocab)
  if config.data.kind == 'prompts' and not os.path.exists(config.data.path):
    with open(config.data.path, 'w', encoding='utf-8') as file:
      file.write('\n'.join(PROMPTS) + '\n')


if __name__ == '__main__':
  cli.run(program, define_flags)
