"""launch/gcp_tpu.sh against a stand-in for gcloud: what it refuses, the slice, the code, what reaches the program."""

import pathlib
import re
import shlex
import shutil
import subprocess
import sys

import pytest

from configs import selfforcing
from tests.clouds import FLAGS, NASTY, ROOT, Cloud, wait_for


def test_flags_reach_the_program_of_every_worker_exactly(cloud):
  cloud('create', 'pod', '--type=v5litepod-8', '--spot', '--project=my-project')
  cloud('install', 'pod', '--extras=tpu,wan', '--project=my-project')
  note = "--env=NOTE=it's $HOME; two  blanks"
  text = cloud(
    'run',
    'pod',
    '--project=my-project',
    note,
    '--env=LIBTPU_INIT_ARGS=--xla_a=1 --xla_b=2',
    '--',
    *NASTY,
  )
  head = subprocess.run(
    ['git', '-C', str(cloud.checkout), 'rev-parse', 'HEAD'], capture_output=True, text=True
  ).stdout.strip()
  for worker in (0, 1):
    (record,) = cloud.ran(worker=worker)
    assert record['argv'] == [*NASTY, '--multihost']
    assert record['environment'] == {
      'NOTE': "it's $HOME; two  blanks",
      'LIBTPU_INIT_ARGS': '--xla_a=1 --xla_b=2',
    }
    assert (
      pathlib.Path(record['cwd']) == (cloud.home(worker=worker) / 'salt_jax_code' / head).resolve()
    )
    assert pathlib.Path(record['cwd'], 'installed').read_text() == '--quiet -e .[tpu,wan]'
    assert not list(cloud.home(worker=worker).rglob('hacked'))
    assert 'started 1.pod' in (cloud.home(worker=worker) / 'salt_jax_runs/main/log').read_text()
  assert 'started 1.pod.0\nended\n' in text and 'finished on all workers' in text
  (create,) = cloud.calls('tpu-vm create')
  assert {
    '--spot',
    '--version=v2-alpha-tpuv5-lite',
    '--zone=us-west4-a',
    '--project=my-project',
  } < set(create)
  assert '--labels=created-by=salt-jax,owner=ada-lovelace' in create
  assert all('--project=my-project' in words for words in cloud.calls())


def test_dry_run_can_be_pasted(cloud, tmp_path_factory):
  """What --dry-run prints, pasted into a shell, does what the launcher does, and before that nothing."""
  steps = (
    ['create', 'pod', '--type=v6e-8'],
    ['install', 'pod', '--ship'],
    ['run', 'pod', '--', *NASTY],
  )
  printed = []
  for words in steps:
    text = subprocess.run(
      ['bash', str(cloud.checkout / 'launch/gcp_tpu.sh'), words[0], '--dry-run', *words[1:]],
      env=cloud.environment,
      capture_output=True,
      text=True,
      check=True,
    ).stdout
    printed.append(text)
  assert not cloud.calls() and not (cloud.state / 'notes').exists()
  for text in printed:
    lines = [
      line for line in text.replace('\nsecond', '\0second').splitlines() if ' describe ' not in line
    ]
    for line in lines:
      subprocess.run(
        ['bash', '-c', line.replace('\0', '\n')],
        env=cloud.environment,
        check=True,
        stdin=subprocess.DEVNULL,
      )
  wait_for(lambda: cloud.ran() and cloud.ran(worker=1))
  assert cloud.ran()[0]['argv'] == cloud.ran(worker=1)[0]['argv'] == [*NASTY, '--multihost']
  pasted = cloud.calls()
  again = Cloud(tmp_path_factory.mktemp('again'), cloud.checkout)
  for words in steps:
    again(*words)

  def acts(calls):
    texts = [
      shlex.join(words)
      for words in calls
      if words[3] in ('create', 'scp') or 'tpu_worker.sh start' in words[-1]
    ]
    return [text.replace(str(again.state), str(cloud.state)) for text in texts]

  without_token = [
    [words for words in text.split() if '2026' not in words and 'T' not in words]
    for text in acts(pasted)
  ]
  assert without_token == [
    [words for words in text.split() if '2026' not in words and 'T' not in words]
    for text in acts(again.calls())
  ]
  for command in (
    ['resume', 'pod', '--dry-run'],
    ['fetch', 'pod', '--to=x', '--dry-run'],
    ['delete', 'pod', '--dry-run'],
  ):
    before = len(again.calls())
    assert 'gcloud compute tpus tpu-vm' in again(*command)
    assert len(again.calls()) == before


def test_no_capacity_is_asked_for_again_and_not_for_ever(cloud):
  text = (
    'There is no more capacity in the zone "us-west4-a"; you can try in another zone (error code 8)'
  )
  cloud.fail('tpu-vm create', text, times=2, code=1)
  cloud('create', 'pod', '--type=v4-8')
  assert len(cloud.calls('tpu-vm create')) == 3
  cloud.fail('tpu-vm create', text, times=99)
  said = cloud('create', 'other', '--type=v4-8', '--tries=3', code=8)
  assert len(cloud.calls('tpu-vm create')) == 6 and 'has no capacity for v4-8 now' in said
  assert not cloud.calls('delete')


@pytest.mark.parametrize(
  ('text', 'code', 'sentence'),
  [
    (
      'RESOURCE_EXHAUSTED: Quota limit TPUV5sPreemptible has been exceeded. Limit: 0 in region us-west4.',
      8,
      'quota does not allow',
    ),
    ('ALREADY_EXISTS: Resource already exists', 1, 'exists already'),
    ('PERMISSION_DENIED: Cloud TPU API has not been used in project p', 1, 'did not create'),
  ],
)
def test_other_refusals_are_not_asked_again(cloud, text, code, sentence):
  cloud.fail('tpu-vm create', text, times=9)
  assert sentence in cloud('create', 'pod', '--type=v5litepod-8', code=code)
  assert len(cloud.calls('tpu-vm create')) == 1


def test_a_name_that_is_taken(cloud):
  cloud('create', 'pod', '--type=v6e-8')
  assert 'nothing was created' in cloud('create', 'pod', '--type=v6e-8')
  assert 'is there already as v6e-8' in cloud('create', 'pod', '--type=v6e-16', code=1)
  assert 'the slice of ada-lovelace, not of bob' in cloud(
    'create', 'pod', '--type=v6e-8', '--owner=bob', code=1
  )
  assert len(cloud.calls('create')) == 1


def test_a_queue_that_does_not_move_and_one_that_fails(cloud):
  cloud.set('queues', [['WAITING_FOR_RESOURCES'], ['ACCEPTED', 'FAILED']])
  text = cloud('create', 'pod', '--type=v6e-8', '--queued', '--minutes=2')
  assert 'WAITING_FOR_RESOURCES still' in text and len(cloud.calls('describe')) <= 14
  assert 'cannot be used now' in cloud('install', 'pod', code=1)
  assert 'FAILED, it did not come to be' in cloud(
    'create', 'bad', '--type=v6e-8', '--queued', code=1
  )
  assert not cloud.calls('delete') and set(cloud.get('world')['queued']) == {'pod', 'bad'}


def test_delete_only_what_is_ours(cloud):
  cloud('create', 'pod', '--type=v6e-8')
  world = cloud.get('world')
  world['nodes']['hers'] = {
    **world['nodes']['pod'],
    'labels': {'created-by': 'salt-jax', 'owner': 'eve'},
  }
  world['nodes']['hand'] = {**world['nodes']['pod'], 'labels': {'owner': 'ada-lovelace'}}
  cloud.set('world', world)
  assert 'not made by this script' in cloud('delete', 'hand', '--yes', code=1)
  assert 'the slice of eve' in cloud('delete', 'hers', '--yes', code=1)
  assert 'there is no slice none' in cloud('delete', 'none', '--yes', code=1)
  assert 'nothing was deleted' in cloud('delete', 'pod', stdin='yes\n', code=2)
  assert 'nothing was deleted' in cloud('delete', 'pod', code=2)
  assert not cloud.calls('delete')
  cloud.fail('tpu-vm delete', 'INTERNAL: try again')
  cloud('delete', 'pod', stdin='pod\n')
  assert set(cloud.get('world')['nodes']) == {'hers', 'hand'}


def test_no_answer_is_not_taken_for_no_slice(cloud):
  cloud.pod('v4-8')
  cloud('run', 'pod', '--', *FLAGS)
  cloud.fail(
    'tpu-vm describe',
    "PERMISSION_DENIED: Permission 'tpu.nodes.get' denied (or it may not exist).",
    times=99,
  )
  before = len(cloud.calls('create'))
  for words in (['resume', 'pod'], ['create', 'pod', '--type=v6e-8'], ['delete', 'pod', '--yes']):
    assert 'gcloud could not say' in cloud(*words, '--tries=2', code=1)
  assert len(cloud.calls('create')) == before and not cloud.calls('delete')


@pytest.mark.parametrize(
  ('words', 'sentence'),
  [
    (['create', 'Pod', '--type=v4-8'], 'the name Pod is not'),
    (['create', 'pod;id', '--type=v4-8'], "the name 'pod;id' is not"),
    (['create', 'pod', '--type=v4-8', '--zone=us;id'], '--zone'),
    (['create', 'pod', '--type=v4-8', '--zone=us-central2'], 'a zone such as'),
    (['create', 'pod', '--type=v4-8 --spot'], 'is not a slice such as'),
    (['create', 'pod', '--type=v5e-16'], 'is called v5litepod-16'),
    (['create', 'pod', '--type=tpu7x-16'], 'launch/GKE.md'),
    (['create', 'pod', '--type=h100'], 'is not a TPU slice'),
    (['create', 'pod'], 'is not a TPU slice'),
    (['create', 'pod', '--type=v4-8', '--project=$(id)'], '--project'),
    (['create', 'pod', '--type=v4-8', '--yes'], 'create has no option --yes'),
    (['create', 'pod', '--type=v4-8', '--network=a b'], 'is not a network'),
    (['create', 'pod', 'pod2', '--type=v4-8'], 'one name too many'),
    (['create', 'pod', '--type=v4-8', '--spot', '--reserved'], 'give one'),
    (['create', 'pod', '--type=v4-8', '--spot=no'], '--spot takes no value'),
    (['create', 'pod', '--type'], '--type needs a value'),
    (['create', 'pod', '--type=v4-8', '--slices=0'], '--slices 0'),
    (['create', 'pod', '--type=v4-8', '--', '--labels=a=b'], 'only `run` takes flags'),
    (['install', 'pod', '--repo=https://me:secret@example.org/x.git'], 'without user or token'),
    (['install', 'pod', '--commit=HEAD'], 'a whole commit hash'),
    (['install', 'pod', '--extras=tpu;id'], '--extras'),
    (['install', 'pod', '--setup=A=1 HF_TOKEN=abc ./get'], 'looks like a secret'),
    (['install', 'pod', '--setup=./get hf_' + 'a' * 30], 'looks like a secret'),
    (['run', 'pod', '--setup=./get', '--', *FLAGS], 'run has no option --setup'),
    (['run', 'pod'], 'say what to run'),
    (['run', 'pod', '--', '--workdir=/r'], 'say what to run'),
    (['run', 'pod', '--', '--config=c.py', '--workdir=runs/x'], 'an absolute path on the workers'),
    (['run', 'pod', '--', '--config=c.py', '--workdir=gs://b/r'], 'may go to a bucket'),
    (
      ['run', 'pod', '--', '--config=c.py', '--workdir=/r', '--config.checkpoint.folder=/x'],
      'is lost with the slice',
    ),
    (['run', 'pod', '--', '--config=c.py'], 'an absolute path on the workers'),
    (['run', 'pod', '--run=../x', '--', *FLAGS], '--run ../x'),
    (['run', 'pod', '--env=HF_TOKEN=abc', '--', *FLAGS], 'looks like a secret'),
    (['run', 'pod', '--', *FLAGS, '--config.x=hf_' + 'a' * 30], 'looks like a secret'),
    (['run', 'pod', '--keep-going=often', '--', *FLAGS], '--keep-going often'),
    (['logs', 'pod', '--worker=-1'], '--worker -1'),
    (['fetch', 'pod'], '--to=DIR'),
    (['remove', 'pod'], 'there is no command remove'),
  ],
)
def test_bad_arguments_end_in_a_sentence_before_any_call(cloud, words, sentence):
  text = cloud(*words, code=2)
  assert sentence in text and text.count('gcp_tpu:') == 1
  assert 'secret@' not in text and 'hf_a' not in text
  assert not cloud.calls()


def test_where_the_code_may_come_from(cloud, tmp_path_factory):
  tree = tmp_path_factory.mktemp('clone') / 'tree'
  shutil.copytree(cloud.checkout, tree, symlinks=True)
  git = ['git', '-C', str(tree)]
  cloud.checkout = tree
  (tree / 'new.txt').write_text('not committed')
  assert 'uncommitted changes' in cloud('install', 'pod', code=2)
  subprocess.run([*git, 'add', '.'], check=True)
  subprocess.run([*git, 'commit', '-qm', 'more'], check=True)
  assert 'was not pushed' in cloud('install', 'pod', code=2)
  subprocess.run(
    [*git, 'remote', 'set-url', 'origin', 'https://me:token@example.org/x.git'], check=True
  )
  text = cloud('install', 'pod', code=2)
  assert 'without user or token' in text and 'me:token' not in text
  subprocess.run([*git, 'remote', 'remove', 'origin'], check=True)
  assert 'no remote called origin' in cloud('install', 'pod', code=2)
  assert not cloud.calls()
  cloud('create', 'pod', '--type=v6e-8')
  (tree / 'new.txt').write_text('changed since')
  assert 'uncommitted changes are not sent' in cloud('install', 'pod', '--ship')
  for worker in (0, 1):
    code = cloud.home(worker=worker) / 'salt_jax_code'
    assert (code / 'current/new.txt').read_text() == 'not committed'
    assert len(list(code.iterdir())) == 2


def test_an_old_python_gets_a_new_one_without_root(cloud):
  cloud('create', 'pod', '--type=v4-8')
  cloud('install', 'pod', STANDIN_OLD='yes')
  assert (cloud.home() / 'uv').exists()
  assert (cloud.home() / 'salt_jax_code/current/.venv/ready').exists()
  assert 'installed already' in cloud('install', 'pod')


def test_setup_runs_in_the_code_of_every_worker_whenever_it_is_installed(cloud):
  cloud('create', 'pod', '--type=v6e-8')
  word = 'it\'s $HOME; "two"  blanks \\ `id` 低\nline *'
  setup = f'test -e .venv/ready && A_TOKEN=$(id) && printf %s {shlex.quote(word)} >> "the inputs"'
  for times in (1, 2):
    cloud('install', 'pod', f'--setup={setup}')
    for worker in (0, 1):
      place = cloud.home(worker=worker) / 'salt_jax_code/current'
      assert (place / 'the inputs').read_text() == word * times
  assert 'installed already' in cloud('install', 'pod')
  assert (cloud.home() / 'salt_jax_code/current/the inputs').read_text() == word * 2


def test_a_failed_setup_is_named(cloud):
  cloud('create', 'pod', '--type=v6e-8')
  text = cloud('install', 'pod', '--setup=[[ $(hostname) == *-0 ]] || exit 7', code=1)
  assert text.count('gcp_tpu: pod, worker 1 failed with exit code 7') == 1
  assert 'pod, worker 0' not in text and len(cloud.calls('ssh')) == 1
  assert 'the code is not there yet' in cloud('run', 'pod', '--', *FLAGS, code=1)


@pytest.mark.parametrize(('kind', 'worker'), [('v6e-8', 1), ('v6e-4', 0)])
def test_a_failed_installation_is_named_and_not_tried_again(cloud, kind, worker):
  cloud('create', 'pod', f'--type={kind}')
  assert 'no code is installed there' in cloud('status', 'pod')
  (cloud.home(worker=worker) / 'salt_jax_code').write_text('in the way')
  text = cloud('install', 'pod', code=1)
  assert (
    text.count(f'pod, worker {worker} failed with exit code 1') == 1
    and len(cloud.calls('ssh')) == 2
  )
  assert 'the code is not there yet' in cloud('run', 'pod', '--', *FLAGS, code=1)


def test_the_example_of_the_readme(cloud, tmp_path):
  block = (ROOT / 'README.md').read_text().split('## On a TPU slice')[1].split('```')[1]
  lines = [shlex.split(line)[1:] for line in block.splitlines() if line.startswith('launch/')]
  create, install, run, fetch, delete = lines
  chips = create[2].removeprefix('--type=v5litepod-')
  assert {'--config=configs/selfforcing.py:nano', f'--config.batch={chips}'} < set(run)
  for words in (create, install, run):
    cloud(*words)
  assert [len(cloud.ran(worker=worker)) for worker in range(4)] == [1] * 4
  (cloud.state / 'buckets/BUCKET/run').mkdir(parents=True)
  (cloud.home() / 'tmp/run').mkdir(parents=True)
  cloud(*fetch[:2], f'--to={tmp_path / fetch[2].removeprefix("--to=")}')
  cloud(*delete, stdin='pod\n')


def test_the_example_on_gke_fits_its_slice_and_names_its_files():
  text = (ROOT / 'launch/GKE.md').read_text()
  (kind,) = set(re.findall(r'--tpu-type=(\S+)', text))
  (config,) = re.findall(r'--config=configs/(\S+)', text)
  assert f'| {config} | {kind} |' in (ROOT / 'README.md').read_text()
  files = selfforcing.get_config().weights
  for name in ('vae', 'text', 'tokenizer', 'teacher', 'init', 'critic'):
    assert f'{name}=/inputs/{files[name].removesuffix(".safetensors")}' in text


def test_scripts_are_clean():
  shellcheck = pathlib.Path(sys.executable).with_name('shellcheck')
  scripts = [*sorted(ROOT.glob('launch/*.sh')), ROOT / '.ci/run']
  assert len(scripts) >= 5
  subprocess.run([shellcheck, *scripts], check=True)
  # The parts share variables, and say so; as one script they need no such leave.
  parts = [ROOT / 'launch/gcp_tpu.sh', *sorted(ROOT.glob('launch/gcp_tpu/*.sh'))]
  lines = [line for part in parts for line in part.read_text().splitlines()]
  whole = '\n'.join(
    line for line in lines if '# shellcheck' not in line and not line.startswith('. ')
  )
  subprocess.run([shellcheck, '-s', 'bash', '-'], input=whole, text=True, check=True)
