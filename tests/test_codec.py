"""Videos in parts are whole videos, and a part at a real size is small."""

import dataclasses
import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from salt_jax import codec, codec_memory
from salt_jax.diffusion.conditioning import FIRST, FIRST_AND_LAST, known_video
from salt_jax.errors import InputError
from salt_jax.models import vae
from salt_jax.step import to_bytes, to_unit
from tests.processes import devices_of
from tests.test_vae import EXACT, TINY, encode, normal, perturbed, tiny_params

LATENTS = normal(1, 2, 7, 3, 2, 16)
# One halving: quick to compile on several devices, and every kind of layer is there.
SHALLOW = dataclasses.replace(TINY, dim_mult=(1, 2), temporal_downsample=(True,))
# Of four devices all split the columns; or two split the rows, and the others have another clip.
SIZES = ((3, 8), (6, 3))
VIDEO = np.random.default_rng(0).integers(0, 256, (2, 25, 24, 16, 3)).astype(np.uint8)


def clips(rows, columns):
  """Latents of 2 x 2 frames, and a video of 2 x 3."""
  video = np.random.default_rng(columns).integers(0, 256, (2, 3, 2 * rows, 2 * columns, 3))
  return normal(rows, 2, 2, rows, columns, 16), video.astype(np.uint8)


@functools.cache
def shallow_params():
  return perturbed(vae.param_shapes(SHALLOW))


@functools.cache
def _whole():
  return np.asarray(jax.jit(lambda p, z: to_bytes(vae.decode(p, z, TINY)))(tiny_params(), LATENTS))


@pytest.mark.parametrize('part', [1, 3, 20])
def test_a_video_decoded_in_parts_is_the_whole_video(part):
  got = codec.decode(tiny_params(), LATENTS, TINY, part)
  assert got.dtype == np.uint8 and got.shape == (2, 25, 24, 16, 3) and got.std() > 5
  # Sums in another order may tip a pixel over to the next of 256 levels, and rarely.
  gap = np.abs(got.astype(int) - _whole())
  assert gap.max() <= 1 and (gap > 0).mean() < 1e-3


@pytest.mark.parametrize('part', [1, 3, 20])
def test_a_video_encoded_in_parts_is_the_whole_video(part):
  got = codec.encode(tiny_params(), VIDEO, TINY, part)
  np.testing.assert_allclose(got, encode(tiny_params(), to_unit(VIDEO), TINY), **EXACT)


@pytest.mark.parametrize('where', [FIRST, FIRST_AND_LAST])
@pytest.mark.parametrize('part', [1, 20])
def test_known_frames_in_grey_are_their_known_video(part, where):
  images = VIDEO[:, : len(where)]
  got = codec.encode_known(tiny_params(), images, 25, TINY, part)
  known = known_video(to_unit(images), 25, where)
  np.testing.assert_allclose(got, encode(tiny_params(), known, TINY), **EXACT)


@pytest.fixture(scope='module')
def split(tmp_path_factory):
  output = tmp_path_factory.mktemp('split') / 'found.npz'
  command = [sys.executable, '-m', 'tests.split_codec', str(output)]
  subprocess.run(command, env=os.environ | devices_of(4), check=True, timeout=300)
  return np.load(output)


@pytest.mark.parametrize('rows, columns', SIZES)
def test_frames_split_over_devices_are_whole_frames(split, rows, columns):
  """A halo that is not fetched, or an attention within a part, changes whole columns by tens of levels."""
  (latents, video), params = clips(rows, columns), shallow_params()
  got, want = split[f'decoded_{rows}_{columns}'], codec.decode(params, latents, SHALLOW)
  gap = np.abs(got.astype(int) - want)
  assert got.std() > 5 and gap.max() <= 1 and (gap > 0).mean() < 1e-2
  want = codec.encode(params, video, SHALLOW)
  np.testing.assert_allclose(split[f'encoded_{rows}_{columns}'], want, **EXACT)


def test_frames_that_make_no_latents_are_refused():
  with pytest.raises(InputError, match='7 frames cannot be encoded'):
    codec.encode(tiny_params(), VIDEO[:, :7], TINY)


def test_a_nano_clip_is_one_part_and_a_wan_clip_21():
  assert codec.latents_at_once(8, 8) >= 21
  assert codec.latents_at_once(60, 104) == codec.latents_at_once(90, 160) == 1
  assert list(codec.spans((1, 81, 64, 64, 3), TINY)) == [(0, 81)]
  parts = list(codec.spans((1, 81, 480, 832, 3), TINY))
  assert parts[:3] == [(0, 1), (1, 5), (5, 9)] and parts[-1] == (77, 81) and len(parts) == 21


def test_no_array_of_a_part_at_480p_grows_with_the_video():
  """Every value inside a part's decoder has at most the four frames of one latent, and two of history."""
  cfg = vae.wan_vae()
  z = jax.ShapeDtypeStruct((1, 1, 60, 104, 16), jnp.float32)
  cache = jax.eval_shape(lambda: vae.init_decode_cache(cfg, 1, 60, 104))
  call = functools.partial(vae.decode_chunk, cfg=cfg, first=False)
  jaxpr = jax.make_jaxpr(call)(vae.param_shapes(cfg), z, cache)
  largest = max(v.aval.size for eqn in jaxpr.eqns for v in eqn.outvars)
  assert largest <= 6 * 480 * 832 * 192


@pytest.mark.parametrize('encode', [False, True])
def test_the_memory_of_a_part_is_at_least_what_it_carries(encode):
  made = codec_memory.lowered(jax.devices()[:1], (8, 12), 1, SHALLOW, encode).compile()
  found = codec_memory.figures(made)
  empty = vae.init_encode_cache if encode else vae.init_decode_cache
  carried = jax.eval_shape(lambda: empty(SHALLOW, 1, *((8, 12) if encode else (4, 6))))
  size = sum(4 * x.size for x in jax.tree.leaves(carried))
  assert found['kept'] * 2**30 >= size and found['temporary'] > 0
  assert found['all'] == found['kept'] + found['temporary']
