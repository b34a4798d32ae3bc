"""All tests run on the CPU and share one compilation cache."""

import gc
import os
import pathlib
import tempfile

import pytest

from tests import clouds
from tests.processes import FAST

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['HF_HUB_OFFLINE'] = '1'
if FAST not in os.environ.get('XLA_FLAGS', ''):
  os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {FAST}'.strip()
# Subprocesses that tests start inherit the cache too.
_cache = os.path.join(tempfile.gettempdir(), f'salt_jax_test_cache_{os.getuid()}')
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', _cache)
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.1')
os.environ.setdefault('PYTHONPATH', str(pathlib.Path(__file__).parents[1]))


# A file stays on one worker: long ones that began last would leave the other with nothing to do.
FIRST = ('test_hosts', 'test_train', 'test_vae', 'test_wan')


def pytest_collection_modifyitems(items):
  items.sort(key=lambda item: item.path.stem not in FIRST)


def pytest_collection_finish():
  from salt_jax import cli  # imports JAX, which reads the environment above

  gc.collect()
  cli.collect_less()


@pytest.fixture(scope='module')
def checkout(tmp_path_factory):
  """A checkout of the launcher, for the tests of launch/gcp_tpu.sh."""
  yield from clouds.make_checkout(tmp_path_factory)


@pytest.fixture
def cloud(tmp_path, checkout):
  """A world in which its calls of gcloud end."""
  yield from clouds.make_cloud(tmp_path, checkout)


@pytest.fixture
def programs():
  """The programs of the package, to be run in this process."""
  from tests import commands  # imports JAX, which reads the environment above

  yield from commands.programs()


@pytest.fixture(scope='module')
def compiler():
  """This process compiles for TPUs and has none."""
  from salt_jax import slices  # imports JAX too

  slices.prepare()
