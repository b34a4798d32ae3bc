"""How many FLOPs a step needs, by formula (a multiply and an add are two), and what devices could do at most.

The compiler's own count sees a scanned layer once and a kernel not at all, so it is of no use here. Counted are matrix
products alone; norms, softmax, RoPE and the optimizer are below a percent at real sizes. One forward pass of a DiT of
width d over l tokens that make p (query, key) pairs, with n rows of text and a feed-forward width m, needs per block

  (1)  8 l d^2 + 4 p d                    self-attention: its four projections; its two products
  (2)  4 l d^2 + 4 n d^2 + 4 l n d        cross-attention: queries and output; keys and values; its two products
  (3)  4 l d m                            feed-forward

and embeddings and head once. A causal pass has the pairs that its chunks may see: hidden or empty slots of a cache do
not count, whether or not a program multiplies them. Training through a pass takes three times the forward, of which a
third is the forward itself, less what nobody needs: keys of a rollout's cache get no gradient, so that the backward
pass makes two products of the pairs with them, not four. What is recomputed for the backward pass, by remat and by
the kernels of attention (`_REDONE`), is told apart and is no part of MFU. All numbers are of one example.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from ml_collections import ConfigDict

from salt_jax.diffusion import draws
from salt_jax.diffusion.rollout import Chunking
from salt_jax.models.attention import SAVED
from salt_jax.models.text import TextConfig
from salt_jax.models.wan import PATCH, WanConfig
from salt_jax.recipe import Recipe, latent_shape

# Dense bfloat16 peak of one JAX device, by its `device_kind`, of which JAX knows two spellings for some; a chip of
# TPU7x is two devices.
PEAK_FLOPS = {
  'TPU v4': 275e12,
  'TPU v5 lite': 197e12,
  'TPU v5e': 197e12,
  'TPU v5': 459e12,
  'TPU v5p': 459e12,
  'TPU v6 lite': 918e12,
  'TPU v6e': 918e12,
  'TPU7x': 2307e12 / 2,
  'NVIDIA H100 80GB HBM3': 989e12,
  'NVIDIA H200': 989e12,
}

_BLOCK = ('projections', 'self_attention', 'cross_attention', 'ffn')


def forward(cfg: WanConfig, frames: int, tokens: int, pairs: int | None = None) -> dict[str, float]:
  """FLOPs of one pass over a clip or a chunk, by part; equations (1) to (3).

  Args:
    cfg: sizes.
    frames: latent frames that are put in.
    tokens: tokens of a frame.
    pairs: (query, key) pairs of self-attention, counted once for all heads; None: all frames see each other.

  Returns:
    {'embeddings', 'projections', 'self_attention', 'cross_attention', 'ffn', 'head'}.
  """
  d, length = cfg.dim, frames * tokens
  pairs = length**2 if pairs is None else pairs
  rows = cfg.text_len + (cfg.image_len if cfg.image_dim else 0)
  block = {
    'projections': 8 * length * d**2,
    'self_attention': 4 * pairs * d,
    'cross_attention': 4 * length * d**2 + 4 * rows * d**2 + 4 * length * rows * d,
    'ffn': 4 * length * d * cfg.ffn_dim,
  }
  return {
    'embeddings': float(_embeddings(cfg, frames, length)),
    **{name: float(cfg.layers * flops) for name, flops in block.items()},
    'head': 2.0 * length * d * cfg.out_channels * PATCH**2,
  }


def _embeddings(cfg: WanConfig, frames: int, length: int) -> int:
  """Patches, text, time (an own one for every frame) and image rows."""
  d = cfg.dim
  patches = 2 * length * cfg.in_channels * PATCH**2 * d
  text = 2 * cfg.text_len * (cfg.text_dim * d + d * d)
  time = 2 * frames * (cfg.freq_dim * d + d * d + 6 * d * d)
  image = 2 * cfg.image_len * (cfg.image_dim * cfg.image_dim + cfg.image_dim * d)
  return patches + text + time + (image if cfg.image_dim else 0)


def seen(chunking: Chunking, start: int) -> int:
  """Frames before the chunk at frame `start` that it may see: all, or sink and the rest of its window."""
  if chunking.window is None:
    return start
  sink = min(start, chunking.sink)
  oldest = max(sink, start + chunking.chunk - (chunking.window - chunking.sink))
  return sink + max(0, start - oldest)


def chunk_pairs(chunking: Chunking, start: int) -> int:
  """(query, key) pairs of the chunk at frame `start`."""
  tokens = chunking.cache[1]
  return chunking.chunk * tokens * (seen(chunking, start) + chunking.chunk) * tokens


def chunk_causal(
  cfg: WanConfig, chunking: Chunking, start: int = 0, frames: int | None = None
) -> dict[str, float]:
  """One pass over a clip whose chunks see themselves and what lies before them; a whole clip if it is one chunk.

  Args:
    cfg: sizes.
    chunking: chunks, window, and tokens of a frame.
    start: absolute index of the first frame, where a stream goes on.
    frames: length of the clip; None is the chunking's.
  """
  frames = chunking.frames if frames is None else frames
  pairs = sum(chunk_pairs(chunking, start + at) for at in range(0, frames, chunking.chunk))
  return forward(cfg, frames, chunking.cache[1], pairs)


def past(cfg: WanConfig, chunking: Chunking, start: int = 0) -> float:
  """Of the same pass over a clip, the self-attention of all chunks to what lies before them."""
  tokens, starts = chunking.cache[1], range(start, start + chunking.frames, chunking.chunk)
  pairs = chunking.chunk * tokens**2 * sum(seen(chunking, at) for at in starts)
  return float(4 * cfg.layers * pairs * cfg.dim)


def rollout(
  cfg: WanConfig, chunking: Chunking, steps: float, start: int = 0, done: int = 0
) -> dict[str, float]:
  """Chunk after chunk in `steps` passes each, and the pass that fills the cache if there is one.

  Args:
    cfg: sizes.
    chunking: of the clip.
    steps: passes of a chunk, or the mean of them.
    start: absolute index of the clip's first frame.
    done: its first frames that are there already.
  """
  passes, tokens = steps + chunking.causal, chunking.cache[1]
  total = dict.fromkeys(forward(cfg, 0, 0), 0.0)
  for at in range(done, chunking.frames, chunking.chunk):
    one = forward(cfg, chunking.chunk, tokens, chunk_pairs(chunking, start + at))
    total = {name: total[name] + passes * flops for name, flops in one.items()}
  return total


def encoder(cfg: TextConfig, length: int) -> float:
  """One pass of the text encoder over a prompt of `length` tokens, padding included."""
  projections = 8 * length * cfg.dim * cfg.dim_attn + 6 * length * cfg.dim * cfg.ffn_dim
  return float(cfg.layers * (projections + 4 * length**2 * cfg.dim_attn))


def cache_bytes(cfg: WanConfig, frames: int, tokens: int, dtype: str = 'bfloat16') -> int:
  """Bytes of the keys and values of so many frames, all layers."""
  return 2 * cfg.layers * frames * tokens * cfg.dim * jnp.dtype(dtype).itemsize


class Part(NamedTuple):
  """A part of a step.

  Attributes:
    name: of the network, or what it does.
    flops: that the step needs.
    again: spent on computing once more what the backward pass needs.
    backward: what of `flops` is the backward pass.
  """

  name: str
  flops: float
  again: float = 0.0
  backward: float = 0.0

  def times(self, share: float) -> 'Part':
    return Part(self.name, *(share * count for count in self[1:]))


Passes = dict[str, float]


def _served(name: str, *passes: Passes) -> Part:
  return Part(name, sum(sum(one.values()) for one in passes))


def _trained(
  name: str, cfg: WanConfig, *passes: Passes, frozen: bool = False, behind: float = 0.0
) -> Part:
  """Passes with a gradient: twice the forward on top; anew, with remat all blocks, and what the kernel makes anew.

  Parameters that are frozen only hand the gradient on, though both sides of q k^T and of p v still get one; and
  nobody asks for the end of the feed-forward anew, whose gate has no gradient then. Of `behind`, the attention to
  keys of a cache, one side gets a gradient.
  """
  total = _served(name, *passes).flops
  attention, ffn = (sum(one[part] for one in passes) for part in ('self_attention', 'ffn'))
  blocks = sum(one[part] for one in passes for part in _BLOCK)
  again, backward = blocks, 2 * total - behind
  if frozen:
    again, backward = blocks - ffn / 2, total + attention - behind
  again = again * cfg.remat + _again(cfg, attention, behind)
  return Part(name, total + backward, again, backward)


# Products of a kernel's backward pass besides the needed ones, of a pair whose key gets a gradient and of one whose key
# gets none; a forward pass makes two. Flash attention makes q k^T anew. Splash does so in each of its two kernels, and
# makes dO v^T in both; cuDNN makes the gradient to all keys.
_REDONE = {'dense': (0, 0), 'cudnn': (1, 3), 'splash': (3, 1)}


def _again(cfg: WanConfig, attention: float, behind: float) -> float:
  """What a kernel makes anew in the backward pass of so much self-attention, less what it kept of the forward pass."""
  learnt, frozen = _REDONE[cfg.attention]
  redone = (learnt * (attention - behind) + frozen * behind) / 2
  kept = (
    cfg.remat and cfg.attention == 'splash' and SAVED in (*cfg.remat_saves, *cfg.remat_offloads)
  )
  return redone - attention * kept


def _without_head(passes: Passes) -> Passes:
  return passes | {'head': 0.0}


def mean_steps(schedule: draws.Schedule) -> float:
  """Denoising passes of a chunk, in the mean over step counts and exits: those of K steps are 1, …, K."""
  return sum(p * (k + 1) / 2 for k, p in zip(schedule.steps, schedule.probs, strict=True))


def consistency_share(schedule: draws.Schedule, cfg: draws.TripleConfig) -> float:
  """Share of the generator's steps, while the term is awake, that ask the network once more."""
  share = 0.0
  for k, p in zip(schedule.steps, schedule.probs, strict=True):
    share += p * sum(bool(draws.ends(k, exit_step, cfg)) for exit_step in range(k)) / k
  return share


def reference_share(schedule: draws.Schedule, cfg: draws.ReferenceConfig) -> tuple[float, float]:
  """(share of the generator's steps that have a reference, mean of its denoising passes over those), while awake."""
  share, steps, options = 0.0, 0.0, dict(cfg.map)
  for k, p in zip(schedule.steps, schedule.probs, strict=True):
    for reference in filter(None, options.get(k, ())):
      weight = p / k / len(options[k])
      for exit_step in range(1, k):
        share += weight
        steps += weight * (exit_step * reference // k + 1)
  return share, steps / share if share else 0.0


def generator_step(rec: Recipe, n: int | None = None) -> list[Part]:
  """The generator's step of DMD and its terms, in the mean over what is drawn.

  Args:
    rec: the recipe.
    n: training step, which tells the terms that sleep; None: none does.
  """
  parts = [
    _texts(rec, 2),
    _rolled(rec),
    _student(rec),
    *_scores(rec),
  ]
  if rec.consistency is not None:
    parts.append(_consistency(rec, n))
  if rec.alignment is not None:
    parts += _aligned(rec, n)
  return parts


def critic_step(rec: Recipe) -> list[Part]:
  """The critic's step, in the mean over what is drawn."""
  return [_texts(rec, 1), _rolled(rec), _trained('critic', rec.model, _clip(rec.model, rec))]


def _clip(cfg: WanConfig, rec: Recipe) -> Passes:
  return forward(cfg, rec.chunking.frames, rec.chunking.cache[1])


def _texts(rec: Recipe, prompts: int) -> Part:
  return Part('text', prompts * encoder(rec.text, rec.text_length))


def _rolled(rec: Recipe) -> Part:
  return _served('rollout', rollout(rec.model, rec.chunking, mean_steps(rec.schedule)))


def _student(rec: Recipe, starts: Sequence[int] = (0,)) -> Part:
  """Passes over the exits of all chunks at once, each behind the rollout's cache; clips at `starts`."""
  cfg, chunking = rec.model, rec.chunking
  passes = [chunk_causal(cfg, chunking, start) for start in starts]
  behind = sum(past(cfg, chunking, start) for start in starts)
  return _trained('student', cfg, *passes, behind=behind)


def _scores(rec: Recipe) -> list[Part]:
  """Teacher with and without text, and critic."""
  teacher = _clip(rec.teacher, rec)
  return [_served('teacher', teacher, teacher), _served('critic', _clip(rec.model, rec))]


def _consistency(rec: Recipe, n: int | None) -> Part:
  cfg, once = rec.triples, chunk_causal(rec.model, rec.chunking)
  behind = past(rec.model, rec.chunking)
  awake = n is None or (cfg.first_step <= n and not 0 < cfg.last_step <= n)
  if rec.consistency.stop_grad == 'none':
    # An average has no gradient of its own.
    average = rec.consistency.target == 'ema'
    part = _trained('consistency', rec.model, once, frozen=average, behind=behind)
  else:
    part = _served('consistency', once)
  return part.times(awake * consistency_share(rec.schedule, cfg))


def _aligned(rec: Recipe, n: int | None) -> list[Part]:
  """The denser rollout, and the comparison with it."""
  share, steps = reference_share(rec.schedule, rec.reference)
  share *= n is None or n >= rec.reference.start
  passes = [rollout(rec.model, rec.chunking, steps)]
  if rec.reference.share_exit_input:
    passes.append(chunk_causal(rec.model, rec.chunking))
  return [_served('reference', *passes).times(share), _features(rec).times(share)]


def _features(rec: Recipe) -> Part:
  """The compared features: the blocks up to the tapped one, over two clips, one with a gradient to the clip."""
  cfg, tokens = rec.alignment, rec.chunking.cache[1]
  if cfg.kind == 'latents':
    return Part('alignment', 0.0)
  whole = rec.teacher if cfg.network == 'teacher' else rec.model
  network = dataclasses.replace(whole, layers=cfg.layer + 1)
  once = _without_head(_clip(network, rec))
  one, other = _trained('student', network, once, frozen=True), _served('reference', once)
  gram = 2.0 * rec.chunking.frames * tokens**2 * network.dim
  # Products of tokens with their gradients: relations take 2 + 2 and make 2 anew, MMD takes 3 + 3.
  grams, again = (4, 2) if cfg.kind == 'relations' else (6, 0)
  total = one.flops + other.flops + grams * gram
  # Of the products of tokens two belong to the forward pass of relations, and three to that of MMD.
  backward = one.backward + grams / 2 * gram
  return Part('alignment', total, one.again + again * gram, backward)


def streamed(rec: Recipe) -> dict[str, list[Part]]:
  """Both steps along streams, in the mean over the clips of a stream; the VAE's boundary frame is not counted."""
  cfg, chunking = rec.streaming, rec.chunking
  clips = cfg.clips(chunking.frames)
  share, done = 1 / clips, chunking.frames - cfg.new
  steps = mean_steps(rec.schedule)
  rolled = [
    rollout(rec.model, chunking, steps, start=c * cfg.new, done=done if c else 0)
    for c in range(clips)
  ]
  student = _student(rec, [c * cfg.new for c in range(clips)])
  common = [_served('rollout', *rolled).times(share), _recached(rec).times(share * (clips > 1))]
  return {
    'generator': [
      _texts(rec, 2),
      *common,
      student.times(share),
      *_scores(rec),
    ],
    'critic': [_texts(rec, 1), *common, _trained('critic', rec.model, _clip(rec.model, rec))],
  }


def _recached(rec: Recipe) -> Part:
  """The pass over a window's frames when the prompt changes: their keys and values, so no head."""
  chunking = rec.chunking
  sink = chunking.sink if rec.streaming.global_sink else 0
  frames = chunking.window - sink
  chunk = chunking.chunk if rec.streaming.causal else frames
  alone = dataclasses.replace(chunking, frames=frames, chunk=chunk, window=None)
  return _served('recache', _without_head(chunk_causal(rec.model, alone, start=sink)))


def _forced(cfg: WanConfig, rec: Recipe) -> list[Passes]:
  """A noisy clip behind a clean one (`forcing.context`): of that the last chunk is left out, and the head."""
  before = rec.chunking.frames - rec.chunking.chunk
  clean = _without_head(chunk_causal(cfg, rec.chunking, frames=before))
  return [chunk_causal(cfg, rec.chunking), clean]


def initial_step(rec: Recipe, stage: str) -> list[Part]:
  """The step of a stage that makes the causal student: 'ode', 'ar', 'causal_ode' or 'causal_cd'."""
  behind = stage != 'ode' and (rec.forcing is None or rec.forcing.context == 'teacher')
  passes = _forced(rec.model, rec) if behind else [chunk_causal(rec.model, rec.chunking)]
  parts = [_trained('student', rec.model, *passes)]
  if stage != 'causal_cd':
    return [_texts(rec, 1), *parts]
  teacher = _forced(rec.teacher, rec)
  return [
    _texts(rec, 2),
    *parts,
    _served('average', *passes),
    _served('teacher', *teacher, *teacher),
  ]


def sampling(rec: Recipe, steps: int) -> list[Part]:
  """A clip of the student, in so many steps."""
  return [_texts(rec, 1), _served('rollout', rollout(rec.model, rec.chunking, steps))]


def flow_step(rec: Recipe, frames: int, tokens: int) -> list[Part]:
  """Flow matching of DiT and text encoder."""
  text = encoder(rec.text, rec.text_length)
  return [
    Part('text', 3 * text, backward=2 * text),
    _trained('student', rec.model, forward(rec.model, frames, tokens)),
  ]


def of_steps(config: ConfigDict, rec: Recipe, n: int | None = None) -> dict[str, list[Part]]:
  """The parts of every step of a config, of one example, by the step's name; {} for the VAE, which has no formula.

  Args:
    config: the experiment.
    rec: the same, built.
    n: training step, which tells the terms that sleep; None: none does.
  """
  if config.stage == 'vae':
    return {}
  if config.stage == 'flow':
    frames, rows, columns, _ = latent_shape(config)
    return {'dit': flow_step(rec, frames, rows * columns // PATCH**2)}
  if config.stage != 'selfforcing':
    return {'generator': initial_step(rec, config.stage)}
  if rec.streaming is not None:
    return streamed(rec)
  steps = {'generator': generator_step(rec, n), 'critic': critic_step(rec)}
  if config.data.kind != 'text_store':
    return steps
  return {k: [part for part in parts if part.name != 'text'] for k, parts in steps.items()}


def table(parts: list[Part]) -> str:
  """The parts of a step as lines: what each needs, what it computes again, and its share."""
  total = Part('total', sum(p.flops for p in parts), sum(p.again for p in parts))
  lines = [f'{"":<14} {"TFLOP":>10} {"again":>10} {"share":>7}']
  for part in [*parts, total]:
    share = part.flops / total.flops if total.flops else 0.0
    lines.append(
      f'{part.name:<14} {part.flops / 1e12:>10.4g} {part.again / 1e12:>10.4g} {share:>7.1%}'
    )
  return '\n'.join(lines)
