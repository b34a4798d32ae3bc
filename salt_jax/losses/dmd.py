"""Distribution matching distillation (salt_method.md 1.5): the difference of two scores as a gradient, and the
critic that learns the student's score.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key, PyTree

from salt_jax.diffusion import flow


@dataclasses.dataclass(frozen=True)
class DMDConfig:
  """Numbers of the DMD loss.

  Attributes:
    guidance: teacher guidance on top of cond: r = c + guidance (c - u).
    shift: of the levels at which scores are compared.
    t_min, t_max: clamp of those levels, in [0, 1000].
  """

  guidance: float = 3.0
  shift: float = 5.0
  t_min: float = 20.0
  t_max: float = 980.0


class Fns(NamedTuple):
  """The networks a loss may ask: each `(x, t, text) -> velocity`, parameters inside."""

  teacher: Callable
  critic: Callable


def score_level(key: Key[Array, 'b'], cfg: DMDConfig) -> Float[Array, 'b']:
  """One sigma a clip: u uniform on {0, …, 999} / 1000, shifted, then clamped to [t_min, t_max] / 1000."""
  raw = jax.vmap(lambda k: jax.random.randint(k, (), 0, flow.TRAIN_STEPS))(key)
  t = 1000 * flow.shifted(raw.astype(jnp.float32) / flow.TRAIN_STEPS, cfg.shift)
  return jnp.clip(t, cfg.t_min, cfg.t_max) / 1000


def _noised(x, key, cfg):
  """(noisy latents, noise, sigma `[b]`, t `[b f]`) at a random level, the same for all frames."""
  level, noise = jax.vmap(jax.random.split, out_axes=1)(key)
  sigma = score_level(level, cfg)
  eps = flow.frame_noise(noise, jnp.arange(x.shape[1]), 0, x.shape[2:])
  t = jnp.broadcast_to(1000 * sigma[:, None], x.shape[:2])
  return flow.add_noise(x, eps, sigma), eps, sigma, t


def _per_example(x, mask=None, keepdims=False):
  where = None if mask is None else mask[None, :, None, None, None]
  return x.mean(axis=tuple(range(1, x.ndim)), where=where, keepdims=keepdims)


def dmd_loss(
  fns: Fns,
  x0: Float[Array, 'b f h w c'],
  texts: tuple,
  key: Key[Array, 'b'],
  cfg: DMDConfig,
  mask: Bool[Array, 'f'] | None = None,
) -> tuple[Float[Array, 'b'], dict]:
  """Generator loss whose gradient in x0 is g / numel.

  g = (fake - real) / mean |x0 - real|, per clip; loss = 0.5 mean (x0 - sg(x0 - g))^2. Both means, and those of
  the scalars, are over the frames of the mask; the networks see all frames.

  Args:
    fns: teacher and critic.
    x0: the student's clean latents, with gradient.
    texts: (prompts, unconditional prompts) for the teacher; the critic sees the prompt only.
    key: one key an example.
    cfg: numbers.
    mask: frames that count; None is all.

  Returns:
    per-clip losses and per-clip scalars.
  """
  cond, uncond = texts
  x = jax.lax.stop_gradient(x0)
  noisy, _, sigma, t = _noised(x, key, cfg)
  both, t2 = jnp.concatenate([noisy, noisy]), jnp.concatenate([t, t])
  v_cond, v_uncond = jnp.split(fns.teacher(both, t2, flow.paired(cond, uncond)), 2)
  real = flow.x0_from_velocity(noisy, flow.guide_on_top(v_cond, v_uncond, cfg.guidance), sigma)
  fake = flow.x0_from_velocity(noisy, fns.critic(noisy, t, cond), sigma)
  g = dmd_gradient(x, real, fake, mask)
  loss = 0.5 * _per_example(jnp.square(x0 - jax.lax.stop_gradient(x - g)), mask)
  return loss, {
    'dmd_gradient': _per_example(jnp.abs(g), mask),
    'dmd_real': _per_example(jnp.abs(x - real), mask),
    'dmd_fake': _per_example(jnp.abs(x - fake), mask),
    'dmd_sigma': sigma,
  }


def dmd_gradient(
  x: Float[Array, 'b f h w c'],
  real: Float[Array, 'b f h w c'],
  fake: Float[Array, 'b f h w c'],
  mask: Bool[Array, 'f'] | None = None,
) -> Float[Array, 'b f h w c']:
  """(fake - real) / mean |x - real| with one normaliser a clip, over the frames of the mask; 0 / 0 is 0."""
  scale = _per_example(jnp.abs(x - real), mask, keepdims=True)
  return jnp.nan_to_num((fake - real) / scale)


def critic_loss(
  critic: Callable,
  x0: Float[Array, 'b f h w c'],
  text: PyTree,
  key: Key[Array, 'b'],
  cfg: DMDConfig,
  mask: Bool[Array, 'f'] | None = None,
) -> tuple[Float[Array, 'b'], dict]:
  """Flow matching on the student's own clips: mean (v - (eps - x0))^2, unweighted.

  Args:
    critic: `(x, t, text) -> velocity`, with gradient.
    x0: the student's clean latents; no gradient reaches them.
    text: prompts, passed on.
    key: one key an example.
    cfg: numbers of the level.
    mask: frames that count, though the critic sees all; None is all.
  """
  x = jax.lax.stop_gradient(x0)
  noisy, eps, sigma, t = _noised(x, key, cfg)
  loss = _per_example(jnp.square(critic(noisy, t, text) - (eps - x)), mask)
  return loss, {'critic_sigma': sigma}
