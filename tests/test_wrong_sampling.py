"""A wrong command of sampling or judging ends in one clear sentence and exit code 2, before anything is compiled."""

import sys

import pytest

from salt_jax import sample
from tests import commands, tiny_config
from tests.commands import NANO, ROOT, STUDENT

WRONG_COMMANDS = {
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
      [f'--checkpoint={STUDENT}', '--prompt=a bag', NANO, '--config.model.dim=64'],
      'nano_student.safetensors: a checkpoint of another size: blocks.',
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
    (
      ['--prompts=p.txt'],
      '--prompts has no use without --diagnose: --vbench takes its own, and the table captions.',
    ),
    (
      ['--diagnose=swap', f'--checkpoint={STUDENT}', '--prompts=LICENSE'],
      'of prompt file LICENSE is empty: remove it or fill it.',
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
      ['--vbench=LICENSE', '--checkpoint=x', '--last_image=a.png'],
      '--last_image has no use with --vbench: ',
    ),
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
}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tiny_config.write_weights(str(tmp_path_factory.mktemp('weights')))


@commands.refusals(WRONG_COMMANDS)
def test_a_wrong_command_is_refused_in_a_sentence(
  name, args, sentence, programs, monkeypatch, capsys, tmp_path
):
  monkeypatch.chdir(ROOT)
  args = [arg.format(tmp=tmp_path) for arg in args]
  assert sentence in commands.refusal(programs[name], args, monkeypatch, capsys)


def test_mp4_without_pyav_is_refused_before_anything_is_loaded(programs, monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, 'av', None)
  args = ['--checkpoint=x', '--prompt=a bag', '--output=o.mp4']
  line = commands.refusal(programs['sample'], args, monkeypatch, capsys)
  assert "--output=o.mp4 needs PyAV: pip install 'salt_jax[video]'" in line


@pytest.fixture(scope='module')
def run_of_two(folder, tmp_path_factory):
  return tiny_config.write_run(tmp_path_factory.mktemp('run'), folder)


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
  monkeypatch.setattr(sample, 'student', lambda *_: pytest.fail('sampling began'))
  assert words in commands.refusal(programs['sample'], args, monkeypatch, capsys)
  assert not list(tmp_path.iterdir())
