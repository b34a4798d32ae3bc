"""Starts the programs as several hosts on this machine, and signals and gathers them."""

import importlib.metadata
import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[1]
USERS = str(ROOT / 'tests' / 'standin' / 'users')  # hides what only tests have
# Three times as fast to compile; what is compared is compiled alike, in all tests. Newer ones have no such choice.
FAST = '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'
if importlib.metadata.version('jaxlib') < '0.11':
  FAST += ' --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1'
HEARTBEAT = 5  # seconds, the least that is allowed


def devices_of(count: int) -> dict[str, str]:
  """What gives a child so many CPU devices."""
  flags = f'--xla_force_host_platform_device_count={count} {FAST}'
  return {'XLA_FLAGS': flags, 'JAX_PLATFORMS': 'cpu'}


def environment(devices: int = 1, **changes: str) -> dict[str, str]:
  """Of a child with so many CPU devices, which shares one compilation cache with the others."""
  return os.environ | {
    **devices_of(devices),
    'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0.1',
    'TF_CPP_MIN_LOG_LEVEL': '1',
    'PYTHONPATH': os.pathsep.join(filter(None, (USERS, str(ROOT), os.environ.get('PYTHONPATH')))),
    **changes,
  }


def start(count: int, command, folder, devices: int = 1, **changes):
  """Starts `count` hosts.

  Args:
    count: 1 joins nobody.
    command: arguments of Python, or `host -> arguments`.
    folder: where their words go.
    devices: of each host, or `host -> devices`.
    changes: environment, or `host -> value` of one variable.

  Returns:
    The processes.
  """
  with socket.socket() as free:
    free.bind(('localhost', 0))
    port = free.getsockname()[1]
  os.makedirs(folder, exist_ok=True)
  hosts = []
  for host in range(count):
    words = list(_of(command, host))
    if count > 1:
      words += ['--multihost', f'--coordinator=localhost:{port}', f'--heartbeat={HEARTBEAT}']
      words += [f'--host_count={count}', f'--host={host}', '--join_timeout=60']
    env = environment(_of(devices, host), **{k: _of(v, host) for k, v in changes.items()})
    with open(os.path.join(folder, f'host-{host}.log'), 'w') as log:
      hosts.append(
        subprocess.Popen([sys.executable, *words], cwd=ROOT, env=env, stdout=log, stderr=log)
      )
  return hosts


def _of(value, host):
  return value(host) if callable(value) else value


def ended(hosts, folder, limit: float = 200) -> tuple[list[int], list[str]]:
  """Exit codes and words of all hosts; those that are not done after `limit` seconds are killed, and it is an error."""
  end = time.monotonic() + limit
  try:
    codes = [process.wait(max(0.1, end - time.monotonic())) for process in hosts]
  finally:
    for process in hosts:
      process.kill()
  logs = [_log(pathlib.Path(folder, f'host-{i}.log'), code) for i, code in enumerate(codes)]
  return codes, logs


def _log(path: pathlib.Path, code: int) -> str:
  """What a host said; for one that a signal ended, somebody else says it a moment later."""
  end = time.monotonic() + 10
  while code < 0 and not sentences(path.read_text()) and time.monotonic() < end:
    time.sleep(0.05)
  return path.read_text()


def sentences(log: str) -> list[str]:
  """What a program says to its user, leaving libraries out."""
  return re.findall('^salt_jax: (.*)$', log, re.MULTILINE)


def wait_for(what, hosts, limit: float = 200) -> None:
  """Waits until `what()` holds while all hosts live."""
  end = time.monotonic() + limit
  while not what():
    assert all(process.poll() is None for process in hosts), 'a host ended before its time'
    assert time.monotonic() < end, 'what was waited for did not come'
    time.sleep(0.005)


def kill(process) -> None:
  os.kill(process.pid, signal.SIGKILL)
  process.wait()
