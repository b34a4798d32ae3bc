"""Alignment of a student's clip to a denser-step reference: spatial token relations, MMD, or plain latents.

  (1)  R_f = F_f F_f^T      F_f `[t d]`: features of frame f, each token scaled to unit length
  (2)  loss = mean over f, i, j of relu(|R_student - R_reference| - margin)      (salt_method.md 3.5)

Both clips are noised to one level with one noise and shown to a frozen network; the gradient reaches the student's clip
through it.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import einsum
from jaxtyping import Array, Bool, Float, Key

from salt_jax.diffusion import flow
from salt_jax.errors import InputError

KINDS = ('relations', 'mmd', 'latents')
KERNELS = ('linear', 'rbf')
NETWORKS = ('teacher', 'critic', 'student')


@dataclasses.dataclass(frozen=True)
class AlignmentConfig:
  """How a student's clip is compared with its reference; the defaults are the released recipe.

  Attributes:
    kind: 'relations' is equation (2); 'mmd' the squared maximum mean discrepancy of the tokens of a frame;
      'latents' the mean squared difference, without a network.
    margin: differences of relations below it are free.
    kernel: of MMD: 'linear' or 'rbf'.
    network: whose features.
    layer: block whose output they are, from 0.
    t_low, t_high: labels in [0, 1000), before the shift, between which the level is drawn.
    shift: of the level.
    t_min, t_max: clamp of the shifted level, in [0, 1000].
  """

  kind: str = 'relations'
  margin: float = 0.1
  kernel: str = 'linear'
  network: str = 'teacher'
  layer: int = 20
  t_low: int = 0
  t_high: int = 200
  shift: float = 5.0
  t_min: float = 20.0
  t_max: float = 980.0

  def __post_init__(self):
    for name, known in (('kind', KINDS), ('kernel', KERNELS), ('network', NETWORKS)):
      if getattr(self, name) not in known:
        raise InputError(
          f'alignment.{name}={getattr(self, name)} is unknown: choose one of {", ".join(known)}.'
        )
    if not 0 <= self.t_low < self.t_high <= flow.TRAIN_STEPS:
      raise InputError(
        f'alignment.t_low={self.t_low} must be below alignment.t_high={self.t_high}, both in 0 to {flow.TRAIN_STEPS}.'
      )
    if not 0 <= self.t_min < self.t_max <= flow.TRAIN_STEPS:
      raise InputError(
        f'alignment.t_min={self.t_min} must be below alignment.t_max={self.t_max}, both in 0 to {flow.TRAIN_STEPS}.'
      )


def _unit(x):
  """Tokens of length 1; a zero token stays zero."""
  return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), -1, keepdims=True), 1e-12))


def relation_loss(
  student: Float[Array, 'b f t d'], reference: Float[Array, 'b f t d'], margin: float
) -> Float[Array, 'b']:
  """Equation (2), per clip. Frame by frame, so that one pair of `[b t t]` matrices is alive at a time."""

  @jax.checkpoint
  def frame(pair):
    one, other = (_unit(x.astype(jnp.float32)) for x in pair)
    gram = 'b i d, b j d -> b i j'
    difference = jnp.abs(einsum(one, one, gram) - einsum(other, other, gram))
    return jnp.mean(jax.nn.relu(difference - margin), axis=(1, 2))

  frames = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), (student, reference))
  return jnp.mean(jax.lax.map(frame, frames), axis=0)


def mmd_loss(
  student: Float[Array, 'b f t d'], reference: Float[Array, 'b f t d'], kernel: str
) -> Float[Array, 'b']:
  """Squared maximum mean discrepancy between the unit tokens of each frame, averaged over frames.

  mean k(s, s') + mean k(r, r') - 2 mean k(s, r) over all pairs (Gretton et al. 2012, the biased estimate), with
  k(a, b) = a . b ('linear', the squared distance of the means) or exp(-|a - b|^2 / 2) ('rbf').
  """

  def mean_kernel(a, b):
    dots = einsum(a, b, 'b f i d, b f j d -> b f i j')
    # Unit tokens: |a - b|^2 = 2 - 2 a . b.
    return jnp.mean(dots if kernel == 'linear' else jnp.exp(dots - 1), axis=(2, 3))

  s, r = _unit(student.astype(jnp.float32)), _unit(reference.astype(jnp.float32))
  return jnp.mean(mean_kernel(s, s) + mean_kernel(r, r) - 2 * mean_kernel(s, r), axis=1)


def alignment_loss(
  features: Callable,
  x0: Float[Array, 'b f h w c'],
  reference: Float[Array, 'b f h w c'],
  key: Key[Array, 'b'],
  cfg: AlignmentConfig,
) -> Float[Array, 'b']:
  """The chosen comparison, per clip.

  Args:
    features: `(x, t) -> [b f t d]` of a frozen network, prompt inside.
    x0: the student's clip, with gradient.
    reference: the reference's clip; no gradient reaches it.
    key: one key an example, for the level and the noise that both sides share.
    cfg: the comparison.
  """
  reference = jax.lax.stop_gradient(reference)
  if cfg.kind == 'latents':
    return jnp.mean(jnp.square(x0 - reference), axis=tuple(range(1, x0.ndim)))
  level, noise = jax.vmap(jax.random.split, out_axes=1)(key)
  sigma = feature_level(level, cfg)
  t = jnp.broadcast_to(1000 * sigma[:, None], x0.shape[:2])
  eps = flow.frame_noise(noise, jnp.arange(x0.shape[1]), 0, x0.shape[2:])
  one = features(flow.add_noise(x0, eps, sigma), t)
  other = jax.lax.stop_gradient(features(flow.add_noise(reference, eps, sigma), t))
  if cfg.kind == 'mmd':
    return mmd_loss(one, other, cfg.kernel)
  return relation_loss(one, other, cfg.margin)


def feature_level(key: Key[Array, 'b'], cfg: AlignmentConfig) -> Float[Array, 'b']:
  """One sigma a clip: a uniform label in {t_low, …, t_high - 1}, shifted, then clamped."""
  label = jax.vmap(lambda k: jax.random.randint(k, (), cfg.t_low, cfg.t_high))(key)
  t = 1000 * flow.shifted(label.astype(jnp.float32) / flow.TRAIN_STEPS, cfg.shift)
  return jnp.clip(t, cfg.t_min, cfg.t_max) / 1000


def when(active: Bool[Array, ''], loss: Callable, x: Float[Array, 'b ...']) -> Float[Array, 'b']:
  """`loss(x)` where active, else zeros; otherwise neither the loss nor its gradient is computed.

  The gradient is taken inside the branch, so nothing is kept for a backward pass that does not come. Example i of the
  loss must depend on example i of x alone.
  """

  def both(x):
    value, pull = jax.vjp(loss, x)
    return value, pull(jnp.ones_like(value))[0]

  def neither(x):
    return jnp.zeros(x.shape[0], jnp.float32), jnp.zeros_like(x)

  fixed = jax.lax.stop_gradient(x)
  value, grad = jax.lax.stop_gradient(jax.lax.cond(active, both, neither, fixed))
  # Zero in value; hands the gradient on.
  return value + jnp.sum((x - fixed) * grad, axis=tuple(range(1, x.ndim)))
