"""The ways a run stops on purpose; `main` prints the sentence and exits non-zero."""


class InputError(ValueError):
  """Something the user gave is wrong. The message is one sentence: the thing and the mend."""


class NonFiniteError(InputError):
  """A loss or a norm became NaN or infinite, so going on would only spoil the checkpoints."""


class Preempted(Exception):
  """The machine is wanted back, and the run is saved. The message says how to go on."""
