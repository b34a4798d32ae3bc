"""The arguments of the config files: typed, and refused where they do not go together."""

import re

import pytest

from configs import base, causal_init, dmd, pretrain, selfforcing
from salt_jax.errors import InputError
from tests.commands import sentence_of


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
  assert sentence in sentence_of(error)


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
    with pytest.raises(
      InputError, match='1.3b has no image-to-video form: choose one of nano, 14b'
    ):
      module.get_config(arg)


@pytest.mark.parametrize('module', [selfforcing, dmd])
def test_the_average_of_the_released_recipe_begins_at_iteration_200(module):
  """`ema.start` counts generator updates, of which there is one in five iterations (salt_method.md 4.1)."""
  config = module.get_config()
  assert config.generator_every == 5 and config.ema.start == 40
  assert module.get_config('nano').ema.start == 0
