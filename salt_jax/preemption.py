"""Leaving when the machine is wanted back: SIGTERM saves behind the step in hand, a second one leaves at once.

A TPU VM learns from its metadata server that it is about to be stopped, which is heard like SIGTERM.
"""

import faulthandler
import json
import os
import signal
import sys
import threading
import urllib.request

import jax
from jax.experimental import multihost_utils

AT_ONCE = 143  # exit code of a run that left without saving: 128 + SIGTERM
_METADATA = 'metadata.google.internal'
_EVERY = (
  5.0  # seconds between two looks at the metadata; a maintenance is announced a minute before
)


class Notices:
  """Hears SIGTERM, and knows at which step all hosts stop.

  A Python handler would run only when the device is done with what the main thread waits for, and would take away the
  handler by which JAX tells the other hosts. What is registered here writes to a pipe at once and calls JAX's.

  Attributes:
    saving: whether there is something to save; until then SIGTERM leaves at once.
  """

  def __init__(self):
    self.saving = False
    self._noticed, self._closed, self._own = threading.Event(), threading.Event(), 0
    self._joined = jax.distributed.is_initialized()
    read, self._write = os.pipe()
    faulthandler.register(signal.SIGTERM, self._write, all_threads=False, chain=self._joined)
    threading.Thread(target=self._listen, args=(read,), daemon=True).start()
    if server := _metadata_server():
      threading.Thread(target=self._watch, args=(server,), daemon=True).start()

  def due(self, step: int) -> bool:
    """Whether to save before `step` and leave; all hosts ask before each step, and get one answer."""
    if self._joined:
      return multihost_utils.reached_preemption_sync_point(step)
    return self._noticed.is_set()

  def close(self) -> None:
    """Gives SIGTERM back its meaning."""
    self._closed.set()
    faulthandler.unregister(signal.SIGTERM)
    os.close(self._write)

  def _listen(self, read: int) -> None:
    heard, tail = 0, b''
    with os.fdopen(read, 'rb', buffering=0) as pipe:
      while text := pipe.read(4096):
        tail += text
        # Each signal writes one stack, under one such line.
        while (end := tail.find(b'recent call first')) >= 0:
          tail, heard = tail[end + 1 :], heard + 1
          self._hear(heard)

  def _watch(self, server: str) -> None:
    while not self._closed.wait(_EVERY):
      if _is_wanted(server):
        # The machine's own shutdown sends the SIGTERM that follows, which is no second one.
        self._own = 1
        os.kill(os.getpid(), signal.SIGTERM)
        return

  def _hear(self, count: int) -> None:
    if count - self._own > 1 or not self.saving:
      _say('SIGTERM: left without saving; the same command goes on from the newest checkpoint.')
      os._exit(AT_ONCE)
    self._noticed.set()
    _say('SIGTERM: saving behind the step in hand; another SIGTERM leaves at once.')


def _metadata_server() -> str | None:
  """Where a TPU VM asks about itself; elsewhere none, unless $GCE_METADATA_HOST names one."""
  named = os.environ.get('GCE_METADATA_HOST')
  return named or (_METADATA if jax.default_backend() == 'tpu' else None)


def _is_wanted(server: str) -> bool:
  """Whether the machine is about to be stopped: as a spot VM, or for maintenance."""
  url = f'http://{server}/computeMetadata/v1/instance/?recursive=true'
  request = urllib.request.Request(url, headers={'Metadata-Flavor': 'Google'})
  try:
    with urllib.request.urlopen(request, timeout=_EVERY) as answer:
      told = json.load(answer)
  except (OSError, ValueError):
    return False
  maintenance = str(told.get('maintenanceEvent', ''))
  return told.get('preempted') == 'TRUE' or maintenance.startswith('TERMINATE')


def _say(sentence: str) -> None:
  print(f'salt_jax: {sentence}', file=sys.stderr, flush=True)
