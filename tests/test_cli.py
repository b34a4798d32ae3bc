"""How programs start, apart from what they refuse (test_wrong_commands)."""

import glob
import importlib.metadata
import importlib.util
import os

import jax
import pytest

from configs import selfforcing
from salt_jax import cli

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


@pytest.mark.parametrize(
  'cores, batch, devices', [(1, 4, 1), (2, 4, 2), (3, 4, 2), (64, 4, 4), (8, 6, 2), (8, 5, 1)]
)
def test_nano_has_a_cpu_device_for_each_core_that_its_batch_can_use(
  monkeypatch, cores, batch, devices
):
  monkeypatch.delenv('XLA_FLAGS', raising=False)
  monkeypatch.setattr(os, 'sched_getaffinity', lambda _: set(range(cores)))
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
  monkeypatch.delenv('XLA_FLAGS', raising=False)
  monkeypatch.setattr(os, 'sched_getaffinity', lambda _: {0, 1})
  for name, value in variables.items():
    monkeypatch.setenv(name, value)
  config = selfforcing.get_config(size)
  config.mesh.update(mesh)
  assert cli.cpu_devices(config) == jax.config.jax_num_cpu_devices
