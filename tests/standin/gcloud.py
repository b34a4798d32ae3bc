"""Stands in for gcloud in the tests of launch/gcp_tpu.sh.

It keeps slices in the folder GCLOUD_STATE, runs what it is told on their workers in sandboxes of this machine, writes
every call down, and fails as faults.json says, in the words of the real one.
"""

# Imports that few calls need stand where they are used: a test makes dozens of calls.
import fcntl
import json
import os
import pathlib
import re
import sys

STATE = pathlib.Path(os.environ['GCLOUD_STATE'])
WIDE = 'zone project format quiet'
CREATE = (
  WIDE
  + ' accelerator-type labels spot reserved network subnetwork service-account internal-ips async data-disk'
)
# The flags that each command has, by its own --help of Google Cloud SDK 528.
FLAGS = {
  'tpu-vm create': CREATE + ' version',
  'tpu-vm describe': WIDE,
  'tpu-vm delete': WIDE + ' async',
  'tpu-vm list': WIDE + ' filter',
  'tpu-vm ssh': WIDE + ' worker command internal-ip ssh-flag',
  'tpu-vm scp': WIDE + ' worker recurse internal-ip compress',
  'queued-resources create': CREATE
  + ' runtime-version node-id node-count node-prefix valid-until-duration',
  'queued-resources describe': WIDE,
  'queued-resources delete': WIDE + ' force async',
  'queued-resources list': WIDE + ' filter',
  'storage rsync': 'recursive project',
}
IMAGES = {
  'v4': 'tpu-ubuntu2204-base',
  'v5litepod': 'v2-alpha-tpuv5-lite',
  'v5p': 'v2-alpha-tpuv5',
  'v6e': 'v2-alpha-tpuv6e',
}


def leave(code, text=''):
  print(text, file=sys.stderr)
  sys.exit(code)


def load(name, default):
  path = STATE / name
  return json.loads(path.read_text()) if path.exists() else default


def save(name, value):
  (STATE / name).write_text(json.dumps(value))


def parse(words):
  """-> (command, positional words, flags); what the real command does not know is an error."""
  words = words[2:] if words[:2] == ['compute', 'tpus'] else words
  command, rest = ' '.join(words[:2]), words[2:]
  if command not in FLAGS:
    leave(2, f'ERROR: (gcloud) Invalid choice: {command!r}.')
  names, flags = [], {}
  for word in rest:
    key, _, value = word.removeprefix('--').partition('=')
    if not word.startswith('--'):
      names.append(word)
    elif key not in FLAGS[command].split():
      leave(2, f'ERROR: (gcloud.{command.replace(" ", ".")}) unrecognized arguments: {word}')
    else:
      flags[key] = value or True
  return command, names, flags


def fail_if_due(command, done):
  """Takes the first fault of this command from faults.json, and leaves as it says, before or once it is `done`."""
  faults = load('faults.json', [])
  for fault in faults:
    if fault['command'] == command and fault['times'] > 0 and fault.get('done', False) == done:
      fault['skip'] = fault.get('skip', 0) - 1
      if fault['skip'] >= 0:
        break
      fault['times'] -= 1
      save('faults.json', faults)
      leave(
        fault.get('code', 1),
        f'ERROR: (gcloud.compute.tpus.{command.replace(" ", ".")}) {fault["text"]}',
      )
  save('faults.json', faults)


def resource(kind, name, table):
  if name not in table:
    leave(1, f"NOT_FOUND: Resource 'projects/p/locations/z/{kind}/{name}' was not found.")
  return table[name]


def pick(value, path):
  """value of a key such as a.b[0].c.len(), as --format=value(…) prints it."""
  for key in re.findall(r'[\w-]+\(\)|[\w-]+|\[\d+\]', path):
    if key == 'len()':
      return len(value or ())
    if key.startswith('['):
      value = value[int(key[1:-1])]
    else:
      value = (value or {}).get(key)
  return '' if value is None else value


def describe(value, flags):
  form = flags.get('format')
  if form is None:
    print(json.dumps(value, indent=1))
    return
  separator, keys = re.fullmatch(r"value\[separator='(.)'\]\((.*)\)", form).groups()
  print(separator.join(str(pick(value, key)) for key in keys.split(',')))


def node(flags):
  kind, size = flags['accelerator-type'].rsplit('-', 1)
  image = flags.get('version') or flags['runtime-version']
  if image != IMAGES[kind]:
    leave(1, f'ERROR: INVALID_ARGUMENT: runtime {image} is not one for {kind}')
  hosts = max(1, int(size) // (8 if kind in ('v4', 'v5p') else 4))
  return {
    'state': 'READY',
    'acceleratorType': flags['accelerator-type'],
    'labels': dict(pair.split('=') for pair in flags.get('labels', '').split(',') if pair),
    'networkEndpoints': [{'ipAddress': f'10.0.0.{number}'} for number in range(hosts)],
  }


def make_machines(nodes, name, value):
  value['generation'] = load('generation.json', 0) + 1
  save('generation.json', value['generation'])
  nodes[name] = value
  for worker in range(len(value['networkEndpoints'])):
    (STATE / 'machines' / name / str(worker)).mkdir(parents=True)


def living(group):
  """Whether a process of this group is left that can still write; a dead one may wait long for its parent."""
  for path in pathlib.Path('/proc').glob('[0-9]*/stat'):
    try:
      state, _, number = path.read_text().rpartition(')')[2].split()[:3]
    except (FileNotFoundError, ProcessLookupError):
      continue
    if int(number) == group and state not in 'ZX':
      return True
  return False


def power_off(machine):
  """Ends what runs there; what finds the disk again finds it under another boot."""
  import signal
  import time

  for pid in machine.glob('salt_jax_runs/*/pid'):
    group = int(pid.read_text())
    try:
      os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
      pass
    while living(group):
      time.sleep(0.01)
    pid.with_name('boot').write_text('the boot before\n')


def take_away(nodes, name, state):
  """Ends what runs on the node, with everything on its disks."""
  import shutil

  for machine in (STATE / 'machines' / name).iterdir():
    power_off(machine)
  shutil.rmtree(STATE / 'machines' / name)
  nodes[name]['state'] = state


def create_node(names, flags, world):
  if names[0] in world['nodes']:
    leave(
      1,
      f'ERROR: (gcloud.compute.tpus.tpu-vm.create) ALREADY_EXISTS: the resource {names[0]} already exists',
    )
  make_machines(world['nodes'], names[0], node(flags))


def create_queued(names, flags, world):
  if names[0] in world['queued']:
    leave(
      1, 'ERROR: (gcloud.compute.tpus.queued-resources.create) ALREADY_EXISTS: it already exists'
    )
  spec = {'node': node(flags)}
  if 'node-count' in flags:
    spec['multisliceParams'] = {'nodeCount': int(flags['node-count'])}
    members = [f'{flags["node-prefix"]}-{number}' for number in range(int(flags['node-count']))]
  else:
    spec['nodeId'], members = flags['node-id'], [flags['node-id']]
  queues = load('queues.json', [])
  states = ['ACCEPTED', 'WAITING_FOR_RESOURCES', 'PROVISIONING', 'ACTIVE']
  if queues:
    states = queues.pop(0)
    save('queues.json', queues)
  world['queued'][names[0]] = {
    'state': {'state': states[0]},
    'tpu': {'nodeSpec': [spec]},
    'members': members,
    'next': states[1:],
  }


def describe_node(names, flags, world):
  value = resource('nodes', names[0], world['nodes'])
  describe(value, flags)
  if value.get('next'):
    value['state'] = value['next'].pop(0)


def describe_queued(names, flags, world):
  value = resource('queuedResources', names[0], world['queued'])
  describe(value, flags)
  if value['next']:
    value['state']['state'] = value['next'].pop(0)
    if value['state']['state'] == 'ACTIVE':
      for member in value['members']:
        request = f'projects/p/locations/z/queuedResources/{names[0]}'
        make_machines(
          world['nodes'], member, {**value['tpu']['nodeSpec'][0]['node'], 'queuedResource': request}
        )


def delete_queued(names, flags, world):
  value = resource('queuedResources', names[0], world['queued'])
  there = [member for member in value['members'] if member in world['nodes']]
  if there and 'force' not in flags:
    leave(1, 'ERROR: FAILED_PRECONDITION: the queued resource has nodes')
  for member in there:
    delete_node([member], flags, world)
  del world['queued'][names[0]]


def delete_node(names, flags, world):
  value = resource('nodes', names[0], world['nodes'])
  if value['state'] == 'READY':
    take_away(world['nodes'], names[0], 'DELETING')
  del world['nodes'][names[0]]


def chosen(value, flags):
  count = len(value['networkEndpoints'])
  return list(range(count)) if flags.get('worker') == 'all' else [int(flags.get('worker', 0))]


def usable(name, world):
  value = resource('nodes', name, world['nodes'])
  if value['state'] != 'READY':
    leave(
      1, f'ERROR: This TPU has terminal state "{value["state"]}", so it cannot be used anymore.'
    )
  return value


def on_worker(name, worker, generation, command, unheard):
  import subprocess

  home = STATE / 'machines' / name / str(worker)
  environment = {
    'HOME': str(home),
    'PATH': os.environ['PATH'],
    'STANDIN_HOST': f't1v-n-0a1b2c3d-w-{worker}',
    'STANDIN_PROGRAM': str(STATE / 'program.json'),
    'STANDIN_KEY': f'{generation}.{name}.{worker}',
  }
  for key in ('GIT_CONFIG_GLOBAL', 'SALT_JAX_TPU_WAIT', 'STANDIN_OLD'):
    environment[key] = os.environ.get(key, '')
  # gcloud parts the command at blanks, and ssh joins what it is given with blanks for the login shell.
  words = ['bash', '-c', ' '.join(command.split(' '))]
  null = subprocess.DEVNULL
  return subprocess.Popen(
    words,
    start_new_session=True,
    cwd=home,
    env=environment,
    stdin=null,
    stdout=null if unheard else None,
  )


def ssh(names, flags, world):
  value = usable(names[0], world)
  workers = chosen(value, flags)
  cut = load('cut.json', [])
  unheard = load('unheard.json', [])
  if not (unheard and f' {unheard[0]} ' in flags['command']):
    unheard = []
  if cut[:1] == ['before start'] and ' start ' in flags['command']:
    return interrupt(None, cut, names[0], world)
  codes = []
  for worker in workers:
    print(f'SSH: Attempting to connect to worker {worker}...', file=sys.stderr)
    process = on_worker(names[0], worker, value['generation'], flags['command'], bool(unheard))
    while cut and ' follow ' in flags['command']:
      repeats = cut[0] == 'repeat'
      code = interrupt(process, cut, names[0], world)
      if not repeats:
        return code
      process = on_worker(names[0], worker, value['generation'], flags['command'], False)
    codes.append(process.wait())
    if codes[-1] and len(workers) > 1:
      print(
        f'##### Command execution on worker {worker} failed with exit status {codes[-1]}. Continuing.',
        file=sys.stderr,
      )
  if unheard:  # the command ran, but the connection dropped before its end was heard
    save('unheard.json', unheard[1:])
    leave(
      255, 'ERROR: (gcloud.compute.tpus.tpu-vm.ssh) [/usr/bin/ssh] exited with return code [255].'
    )
  return next((code for code in codes if code), 0)


def interrupt(process, cut, name, world):
  """Cuts the connection while a log is followed: by the network ("drop", or "repeat" where gcloud itself
  tries again), a "repair", or with the whole slice. After the last cut it lets the program go on."""
  import signal
  import time

  deadline = time.monotonic() + (20 if process else 0)
  log = STATE / 'machines' / name / '0'
  while (
    not any(path.stat().st_size for path in log.glob('salt_jax_runs/*/log'))
    and time.monotonic() < deadline
  ):
    time.sleep(0.02)
  time.sleep(0.1)
  if process:
    os.killpg(process.pid, signal.SIGKILL)
  what = cut.pop(0)
  save('cut.json', cut)
  if not cut:
    (STATE / 'cut').touch()
  if what == 'repair':
    power_off(log)
    world['nodes'][name].update(state='REPAIRING', next=['REPAIRING'] * 30 + ['READY'])
  elif what not in ('drop', 'repeat'):
    take_away(world['nodes'], name, 'PREEMPTED')
    for value in world['queued'].values():
      if name in value['members']:
        value['state']['state'] = 'SUSPENDED'
  print('Connection to 10.0.0.1 closed by remote host.', file=sys.stderr)
  return 255


def scp(names, flags, world):
  import shutil

  source, target = names
  name = (source if ':' in source else target).split(':')[0]
  for worker in chosen(usable(name, world), flags):
    home = STATE / 'machines' / name / str(worker)
    if ':' in target:
      shutil.copy(source, home / target.split(':')[1])
    elif 'recurse' in flags:
      shutil.copytree(home / source.split(':')[1].lstrip('/'), target)
    else:
      shutil.copy(home / source.split(':')[1], target)


def rsync(names, flags, world):
  import shutil

  shutil.copytree(STATE / 'buckets' / names[0].removeprefix('gs://'), names[1], dirs_exist_ok=True)


COMMANDS = {
  'tpu-vm create': create_node,
  'tpu-vm describe': describe_node,
  'tpu-vm delete': delete_node,
  'tpu-vm list': lambda names, flags, world: print('\n'.join(world['nodes'])),
  'tpu-vm ssh': ssh,
  'tpu-vm scp': scp,
  'queued-resources create': create_queued,
  'queued-resources describe': describe_queued,
  'queued-resources delete': delete_queued,
  'queued-resources list': lambda names, flags, world: print('\n'.join(world['queued'])),
  'storage rsync': rsync,
}


def main():
  with open(STATE / 'lock', 'w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    with open(STATE / 'calls.jsonl', 'a') as calls:
      calls.write(json.dumps(sys.argv[1:]) + '\n')
    command, names, flags = parse(sys.argv[1:])
    fail_if_due(command, False)
    world = load('world.json', {'nodes': {}, 'queued': {}})
    code = COMMANDS[command](names, flags, world)
    save('world.json', world)
    fail_if_due(command, True)
  sys.exit(code or 0)


main()
