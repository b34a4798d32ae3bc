"""Planning: memory and programs of slices, down to real sizes, and what is reported of them."""

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
  checks,
  estimate,
  flops,
  kept,
  lowered,
  outline,
  plan,
  recipe,
  sharding,
  slices,
  splits,
)
from salt_jax.errors import InputError
from tests import commands, tiny_config
from tests.test_sharding import ONE
from tests.test_slices import over

pytestmark = pytest.mark.usefixtures('compiler')


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  return tiny_config.write_weights(str(tmp_path_factory.mktemp('weights')))


# Memory.


def _program(size, held=1024):
  """A program that keeps `size` bytes of its own."""
  mesh = over('v5e-4')
  x = jax.ShapeDtypeStruct((held // 4,), jnp.float32, sharding=NamedSharding(mesh, P()))
  side = int((size / 4) ** 0.5)

  def f(x):
    y = jnp.outer(jnp.arange(side) * x[0], jnp.arange(side) * x[1])
    return jnp.sort(y @ y, axis=0)[0].sum() + x.sum()

  return lowered.Program('sample', lambda: jax.jit(f).lower(x), 4, 4, [], 1.0, 0, 0, x)


def _reported(program, reports=None, name='v5e-4'):
  config = selfforcing.get_config('nano')
  slice_ = slices.parse(name)
  mesh = sharding.make_mesh(ONE | {'fsdp': -1}, slices.devices(slice_))
  return estimate.report(program, config, mesh, slice_, reports)


def test_a_program_that_needs_too_much_is_a_report():
  made = _reported(_program(2**36))
  assert not made.fits and made.seconds is None
  assert made.needed > 2**36 and made.usable == 15.75 * 2**30
  assert 'batch=' in made.change or 'slice' in made.change
  small = _reported(_program(2**26))
  assert small.fits and 2**26 < small.needed < 2**30 and not small.change


def test_what_is_needed_is_all_that_lives_at_once():
  """Two arguments of 1 GiB, and a result of that size, which may take the place of one of them."""
  where = NamedSharding(over('v5e-4'), P())
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
  where, side = NamedSharding(over('v5e-4'), P()), 126 * 128
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


@pytest.mark.parametrize('fits', [True, False])
def test_an_equal_program_is_compiled_once(fits, tmp_path, monkeypatch):
  compiled = []

  def compiling(blank, program, traced, slice_, began):
    compiled.append(program)
    made = dataclasses.replace(blank, fits=fits, needed=2.0**36, compiling=(3.0, 4.0))
    made = dataclasses.replace(made, arguments=2.0, temporaries=3.0, forward=1e15)
    return dataclasses.replace(made, seconds=estimate.seconds(made, slice_) if fits else None)

  monkeypatch.setattr(estimate, '_compiled', compiling)
  folder = str(tmp_path / 'kept')
  (tmp_path / 'kept').mkdir()
  first = _reported(_program(2**26), kept.Reports(folder))
  again = _reported(_program(2**26), kept.Reports(folder))
  assert len(compiled) == 1 and again == first and bool(first.change) == (not fits)
  monkeypatch.setattr(estimate, 'REACHED', estimate.REACHED / 2)
  slower = _reported(_program(2**26), kept.Reports(folder))
  assert len(compiled) == 1 and (not fits or slower.seconds.likely > 1.9 * first.seconds.likely)
  # Whatever a report rests on makes it another one.
  one, told = _program(2**26), (('xla_tpu_scoped_vmem_limit_kib', '32768'),)
  others = (one._replace(options=told), one._replace(passes=2.0), one._replace(clips=8))
  for program in (_program(2**28), *others):
    _reported(program, kept.Reports(folder))
  _reported(one, kept.Reports(folder), 'v6e-4')
  monkeypatch.setenv('LIBTPU_INIT_ARGS', '--xla_tpu_scoped_vmem_limit_kib=16384')
  _reported(one, kept.Reports(folder))
  assert len(compiled) == 7
  for damaged in ('{', '{}', 'null'):
    for path in (tmp_path / 'kept').iterdir():
      path.write_text(damaged)
    with pytest.raises(InputError, match='is no kept report .*: delete it'):
      _reported(one, kept.Reports(folder))


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


# Advice, and that it can be followed.

STREAMING = '1.3b,backbone=longlive,streaming'


def _advised(config, name, *, needed, cache=0.0, program='generator'):
  """What is said on a slice of a program whose networks take 400 bytes; and does it to the config."""
  mesh = sharding.make_mesh(config.mesh, slices.devices(slices.parse(name)))
  networks = jax.ShapeDtypeStruct((100,), jnp.float32, sharding=NamedSharding(mesh, P()))
  shards, trains = mesh.shape['fsdp'], program != 'sample'
  clips = config.batch if trains else shards
  made = lowered.Program(program, None, clips, shards, [], 1.0, int(trains), 2, networks, cache)
  words = estimate._advice(config, made, mesh, made.held, needed)
  for key, value in re.findall(r'--config\.([\w.]+)=(\d+)', words):
    config.update_from_flattened_dict({key: int(value)})
  return words


@pytest.mark.parametrize(
  'arg, name, asked, words',
  [
    ('14b', 'v5p-32', dict(needed=900.0, cache=500.0), 'or set --config.accumulate=4.'),
    ('14b', 'v5p-32', dict(needed=700.0), 'a smaller teacher or a smaller batch.'),
    (STREAMING, 'v5p-64', dict(needed=900.0), 'or set --config.batch=32.'),
    ('14b', 'v5p-128', dict(needed=900.0), 'fsdp=32 and --config.accumulate=2.'),
    (STREAMING, 'v5p-128', dict(needed=900.0), 'context=2.'),
    ('14b', 'v5p-128', dict(needed=900.0, program='sample'), 'context=2.'),
  ],
)
def test_advice_is_for_the_largest_part_and_can_be_followed(arg, name, asked, words):
  config = selfforcing.get_config(arg)
  assert _advised(config, name, **asked).endswith(words)
  checks.check(config)
  splits.check_mesh(config, sharding.make_mesh(config.mesh, slices.devices(slices.parse(name))))


def test_clips_that_heads_cannot_split_further_are_told_so():
  config = selfforcing.get_config('1.3b')
  config.mesh.update(fsdp=64, context=4)
  said = _advised(config, 'v5e-256', needed=900.0)
  assert said.endswith('take devices with more memory, or shorter or smaller clips.')


def test_half_of_a_batch_has_twice_the_devices_a_clip():
  config = selfforcing.get_config('14b')
  config.accumulate = 2
  sized = plan.meshed(config, slices.parse('v5e-256'))
  assert dict(sized.mesh) == {'data': 1, 'fsdp': 32, 'context': 8, 'tensor': 1}


def test_parts_that_do_not_divide_a_batch_end_the_search_before_it_begins():
  config = selfforcing.get_config('14b')
  config.accumulate = 3
  with pytest.raises(InputError, match='^batch=64 cannot be taken in accumulate=3 parts'):
    plan.smallest(config, 'v5e-256')


def test_a_part_has_a_part_of_the_clips_and_of_the_cache(folder):
  programs, host = [], slices.devices(slices.parse('v5e-4'))
  for parts in (1, 2):
    config = tiny_config.get_config(folder)
    config.accumulate, config.mesh = parts, ONE | {'fsdp': 4}
    mesh = sharding.make_mesh(config.mesh, host)
    programs.append(lowered.of_config(config, recipe.build(config), mesh, host))
  one, two = programs
  assert one['critic'].at_once == 2 * two['critic'].at_once == 2
  assert one['critic'].cache == 2 * two['critic'].cache > 0
  assert one['sample'].cache == two['sample'].cache and two['sample'].at_once == 1


# The program.


def _fake(program, config, mesh, slice_, reports):
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
  for wrong in ('{}', '[]', 'null', '{"programs": [1]}', path.read_text()[:-9]):
    path.write_text(wrong)
    for read in (plan.table, plan.check_json):
      with pytest.raises(InputError, match='one.json is no file of --json .*: delete it'):
        read(str(tmp_path if read is plan.table else path))
  path.write_text('{"programs": []}')
  with pytest.raises(InputError, match='write it again'):
    plan.table(str(tmp_path))


def test_figures_are_written_whole_or_not_at_all(tmp_path):
  path = tmp_path / 'one.json'
  kept.write(str(path), {'a': 1})
  with pytest.raises(TypeError):
    kept.write(str(path), {'a': 2, 'b': object()})
  assert json.loads(path.read_text()) == {'a': 1}


def test_where_the_figures_cannot_go_is_said_before_anything_is_compiled(
  programs, monkeypatch, capsys, tmp_path
):
  monkeypatch.setattr(plan.slices, 'prepare', None)
  command = [commands.NANO, '--slice=v5p-8', f'--json={tmp_path}']
  said = commands.refusal(programs['plan'], command, monkeypatch, capsys)
  assert said == f'salt_jax: --json={tmp_path} is a folder: name a file in it.'


def test_a_damaged_finding_ends_a_search_and_is_not_taken_for_a_slice_that_is_too_small(
  folder, monkeypatch
):
  def damaged(program, config, mesh, *rest):
    if mesh.size == 16:
      raise InputError('x.json is no kept report: delete it.')
    return _fake(program, config, mesh, *rest)

  monkeypatch.setattr(estimate, 'report', damaged)
  with pytest.raises(InputError, match='no kept report'):
    plan.smallest(tiny_config.get_config(folder), 'v5e')


def test_nothing_that_fits_is_said_in_a_sentence(folder, monkeypatch):
  monkeypatch.setattr(estimate, 'report', _fake)
  config = tiny_config.get_config(folder)
  config.batch = 512
  with pytest.raises(
    InputError, match='fits no v5e slice of up to 256 chips: take a larger slice.'
  ):
    plan.smallest(config, 'v5e-128')


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


@pytest.fixture
def hasty():
  """The compiler does without what makes programs fast, which is a third of the work."""
  before = jax.config.jax_optimization_level
  jax.config.update('jax_optimization_level', 'O0')
  yield
  jax.config.update('jax_optimization_level', before)


def test_sampling_at_a_real_size_compiles_and_fits(hasty):
  config = dmd.get_config('1.3b,method=dmd')
  config.mesh.fsdp = 4
  (made,) = _planned(config, 'v4-8', 'sample')
  rec = recipe.build(config, ('tpu', 'TPU v4'))
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


def test_decoding_is_planned_for_a_host_by_itself(monkeypatch):
  hosts = []
  monkeypatch.setattr(lowered, 'of_config', lambda *given: hosts.append(given[-1]) or {})
  plan.plan(selfforcing.get_config('1.3b'), slices.parse('v6e-64'))
  assert [device.id for device in hosts[0]] == [0, 1, 2, 3]
