"""Which network a sampler is given: of a run, of a file that a run exported, or of any file and its config."""

import math
import os
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, PyTree, UInt8
from ml_collections import ConfigDict

from salt_jax import convert, images, places, recipe, tensor_files, video, weights
from salt_jax.checks import FEW_STEP
from salt_jax.errors import InputError
from salt_jax.models import wan
from salt_jax.recipe import Recipe


def load(path: str, given: ConfigDict | None = None) -> tuple[ConfigDict, Recipe, PyTree]:
  """The averaged generator of a run or an exported file, and the config that made it.

  Args:
    path: workdir or file; with `given` any file in Wan's names.
    given: config that describes the file.

  Raises:
    InputError: nothing there, damaged, or of a stage without a few-step student.
  """
  config, rec = described(path, given)
  return config, rec, weights.load_narrowed(path, 'dit', rec.model)


def described(path: str, given: ConfigDict | None = None) -> tuple[ConfigDict, Recipe]:
  """The same without the generator, which is not read.

  Raises:
    InputError: nothing there, or of a stage without a few-step student.
  """
  if given is None and places.folder_of(path).is_dir():
    config = weights.config_of_run(path)
    return config, _student_recipe(config, path)
  config = weights.config_of(weights.resolve(path)) if given is None else given
  if path.startswith('assets:'):
    config.weights.update(weights.shipped(config.weights))
  return config, _student_recipe(config, path)


def student_of(path: str, rec: Recipe) -> PyTree:
  """The student of a run or an exported file, for the networks of `rec`.

  Raises:
    InputError: nothing there, damaged, or of another size.
  """
  own = described(path)[1]
  try:
    convert.check(*(weights.shapes('dit', one.model) for one in (own, rec)))
  except InputError as error:
    raise InputError(f'--checkpoint={path} and --config do not fit: {error}') from None
  return weights.load_narrowed(path, 'dit', rec.model)


def describes_itself(path: str) -> bool:
  """Whether a checkpoint knows the config that made it: runs do, and what they export.

  Raises:
    InputError: neither a folder nor a safetensors file.
  """
  if places.folder_of(path).is_dir():
    return True
  return 'config' in tensor_files.scan(weights.resolve(path))[1]


def _student_recipe(config: ConfigDict, path: str) -> Recipe:
  if 'stage' not in config:
    raise InputError(f'{path} is no run of salt_jax: its config names no stage.')
  if config.stage not in FEW_STEP:
    raise InputError(
      f'{path} was made by the stage "{config.stage}", which has no few-step student: a bidirectional teacher '
      'is sampled with --sampler=unipc.'
    )
  return recipe.build(config)


def first_image(
  path: str | None, config: ConfigDict, rec: Recipe
) -> UInt8[np.ndarray, 'h w 3'] | None:
  """The picture that an I2V network begins with; those of the nano world have one size, others are `fitted` to theirs.

  Raises:
    InputError: the student takes none or wants one, or it is no picture, too narrow, or for nano of another size.
  """
  if not rec.model.frame_channels:
    if path:
      raise InputError(f'--image={path} has no use: this network is given text alone.')
    return None
  size = config.video.height, config.video.width
  if not path:
    shape = f' of {size[1]}x{size[0]} pixels' if config.size == 'nano' else ''
    raise InputError(f'pass --image: this network continues a picture{shape}.')
  image = video.read_image(path)
  if config.size == 'nano' and image.shape[:2] != size:
    raise InputError(
      f'--image={path} is {image.shape[1]}x{image.shape[0]}: scale it to {size[1]}x{size[0]} pixels.'
    )
  if config.size != 'nano' and not all(images.video_size(*image.shape[:2], math.prod(size))):
    raise InputError(
      f'--image={path} is {image.shape[1]}x{image.shape[0]}, too narrow for a video of its shape: crop it.'
    )
  return image


def given_pictures(
  paths: Sequence[str | None], config: ConfigDict, rec: Recipe
) -> list[UInt8[np.ndarray, 'h w 3']]:
  """The pictures of a network that is given none, a first frame, or first and last, of --image and --last_image.

  Raises:
    InputError: as `first_image`, or a last frame too many or too few.
  """
  first, last = paths
  image = first_image(first, config, rec)
  two = image is not None and rec.model.pictures == 2
  if last and not two:
    raise InputError(f'--last_image={last} has no use: this network is not given a last frame.')
  if two and not last:
    raise InputError('pass --last_image: this network is given the last frame besides the first.')
  return [x for x in (image, video.read_image(last) if last else None) if x is not None]


def fitted(
  config: ConfigDict, rec: Recipe, picture: UInt8[np.ndarray, 'h w 3'], *others: np.ndarray
) -> tuple[ConfigDict, Recipe, Float[np.ndarray, '1 k rows columns 3']]:
  """Config and recipe for a video of the picture's shape and the config's area, and its known frames (wan.md 5.5).

  Frames are as torch resizes them: not antialiased, and neither rounded nor clamped to 0 .. 255. Of the others the
  middle is taken, in the picture's shape.
  """
  size = config.video.height, config.video.width
  if config.size != 'nano':
    config = config.copy_and_resolve_references()
    size = images.video_size(*picture.shape[:2], size[0] * size[1])
    config.video.height, config.video.width = size
    rec = recipe.build(config)
  parts = picture, *(images.cropped(other, picture.shape[:2]) for other in others)
  return config, rec, images.resized(parts, size)


def load_teacher(
  path: str, given: ConfigDict | None = None
) -> tuple[ConfigDict, Recipe, wan.WanConfig, dict[str, PyTree]]:
  """A bidirectional teacher: config, recipe, its sizes, and its network 'dit', with 'text' if it was trained along.

  Args:
    path: workdir of a run of `pretrain`, a file it exported, assets:NAME, or with `given` any file in Wan's names.
    given: config whose sizes, text encoder and VAE the file belongs to.

  Raises:
    InputError: nothing there, damaged, of another size, or no bidirectional many-step model.
  """
  if given is not None:
    return _published(path, given)
  folder = places.folder_of(path).is_dir()
  config = weights.config_of_run(path) if folder else weights.config_of(weights.resolve(path))
  if config.get('stage') != 'flow':
    raise InputError(
      f'{path} was made by the stage "{config.get("stage")}", which is no many-step teacher: pass --sampler=student, '
      'or the --config that it belongs to.'
    )
  if path.startswith('assets:'):
    config.weights.update(weights.shipped(config.weights))
  rec = recipe.build(config)
  if folder:
    networks = {'dit': rec.model, 'umt5': rec.text}
    dit, text = (weights.load_narrowed(path, network, cfg) for network, cfg in networks.items())
    return config, rec, rec.model, {'dit': dit, 'text': text}
  if not path.startswith('assets:'):
    config.weights.text = _text_beside(path)
  networks = {'dit': weights.load_narrowed(path, 'dit', rec.model)}
  return config, rec, rec.model, networks


def _text_beside(path: str) -> str:
  """The text encoder that was trained with a teacher, which its run exported beside it."""
  text = path.replace('-dit.safetensors', '-text.safetensors')
  if text == path or not os.path.isfile(text):
    raise InputError(
      f'{path} needs the text encoder of its run: keep NAME-dit.safetensors and NAME-text.safetensors together.'
    )
  return text


def _published(path: str, config: ConfigDict):
  rec = recipe.build(config)
  sizes = [cfg for cfg in (rec.teacher, rec.model) if cfg is not None]
  if not sizes:
    raise InputError(f'{config.name} has no DiT: pass the --config of a teacher or a student.')
  for cfg in sizes:
    try:
      return config, rec, cfg, {'dit': weights.load_narrowed(path, 'dit', cfg)}
    except InputError as refused:
      error = refused
  raise error
