"""How programs start, apart from what they refuse (test_wrong_commands)."""

import glob
import importlib.metadata
import importlib.util

import jax
import pytest

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
