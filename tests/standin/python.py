"""Stands in for the Python of a TPU VM in the tests of launch/gcp_tpu.sh.

It makes environments that hold itself, writes the arguments of salt_jax.main down, and ends as program.json says of
this life of this worker: {"1.NODE.0": {"code": 0, "until": FILE, "says": TEXT, "saves": FILE}}. SIGTERM
ends it once the last file is there, and a second one at once.
"""

import json
import os
import pathlib
import signal
import sys
import time


def run(arguments):
  home = pathlib.Path(os.environ['HOME'])
  names = ('LIBTPU_INIT_ARGS', 'NOTE')
  record = {
    'argv': arguments,
    'cwd': os.getcwd(),
    'key': os.environ['STANDIN_KEY'],
    'environment': {name: os.environ[name] for name in names if name in os.environ},
  }
  with open(home / 'argv.jsonl', 'a') as file:
    file.write(json.dumps(record) + '\n')
  path = pathlib.Path(os.environ['STANDIN_PROGRAM'])
  plan = (json.loads(path.read_text()) if path.exists() else {}).get(os.environ['STANDIN_KEY'], {})

  def wait(key):
    deadline = time.monotonic() + 30
    while key in plan and not path.with_name(plan[key]).exists() and time.monotonic() < deadline:
      time.sleep(0.02)

  def leave(*_):
    signal.signal(signal.SIGTERM, lambda *_: os._exit(143))
    print('saving', flush=True)
    wait('saves')
    print('saved', flush=True)
    os._exit(75)

  signal.signal(signal.SIGTERM, leave)
  print(f'started {os.environ["STANDIN_KEY"]}\n{plan.get("says", "")}', end='', flush=True)
  wait('until')
  print('ended', flush=True)
  sys.exit(plan.get('code', 0))


def make_environment(place):
  os.makedirs(f'{place}/bin')
  path = pathlib.Path(place, 'bin/python')
  path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "{os.path.realpath(__file__)}" "$@"\n')
  path.chmod(0o755)


words = [word for word in sys.argv[1:] if word != '-u']
old = os.environ.get('STANDIN_OLD')
if words[0] == '-c':
  sys.exit(1 if old else 0)
elif words[:2] == ['-m', 'venv']:
  make_environment(words[2])
elif words == '-m pip install --quiet --user uv'.split() and old:
  pathlib.Path(os.environ['HOME'], 'uv').touch()
elif words[:3] == ['-m', 'uv', 'venv'] and pathlib.Path(os.environ['HOME'], 'uv').exists():
  make_environment(words[-1])
elif words[:3] == ['-m', 'pip', 'install'] and 'uv' not in words:
  pathlib.Path('installed').write_text(' '.join(words[3:]))
elif words[:2] == ['-m', 'salt_jax.main']:
  run(words[2:])
else:
  sys.exit(f'python stand-in: {words}')
