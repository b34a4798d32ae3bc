"""Generator and critic steps along streams (LongLive, self_forcing.md 5.2), of the same kind as those in `step`.

The generator trains on one clip of a stream and the critic on the clip behind it, so what a step carries on is the
next one's past, whoever takes it. Where step n stands is a function of n. Losses see a clip as long as any other, in
which the frames that were there before do not count.
"""

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, PyTree

from salt_jax.diffusion import flow, streaming
from salt_jax.diffusion.rollout import Past, Rollout, rollout, velocity
from salt_jax.losses.dmd import Fns, critic_loss, dmd_loss
from salt_jax.models import vae, wan
from salt_jax.models.prompt import Prompt
from salt_jax.recipe import Recipe, draw
from salt_jax.state import TrainState
from salt_jax.step import bound, conditioning, means, split_keys, step_keys, update

_STREAM = 4  # stream of keys, behind those of the steps


@struct.dataclass
class Scene:
  """What a step finds before it rolls out.

  Attributes:
    at: where it stands.
    carried: of the clip before, with the prompts of this stream and a cache that knows the present one.
    past: what the clip goes on from.
    mask: its new frames.
    texts: (prompts, unconditional prompts).
  """

  at: streaming.Place
  carried: streaming.Carried
  past: Past
  mask: Bool[Array, 'f']
  texts: tuple[Prompt, Prompt]


def image_of_last(
  params: PyTree, latents: Float[Array, 'b f h w z'], cfg: vae.VAEConfig
) -> Float[Array, 'b 1 h w z']:
  """Latent of the last pixel frame of a video, encoded as an image; decoded latent by latent in constant memory."""
  pixels, features = vae.decode_chunk(params, latents[:, :1], {}, cfg, True)

  def more(carry, latent):
    pixels, features = vae.decode_chunk(params, latent[:, None], carry[1], cfg, False)
    return (pixels[:, -1:], features), None

  (last, _), _ = jax.lax.scan(more, (pixels, features), jnp.moveaxis(latents[:, 1:], 1, 0))
  return vae.encode(params, last, cfg)


def place(recipe: Recipe, n: Array, before: int) -> streaming.Place:
  """Where step n stands; `before` of the steps that share its n came first."""
  key = jax.random.fold_in(jax.random.key(recipe.seed), _STREAM)
  calls = n + -(-n // recipe.generator_every) + before
  return streaming.place(key, calls, recipe.streaming, recipe.chunking.frames)


def _scene(state: TrainState, frozen, batch, at: streaming.Place, recipe: Recipe) -> Scene:
  carried = streaming.begin(state.stream, batch, at)
  switched = at.clip >= at.switch
  prompts = {
    name: jnp.where(switched, carried.prompts[f'next_{name}'], carried.prompts[name])
    for name in ('ids', 'mask')
  }
  texts = conditioning(frozen, prompts, recipe)
  cache = jax.lax.cond(
    at.clip == at.switch,
    lambda cache: _recached(state, carried.latents, cache, texts[0], at, recipe),
    lambda cache: cache,
    carried.cache,
  )
  carried = carried.replace(cache=cache)
  boundary = _boundary(frozen, carried.latents, at, recipe)
  past, mask = streaming.go_on(carried, boundary, at, recipe.chunking, recipe.streaming.new)
  return Scene(at, carried, past, mask, texts)


@jax.named_scope('recache')
def _recached(state: TrainState, latents, cache, text, at: streaming.Place, recipe: Recipe):
  chunking, cfg = recipe.chunking, recipe.streaming
  last = at.clip * cfg.new + chunking.frames - cfg.new
  return streaming.recache(
    wan.bind(recipe.model),
    state.params['generator'],
    cache,
    latents[:, -chunking.window :],
    text,
    last - chunking.window,
    global_sink=cfg.global_sink,
    chunk=chunking.chunk if cfg.causal else None,
    context_noise=chunking.context_noise,
  )


@jax.named_scope('boundary')
def _boundary(frozen, latents, at: streaming.Place, recipe: Recipe):
  """First frame of the clip as the losses see it; at the start of a stream, which has none, the VAE is not asked."""
  before = latents[:, : recipe.streaming.new + 1]
  if recipe.streaming.boundary == 'latent':
    return before[:, -1:]
  return jax.lax.cond(
    at.clip > 0,
    lambda z: image_of_last(frozen['vae'], z, recipe.vae),
    lambda z: jnp.zeros_like(z[:, -1:]),
    before,
  )


@jax.named_scope('rollout')
def _rolled(state: TrainState, scene: Scene, keys, plan, recipe: Recipe) -> Rollout:
  apply = wan.bind(recipe.model)
  return rollout(apply, state.params['generator'], keys, scene.texts[0], plan, scene.past)


def _carry_on(state: TrainState, scene: Scene, rolled: Rollout, recipe: Recipe) -> TrainState:
  new = recipe.streaming.new
  return state.replace(stream=streaming.carry_on(scene.carried, rolled, scene.mask, new))


def _where(at: streaming.Place) -> dict:
  return {
    'stream': jnp.float32(at.stream),
    'clip': jnp.float32(at.clip),
    'switched': jnp.float32(at.clip >= at.switch),
  }


def generator_step(
  state: TrainState, frozen, batch, n, *, recipe: Recipe
) -> tuple[TrainState, dict]:
  """Rolls the next clip of the stream out, then updates the student by DMD on its new frames."""
  shared, keys = step_keys(recipe, n, 'generator', batch['index'])
  rollout_keys, loss_keys = split_keys(keys)
  scene = _scene(state, frozen, batch, place(recipe, n, 0), recipe)
  drawn = draw(recipe, shared, n, terms=False)
  rolled = _rolled(state, scene, rollout_keys, drawn.plan, recipe)
  fns = Fns(
    teacher=bound(recipe.teacher, frozen['teacher'], wan.Clip(), 'teacher'),
    critic=bound(recipe.model, state.params['critic'], wan.Clip(), 'critic'),
  )
  apply, chunk = wan.bind(recipe.model), recipe.chunking.chunk

  def loss_fn(params):
    with jax.named_scope('student'):
      v = velocity(apply, params, rolled.trace, scene.texts[0], rolled.cache, chunk)
    x0 = flow.x0_from_velocity(rolled.trace.x, v, rolled.trace.sigma)
    x0 = jnp.where(scene.mask[None, :, None, None, None], x0, rolled.x0)
    per_example, aux = dmd_loss(fns, x0, scene.texts, loss_keys, recipe.dmd, scene.mask)
    total = recipe.losses['dmd'] * per_example.mean()
    return total, aux | {'loss_dmd': per_example, 'active_dmd': jnp.float32(1)}

  grads, aux = jax.grad(loss_fn, has_aux=True)(state.params['generator'])
  state = _carry_on(state, scene, rolled, recipe)
  state, norms = update(state, {'generator': grads}, recipe, averaged=True)
  counts = {'steps': drawn.steps, 'exit': drawn.plan.exit}
  return state, means(aux) | norms | jax.tree.map(jnp.float32, counts) | _where(scene.at)


def critic_step(state: TrainState, frozen, batch, n, *, recipe: Recipe) -> tuple[TrainState, dict]:
  """Rolls the clip behind out and fits the critic to its new frames."""
  shared, keys = step_keys(recipe, n, 'critic', batch['index'])
  rollout_keys, loss_keys = split_keys(keys)
  # The generator's step of the same n, if there is one, came first.
  before = jnp.where(n % recipe.generator_every == 0, 1, 0)
  scene = _scene(state, frozen, batch, place(recipe, n, before), recipe)
  plan = draw(recipe, shared, n, terms=False).plan
  rolled = _rolled(state, scene, rollout_keys, plan, recipe)

  def loss_fn(params):
    critic = bound(recipe.model, params, wan.Clip(), 'critic')
    per_example, aux = critic_loss(
      critic, rolled.x0, scene.texts[0], loss_keys, recipe.dmd, scene.mask
    )
    return per_example.mean(), aux | {'loss': per_example}

  grads, aux = jax.grad(loss_fn, has_aux=True)(state.params['critic'])
  state = _carry_on(state, scene, rolled, recipe)
  state, norms = update(state, {'critic': grads}, recipe, averaged=False)
  return state, means(aux) | norms | _where(scene.at)
