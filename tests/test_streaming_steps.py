"""Training along streams: what losses see, what is carried, one compilation a step, and runs that go on bit for bit."""

import json
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import selfforcing
from salt_jax import recipe as recipes
from salt_jax import stages, step, stream_steps, train
from salt_jax import state as states
from salt_jax.diffusion import streaming
from salt_jax.models import vae
from tests import tiny_config
from tests.processes import devices_of

ROOT = pathlib.Path(__file__).parents[1]
FRAMES, NEW, OVERLAP, CLIPS = 6, 3, 3, 4


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tiny_config.write_weights(str(tmp_path_factory.mktemp('weights')))


def _batch(rec, n, seed):
  ids = np.random.default_rng((n, seed)).integers(1, 20, (2, 2, rec.text_length)).astype(np.int32)
  mask = np.broadcast_to(np.arange(rec.text_length) < 5, ids.shape[1:])
  index = np.arange(2, dtype=np.int32) + 2 * n
  return {'index': index, 'ids': ids[0], 'mask': mask, 'next_ids': ids[1], 'next_mask': mask}


@pytest.fixture(scope='module')
def story(folder):
  """Six iterations as the loop makes them: for each call what it was given, what its loss saw and what it carried."""
  config = tiny_config.get_streaming(folder)
  config.batch = 2
  rec = recipes.build(config)
  stage = stages.build(config, rec, '')
  state = states._new(
    jax.tree.map(jnp.asarray, stage.start()), rec.optimizers, stage.averaged, stage.stream
  )
  seen, traces, recached, plain = [], [], [], streaming.recache

  def spy(loss, network):
    def spied(fns, x0, texts, keys, cfg, mask):
      text = texts[0] if network == 'generator' else texts
      jax.debug.callback(lambda *a: seen.append(jax.tree.map(np.array, a)), x0, mask, text.text)
      return loss(fns, x0, texts, keys, cfg, mask)

    return spied

  def recache(apply, params, cache, latents, prompt, start, **how):
    kernel = params['patch_embedding']['kernel']
    jax.debug.callback(
      lambda *a: recached.append(jax.tree.map(np.array, a)), latents, prompt.text, start, kernel
    )
    return plain(apply, params, cache, latents, prompt, start, **how)

  def jitted(name, run):
    def counted(state, frozen, batch, n):
      traces.append(name)
      return run(state, frozen, batch, n, recipe=rec)

    return jax.jit(counted)

  calls = []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(stream_steps, 'dmd_loss', spy(stream_steps.dmd_loss, 'generator'))
    patch.setattr(stream_steps, 'critic_loss', spy(stream_steps.critic_loss, 'critic'))
    patch.setattr(streaming, 'recache', recache)
    steps = [(s, jitted(s.name, s.run)) for s in stage.steps]
    for n in range(6):
      for spec, run in steps:
        if n % spec.every == 0:
          batch = _batch(rec, n, len(calls))
          before, recached[:] = state, []
          state, metrics = run(state, stage.frozen, batch, np.int32(n))
          jax.effects_barrier()
          calls.append((spec.name, batch, seen.pop(), list(recached), metrics, before, state))
          assert not seen
  return rec, stage.frozen, calls, traces


def test_each_step_compiles_once_over_starts_switches_and_positions(story):
  _, _, calls, traces = story
  assert sorted(traces) == ['critic', 'generator']
  assert [c[0][0] for c in calls] == list('gccgccgcc')
  metrics = [c[4] for c in calls]
  assert [int(m['clip']) for m in metrics] == [0, 1, 2, 3, 0, 1, 2, 3, 0]
  assert [int(m['stream']) for m in metrics] == [0] * 4 + [1] * 4 + [2]


def test_losses_see_boundary_and_previous_frames_and_count_new_ones(story):
  rec, frozen, calls, _ = story
  for _, _, (x0, mask, _), _, metrics, before, after in calls:
    if metrics['clip'] == 0:
      assert mask.all()
      np.testing.assert_allclose(after.stream.latents, x0, atol=1e-4)
      continue
    np.testing.assert_array_equal(mask, [False] * OVERLAP + [True] * NEW)
    past = before.stream.latents
    video = vae.decode(frozen['vae'], past[:, : FRAMES - OVERLAP + 1], rec.vae)
    # Decoded at once here, latent by latent there.
    np.testing.assert_allclose(
      x0[:, :1], vae.encode(frozen['vae'], video[:, -1:], rec.vae), atol=1e-3
    )
    np.testing.assert_array_equal(x0[:, 1:OVERLAP], past[:, -OVERLAP + 1 :])
    # The generator's loss sees the exits repeated, float32 rounding apart from what the rollout carries on.
    np.testing.assert_allclose(after.stream.latents[:, OVERLAP:], x0[:, OVERLAP:], atol=1e-4)
    np.testing.assert_array_equal(after.stream.latents[:, :OVERLAP], past[:, -OVERLAP:])


def test_prompts_hold_for_a_stream_and_change_at_its_switch_with_a_recache(story):
  rec, frozen, calls, _ = story
  switched, first = [], None
  for _, batch, (_, _, text), recached, metrics, before, _ in calls:
    first = batch if metrics['clip'] == 0 else first
    kind = 'next_' if metrics['switched'] else ''
    expected = step.encode(frozen, first[f'{kind}ids'], first[f'{kind}mask'], rec)
    np.testing.assert_allclose(text, expected, atol=1e-5)
    switched.append(int(metrics['switched']))
    if metrics['switched'] and switched[-2] == 0:
      ((latents, prompt, start, kernel),) = recached
      own, average = (
        network['generator']['patch_embedding']['kernel'] for network in (before.params, before.ema)
      )
      np.testing.assert_array_equal(kernel, own)
      assert np.abs(own - average).max() > 0, 'student and average are one, so this says little'
      np.testing.assert_array_equal(latents, before.stream.latents[:, -5:])
      np.testing.assert_allclose(prompt, expected, atol=1e-5)
      assert start == FRAMES + (metrics['clip'] - 1) * NEW - 5
    else:
      assert not recached
  assert switched[0] == switched[4] == switched[8] == 0 and switched[3] == switched[7] == 1


def test_the_cache_holds_the_end_of_the_stream_and_its_sink(story):
  _, _, calls, _ = story
  for _, _, _, recached, metrics, _, after in calls:
    frames = np.asarray(after.stream.cache.frames)
    last = FRAMES + int(metrics['clip']) * NEW
    assert set(range(max(1, last - 7), last)) == set(frames[1:]) - {-1}
    if not metrics['switched']:
      assert frames[0] == 0
    if recached:
      assert frames[0] == recached[0][2], 'the recached window should have replaced the sink'


def test_the_boundary_may_be_the_latent_itself_without_a_vae(folder):
  config = tiny_config.get_streaming(folder)
  config.streaming.boundary = 'latent'
  rec = recipes.build(config)
  stage = stages.build(config, rec, '')
  assert 'vae' not in stage.frozen
  z = jax.random.normal(jax.random.key(0), (2, FRAMES, 4, 4, 16))
  got = stream_steps._boundary(stage.frozen, z, streaming.Place(0, 1, 1), rec)
  np.testing.assert_array_equal(got, z[:, NEW : NEW + 1])


@pytest.mark.slow
def test_frame_wise_streams(folder):
  """Three given chunks of one frame, then three new ones."""
  config = tiny_config.get_streaming(folder)
  config.update(batch=2)
  config.rollout.chunk = 1
  rec = recipes.build(config)
  stage = stages.build(config, rec, '')
  params = jax.tree.map(jnp.asarray, stage.start())
  state = states._new(params, rec.optimizers, stage.averaged, stage.stream)
  run = jax.jit(lambda *args: stream_steps.generator_step(*args, recipe=rec))
  latents = []
  for n in (0, 2):
    state, metrics = run(state, stage.frozen, _batch(rec, n, 0), np.int32(n))
    latents.append(np.asarray(state.stream.latents))
    assert 0 < metrics['grad_norm'] < 1000
  assert np.asarray(state.stream.cache.frames).max() == 14
  assert np.abs(latents[1]).max(axis=(0, 2, 3, 4)).min() > 0.1


def _fingerprints(workdir, step):
  info = next(pathlib.Path(workdir, 'checkpoints', str(step), 'info').rglob('metadata'))
  return json.loads(info.read_text())['fingerprints']


def _metrics(workdir):
  lines = (pathlib.Path(workdir) / 'metrics.jsonl').read_text().splitlines()
  return [json.loads(line) for line in lines]


@pytest.fixture(scope='module')
def finished(folder, tmp_path_factory):
  workdir = str(tmp_path_factory.mktemp('run'))
  assert train.run(tiny_config.get_streaming(folder), workdir) == {'generator': 1, 'critic': 1}
  return workdir


@pytest.mark.slow
def test_a_run_stopped_in_the_middle_of_a_stream_ends_bit_identical(folder, finished, tmp_path):
  config = tiny_config.get_streaming(folder)
  config.total_steps = 3
  train.run(config, str(tmp_path))
  config.total_steps = 6
  assert train.run(config, str(tmp_path)) == {'generator': 1, 'critic': 1}
  assert _fingerprints(tmp_path, 6) == _fingerprints(finished, 6)


@pytest.mark.slow
def test_eight_devices_equal_one(folder, finished, tmp_path):
  """The carried cache is split over the devices as batches are."""
  env = os.environ | devices_of(8)
  flags = ['--config.mesh.data=2', '--config.mesh.fsdp=4', "--config.rules=(('.*','fsdp'),)"]
  command = [
    sys.executable,
    '-m',
    'salt_jax.main',
    f'--config=tests/tiny_config.py:{folder},streaming',
  ]
  done = subprocess.run(
    [
      *command,
      f'--workdir={tmp_path}',
      *flags,
      '--config.shard_min_size=1',
      '--config.total_steps=3',
    ],
    cwd=ROOT,
    env=env,
    capture_output=True,
    text=True,
    timeout=600,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  many, one = _metrics(tmp_path), _metrics(finished)
  assert one[1]['critic/clip'] == 2 and one[2]['generator/clip'] == 3
  for a, b in zip(one, many, strict=False):
    for name in ('generator/loss_dmd', 'critic/loss', 'critic/clip', 'critic/switched'):
      if name in a:
        # As for whole clips: sums in another order, and Adam behind them.
        np.testing.assert_allclose(b[name], a[name], rtol=2e-3, err_msg=f'{name} at {a["step"]}')


def test_the_cache_is_sharded_over_the_batch(folder):
  config = tiny_config.get_streaming(folder)
  rec = recipes.build(config)
  stage = stages.build(config, rec, '')
  shapes = states.shapes_of(stage.shapes, rec.optimizers, stage.averaged, stage.stream)
  mesh = jax.sharding.AbstractMesh((2, 4, 1, 1), ('data', 'fsdp', 'context', 'tensor'))
  placed = states.with_shardings(shapes, mesh, config)[1].stream
  rows = ('data', 'fsdp')
  assert placed.cache.k.spec[:2] == placed.cache.v.spec[:2] == (None, rows)
  assert placed.latents.spec[0] == rows and not any(placed.cache.frames.spec)
  assert all(s.spec[0] == rows for s in placed.prompts.values()) and len(placed.prompts) == 4


@pytest.mark.parametrize('word', ['nano', '1.3b'])
def test_the_config_is_longlives_second_stage(word):
  config = selfforcing.get_config(f'{word},backbone=longlive,streaming')
  assert (config.rollout.window, config.rollout.sink, config.streaming.new) == (12, 3, 18)
  assert config.losses.consistency == config.losses.alignment == 0
  assert config.schedule.steps == (4,) and config.weights.init == config.weights.student
  rec = recipes.build(config)
  # A ring of a clip behind the nine frames that its first chunk sees.
  cache = jax.eval_shape(lambda: streaming.carry_nothing(rec.chunking, 1, 4)).cache
  assert cache.capacity == 30 and rec.streaming.clips(21) == (7 if word == 'nano' else 13)
