"""A batch in parts, one after another; tests/test_mesh.py has a whole step in parts, on a mesh."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from salt_jax import outline, recipe, state
from salt_jax.models import wan
from salt_jax.step import gradients
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
