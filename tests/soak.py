"""Kills one run again and again at random moments, and compares its end with that of a run that was left alone.

  python -m tests.soak --folder=/tmp/soak
  python -m tests.soak --folder=/tmp/soak --kills=20 --hosts=2 -- --config=configs/selfforcing.py:nano,method=dmd

First it runs the experiment undisturbed (FOLDER/whole; kept if it is there). Then it runs the same in FOLDER/killed and
sends SIGKILL to one of the hosts, `--kills` times: while it starts, in the middle of a save or of clearing away what is
left of one, or right behind one; and starts all hosts again each time. At the end checkpoints, metrics and exported
weights must be the same in every bit. Behind `--` come flags of salt_jax.main; the default is a nano run of
120 steps with a checkpoint every other step.
"""

import argparse
import json
import pathlib
import random
import sys
import time

from safetensors.numpy import load_file

from tests import processes

NANO = (
  '--config=configs/selfforcing.py:nano',
  '--config.total_steps=120',  # room for fifty lives that each save once
  '--config.checkpoint.every=2',
  '--config.evaluate.clips=0',
)


def main(words: list[str]) -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument('--folder', required=True, type=pathlib.Path)
  parser.add_argument('--kills', type=int, default=50)
  parser.add_argument('--hosts', type=int, default=1)
  parser.add_argument('--devices', type=int, default=1, help='CPU devices of each host')
  parser.add_argument('--seed', type=int, default=0, help='of the moments')
  parser.add_argument('flags', nargs='*', default=NANO)
  args = parser.parse_args(words)
  whole, killed = args.folder / 'whole', args.folder / 'killed'
  if not list(whole.glob('export/*')):
    began = time.monotonic()
    _end(_start(args, whole), whole)
    print(f'undisturbed in {time.monotonic() - began:.0f} s', flush=True)
  kill_often(args, killed)
  _end(_start(args, killed), killed)
  differences = compare(whole, killed)
  print('\n'.join(differences) or f'{args.kills} kills, and every bit is the same')
  sys.exit(bool(differences))


def kill_often(args: argparse.Namespace, workdir: pathlib.Path) -> None:
  """Starts and kills a run; the moments are drawn from `args.seed`."""
  draw = random.Random(args.seed)
  for number in range(1, args.kills + 1):
    before, since, began = _steps(workdir), time.time(), time.monotonic()
    hosts = _start(args, workdir)
    moment = _MOMENTS[name := draw.choice(list(_MOMENTS))]
    while not moment(workdir, before, since) and time.monotonic() - began < 300:
      if hosts[0].poll() is not None:
        raise SystemExit(
          f'the run ended (code {hosts[0].returncode}) after {number - 1} kills, see {workdir}/logs: give it more '
          'steps, or fewer --kills.'
        )
      time.sleep(0.002)
    time.sleep(draw.uniform(0, _LATER[name]))
    victim = draw.randrange(len(hosts))
    processes.kill(hosts[victim])
    processes.ended(hosts, workdir / 'logs', limit=processes.HEARTBEAT + 60)
    life = time.monotonic() - began
    done = max(_steps(workdir), default=0)
    print(
      f'kill {number}: host {victim} {name}, after {life:.1f} s, step {done} is saved', flush=True
    )


# When a life may end, by what is seen of it, and how much later it ends at most, in seconds.
_MOMENTS = {
  'starting': lambda workdir, before, since: True,
  'saving': lambda workdir, before, since: _saves(workdir, since),
  'behind a save': lambda workdir, before, since: _steps(workdir) - before,
}
_LATER = {'starting': 8.0, 'saving': 0.2, 'behind a save': 0.5}


def _saves(workdir: pathlib.Path, since: float) -> bool:
  """Whether an unfinished checkpoint has changed since a time of day."""
  try:
    return any(path.stat().st_mtime > since for path in (workdir / 'checkpoints').glob('*tmp*'))
  except FileNotFoundError:
    return False


def _steps(workdir: pathlib.Path) -> set[int]:
  return {int(path.name) for path in (workdir / 'checkpoints').glob('*') if path.name.isdigit()}


def _start(args: argparse.Namespace, workdir: pathlib.Path) -> list:
  command = ['-m', 'salt_jax.main', f'--workdir={workdir}', *args.flags]
  return processes.start(args.hosts, command, workdir / 'logs', args.devices)


def _end(hosts: list, workdir: pathlib.Path) -> None:
  codes, logs = processes.ended(hosts, workdir / 'logs', limit=24 * 3600)
  if any(codes):
    raise SystemExit(f'exit codes {codes}: {logs[0][-2000:]}')


def compare(whole: pathlib.Path, killed: pathlib.Path) -> list[str]:
  """What is not the same in two runs, one line each."""
  found = []
  step = max(_steps(whole))
  if _info(whole, step) != _info(killed, step):
    found.append(f'the fingerprints of step {step} differ')
  a, b = (json_lines(workdir / 'metrics.jsonl') for workdir in (whole, killed))
  if a != b:
    found.append('the metrics differ')
  for path in (whole / 'export').glob('*.safetensors'):
    one, other = load_file(path), load_file(killed / 'export' / path.name)
    found += [f'{name} differs' for name in one if one[name].tobytes() != other[name].tobytes()]
  return found


def json_lines(path: pathlib.Path) -> list[dict]:
  return [json.loads(line) for line in path.read_text().splitlines()]


def _info(workdir: pathlib.Path, step: int) -> dict:
  (file,) = (workdir / 'checkpoints' / str(step) / 'info').rglob('metadata')
  return json.loads(file.read_text())


if __name__ == '__main__':
  main(sys.argv[1:])
