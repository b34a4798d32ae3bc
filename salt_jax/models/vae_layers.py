"""The layers of the Wan VAE, each `(x, past) -> (y, past)` over `[b t h w c]`.

`past` is what a layer must remember of its earlier inputs: None is the start of a clip, with zeros
before it. A whole clip is one chunk that starts with None; streaming carries the past on.
"""

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import linen as nn

from salt_jax.models import modules
from salt_jax.models.attention import dense

HISTORY = 2  # frames that a causal convolution sees before its own


def recall(past: dict | None, name: str):
  """What a layer's child remembers."""
  return None if past is None else past[name]


class Norm(modules.Module):
  """x / |x| over channels, times sqrt(C) and gamma; in float32."""

  dtype: str

  @nn.compact
  def __call__(self, x):
    gamma = self.param('gamma', nn.initializers.ones, (x.shape[-1],))
    x32 = x.astype(jnp.float32)
    # Bounding the square, not the root, keeps the gradient finite where all channels are 0.
    squares = jnp.maximum(jnp.square(x32).sum(-1, keepdims=True), 1e-24)
    x32 = x32 * jax.lax.rsqrt(squares) * x.shape[-1] ** 0.5
    return jnp.einsum('...c,c->...c', x32, gamma.astype(jnp.float32)).astype(self.dtype)


def _conv2d(x, kernel):
  y = jax.lax.conv_general_dilated(
    rearrange(x, 'b t h w c -> (b t) h w c'),
    kernel,
    (1, 1),
    'SAME',
    dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
  )
  return rearrange(y, '(b t) h w c -> b t h w c', b=x.shape[0])


class VideoConv(modules.Module):
  """A convolution over three frames, unpadded in time and zero-padded in space.

  It is the sum of a 2-D convolution for each frame, on a CPU 3 to 6 times as fast as one in 3-D.
  """

  features: int
  dtype: str
  side: int = 3
  stride: int = 1

  @nn.compact
  def __call__(self, x):
    shape = (3, self.side, self.side, x.shape[-1], self.features)
    kernel = self.param('kernel', nn.initializers.zeros, shape)
    bias = self.param('bias', nn.initializers.zeros, (self.features,))
    x, kernel, bias = (array.astype(self.dtype) for array in (x, kernel, bias))
    last = x.shape[1] - 2
    y = sum(_conv2d(x[:, k : last + k : self.stride], kernel[k]) for k in range(3))
    return y + bias[None, None, None, None]


def pointwise(features: int, dtype: str, name: str, dims: int = 3) -> modules.Conv:
  return modules.Conv(features, (1,) * dims, dtype=dtype, name=name)


def _with_history(x, past):
  if past is None:
    return jnp.pad(x, ((0, 0), (HISTORY, 0), (0, 0), (0, 0), (0, 0)))
  return jnp.concatenate([past, x], axis=1)


def causal(conv: VideoConv, x, past):
  """As many frames come out as go in; none depends on a later one."""
  seen = _with_history(x, past)
  return conv(seen), seen[:, -HISTORY:]


class Residual(modules.Module):
  """Twice norm, SiLU, convolution; the skip is mapped where the widths differ."""

  features: int
  dtype: str

  @nn.compact
  def __call__(self, x, past):
    y, new = x, {}
    for norm, name in (('residual_0', 'residual_2'), ('residual_3', 'residual_6')):
      y = jax.nn.silu(Norm(self.dtype, name=norm)(y))
      y, new[name] = causal(VideoConv(self.features, self.dtype, name=name), y, recall(past, name))
    if x.shape[-1] != self.features:
      x = pointwise(self.features, self.dtype, 'shortcut')(x)
    return x + y, new


class Attention(modules.Module):
  """One head over the positions of each frame by itself."""

  dtype: str

  @nn.compact
  def __call__(self, x, past):
    b, t, h, w, c = x.shape
    qkv = pointwise(3 * c, self.dtype, 'to_qkv', 2)(Norm(self.dtype, name='norm')(x))
    qkv = rearrange(qkv, 'b t h w (part c) -> part (b t) (h w) 1 c', part=3)
    y = rearrange(dense(*qkv), '(b t) (h w) 1 c -> b t h w c', t=t, h=h)
    return x + pointwise(c, self.dtype, 'proj', 2)(y), {}


class Down(modules.Module):
  """Halves space, then time if asked; the first frame of a clip skips the latter."""

  temporal: bool
  dtype: str

  @nn.compact
  def __call__(self, x, past):
    width, pad = x.shape[-1], ((0, 1), (0, 1))
    x = modules.Conv(width, (3, 3), (2, 2), pad, dtype=self.dtype, name='resample_1')(x)
    if not self.temporal:
      return x, {}
    parts = [x[:, :1]] if past is None else []
    seen = x if past is None else jnp.concatenate([past['time_conv'], x], axis=1)
    if seen.shape[1] > 1:
      parts.append(VideoConv(width, self.dtype, side=1, stride=2, name='time_conv')(seen))
    return jnp.concatenate(parts, axis=1), {'time_conv': x[:, -1:]}


class Up(modules.Module):
  """Doubles time if asked, then space, and halves the channels.

  The first frame of a clip is not doubled, and counts as zeros to those behind it.
  """

  temporal: bool
  dtype: str

  @nn.compact
  def __call__(self, x, past):
    width, new = x.shape[-1], {}
    if self.temporal:
      alone = 1 if past is None else 0
      seen = _with_history(x[:, alone:], recall(past, 'time_conv'))
      parts, new = [x[:, :alone]], {'time_conv': seen[:, -HISTORY:]}
      if seen.shape[1] > HISTORY:
        pairs = VideoConv(2 * width, self.dtype, side=1, name='time_conv')(seen)
        parts.append(rearrange(pairs, 'b t h w (pair c) -> b (t pair) h w c', pair=2))
      x = jnp.concatenate(parts, axis=1)
    x = repeat(x, 'b t h w c -> b t (h up) (w across) c', up=2, across=2)
    return modules.Conv(width // 2, (3, 3), dtype=self.dtype, name='resample_1')(x), new


def middle(width: int, dtype: str) -> list[nn.Module]:
  """The layers at the coarsest resolution."""
  return [
    Residual(width, dtype, name='middle_0'),
    Attention(dtype, name='middle_1'),
    Residual(width, dtype, name='middle_2'),
  ]


def through(layers: list[nn.Module], widths: tuple[int, int], dtype: str, x, past):
  """The first convolution, every layer in turn, and the head."""
  new = {}
  conv = VideoConv(widths[0], dtype, name='conv1')
  x, new['conv1'] = causal(conv, x, recall(past, 'conv1'))
  for layer in layers:
    x, new[layer.name] = layer(x, recall(past, layer.name))
  x = jax.nn.silu(Norm(dtype, name='head_0')(x))
  conv = VideoConv(widths[1], dtype, name='head_2')
  x, new['head_2'] = causal(conv, x, recall(past, 'head_2'))
  return x, new
