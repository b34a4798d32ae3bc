"""A step on many devices is the step on one: with examples, parameters, tokens and heads split."""

import json
import os
import subprocess
import sys

import pytest

from configs import base, selfforcing
from salt_jax import sharding, splits
from salt_jax.errors import InputError
from tests.processes import devices_of
from tests.test_sharding import on_eight_devices


@pytest.fixture(scope='module')
def report():
  done = subprocess.run(
    [sys.executable, '-m', 'tests.mesh_steps'],
    env=os.environ | devices_of(8),
    text=True,
    capture_output=True,
    timeout=600,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout)


@pytest.mark.parametrize('name', ['generator', 'critic'])
def test_a_step_on_eight_devices_is_that_on_one(report, name):
  """Sums in another order: 1e-6 of the gradient's norm is seen, and a part left out or counted twice is above 1e-2."""
  assert report[name]['traces'] == 1
  for found in report[name]['steps'].values():
    assert found['apart'] < 1e-5
    assert found['got'] == pytest.approx(found['want'], rel=1e-5)


def test_the_steps_that_are_compared_have_all_terms(report):
  steps = [found['want'] for found in report['generator']['steps'].values()]
  for term in ('alignment', 'consistency'):
    assert sum(step[f'active_{term}'] for step in steps) == 1


def test_parameters_and_average_lie_in_parts(report):
  assert report['generator']['shards'] == {'ffn': 8, 'average': 8}
  assert report['critic']['shards'] == {'ffn': 4, 'average': 4}


def test_attention_moves_the_split_from_tokens_to_heads_and_back():
  out = on_eight_devices("""
    import jax, numpy as np
    from salt_jax import sharding
    from salt_jax.models import attention, axes
    mesh = sharding.make_mesh({'data': 2, 'fsdp': 1, 'context': 4, 'tensor': 1})
    names = (axes.BATCH, None, axes.TOKENS, axes.WIDTH, None)

    def fn(q, k, v):
      q, k, v = (axes.split(x, axes.BATCH, None, None, axes.HEADS, None) for x in (q, k, v))
      flat = lambda x: x.reshape(4, 24, 4, 8)
      out = attention.attend(flat(q), flat(k), flat(v)).reshape(q.shape)
      return axes.split(out, *names)

    x = jax.ShapeDtypeStruct((4, 3, 8, 4, 8), np.float32)
    with jax.set_mesh(mesh):
      spec = jax.sharding.NamedSharding(mesh, axes.spec(x.shape, *names))
      run = jax.jit(fn, in_shardings=(spec,) * 3, out_shardings=spec)
      text = run.lower(x, x, x).compile().as_text()
    print('all-to-all' in text, 'all-gather' in text, 'all-reduce' in text)
  """)
  assert out.split() == ['True', 'False', 'False']


def test_a_frozen_past_gets_no_gradient_on_a_mesh_and_all_else_is_that_of_one_device():
  """Splash, interpreted: of 300 keys in three blocks 140 are trained, so that the third block is passed over."""
  out = on_eight_devices("""
    import jax, jax.numpy as jnp, numpy as np
    from salt_jax import sharding
    from salt_jax.models import attention
    mesh = sharding.make_mesh({'data': 2, 'fsdp': 1, 'context': 2, 'tensor': 2})
    kernel = attention.Kernel('splash', (128, 128, 128), interpret=True)
    key, valid = jax.random.key(0), jnp.arange(300) % 3 > 0
    shapes = (2, 140, 4, 128), (2, 300, 4, 128), (2, 300, 4, 128)
    args = [jax.random.normal(jax.random.fold_in(key, i), s) for i, s in enumerate(shapes)]

    def loss(args, kernel, trained):
      return jnp.sum(jnp.sin(attention.attend(*args, valid, kernel, trained)))

    run = jax.jit(jax.grad(loss), static_argnums=(1, 2))
    one = run(args, attention.DENSE, None)
    with jax.set_mesh(mesh):
      q, *rest = run(args, kernel, 140)
    largest = lambda x: float(jnp.abs(x).max())
    apart = [largest(q - one[0]), *(largest(x[:, :140] - y[:, :140]) for x, y in zip(rest, one[1:]))]
    print(max(apart) < 5e-6 * max(map(largest, one)), [largest(x[:, 140:]) for x in rest])
  """)
  assert out.split(maxsplit=1) == ['True', '[0.0, 0.0]\n']


@pytest.mark.parametrize(
  'sizes, changes, words',
  [
    (dict(context=8), {}, 'model.heads=4 cannot be split over mesh.tensor x mesh.context = 1 x 8'),
    (dict(tensor=2, context=4), {}, '2 x 4: make their product a divisor of the heads.'),
    (dict(context=4), {'video.height': 48, 'video.width': 48}, 'the 9 tokens of a frame cannot be'),
    (dict(data=8), {'batch': 4}, 'batch=4 cannot be split over data x fsdp = 8 shards'),
  ],
)
def test_a_mesh_that_does_not_fit_is_refused(sizes, changes, words):
  config = selfforcing.get_config('nano')
  config.update_from_flattened_dict(changes)
  mesh = type('Mesh', (), {'shape': dict(data=1, fsdp=1, context=1, tensor=1) | sizes})
  with pytest.raises(InputError) as error:
    splits.check_mesh(config, mesh)
  assert words in str(error.value) and '\n' not in str(error.value)


def test_the_rules_split_heads_and_hidden_units_by_tensor():
  out = on_eight_devices("""
    import jax
    from configs import base
    from salt_jax import sharding, weights
    from salt_jax.models import wan
    mesh = sharding.make_mesh({'data': 1, 'fsdp': 2, 'context': 2, 'tensor': 2})
    blocks = weights.shapes('dit', wan.wan_1_3b())['blocks']
    placed = sharding.shardings({'blocks': blocks}, mesh, base.RULES)['blocks']
    for path in ('self_attn/q', 'cross_attn/o', 'ffn_0', 'ffn_2', 'cross_attn/k'):
      node = placed
      for key in path.split('/'):
        node = node[key]
      print(path, *node['kernel'].spec, sep='|')
  """)
  rest = "('fsdp', 'context')"
  assert out.splitlines() == [
    f'self_attn/q|None|{rest}|tensor',
    f'cross_attn/o|None|tensor|{rest}',
    f'ffn_0|None|{rest}|tensor',
    f'ffn_2|None|tensor|{rest}',
    f'cross_attn/k|None|{rest}|tensor',
  ]


def test_real_sizes_have_rules_for_every_path():
  config = selfforcing.get_config('1.3b')
  assert config.rules == base.RULES and config.mesh.fsdp == -1
  assert sharding.AXES == ('data', 'fsdp', 'context', 'tensor')
