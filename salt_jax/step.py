"""The training steps: pure functions `(state, frozen, batch, n) -> (state, metrics)`, jitted once each by `train`.

`frozen` holds the networks that only serve (teacher, text encoder, VAE) and the ids of the unconditional prompt.
All randomness of step n comes from `fold_in(seed, n)` and an example's index in the global batch.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int, PyTree

from salt_jax import optim
from salt_jax.diffusion import flow
from salt_jax.diffusion.conditioning import KNOWN, condition
from salt_jax.diffusion.draws import Draw
from salt_jax.diffusion.rollout import Trace, rollout, velocity
from salt_jax.losses.alignment import alignment_loss, when
from salt_jax.losses.consistency import consistency_loss, ramp
from salt_jax.losses.dmd import Fns, critic_loss, dmd_loss
from salt_jax.losses.reconstruction import vae_loss
from salt_jax.losses.regression import flow_matching_loss, ode_loss
from salt_jax.models import text as text_model
from salt_jax.models import wan
from salt_jax.models.prompt import Prompt
from salt_jax.recipe import Recipe, draw
from salt_jax.state import TrainState

# Of a step's keys, and of its data.
STREAMS = {'generator': 0, 'critic': 1, 'vae': 2, 'dit': 3}
# Key of the noise that features are taken at; frames, which fold in too, stay below.
_FEATURES = 2**20


def step_keys(recipe: Recipe, n: Int[Array, ''], stream: str, index: Int[Array, 'b']):
  """(a key for what all examples share, a key for each example) of step n."""
  key = jax.random.fold_in(jax.random.fold_in(jax.random.key(recipe.seed), n), STREAMS[stream])
  shared, examples = jax.random.split(key)
  return shared, flow.example_keys(examples, index)


def split_keys(keys):
  """Two keys for each of `[b]`, as two arrays."""
  return jax.vmap(jax.random.split, out_axes=1)(keys)


@jax.named_scope('text')
def encode(frozen, ids, mask, recipe: Recipe):
  """Encoder rows `[b n d]` of tokenised prompts, without gradient."""
  return jax.lax.stop_gradient(text_model.encode(frozen['text'], ids, mask, recipe.text))


def rows(frozen, prompts, recipe: Recipe):
  """Encoder rows `[b n d]` of prompts that come as tokens (ids, mask), or as rows of a store (text)."""
  if 'text' in prompts:
    return prompts['text'].astype(jnp.float32)
  return encode(frozen, prompts['ids'], prompts['mask'], recipe)


def negatives(frozen, batch, count: int) -> dict[str, Array]:
  """The unconditional prompt of each of `count` examples: the one of all, or its own where `has_negative` says so."""
  shared = {
    name: jnp.broadcast_to(x, (count, *x.shape[1:])) for name, x in frozen['negative'].items()
  }
  if 'has_negative' not in batch:
    return shared

  def pick(name, x):
    own = rearrange(batch['has_negative'], f'b -> b {"1 " * (x.ndim - 1)}')
    return jnp.where(own, batch[f'negative_{name}'], x)

  return {name: pick(name, x) for name, x in shared.items()}


def given_frames(batch, recipe: Recipe) -> Float[Array, 'b f h w c'] | None:
  """`Prompt.frames` of a batch: the mask, and its field `condition` (`precompute.first_frames`); None for T2V."""
  if not recipe.model.frame_channels:
    return None
  return condition(batch['condition'], KNOWN[recipe.model.pictures])


def given_image(batch, recipe: Recipe) -> Float[Array, 'b i e'] | None:
  """`Prompt.image` of a batch: its field `image`, rows of the CLIP tower; None for models without that input."""
  return batch['image'].astype(jnp.float32) if recipe.model.image_dim else None


def conditioning(frozen, batch, recipe: Recipe) -> tuple[Prompt, Prompt]:
  """(prompts of a batch, the same with the unconditional text): both have the same picture (wan.md 5.4)."""
  text = rows(frozen, batch, recipe)
  prompt = Prompt(text, given_image(batch, recipe), given_frames(batch, recipe))
  others = negatives(frozen, batch, text.shape[0])
  return prompt, prompt.replace(text=rows(frozen, others, recipe))


def bound(cfg: wan.WanConfig, params, ctx: wan.Clip, name: str):
  """`(x, t, text) -> velocity` with the parameters inside; a profile shows it as `name`."""
  return jax.named_scope(name)(lambda x, t, text: wan.apply(params, x, t, text, ctx, cfg)[0])


@jax.named_scope('optimizer')
def update(
  state: TrainState, grads: dict, recipe: Recipe, averaged: bool
) -> tuple[TrainState, dict]:
  """One optimizer update of the networks in `grads`, and of the average if they have one."""
  params, opt, norms = dict(state.params), dict(state.opt), {}
  for name, grad in grads.items():
    params[name], opt[name], new = optim.apply_updates(
      recipe.optimizers[name], grad, state.opt[name], state.params[name]
    )
    norms |= {f'{k}/{name}' if len(grads) > 1 else k: v for k, v in new.items()}
  state = state.replace(params=params, opt=opt)
  if averaged:
    new = {name: params[name] for name in state.ema}
    ema = optim.ema(state.ema, new, recipe.ema_decay, state.updates, recipe.ema_start)
    state = state.replace(ema=ema, updates=state.updates + 1)
  return state, norms


def means(aux: dict) -> dict:
  """Per-clip scalars as one number each."""
  return {name: jnp.mean(value) for name, value in aux.items()}


def gradients(
  loss: Callable, params: PyTree, examples: PyTree, recipe: Recipe
) -> tuple[PyTree, dict]:
  """Gradient of the mean loss of examples, and what these say, over `recipe.accumulate` parts one after another.

  Parts take memory for their own examples alone, and the sum of their gradients is kept besides.

  Args:
    loss: `(params, examples) -> (their mean loss, aux)`, in which an example depends on its own rows alone.
    params: what to differentiate by.
    examples: fields and keys `[b ...]`.
    recipe: how many parts, which divide b.

  Returns:
    (gradient, aux with a leading axis of parts if there are several).
  """
  descend, parts = jax.grad(loss, has_aux=True), recipe.accumulate
  if parts == 1:
    return descend(params, examples)

  def more(total, part):
    grads, aux = descend(params, part)
    return jax.tree.map(jnp.add, total, grads), aux

  zeros = jax.tree.map(jnp.zeros_like, params)
  total, aux = jax.lax.scan(more, zeros, in_parts(examples, parts))
  return jax.tree.map(lambda x: x / parts, total), aux


def in_parts(examples: PyTree, parts: int) -> PyTree:
  """`[b ...]` as `[part b/part ...]`: each part has examples of every device, so that none is moved."""
  return jax.tree.map(lambda x: rearrange(x, '(b part) ... -> part b ...', part=parts), examples)


def generator_step(
  state: TrainState, frozen, batch, n, *, recipe: Recipe
) -> tuple[TrainState, dict]:
  """Rolls the student out, then updates it by the losses that the config lists."""
  shared, keys = step_keys(recipe, n, 'generator', batch['index'])
  drawn = draw(recipe, shared, n)

  def loss_fn(params, part):
    return _generator_loss(params, part, state, frozen, n, drawn, recipe)

  examples = batch, *split_keys(keys)
  grads, aux = gradients(loss_fn, state.params['generator'], examples, recipe)
  state, norms = update(state, {'generator': grads}, recipe, averaged=True)
  counts = {'steps': drawn.steps, 'exit': drawn.plan.exit}
  return state, means(aux) | norms | jax.tree.map(jnp.float32, counts)


def _generator_loss(params, examples, state: TrainState, frozen, n, drawn: Draw, recipe: Recipe):
  """(the weighted sum of the terms, their parts); the rollout is by the state's own weights, without gradient."""
  batch, rollout_keys, loss_keys = examples
  texts = text, _ = conditioning(frozen, batch, recipe)
  apply = wan.bind(recipe.model)
  with jax.named_scope('rollout'):
    rolled = rollout(apply, state.params['generator'], rollout_keys, text, drawn.plan)
  ask = functools.partial(
    velocity, apply, text=text, cache=rolled.cache, chunk=recipe.chunking.chunk
  )
  with jax.named_scope('student'):
    v = ask(params, rolled.trace)
  x0 = flow.x0_from_velocity(rolled.trace.x, v, rolled.trace.sigma)
  terms = {
    'dmd': lambda: _dmd(state, frozen, x0, texts, loss_keys, recipe),
    'consistency': lambda: _consistency(state, ask, params, (rolled.trace.x, v), drawn, recipe),
    'alignment': lambda: _alignment(state, frozen, x0, (text, rollout_keys, rolled), drawn, recipe),
  }
  total, aux = 0.0, {}
  for name, weight in recipe.losses.items():
    per_example, active, extra = terms[name]()
    if name == 'consistency':
      weight = weight * ramp(n, recipe.consistency.warmup)
    total += weight * per_example.mean()
    aux |= {f'loss_{name}': per_example, f'active_{name}': jnp.float32(active)} | extra
  return total, aux


def _dmd(state: TrainState, frozen, x0, texts, keys, recipe: Recipe):
  fns = Fns(
    teacher=bound(recipe.teacher, frozen['teacher'], wan.Clip(), 'teacher'),
    critic=bound(recipe.model, state.params['critic'], wan.Clip(), 'critic'),
  )
  per_example, aux = dmd_loss(fns, x0, texts, keys, recipe.dmd)
  return per_example, True, aux


def _consistency(state: TrainState, ask, params, exit_pass, drawn: Draw, recipe: Recipe):
  cfg = recipe.consistency
  target = state.ema['generator'] if cfg.target == 'ema' else params

  @jax.named_scope('consistency')
  def again(x, sigma):
    return ask(target, Trace(x, sigma))

  per_example, aux = consistency_loss(again, *exit_pass, drawn.triple, cfg)
  return per_example, drawn.triple.active, aux


def _alignment(state: TrainState, frozen, x0, student, drawn: Draw, recipe: Recipe):
  text, keys, rolled = student
  apply, cfg = wan.bind(recipe.model), recipe.alignment
  weights, sizes = {
    'teacher': (frozen['teacher'], recipe.teacher),
    'critic': (state.params['critic'], recipe.model),
    'student': (state.params['generator'], recipe.model),
  }[cfg.network]

  def features(x, t):
    return wan.features(weights, x, t, text, cfg.layer, sizes)

  @jax.named_scope('reference')
  def reference():
    dense = rollout(apply, state.params['generator'], keys, text, drawn.reference)
    if not recipe.reference.share_exit_input:
      return dense.x0
    chunk = recipe.chunking.chunk
    v = velocity(apply, state.params['generator'], rolled.trace, text, dense.cache, chunk)
    return flow.x0_from_velocity(rolled.trace.x, v, rolled.trace.sigma)

  def loss(x0):
    aim, feature_keys = reference(), jax.vmap(jax.random.fold_in, (0, None))(keys, _FEATURES)
    with jax.named_scope('alignment'):
      return alignment_loss(features, x0, aim, feature_keys, cfg)

  return when(drawn.has_reference, loss, x0), drawn.has_reference, {}


def critic_step(state: TrainState, frozen, batch, n, *, recipe: Recipe) -> tuple[TrainState, dict]:
  """Rolls the student out anew and fits the critic to it."""
  shared, keys = step_keys(recipe, n, 'critic', batch['index'])
  plan = draw(recipe, shared, n, terms=False).plan

  def loss_fn(params, examples):
    batch, rollout_keys, loss_keys = examples
    text, _ = conditioning(frozen, batch, recipe)
    with jax.named_scope('rollout'):
      rolled = rollout(wan.bind(recipe.model), state.params['generator'], rollout_keys, text, plan)
    critic = bound(recipe.model, params, wan.Clip(), 'critic')
    per_example, aux = critic_loss(critic, rolled.x0, text, loss_keys, recipe.dmd)
    return per_example.mean(), aux | {'loss': per_example}

  examples = batch, *split_keys(keys)
  grads, aux = gradients(loss_fn, state.params['critic'], examples, recipe)
  state, norms = update(state, {'critic': grads}, recipe, averaged=False)
  return state, means(aux) | norms


def ode_step(state: TrainState, frozen, batch, n, *, recipe: Recipe) -> tuple[TrainState, dict]:
  """Chunk-causal regression on teacher trajectories."""
  _, keys = step_keys(recipe, n, 'generator', batch['index'])
  sigmas = jnp.asarray(
    flow.few_step_sigmas(recipe.schedule.steps[0], recipe.schedule.shift), jnp.float32
  )
  chunk = recipe.chunking.chunk

  def loss_fn(params, examples):
    batch, keys = examples
    text, _ = conditioning(frozen, batch, recipe)
    model = bound(recipe.model, params, wan.Clip(chunk=chunk), 'student')
    trajectory = batch['trajectory'].astype(jnp.float32)
    per_example, aux = ode_loss(model, trajectory, text, keys, sigmas, chunk=chunk)
    return per_example.mean(), aux | {'loss': per_example}

  grads, aux = gradients(loss_fn, state.params['generator'], (batch, keys), recipe)
  state, norms = update(state, {'generator': grads}, recipe, averaged=True)
  return state, means(aux) | norms


def flow_step(state: TrainState, frozen, batch, n, *, recipe: Recipe) -> tuple[TrainState, dict]:
  """Flow matching of DiT and text encoder together; some prompts are dropped for guidance."""
  _, keys = step_keys(recipe, n, 'dit', batch['index'])

  def loss_fn(params, examples):
    batch, drop_keys, loss_keys = examples
    drop = jax.vmap(jax.random.bernoulli, (0, None))(drop_keys, recipe.text_dropout)[:, None]
    ids = jnp.where(drop, frozen['negative']['ids'], batch['ids'])
    mask = jnp.where(drop, frozen['negative']['mask'], batch['mask'])
    with jax.named_scope('text'):
      rows = text_model.encode(params['text'], ids, mask, recipe.text)
    text = Prompt(rows, given_image(batch, recipe), given_frames(batch, recipe))
    model = bound(recipe.model, params['dit'], wan.Clip(), 'student')
    x0 = batch['latents'].astype(jnp.float32)
    per_example, aux = flow_matching_loss(model, x0, text, loss_keys, recipe.flow_shift)
    return per_example.mean(), aux | {'loss': per_example}

  grads, aux = gradients(loss_fn, state.params, (batch, *split_keys(keys)), recipe)
  state, norms = update(state, grads, recipe, averaged=True)
  return state, means(aux) | norms


def vae_step(state: TrainState, frozen, batch, n, *, recipe: Recipe) -> tuple[TrainState, dict]:
  """Reconstruction of clips."""
  del frozen
  shared, _ = step_keys(recipe, n, 'vae', batch['index'])
  video = to_unit(batch['video'])

  def loss_fn(params):
    per_example, aux = vae_loss(
      params, video, shared, recipe.vae, l1_weight=recipe.l1_weight, kl_weight=recipe.kl_weight
    )
    return per_example.mean(), aux | {'loss': per_example}

  grads, aux = jax.grad(loss_fn, has_aux=True)(state.params['vae'])
  state, norms = update(state, {'vae': grads}, recipe, averaged=True)
  return state, means(aux) | norms


def to_unit(video):
  """uint8 frames to [-1, 1]."""
  return video.astype(jnp.float32) / 127.5 - 1


def to_bytes(video):
  """[-1, 1] to uint8 as the original writes it: clamped, truncated, on the device."""
  return jnp.clip((video + 1) * 127.5, 0, 255).astype(jnp.uint8)
