"""Leaving when the machine is wanted back: SIGTERM saves behind the step in hand, a second one leaves at once."""

import faulthandler
import os
import signal
import sys
import threading

import jax
from jax.experimental import multihost_utils

AT_ONCE = 143  # exit code of a run that left without saving: 128 + SIGTERM


class Notices:
  """Hears SIGTERM, and knows at which step all hosts stop.

  A Python handler would run only when the device is done with what the main thread waits for, and would take away the
  handler by which JAX tells the other hosts. What is registered here writes to a pipe at once and calls JAX's.

  Attributes:
    saving: whether there is something to save; until then SIGTERM leaves at once.
  """

  def __init__(self):
    self.saving = False
    self._noticed = threading.Event()
    self._joined = jax.distributed.is_initialized()
    read, self._write = os.pipe()
    faulthandler.register(signal.SIGTERM, self._write, all_threads=False, chain=self._joined)
    threading.Thread(target=self._listen, args=(read,), daemon=True).start()

  def due(self, step: int) -> bool:
    """Whether to save before `step` and leave; all hosts ask before each step, and get one answer."""
    if self._joined:
      return multihost_utils.reached_preemption_sync_point(step)
    return self._noticed.is_set()

  def close(self) -> None:
    """Gives SIGTERM back its meaning."""
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

  def _hear(self, count: int) -> None:
    if count > 1 or not self.saving:
      _say('SIGTERM: left without saving; the same command goes on from the newest checkpoint.')
      os._exit(AT_ONCE)
    self._noticed.set()
    _say('SIGTERM: saving behind the step in hand; another SIGTERM leaves at once.')


def _say(sentence: str) -> None:
  print(f'salt_jax: {sentence}', file=sys.stderr, flush=True)
