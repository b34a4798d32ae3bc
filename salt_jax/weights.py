"""Files of weights that a stage starts from, and those that it leaves behind."""

import functools
import importlib.resources
import json
import os
from collections.abc import Iterable, Sequence

import jax
import numpy as np
from jaxtyping import PyTree
from ml_collections import ConfigDict

from salt_jax import checkpoint, convert, places, run_weights, tensor_files
from salt_jax.errors import InputError
from salt_jax.models import clip, text, unigram, vae, wan

NETWORKS = {'vae': 'vae', 'text': 'umt5', 'clip': 'clip'}  # everything else is a DiT
# Modules of a DiT that compute in float32 (wan.md 1.10).
_FLOAT32 = {'time_embedding_0', 'time_embedding_2', 'time_projection_1', 'head'}
# What a run calls the averaged network of a kind.
_AVERAGED = {'vae': ('vae_ema',), 'umt5': ('text_ema',), 'dit': ('generator_ema', 'dit_ema')}


def resolve(path: str) -> str:
  """The file behind a path; 'assets:' stands for the package's own folder."""
  if path.startswith('assets:'):
    return str(importlib.resources.files('salt_jax') / 'assets' / path.removeprefix('assets:'))
  return path


def shipped(names: Iterable[str]) -> dict[str, str]:
  """Those of the named networks that ship with the package.

  A shipped student belongs to them, whereas its config names files of the machine that made it.
  """
  paths = {name: f'assets:nano_{name}.safetensors' for name in names}
  return {name: path for name, path in paths.items() if os.path.isfile(resolve(path))}


def require(config: ConfigDict, names: Sequence[str]) -> None:
  """Checks that all files are there before anything is compiled.

  Raises:
    InputError: naming every missing file and where it goes.
  """
  paths = {name: resolve(config.weights[name]) for name in names}
  missing = [f'{path} (weights.{name})' for name, path in paths.items() if not _is_there(path)]
  if 'text' in names and config.size != 'nano' and not unigram.find(config.weights.tokenizer):
    missing.append(
      f'{" or ".join(unigram.FILES)} in {config.weights.tokenizer} (weights.tokenizer)'
    )
  if missing:
    raise InputError(
      f"{config.name} needs weights that are not there: {', '.join(missing)}; put them there in Wan's own names as "
      'safetensors, with python -m salt_jax.convert, or point --config.weights.NAME at them. '
      '--config=configs/selfforcing.py:nano runs without any.'
    )


def _is_there(path: str) -> bool:
  return os.path.isfile(path) or places.is_run(path)


def shapes(network: str, cfg) -> PyTree:
  """Shapes of a network's parameters, a tree of the caller's own; nothing is allocated."""
  return jax.tree.map(lambda x: x, _shapes(network, cfg))


@functools.cache
def _shapes(network, cfg):
  module = {'vae': vae, 'umt5': text, 'clip': clip, 'dit': wan}[network]
  return jax.eval_shape(lambda key: module.init_params(key, cfg), jax.random.key(0))


def load(path: str, network: str, cfg) -> PyTree:
  """Reads float32 parameters for a network of the given sizes.

  Args:
    path: a file, or a run's workdir, whose averaged network is taken.
    network: 'dit', 'vae' or 'umt5'.
    cfg: its sizes.

  Raises:
    InputError: a missing, damaged or other-sized file.
  """
  return convert.read(_opened(path, network, cfg), np.float32)


def load_narrowed(path: str, network: str, cfg) -> PyTree:
  """`narrowed(load(...))` for a network that only serves, with no more than the result and some layers in memory."""
  return jax.tree_util.tree_map_with_path(
    lambda keys, leaf: leaf.whole(cfg.dtype if _narrow(keys) else np.float32),
    _opened(path, network, cfg),
  )


def _opened(path: str, network: str, cfg) -> PyTree:
  """A network as a tree of `Leaf`, known to be whole and of these sizes."""
  path, like = resolve(path), shapes(network, cfg)
  if not places.folder_of(path).is_dir():
    return convert.open_params(path, network, like)
  folder = places.home(path)
  found = checkpoint.entries(folder)
  entry = next((name for name in _AVERAGED[network] if name in found), None)
  if entry is None:
    raise InputError(f'{path} is a run without an averaged {network}; it has {", ".join(found)}.')
  tree = run_weights.load(folder, entry)
  try:
    convert.check(tree, like)
  except InputError as error:
    raise InputError(f'{path}: {error} Pass the config it was trained with.') from error
  return tree


def narrowed(params: PyTree, dtype: str) -> PyTree:
  """Kernels of a network that only serves in its compute dtype, as it would round them itself.

  Norms, biases, modulation, and the kernels that a DiT computes with in float32, stay as they are.
  """
  return jax.tree_util.tree_map_with_path(
    lambda keys, x: x.astype(dtype, copy=False) if _narrow(keys) else x, params
  )


def _narrow(keys: tuple) -> bool:
  names = [key.key for key in keys]
  return names[-1] in ('kernel', 'embedding') and not _FLOAT32.intersection(names)


def narrowed_shapes(name: str, cfg) -> PyTree:
  """Shapes and dtypes of a frozen network as `narrowed` keeps it; nothing is allocated."""
  like = shapes(NETWORKS.get(name, 'dit'), cfg)
  return jax.eval_shape(functools.partial(narrowed, dtype=cfg.dtype), like)


def export(workdir: str, name: str, params: PyTree, config: ConfigDict) -> str:
  """Writes a network under Wan's names, with the config that made it; returns the path.

  The file alone is enough for `salt_jax.sample`.
  """
  path = os.path.join(workdir, 'export', f'{config.name}-{name}.safetensors')
  metadata = {'config': config.to_json_best_effort(), 'network': name}
  host = jax.tree.map(np.asarray, params)
  convert.save_params(path, host, NETWORKS.get(name, 'dit'), config.export_dtype, metadata)
  return path


def config_of(path: str) -> ConfigDict:
  """The config that a file of `export` carries.

  Raises:
    InputError: if it carries none.
  """
  _, metadata = tensor_files.scan(path)
  if 'config' not in metadata:
    raise InputError(
      f'{path} does not say which config made it: pass the workdir of a run instead.'
    )
  return ConfigDict(json.loads(metadata['config']), convert_dict=True)


def config_of_run(path: str) -> ConfigDict:
  """The config that a run left in its workdir.

  Raises:
    InputError: if there is none, or it is damaged.
  """
  file = places.folder_of(path) / 'config.json'
  if not file.exists():
    raise InputError(
      f'{path} has no config.json: pass the workdir of a run that has saved a checkpoint.'
    )
  try:
    return ConfigDict(json.loads(file.read_text()), convert_dict=True)
  except ValueError as error:
    raise InputError(f'{file} is damaged ({error}): pass a file that the run exported.') from error
