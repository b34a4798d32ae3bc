"""How a batch and its clips are split: over the devices of a mesh, and into parts taken one after another."""

import jax
from ml_collections import ConfigDict

from salt_jax.errors import InputError

_PIXELS = 16  # of a token's side: 8 of the VAE, 2 of the patch


def parts(config: ConfigDict) -> int:
  """Parts of a batch, one after another; files of before the field take it whole."""
  return config.accumulate if 'accumulate' in config else 1


def whole(config: ConfigDict) -> str:
  """Why a stage takes its batch whole; '' if its examples share nothing."""
  if config.stage == 'vae':
    return 'the stage "vae" draws one noise for its whole batch'
  if 'streaming' in config:
    return 'streaming carries the cache of its whole batch from step to step'
  return ''


def check_parts(config: ConfigDict) -> None:
  """Refuses parts where a stage has none, and a batch that they do not divide.

  Raises:
    InputError: saying why.
  """
  count = parts(config)
  if count > 1 and whole(config):
    raise InputError(f'accumulate={count} does not fit: {whole(config)}. Set it to 1.')
  if config.batch % count:
    raise InputError(
      f'batch={config.batch} cannot be taken in accumulate={count} parts: make that a divisor.'
    )


def check_mesh(config: ConfigDict, mesh: jax.sharding.Mesh) -> None:
  """Refuses a batch, heads or tokens that the mesh cannot split.

  Raises:
    InputError: naming the axis and what it must divide.
  """
  check_batch(config.batch, mesh, parts(config))
  tensor, context = mesh.shape['tensor'], mesh.shape['context']
  for name, heads in _heads(config).items():
    if heads % (tensor * context):
      raise InputError(
        f'{name}.heads={heads} cannot be split over mesh.tensor x mesh.context = {tensor} x {context}: '
        'make their product a divisor of the heads.'
      )
  if _tokens(config) % context:
    raise InputError(
      f'the {_tokens(config)} tokens of a frame cannot be split over mesh.context={context}: make it a divisor.'
    )


def check_batch(batch: int, mesh: jax.sharding.Mesh, count: int = 1) -> None:
  """Refuses a global batch that the mesh cannot split, each of its `count` parts by itself.

  Raises:
    InputError: naming a size that it can split.
  """
  shards = mesh.shape['data'] * mesh.shape['fsdp']
  if batch % (count * shards):
    split = f'= {shards} shards' if count == 1 else f'x accumulate = {shards} x {count} parts'
    raise InputError(
      f'batch={batch} cannot be split over data x fsdp {split}; make it a multiple of {count * shards}.'
    )


def context_splits(config: ConfigDict, tensor: int, context: int) -> bool:
  """Whether clips can be split over such axes."""
  heads = _heads(config).values()
  return not any(n % (tensor * context) for n in heads) and _tokens(config) % context == 0


def _heads(config: ConfigDict) -> dict[str, int]:
  return {name: config[name].heads for name in ('model', 'teacher') if name in config}


def _tokens(config: ConfigDict) -> int:
  return (config.video.height // _PIXELS) * (config.video.width // _PIXELS)
