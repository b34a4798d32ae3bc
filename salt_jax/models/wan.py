"""The Wan 2.1 video DiT: one set of blocks, bidirectional or causal, any size from one definition.

What makes a pass causal is its context, not its parameters: `Clip` is a whole clip (bidirectional, or chunk-causal),
`Chunk` is one chunk behind a KV cache. Modulation is per latent frame, so a timestep is `[b f]`. Tokens are kept
as `[b f t d]`, t tokens a frame, so that what belongs to a frame broadcasts by itself. What a clip is conditioned
on is a `Prompt`; from its frames each pass takes those of its context.

Where the original forces float32, so does this port: time embedding, modulation, norms, RoPE, gates, the
residual stream and the head. Projections run in `WanConfig.dtype`.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from flax import struct
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int, PRNGKeyArray

from salt_jax.errors import InputError
from salt_jax.models import attention, axes, modules, rope
from salt_jax.models import prompt as prompts
from salt_jax.models.attention import Kernel
from salt_jax.models.cache import KVCache, visible_runs, visible_slots
from salt_jax.models.dit_layers import (
  PATCH,
  AffineLayerNorm,
  Head,
  ImageEmbedding,
  RMSNorm,
  layer_norm,
  project,
  sinusoid,
)
from salt_jax.models.prompt import Prompt

INPUT = 'block_input'
REMAT_NAMES = (attention.SAVED, INPUT)  # what a remat policy can name


@dataclasses.dataclass(frozen=True)
class WanConfig:
  """Sizes of a DiT and how it computes; hashable, so it is static under jit.

  `attention` and `attention_blocks` are a `Kernel`. With `remat` a block's backward pass computes its
  forward pass again, but for what of `REMAT_NAMES` is kept: `remat_saves` on the device, `remat_offloads` on the host.

  Input channels beyond the output's take `Prompt.frames`. If `image_dim` is not 0, there are `image_len` rows of that
  width from a CLIP tower, given learned positions if `image_positions` (those of FLF2V are of two images).
  """

  dim: int
  ffn_dim: int
  heads: int
  layers: int
  text_dim: int = 4096
  text_len: int = 512
  in_channels: int = 16
  out_channels: int = 16
  image_dim: int = 0
  image_len: int = 257
  image_positions: bool = False
  freq_dim: int = 256
  eps: float = 1e-6
  dtype: str = 'bfloat16'
  attention: str = 'dense'
  attention_blocks: tuple[int, ...] = ()
  remat: bool = True
  remat_saves: tuple[str, ...] = ()
  remat_offloads: tuple[str, ...] = ()

  def __post_init__(self):
    if self.dim % self.heads or (self.dim // self.heads) % 2:
      raise InputError(f'dim {self.dim} does not divide into {self.heads} heads of even width.')
    if self.frame_channels < 0:
      raise InputError(
        f'in_channels {self.in_channels} must not be fewer than out_channels {self.out_channels}.'
      )
    unknown = {*self.remat_saves, *self.remat_offloads} - set(REMAT_NAMES)
    if unknown:
      raise InputError(
        f'remat_saves and remat_offloads take {" and ".join(REMAT_NAMES)}, not {", ".join(sorted(unknown))}.'
      )

  @property
  def pictures(self) -> int:
    """Frames of a clip that are given, if any are: the first, or first and last."""
    return 2 if self.image_positions else 1

  @property
  def head_dim(self) -> int:
    return self.dim // self.heads

  @property
  def kernel(self) -> Kernel:
    return Kernel(self.attention, tuple(self.attention_blocks))

  @property
  def frame_channels(self) -> int:
    """Channels of `Prompt.frames`: 20 for I2V, 0 for T2V."""
    return self.in_channels - self.out_channels


def wan_1_3b() -> WanConfig:
  return WanConfig(dim=1536, ffn_dim=8960, heads=12, layers=30)


def wan_14b() -> WanConfig:
  return WanConfig(dim=5120, ffn_dim=13824, heads=40, layers=40)


def wan_i2v_14b() -> WanConfig:
  return dataclasses.replace(wan_14b(), in_channels=36, image_dim=1280)


def wan_flf2v_14b() -> WanConfig:
  return dataclasses.replace(wan_i2v_14b(), image_len=514, image_positions=True)


def wan_nano() -> WanConfig:
  return WanConfig(
    dim=128, ffn_dim=512, heads=4, layers=6, text_dim=64, text_len=16, dtype='float32', remat=False
  )


def wan_nano_i2v() -> WanConfig:
  """Conditioned by frames alone: the nano world has no CLIP tower."""
  return dataclasses.replace(wan_nano(), in_channels=36)


@struct.dataclass
class Clip:
  """Context of a whole clip.

  Attributes:
    chunk: latent frames in a chunk; None is bidirectional.
    past: if given, a chunk's earlier frames are read from this cache instead of from the clip itself. All chunks
      then run in parallel exactly as they would one by one. Gradients never flow through it, unless `live`.
    taps: blocks whose output is returned.
    live: lets gradients flow through `past`, as teacher forcing wants and rollouts must not.
    start: absolute index of the first frame, an array, where a stream goes on; None is frame 0.
  """

  chunk: int | None = struct.field(pytree_node=False, default=None)
  past: KVCache | None = None
  taps: tuple[int, ...] = struct.field(pytree_node=False, default=())
  live: bool = struct.field(pytree_node=False, default=False)
  start: Int[Array, ''] | None = None


@struct.dataclass
class Chunk:
  """Context of one chunk: its cache and the absolute index of its first frame.

  A Python int as `start` reads a static slice of the cache. An array reads all of it behind a mask; but if it is known
  to be the start of one of the first `chunks` chunks of this length, and the kernel does not skip what is hidden, the
  static slice of the one that it is.
  """

  cache: KVCache
  start: int | Int[Array, '']
  chunks: int = struct.field(pytree_node=False, default=0)
  taps: tuple[int, ...] = struct.field(pytree_node=False, default=())


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class _Known:
  """A position known when tracing, as the blocks get it: remat would make an array of a bare int."""

  start: int


@struct.dataclass
class Features:
  """What a pass gives besides velocity: its own keys and values `[layer b f t n d]`, and tapped blocks `[b f t d]`."""

  k: Array
  v: Array
  taps: dict[int, Array]


_STREAM = (axes.BATCH, None, axes.TOKENS, None)  # axes of the residual stream `[b f t d]`


class SelfAttention(modules.Module):
  cfg: WanConfig

  @nn.compact
  def __call__(self, x, angles, ctx, past):
    cfg = self.cfg
    split = functools.partial(rearrange, pattern='b f t (n d) -> b f t n d', n=cfg.heads)
    q = RMSNorm(cfg.eps, name='norm_q')(project(cfg.dim, cfg, 'q')(x))
    k = RMSNorm(cfg.eps, name='norm_k')(project(cfg.dim, cfg, 'k')(x))
    v = split(project(cfg.dim, cfg, 'v')(x))
    q = rope.rotate(split(q), angles).astype(cfg.dtype)
    k = rope.rotate(split(k), angles).astype(cfg.dtype)
    # From here on a device has all tokens of some heads.
    q, k, v = (axes.split(y, axes.BATCH, None, None, axes.HEADS, None) for y in (q, k, v))
    out = _read(q, k, v, ctx, past, cfg.kernel)
    out = rearrange(out, 'b (f t) n d -> b f t (n d)', t=x.shape[2])
    out = axes.split(out, axes.BATCH, None, axes.TOKENS, axes.WIDTH)
    return project(cfg.dim, cfg, 'o')(out), k, v


def _tokens(x):
  return rearrange(x, 'b f t n d -> b (f t) n d')


def _read(q, k, v, ctx, past, kernel):
  """Self-attention of the context's kind; `past` holds this layer's cached keys and values `[b slot t n d]`."""
  frames, tokens = k.shape[1], k.shape[2]
  q, k, v = _tokens(q), _tokens(k), _tokens(v)
  if isinstance(ctx, Chunk):

    def read(start, q, k, v, past):
      return attention.attend_behind((q, k, v), _behind(ctx.cache, past, start, frames), kernel)

    if not ctx.chunks or isinstance(ctx.start, _Known) or kernel.skips:
      return read(ctx.start, q, k, v, past)
    # One branch a chunk: one program for all of them, in which nothing hidden is ever multiplied.
    branches = [functools.partial(read, i * frames) for i in range(ctx.chunks)]
    return jax.lax.switch(ctx.start // frames, branches, q, k, v, past)
  if ctx.chunk is None:
    return attention.attend(q, k, v, kernel=kernel)
  before = None
  if ctx.past is not None:

    def before(i):
      start = i * ctx.chunk if ctx.start is None else ctx.start + i * ctx.chunk
      return _behind(ctx.past, past, start, ctx.chunk)

  return attention.chunk_causal((q, k, v), ctx.chunk * tokens, before, kernel, ctx.live)


def _behind(cache: KVCache, past, start, count: int):
  """(keys, values, which of them count or None for all) that a chunk of `count` frames at `start` reads."""
  start = start.start if isinstance(start, _Known) else start
  if isinstance(start, int):
    runs = visible_runs(cache, start, count)

    def gather(x):
      return _tokens(jnp.concatenate([x[:, run] for run in runs], axis=1) if runs else x[:, :0])

    return gather(past[0]), gather(past[1]), None
  slots, valid = visible_slots(cache, start, count)
  if slots.size < cache.capacity:
    past = tuple(jnp.take(x, slots, axis=1, mode='clip') for x in past)
  return _tokens(past[0]), _tokens(past[1]), jnp.repeat(valid, past[0].shape[2])


class CrossAttention(modules.Module):
  """Attention to all text rows; the zero rows behind a prompt are attended too, as in the original.

  Image rows have keys and values of their own, and a softmax of their own; the two results are added.
  """

  cfg: WanConfig

  @nn.compact
  def __call__(self, x, text, image):
    cfg = self.cfg

    def heads(x):
      return rearrange(x, '... (n d) -> ... n d', n=cfg.heads).astype(cfg.dtype)

    q = heads(RMSNorm(cfg.eps, name='norm_q')(project(cfg.dim, cfg, 'q')(x)))

    def read(rows, suffix):
      k = RMSNorm(cfg.eps, name=f'norm_k{suffix}')(project(cfg.dim, cfg, f'k{suffix}')(rows))
      v = project(cfg.dim, cfg, f'v{suffix}')(rows)
      return attention.attend_rows(q, heads(k), heads(v), cfg.kernel)

    out = read(text, '')
    if image is not None:
      out = out + read(image, '_img')
    return project(cfg.dim, cfg, 'o')(rearrange(out, 'b f t n d -> b f t (n d)'))


class Block(modules.Module):
  """One transformer block (wan.md 1.4): modulated self-attention, cross-attention, modulated MLP."""

  cfg: WanConfig

  @nn.compact
  def __call__(self, carry, angles, time, rows, ctx, layer):
    cfg = self.cfg
    x, taps = carry
    x = checkpoint_name(axes.split(x, *_STREAM), INPUT)
    index, past = layer
    modulation = self.param('modulation', nn.initializers.normal(cfg.dim**-0.5), (1, 6, cfg.dim))
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = rearrange(
      modulation[:, None] + time, 'b f six d -> six b f 1 d'
    )
    h = layer_norm(x, cfg.eps) * (1 + scale_a) + shift_a
    out, k, v = SelfAttention(cfg, name='self_attn')(h, angles, ctx, past)
    x = x + out.astype(jnp.float32) * gate_a
    h = AffineLayerNorm(cfg.eps, name='norm3')(x)
    x = x + CrossAttention(cfg, name='cross_attn')(h, *rows).astype(jnp.float32)
    h = layer_norm(x, cfg.eps) * (1 + scale_m) + shift_m
    h = jax.nn.gelu(project(cfg.ffn_dim, cfg, 'ffn_0')(h), approximate=True)
    x = x + project(cfg.dim, cfg, 'ffn_2')(h).astype(jnp.float32) * gate_m
    x = axes.split(x, *_STREAM)
    taps = {i: jnp.where(index == i, x, old) for i, old in taps.items()}
    return (x, taps), (k, v)


def _rematerialised(cfg: WanConfig):
  policy = jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=list(cfg.remat_saves),
    names_which_can_be_offloaded=list(cfg.remat_offloads),
    offload_src='device',
    offload_dst='pinned_host',
  )
  return nn.remat(Block, prevent_cse=False, policy=policy)


class Wan(modules.Module):
  cfg: WanConfig

  @nn.compact
  def __call__(self, x, t, prompt, ctx):
    cfg = self.cfg
    b, f, h, w, _ = x.shape
    grid = (f, h // PATCH, w // PATCH)
    start = 0 if ctx.start is None else ctx.start
    angles = rope.table(grid, cfg.head_dim, start)
    prompts.check(prompt, cfg.image_len if cfg.image_dim else 0, cfg.frame_channels)
    x = prompts.frames_behind(x, prompt, ctx.start)

    x = rearrange(x, 'b f (h ph) (w pw) c -> b f (h w) (c ph pw)', ph=PATCH, pw=PATCH)
    x = axes.split(project(cfg.dim, cfg, 'patch_embedding')(x).astype(jnp.float32), *_STREAM)
    text = project(cfg.dim, cfg, 'text_embedding_0', 0.02)(prompt.text)
    text = project(cfg.dim, cfg, 'text_embedding_2', 0.02)(jax.nn.gelu(text, approximate=True))
    image = ImageEmbedding(cfg, name='img_emb')(prompt.image) if cfg.image_dim else None
    e = project(cfg.dim, cfg, 'time_embedding_0', 0.02, jnp.float32)(sinusoid(t, cfg.freq_dim))
    e = project(cfg.dim, cfg, 'time_embedding_2', 0.02, jnp.float32)(jax.nn.silu(e))
    e6 = project(6 * cfg.dim, cfg, 'time_projection_1', dtype=jnp.float32)(jax.nn.silu(e))
    e6 = rearrange(e6, 'b f (six d) -> b f six d', six=6)
    # Small and used by all: whole on every device of an example.
    text, e = axes.split(text, axes.BATCH, None, None), axes.split(e, axes.BATCH, None, None)
    e6 = axes.split(e6, axes.BATCH, None, None, None)

    x, k, v, taps = self._blocks(x, angles, e6, (text, image), ctx)
    x = Head(cfg, name='head')(x, e)
    velocity = rearrange(
      x, 'b f (h w) (ph pw c) -> b f (h ph) (w pw) c', h=grid[1], ph=PATCH, pw=PATCH
    )
    return velocity, Features(k=k, v=v, taps=taps)

  def _blocks(self, x, angles, time, rows, ctx):
    cfg = self.cfg
    cache = ctx.cache if isinstance(ctx, Chunk) else ctx.past
    if isinstance(ctx.start, int):
      ctx = ctx.replace(start=_Known(ctx.start))
    past = () if cache is None else (cache.k, cache.v)
    if not (isinstance(ctx, Clip) and ctx.live):
      past = jax.lax.stop_gradient(past)
    block = _rematerialised(cfg) if cfg.remat else Block
    scanned = nn.scan(
      block,
      variable_axes={'params': 0},
      split_rngs={'params': True},
      in_axes=(nn.broadcast, nn.broadcast, nn.broadcast, nn.broadcast, 0),
      check_constancy_invariants=False,  # which would trace every block twice
      length=cfg.layers,
    )
    taps = {i: jnp.zeros(x.shape, jnp.float32) for i in ctx.taps}
    layer = (jnp.arange(cfg.layers), past)
    (x, taps), (k, v) = scanned(cfg, name='blocks')((x, taps), angles, time, rows, ctx, layer)
    return x, k, v, taps


def apply(
  params: dict,
  x: Float[Array, 'b f h w c'],
  t: Float[Array, 'b f'],
  prompt: Prompt,
  ctx: Clip | Chunk,
  cfg: WanConfig,
) -> tuple[Float[Array, 'b f h w c'], Features]:
  """Velocity `noise - x0` of noisy latents.

  Args:
    params: as `init_params` makes them; paths are Wan's own names.
    x: noisy latents; rows and columns divide by the patch, 2.
    t: timesteps, 1000 * sigma, one a frame, float32.
    prompt: text, and image and frames if the model has them.
    ctx: whole clip or chunk with cache.
    cfg: sizes.

  Returns:
    (velocity in float32, features).

  Raises:
    InputError: a prompt with less or more than the model takes, or with frames of another clip.
  """
  return Wan(cfg).apply({'params': params}, x, t, prompt, ctx)


def features(
  params: dict,
  x: Float[Array, 'b f h w c'],
  t: Float[Array, 'b f'],
  prompt: Prompt,
  layer: int,
  cfg: WanConfig,
) -> Float[Array, 'b f t d']:
  """Output of block `layer`, bidirectional, float32; the blocks behind it are not run."""
  cut = params | {'blocks': jax.tree.map(lambda p: p[: layer + 1], params['blocks'])}
  short = dataclasses.replace(cfg, layers=layer + 1)
  return apply(cut, x, t, prompt, Clip(taps=(layer,)), short)[1].taps[layer]


@dataclasses.dataclass(frozen=True)
class _Bound:
  """A function of the sizes `cfg`; equal sizes are equal functions, which jitted programs know again."""

  cfg: WanConfig

  def __call__(self, params, x, t, prompt, ctx):
    return apply(params, x, t, prompt, ctx, self.cfg)


def bind(cfg: WanConfig) -> Callable:
  """`apply` with the sizes filled in: the function that rollouts and losses are given."""
  return _Bound(cfg)


def init_params(key: PRNGKeyArray, cfg: WanConfig) -> dict:
  """Random float32 parameters by the rules of the original (wan.md 1.11)."""
  x = jnp.zeros((1, 1, PATCH, PATCH, cfg.out_channels))
  prompt = Prompt(
    text=jnp.zeros((1, cfg.text_len, cfg.text_dim)),
    image=jnp.zeros((1, cfg.image_len, cfg.image_dim)) if cfg.image_dim else None,
    frames=jnp.zeros((*x.shape[:-1], cfg.frame_channels)) if cfg.frame_channels else None,
  )
  return Wan(cfg).init(key, x, jnp.zeros((1, 1)), prompt, Clip())['params']


def param_shapes(cfg: WanConfig) -> dict:
  """Shapes of the parameters, allocating nothing."""
  return jax.eval_shape(functools.partial(init_params, cfg=cfg), jax.random.key(0))
