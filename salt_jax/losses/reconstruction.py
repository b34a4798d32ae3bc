"""Training of the nano VAE: its loss, and what is done to its weights when training ends."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from salt_jax.errors import InputError
from salt_jax.models import vae

_LOGVAR = (-30.0, 20.0)


def _per_example(x):
  return x.mean(axis=tuple(range(1, x.ndim)))


def vae_loss(
  params: PyTree,
  video: Float[Array, 'b t h w 3'],
  key: PRNGKeyArray,
  cfg: vae.VAEConfig,
  *,
  l1_weight: float,
  kl_weight: float,
) -> tuple[Float[Array, 'b'], dict[str, Float[Array, 'b']]]:
  """mean (x' - x)^2 + l1_weight * mean |x' - x| + kl_weight * KL, x' decoded from a sample.

  KL to the unit normal is (mu^2 + exp(v) - 1 - v) / 2, averaged over all latent numbers (Kingma and
  Welling, arXiv:1312.6114, appendix B); v is the log-variance, clipped to [-30, 20].

  Args:
    params: of the VAE.
    video: pixels in [-1, 1], 1 + 4n frames.
    key: one for the batch.
    cfg: sizes.
    l1_weight: sharpens; much of it drops small things, since the median around them is the ground.
    kl_weight: small, such as 1e-4, so that latents are bounded and no more.

  Returns:
    The loss of each example, and its parts 'l1', 'mse' and 'kl', likewise.
  """
  mean, logvar = vae.posterior(params, video, cfg)
  logvar = jnp.clip(logvar, *_LOGVAR)
  sample = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
  error = vae.decode_raw(params, sample, cfg) - video
  kl = 0.5 * (jnp.square(mean) + jnp.exp(logvar) - 1 - logvar)
  l1, mse, kl = (_per_example(x) for x in (jnp.abs(error), jnp.square(error), kl))
  return mse + l1_weight * l1 + kl_weight * kl, {'l1': l1, 'mse': mse, 'kl': kl}


def fold_statistics(params: PyTree, mean: Float[Array, 'z'], std: Float[Array, 'z']) -> PyTree:
  """Moves the statistics of latents into the weights, so that they become 0 and 1 a channel.

  Encoding, then decoding, gives what it gave. Log-variances follow, so a posterior sample does too.

  Args:
    params: of a VAE.
    mean: of the posterior mean over a data set, each channel, before any normalisation.
    std: likewise.

  Returns:
    Parameters to be used with latent_mean 0 and latent_std 1.

  Raises:
    InputError: a channel that never varies.
  """
  if not np.all(np.asarray(std) > 0):
    dead = ', '.join(str(i) for i in np.flatnonzero(~(np.asarray(std) > 0)))
    raise InputError(
      f'latent channels {dead} never vary, so they cannot be normalised; train the '
      'VAE for longer or with a smaller kl_weight.'
    )
  kernel, bias = params['conv1']['kernel'], params['conv1']['bias']
  scale = jnp.concatenate([1 / std, jnp.ones_like(std)])
  shift = jnp.concatenate([-mean / std, -2 * jnp.log(std)])
  conv1 = {'kernel': jnp.einsum('thwio,o->thwio', kernel, scale), 'bias': bias * scale + shift}
  kernel, bias = params['conv2']['kernel'], params['conv2']['bias']
  conv2 = {
    'kernel': jnp.einsum('thwio,i->thwio', kernel, std),
    'bias': bias + jnp.einsum('thwio,i->o', kernel, mean),
  }
  return params | {'conv1': conv1, 'conv2': conv2}
