"""Makes fashion_mnist.npz, the photographs of the nano world, from the published idx files.

  python -m salt_jax.assets.make_fashion_mnist --source=FOLDER --output=fashion_mnist.npz

FOLDER holds train-images-idx3-ubyte.gz and train-labels-idx1-ubyte.gz of Fashion-MNIST
(MIT, https://github.com/zalandoresearch/fashion-mnist). Of six classes that are easy to tell
apart, 360 photographs are kept: the first, in file order, that are bright enough to carry a colour
and whose five nearest neighbours (Euclidean, among the first 1,000 bright ones of each class) are
all of their own class.
"""

import gzip
import os

import numpy as np
from absl import app, flags, logging

from salt_jax.errors import InputError

_SOURCE = flags.DEFINE_string('source', None, 'Folder of the idx.gz files.', required=True)
_OUTPUT = flags.DEFINE_string('output', None, 'npz to write.', required=True)

LABELS = {'t-shirt': 0, 'trouser': 1, 'dress': 3, 'sneaker': 7, 'bag': 8, 'boot': 9}
PER_CLASS = 360
FOREGROUND = 8
DARKEST_MEAN = 100.0
CANDIDATES = 1000
NEIGHBOURS = 5


def read_idx(path: str) -> np.ndarray:
  """Reads one gzipped idx file of unsigned bytes into an array of its own shape."""
  if not os.path.exists(path):
    raise InputError(f'{path} is missing: point --source at the folder of the Fashion-MNIST files.')
  with gzip.open(path) as file:
    data = file.read()
  rank = data[3]
  shape = np.frombuffer(data, '>i4', count=rank, offset=4)
  return np.frombuffer(data, np.uint8, offset=4 + 4 * rank).reshape(shape)


def bright(image: np.ndarray) -> bool:
  """Whether the garment itself, not its frame, is bright on average."""
  return image[image > FOREGROUND].mean() >= DARKEST_MEAN


def typical(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """Whether all nearest neighbours of each image have its label: bool [n]."""
  flat = images.reshape(len(images), -1).astype(np.float32)
  squares = (flat**2).sum(1)
  distance = squares[:, None] + squares - 2 * flat @ flat.T
  np.fill_diagonal(distance, np.inf)
  nearest = np.argpartition(distance, NEIGHBOURS, 1)[:, :NEIGHBOURS]
  return (labels[nearest] == labels[:, None]).all(1)


def subset(images: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
  """Class name -> uint8 [360, 28, 28], in file order."""
  groups = {
    label: [image for image in images[labels == label] if bright(image)]
    for label in LABELS.values()
  }
  pool = np.concatenate([np.stack(group[:CANDIDATES]) for group in groups.values()])
  pool_labels = np.repeat(list(LABELS.values()), CANDIDATES)
  kept = typical(pool, pool_labels)
  return {name: pool[kept & (pool_labels == label)][:PER_CLASS] for name, label in LABELS.items()}


def main(argv: list[str]) -> None:
  del argv
  images = read_idx(os.path.join(_SOURCE.value, 'train-images-idx3-ubyte.gz'))
  labels = read_idx(os.path.join(_SOURCE.value, 'train-labels-idx1-ubyte.gz'))
  np.savez_compressed(_OUTPUT.value, **subset(images, labels))
  logging.info('%s: %d bytes', _OUTPUT.value, os.path.getsize(_OUTPUT.value))


if __name__ == '__main__':
  app.run(main)
