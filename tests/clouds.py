"""What the tests of launch/gcp_tpu.sh share: a checkout of it, and a world in which its calls of gcloud end."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import time

ROOT = pathlib.Path(__file__).parents[1]
STANDIN = ROOT / 'tests' / 'standin'
ADDRESS = 'https://example.org/lab/salt_jax.git'
NASTY = [
  '--config=configs/selfforcing.py:nano,method=dmd',
  '--workdir=/mnt/run one',
  '--config.checkpoint.folder=gs://bucket/run one',
  '--config.data.prompt=a red "sneaker" moves left; rm -rf $HOME `id` \\ it\'s  two  blanks',
  '--config.negative=低质量 (ugly) * ? ~ ! # & | < >\nsecond line\ttab ',
  '--config.a=',
  '--config.b=$(touch hacked) %USER% {1,2} [x] \'\' ""',
]
FLAGS = [
  '--config=configs/selfforcing.py:nano',
  '--workdir=/mnt/run',
  '--config.checkpoint.folder=gs://bucket/run',
]


def wrapper(path, script):
  path.write_text(f'#!/bin/sh\nexec "{sys.executable}" -S "{script}" "$@"\n')
  path.chmod(0o755)


def wait_for(ready):
  deadline = time.monotonic() + 20
  while not ready() and time.monotonic() < deadline:
    time.sleep(0.02)


def make_checkout(tmp_path_factory):
  """A pushed checkout of the launcher, and a git configuration in which its public address is a folder here."""
  base = tmp_path_factory.mktemp('code')
  origin, tree, config = base / 'origin.git', base / 'tree', base / 'gitconfig'
  config.write_text(
    f'[user]\n name = n\n email = e@example.org\n[init]\n defaultBranch = main\n[safe]\n directory = *\n'
    f'[url "file://{origin}"]\n insteadOf = {ADDRESS}\n'
  )
  before = os.environ.get('GIT_CONFIG_GLOBAL')
  os.environ['GIT_CONFIG_GLOBAL'] = str(config)
  shutil.copytree(ROOT / 'launch', tree / 'launch')
  for words in (
    ['init', '-q', '--bare', str(origin)],
    ['init', '-q', str(tree)],
    ['-C', str(tree), 'add', '.'],
    ['-C', str(tree), 'commit', '-qm', 'code'],
    ['-C', str(tree), 'remote', 'add', 'origin', ADDRESS],
    ['-C', str(tree), 'push', '-q', 'origin', 'HEAD:main'],
  ):
    subprocess.run(['git', *words], check=True)
  yield tree
  del os.environ['GIT_CONFIG_GLOBAL']
  if before is not None:
    os.environ['GIT_CONFIG_GLOBAL'] = before


class Cloud:
  """The launcher of a checkout, and the world in which its gcloud calls end."""

  def __init__(self, state, checkout):
    self.state, self.checkout = state, checkout
    (state / 'bin').mkdir()
    wrapper(state / 'bin' / 'gcloud', STANDIN / 'gcloud.py')
    for name in ('python3', 'python3.11', 'python3.12', 'python3.13', 'python3.14'):
      wrapper(state / 'bin' / name, STANDIN / 'python.py')
    (state / 'bin' / 'hostname').write_text('#!/bin/sh\necho "$STANDIN_HOST"\n')
    (state / 'bin' / 'hostname').chmod(0o755)
    self.environment = {
      **os.environ,
      'PATH': f'{state / "bin"}:{os.environ["PATH"]}',
      'GCLOUD_STATE': str(state),
      'SALT_JAX_TPU_HOME': str(state / 'notes'),
      'SALT_JAX_TPU_WAIT': '0',
      'CLOUDSDK_COMPUTE_ZONE': 'us-west4-a',
      'USER': 'Ada.Lovelace',
    }
    self.environment.pop('CLOUDSDK_CORE_PROJECT', None)

  def __call__(self, *words, code=0, stdin=None, **environment):
    """Runs the launcher, expects its exit code, and returns what it printed."""
    done = subprocess.run(
      ['bash', str(self.checkout / 'launch/gcp_tpu.sh'), *words],
      env={**self.environment, **environment},
      input=stdin,
      stdin=None if stdin is not None else subprocess.DEVNULL,
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      timeout=60,
    )
    assert done.returncode == code, done.stdout
    return done.stdout

  def set(self, name, value):
    (self.state / f'{name}.json').write_text(json.dumps(value))

  def get(self, name):
    path = self.state / f'{name}.json'
    return json.loads(path.read_text()) if path.exists() else {'nodes': {}, 'queued': {}}

  def fail(self, command, text, times=1, **more):
    self.set('faults', [dict(command=command, text=text, times=times, **more)])

  def calls(self, part=''):
    path = self.state / 'calls.jsonl'
    lines = path.read_text().splitlines() if path.exists() else []
    return [words for words in map(json.loads, lines) if part in ' '.join(words[2:4])]

  def home(self, node='pod', worker=0):
    return self.state / 'machines' / node / str(worker)

  def ran(self, node='pod', worker=0):
    path = self.home(node, worker) / 'argv.jsonl'
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

  def pod(self, kind='v5litepod-8'):
    """A slice called pod, of two workers unless told otherwise, with the code on it."""
    self('create', 'pod', f'--type={kind}')
    self('install', 'pod')


def make_cloud(tmp_path, checkout):
  """An empty world; what still runs in it ends with the test."""
  world = Cloud(tmp_path, checkout)
  yield world
  for pid in tmp_path.glob('machines/*/*/salt_jax_runs/*/pid'):
    subprocess.run(['kill', '-9', '--', f'-{pid.read_text().strip()}'], stderr=subprocess.DEVNULL)
