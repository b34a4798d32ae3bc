"""The steps of Causal Forcing's initial stages, of the same kind as those in `step`.

All three run the student behind clean clips with `live` context: the clean pass is part of what is trained.
"""

import functools

import jax
import jax.numpy as jnp

from salt_jax.diffusion import flow, forcing
from salt_jax.losses import causal
from salt_jax.models import wan
from salt_jax.recipe import Recipe
from salt_jax.state import TrainState
from salt_jax.step import conditioning, gradients, means, step_keys, update


def _forced(cfg: wan.WanConfig, params, recipe: Recipe, name: str = 'student'):
  model = jax.named_scope(name)(functools.partial(wan.bind(cfg), params))
  return forcing.forced(model, recipe.chunking.chunk, live=True)


def _descend(state: TrainState, batch, n, loss_fn, recipe: Recipe) -> tuple[TrainState, dict]:
  """One update of the generator and its average by `loss_fn(params, batch, keys) -> (per example, aux)`."""
  _, keys = step_keys(recipe, n, 'generator', batch['index'])

  def mean(params, examples):
    per_example, aux = loss_fn(params, *examples)
    return per_example.mean(), aux | {'loss': per_example}

  grads, aux = gradients(mean, state.params['generator'], (batch, keys), recipe)
  state, norms = update(state, {'generator': grads}, recipe, averaged=True)
  return state, means(aux) | norms


def ar_step(state: TrainState, frozen, batch, n, *, recipe: Recipe) -> tuple[TrainState, dict]:
  """Flow matching of an autoregressive model: an own level for each chunk, behind clean or noisy chunks."""
  chunk = recipe.chunking.chunk

  def loss_fn(params, batch, keys):
    text, _ = conditioning(frozen, batch, recipe)
    x0 = batch['latents'].astype(jnp.float32)
    model = jax.named_scope('student')(functools.partial(wan.bind(recipe.model), params))
    if recipe.forcing.context == 'teacher':
      model = forcing.forced(model, chunk, live=True)
    else:
      model = forcing.diffused(model, chunk)
    return causal.causal_flow_loss(
      model, x0, text, keys, recipe.forcing, chunk=chunk, shift=recipe.schedule.shift
    )

  return _descend(state, batch, n, loss_fn, recipe)


def causal_ode_step(
  state: TrainState, frozen, batch, n, *, recipe: Recipe
) -> tuple[TrainState, dict]:
  """Regression on trajectories of the autoregressive model."""
  schedule = recipe.schedule
  sigmas = jnp.asarray(flow.few_step_sigmas(schedule.steps[0], schedule.shift), jnp.float32)

  def loss_fn(params, batch, keys):
    text, _ = conditioning(frozen, batch, recipe)
    record = batch['trajectory'].astype(jnp.float32)
    model = _forced(recipe.model, params, recipe)
    return causal.causal_ode_loss(model, record, text, keys, sigmas)

  return _descend(state, batch, n, loss_fn, recipe)


def causal_cd_step(
  state: TrainState, frozen, batch, n, *, recipe: Recipe
) -> tuple[TrainState, dict]:
  """Consistency along the autoregressive model's guided steps; the target is the student's own average."""
  target = _forced(recipe.model, state.ema['generator'], recipe, 'average')
  teacher = _forced(recipe.teacher, frozen['ar'], recipe, 'teacher')

  def loss_fn(params, batch, keys):
    texts = conditioning(frozen, batch, recipe)
    x0 = batch['latents'].astype(jnp.float32)
    fns = causal.Fns(_forced(recipe.model, params, recipe), target, teacher)
    return causal.causal_consistency_loss(
      fns, x0, texts, keys, recipe.causal_consistency, recipe.schedule.shift
    )

  return _descend(state, batch, n, loss_fn, recipe)
