"""Several hosts: how they join, how they are compared before anything is compiled, and how they end.

On Cloud TPU, Slurm and Open MPI `--multihost` is enough. Elsewhere every host is told where host 0 listens, how many
there are and which one it is:

  python -m salt_jax.main --multihost --coordinator=ADDRESS:PORT --host_count=2 --host=0 --config=…
"""

import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import pathlib
import platform
import secrets
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import IO, Any, NoReturn

import jax
import numpy as np
from absl import flags
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from salt_jax.checkpoint import flattened
from salt_jax.errors import InputError, Preempted
from salt_jax.places import folder_of

log = logging.getLogger('salt_jax.hosts')

LOST = 69  # exit code of a host that lost another one
_PATIENCE = 24 * 3600  # seconds that a host that is done waits for the others to leave
_HANDOVER = 30.0  # seconds that a run waits for one that is leaving the same folder
_LEAVING = 10.0  # seconds that a host that fails waits for the others to fail too
_LIBRARIES = ('jax', 'jaxlib', 'libtpu', 'flax', 'optax', 'orbax-checkpoint', 'numpy')
_VARIABLES = ('XLA_FLAGS', 'LIBTPU_INIT_ARGS', 'JAX_ENABLE_X64', 'JAX_DEFAULT_MATMUL_PRECISION')
_AGAIN = 'start the same command on every host to go on from the newest checkpoint.'
_ENDED = 'host {} of {} was ended, or lost another one and ended itself; ' + _AGAIN


def define_flags(why: str) -> None:
  """The flag --multihost, explained by `why`, and those for hosts that do not find each other."""
  flags.DEFINE_bool('multihost', False, why)
  flags.DEFINE_string(
    'coordinator',
    os.environ.get('JAX_COORDINATOR_ADDRESS'),
    'ADDRESS:PORT where host 0 listens, or $JAX_COORDINATOR_ADDRESS; Cloud TPU needs none of these three.',
  )
  for name, variable, text in (
    ('host_count', 'JAX_NUM_PROCESSES', 'Number of hosts'),
    ('host', 'JAX_PROCESS_ID', 'Number of this host, from 0'),
  ):
    flags.DEFINE_integer(name, os.environ.get(variable), f'{text}, or ${variable}.', lower_bound=0)
  flags.DEFINE_integer(
    'heartbeat', 60, 'Seconds after which a silent host counts as lost.', lower_bound=5
  )
  flags.DEFINE_integer('join_timeout', 300, 'Seconds to wait for the other hosts.', lower_bound=1)


@contextlib.contextmanager
def joined(args: flags.FlagValues) -> Iterator[None]:
  """With --multihost, joins the other hosts, and ends so that no host waits for ever for another.

  Must be entered before anything touches a device. What ends one host alone ends the others within `heartbeat`
  seconds and a few more; each of them says what to do.

  Raises:
    InputError: flags that do not fit each other, or hosts that do not come.
  """
  where = _where(args)
  if not args.multihost:
    yield
    return
  speaker = _speaker()
  # If the others do not come, JAX ends this process.
  _says(speaker, _apart(args))
  try:
    _initialize(args, where)
  except InputError:
    _says(speaker, '')
    raise
  _says(speaker, _ENDED.format(jax.process_index(), jax.process_count()))
  try:
    _check_devices()
    yield
  except (Preempted, SystemExit):
    _says(speaker, '')
    raise
  except BaseException as error:
    code = _explained(error)
    _says(speaker, '')
    _leave(code, alone=code == LOST)
  _says(speaker, '')


def _where(args: flags.FlagValues) -> dict[str, Any]:
  given = {'coordinator': args.coordinator, 'host_count': args.host_count, 'host': args.host}
  named = [f'--{name}' for name, value in given.items() if value is not None]
  if not args.multihost:
    if any(name in flags.FLAGS and flags.FLAGS[name].present for name in given):
      raise InputError(f'{", ".join(named)} is for several hosts: pass --multihost too.')
    return {}
  if (args.host is None) != (args.host_count is None):
    raise InputError(f'{", ".join(named)}: --host and --host_count go together.')
  if args.host is not None and not args.host < args.host_count:
    raise InputError(
      f'--host={args.host} must be below --host_count={args.host_count}: hosts are numbered from 0.'
    )
  if args.coordinator and not args.coordinator.rpartition(':')[2].isdigit():
    raise InputError(f'--coordinator={args.coordinator} has no port: give ADDRESS:PORT of host 0.')
  return {
    'coordinator_address': args.coordinator,
    'num_processes': args.host_count,
    'process_id': args.host,
  }


def _initialize(args: flags.FlagValues, where: Mapping[str, Any]) -> None:
  try:
    jax.distributed.initialize(
      **where,
      initialization_timeout=args.join_timeout,
      heartbeat_timeout_seconds=args.heartbeat,
      shutdown_timeout_seconds=_PATIENCE,
    )
  except ValueError as error:
    raise InputError(
      'the other hosts cannot be found from here: pass --coordinator=ADDRESS:PORT, --host_count and --host, which '
      'only Cloud TPU, Slurm and Open MPI make unnecessary.'
    ) from error
  except jax.errors.JaxRuntimeError as error:
    raise InputError(_apart(args)) from error


def _speaker() -> subprocess.Popen:
  """A shell that says the last sentence it was given when this process ends, however it does."""
  script = 'while read -r line; do last=$line; done; [ -z "$last" ] || echo "salt_jax: $last" >&2'
  return subprocess.Popen(
    ['sh', '-c', script], stdin=subprocess.PIPE, text=True, start_new_session=True
  )


def _says(speaker: subprocess.Popen, sentence: str) -> None:
  with contextlib.suppress(OSError):  # somebody ended it
    print(sentence, file=speaker.stdin, flush=True)


def _apart(args: flags.FlagValues) -> str:
  return (
    f'the hosts did not join within {args.join_timeout} s: start the same command on every host, with the '
    '--coordinator of host 0.'
  )


def _explained(error: BaseException) -> int:
  """Says why this host ends; returns its exit code."""
  if isinstance(error, InputError):
    print(f'salt_jax: {" ".join(str(error).split())}', file=sys.stderr, flush=True)
    return 2
  if isinstance(error, jax.errors.JaxRuntimeError) and _is_loss(error):
    print(f'salt_jax: {_loss(jax.process_index(), error)}', file=sys.stderr, flush=True)
    return LOST
  traceback.print_exception(error)
  return 130 if isinstance(error, KeyboardInterrupt) else 1


def _leave(code: int, alone: bool) -> NoReturn:
  """Leaves together with the others if they fail alike, and without them at once or after a while."""

  def after_a_while():
    time.sleep(_LEAVING)
    os._exit(code)

  if alone:
    os._exit(code)
  threading.Thread(target=after_a_while, daemon=True).start()
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    jax.distributed.shutdown()
  os._exit(code)


def _is_loss(error: Exception) -> bool:
  return any(word in str(error) for word in ('Gloo', 'UNAVAILABLE', 'heartbeat', 'NCCL'))


def _loss(host: int, error: Exception) -> str:
  if 'ncclCommInit' in str(error):
    return (
      f'host {host} could not set up NCCL with the others ({_first_line(error)}): one is gone, or another program '
      f'holds memory of its GPUs, which nvidia-smi shows; {_AGAIN}'
    )
  return f'host {host} lost another host ({_first_line(error)}); {_AGAIN}'


def _first_line(error: Exception) -> str:
  return str(error).strip().partition('\n')[0][:200]


def _check_devices() -> None:
  """Refuses hosts of which each sees another number of devices; every host knows this by itself."""
  counts = Counter(device.process_index for device in jax.devices())
  held = [counts[host] for host in range(jax.process_count())]
  if len(set(held)) > 1:
    odd = next(host for host, count in enumerate(held) if count != held[0])
    raise InputError(
      f'host {odd} has {held[odd]} devices and host 0 has {held[0]}: give every host the same number.'
    )


def check_same(config: ConfigDict, workdir: str) -> None:
  """Compares what this host is about to run with what the others are.

  Raises:
    InputError: on every host alike, naming the first difference between a host and host 0.
  """
  if jax.process_count() == 1:
    return
  text = json.dumps(_facts(config, workdir), sort_keys=True).encode()
  everyone = [json.loads(other) for other in _everyone(text)]
  for host, facts in enumerate(everyone):
    for name in sorted(facts.keys() | everyone[0].keys()):
      theirs, ours = facts.get(name, 'absent'), everyone[0].get(name, 'absent')
      if theirs != ours:
        raise InputError(
          f'host {host} has {name} {theirs} and host 0 has {ours}: install the same code and start the same command '
          'on every host.'
        )


def wait(what: str) -> None:
  """Waits until all hosts are here, each for `what`."""
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(what)


def together(check: Callable[[], Any]) -> Any:
  """Runs a check that one host may fail alone, and has all hosts refuse then; returns what it gave here.

  Raises:
    InputError: on every host alike, the first host's.
  """
  sentence, given = '', None
  try:
    given = check()
  except InputError as error:
    sentence = str(error)
  if jax.process_count() == 1:
    found = [sentence]
  else:
    found = [other.decode() for other in _everyone(sentence.encode())]
  for host, said in enumerate(found):
    if said:
      raise InputError(said if host == jax.process_index() else f'host {host}: {said}')
  return given


@contextlib.contextmanager
def holding(workdir: str) -> Iterator[None]:
  """Keeps a second run out of a working directory; the kernel lets go of it however this one ends.

  A run that was told to leave may still be saving, so it is waited for.

  Raises:
    InputError: on every host alike, another run is at work there.
  """
  with contextlib.ExitStack() as stack:
    together(functools.partial(_hold, pathlib.Path(workdir), stack))
    yield


def _hold(workdir: pathlib.Path, stack: contextlib.ExitStack) -> None:
  if jax.process_index():
    return
  file = stack.enter_context(open(workdir / '.lock', 'a+', encoding='utf-8'))
  end = time.monotonic() + _HANDOVER
  while not _locked(file):
    if time.monotonic() > end:
      file.seek(0)
      raise InputError(
        f'another run is at work in {workdir} ({file.read().strip()}): end it first, or pass another --workdir.'
      )
    time.sleep(0.1)
  file.truncate(0)
  file.write(f'process {os.getpid()} on {platform.node()}\n')
  file.flush()


def _locked(file: IO[str]) -> bool:
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    return False
  except OSError as error:
    # Some network file systems have no locks.
    log.warning(
      '%s cannot be locked (%s): see to it that one run is at work there.', file.name, error
    )
  return True


def check_shared(workdir: str) -> None:
  """Refuses a working directory that is not the same folder on all hosts.

  Raises:
    InputError: on every host alike.
  """
  if jax.process_count() == 1:
    return
  mark = folder_of(workdir) / f'.shared-{secrets.token_hex(8)}'
  if jax.process_index() == 0:
    mark.write_text('')
  mark = mark.with_name(_everyone(mark.name.encode())[0].decode())
  end = time.monotonic() + _LEAVING
  # A network file system may show a new file late.
  while not mark.exists() and time.monotonic() < end:
    time.sleep(0.2)
  seen = [answer == b'1' for answer in _everyone(b'1' if mark.exists() else b'0')]
  if jax.process_index() == 0:
    mark.unlink()
  if not all(seen):
    raise InputError(
      f'{workdir} of host {seen.index(False)} is not the folder that host 0 has there: pass a --workdir that all hosts '
      'share, such as a mounted bucket.'
    )


def check_agreed(what: str, value: int) -> None:
  """Refuses hosts that found different values, such as of a folder that is not the same one everywhere.

  Raises:
    InputError: on every host alike.
  """
  if jax.process_count() == 1:
    return
  values = [int(other) for other in _everyone(str(value).encode())]
  if len(set(values)) > 1:
    odd = next(host for host, other in enumerate(values) if other != values[0])
    raise InputError(
      f'{what} is {values[odd]} on host {odd} and {values[0]} on host 0: pass a --workdir that all hosts share, such '
      'as a mounted bucket.'
    )


def _everyone(text: bytes) -> list[bytes]:
  """What each host says, in their order."""
  length = multihost_utils.process_allgather(np.int32(len(text)))
  row = np.zeros(int(length.max()), np.uint8)
  row[: len(text)] = np.frombuffer(text, np.uint8)
  rows = multihost_utils.process_allgather(row)
  return [bytes(row[:n]) for row, n in zip(rows, length, strict=True)]


def _facts(config: ConfigDict, workdir: str) -> dict[str, str]:
  """What must be equal on all hosts, by a name that a sentence can use."""
  facts = {f'config.{key}': str(value) for key, value in flattened(config).items()}
  facts |= {name: _version(name) for name in _LIBRARIES}
  facts |= {name: os.environ.get(name, 'unset') for name in _VARIABLES}
  facts |= {
    'code of the digest': code_digest(),
    'Python': platform.python_version(),
    'workdir': workdir,
  }
  return facts


def _version(library: str) -> str:
  try:
    return importlib.metadata.version(library)
  except importlib.metadata.PackageNotFoundError:
    return 'absent'


def code_digest(root: pathlib.Path = pathlib.Path(__file__).parent) -> str:
  """A short hash of the source files in a folder, by default of this package, and of their names."""
  digest = hashlib.sha256()
  for path in sorted(root.rglob('*.py')):
    digest.update(f'{path.relative_to(root).as_posix()} {path.stat().st_size} '.encode())
    digest.update(path.read_bytes())
  return digest.hexdigest()[:12]
