"""What a compiled program says of itself: collectives and executed FLOPs, counted in another way here."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from salt_jax import flops, hlo, lowered, recipe, sharding, slices
from tests import tiny_config
from tests.test_sharding import ONE
from tests.test_slices import over

pytestmark = pytest.mark.usefixtures('compiler')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tiny_config.write_weights(str(tmp_path_factory.mktemp('weights')))


def _compiled(f, mesh, specs, out, *shapes):
  structs = [
    jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))
    for (shape, dtype), spec in zip(shapes, specs, strict=True)
  ]
  jitted = jax.jit(f, out_shardings=jax.tree.map(lambda s: NamedSharding(mesh, s), out))
  return jitted.lower(*structs).compile().as_text()


LAYERS, WIDTH = 6, 512


def _gathered(x, weights, mesh, trips=None):
  """A scan that gathers one layer's weights at a time; `trips` times over if given."""

  def layer(x, w):
    w = jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P()))
    return jnp.tanh(x @ w), None

  def once(_, x):
    return jax.lax.scan(layer, x, weights)[0]

  return once(0, x) if trips is None else jax.lax.fori_loop(0, trips, once, x)


def test_gathers_of_a_scan_are_those_of_its_parameters():
  mesh = over('v5p-8')
  shapes = (((64, WIDTH), jnp.bfloat16), ((LAYERS, WIDTH, WIDTH), jnp.bfloat16))
  text = _compiled(
    functools.partial(_gathered, mesh=mesh), mesh, (P('fsdp'), P(None, 'fsdp')), P('fsdp'), *shapes
  )
  found = hlo.collectives(text)
  size = LAYERS * WIDTH * WIDTH * 2
  assert {one.group for one in found} == {(0, 1, 2, 3)}
  (kind,) = hlo.summed(found).items()
  assert kind[0] == 'all-gather' and kind[1]['bytes'] == pytest.approx(size)
  assert kind[1]['sent'] == pytest.approx(size * 3 / 4)


def test_a_gather_that_goes_on_behind_other_work_counts_once():
  """A v5e begins to gather the next weight while it multiplies by this one."""
  mesh = over('v5e-16')

  def layer(x, weights):
    for w in weights:
      x = jnp.tanh(x @ jax.lax.with_sharding_constraint(w, NamedSharding(mesh, P())))
    return x, None

  shapes = (((512, 1024), jnp.bfloat16), *[((LAYERS, 1024, 1024), jnp.bfloat16)] * 3)
  text = _compiled(
    lambda x, *weights: jax.lax.scan(layer, x, weights)[0],
    mesh,
    (P('fsdp'), *[P(None, 'fsdp')] * 3),
    P('fsdp'),
    *shapes,
  )
  assert 'AsyncCollectiveStart' in text, 'nothing is gathered behind other work: this says nothing'
  found = hlo.summed(hlo.collectives(text))
  assert {kind: row['count'] for kind, row in found.items()} == {'all-gather': 3 * LAYERS}
  assert found['all-gather']['bytes'] == 3 * LAYERS * 1024 * 1024 * 2


def test_links_of_a_chain_in_a_loop_are_that_one_gather(monkeypatch):
  """As in the two chains here, of which one passes through a loop of four; what has no chain counts each time."""

  def gather(channel, chain, times):
    rest = f'%a), channel_id={channel}, replica_groups={{{{0,1}}}}, chain_id={chain}'
    return 'fusion', hlo.Instruction('a', 'f32[8]', 'all-gather', rest), times

  links = [gather(1, '"0"', n) for n in (6, 24, 6)] + [gather(2, '"0"', 3), gather(2, '"0"', 3)]
  monkeypatch.setattr(
    hlo, 'executed', lambda *_: [*links, gather(3, 'none', 5), gather(3, 'none', 5)]
  )
  assert sorted(one.times for one in hlo.collectives('')) == [3, 5, 5, 6]


def test_a_loop_of_unknown_length_counts_as_often_as_is_said():
  mesh = over('v5p-8')
  shapes = (((64, WIDTH), jnp.bfloat16), ((LAYERS, WIDTH, WIDTH), jnp.bfloat16), ((), jnp.int32))
  f = lambda x, w, trips: _gathered(x, w, mesh, trips)  # noqa: E731
  text = _compiled(f, mesh, (P('fsdp'), P(None, 'fsdp'), P()), P('fsdp'), *shapes)
  size = LAYERS * WIDTH * WIDTH * 2
  for loops in (1, 2.5):
    found = hlo.summed(hlo.collectives(text, loops))['all-gather']
    # The compiler may gather what the loop does not change before it.
    assert found['bytes'] == pytest.approx(loops * size) or found['bytes'] == pytest.approx(size)


def test_a_switch_in_a_loop_counts_each_branch_as_often_as_the_others():
  """A loop over three chunks, each of which gathers another number of rows."""
  mesh = over('v5p-8')

  def f(x, w):
    def some(rows):
      whole = lambda w: jax.lax.with_sharding_constraint(w[:rows], NamedSharding(mesh, P()))  # noqa: E731
      return lambda x, w: jnp.tanh(x @ whole(w).T).sum(1, keepdims=True) + x

    branches = [some(128 * (i + 1)) for i in range(3)]
    return jax.lax.fori_loop(0, 3, lambda i, x: jax.lax.switch(i, branches, x, w), x)

  shapes = (((64, WIDTH), jnp.bfloat16), ((WIDTH, WIDTH), jnp.bfloat16))
  text = _compiled(f, mesh, (P('fsdp'), P(None, 'fsdp')), P('fsdp'), *shapes)
  found = hlo.summed(hlo.collectives(text))['all-gather']
  assert found['count'] == pytest.approx(3)
  assert found['bytes'] == pytest.approx((1 + 2 + 3) * 128 * WIDTH * 2)


def test_gradients_of_split_parameters_are_scattered():
  """A product whose contraction is split leaves partial sums: one sum for what is whole, or a scattered one."""
  mesh = over('v5p-8')
  shapes = (((256, WIDTH), jnp.float32), ((256, WIDTH), jnp.float32))
  for out, kind in ((P(), 'all-reduce'), (P('fsdp'), 'reduce-scatter')):
    text = _compiled(lambda a, b: a.T @ b, mesh, (P('fsdp'), P('fsdp')), out, *shapes)
    found = hlo.summed(hlo.collectives(text))
    assert set(found) == {kind}
    size, factor = WIDTH * WIDTH * 4, 2 if kind == 'all-reduce' else 1
    assert found[kind] == {'count': 1, 'bytes': size, 'sent': size * factor * 3 / 4}


def test_traffic_between_slices_is_told_apart():
  mesh = Mesh(np.array(slices.devices(slices.parse('2xv5p-8'))).reshape(2, 4), ('data', 'fsdp'))
  shapes = (((256, WIDTH), jnp.float32), ((256, WIDTH), jnp.float32))
  spec = P(('data', 'fsdp'))
  text = _compiled(lambda a, b: a.T @ b, mesh, (spec, spec), P(), *shapes)
  # Each slice sums what it has first, so a device hands on a quarter of the result.
  assert hlo.crossing(text, 2) == pytest.approx(WIDTH * WIDTH * 4 / 4)
  assert {one.group for one in hlo.collectives(text)} == {(0, 1, 2, 3)}
  text = _compiled(lambda a, b: a.T @ b, mesh, (P('fsdp'), P('fsdp')), P(), *shapes)
  assert hlo.crossing(text, 2) == 0


@pytest.mark.parametrize(
  'groups, first',
  [
    ('replica_groups={{0,2},{1,3}}, x', (0, 2)),
    ('replica_groups=[2,2]<=[4], x', (0, 1)),
    ('replica_groups=[2,2]<=[2,2]T(1,0), x', (0, 2)),
    ("replica_groups=mesh['a'=2,'b'=4] {'b'}, x", (0, 1, 2, 3)),
    ("replica_groups=mesh['a'=2,'b'=4] {'a'}, x", (0, 4)),
    ("replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}, x", (0, 2)),
    ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}, x", (0, 2)),
    ("replica_groups=mesh['a'=2,'b'=4] {'b':(2)2}, x", (0, 1)),
    ('source_target_pairs={{0,0},{2,1},{1,2},{3,3}}, x', (2, 1)),
  ],
)
def test_groups_are_read_in_every_way_of_writing_them(groups, first):
  one = hlo.Instruction('a', 'f32[2]', 'all-gather', f'%b), channel_id=1, {groups}')
  assert hlo._group(one) == first


def _products(text, loops):
  """FLOPs of the products in a compiled program: twice the result times the contracted axes."""
  total, bodies = 0.0, hlo._computations(text)[1]
  for where, one, times in hlo.executed(text, loops):
    if one.code == 'dot':
      shapes = {i.name: hlo._parsed(i.shape)[0][1] for i in bodies[where] if hlo._parsed(i.shape)}
      axes = re.search(r'lhs_contracting_dims=\{([\d,]*)\}', one.rest)[1]
      left = shapes[hlo._operands(one)[0]]
      terms = math.prod(left[int(axis)] for axis in axes.split(',') if axis)
      total += times * 2 * terms * math.prod(hlo._parsed(one.shape)[0][1])
  return total


@pytest.mark.parametrize(
  'chunk, remat', [pytest.param(6, False, marks=pytest.mark.slow), (3, True)]
)
def test_what_is_executed_is_what_the_formula_says(chunk, remat, folder):
  config = tiny_config.get_config(folder)
  config.batch = 2
  config.update_from_flattened_dict(
    {
      'losses.consistency': 0.0,
      'losses.alignment': 0.0,
      'schedule.steps': (4,),
      'schedule.probs': (1.0,),
      'rollout.chunk': chunk,
      'model.remat': remat,
    }
  )
  rec = recipe.build(config)
  mesh = sharding.make_mesh(ONE, jax.devices()[:1])
  for name, program in lowered.of_config(config, rec, mesh, jax.devices()[:1]).items():
    if name not in ('generator', 'critic'):
      continue
    found = _products(program.lower().compile().as_text(), program.passes) / config.batch
    formula, again, _ = (sum(part[i] for part in program.parts) for i in (1, 2, 3))
    assert (again > 0) == remat
    assert 0.9 * formula < found <= 1.1 * formula + again, (name, found / formula)


def test_forward_and_backward_are_told_apart(folder):
  rec = recipe.build(tiny_config.get_config(folder))
  parts = {part.name: part for part in flops.critic_step(rec)}
  assert parts['critic'].backward == pytest.approx(2 / 3 * parts['critic'].flops)
  assert parts['rollout'].backward == 0
  for part in flops.generator_step(rec):
    assert 0 <= part.backward < part.flops
