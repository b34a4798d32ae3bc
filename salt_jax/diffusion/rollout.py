"""Few-step generation, chunk after chunk with a cache: what a student does at inference and is trained on.

A chunk is denoised from noise: predict x0, re-noise to the next level, …, up to the exit step, whose x0 is the chunk's
output. One more pass over that output writes the chunk's keys and values for the chunks behind it.

Training needs a gradient through the exit step alone. So the whole rollout runs without one and remembers the input
of every exit; then `velocity` repeats the exits of all chunks in a single differentiable pass against the finished
cache. Chunk i of that pass sees exactly what it saw before, so the values agree, nothing flows through the cache, and
one cache is alive in the backward pass instead of one a chunk.

A single chunk as long as the clip is the bidirectional student: no cache, and no pass to fill one.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int, Key

from salt_jax.diffusion import flow
from salt_jax.errors import InputError
from salt_jax.models import axes, rope
from salt_jax.models.cache import LAYOUT, KVCache, allocate, slots_needed, write
from salt_jax.models.prompt import Prompt
from salt_jax.models.wan import Chunk, Clip

# Draws of `flow.frame_noise`: 0 is the first noise, step i re-noises with i + 1, the cache pass with this one.
CONTEXT_DRAW = 1000


@dataclasses.dataclass(frozen=True)
class Chunking:
  """What is static in a rollout: shapes and the kind of cache.

  Attributes:
    frames: latent frames of the clip.
    chunk: latent frames in a chunk.
    latent: (rows, columns, channels) of a latent frame.
    cache: (layers, tokens a frame, heads, head width) of the model.
    sink: first frames that stay visible.
    window: frames a chunk may see; None is all.
    mode: what `student_plan` makes of the steps: 'sde' re-noises with fresh noise in between, 'ode' takes Euler steps.
    unroll: one program a chunk, each with a static slice of the cache; otherwise one loop.
    branches: in the loop attention has a branch a chunk, each with such a slice; otherwise it reads the whole cache
      behind a mask, which small models compile faster and large ones pay for. Splash, which skips what is hidden, never
      branches.
    context_noise: sigma at which the finished chunk is cached.
    dtype: of the cache.
  """

  frames: int
  chunk: int
  latent: tuple[int, int, int]
  cache: tuple[int, int, int, int]
  sink: int = 0
  window: int | None = None
  mode: str = 'sde'
  unroll: bool = True
  branches: bool = True
  context_noise: float = 0.0
  dtype: str = 'bfloat16'

  def __post_init__(self):
    if self.frames % self.chunk:
      raise InputError(f'{self.frames} latent frames do not divide into chunks of {self.chunk}.')
    if self.frames > rope.MAX_FRAMES:
      raise InputError(
        f'{self.frames} latent frames exceed the {rope.MAX_FRAMES} positions of RoPE.'
      )
    if self.mode not in ('sde', 'ode'):
      raise InputError(f'rollout mode "{self.mode}" is unknown: choose sde or ode.')

  @property
  def causal(self) -> bool:
    """False when one chunk is the whole clip: then nothing is cached."""
    return self.chunk < self.frames


@struct.dataclass
class Plan:
  """A rollout to make: the static part, and arrays that may change from step to step without a recompile.

  Attributes:
    chunking: the static part.
    sigmas: levels of the schedule from 1 downwards, then zeros; `[s]`.
    exit: index of the step whose x0 is the output, the same for all chunks.
    draws: which noise of `flow.frame_noise` leads from level i to level i + 1; `[s]`.
    euler: where that step is Euler's instead, without noise; `[s]`.
  """

  chunking: Chunking = struct.field(pytree_node=False)
  sigmas: Float[Array, 's']
  exit: Int[Array, '']
  draws: Int[Array, 's']
  euler: Bool[Array, 's']


def student_plan(chunking: Chunking, sigmas: Float[Array, 's'], exit_step: Int[Array, '']) -> Plan:
  """The plan of a student by itself: an own noise for each level, or Euler everywhere, as the mode says."""
  steps = len(sigmas)
  euler = jnp.full(steps, chunking.mode == 'ode')
  draws = 1 + jnp.arange(steps, dtype=jnp.int32)
  return Plan(chunking, jnp.asarray(sigmas), jnp.asarray(exit_step, jnp.int32), draws, euler)


@struct.dataclass
class Trace:
  """Input of each chunk's exit step, `[b f h w c]`, its level, and the clip's first frame; None is frame 0."""

  x: Float[Array, 'b f h w c']
  sigma: Float[Array, '']
  start: Int[Array, ''] | None = None


@struct.dataclass
class Rollout:
  """Clean latents, what is needed to repeat the exits, and the cache after the last chunk if there is one."""

  x0: Float[Array, 'b f h w c']
  trace: Trace
  cache: KVCache | None


@struct.dataclass
class Past:
  """What a clip goes on from. All positions are arrays, so none of them recompiles.

  Attributes:
    cache: of what came before; it must keep the whole clip and what its first new chunk sees (`stream_cache`).
    start: absolute index of the clip's first frame.
    x0: the clip; its first `done` chunks are given and not made anew.
    done: how many.
  """

  cache: KVCache | None
  start: int | Int[Array, '']
  x0: Float[Array, 'b f h w c']
  done: int | Int[Array, ''] = 0


def empty_cache(chunking: Chunking, batch: int, streaming: bool = False) -> KVCache | None:
  """A cache for one clip: all its frames, or for streaming only those that can still be seen; None for one chunk."""
  if not chunking.causal:
    return None
  layers, tokens, heads, width = chunking.cache
  slots = chunking.frames
  if streaming:
    slots = slots_needed(chunking.frames, chunking.chunk, chunking.sink, chunking.window)
  shape = (layers, batch, slots, tokens, heads, width)
  window = (
    None if chunking.window is None or chunking.window >= chunking.frames else chunking.window
  )
  return allocate(shape, chunking.dtype, sink=chunking.sink if window else 0, window=window)


def stream_cache(chunking: Chunking, batch: int) -> KVCache:
  """An empty ring for a stream of any length: a window, and all of one clip behind what its first chunk sees.

  Raises:
    InputError: without a window, or with one too short for sink and chunk.
  """
  if chunking.window is None:
    raise InputError('a stream needs a window: without one its cache would grow without bound.')
  slots = slots_needed(chunking.window + 1, chunking.chunk, chunking.sink, chunking.window)
  layers, tokens, heads, width = chunking.cache
  shape = (layers, batch, slots + chunking.frames, tokens, heads, width)
  return allocate(shape, chunking.dtype, sink=chunking.sink, window=chunking.window)


def denoise_chunk(
  apply: Callable,
  params,
  keys: Key[Array, 'b'],
  text: Prompt,
  plan: Plan,
  state: tuple,
  chunks: int = 0,
) -> tuple[Float[Array, 'b f h w c'], Float[Array, 'b f h w c'], KVCache | None]:
  """Generates the chunk at `start` and commits it.

  The steps and the pass that fills the cache are one loop over one body, so a program holds the network once.

  Args:
    apply: the model.
    params: its parameters.
    keys: one key an example.
    text: what the clips are conditioned on.
    plan: schedule and exit.
    state: (cache, start); a Python int as start reads the cache statically, and so does an array if `chunks` says
      which it may be.
    chunks: chunks of the clip, if it begins at frame 0; 0 if not.

  Returns:
    (x0, input of the exit step, new cache).
  """
  cache, start = state
  chunking = plan.chunking
  frames = start + jnp.arange(chunking.chunk)
  shape = (keys.shape[0], chunking.chunk)
  ctx = Clip() if cache is None else Chunk(cache, start, chunks)

  def body(i, carry):
    x, exit_x, x0, own = carry
    at_exit, before_cache = i == plan.exit, i <= plan.exit
    sigma = jnp.where(before_cache, plan.sigmas[i], chunking.context_noise)
    v, features = apply(params, x, jnp.full(shape, 1000 * sigma), text, ctx)
    prediction = flow.x0_from_velocity(x, v, sigma)
    following = jnp.where(at_exit, chunking.context_noise, plan.sigmas[i + 1])
    draw = jnp.where(at_exit, CONTEXT_DRAW, plan.draws[i])
    renoised = flow.add_noise(
      prediction, flow.frame_noise(keys, frames, draw, chunking.latent), following
    )
    stepped = jnp.where(plan.euler[i] & ~at_exit, flow.euler(x, v, sigma, following), renoised)
    exit_x = jnp.where(at_exit, x, exit_x)
    x0 = jnp.where(before_cache, prediction, x0)
    if cache is not None:
      own = tuple(y.astype(chunking.dtype) for y in (features.k, features.v))
    return stepped, exit_x, x0, own

  noise = flow.frame_noise(keys, frames, 0, chunking.latent)
  carry = (noise, noise, noise, _own_keys(chunking, shape) if chunking.causal else ())
  passes = plan.exit + (2 if chunking.causal else 1)
  _, exit_x, x0, own = jax.lax.fori_loop(0, passes, body, carry)
  return x0, exit_x, cache if cache is None else write(cache, *own, start)


def _own_keys(chunking: Chunking, shape: tuple[int, int]):
  layers, tokens, heads, width = chunking.cache
  zeros = axes.split(jnp.zeros((layers, *shape, tokens, heads, width), chunking.dtype), *LAYOUT)
  return zeros, zeros


def rollout(
  apply: Callable,
  params,
  key: Key[Array, 'b'],
  text: Prompt,
  plan: Plan,
  past: Past | None = None,
) -> Rollout:
  """A whole clip without gradient (Self-Forcing's rollout; salt_method.md 1.6).

  Args:
    apply: `(params, x, t, text, ctx) -> (velocity, features)`.
    params: parameters; no gradient reaches them.
    key: one key an example.
    text: what the clips are conditioned on.
    plan: what to do.
    past: what the clip goes on from; None begins a video. It is one loop then, whatever the plan says, because
      slices of the cache are not known when tracing.

  Returns:
    x0 `[b f h w c]` float32, the exits' inputs (zeros for given chunks), the cache.
  """
  params, text, past = jax.lax.stop_gradient((params, text, past))
  chunking, start = plan.chunking, None
  if past is not None:
    start = jnp.asarray(past.start, jnp.int32)
    x0, exit_x, cache = _loop(apply, params, key, text, plan, past.replace(start=start))
  else:
    cache = empty_cache(chunking, key.shape[0])
    roll = _unrolled if chunking.unroll else _loop
    zeros = jnp.zeros((key.shape[0], chunking.frames, *chunking.latent))
    x0, exit_x, cache = roll(apply, params, key, text, plan, Past(cache, 0, zeros))
  trace = Trace(exit_x, plan.sigmas[plan.exit], start)
  return jax.lax.stop_gradient(Rollout(x0=x0, trace=trace, cache=cache))


def _unrolled(apply, params, key, text, plan, past):
  cache, outs = past.cache, []
  for start in range(0, plan.chunking.frames, plan.chunking.chunk):
    x0, exit_x, cache = denoise_chunk(apply, params, key, text, plan, (cache, start))
    outs.append((x0, exit_x))
  x0, exit_x = (jnp.concatenate(parts, axis=1) for parts in zip(*outs, strict=True))
  return x0, exit_x, cache


def _loop(apply, params, key, text, plan, past):
  chunking = plan.chunking
  known = chunking.branches and isinstance(past.start, int)
  chunks = chunking.frames // chunking.chunk if known else 0

  def body(i, carry):
    x0, exit_x, cache = carry
    at = i * chunking.chunk
    state = (cache, past.start + at)
    new_x0, new_exit, cache = denoise_chunk(apply, params, key, text, plan, state, chunks)
    put = jax.lax.dynamic_update_slice_in_dim
    return put(x0, new_x0, at, 1), put(exit_x, new_exit, at, 1), cache

  carry = (past.x0, jnp.zeros_like(past.x0), past.cache)
  return jax.lax.fori_loop(past.done, chunking.frames // chunking.chunk, body, carry)


def velocity(
  apply: Callable,
  params,
  point: Trace,
  text: Prompt,
  cache: KVCache | None,
  chunk: int,
) -> Float[Array, 'b f h w c']:
  """Velocity of all chunks at once, each behind its own past in a finished cache.

  At a rollout's trace this repeats its exit steps. Gradients flow through `params` and `point`, not through the cache.

  Args:
    apply: the model.
    params: its parameters.
    point: where to ask: inputs and their level.
    text: encoder rows.
    cache: of a rollout; None for a bidirectional student.
    chunk: latent frames in a chunk.
  """
  ctx = Clip()
  if cache is not None:
    ctx = Clip(chunk=chunk, past=jax.lax.stop_gradient(cache), start=point.start)
  t = jnp.full(point.x.shape[:2], 1000 * point.sigma)
  return apply(params, point.x, t, text, ctx)[0]
