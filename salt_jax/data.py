"""Input pipelines on Grain in which the batch is a function of the step.

Batch s holds the global examples [s B, (s + 1) B) of an endless sequence, and process p of P takes
the p-th contiguous share of them. So a run resumes by starting at its step, and any number of
processes sees the same global batches. Every pipeline yields dicts of NumPy arrays; `index` is the
example's place in the sequence, from which the caller derives its noise.
"""

import dataclasses
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, Protocol

import grain
import numpy as np
from jaxtyping import Float, Int

from salt_jax import clips as world
from salt_jax import prompts
from salt_jax.errors import InputError
from salt_jax.models.text import WordTokenizer, pad
from salt_jax.store import Store

Batch = dict[str, np.ndarray]
Ids = Int[np.ndarray, 'n']


class Tokenizer(Protocol):
  """Prompts -> (ids int32 [b n], mask bool [b n]), n being `length`."""

  length: int

  def __call__(self, prompts: list[str]) -> tuple[np.ndarray, np.ndarray]: ...


@dataclasses.dataclass(frozen=True)
class Feed:
  """Which part of the endless sequence this process reads, and how.

  Attributes:
    batch: global batch size.
    seed: seed of clips and shuffles.
    start_step: step of the first batch; to resume, the step to do next.
    rows: rows of the global batch that this process reads; by default all.
    workers: 0 prepares batches in threads; more starts as many processes, which needs parsed absl
      flags and a main module guarded by `if __name__ == '__main__'`.
    threads: batches prepared at once in a process.
  """

  batch: int
  seed: int = 0
  start_step: int = 0
  rows: tuple[int, ...] | None = None
  workers: int = 0
  threads: int = 2

  def __post_init__(self):
    if self.batch < 1:
      raise InputError(f'batch size {self.batch} must be positive.')

  def positions(self, step: int) -> Int[np.ndarray, 'b']:
    """Global positions of this process's examples at a step."""
    rows = np.arange(self.batch) if self.rows is None else np.array(self.rows)
    return step * self.batch + rows.astype(np.int64)


def _stream(feed: Feed, make: Callable[[np.ndarray], Batch]) -> Iterator[Batch]:
  """Maps the positions of each step, from the first one on, to its batch."""
  steps = grain.MapDataset.range(feed.start_step, sys.maxsize // (2 * feed.batch))
  batches = steps.map(lambda step: make(feed.positions(step)))
  options = grain.ReadOptions(num_threads=feed.threads, prefetch_buffer_size=2 * feed.threads)
  dataset = batches.to_iter_dataset(options)
  if feed.workers:
    # Inherited by the workers: as many BLAS pools as processes would fight for the same cores.
    os.environ.setdefault('OPENBLAS_NUM_THREADS', '1')
    dataset = dataset.mp_prefetch(
      grain.MultiprocessingOptions(num_workers=feed.workers, per_worker_buffer_size=2)
    )
  return iter(dataset)


def _tokenized(feed: Feed, split: str, length: int) -> Callable[[np.ndarray], Batch]:
  """Positions -> index, ids and mask of the clips there."""
  tokenize = WordTokenizer(world.NANO_WORDS, length)

  def make(positions: np.ndarray) -> Batch:
    ids, mask = tokenize(world.captions(split, positions, feed.seed))
    return {'index': positions, 'ids': ids, 'mask': mask}

  return make


def captions(feed: Feed, split: str = 'train', length: int = 16) -> Iterator[Batch]:
  """Tokenised captions of the nano world, in the order of `clips`, without rendering.

  Yields:
    index int64 [b], ids int32 [b n], mask bool [b n].
  """
  return _stream(feed, _tokenized(feed, split, length))


def clips(
  feed: Feed,
  split: str = 'train',
  frames: int = 81,
  size: int = world.WORLD,
  length: int = 16,
) -> Iterator[Batch]:
  """Rendered clips of the nano world and their tokenised captions.

  Yields:
    video uint8 [b f h w 3], index int64 [b], ids int32 [b n], mask bool [b n].
  """
  tokens = _tokenized(feed, split, length)

  def make(positions: np.ndarray) -> Batch:
    scenes = [world.describe(int(position), split, feed.seed) for position in positions]
    video = np.stack([world.render(scene, frames, size) for scene in scenes])
    return {'video': video} | tokens(positions)

  return _stream(feed, make)


def _shuffled(feed: Feed, count: int) -> grain.MapDataset:
  """Endless rows in [0, count), in a new order every epoch; random access by position."""
  return grain.MapDataset.range(count).seed(feed.seed).shuffle().repeat()


class Tokens(NamedTuple):
  """Ids of prompts without padding, each with those of its negative prompt if it has one; `length` to pad to."""

  rows: list[tuple[Ids, Ids | None]]
  length: int


def tokenized(path: str, tokenize: Tokenizer) -> Tokens:
  """The prompts of a file (`prompts.read`).

  Raises:
    InputError: see `prompts.read`; or a prompt that cannot be tokenised.
  """

  def ids_of(text: str) -> Ids:
    ids, mask = tokenize([text])
    return ids[0, : mask.sum()]

  rows = [
    (ids_of(entry.prompt), ids_of(entry.negative) if entry.negative else None)
    for entry in prompts.read(path)
  ]
  return Tokens(rows, tokenize.length)


def token_batches(tokens: Tokens, feed: Feed) -> Iterator[Batch]:
  """Prompts, cycled in an order that is new in every epoch.

  Yields:
    index int64 [b], row int64 [b] (number of the prompt, from 0), ids int32 [b n], mask bool [b n]; and if any prompt
    has a negative one, negative_ids, negative_mask and has_negative bool [b].
  """
  found, length = tokens
  order, negatives = _shuffled(feed, len(found)), any(other is not None for _, other in found)

  def make(positions: np.ndarray) -> Batch:
    rows = np.array([order[int(position)] for position in positions], np.int64)
    ids, mask = pad([found[row][0] for row in rows], length)
    batch = {'index': positions, 'row': rows, 'ids': ids, 'mask': mask}
    if negatives:
      own = [found[row][1] for row in rows]
      ids, mask = pad([() if ids is None else ids for ids in own], length)
      batch |= {'negative_ids': ids, 'negative_mask': mask, 'has_negative': mask.any(1)}
    return batch

  return _stream(feed, make)


_NEXT = 1 << 16  # what the seed of the second prompts differs by


def prompt_pairs(feed: Feed, make: Callable[[Feed], Iterator[Batch]]) -> Iterator[Batch]:
  """Batches of prompts, each with a second prompt, drawn apart, that a video may change to.

  Args:
    feed: which part to read.
    make: the batches of one prompt, such as `captions`.

  Yields:
    what `make` does, and next_ids int32 [b n], next_mask bool [b n].
  """
  others = make(dataclasses.replace(feed, seed=feed.seed + _NEXT))
  for batch, other in zip(make(feed), others, strict=False):
    yield batch | {'next_ids': other['ids'], 'next_mask': other['mask']}


def store_batches(folder: str, feed: Feed, fields: tuple[str, ...] = ()) -> Iterator[Batch]:
  """Records of an array store, shuffled anew in every epoch.

  Args:
    folder: a finished store.
    feed: which part to read.
    fields: the fields to yield; none named means all.

  Yields:
    each field [b ...], index int64 [b], row int64 [b] (number of the record in the store).

  Raises:
    InputError: the store is unfinished or damaged, lacks a field, or has one that varies in size.
  """
  store = Store(folder)
  names = fields or tuple(store.fields)
  lacking = [name for name in names if name not in store.fields]
  if lacking:
    raise InputError(
      f"store {folder} has no field '{lacking[0]}': it has {', '.join(store.fields)}."
    )
  varying = [name for name in names if store.fields[name].varies]
  if varying:
    raise InputError(
      f"store {folder} has texts in its field '{varying[0]}': set data.kind=text_store."
    )
  order = _shuffled(feed, len(store))

  def make(positions: np.ndarray) -> Batch:
    rows = np.array([order[int(position)] for position in positions], np.int64)
    records = [store[int(row)] for row in rows]
    batch = {name: np.stack([record[name] for record in records]) for name in names}
    return batch | {'index': positions, 'row': rows}

  return _stream(feed, make)


def padded(rows: Sequence[Float[np.ndarray, '_ d']], length: int) -> Float[np.ndarray, 'b n d']:
  """Encoder rows of texts, zero behind each."""
  out = np.zeros((len(rows), length, rows[0].shape[1]), rows[0].dtype)
  for i, row in enumerate(rows):
    out[i, : len(row)] = row
  return out


def text_store(folder: str, length: int, feed: Feed) -> Iterator[Batch]:
  """Prompts that `precompute.texts` encoded, shuffled anew in every epoch.

  Args:
    folder: a finished store.
    length: rows to pad to.
    feed: which part to read.

  Yields:
    text bfloat16 [b n d], index int64 [b], row int64 [b] (number of the prompt, from 0); and if the prompts' file has
    negative prompts, negative_text and has_negative bool [b].

  Raises:
    InputError: the store is unfinished or damaged.
  """
  store = Store(folder)
  order = _shuffled(feed, len(store))

  def make(positions: np.ndarray) -> Batch:
    rows = np.array([order[int(position)] for position in positions], np.int64)
    records = [store[int(row)] for row in rows]
    batch = {'text': padded([record['text'] for record in records], length)}
    if store.config['negatives']:
      own = [record['negative'] for record in records]
      batch['negative_text'] = padded(own, length)
      batch['has_negative'] = np.array([len(x) > 0 for x in own])
    return batch | {'index': positions, 'row': rows}

  return _stream(feed, make)
