"""Frames that condition a clip: mask and latents against diffusers' I2V pipeline, by both of its forms."""

import types

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from salt_jax import convert
from salt_jax.diffusion import conditioning, flow
from salt_jax.errors import InputError
from salt_jax.models import vae, wan
from tests import tiny

TINY = dict(base_dim=4, num_res_blocks=1)
FRAMES, HEIGHT, WIDTH = 13, 16, 32


def test_mask_of_the_first_frame_and_of_both_ends():
  np.testing.assert_array_equal(conditioning.known_mask(3), [[1, 1, 1, 1], [0] * 4, [0] * 4])
  both = conditioning.known_mask(3, conditioning.FIRST_AND_LAST)
  np.testing.assert_array_equal(both, [[1, 1, 1, 1], [0] * 4, [0, 0, 0, 1]])


def _theirs(model, images):
  """What diffusers' pipeline puts behind the latents: `[b c f h w]`."""
  pipe = types.SimpleNamespace(
    vae=model,
    vae_scale_factor_temporal=4,
    vae_scale_factor_spatial=8,
    config=types.SimpleNamespace(expand_timesteps=False),
  )
  first, *last = torch.from_numpy(np.moveaxis(images, -1, 2).copy()).unbind(1)
  noise = torch.zeros(images.shape[0], 16, 1 + FRAMES // 4, HEIGHT // 8, WIDTH // 8)
  with torch.no_grad():
    return diffusers.WanImageToVideoPipeline.prepare_latents(
      pipe,
      first,
      images.shape[0],
      16,
      HEIGHT,
      WIDTH,
      FRAMES,
      torch.float32,
      'cpu',
      latents=noise,
      last_image=last[0] if last else None,
    )[1].numpy()


@pytest.mark.parametrize('known', [conditioning.FIRST, conditioning.FIRST_AND_LAST])
def test_parity_with_the_pipeline_of_diffusers(known):
  torch.manual_seed(0)
  model = diffusers.AutoencoderKLWan(**TINY).eval()
  tensors = {k: v.numpy() for k, v in model.state_dict().items()}
  params = convert.from_wan(convert.rename(tensors, 'vae', 'diffusers'), 'vae')
  cfg = vae.VAEConfig(**vae.wan_vae().__dict__ | dict(dim=4, num_res_blocks=1))
  shape = (1, len(known), HEIGHT, WIDTH, 3)
  images = np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)

  @jax.jit
  def ours(params, images):
    video = conditioning.known_video(images, FRAMES, known)
    return conditioning.condition(vae.encode(params, video, cfg), known)

  got, expected = np.moveaxis(np.asarray(ours(params, images)), -1, 1), _theirs(model, images)
  assert got.shape == expected.shape == (1, 20, 4, 2, 4) and got[:, 4:].std() > 0.05
  np.testing.assert_array_equal(got[:, :4], expected[:, :4])
  # The VAE's parity, divided by deviations of 1.4 and more.
  np.testing.assert_allclose(got[:, 4:], expected[:, 4:], atol=1e-4)


def test_as_many_images_as_places():
  with pytest.raises(InputError, match='1 images cannot be 2 frames of a video'):
    conditioning.known_video(jnp.zeros((1, 1, 8, 8, 3)), 5, conditioning.FIRST_AND_LAST)


def test_paired_prompts_keep_their_order_and_must_be_of_one_kind():
  cond, uncond = tiny.prompt(tiny.I2V), tiny.prompt(tiny.I2V, seed=1)
  both = flow.paired(cond, uncond)
  for name in ('text', 'image', 'frames'):
    whole = getattr(both, name)
    np.testing.assert_array_equal(whole[: tiny.BATCH], getattr(cond, name))
    np.testing.assert_array_equal(whole[tiny.BATCH :], getattr(uncond, name))
  with pytest.raises(TypeError):
    flow.paired(cond, wan.Prompt(uncond.text))
