"""What is planned is what would run: the outline of a stage against the stage itself."""

import jax
import pytest

from configs import selfforcing
from salt_jax import outline, recipe, sharding, stages, train
from salt_jax.data import Feed
from tests import tiny_config
from tests.test_sharding import ONE


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tiny_config.write_weights(str(tmp_path_factory.mktemp('weights')))


def _of(tree):
  return {
    jax.tree_util.keystr(path, simple=True, separator='/'): (x.shape, str(x.dtype))
    for path, x in jax.tree_util.tree_leaves_with_path(tree)
  }


def _same(config, workdir):
  """The outline of a config against the stage that is built of files and data."""
  rec = recipe.build(config)
  stage, what = stages.build(config, rec, workdir), outline.outline(config, rec)
  assert _of(stage.frozen) == _of(what.frozen)
  assert _of(stage.start()) == _of(what.trained) == _of(stage.shapes)
  assert stage.averaged == what.averaged
  mesh = sharding.make_mesh(ONE, jax.devices()[:1])
  assert [spec[:3] for spec in stage.steps] == [tuple(work) for work in what.work]
  for spec in stage.steps:
    batch = next(spec.feed(Feed(config.batch, config.seed)))
    assert _of(train._to_devices(batch, mesh)) == _of(what.batch)
  assert _of(jax.eval_shape(stage.stream)) == _of(jax.eval_shape(what.stream))


@pytest.mark.parametrize('make', [tiny_config.get_config, tiny_config.get_streaming])
def test_distillation_is_outlined_as_it_is_built(make, folder, tmp_path):
  config = make(folder)
  _same(config, str(tmp_path))
  if 'streaming' in config:
    config.streaming.boundary = 'latent'
    assert 'vae' not in outline.outline(config, recipe.build(config)).frozen
    _same(config, str(tmp_path))


def test_image_to_video_is_outlined_as_it_is_built(tmp_path):
  _same(tiny_config.get_tower(tiny_config.write_weights(str(tmp_path), tower=True)), str(tmp_path))


@pytest.mark.parametrize('name', ['vae', 'teacher', 'ode', 'ar', 'causal_ode', 'causal_cd'])
def test_other_stages_are_outlined_as_they_are_built(name, folder, tmp_path):
  config = tiny_config.stage(name, folder)
  for section in ('pairs', 'latents'):
    if section in config:
      config[section].update(count=8, batch=4)
  if 'pairs' in config:
    config.pairs.steps = 4
  _same(config, str(tmp_path))


def test_stored_texts_need_no_encoder(folder):
  config = tiny_config.get_config(folder)
  config.data = dict(kind='text_store', path='')
  what = outline.outline(config, recipe.build(config))
  assert set(what.frozen) == {'teacher', 'negative'}
  assert _of(what.batch) == {'index': ((8,), 'int32'), 'text': ((8, 16, 64), 'bfloat16')}
  assert _of(what.frozen['negative']) == {'text': ((1, 16, 64), 'bfloat16')}


def test_frozen_kernels_are_planned_in_the_dtype_they_are_kept_in():
  config = selfforcing.get_config()
  kept = _of(outline.outline(config, recipe.build(config)).frozen)
  assert kept['teacher/blocks/ffn_0/kernel'] == ((40, 5120, 13824), 'bfloat16')
  assert kept['teacher/blocks/ffn_0/bias'] == ((40, 13824), 'float32')
