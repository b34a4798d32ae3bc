"""Files that are missing, damaged or of another size are named in one clear sentence, and nothing is lost."""

import json
import pathlib
import shutil

import numpy as np
import pytest
import safetensors.numpy

from configs import selfforcing
from salt_jax import convert, loading, recipe, sample, train, weights
from salt_jax.checkpoint import write_config
from salt_jax.errors import InputError
from tests import tiny_config
from tests.commands import sentence_of


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tiny_config.write_weights(str(tmp_path_factory.mktemp('weights')))


@pytest.mark.parametrize('name', ['causal_ode', 'causal_cd'])
def test_what_the_autoregressive_model_leaves_is_asked_for(name, folder, tmp_path):
  config = tiny_config.stage(name, folder)
  config.weights.ar = str(tmp_path / 'ar.safetensors')
  with pytest.raises(
    InputError, match=r'needs weights that are not there: .*ar.safetensors \(weights.ar\)'
  ):
    train.run(config, str(tmp_path / 'run'))
  config.weights.ar, config.data.kind = config.weights.init, 'images'
  with pytest.raises(InputError, match='data.kind=images is unknown: choose latents or store.'):
    train.run(config, str(tmp_path / 'run'))


@pytest.mark.parametrize(
  'changes, words',
  [
    ({'stage': 'gan'}, 'choose one of'),
    ({'data.kind': 'x'}, 'choose captions'),
    ({'data.kind': 'prompts', 'data.path': ''}, 'no prompt file is named: give one of'),
    ({'data.kind': 'prompts', 'data.path': 'nowhere.txt'}, 'prompt file nowhere.txt is missing'),
    (
      {'data.kind': 'text_store', 'data.path': 'nowhere'},
      'nowhere/index.json is missing or unreadable',
    ),
  ],
)
def test_unknown_kinds_are_refused(folder, changes, words, tmp_path):
  config = tiny_config.get_config(folder)
  config.update_from_flattened_dict(changes)
  with pytest.raises(InputError, match=words):
    train.run(config, str(tmp_path))


def _spoil(path: pathlib.Path, how: str) -> None:
  match how:
    case 'missing':
      path.unlink()
    case 'truncated':
      path.write_bytes(path.read_bytes()[:-100])
    case 'text':
      path.write_text('version https://git-lfs.github.com/spec/v1')
    case 'nan':
      tensors = convert.load_safetensors(path)
      name = sorted(tensors)[0]
      tensors[name] = np.full_like(tensors[name], np.nan)
      path.unlink()
      safetensors.numpy.save_file(tensors, str(path))
    case 'incomplete':
      tensors = convert.load_safetensors(path)
      del tensors[sorted(tensors)[0]]
      convert.save_safetensors(path, tensors)


@pytest.mark.parametrize(
  'name, how, words',
  [
    ('init', 'missing', 'needs weights that are not there: '),
    ('vae', 'missing', 'needs weights that are not there: '),
    ('init', 'truncated', 'is cut short or damaged; copy or download it again.'),
    ('vae', 'truncated', 'is cut short or damaged; copy or download it again.'),
    (
      'teacher',
      'text',
      'is not a safetensors file but a pointer of Git LFS; fetch the file itself',
    ),
    ('text', 'nan', 'holds NaN or infinite numbers in '),
    ('teacher', 'incomplete', 'the dit weights lack blocks.0.'),
  ],
)
def test_a_bad_weights_file_is_named_before_training(folder, tmp_path, name, how, words):
  files = shutil.copytree(folder, tmp_path / 'weights')
  _spoil(files / f'{name}.safetensors', how)
  config = tiny_config.get_config(str(files))
  config.evaluate.clips = 2
  with pytest.raises(InputError) as error:
    train.run(config, str(tmp_path / 'run'))
  assert words in sentence_of(error) and f'{name}.safetensors' in str(error.value)
  assert not (tmp_path / 'run' / 'config.json').exists()


def test_weights_of_another_size_are_refused(folder):
  config = tiny_config.get_config(folder)
  config.model.dim = 64
  with pytest.raises(
    InputError, match=r'init.safetensors: a checkpoint of another size: .* but the config asks for'
  ):
    weights.load(config.weights.init, 'dit', recipe.build(config).model)


@pytest.fixture(scope='module')
def run_of_two(folder, tmp_path_factory):
  return tiny_config.write_run(tmp_path_factory.mktemp('run'), folder)


def test_a_workdir_belongs_to_its_config(run_of_two):
  workdir, config = run_of_two
  config = config.copy_and_resolve_references()
  config.dmd.guidance = 9.0
  with pytest.raises(InputError) as error:
    train.run(config, str(workdir))
  assert 'config.dmd.guidance is 9.0, but the run in' in sentence_of(error)
  assert 'has 3.0: pass another --workdir or the same config.' in str(error.value)
  assert json.loads((workdir / 'config.json').read_text())['dmd']['guidance'] == 3.0


@pytest.mark.parametrize(
  'change, words',
  [
    (lambda run: shutil.rmtree(run / 'checkpoints'), 'there is no checkpoint folder'),
    (
      lambda run: shutil.rmtree(run / 'checkpoints' / '2'),
      'holds no finished checkpoint; train until one is saved.',
    ),
    (
      lambda run: shutil.rmtree(run / 'checkpoints' / '2' / 'ema'),
      'checkpoints/2 is damaged (it has no ema); delete that folder to start anew.',
    ),
    (lambda run: (run / 'config.json').unlink(), 'has no config.json: pass the workdir of a run'),
    (lambda run: (run / 'config.json').write_text('{"a": '), 'config.json is damaged'),
    (
      lambda run: (run / 'config.json').write_text('{"a": 1}'),
      'is no run of salt_jax: its config names no stage.',
    ),
  ],
)
def test_what_is_no_checkpoint_is_refused(run_of_two, tmp_path, change, words):
  run = shutil.copytree(run_of_two[0], tmp_path / 'run')
  assert sample.load(str(run))[1].model.dim == tiny_config.DIT['dim']
  change(run)
  with pytest.raises(InputError) as error:
    sample.load(str(run))
  assert words in sentence_of(error)


def test_a_checkpoint_of_another_size_is_refused(run_of_two, tmp_path):
  run = shutil.copytree(run_of_two[0], tmp_path / 'run')
  config = run_of_two[1].copy_and_resolve_references()
  config.model.dim = 64
  (run / 'config.json').unlink()
  write_config(str(run), config)
  with pytest.raises(
    InputError,
    match='another size: .* but the config asks for .* Pass the config it was trained with.',
  ):
    sample.load(str(run))


def test_a_student_of_another_size_is_not_judged(run_of_two):
  with pytest.raises(InputError, match='--config do not fit: a checkpoint of another size'):
    loading.student_of(str(run_of_two[0]), recipe.build(selfforcing.get_config('nano')))
