"""Planning: what is compiled is what a run would compile, and what is reported of it is counted in another way here."""

import dataclasses
import functools
import json
import math
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from configs import dmd, selfforcing
from salt_jax import (
  estimate,
  flops,
  hlo,
  lowered,
  outline,
  plan,
  recipe,
  sharding,
  slices,
  stages,
  train,
)
from salt_jax.data import Feed
from salt_jax.errors import InputError
from tests import tiny_config

ONE = {'data': 1, 'fsdp': 1, 'context': 1, 'tensor': 1}


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tiny_config.write_weights(str(tmp_path_factory.mktemp('weights')))


@pytest.fixture(scope='module', autouse=True)
def compiler():
  slices.prepare()


# What is planned is what would run.


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


# Slices.


@pytest.mark.parametrize(
  'name, chips, devices, slice_count',
  [
    ('v5p-8', 4, 4, 1),
    ('v5p-64', 32, 32, 1),
    ('v5e-1', 1, 1, 1),
    ('v5e-64', 64, 64, 1),
    ('v6e-8', 8, 8, 1),
    ('tpu7x-8', 4, 8, 1),
    ('v4-8', 4, 4, 1),
    ('2xv5p-8', 8, 8, 2),
  ],
)
def test_a_slice_has_its_devices(name, chips, devices, slice_count):
  slice_ = slices.parse(name)
  assert (slice_.name, slice_.chips, slice_.count) == (name, chips, slice_count)
  found = slices.devices(slice_)
  assert len(found) == slice_.devices == devices
  assert {d.device_kind for d in found} == {slice_.generation.kind}
  assert slice_.generation.kind in flops.PEAK_FLOPS
  assert len({getattr(d, 'slice_index', 0) for d in found}) == slice_count


@pytest.mark.parametrize(
  'name, host, devices',
  [
    ('v5e-1', 'v5e-1', 1),
    ('v6e-128', 'v6e-4', 4),
    ('2xv5p-64', 'v5p-8', 4),
    ('tpu7x-64', 'tpu7x-8', 8),
  ],
)
def test_a_host_by_itself_has_its_devices_numbered_from_0(name, host, devices):
  """Compiled for the numbers that its devices have in a large slice, decoding ends the process (libtpu 0.0.42)."""
  found = slices.parse(name).host
  assert found.name == host
  assert [d.id for d in slices.devices(found)] == list(range(devices))


@pytest.mark.parametrize(
  'name, near',
  [
    ('v5p-60', 'v5p-64, v5p-32, v5p-128'),
    ('v6e-9', 'v6e-8, v6e-16, v6e-4'),
    ('tpu7x', 'tpu7x-8, tpu7x-16, tpu7x-32'),
    ('0xv5e-8', 'v5e-8, v5e-4, v5e-16'),
    ('h100-8', ''),
    ('', ''),
  ],
)
def test_an_unknown_slice_is_told_those_nearest_to_it(name, near):
  with pytest.raises(InputError, match=f'the slice "{name}" is unknown: the nearest are {near}'):
    slices.parse(name)


def test_an_unknown_generation_is_told_those_there_are():
  with pytest.raises(InputError, match='choose one of v4, v5e, v5p, v6e, tpu7x'):
    slices.every('v7')


@pytest.mark.parametrize(
  'name, data, fsdp, context', [('v6e-128', 1, 64, 2), ('v6e-256', 1, 64, 4), ('2xv5p-16', 2, 4, 2)]
)
def test_a_mesh_has_every_device_once_and_data_over_the_slices(name, data, fsdp, context):
  devices = slices.devices(slices.parse(name))
  mesh = sharding.make_mesh(dict(data=data, fsdp=fsdp, context=context, tensor=1), devices)
  assert mesh.devices.shape == (data, fsdp, context, 1)
  assert set(mesh.devices.flat) == set(devices)
  for i, row in enumerate(mesh.devices):
    assert {getattr(d, 'slice_index', 0) for d in row.flat} == {i}


def test_slices_that_data_does_not_go_over_are_refused():
  devices = slices.devices(slices.parse('2xv5p-8'))
  with pytest.raises(InputError, match='cannot be laid over 2 slices: make data a multiple of 2.'):
    sharding.make_mesh(ONE | {'fsdp': -1}, devices)


# Collectives.


def _mesh(name='v5p-8', axis='fsdp'):
  return Mesh(np.array(slices.devices(slices.parse(name))), (axis,))


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
  mesh = _mesh()
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


def test_a_loop_of_unknown_length_counts_as_often_as_is_said():
  mesh = _mesh()
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
  mesh = _mesh()

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
  mesh = _mesh()
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


# FLOPs that are executed.


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
    found = _products(lowered.compiled(program).as_text(), program.passes) / config.batch
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


# Memory.


def _program(size, held=1024):
  """A program that keeps `size` bytes of its own."""
  mesh = _mesh('v5e-4')
  x = jax.ShapeDtypeStruct((held // 4,), jnp.float32, sharding=NamedSharding(mesh, P()))
  side = int((size / 4) ** 0.5)

  def f(x):
    y = jnp.outer(jnp.arange(side) * x[0], jnp.arange(side) * x[1])
    return jnp.sort(y @ y, axis=0)[0].sum() + x.sum()

  return lowered.Program('sample', lambda: jax.jit(f).lower(x), 4, 4, [], 1.0, 0, 0, x)


def _reported(program):
  config = selfforcing.get_config('nano')
  slice_ = slices.parse('v5e-4')
  mesh = sharding.make_mesh(ONE | {'fsdp': -1}, slices.devices(slice_))
  return estimate.report(program, config, mesh, slice_)


def test_a_program_that_needs_too_much_is_a_report():
  made = _reported(_program(2**36))
  assert not made.fits and made.seconds is None
  assert made.needed > 2**36 and made.usable == 15.75 * 2**30
  assert 'batch=' in made.change or 'slice' in made.change
  small = _reported(_program(2**26))
  assert small.fits and 2**26 < small.needed < 2**30 and not small.change


def test_what_is_needed_is_all_that_lives_at_once():
  """Two arguments of 1 GiB, and a result of that size, which may take the place of one of them."""
  where = NamedSharding(_mesh('v5e-4'), P())
  x, y = (jax.ShapeDtypeStruct((2**14, 2**14), jnp.float32, sharding=where) for _ in 'xy')

  def f(x, y):
    return x + y @ x

  for donated, gib in (((), 3), ((0,), 2)):
    program = lowered.Program(
      'sample', lambda d=donated: jax.jit(f, donate_argnums=d).lower(x, y), 4, 4, [], 1.0, 0, 0, ()
    )
    made = _reported(program)
    assert made.fits and made.arguments == 2**31
    assert gib <= (made.arguments + made.temporaries) / 2**30 < gib + 1.1, made


def test_what_the_compiler_accepts_fits():
  """By the sum of its arguments, results and temporaries this program would need 16.5 of 15.75 GiB."""
  where, side = NamedSharding(_mesh('v5e-4'), P()), 126 * 128
  x, layers = (
    jax.ShapeDtypeStruct(shape, jnp.float32, sharding=where)
    for shape in ((side, side), (3, side, side))
  )

  def loss(x, layers):
    def layer(x, w):
      h = jnp.tanh(x @ w)
      return h @ w.T + x, jnp.sum(h)

    x, sums = jax.lax.scan(layer, x, layers)
    return jnp.sum(x) + jnp.sum(sums)

  lower = functools.partial(jax.jit(jax.grad(loss)).lower, x, layers)
  made = _reported(lowered.Program('sample', lower, 4, 4, [], 1.0, 0, 0, ()))
  assert made.fits and 14 * 2**30 < made.needed < made.usable


def test_what_lies_on_the_device_is_counted_before_anything_is_compiled():
  program = _program(2**10, held=2**35)
  made = _reported(program._replace(lower=None))
  assert not made.fits and made.needed == 2**35
  assert 'networks and optimizer states alone take 32.0 GiB a device' in made.change


@pytest.mark.parametrize(
  'message, gib',
  [
    (
      'RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries (200.00G) exceeds '
      'available HBM (15.75G).',
      200,
    ),
    (
      'Ran out of memory in memory space hbm. Used 120.50G of 95.74G hbm. Exceeded hbm capacity by 24.76G.',
      120.5,
    ),
    ('Ran out of memory in memory space vmem. Used 17.00M of 16.00M vmem.', None),
  ],
)
def test_the_compiler_says_how_much_is_needed(message, gib):
  found = estimate.out_of_memory(message)
  assert found == (None if gib is None else pytest.approx(gib * 2**30))


def test_what_is_resident_is_what_shards_hold():
  mesh = Mesh(np.array(slices.devices(slices.parse('v5p-8'))), ('fsdp',))
  split, whole = NamedSharding(mesh, P(None, 'fsdp')), NamedSharding(mesh, P())
  tree = {
    'a': jax.ShapeDtypeStruct((6, 8), jnp.float32, sharding=split),
    'b': jax.ShapeDtypeStruct((5,), jnp.bfloat16, sharding=whole),
  }
  assert lowered.resident(tree) == 6 * 2 * 4 + 5 * 2


# The program.


def _fake(program, config, mesh, slice_):
  """Fits sixteen devices, unless the batch is large."""
  fits = mesh.size >= 16 > config.batch
  made = estimate._blank(program, mesh, slice_, 3 * 2**30)
  made = dataclasses.replace(made, fits=fits, change='' if fits else 'take a larger slice.')
  filled = dataclasses.replace(made, arguments=2.0**30, temporaries=2.0**31, code=0.0, forward=1e12)
  return dataclasses.replace(filled, seconds=estimate.seconds(filled, slice_)) if fits else made


def test_the_smallest_slice_is_found_and_written_down(folder, tmp_path, monkeypatch):
  monkeypatch.setattr(estimate, 'report', _fake)
  config = tiny_config.get_config(folder)
  sized, slice_, made, failed = plan.smallest(config, 'v5e')
  assert slice_.name == 'v5e-16' and [f['slice'] for f in failed] == ['v5e-1', 'v5e-4', 'v5e-8']
  # Eight clips over sixteen devices: each over two.
  assert dict(sized.mesh) == {'data': 1, 'fsdp': 8, 'context': 2, 'tensor': 1}
  assert [one.step for one in made] == ['generator', 'critic', 'sample', 'decode']
  text = plan.written(sized, slice_, made)
  assert (
    'generator fits: 3.00 of 15.75 GiB' in text and 'an iteration of training: at least' in text
  )
  record = plan.record(sized, slice_, made, failed)
  path = tmp_path / 'one.json'
  path.write_text(json.dumps({'command': 'tiny'} | record))
  head, _, row = plan.table(str(tmp_path)).splitlines()
  assert head.count('|') == row.count('|') and '| v5e-16 | 16 |' in row
  path.write_text('{}')
  with pytest.raises(InputError, match='write it again'):
    plan.table(str(tmp_path))


def test_nothing_that_fits_is_said_in_a_sentence(folder, monkeypatch):
  monkeypatch.setattr(estimate, 'report', _fake)
  config = tiny_config.get_config(folder)
  config.batch = 512
  with pytest.raises(
    InputError, match='fits no v5e slice of up to 256 chips: take a larger slice.'
  ):
    plan.smallest(config, 'v5e')


def test_a_mesh_that_does_not_divide_is_refused_before_anything_is_compiled(monkeypatch):
  monkeypatch.setattr(estimate, 'report', None)
  config = selfforcing.get_config()
  config.mesh.fsdp = 3
  with pytest.raises(InputError, match='fsdp=3, context=1, tensor=1 does not make up 4 devices'):
    plan.plan(config, slices.parse('v5p-8'))
  config.mesh.fsdp = -1
  config.batch = 6
  with pytest.raises(InputError, match='batch=6 cannot be split over data x fsdp = 4 shards'):
    plan.plan(config, slices.parse('v5p-8'))
  config.batch, config.model.attention = 64, 'cudnn'
  with pytest.raises(InputError, match='attention "cudnn" needs a gpu, and this is a tpu'):
    plan.plan(config, slices.parse('v5p-8'))


def test_the_table_of_the_readme_is_that_of_the_records():
  root = pathlib.Path(__file__).parents[1]
  assert plan.table(str(root / 'launch' / 'plans')) in (root / 'README.md').read_text()


# Real sizes.


def _planned(config, name, *programs):
  made = plan.plan(config, slices.parse(name), programs)
  assert [one.step for one in made] == list(programs)
  for one in made:
    assert one.fits, (one.step, one.change)
    # What is resident is part of what the compiler counts, and that of what there is.
    assert one.arguments < one.needed < one.usable
    assert one.collectives and one.seconds.least <= one.seconds.likely
  return made


def test_sampling_at_a_real_size_compiles_and_fits():
  config = dmd.get_config('1.3b,method=dmd')
  config.mesh.fsdp = 4
  (made,) = _planned(config, 'v5p-8', 'sample')
  rec = recipe.build(config, ('tpu', 'TPU v5'))
  # Four passes over a clip, 283 TFLOP each, and the prompt.
  assert made.forward == pytest.approx(sum(p.flops for p in flops.sampling(rec, 4)))
  assert 4 * 283e12 < made.forward < 4.05 * 283e12
  # Parameters are float32 and split over four devices, the encoder's are bfloat16.
  average = 4 * sum(
    math.prod(x.shape) for x in jax.tree.leaves(outline.trained(config, rec)['critic'])
  )
  encoder = sum(
    math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(outline.frozen(rec, ('text',)))
  )
  assert made.arguments == pytest.approx((average + encoder) / 4, rel=0.02)
  # Each pass gathers each layer's weights, so no less than these in bfloat16 is moved.
  assert sum(row['bytes'] for row in made.collectives.values()) > 4 * average / 2


@pytest.mark.slow
@pytest.mark.parametrize(
  'module, arg, name, program',
  [
    (dmd, '1.3b,method=dmd', 'v5p-128', 'critic'),
    (selfforcing, '1.3b', 'v5p-128', 'critic'),
    (selfforcing, '1.3b', 'v5p-128', 'generator'),
    (selfforcing, '1.3b', 'v6e-64', 'sample'),
    (selfforcing, '1.3b', 'v5e-16', 'decode'),
  ],
)
def test_steps_at_real_sizes_compile_in_time_and_fit(module, arg, name, program):
  slice_ = slices.parse(name)
  (made,) = _planned(plan.meshed(module.get_config(arg), slice_), name, program)
  assert made.compiling[1] < 2 * 300
