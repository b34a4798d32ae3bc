"""How programs start, apart from what they refuse (test_wrong_commands)."""

import glob
import importlib.metadata
import importlib.util
import os
import sys

import jax
import pytest

from configs import causal_init, pretrain, selfforcing
from salt_jax import cli, compiled, main, train
from tests.commands import NANO, finished

# What `import jax` sets where libtpu is installed, TPU or not.
SET_BY_JAX = {'TPU_LIBRARY_PATH': '/there/libtpu.so', 'TPU_SKIP_MDS_QUERY': '1'}


@pytest.mark.parametrize(
  'variables, files, platforms',
  [
    ({}, [], 'cpu'),
    ({'TPU_WORKER_ID': '0'}, [], ''),
    ({}, ['/dev/vfio/0'], ''),
  ],
)
def test_libtpu_without_a_tpu_is_left_alone(monkeypatch, variables, files, platforms):
  for name in cli.OF_A_SLICE:
    monkeypatch.delenv(name, raising=False)
  for name, value in (SET_BY_JAX | variables).items():
    monkeypatch.setenv(name, value)
  monkeypatch.setattr(glob, 'glob', lambda pattern: files if 'vfio' in pattern else [])
  monkeypatch.setattr(importlib.metadata, 'entry_points', lambda **_: [])
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: name == 'libtpu')
  before = jax.config.jax_platforms
  jax.config.update('jax_platforms', '')
  try:
    cli.leave_tpu_alone()
    assert jax.config.jax_platforms == platforms
  finally:
    jax.config.update('jax_platforms', before)


def _with_cores(monkeypatch, cores):
  for name in ('XLA_FLAGS', 'JAX_NUM_CPU_DEVICES'):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setattr(os, 'sched_getaffinity', lambda _: set(range(cores)), raising=False)


@pytest.mark.parametrize(
  'cores, batch, devices', [(1, 4, 1), (2, 4, 2), (3, 4, 2), (64, 4, 4), (8, 6, 2), (8, 5, 1)]
)
def test_nano_has_a_cpu_device_for_each_core_that_its_batch_can_use(
  monkeypatch, cores, batch, devices
):
  _with_cores(monkeypatch, cores)
  config = selfforcing.get_config('nano')
  config.batch = batch
  assert cli.cpu_devices(config) == devices


@pytest.mark.parametrize(
  'size, mesh, variables',
  [
    ('1.3b', {}, {}),
    ('nano', {'data': 1}, {}),
    ('nano', {'fsdp': 2}, {}),
    ('nano', {}, {'JAX_NUM_CPU_DEVICES': '3'}),
    ('nano', {}, {'XLA_FLAGS': '--xla_force_host_platform_device_count=8'}),
  ],
)
def test_otherwise_a_cpu_is_what_was_said(monkeypatch, size, mesh, variables):
  _with_cores(monkeypatch, 2)
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  config = selfforcing.get_config(size)
  config.mesh.update(mesh)
  assert cli.cpu_devices(config) == jax.config.jax_num_cpu_devices


def test_what_runs_before_training_is_split_over_these_devices_too(monkeypatch):
  _with_cores(monkeypatch, 128)
  teacher, ode = pretrain.get_config('teacher'), causal_init.get_config('nano')
  assert teacher.batch > 64 and cli.cpu_devices(teacher) == teacher.latents.batch == 64
  ode.pairs.batch = 8
  assert cli.cpu_devices(ode) == 8


def test_all_cores_are_ours_where_there_is_no_affinity(monkeypatch):
  _with_cores(monkeypatch, 1)
  monkeypatch.delattr(os, 'sched_getaffinity')
  monkeypatch.setattr(os, 'cpu_count', lambda: 2)
  assert cli.cpu_devices(selfforcing.get_config('nano')) == 2


@pytest.mark.parametrize('words, devices', [([], 2), (['--multihost'], None)])
def test_a_process_of_training_has_them_unless_others_join(monkeypatch, programs, words, devices):
  _with_cores(monkeypatch, 2)
  told = {}
  monkeypatch.setattr(main, 'program', lambda: told.update(ran=True))
  monkeypatch.setattr(jax.config, 'update', told.__setitem__)
  monkeypatch.setattr(sys, 'argv', ['main', NANO, *words])
  with pytest.raises(SystemExit):
    cli.run(main.process, programs['main'].define_flags)
  assert told.pop('ran') and told.get('jax_num_cpu_devices') == devices


def test_the_home_of_a_user_is_found_in_a_workdir(programs, monkeypatch, tmp_path):
  """Shells leave --workdir=~/run as it is."""
  found = []
  monkeypatch.setenv('HOME', str(tmp_path))
  monkeypatch.setattr(train, 'run', lambda config, workdir, profile: found.append(workdir))
  monkeypatch.setattr(compiled, 'keep', lambda *_: None)
  finished(programs['main'], [NANO, '--workdir=~/run'], monkeypatch)
  assert found == [str(tmp_path / 'run')]
