"""Many-step sampling of teachers: diffusers' loop, Wan's defaults, every kind of checkpoint, shares of processes."""

import logging
import os
import shutil
import sys
import types

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from absl import flags

from configs import pretrain
from salt_jax import cli, generate, loading, recipe, sample, stages, teacher, video, weights
from salt_jax.checkpoint import Checkpoints, write_config
from salt_jax.diffusion import flow
from salt_jax.errors import InputError
from salt_jax.models import wan
from salt_jax.step import conditioning
from tests import processes, tiny_config

PROMPTS = ['a red sneaker moves left', 'a blue bag moves up']


@pytest.fixture(scope='module')
def world(tmp_path_factory):
  """(folder, config) of a tiny teacher that its run exported with its text encoder."""
  folder = tmp_path_factory.mktemp('teacher')
  files = tiny_config.write_weights(str(folder))
  config = tiny_config.stage('teacher', files)
  rec = recipe.build(config)
  for name, network, cfg in (('teacher', 'dit', rec.model), ('text', 'umt5', rec.text)):
    params = weights.load(f'{files}/{name}.safetensors', network, cfg)
    weights.export(str(folder), 'text' if name == 'text' else 'dit', params, config)
  return folder, config


def _file(folder):
  return f'{folder}/export/pretrain-teacher-dit.safetensors'


def _args(path, **changes):
  """What `generator` reads of the flags."""
  fields = dict(
    sampler='unipc', steps=3, guidance=None, shift=None, negative=None, image=None, last_image=None
  )
  return types.SimpleNamespace(checkpoint=path, config=None, **(fields | changes))


def _made(path, **changes):
  return sample.generator(_args(path, **changes), PROMPTS)


def _clips(made, prompts=PROMPTS, batch=2, seed=0):
  got = dict(generate.clips(made, list(enumerate(prompts)), batch, seed))
  return np.stack([got[number] for number in range(len(prompts))]).astype(int)


def test_latents_are_those_of_diffusers_loop_with_guidance(world):
  """Our network in diffusers' UniPC on our levels: timesteps, guidance and conversions are where Wan has them."""
  folder, config = world
  config, rec, cfg, networks = loading.load_teacher(_file(folder))
  frozen = stages.serving(config, rec, 'text')
  ids, mask = stages.tokenizer(config, rec)(PROMPTS)
  index = np.arange(2, dtype=np.int32)
  chosen = teacher.Settings('unipc', 6, 5.0, 4.0)
  shape = recipe.latent_shape(config)
  got = teacher.sampler(rec, cfg, frozen, shape)(networks['dit'], chosen)(ids, mask, index)

  cond, uncond = conditioning(frozen, {'ids': ids, 'mask': mask}, rec)
  apply = jax.jit(
    lambda x, t, text: wan.apply(
      networks['dit'], x, jnp.full(x.shape[:2], t), text, wan.Clip(), cfg
    )[0]
  )
  scheduler = diffusers.UniPCMultistepScheduler(
    prediction_type='flow_prediction', use_flow_sigmas=True
  )
  scheduler.set_timesteps(6)
  u = np.linspace(np.float32(0.999).astype(float), 0, 7)
  levels = 5 * u / (1 + 4 * u)
  scheduler.sigmas = torch.tensor(levels, dtype=torch.float32)
  scheduler.timesteps = torch.tensor([int(1000 * s) for s in levels[:-1]])
  x = np.asarray(flow.frame_noise(sample.keys(rec, index), jnp.arange(shape[0]), 0, shape[1:]))
  for t in scheduler.timesteps:
    v, free = (np.asarray(apply(x, float(t), text)) for text in (cond, uncond))
    x = scheduler.step(torch.as_tensor(free + 4 * (v - free)), t, torch.as_tensor(x)).prev_sample
    x = x.numpy()
  # float32 through six passes of the network, guided by 4; latents have deviation 1 and more.
  np.testing.assert_allclose(got, x, atol=2e-3 * x.std())
  assert x.std() > 0.3


def test_defaults_are_wans():
  assert teacher.wan_shift(480, 832, 1) == 3.0 and teacher.wan_shift(720, 1280, 1) == 5.0
  assert teacher.wan_shift(480, 832, 0) == teacher.wan_shift(720, 1280, 0) == 5.0
  config = pretrain.get_config('teacher')
  own = teacher.settings(_args('', steps=None), config)
  assert own == teacher.Settings('unipc', 50, 5.0, 4.0), "the nano world's report"
  config.size = '14b'
  assert teacher.settings(_args('', steps=None), config) == teacher.Settings('unipc', 50, 5.0, 5.0)
  config.model.in_channels = 36
  assert teacher.settings(_args('', steps=None), config) == teacher.Settings('unipc', 40, 3.0, 5.0)
  given = _args('', sampler='euler', steps=7, guidance=0.0, shift=8.0)
  assert teacher.settings(given, config) == teacher.Settings('euler', 7, 8.0, 0.0)


@pytest.fixture(scope='module')
def clips(world):
  return _clips(_made(_file(world[0])))


def test_a_clip_depends_on_its_number_alone(world, clips):
  made = _made(_file(world[0]))
  assert clips.shape == (2, 21, 32, 32, 3) and clips.std() > 5
  # A batch of another size may round otherwise, by one of 256 levels.
  assert np.abs(_clips(made, batch=1) - clips).max() <= 1
  assert np.abs(_clips(made, PROMPTS[1:], seed=1) - clips[1:]).max() <= 1
  assert np.abs(_clips(made, PROMPTS[1:]) - clips[1:]).max() > 10
  np.testing.assert_array_equal(_clips(made), clips)


def test_another_seed_of_the_noise_is_another_clip(world, clips):
  made = sample.generator(_args(_file(world[0])), PROMPTS, seed=5)
  assert np.abs(_clips(made) - clips).max() > 10


@pytest.mark.parametrize(
  'changes, moves',
  [
    (dict(negative='a green boot moves down'), True),
    (dict(negative=''), False),
    (dict(guidance=1.0), True),
    (dict(shift=3.0), True),
    (dict(sampler='dpmpp'), True),
    (dict(sampler='euler'), True),
  ],
)
def test_what_the_flags_change(world, clips, changes, moves):
  gap = np.abs(_clips(_made(_file(world[0]), **changes)) - clips).max()
  assert (gap > 3) == moves and (moves or gap == 0)


def test_without_guidance_the_negative_prompt_is_not_asked(world):
  plain, other = (
    _clips(_made(_file(world[0]), guidance=1.0, negative=text))
    for text in (None, 'a green boot moves down')
  )
  np.testing.assert_array_equal(plain, other)


def test_a_workdir_gives_both_averaged_networks(world, clips, tmp_path):
  folder, config = world
  rec = recipe.build(config)
  config = config.copy_and_resolve_references()
  ema = {
    'dit': weights.load(_file(folder), 'dit', rec.model),
    'text': weights.load(_file(folder).replace('-dit', '-text'), 'umt5', rec.text),
  }
  config.weights.text = config.weights.teacher = str(tmp_path / 'moved')
  write_config(str(tmp_path), config)
  saved = Checkpoints(str(tmp_path / 'checkpoints'))
  saved.save(2, {'state': {'params': ema}, 'ema': ema}, {'data_step': 2}, force=True)
  saved.close()
  np.testing.assert_array_equal(_clips(_made(str(tmp_path))), clips)


def test_a_file_that_says_nothing_is_described_by_a_config(world, clips, monkeypatch):
  folder, config = world
  monkeypatch.setattr(cli, 'config_is_given', lambda: True)
  args = _args(f'{folder}/teacher.safetensors', guidance=4.0, shift=5.0)
  args.config = tiny_config.get_config(str(folder))
  np.testing.assert_array_equal(_clips(sample.generator(args, PROMPTS, seed=config.seed)), clips)
  args.config.teacher.dim = args.config.model.dim = 64
  with pytest.raises(InputError, match='a checkpoint of another size'):
    sample.generator(args, PROMPTS)


@pytest.mark.parametrize(
  'path, words',
  [
    ('assets:nano_student.safetensors', 'the stage "selfforcing", which is no many-step teacher'),
    ('assets:nano_vae.safetensors', 'the stage "vae", which is no many-step teacher: pass'),
  ],
)
def test_checkpoints_that_do_not_fit_the_sampler_are_refused(path, words):
  with pytest.raises(InputError) as error:
    _made(path)
  assert words in str(error.value) and '\n' not in str(error.value)


def test_a_teacher_without_its_text_encoder_is_refused(world, tmp_path):
  shutil.copy(_file(world[0]), tmp_path)
  with pytest.raises(InputError, match='needs the text encoder of its run: keep NAME-dit'):
    loading.load_teacher(f'{tmp_path}/pretrain-teacher-dit.safetensors')


def test_shares_are_disjoint_and_complete(monkeypatch):
  monkeypatch.setattr(jax, 'process_count', lambda: 3)
  parts = []
  for index in range(3):
    monkeypatch.setattr(jax, 'process_index', lambda index=index: index)
    parts.append(list(generate.share(8)))
  assert sorted(sum(parts, [])) == list(range(8)) and max(map(len, parts)) == 3


def test_two_processes_write_their_shares_and_no_more(world, clips, tmp_path):
  out = tmp_path / 'out.webp'
  words = [
    f'--checkpoint={_file(world[0])}',
    '--sampler=unipc',
    '--steps=3',
    '--samples=2',
    f'--prompt={PROMPTS[0]}',
    f'--prompt={PROMPTS[1]}',
    f'--output={out}',
  ]
  both = processes.start(2, ['-m', 'salt_jax.sample', *words], tmp_path / 'logs')
  codes, logs = processes.ended(both, tmp_path / 'logs', limit=300)
  assert codes == [0, 0], logs[0][-2000:] + logs[1][-2000:]
  for number, text in enumerate(logs):
    wrote = [line.split('wrote ')[1].split()[0] for line in text.splitlines() if 'wrote' in line]
    assert wrote == [str(tmp_path / f'out-{n}.webp') for n in (number, number + 2)]
  first = video.read_webp(str(tmp_path / 'out-0.webp'))
  video.write(str(tmp_path / 'alone.webp'), clips[0].astype(np.uint8))
  # The same clip through the same lossy file, but for a level of rounding.
  assert np.abs(first.astype(int) - video.read_webp(str(tmp_path / 'alone.webp'))).mean() < 1


def test_the_program_writes_what_it_was_asked_for(world, tmp_path, monkeypatch):
  logger, known = logging.getLogger('salt_jax'), set(flags.FLAGS)
  handlers = list(logger.handlers)
  words = [f'--checkpoint={_file(world[0])}', '--sampler=dpmpp', '--steps=2', '--guidance=2']
  words += [f'--prompt={PROMPTS[0]}', '--samples=3', '--batch=2', f'--output={tmp_path}/a.png']
  monkeypatch.setattr(sys, 'argv', ['sample', *words])
  with pytest.raises(SystemExit) as stop:
    cli.run(sample.program, sample.define_flags)
  for name in set(flags.FLAGS) - known:
    delattr(flags.FLAGS, name)
  flags.FLAGS.unparse_flags()
  logger.handlers, logger.propagate = handlers, True
  assert not stop.value.code
  assert sorted(os.listdir(tmp_path)) == ['a-0.png', 'a-1.png', 'a-2.png']
  pictures = [(tmp_path / name).read_bytes() for name in sorted(os.listdir(tmp_path))]
  assert len(set(pictures)) == 3, 'each sample has its own noise'
