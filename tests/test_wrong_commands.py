"""A wrong command of training, planning or conversion ends in one clear sentence and exit code 2."""

import subprocess
import sys

import pytest
from absl import flags

from salt_jax import cli, main
from tests import commands
from tests.commands import NANO, ROOT

WRONG_COMMANDS = {
  'main': (
    ([NANO, '--config.nosuch=1'], '--config.nosuch: config has no key "nosuch"; the nearest are '),
    (
      [NANO, '--config.optim.generator.lrr=1'],
      'config.optim.generator has no key "lrr"; the nearest are lr',
    ),
    (
      [NANO, '--config.batch.x=1'],
      'config.batch is a value without keys; set --config.batch itself.',
    ),
    (
      [NANO, '--config.dmd=3'],
      '--config.dmd is a section; set its keys, such as --config.dmd.guidance.',
    ),
    ([NANO, '--config.batch=abc'], "--config.batch=abc: a whole number is needed, not 'abc'"),
    (
      [NANO, '--config.rollout.chunk', '2.5'],
      "--config.rollout.chunk=2.5: a whole number is needed, not '2.5'",
    ),
    (
      [NANO, '--config.optim.generator.lr=x'],
      "--config.optim.generator.lr=x: a number is needed, not 'x'",
    ),
    ([NANO, '--config.rollout.unroll=3'], '--config.rollout.unroll=3: true or false is needed'),
    (
      [NANO, '--profile=10'],
      '--profile=10 must be the first and the last step, such as --profile=10:13.',
    ),
    (
      [NANO, '--profile=13:10'],
      '--profile=13:10 must name steps between 1 and total_steps=80, the first one first.',
    ),
    ([NANO, '--profile=0:3'], '--profile=0:3 must name steps between 1 and total_steps=80'),
    ([NANO, '--profile=119:121'], '--profile=119:121 must name steps between 1 and total'),
    (
      [NANO, '--compile_cache=/dev/null/here'],
      '--compile_cache: nothing can be written to /dev/null/here (Not a directory)',
    ),
    (
      [NANO + 'o'],
      'the config argument "nanoo" is unknown; known are: 1.3b, 14b, causal_forcing, dmd,',
    ),
    (
      ['--config=configs/selforcing.py:nano'],
      'there is no config file configs/selforcing.py here; pass one such as',
    ),
    (
      ['--config=LICENSE'],
      'there is no config file LICENSE here; pass one such as configs/selfforcing.py:nano.',
    ),
    (
      ['--config=configs/pretrain.py:vae,steps=x'],
      'the config argument steps=x must be of type int.',
    ),
    ([], 'pass an experiment, such as --config=configs/selfforcing.py:nano.'),
    (['--config'], 'Missing value for flag --config'),
    (['--confg=1'], "Unknown command line flag 'confg'. Did you mean: config ?"),
    ([NANO, 'extra'], 'the argument "extra" is unknown; flags start with --.'),
    ([NANO, '--workdir=LICENSE/run'], 'LICENSE/run (Not a directory): pass another --workdir.'),
    (
      [NANO, '--workdir=gs://bucket/run'],
      'gs://bucket/run is not a folder: mount the bucket, for example with gcsfuse, and pass the mounted folder; or '
      'set --config.checkpoint.folder, which may be a bucket.',
    ),
    (
      [NANO, '--config.checkpoint.folder=s3://bucket/run'],
      's3://bucket/run is neither a folder nor a bucket: pass a folder or gs://BUCKET/FOLDER.',
    ),
    (
      [NANO, '--host=0', '--host_count=2'],
      '--host_count, --host is for several hosts: pass --multihost too.',
    ),
    (
      [NANO, '--multihost', '--coordinator=localhost:1', '--host=0'],
      '--coordinator, --host: --host and --host_count go together.',
    ),
    (
      [NANO, '--multihost', '--coordinator=localhost:1', '--host=2', '--host_count=2'],
      '--host=2 must be below --host_count=2: hosts are numbered from 0.',
    ),
    (
      [NANO, '--multihost', '--coordinator=localhost', '--host=0', '--host_count=2'],
      '--coordinator=localhost has no port: give ADDRESS:PORT of host 0.',
    ),
    ([NANO, '--multihost', '--host=x'], "--host=x: a whole number is needed, not 'x'"),
    ([NANO, '--heartbeat=1'], '--heartbeat=1'),
    ([NANO, '--config.mesh.data=3'], 'does not make up 1 devices'),
    ([NANO, '--config.seed=-1'], 'seed=-1 must be zero or positive.'),
  ),
  'plan': (
    ([], 'pass --config=FILE, and either --slice=v5p-128 or --smallest=v5p.'),
    ([NANO], 'pass --config=FILE, and either --slice=v5p-128 or --smallest=v5p.'),
    ([NANO, '--slice=v5p-8', '--smallest=v5p'], 'and either --slice=v5p-128 or --smallest=v5p.'),
    (
      [NANO, '--slice=v5p-9'],
      'the slice "v5p-9" is unknown: the nearest are v5p-8, v5p-16, v5p-32; two of one',
    ),
    (
      [NANO, '--smallest=h100'],
      'the TPU generation "h100" is unknown: choose one of v4, v5e, v5p, v6e, tpu7x.',
    ),
    ([NANO, '--smallest=v6e-60'], 'the slice "v6e-60" is unknown: the nearest are v6e-64,'),
    ([NANO, '--smallest=2xv6e-64'], '--smallest=2xv6e-64 is several slices: begin with one.'),
    (
      [NANO, '--slice=v5p-8', '--config.mesh.data=3'],
      'does not make up 4 devices: the product of the sizes',
    ),
    (
      [NANO, '--slice=v5p-8', '--config.batch=6'],
      'batch=6 cannot be split over data x fsdp = 4 shards',
    ),
    (
      [NANO, '--slice=v5p-8', '--programs=train'],
      '--programs=train is no program of this config: choose from',
    ),
    (
      [NANO, '--slice=v5p-8', '--config.stage=x'],
      'stage=x is unknown: choose one of vae, flow, ode,',
    ),
    ([NANO, '--slice=v5p-8', '--json=LICENSE/x.json'], '--json: nothing can be written to LICENSE'),
    (['--table=configs'], '--table=configs: no files that --json wrote lie there.'),
    (
      ['--config=configs/selfforcing.py', '--slice=v5p-8', '--config.model.attention=cudnn'],
      '"cudnn" needs a gpu',
    ),
  ),
  'convert': (
    ([], 'pass --input: a file of weights, an index of shards, or the workdir of a run.'),
    (['--input=x'], 'pass --output: the file to write, such as student.safetensors.'),
    (['--input=x', '--output=x.pt'], '--output=x.pt must end in .safetensors.'),
    (
      ['--input=x', '--output=LICENSE/x.safetensors'],
      '--output: nothing can be written to LICENSE',
    ),
    (
      ['--input=x', '--output={tmp}/x.safetensors', '--report=LICENSE/r'],
      '--report: nothing can be written to',
    ),
    (
      ['--input=x', '--output={tmp}/x.safetensors'],
      'x is not there or not a file; check the path.',
    ),
    (
      ['--input={tmp}', '--output={tmp}/x.safetensors'],
      'must hold one file of weights or one index, not none;',
    ),
    (
      [
        '--input=assets:nano_student.safetensors',
        '--output={tmp}/x.safetensors',
        '--entry=generator',
      ],
      '--entry=generator has no use: ',
    ),
    (
      ['--input=assets:nano_student.safetensors', '--output={tmp}/x.safetensors', '--size=2b'],
      '--size=2b is not a size of dit; choose 1.3b, 14b, i2v_14b, flf2v_14b, nano, nano_i2v.',
    ),
    (['--network=gan'], '--network=gan: value should be one of <dit|vae|umt5|clip>'),
    (['--names=hf'], '--names=hf: value should be one of <wan|diffusers|comfyui|orbax>'),
    (['--dtype=int8'], '--dtype=int8: value should be one of <keep|float32|float16|bfloat16>'),
    (
      ['--input=x', '--output=x.safetensors', '--names=comfyui', '--network=vae'],
      '--names=comfyui is for a DiT; choose wan or diffusers for vae.',
    ),
    (
      ['--input=x', '--output=x.safetensors', NANO, '--size=nano'],
      '--size has no use beside --config,',
    ),
    (
      ['--input=x', '--output=x', '--names=orbax', '--dtype=float16'],
      '--names=orbax is for a DiT in float32;',
    ),
    (
      ['--input=x', '--output=x.safetensors', '--network=vae', '--lora=y'],
      '--lora is for a DiT, not for vae;',
    ),
  ),
}


@commands.refusals(WRONG_COMMANDS)
def test_a_wrong_command_is_refused_in_a_sentence(
  name, args, sentence, programs, monkeypatch, capsys, tmp_path
):
  monkeypatch.chdir(ROOT)
  args = [arg.format(tmp=tmp_path) for arg in args]
  assert sentence in commands.refusal(programs[name], args, monkeypatch, capsys)


@pytest.mark.parametrize(
  'args, words',
  [
    (['main', NANO, '--config.nosuch=1'], ['has no key "nosuch"']),
    (['main', NANO, '--config.video.frames=80'], ['video.frames=80 must be 4n + 1, such as 81.']),
    (['sample', '--checkpoint=configs', '--prompt=a bag'], ['configs has no config.json']),
    (
      ['main', NANO, '--multihost'],
      ['hosts cannot be found from here: pass --coordinator=ADDRESS:PORT, --host_count'],
    ),
    (
      ['main', '--config={root}/configs/selfforcing.py'],
      [
        *(
          'selfforcing-1.3b needs weights that are not there: ',
          '--config=configs/selfforcing.py:nano runs',
        ),
        *(
          'weights/Wan2.1_VAE.safetensors (weights.vae)',
          'weights/Wan2.1-T2V-14B.safetensors (weights.teacher)',
        ),
        'tokenizer.json or spiece.model in weights/google/umt5-xxl (weights.tokenizer)',
        *(
          'weights/models_t5_umt5-xxl-enc-bf16.safetensors (weights.text)',
          '(weights.critic)',
          '(weights.init)',
        ),
      ],
    ),
  ],
)
def test_a_process_ends_with_one_line_and_code_2(args, words, tmp_path):
  program, *rest = args
  rest = [arg.format(root=ROOT) for arg in rest]
  cwd = tmp_path if 'root' in ''.join(args) else ROOT
  done = subprocess.run(
    [sys.executable, '-m', f'salt_jax.{program}', *rest],
    cwd=cwd,
    capture_output=True,
    text=True,
    timeout=120,
  )
  assert done.returncode == 2 and not done.stdout
  (line,) = done.stderr.splitlines()
  assert line.startswith('salt_jax: ') and all(word in line for word in words), line
  assert not list(tmp_path.rglob('*.json')), 'a refused start must not claim its workdir'


def test_a_mistake_in_the_code_of_a_config_keeps_its_traceback(programs, monkeypatch, tmp_path):
  (tmp_path / 'own.py').write_text("def get_config():\n  return int('x')\n")
  monkeypatch.setattr(sys, 'argv', ['main', f'--config={tmp_path}/own.py'])
  with pytest.raises(flags.IllegalFlagValueError, match='own.py'):
    cli.run(main.program, main.define_flags)
