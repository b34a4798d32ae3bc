"""A batch in parts, one after another; tests/test_mesh.py has a whole step in parts, on a mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import selfforcing
from salt_jax import checkpoint, cli, outline, recipe, splits, state, train
from salt_jax.errors import InputError
from salt_jax.models import wan
from salt_jax.step import gradients, in_parts
from tests import tiny_config

STAGES = ('teacher', 'ode', 'ar', 'causal_ode', 'causal_cd')


@dataclasses.dataclass
class Parts:
  accumulate: int


@pytest.mark.parametrize('parts', [1, 2, 3, 6])
def test_parts_give_the_gradient_and_the_words_of_the_whole(parts):
  rng = np.random.default_rng(0)
  params = {'w': jnp.asarray(rng.standard_normal((5, 3)), jnp.float32), 'b': jnp.ones(3)}
  examples = (
    {'x': jnp.asarray(rng.standard_normal((6, 5)), jnp.float32)},
    jax.random.split(jax.random.key(0), 6),
  )
  sizes = []

  def loss(params, examples):
    (batch, keys), size = examples, examples[1].shape[0]
    sizes.append(size)
    noise = jax.vmap(lambda key: jax.random.normal(key, (3,)))(keys)
    each = jnp.sum(jnp.square(batch['x'] @ params['w'] + params['b'] - noise), 1)
    return each.mean(), {'loss': each, 'active': jnp.float32(1)}

  def mean(params):
    return loss(params, examples)[0]

  grads, aux = jax.jit(functools.partial(gradients, loss, recipe=Parts(parts)))(params, examples)
  assert set(sizes) == {6 // parts}
  # Sums of six numbers in another order.
  for name, want in jax.grad(mean)(params).items():
    np.testing.assert_allclose(grads[name], want, rtol=2e-6, atol=1e-6)
  np.testing.assert_allclose(aux['loss'].mean(), mean(params), rtol=1e-6)
  assert aux['loss'].size == 6 and aux['active'].mean() == 1


@pytest.mark.parametrize('name', [*STAGES, 'distillation'])
def test_every_step_takes_its_batch_in_parts(name, monkeypatch):
  """Of eight examples, two at once: what is taken of the whole batch has another shape than what is of the part."""
  plain, sizes = wan.apply, []

  def apply(params, x, *args):
    sizes.append(x.shape[0])
    return plain(params, x, *args)

  monkeypatch.setattr(wan, 'apply', apply)
  config = tiny_config.stage(name, '') if name in STAGES else tiny_config.get_config('')
  rec = recipe.build(config)
  what = outline.outline(config, rec)
  like = state.shapes_of(what.trained, rec.optimizers, what.averaged, what.stream)
  count = jax.ShapeDtypeStruct((), np.int32)
  for work in what.work:
    made = []
    for parts in (1, 4):
      sizes.clear()
      run = functools.partial(work.run, recipe=dataclasses.replace(rec, accumulate=parts))
      made.append(jax.eval_shape(run, like, what.frozen, what.batch, count))
      # Guidance asks for both prompts at once.
      assert config.batch // parts in sizes and max(sizes) <= 2 * config.batch // parts
    assert made[0] == made[1]


def test_a_part_has_examples_of_every_device():
  """Of eight on four devices each has two neighbours, one for each part; keys go with them."""
  index, keys = jnp.arange(8), jax.random.split(jax.random.key(0), 8)
  parts, moved = in_parts((index, keys), 2)
  np.testing.assert_array_equal(parts, [[0, 2, 4, 6], [1, 3, 5, 7]])
  np.testing.assert_array_equal(*map(jax.random.key_data, (moved, keys[parts])))


def test_a_batch_must_divide_over_the_devices():
  mesh = jax.sharding.AbstractMesh((2, 4, 1, 1), ('data', 'fsdp', 'context', 'tensor'))
  splits.check_batch(16, mesh)
  splits.check_batch(16, mesh, 2)
  with pytest.raises(
    InputError,
    match='batch=12 cannot be split over data x fsdp = 8 shards; make it a multiple of 8',
  ):
    splits.check_batch(12, mesh)
  with pytest.raises(InputError, match='fsdp x accumulate = 8 x 3 parts; make it a multiple of 24'):
    splits.check_batch(32, mesh, 3)


def test_a_cpu_is_as_many_devices_as_share_a_part(monkeypatch):
  monkeypatch.setattr(cli.os, 'sched_getaffinity', lambda _: range(4), raising=False)
  monkeypatch.setenv('XLA_FLAGS', '')
  monkeypatch.delenv('JAX_NUM_CPU_DEVICES', raising=False)
  config = selfforcing.get_config('nano')
  found = []
  for config.accumulate in (1, 2, 4):
    found.append(cli.cpu_devices(config))
  assert config.batch == 4 and found == [4, 2, 1]


def test_a_run_goes_on_in_other_parts_and_one_of_before_the_field_too(tmp_path):
  config = selfforcing.get_config('nano')
  for name in ('new', 'old'):
    if name == 'old':
      del config.accumulate
    assert recipe.build(config).accumulate == splits.parts(config) == 1
    checkpoint.write_config(str(tmp_path / name), config)
  config = selfforcing.get_config('nano')
  config.accumulate = 2
  for name in ('new', 'old'):
    checkpoint.check_config(str(tmp_path / name), config, train.FREE)
