"""Bad input ends in one clear sentence and exit code 2, before anything is computed, and nothing is lost."""

import json
import logging
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy
from absl import flags

from configs import base, causal_init, dmd, pretrain, selfforcing
from salt_jax import (
  cli,
  convert,
  convert_cli,
  evaluate,
  main,
  plan,
  recipe,
  sample,
  stages,
  train,
  vbench,
  weights,
)
from salt_jax.checkpoint import Checkpoints, write_config
from salt_jax.checks import check_batch
from salt_jax.errors import InputError, NonFiniteError
from tests import tiny_config

ROOT = pathlib.Path(__file__).parents[1]
STUDENT = 'assets:nano_student.safetensors'
NANO = '--config=configs/selfforcing.py:nano'


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tiny_config.write_weights(str(tmp_path_factory.mktemp('weights')))


def _sentence(error) -> str:
  text = str(error.value)
  assert '\n' not in text and 'Traceback' not in text and len(text) > 20
  return text


# Programs, as a user starts them.

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
      '--profile=13:10 must name steps between 1 and total_steps=120, the first one first.',
    ),
    ([NANO, '--profile=0:3'], '--profile=0:3 must name steps between 1 and total_steps=120'),
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
    ([NANO, '--slice=v5p-9'], 'the slice "v5p-9" is unknown: the nearest are v5p-8, v5p-16, v5p-32; two of one'),
    ([NANO, '--smallest=h100'], 'the TPU generation "h100" is unknown: choose one of v4, v5e, v5p, v6e, tpu7x.'),
    ([NANO, '--slice=v5p-8', '--config.mesh.data=3'], 'does not make up 4 devices: the product of the sizes'),
    ([NANO, '--slice=v5p-8', '--config.batch=6'], 'batch=6 cannot be split over data x fsdp = 4 shards'),
    ([NANO, '--slice=v5p-8', '--programs=train'], '--programs=train is no program of this config: choose from'),
    ([NANO, '--slice=v5p-8', '--config.stage=x'], 'stage=x is unknown: choose one of vae, flow, ode,'),
    ([NANO, '--slice=v5p-8', '--json=LICENSE/x.json'], '--json: nothing can be written to LICENSE'),
    (['--table=configs'], '--table=configs: no files that --json wrote lie there.'),
    (['--config=configs/selfforcing.py', '--slice=v5p-8', '--config.model.attention=cudnn'], '"cudnn" needs a gpu'),
  ),
  'sample': (
    (
      [],
      'pass --checkpoint: the workdir of a run, an exported file, or assets:nano_student.safetensors.',
    ),
    (['--checkpoint=x'], 'pass at least one --prompt.'),
    (['--checkpoint=x', '--prompt=a bag', '--steps=0'], '--steps=0 must be between 1 and 8.'),
    (['--checkpoint=x', '--prompt=a bag', '--steps=9'], '--steps=9 must be between 1 and 8.'),
    (
      ['--checkpoint=x', '--prompt=a bag', '--steps=x'],
      "--steps=x: a whole number is needed, not 'x'",
    ),
    (
      ['--checkpoint=x', '--prompt=a bag', '--seed=-1'],
      '--seed=-1: -1 is not an integer in the range',
    ),
    (
      ['--checkpoint=x', '--prompt=a bag', '--output=o.avi'],
      '--output=o.avi must end in one of .webp, .gif, .png, .mp4.',
    ),
    (
      ['--checkpoint=x', '--prompt=a bag', '--sampler=heun'],
      '--sampler=heun: value should be one of <student|unipc|dpmpp|euler>',
    ),
    (
      ['--checkpoint=x', '--prompt=a bag', '--sampler=unipc', '--guidance=-1'],
      '--guidance=-1.0 must be zero or positive',
    ),
    (
      ['--checkpoint=x', '--prompt=a bag', '--sampler=unipc', '--guidance=nan'],
      '--guidance=nan must be zero or positive',
    ),
    (
      ['--checkpoint=x', '--prompt=a bag', '--sampler=unipc', '--shift=0'],
      '--shift=0.0 must be positive: 1 leaves the grid as it is.',
    ),
    (
      ['--checkpoint=x', '--prompt=a bag', '--sampler=unipc', '--steps=1001'],
      '--steps=1001 must be between 1 and 1000.',
    ),
    (
      ['--checkpoint=x', '--prompt=a bag', '--guidance=4'],
      '--guidance has no use with --sampler=student: choose one of unipc, dpmpp, euler, or leave it out.',
    ),
    (
      ['--checkpoint=x', '--prompt=a bag', '--stream', '--sampler=unipc'],
      '--stream is for one clip a prompt of a student in one process',
    ),
    (
      ['--checkpoint=x', '--prompt=a bag', '--samples=0'],
      '--samples=0: 0 is not a positive integer',
    ),
    (
      ['--checkpoint=assets:nano_teacher.safetensors', '--prompt=a bag'],
      'the stage "flow", which has no few-step student: a bidirectional teacher is sampled with --sampler=unipc.',
    ),
    (
      ['--checkpoint=assets:nano_student.safetensors', '--prompt=a bag', '--sampler=unipc'],
      'the stage "selfforcing", which is no many-step teacher: pass --sampler=student',
    ),
    (
      ['--checkpoint=x', '--prompt=a bag', '--output=LICENSE/o.png'],
      '--output: nothing can be written to LICENSE',
    ),
    (
      ['--checkpoint=x', '--prompt=a bag', '--frames=42'],
      '--frames and --switch_at need --stream, which goes on chunk by chunk.',
    ),
    (
      ['--checkpoint=x', '--prompt=a bag', '--stream', '--switch_at=9'],
      '1 prompts need 0 of --switch_at, not 1: one for each prompt but the first.',
    ),
    *(
      (
        [f'--checkpoint={STUDENT}', '--stream', '--prompt=a bag', '--prompt=a boot', *flags],
        sentence,
      )
      for flags, sentence in (
        (['--frames=43'], '--frames=43 does not divide into chunks of 3: choose 42.'),
        (['--frames=0'], '--frames=0 does not divide into chunks of 3: choose 3.'),
        (['--frames=6000'], '--frames=6000 exceeds the 4096 positions of RoPE.'),
        (
          ['--switch_at=19'],
          '--switch_at=19 is beyond the last chunk of 21 latent frames, which starts at 18:',
        ),
        (
          ['--switch_at=0'],
          '--switch_at=0 must be behind frame 0, where the prompt before it begins.',
        ),
        (
          ['--switch_at=4', '--prompt=a bag', '--switch_at=6'],
          '--switch_at=6 must be behind frame 6, where the',
        ),
      )
    ),
    (
      ['--checkpoint=nowhere', '--prompt=a bag'],
      'nowhere is not there or not a file; check the path.',
    ),
    (
      ['--checkpoint=configs', '--prompt=a bag'],
      'configs has no config.json: pass the workdir of a run',
    ),
    (
      ['--checkpoint=assets:nano_vae.safetensors', '--prompt=a bag'],
      'the stage "vae", which has no few-step student: ',
    ),
  ),
  'evaluate': (
    (['--config.nosuch=1'], '--config.nosuch: config has no key "nosuch"; the nearest are '),
    (['--clips=0'], '--clips=0: 0 is not a positive integer'),
    (['--split=test'], '--split=test: value should be one of <seen|unseen>'),
    (
      ['--config=configs/pretrain.py'],
      'pretrain-teacher cannot be judged: pass --config=configs/selfforcing.py:nano.',
    ),
    (['--output=LICENSE/out'], '--output: nothing can be written to LICENSE/out'),
    (
      ['--diagnose=defect'],
      '--diagnose looks into one student: pass --checkpoint, the workdir of a run',
    ),
    (
      ['--diagnose=defects'],
      '--diagnose: "defects" is unknown; choose from defect, cache, swap, drift.',
    ),
    (['--config.weights.text=nowhere', '--output={tmp}'], 'not there: nowhere (weights.text)'),
    (['--vbench=LICENSE'], 'pass --checkpoint: the workdir of a run, an exported file, or assets:'),
    (
      ['--vbench=nowhere', '--checkpoint=x'],
      '--vbench=nowhere cannot be read (No such file or directory).',
    ),
    (
      ['--vbench=/dev/null', '--checkpoint=x'],
      '--vbench=/dev/null holds no prompt: give one a line.',
    ),
    (['--vbench=LICENSE', '--checkpoint=x', '--steps=9'], '--steps=9 must be between 1 and 8.'),
    (['--vbench=LICENSE', '--checkpoint=x', '--image=a.png'], '--image has no use with --vbench: '),
    (
      ['--vbench=LICENSE', '--checkpoint=x', '--extended=/dev/null'],
      '--extended=/dev/null holds no prompt',
    ),
    (
      ['--vbench=LICENSE', '--checkpoint=x', '--output={tmp}'],
      'holds a slash or a line break, so it can name no file',
    ),
  ),
  'vbench': (
    ([], 'pass --results: a folder that salt_jax.evaluate --vbench has written.'),
    (
      ['--results={tmp}'],
      'has no vbench.json: pass a folder that salt_jax.evaluate --vbench has written.',
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


@pytest.fixture
def programs():
  """Programs run in this process; afterwards flags and log are as before."""
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


@pytest.mark.parametrize(
  'name, args, sentence',
  [(name, *case) for name, cases in WRONG_COMMANDS.items() for case in cases],
)
def test_a_wrong_command_is_refused_in_a_sentence(
  name, args, sentence, programs, monkeypatch, capsys, tmp_path
):
  args = [arg.format(tmp=tmp_path) for arg in args]
  monkeypatch.setattr(sys, 'argv', [name, *args])
  monkeypatch.chdir(ROOT)
  with pytest.raises(SystemExit) as stop:
    cli.run(programs[name].program, programs[name].define_flags)
  lines = capsys.readouterr().err.splitlines()
  assert stop.value.code == 2 and len(lines) == 1, lines
  assert lines[0].startswith('salt_jax: ') and sentence in lines[0]


def test_mp4_without_pyav_is_refused_before_anything_is_loaded(programs, monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, 'av', None)
  monkeypatch.setattr(sys, 'argv', ['sample', '--checkpoint=x', '--prompt=a bag', '--output=o.mp4'])
  with pytest.raises(SystemExit) as stop:
    cli.run(programs['sample'].program, programs['sample'].define_flags)
  (line,) = capsys.readouterr().err.splitlines()
  assert stop.value.code == 2 and "--output=o.mp4 needs PyAV: pip install 'salt_jax[video]'" in line


@pytest.mark.parametrize(
  'args, words',
  [
    (['main', NANO, '--config.nosuch=1'], ['has no key "nosuch"']),
    (['main', NANO, '--config.video.frames=80'], ['video.frames=80 must be 4n + 1, such as 81.']),
    (['sample', '--checkpoint=configs', '--prompt=a bag'], ['configs has no config.json']),
    (['main', NANO, '--multihost'], ['hosts cannot be found from here: pass --coordinator=ADDRESS:PORT, --host_count']),
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


# Configs.


@pytest.mark.parametrize(
  'arg, sentence',
  [
    ('nanoo', '"nanoo" is unknown; known are: big, fast, nano, size=, steps=.'),
    ('size=small', 'size=small is not one of nano, big.'),
    ('steps=x', 'steps=x must be of type int.'),
    ('steps', '"steps" is unknown'),
    ('nano,size=big', '"size" is given twice in "nano,size=big".'),
    ('fast=3', 'fast=3 must be true or false.'),
  ],
)
def test_arguments_of_configs_are_typed(arg, sentence):
  with pytest.raises(InputError) as error:
    base.parse_arg(arg, size=('nano', 'big'), steps=3, fast=False)
  assert sentence in _sentence(error)


@pytest.mark.parametrize('module', [selfforcing, dmd])
def test_a_teacher_is_of_a_size_that_can_teach(module):
  taught = module.get_config('1.3b,teacher=1.3b')
  assert taught.teacher == taught.model and taught.weights.teacher.endswith('T2V-1.3B.safetensors')
  assert taught.alignment.layer == 15
  assert module.get_config('14b,teacher=14b').teacher == module.get_config().teacher
  for arg, sentence in (
    ('nano,teacher=14b', 'teacher=14b does not fit nano: choose from nano.'),
    ('teacher=7b', 'teacher=7b does not fit 1.3b: choose from 14b, 1.3b.'),
    ('teacher=1.3b,i2v', 'teacher=1.3b has no image-to-video form: leave it out.'),
  ):
    with pytest.raises(InputError, match=re.escape(sentence)):
      module.get_config(arg)


I2V = {'model.in_channels': 36, 'teacher.in_channels': 36}
NO_TERMS = {'losses.dmd': 0.0, 'losses.consistency': 0.0, 'losses.alignment': 0.0}
STAGES = {
  'streaming': lambda: selfforcing.get_config('nano,backbone=longlive,streaming'),
  'streaming_i2v': lambda: selfforcing.get_config('nano,backbone=longlive,streaming,i2v'),
  'selfforcing': lambda: selfforcing.get_config('nano'),
  'ode': lambda: causal_init.get_config('nano'),
  'ar': lambda: causal_init.get_config('nano,stage=ar'),
  'causal_ode': lambda: causal_init.get_config('nano,stage=causal_ode'),
  'causal_cd': lambda: causal_init.get_config('nano,causal_cd'),
  'vae': lambda: pretrain.get_config('vae'),
  'teacher': lambda: pretrain.get_config('teacher'),
  'tower': lambda: tiny_config.get_tower('weights'),
  'teacher_i2v': lambda: pretrain.get_config('teacher,i2v'),
}


@pytest.mark.parametrize('method', ['salt', 'sc', 'mixed_sc'])
def test_streaming_is_for_methods_without_the_terms_of_whole_clips(method):
  with pytest.raises(InputError, match=f'method={method} is not one of dmd, mixed.'):
    selfforcing.get_config(f'nano,backbone=longlive,streaming,method={method}')
  selfforcing.get_config('nano,backbone=longlive,mixed,streaming')


def test_image_to_video_is_for_teachers_of_sizes_that_have_it():
  with pytest.raises(InputError, match='i2v is for the teacher: the VAE serves both.'):
    pretrain.get_config('vae,i2v')
  with pytest.raises(InputError, match='1.3b has no image-to-video form: choose one of nano, 14b.'):
    base.dit('1.3b', i2v=True)
  for module, arg in ((selfforcing, 'i2v'), (dmd, '1.3b,i2v'), (causal_init, '1.3b,stage=ode,i2v')):
    with pytest.raises(InputError, match='1.3b has no image-to-video form: choose one of nano, 14b'):
      module.get_config(arg)


def test_the_configs_that_ship_are_accepted():
  for stage, make in STAGES.items():
    if stage != 'streaming_i2v':
      recipe.build(make())
  for word in ('', ',streaming'):
    recipe.build(selfforcing.get_config(f'nano,chunk=1,backbone=longlive{word}'))
  assert recipe.build(selfforcing.get_config('nano,chunk=1')).chunking.chunk == 1
  for size in ('1.3b', '14b'):
    recipe.build(selfforcing.get_config(size))
    for stage in causal_init.STAGES:
      recipe.build(causal_init.get_config(f'{size},stage={stage}'))


@pytest.mark.parametrize(
  'stage, changes, sentence',
  [
    ('selfforcing', {'model.dim': 130}, 'dim 130 does not divide into 4 heads of even width.'),
    ('selfforcing', {'model.heads': 0}, 'model.heads=0 must be positive.'),
    (
      'selfforcing',
      {'model.in_channels': 4},
      'model.in_channels=4 must equal vae.z_dim=16, or 36 for I2V.',
    ),
    (
      'selfforcing',
      {'model.in_channels': 36},
      'teacher.in_channels=16 must equal model.in_channels=36: both are',
    ),
    (
      'selfforcing',
      I2V,
      'data.kind=captions does not fit model.in_channels=36: choose clips, which have a first',
    ),
    (
      'selfforcing',
      I2V | {'data.kind': 'clips'},
      'no section "latents": set latents.count and latents.batch',
    ),
    (
      'selfforcing',
      {'data.kind': 'clips'},
      'data.kind=clips does not fit model.in_channels=16: choose captions or',
    ),
    (
      'selfforcing',
      I2V | {'size': '14b'},
      'has no clips to take first frames from: set data.kind=store',
    ),
    (
      'selfforcing',
      {'data.kind': 'store'},
      'data.kind=store does not fit model.in_channels=16: choose captions or',
    ),
    (
      'selfforcing',
      {'model.image_dim': 1280},
      'model.image_dim=1280 wants the rows of a CLIP tower: give the config',
    ),
    (
      'tower',
      {'model.image_dim': 20},
      'model.image_dim=20 must equal 24, the width of the CLIP tower.',
    ),
    (
      'tower',
      {'teacher.image_len': 20},
      'teacher.image_len=20 must equal 10, the rows for one picture of the CLIP',
    ),
    (
      'tower',
      {'teacher.image_dim': 0},
      'teacher.image_dim=0 must equal model.image_dim=24: both are given rows of',
    ),
    (
      'tower',
      {'model.in_channels': 16},
      'model.image_dim=24 is of image-to-video: set model.in_channels for given',
    ),
    (
      'tower',
      {'weights.clip': ''},
      'model.image_dim=24 wants the rows of a CLIP tower: give the config a section',
    ),
    ('selfforcing', {'model.out_channels': 8}, 'model.out_channels=8 must equal vae.z_dim=16.'),
    ('selfforcing', {'teacher.text_dim': 32}, 'teacher.text_dim=32 must equal text.dim=64.'),
    ('selfforcing', {'text.heads': 3}, 'dim_attn 64 does not divide into 3 heads.'),
    ('selfforcing', {'rollout.chunk': 4}, '21 latent frames do not divide into chunks of 4.'),
    ('selfforcing', {'rollout.chunk': 0}, 'rollout.chunk=0 must be positive.'),
    (
      'selfforcing',
      {'rollout.frames': 18},
      'rollout.frames=18 but video.frames=81 make 21 latent frames.',
    ),
    (
      'selfforcing',
      {'rollout.window': 3},
      'window 3 is too short: it must exceed sink 0 + chunk 3.',
    ),
    (
      'selfforcing',
      {'rollout.window': 6, 'rollout.sink': 3},
      'window 6 is too short: it must exceed sink 3',
    ),
    (
      'selfforcing',
      {'rollout.window': 22, 'rollout.sink': 20},
      'window 22 is too short: it must exceed sink 20 + chunk 3.',
    ),
    ('selfforcing', {'rollout.mode': 'ddim'}, 'rollout mode "ddim" is unknown: choose sde or ode.'),
    ('selfforcing', {'video.frames': 80}, 'video.frames=80 must be 4n + 1, such as 81.'),
    (
      'selfforcing',
      {'video.height': 72, 'video.width': 72},
      'video.height=72 must be a multiple of 16.',
    ),
    ('selfforcing', {'video.width': 32}, 'video.height=64 and video.width=32 must be equal'),
    (
      'selfforcing',
      {'schedule.probs': (0.4, 0.4, 0.1)},
      'schedule.probs (0.4, 0.4, 0.1) must be positive and sum to',
    ),
    ('selfforcing', {'schedule.probs': (1.5, -0.5)}, 'schedule.probs=1.5 must be between 0 and 1.'),
    ('selfforcing', {'schedule.probs': (0.5, 0.5)}, 'schedule.probs (0.5, 0.5) differ in length.'),
    (
      'selfforcing',
      {'schedule.steps': (4, 4, 2), 'triples.steps': (4,)},
      'names a step count twice.',
    ),
    (
      'selfforcing',
      {'schedule.steps': (6, 4, 2)},
      'triples.steps names 8 steps, but schedule.steps has (6, 4, 2)',
    ),
    (
      'selfforcing',
      {'triples.segments': 3},
      'triples.segments=3 puts boundaries off the grid of 8 steps',
    ),
    ('selfforcing', {'triples.segments': 0}, 'triples.segments=0 must be positive.'),
    (
      'selfforcing',
      {'reference.map': ((3, (6,)),)},
      'reference.map names 3 steps, but schedule.steps has (8, 4, 2)',
    ),
    (
      'selfforcing',
      {'reference.map': ((2, (3,)),)},
      'reference.map: 3 steps are no denser form of 2; take a multiple',
    ),
    ('selfforcing', {'reference.map': ()}, 'reference.map () must hold pairs of a step count and'),
    (
      'selfforcing',
      {'reference.map': ((2, 4),)},
      'reference.map ((2, 4),) must hold pairs of a step count and its references, such as',
    ),
    ('selfforcing', {'reference.map': ((2, ()),)}, 'reference.map ((2, ()),) must hold pairs of'),
    (
      'selfforcing',
      {'reference.map': ((2, (4,)), (2, (8,)))},
      'reference.map ((2, (4,)), (2, (8,))) names a step count twice',
    ),
    (
      'selfforcing',
      {'alignment.t_min': 990.0},
      'alignment.t_min=990.0 must be below alignment.t_max=980.0, both in 0 to 1000.',
    ),
    (
      'selfforcing',
      {'reference.coupling': 'b'},
      'reference.coupling=b is unknown: choose one of aligned_b,',
    ),
    (
      'selfforcing',
      {'alignment.layer': 6},
      'alignment.layer=6 is not in the teacher, whose 6 blocks count from 0',
    ),
    (
      'selfforcing',
      {'alignment.kind': 'x'},
      'alignment.kind=x is unknown: choose one of relations, mmd, latents.',
    ),
    (
      'selfforcing',
      {'consistency.form': 'x'},
      'consistency.form=x is unknown: choose one of endpoint, velocity, x0.',
    ),
    (
      'selfforcing',
      {'rollout.chunk': 21},
      'losses.alignment needs a causal student: set rollout.chunk below',
    ),
    ('selfforcing', {'losses.dmd': -1.0}, 'losses.dmd=-1.0 must be zero or positive.'),
    (
      'selfforcing',
      NO_TERMS,
      'losses has no term with a weight above 0; give one, such as losses.dmd=1.0.',
    ),
    ('selfforcing', {'schedule.steps': ('abc',)}, 'schedule.steps=abc must be a number, positive.'),
    ('selfforcing', {'evaluate.steps': (4, 9)}, 'evaluate.steps=(4, 9) must not exceed 8.'),
    (
      'selfforcing',
      {'export_dtype': 'float8'},
      'export_dtype=float8 is unknown: choose one of float32, ',
    ),
    ('selfforcing', {'log.every': 0}, 'log.every=0 must be positive.'),
    ('selfforcing', {'log.samples': 0}, 'log.samples=0 must be positive.'),
    ('selfforcing', {'log.samples_every': -1}, 'log.samples_every=-1 must be zero or positive.'),
    (
      'selfforcing',
      {'log.samples_every': 9, 'data.kind': 'text_store'},
      'data.kind=text_store leaves the encoder',
    ),
    ('vae', {'log.samples_every': 9}, 'the stage "vae" does not train: set it to 0.'),
    ('selfforcing', {'generator_every': 0}, 'generator_every=0 must be positive.'),
    ('selfforcing', {'dmd.t_min': 990.0}, 'dmd.t_min=990.0 must be below dmd.t_max=980.0'),
    ('selfforcing', {'ema.decay': 1.5}, 'ema.decay=1.5 must be between 0 and 1.'),
    (
      'selfforcing',
      {'optim.critic.clip': 0.0},
      'clip=0.0: the largest gradient norm must be positive.',
    ),
    (
      'selfforcing',
      {'optim.critic.schedule': 'step'},
      "schedule 'step' is unknown; use 'constant' or 'cosine'.",
    ),
    (
      'streaming',
      {'data.kind': 'text_store'},
      'data.kind=text_store does not fit streaming, which encodes the prompt',
    ),
    (
      'streaming',
      {'rollout.window': 0},
      'rollout.window=0 must be between 1 and rollout.frames=21 for streaming',
    ),
    (
      'streaming',
      {'rollout.window': 24},
      'which recaches that many frames: choose backbone=longlive.',
    ),
    (
      'streaming',
      {'streaming.new': 17},
      'streaming.new=17 must be a multiple of rollout.chunk=3 below rollout.frames',
    ),
    (
      'streaming',
      {'streaming.new': 21},
      'streaming.new=21 must be a multiple of rollout.chunk=3 below rollout.frames',
    ),
    ('streaming', {'streaming.new': 0}, 'streaming.new=0 must be positive.'),
    (
      'streaming',
      {'streaming.frames': 38},
      'streaming.frames=38 must be at least rollout.frames + streaming.new = 39',
    ),
    (
      'streaming',
      {'streaming.frames': 5000},
      'streaming.frames=5000 must be at least rollout.frames + streaming.new',
    ),
    (
      'streaming',
      {'streaming.boundary': 'x'},
      'streaming.boundary=x is unknown: choose one of reencoded, latent.',
    ),
    (
      'streaming',
      {'streaming.causal': True, 'rollout.window': 10},
      'make rollout.window=10 a multiple of 3.',
    ),
    (
      'streaming',
      {'losses.consistency': 0.2},
      'losses.consistency=0.2 does not go with streaming, which trains with',
    ),
    (
      'streaming',
      {'losses.alignment': 0.1},
      'losses.alignment=0.1 does not go with streaming, which trains with DMD',
    ),
    (
      'streaming_i2v',
      {},
      'model.in_channels=36: streaming has no image-to-video form; give text alone.',
    ),
    ('ode', {'pairs.steps': 50}, "pairs.steps=50 must be a multiple of the student's 4 steps."),
    ('ode', {'pairs.count': 100}, 'pairs.count=100 must be a multiple of pairs.batch=64.'),
    (
      'ar',
      {'forcing.context': 'noise'},
      'forcing.context=noise is unknown: choose one of teacher, diffusion.',
    ),
    ('ar', {'forcing.noise': 1.5}, 'forcing.noise=1.5 must be between 0 and 1.'),
    (
      'ar',
      {'forcing.noise': 0.1, 'forcing.context': 'diffusion'},
      'forcing.noise=0.1 needs forcing.context=teacher',
    ),
    (
      'ar',
      {'rollout.window': 9},
      'rollout.window=9 is not known to the stage ar, whose chunks see all before them',
    ),
    ('ar', {'latents.count': 100}, 'latents.count=100 must be a multiple of latents.batch=64.'),
    ('causal_ode', {'pairs.count': 8192}, 'pairs.count=8192 must not exceed latents.count=4096.'),
    ('causal_ode', {'rollout.window': 9}, 'rollout.window=9 is not known to the stage causal_ode'),
    (
      'causal_cd',
      {'causal_consistency.steps': 1},
      'causal_consistency.steps=1 must be 2 or more, to have neighbours.',
    ),
    ('causal_cd', {'evaluate.steps': (4, 9)}, 'evaluate.steps=(4, 9) must not exceed 8.'),
    (
      'teacher',
      {'latents.count': 100},
      'latents.count=100 must be a multiple of latents.batch=64.',
    ),
    (
      'teacher',
      {'optim.dit.warmup': 14000},
      'leaves nothing after warmup=14000; raise total or lower warmup.',
    ),
    ('vae', {'data.frames': 20}, 'data.frames=20 must be 4n + 1, such as 21.'),
    ('vae', {'statistics_clips': 6}, 'statistics_clips=6 must be a multiple of 4.'),
  ],
)
def test_values_that_do_not_fit_are_refused_before_anything_starts(
  stage, changes, sentence, tmp_path
):
  config = STAGES[stage]()
  config.update_from_flattened_dict(changes)
  with pytest.raises(InputError) as error:
    train.run(config, str(tmp_path / 'run'))
  assert sentence in _sentence(error)
  assert not (tmp_path / 'run').exists()


def test_sections_of_another_version_are_named():
  config = selfforcing.get_config('nano')
  config.model.depth = 3
  with pytest.raises(InputError, match='section "model" has the unknown depth.'):
    recipe.build(config)
  del config.model.depth, config.text.layers
  with pytest.raises(InputError, match='section "text" lacks the layers.'):
    recipe.build(config)


def test_a_batch_must_divide_over_the_devices():
  mesh = jax.sharding.AbstractMesh((2, 4, 1, 1), ('data', 'fsdp', 'context', 'tensor'))
  check_batch(16, mesh)
  with pytest.raises(
    InputError,
    match='batch=12 cannot be split over data x fsdp = 8 shards; make it a multiple of 8',
  ):
    check_batch(12, mesh)


@pytest.mark.parametrize('name', ['causal_ode', 'causal_cd'])
def test_what_the_autoregressive_model_leaves_is_asked_for(name, folder, tmp_path):
  config = tiny_config.stage(name, folder)
  config.weights.ar = str(tmp_path / 'ar.safetensors')
  with pytest.raises(
    InputError, match=r'needs weights that are not there: .*ar.safetensors \(weights.ar\)'
  ):
    train.run(config, str(tmp_path / 'run'))
  config.weights.ar, config.data.kind = config.weights.init, 'images'
  with pytest.raises(InputError, match='data.kind=images is unknown: choose latents or store.'):
    train.run(config, str(tmp_path / 'run'))


@pytest.mark.parametrize(
  'changes, words',
  [
    ({'stage': 'gan'}, 'choose one of'),
    ({'data.kind': 'x'}, 'choose captions'),
    ({'data.kind': 'prompts', 'data.path': 'nowhere.txt'}, 'prompt file nowhere.txt is missing'),
    (
      {'data.kind': 'text_store', 'data.path': 'nowhere'},
      'nowhere/index.json is missing or unreadable',
    ),
  ],
)
def test_unknown_kinds_are_refused(folder, changes, words, tmp_path):
  config = tiny_config.get_config(folder)
  config.update_from_flattened_dict(changes)
  with pytest.raises(InputError, match=words):
    train.run(config, str(tmp_path))


# Files.


def _spoil(path: pathlib.Path, how: str) -> None:
  match how:
    case 'missing':
      path.unlink()
    case 'truncated':
      path.write_bytes(path.read_bytes()[:-100])
    case 'text':
      path.write_text('version https://git-lfs.github.com/spec/v1')
    case 'nan':
      tensors = convert.load_safetensors(path)
      name = sorted(tensors)[0]
      tensors[name] = np.full_like(tensors[name], np.nan)
      path.unlink()
      safetensors.numpy.save_file(tensors, str(path))
    case 'incomplete':
      tensors = convert.load_safetensors(path)
      del tensors[sorted(tensors)[0]]
      convert.save_safetensors(path, tensors)


@pytest.mark.parametrize(
  'name, how, words',
  [
    ('init', 'missing', 'needs weights that are not there: '),
    ('vae', 'missing', 'needs weights that are not there: '),
    ('init', 'truncated', 'is cut short or damaged; copy or download it again.'),
    ('vae', 'truncated', 'is cut short or damaged; copy or download it again.'),
    (
      'teacher',
      'text',
      'is not a safetensors file but a pointer of Git LFS; fetch the file itself',
    ),
    ('text', 'nan', 'holds NaN or infinite numbers in '),
    ('teacher', 'incomplete', 'the dit weights lack blocks.0.'),
  ],
)
def test_a_bad_weights_file_is_named_before_training(folder, tmp_path, name, how, words):
  files = shutil.copytree(folder, tmp_path / 'weights')
  _spoil(files / f'{name}.safetensors', how)
  config = tiny_config.get_config(str(files))
  config.evaluate.clips = 2
  with pytest.raises(InputError) as error:
    train.run(config, str(tmp_path / 'run'))
  assert words in _sentence(error) and f'{name}.safetensors' in str(error.value)
  assert not (tmp_path / 'run' / 'config.json').exists()


def test_weights_of_another_size_are_refused(folder):
  config = tiny_config.get_config(folder)
  config.model.dim = 64
  with pytest.raises(
    InputError, match=r'init.safetensors: a checkpoint of another size: .* but the config asks for'
  ):
    weights.load(config.weights.init, 'dit', recipe.build(config).model)


def _state_of(rec, value):
  return jax.tree.map(lambda x: jnp.full(x.shape, value, x.dtype), weights.shapes('dit', rec.model))


@pytest.fixture(scope='module')
def run_of_two(folder, tmp_path_factory):
  """A workdir that holds a checkpoint of step 2, as `sample.load` and a restart find it."""
  workdir = tmp_path_factory.mktemp('run')
  config = tiny_config.get_config(folder)
  rec = recipe.build(config)
  params = {'generator': _state_of(rec, 0.5)}
  write_config(str(workdir), config)
  checkpoints = Checkpoints(str(workdir / 'checkpoints'))
  checkpoints.save(2, {'state': {'params': params}, 'ema': params}, {'data_step': 2}, force=True)
  checkpoints.close()
  return workdir, config


def test_a_workdir_belongs_to_its_config(run_of_two):
  workdir, config = run_of_two
  config = config.copy_and_resolve_references()
  config.dmd.guidance = 9.0
  with pytest.raises(InputError) as error:
    train.run(config, str(workdir))
  assert 'config.dmd.guidance is 9.0, but the run in' in _sentence(error)
  assert 'has 3.0: pass another --workdir or the same config.' in str(error.value)
  assert json.loads((workdir / 'config.json').read_text())['dmd']['guidance'] == 3.0


@pytest.mark.parametrize(
  'change, words',
  [
    (lambda run: shutil.rmtree(run / 'checkpoints'), 'there is no checkpoint folder'),
    (
      lambda run: shutil.rmtree(run / 'checkpoints' / '2'),
      'holds no finished checkpoint; train until one is saved.',
    ),
    (lambda run: (run / 'config.json').unlink(), 'has no config.json: pass the workdir of a run'),
    (lambda run: (run / 'config.json').write_text('{"a": '), 'config.json is damaged'),
    (
      lambda run: (run / 'config.json').write_text('{"a": 1}'),
      'is no run of salt_jax: its config names no stage.',
    ),
  ],
)
def test_what_is_no_checkpoint_is_refused(run_of_two, tmp_path, change, words):
  run = shutil.copytree(run_of_two[0], tmp_path / 'run')
  assert sample.load(str(run))[1].model.dim == tiny_config.DIT['dim']
  change(run)
  with pytest.raises(InputError) as error:
    sample.load(str(run))
  assert words in _sentence(error)


def test_a_checkpoint_of_another_size_is_refused(run_of_two, tmp_path):
  run = shutil.copytree(run_of_two[0], tmp_path / 'run')
  config = run_of_two[1].copy_and_resolve_references()
  config.model.dim = 64
  (run / 'config.json').unlink()
  write_config(str(run), config)
  with pytest.raises(
    InputError,
    match='another size: .* but the config asks for .* Pass the config it was trained with.',
  ):
    sample.load(str(run))


def test_a_student_of_another_size_is_not_judged(run_of_two):
  with pytest.raises(InputError, match='--config do not fit: a checkpoint of another size'):
    evaluate.student_of(str(run_of_two[0]), recipe.build(selfforcing.get_config('nano')))


# Prompts.


@pytest.mark.parametrize(
  'prompt, words',
  [
    ('', 'prompt is empty; write a caption'),
    (' . ', 'prompt is empty; write a caption'),
    (
      'a red snaeker moves left',
      "the word 'snaeker' in prompt 'a red snaeker moves left' is not in the vocabulary",
    ),
    ('a ' * 16, 'has 16 words but the limit is 15; shorten it.'),
  ],
)
def test_prompts_are_refused_before_anything_is_compiled(
  run_of_two, programs, monkeypatch, capsys, tmp_path, prompt, words
):
  args = [f'--checkpoint={run_of_two[0]}', f'--prompt={prompt}', f'--output={tmp_path}/out.webp']
  monkeypatch.setattr(sys, 'argv', ['sample', *args])
  monkeypatch.setattr(sample, 'student', lambda *_: pytest.fail('sampling began'))
  with pytest.raises(SystemExit) as stop:
    cli.run(programs['sample'].program, programs['sample'].define_flags)
  (line,) = capsys.readouterr().err.splitlines()
  assert stop.value.code == 2 and words in line
  assert not list(tmp_path.iterdir())


# Numbers that run away.


def _stage_that_breaks_at(broken: int, finite_loss: bool):
  """A stage of one parameter whose update is NaN at one step, with or without the loss showing it."""
  params = {'generator': {'kernel': np.ones((4, 4), np.float32)}}

  def run(state, frozen, batch, n, *, recipe):
    bad = jnp.where(n == broken - 1, jnp.nan, 1.0)
    params = jax.tree.map(lambda x: x * bad, state.params)
    loss = 1.0 if finite_loss else bad
    return state.replace(params=params), {
      'loss': jnp.float32(loss),
      'param_norm': optax.tree.norm(params),
    }

  spec = stages.StepSpec('generator', run, 1, lambda feed: iter([{'index': np.arange(8)}] * 99))
  shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
  return stages.Stage(shapes, lambda: params, {}, ('generator',), (spec,))


@pytest.mark.parametrize(
  'broken, finite_loss, term, kept',
  [
    (1, False, 'loss', None),
    (4, False, 'loss', 2),
    (5, False, 'loss', 4),
    (4, True, 'param_norm', 2),
  ],
)
def test_the_first_number_that_is_not_finite_stops_the_run(
  folder, tmp_path, monkeypatch, broken, finite_loss, term, kept
):
  config = tiny_config.get_config(folder)
  config.optim = {'generator': config.optim.generator}
  monkeypatch.setattr(stages, 'build', lambda *_: _stage_that_breaks_at(broken, finite_loss))
  with pytest.raises(NonFiniteError) as error:
    train.run(config, str(tmp_path))
  last = 'the last good checkpoint is step' if kept else 'there is no checkpoint'
  assert f'step {broken}: generator/{term} is nan; stopped, {last}' in _sentence(error)
  steps = [int(p.name) for p in (tmp_path / 'checkpoints').iterdir() if p.name.isdigit()]
  assert max(steps, default=None) == kept and not (tmp_path / 'export').exists()
  lines = (tmp_path / 'metrics.jsonl').read_text().splitlines()
  assert [json.loads(line)['step'] for line in lines] == list(range(1, broken))
  if kept:
    checkpoints = Checkpoints(str(tmp_path / 'checkpoints'), keep=4)
    kernel = jax.ShapeDtypeStruct(
      (4, 4), np.float32, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
    )
    got = checkpoints.restore(kept, {'ema': {'generator': {'kernel': kernel}}})
    checkpoints.close()
    assert np.isfinite(got['ema']['generator']['kernel']).all()
