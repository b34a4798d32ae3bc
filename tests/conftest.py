"""All tests run on the CPU and share one compilation cache."""

import os
import pathlib
import tempfile

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['HF_HUB_OFFLINE'] = '1'
# Subprocesses that tests start inherit the cache too.
_cache = os.path.join(tempfile.gettempdir(), f'salt_jax_test_cache_{os.getuid()}')
os.environ.setdefault('JAX_COMPILATION_CACHE_DIR', _cache)
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.5')
os.environ.setdefault('PYTHONPATH', str(pathlib.Path(__file__).parents[1]))
