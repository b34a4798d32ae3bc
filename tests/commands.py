"""Programs started in this process, as a user starts them, and what they say when they refuse."""

import logging
import pathlib
import sys

import pytest
from absl import flags

from salt_jax import cli, convert_cli, evaluate, main, plan, sample, vbench

ROOT = pathlib.Path(__file__).parents[1]
STUDENT = 'assets:nano_student.safetensors'
NANO = '--config=configs/selfforcing.py:nano'


def programs():
  """Programs by name; afterwards flags and log are as before."""
  known, logger = set(flags.FLAGS), logging.getLogger('salt_jax')
  handlers = list(logger.handlers)
  yield {
    'main': main,
    'sample': sample,
    'evaluate': evaluate,
    'vbench': vbench,
    'convert': convert_cli,
    'plan': plan,
  }
  for name in set(flags.FLAGS) - known:
    delattr(flags.FLAGS, name)
  flags.FLAGS.unparse_flags()
  logger.handlers, logger.propagate = handlers, True


def refusal(program, args, monkeypatch, capsys) -> str:
  """The one line that the program prints before it ends with code 2."""
  monkeypatch.setattr(sys, 'argv', [program.__name__, *args])
  with pytest.raises(SystemExit) as stop:
    cli.run(program.program, program.define_flags)
  lines = capsys.readouterr().err.splitlines()
  assert stop.value.code == 2 and len(lines) == 1, lines
  assert lines[0].startswith('salt_jax: ')
  return lines[0]


def finished(program, args, monkeypatch) -> None:
  """Runs the program to its end."""
  monkeypatch.setattr(sys, 'argv', [program.__name__, *args])
  with pytest.raises(SystemExit) as stop:
    cli.run(program.program, program.define_flags)
  assert not stop.value.code


def refusals(wrong):
  """Runs a test over {program: its (arguments, sentence) pairs}."""
  cases = [(name, *case) for name, pairs in wrong.items() for case in pairs]
  return pytest.mark.parametrize('name, args, sentence', cases)


def sentence_of(error) -> str:
  """The message of a refusal that `pytest.raises` caught."""
  text = str(error.value)
  assert '\n' not in text and 'Traceback' not in text and len(text) > 20
  return text
