"""`python -m salt_jax.convert` as a user starts it: files, runs, damage, and what is left behind."""

import json
import pathlib
import shutil
import subprocess
import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
from absl import flags

from configs import selfforcing
from salt_jax import cli, convert, convert_cli, recipe, sample, stages, tensor_files, train, weights
from salt_jax import state as states
from salt_jax.checkpoint import Checkpoints, write_config
from salt_jax.errors import InputError
from salt_jax.models import wan
from tests import tiny_config

ROOT = pathlib.Path(__file__).parents[1]
NANO = '--config=configs/selfforcing.py:nano'


@pytest.fixture(scope='module')
def nano() -> dict[str, np.ndarray]:
  """A nano DiT under Wan's names."""
  shapes = convert.wan_shapes(wan.param_shapes(wan.wan_nano()), 'dit')
  rng = np.random.default_rng(0)
  return {k: 0.1 * rng.standard_normal(s, np.float32) for k, s in shapes.items()}


@pytest.fixture
def program(monkeypatch, capsys):
  """Runs the program in this process; returns its exit code, its output and its lines of error."""
  known = set(flags.FLAGS)
  monkeypatch.chdir(ROOT)

  def run(*args):
    capsys.readouterr()
    monkeypatch.setattr(sys, 'argv', ['convert', *map(str, args)])
    with pytest.raises(SystemExit) as stop:
      cli.run(convert_cli.program, convert_cli.define_flags)
    for name in set(flags.FLAGS) - known:
      delattr(flags.FLAGS, name)
    flags.FLAGS.unparse_flags()
    shown = capsys.readouterr()
    return stop.value.code or 0, shown.out.splitlines(), shown.err.splitlines()

  return run


def save_torch(path, tensors, entry='generator_ema', prefix='model.'):
  state = {prefix + k: torch.tensor(x) for k, x in tensors.items()}
  torch.save({entry: state} if entry else state, path)
  return path


def test_a_torch_file_becomes_safetensors_with_report_and_checksum(tmp_path, nano, program):
  path = save_torch(tmp_path / 'model.pt', nano)
  out = tmp_path / 'new' / 'student.safetensors'
  code, lines, _ = program(f'--input={path}', '--size=nano', f'--output={out}')
  assert code == 0
  assert sorted(p.name for p in out.parent.iterdir()) == [
    'student.safetensors',
    'student.safetensors.report.json',
    'student.safetensors.sha256',
  ]
  got = safetensors.numpy.load_file(out)
  assert got.keys() == nano.keys() and all(np.array_equal(got[k], nano[k]) for k in nano)
  report = json.loads(pathlib.Path(f'{out}.report.json').read_text())
  assert report['sha256'] == tensor_files.checksum(str(out)) and report['entry'] == 'generator_ema'
  assert [row['key'] for row in report['tensors']] == [f'model.{key}' for key in nano]
  assert f'{len(nano)} tensors in, ' in lines[-1] and len(lines) == len(nano) + 3
  loaded = convert.load_params(out, 'dit', wan.param_shapes(wan.wan_nano()))
  assert convert.to_wan(loaded, 'dit').keys() == nano.keys()


def test_every_naming_comes_back_to_the_same_bytes(tmp_path, nano, program):
  path = save_torch(tmp_path / 'model.pt', nano)
  first = tmp_path / 'a.safetensors'
  assert program(f'--input={path}', '--size=nano', f'--output={first}')[0] == 0
  for naming in ('diffusers', 'comfyui', 'wan'):
    there, back = tmp_path / f'{naming}.safetensors', tmp_path / 'back.safetensors'
    asked = ['--size=nano', f'--names={naming}']
    assert program(f'--input={first}', f'--output={there}', *asked)[0] == 0
    assert program(f'--input={there}', f'--output={back}', '--size=nano')[0] == 0
    assert back.read_bytes() == first.read_bytes()


def test_a_lora_of_a_checkpoint_is_merged(tmp_path, nano, program):
  """LongLive's file: a generator, and low-rank updates of it and of the critic."""
  rng = np.random.default_rng(1)
  a, b = rng.standard_normal((2, 128), np.float32), rng.standard_normal((512, 2), np.float32)
  key = 'base_model.model.model.blocks.1.ffn.0'
  pair = {f'{key}.lora_A.weight': torch.tensor(a), f'{key}.lora_B.weight': torch.tensor(b)}
  other = {name: torch.zeros_like(x) for name, x in pair.items()}
  path, out = tmp_path / 'x.pt', tmp_path / 'x.safetensors'
  torch.save({'generator': {k: torch.tensor(x) for k, x in nano.items()}}, path)
  torch.save({'generator_lora': pair, 'critic_lora': other}, tmp_path / 'lora.pt')
  args = [f'--input={path}', '--size=nano', f'--output={out}', f'--lora={tmp_path}/lora.pt']
  assert program(*args, '--lora_alpha=4')[0] == 0
  got = safetensors.numpy.load_file(out)
  want = nano['blocks.1.ffn.0.weight'].astype(np.float64) + 2 * b.astype(np.float64) @ a
  # float32 sums of two products of size 1.
  np.testing.assert_allclose(got.pop('blocks.1.ffn.0.weight'), want, atol=1e-5)
  assert all(np.array_equal(x, nano[k]) for k, x in got.items())
  code, _, (line,) = program(*args, f'--lora={tmp_path}/lora.pt')
  assert code == 2 and 'two LoRA files are for blocks.1.ffn.0.weight; merge one after' in line
  torch.save({'nothing.lora_A.weight': torch.ones(2, 2)}, tmp_path / 'lora.pt')
  code, _, (line,) = program(*args)
  assert code == 2 and 'has LoRA tensors for no weight: nothing.lora_A.weight;' in line


# Runs.


@pytest.fixture(scope='module')
def run_folder(tmp_path_factory):
  """A workdir at step 2, whose EMA, generator and critic differ."""
  workdir = tmp_path_factory.mktemp('run')
  config = tiny_config.get_config(tiny_config.write_weights(str(workdir / 'weights')))
  rec = recipe.build(config)
  rng = np.random.default_rng(0)

  def random(x):
    return jnp.asarray(0.1 * rng.standard_normal(x.shape), jnp.float32)

  params = {
    name: jax.tree.map(random, weights.shapes('dit', rec.model)) for name in ('generator', 'critic')
  }
  average = {'generator': jax.tree.map(random, params['generator'])}
  state = states._new(params, rec.optimizers, ())
  write_config(str(workdir), config)
  checkpoints = Checkpoints(str(workdir / 'checkpoints'))
  checkpoints.save(2, {'state': state, 'ema': average}, {'data_step': 2}, force=True)
  checkpoints.close()
  return workdir, params | {'generator_ema': average['generator']}


@pytest.mark.parametrize('entry', ['', 'generator_ema', 'generator', 'critic'])
def test_networks_of_a_run_are_written(tmp_path, run_folder, program, entry):
  workdir, networks = run_folder
  out = tmp_path / 'x.safetensors'
  code, lines, _ = program(f'--input={workdir}', f'--entry={entry}', f'--output={out}')
  assert code == 0
  want = convert.to_wan(jax.tree.map(np.asarray, networks[entry or 'generator_ema']), 'dit')
  got = safetensors.numpy.load_file(out)
  assert got.keys() == want.keys() and all(np.array_equal(got[k], want[k]) for k in want)
  checked = 'nothing to check it with' if entry in ('generator', 'critic') else 'generator_ema'
  assert lines[1] == f'checked: {checked}'
  _, _, params = sample.load(str(out))
  assert jax.tree.structure(params) == jax.tree.structure(networks['generator'])


def test_a_run_may_be_what_a_stage_starts_from(run_folder):
  workdir, networks = run_folder
  config = tiny_config.get_config(str(workdir / 'weights'))
  config.weights.init = str(workdir)
  weights.require(config, ['init'])
  got = weights.load(config.weights.init, 'dit', recipe.build(config).model)
  assert jax.tree.all(jax.tree.map(np.array_equal, got, networks['generator_ema']))
  with pytest.raises(InputError, match='is a run without an averaged vae; it has generator_ema,'):
    weights.load(str(workdir), 'vae', recipe.build(config).vae)
  config.model.dim = 64
  with pytest.raises(InputError, match='a checkpoint of another size'):
    weights.load(str(workdir), 'dit', recipe.build(config).model)


def test_a_converted_checkpoint_is_sampled_and_started_from(tmp_path, run_folder, program):
  """A Self-Forcing file -> an Orbax checkpoint; a stage starts from it."""
  workdir, networks = run_folder
  tensors = convert.to_wan(jax.tree.map(np.asarray, networks['critic']), 'dit')
  path = save_torch(tmp_path / 'model.pt', tensors, prefix='model._fsdp_wrapped_module.')
  args = [f'--input={path}', '--names=orbax', f'--output={tmp_path}/out']
  args.append(f'--config=tests/tiny_config.py:{workdir}/weights')
  code, lines, errors = program(*args)
  assert code == 0, errors
  assert sorted(p.name for p in (tmp_path / 'out').iterdir()) == ['checkpoints', 'config.json']
  config, rec, params = sample.load(str(tmp_path / 'out'))
  assert jax.tree.all(jax.tree.map(np.array_equal, params, networks['critic']))
  code, _, (line,) = program(*args)
  assert code == 2 and 'is not empty; name a new folder.' in line
  with pytest.raises(
    InputError, match='holds converted weights and no run: pass another --workdir'
  ):
    train.run(config, str(tmp_path / 'out'))
  config.weights.init = str(tmp_path / 'out')
  start = stages.build(config, rec, str(tmp_path / 'next')).start()
  assert jax.tree.all(jax.tree.map(np.array_equal, start['generator'], networks['critic']))


def test_orbax_wants_a_few_step_config_and_all_weights(tmp_path, nano, program):
  path = save_torch(tmp_path / 'model.pt', nano)
  args = [f'--input={path}', f'--output={tmp_path}/out', '--names=orbax']
  code, _, (line,) = program(*args, '--size=nano')
  assert code == 2 and '--names=orbax needs --config: a few-step experiment' in line
  code, _, (line,) = program(*args, '--config=configs/pretrain.py:teacher')
  assert code == 2 and '--names=orbax needs --config: a few-step experiment' in line
  save_torch(path, {k: x for k, x in nano.items() if k != 'head.head.bias'})
  code, _, (line,) = program(*args, NANO, '--allow_missing=head.head.bias')
  assert code == 2 and 'it lacks head.head.bias' in line
  save_torch(path, nano | {'head.head.bias': np.full(64, np.nan, np.float32)})
  code, _, (line,) = program(*args, NANO)
  assert code == 2 and f'{path} holds NaN or infinite numbers in head.head.bias' in line
  assert list(tmp_path.iterdir()) == [path]


def test_what_ships_is_converted_with_the_config_it_carries(tmp_path, program):
  out = tmp_path / 'x.safetensors'
  code, lines, errors = program(
    '--input=assets:nano_student.safetensors', f'--output={out}', '--names=comfyui'
  )
  assert code == 0, errors
  there = tmp_path / 'y.safetensors'
  code, *_ = program(f'--input={out}', f'--output={there}', NANO)
  assert code == 0
  cfg = sample.load(str(there))[1].model
  ours, theirs = (
    weights.load(path, 'dit', cfg) for path in (str(there), 'assets:nano_student.safetensors')
  )
  assert jax.tree.all(jax.tree.map(np.array_equal, ours, theirs))
  for network in ('text', 'vae'):
    kind = {'text': 'umt5'}.get(network, network)
    code, *_ = program(
      *(f'--input=assets:nano_{network}.safetensors', f'--network={kind}', '--names=diffusers'),
      f'--output={tmp_path}/{network}.safetensors',
    )
    assert code == 0


# Damage: one sentence, exit code 2, and nothing left.


def _zip_of_text(path):
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr('a.txt', 'hello')


def _legacy(path):
  torch.save({'a': torch.ones(2)}, path, _use_new_zipfile_serialization=False)


class _Attack:
  def __reduce__(self):
    return print, ('it ran',)


def _spoil(name, value):
  def damage(path):
    state = torch.load(path)
    state['generator_ema'][f'model.{name}'] = value
    torch.save(state, path)

  return damage


def _cut(path):
  path.write_bytes(path.read_bytes()[:-1000])


def _safetensors(path, tensors=None):
  tensor_files.write(
    str(path), {k: tensor_files.held(x) for k, x in (tensors or {'a': np.ones(3)}).items()}
  )


def _mismatch(path):
  tensor_files.write_checksum(str(path), '0' * 64)


DAMAGE = {
  'missing': (pathlib.Path.unlink, 'is not there or not a file; check the path.'),
  'truncated': (_cut, 'is cut short or damaged; copy or download it again.'),
  'empty': (lambda p: p.write_bytes(b''), 'is not a safetensors file; give one, or convert'),
  'web page': (
    lambda p: p.write_text('<!doctype html><html>404'),
    'is not a safetensors file but a web page',
  ),
  'LFS pointer': (
    lambda p: p.write_text('version https://git-lfs.github.com/spec/v1\n'),
    'but a pointer of Git LFS;',
  ),
  'another zip': (_zip_of_text, 'is a zip archive but not one of torch.save; unpack it first.'),
  'legacy torch': (_legacy, 'but of torch before 1.6; load it there and save it anew'),
  'bare pickle': (
    lambda p: p.write_bytes(b'\x80\x04K\x01.'),
    'but a bare pickle, which is not read;',
  ),
  'attack': (
    lambda p: torch.save({'a': torch.ones(2), 'b': _Attack()}, p),
    'would use __builtin__.print when loaded',
  ),
  'NaN': (
    _spoil('head.head.bias', torch.full((64,), torch.nan)),
    'holds NaN or infinite numbers in head.head.bias;',
  ),
  'wrong size': (
    _spoil('head.head.bias', torch.ones(63)),
    'is of another size: head.head.bias is (63,) and not (64,).',
  ),
  'one too many': (
    _spoil('tail', torch.ones(2)),
    'does not fit: unused model.tail; name them with --allow_unused',
  ),
  'wrong checksum': (_mismatch, 'is not the file that'),
  'another model': (
    _safetensors,
    'the dit network has no weights named a; is it a file of another model',
  ),
}


@pytest.mark.parametrize('damage', DAMAGE)
def test_damage_gives_one_sentence_and_leaves_nothing(tmp_path, nano, program, damage):
  spoil, words = DAMAGE[damage]
  path = save_torch(tmp_path / 'model.pt', nano)
  spoil(path)
  before = {p: p.read_bytes() for p in tmp_path.iterdir()}
  arguments = [f'--input={path}', '--size=nano', f'--output={tmp_path}/out.safetensors']
  code, out, (line,) = program(*arguments, *['--entry='] * (damage == 'another model'))
  assert code == 2 and not out
  assert line.startswith('salt_jax: ') and words in line and 'it ran' not in line
  assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_refusal_writes_the_report_that_was_asked_for(tmp_path, nano, program):
  path = save_torch(tmp_path / 'model.pt', nano | {'tail': np.ones(2)})
  report = tmp_path / 'report.json'
  code, *_ = program(
    f'--input={path}', '--size=nano', f'--output={tmp_path}/out.safetensors', f'--report={report}'
  )
  assert code == 2
  assert [row['key'] for row in json.loads(report.read_text())['unused']] == ['model.tail']


def test_the_input_is_not_overwritten(tmp_path, nano, program):
  path = tmp_path / 'x.safetensors'
  _safetensors(path, nano)
  (tmp_path / 'link').symlink_to(tmp_path)
  before = path.read_bytes()
  for name in ('x.safetensors', 'link/x.safetensors'):
    code, _, (line,) = program(f'--input={path}', '--size=nano', f'--output={tmp_path}/{name}')
    assert code == 2 and 'is what is read; name another file.' in line
  assert path.read_bytes() == before


def test_it_starts_as_a_module(tmp_path, nano):
  path = save_torch(tmp_path / 'model.pt', nano)
  args = [f'--input={path}', '--size=nano', f'--output={tmp_path}/out.safetensors']
  done = subprocess.run(
    [sys.executable, '-m', 'salt_jax.convert', *args], capture_output=True, text=True, cwd=tmp_path
  )
  assert done.returncode == 0 and not done.stderr, done.stderr
  assert done.stdout.splitlines()[-1].endswith('0 unused, 0 missing')


def test_a_stage_starts_from_a_converted_file(tmp_path, program):
  """The embedded student, as a Self-Forcing file, as the student of another run's config."""
  student = convert.load_safetensors(weights.resolve('assets:nano_student.safetensors'))
  path = save_torch(tmp_path / 'model.pt', student)
  out = tmp_path / 'student.safetensors'
  assert program(f'--input={path}', NANO, f'--output={out}', '--dtype=float32')[0] == 0
  model = recipe.build(selfforcing.get_config('nano')).model
  params = weights.load(str(out), 'dit', model)
  want = weights.load('assets:nano_student.safetensors', 'dit', model)
  assert jax.tree.all(jax.tree.map(np.array_equal, params, want))
  shutil.copy(out, tmp_path / 'renamed.safetensors')
  assert sample.load(str(tmp_path / 'renamed.safetensors'))[0].stage == 'selfforcing'
