"""TPU slices by name, without a TPU: their devices, and the meshes over them."""

import numpy as np
import pytest
from jax.sharding import Mesh

from salt_jax import flops, sharding, slices
from salt_jax.errors import InputError
from tests.test_sharding import ONE

pytestmark = pytest.mark.usefixtures('compiler')


def over(name):
  """A mesh of one axis, fsdp, over all devices of a slice."""
  return Mesh(np.array(slices.devices(slices.parse(name))), ('fsdp',))


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
    ('v5p-²', 'v5p-8'),
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


def test_a_search_may_begin_at_a_slice():
  assert slices.candidates('v6e') == slices.every('v6e')
  names = [slice_.name for slice_ in slices.candidates('v6e-64')]
  assert names == ['v6e-64', 'v6e-128', 'v6e-256']
