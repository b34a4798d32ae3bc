"""Sampling: streams equal whole clips, noise belongs to the clip, the program writes what it says."""

import dataclasses
import os
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest

from salt_jax import codec, generate, monitor, recipe, sample, sharding, stages, teacher, video
from salt_jax import weights as files
from salt_jax.diffusion import rollout, streaming
from salt_jax.errors import InputError
from tests import tiny_config
from tests.processes import devices_of

ROOT = pathlib.Path(__file__).parents[1]
PROMPTS = ['a red sneaker moves left', 'a blue bag moves up']


@pytest.fixture(scope='module')
def world(tmp_path_factory):
  """(config, recipe, frozen, student, (ids, mask, index)) of random tiny networks."""
  folder = tiny_config.write_weights(str(tmp_path_factory.mktemp('weights')))
  config = tiny_config.get_config(folder)
  rec = recipe.build(config)
  frozen = stages.serving(config, rec, 'text', 'vae', 'teacher')
  ids, mask = stages.tokenizer(config, rec)(PROMPTS)
  student = files.load(config.weights.student, 'dit', rec.model)
  return config, rec, frozen, student, (ids, mask, np.arange(2, dtype=np.int32))


@pytest.mark.parametrize('window', [0, 5])
def test_a_stream_equals_the_whole_clip(world, window):
  config, _, frozen, student, batch = world
  with config.unlocked():
    config.rollout.window = window
  rec = recipe.build(config)
  whole = codec.decoder(rec, frozen['vae'])(sample.student(rec, frozen)(student, 2)(*batch))
  parts = list(sample.stream(rec, student, frozen, frozen['vae'], batch, 2))
  assert [p.shape[1] for p in parts] == [9, 12]
  streamed = np.concatenate(parts, axis=1)
  assert streamed.shape == whole.shape == (2, 21, 32, 32, 3)
  # float32 rounding may tip a pixel over to the next of 256 levels.
  assert np.abs(streamed.astype(int) - whole).max() <= 1
  assert whole.std() > 5, 'the clip is blank'


def drawn(config, networks, frozen):
  """Clips 0, 1 and 7 of a teacher in two steps, and the share of its parameters on the first device."""
  rec = recipe.build(config)
  mesh, params, placed = sample.placed(config, networks, frozen)
  chosen = teacher.Settings('euler', 2, 5.0, 3.0)
  shape = recipe.latent_shape(config)
  run = teacher.sampler(rec, rec.teacher, placed, shape)(params, chosen)
  draw = generate.drawer(rec, run, placed['vae'], (), mesh)
  made = generate.Generator(config, rec, {}, draw, {})
  clips = dict(generate.clips(made, [(0, PROMPTS[0]), (1, PROMPTS[1]), (7, PROMPTS[0])], 1))
  assert list(clips) == [0, 1, 7]
  leaves = jax.tree.leaves((params, placed['text']))
  first = sum(x.addressable_shards[0].data.nbytes for x in leaves)
  return np.stack(list(clips.values())), first / sum(x.nbytes for x in leaves)


def watched(config, mesh, student, text):
  """What a run logs of four clips that its average makes."""
  config = config.copy_and_resolve_references()
  config.log.update(samples_every=1, samples=4)
  watch = monitor.watcher(config, recipe.build(config), sharding.replicated(mesh))
  found = watch({'generator': student}, {'text': text}, 1)
  return [found['samples/brightness'], found['samples/saturation']]


def test_parameters_split_over_devices_make_the_same_clips(world, tmp_path):
  """Of four devices, more than clips, each holds a quarter of all bytes; here one holds all."""
  config, _, frozen, student, _ = world
  code = f"""if True:
    import numpy as np
    from salt_jax import recipe, sharding, stages, weights
    from tests import test_sample, tiny_config
    config = tiny_config.get_config({os.path.dirname(config.weights.student)!r})
    config.mesh.update(data=1, fsdp=-1)
    config.update(rules=(('.*', 'fsdp'),), shard_min_size=16)
    rec = recipe.build(config)
    frozen = stages.serving(config, rec, 'text', 'vae', 'teacher')
    clips, share = test_sample.drawn(config, frozen.pop('teacher'), frozen)
    student = weights.load(config.weights.student, 'dit', rec.model)
    logged = test_sample.watched(config, sharding.make_mesh(config.mesh), student, frozen['text'])
    np.savez({str(tmp_path / 'found.npz')!r}, clips=clips, share=share, logged=logged)
  """
  env = os.environ | devices_of(4)
  subprocess.run([sys.executable, '-c', code], env=env, check=True, timeout=300)
  found = np.load(tmp_path / 'found.npz')
  rest = {name: x for name, x in frozen.items() if name != 'teacher'}
  clips, share = drawn(config, frozen['teacher'], rest)
  assert share == 1 and found['share'] < 0.3
  # float32 rounding may tip a pixel over to the next of 256 levels.
  assert np.abs(found['clips'].astype(int) - clips).max() <= 1
  assert clips.std() > 5 and np.abs(clips[0].astype(int) - clips[2]).max() > 5
  logged = watched(config, sharding.make_mesh({**config.mesh, 'fsdp': 1}), student, frozen['text'])
  np.testing.assert_allclose(found['logged'], logged, rtol=1e-3)  # as many pixels may tip over


@pytest.fixture(scope='module')
def windowed(world):
  """A recipe for 15 latent frames in chunks of 3 behind a window of 7 with a sink of 1."""
  config = world[0].copy_and_resolve_references()
  config.rollout.update(window=7, sink=1)
  return sample.lengthened(config, recipe.build(config), 15)


def test_a_long_stream_equals_the_long_clip_in_constant_memory(world, windowed):
  _, _, frozen, student, batch = world
  assert rollout.empty_cache(windowed.chunking, 2, streaming=True).capacity == 4
  whole = codec.decoder(windowed, frozen['vae'])(
    sample.student(windowed, frozen)(student, 2)(*batch)
  )
  parts = list(sample.stream(windowed, student, frozen, frozen['vae'], batch, 2))
  assert [p.shape[1] for p in parts] == [9, 12, 12, 12, 12]
  # float32 rounding, through five chunks, may tip a pixel over to the next of 256 levels.
  assert np.abs(np.concatenate(parts, axis=1).astype(int) - whole).max() <= 1


def test_a_switch_holds_from_the_next_chunk_on_and_recaches_the_window(
  world, windowed, monkeypatch
):
  _, _, frozen, student, (ids, mask, index) = world
  one, seen, plain = (ids[:1], mask[:1], index[:1]), [], streaming.recache

  def recache(apply, params, cache, latents, text, start, **how):
    seen.append((latents.shape[1], how['global_sink']))
    return plain(apply, params, cache, latents, text, start, **how)

  monkeypatch.setattr(streaming, 'recache', recache)

  def clip(*switches):
    return np.concatenate(
      list(sample.stream(windowed, student, frozen, frozen['vae'], one, 2, switches)), 1
    )

  plain_clip = clip()
  same = clip(sample.Switch(7, ids[:1], mask[:1]))
  other = clip(sample.Switch(7, ids[1:], mask[1:]))
  alone = clip(sample.Switch(7, ids[1:], mask[1:], global_sink=False))
  early = clip(sample.Switch(2, ids[1:], mask[1:]))
  assert seen == [(7, True), (7, True), (7, False), (3, True)]
  first = 1 + 4 * (9 - 1)  # pixel frames before latent frame 9, the first chunk behind 7
  for switched in (same, other, alone):
    np.testing.assert_array_equal(switched[:, :first], plain_clip[:, :first])
  assert len({switched[:, first:].tobytes() for switched in (plain_clip, same, other, alone)}) == 4
  np.testing.assert_array_equal(early[:, :9], plain_clip[:, :9])
  assert (early[:, 9:first] != plain_clip[:, 9:first]).any()


def test_students_that_cannot_go_on_are_refused_and_a_full_cache_says_its_size(world, caplog):
  config, rec, *_ = world
  config = config.copy_and_resolve_references()
  config.rollout.window = 0
  with pytest.raises(
    InputError, match='--frames=9: a student that is given a picture makes 6 frames.'
  ):
    given = dataclasses.replace(rec.model, in_channels=36)
    sample.lengthened(config, dataclasses.replace(rec, model=given), 9)
  with pytest.raises(
    InputError, match='--frames=9: this student is bidirectional and makes 6 frames.'
  ):
    whole = dataclasses.replace(rec.chunking, chunk=6)
    sample.lengthened(config, dataclasses.replace(rec, chunking=whole), 9)
  with pytest.raises(InputError, match='--switch_at=3: a clip of a single chunk cannot change'):
    sample._check_switches([3], dataclasses.replace(rec, chunking=whole))
  assert sample.lengthened(config, rec, 900).chunking.window is None
  # Keys and values of 2 layers, 900 frames of 4 tokens, 32 numbers of 4 bytes: 1.76 MiB.
  assert 'keeps all 900 frames, 2 MiB a clip' in caplog.text


def test_the_noise_of_a_clip_is_its_own(world):
  _, rec, frozen, student, (ids, mask, index) = world
  few = sample.student(rec, frozen)(student, 2)
  both = few(ids, mask, index)
  alone = few(ids[1:], mask[1:], index[1:])
  np.testing.assert_allclose(both[1:], alone, atol=1e-4)
  other = few(ids[1:], mask[1:], index[1:] + 1)
  assert np.abs(other - alone).max() > 0.1


def test_more_steps_and_other_prompts_change_the_clip_but_not_the_program(world):
  _, rec, frozen, student, (ids, mask, index) = world
  few = sample.student(rec, frozen)
  two, four = few(student, 2)(ids, mask, index), few(student, 4)(ids, mask, index)
  swapped = few(student, 2)(ids[::-1], mask[::-1], index)
  assert np.abs(two - four).max() > 1e-3 and np.abs(two - swapped).max() > 1e-3


def test_guidance_of_one_is_the_conditional_model(world):
  config, rec, frozen, _, batch = world
  shape = recipe.latent_shape(config)
  one = sample.teacher(rec, rec.teacher, frozen, shape, 1.0)(frozen['teacher'], 3, 5.0)(*batch)
  near = sample.teacher(rec, rec.teacher, frozen, shape, 1.0 + 1e-6)(frozen['teacher'], 3, 5.0)(
    *batch
  )
  far = sample.teacher(rec, rec.teacher, frozen, shape, 4.0)(frozen['teacher'], 3, 5.0)(*batch)
  np.testing.assert_allclose(one, near, atol=1e-3)
  assert np.abs(one - far).max() > 1e-2


def test_the_program_writes_a_video(world, tmp_path):
  config, rec, _, student, _ = world
  path = files.export(str(tmp_path), 'generator', student, config)
  out = tmp_path / 'out.webp'
  command = [
    sys.executable,
    '-m',
    'salt_jax.sample',
    f'--checkpoint={path}',
    f'--prompt={PROMPTS[0]}',
    '--steps=2',
  ]
  done = subprocess.run(
    [
      *command,
      f'--output={out}',
      '--stream',
      '--frames=12',
      f'--prompt={PROMPTS[1]}',
      '--switch_at=5',
    ],
    cwd=ROOT,
    env=os.environ,
    capture_output=True,
    text=True,
    timeout=300,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  assert '9 frames after' in done.stderr and video.read_webp(str(out)).shape == (45, 32, 32, 3)
