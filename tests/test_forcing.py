"""Teacher forcing in two passes, against diffusers on the doubled sequence under the mask of the originals."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import torch

from salt_jax import convert
from salt_jax.diffusion import forcing
from salt_jax.diffusion.rollout import empty_cache
from salt_jax.models import wan
from salt_jax.models.cache import write
from tests import test_wan, tiny

CHUNK, FRAMES, BATCH = tiny.CHUNK, tiny.FRAMES, tiny.BATCH
TOKENS = math.prod(tiny.LATENT[:2]) // 4


def _inputs():
  """(noisy, its t, clean, its t, text): no level is shared, and the clean half's are small."""
  return tiny.latents(1), tiny.levels(2), tiny.latents(4), 0.02 * tiny.levels(5), tiny.prompt()


@functools.partial(jax.jit, static_argnames=('live', 'chunk'))
def _forced(params, x, t, clean, clean_t, text, live=True, chunk=CHUNK):
  model = functools.partial(wan.apply, params, cfg=tiny.WAN)
  return forcing.forced(model, chunk, live=live)(x, t, text, clean, clean_t)


def _gradient(params, live):
  x, t, clean, clean_t, text = _inputs()
  weights = tiny.latents(6)

  def loss(params):
    return (weights * _forced(params, x, t, clean, clean_t, text, live)).sum()

  return jax.grad(loss)(params)


def _mask():
  """[query, key] over clean tokens, then noisy tokens, written as the originals define it."""
  half = FRAMES * TOKENS
  chunk = np.arange(half) // (CHUNK * TOKENS)
  allowed = np.zeros((2 * half, 2 * half), bool)
  for q in range(2 * half):
    for k in range(2 * half):
      b, other, clean_key = chunk[q % half], chunk[k % half], k < half
      if q < half:
        allowed[q, k] = clean_key and other <= b
      else:
        allowed[q, k] = other < b if clean_key else other == b
  return allowed


def _doubled():
  """diffusers on [clean; noisy] in one sequence: the noisy half's velocity, and gradients in Wan's names."""
  model, params = test_wan._oracle(tiny.WAN)
  *clips, prompt = _inputs()
  x, t, clean, clean_t, text = (torch.from_numpy(np.array(y)) for y in (*clips, prompt.text))
  weights = torch.from_numpy(np.array(tiny.latents(6)))
  both = torch.cat([clean, x], 1).movedim(-1, 1)
  per_token = torch.cat([clean_t, t], 1).repeat_interleave(TOKENS, 1)
  test_wan._Masked.mask = torch.from_numpy(_mask())
  for block in model.blocks:
    block.attn1.set_processor(test_wan._Masked())
  cos, sin = model.rope(clean.movedim(-1, 1))
  positions = (torch.cat([cos, cos], 1), torch.cat([sin, sin], 1))
  own, model.rope.forward = model.rope.forward, lambda _: positions
  try:
    model.zero_grad()
    v = model(both, per_token, text, return_dict=False)[0].movedim(1, -1)[:, FRAMES:]
    (weights * v).sum().backward()
  finally:
    model.rope.forward = own
  grads = {name: p.grad.numpy().copy() for name, p in model.named_parameters()}
  model.zero_grad()
  return (
    params,
    v.detach().numpy(),
    convert.from_wan(convert.rename(grads, 'dit', 'diffusers'), 'dit'),
  )


def test_two_passes_equal_the_doubled_sequence_in_values_and_gradients():
  params, velocity, grads = _doubled()
  x, t, clean, clean_t, text = _inputs()
  assert np.abs(velocity).std() > 0.05
  # float32 sums in another order, three layers deep.
  np.testing.assert_allclose(_forced(params, x, t, clean, clean_t, text), velocity, atol=1e-4)
  ours = _gradient(params, live=True)
  for (path, a), b in zip(
    jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(grads), strict=True
  ):
    error = np.linalg.norm(a - b) / (np.linalg.norm(b) + 1e-2)
    assert error < 1e-4, f'{jax.tree_util.keystr(path)}: relative error {error}'


def test_without_live_the_clean_half_gives_no_gradient():
  params = tiny.params()
  x, t, clean, clean_t, text = _inputs()
  dead, live = _gradient(params, False), _gradient(params, True)
  assert not np.allclose(jax.tree.leaves(dead)[0], jax.tree.leaves(live)[0], rtol=1e-2)

  @functools.partial(jax.jit, static_argnums=1)
  def loss(clean, live):
    return jnp.square(_forced(params, x, t, clean, clean_t, text, live)).sum()

  assert not np.asarray(jax.grad(loss)(clean, False)).any()
  assert np.asarray(jax.grad(loss)(clean, True)).any()
  np.testing.assert_allclose(loss(clean, False), loss(clean, True), rtol=1e-6)
  assert not wan.Clip().live, 'rollouts rely on a cache without gradient'


def _influence(of):
  """[out chunk, in chunk] of the noisy or of the clean half."""
  inputs, where = list(_inputs()), {'noisy': 0, 'clean': 2}[of]

  @jax.jit
  def gradient(y, chunk):
    def loss(y):
      v = _forced(tiny.params(), *inputs[:where], y, *inputs[where + 1 :])
      start = chunk * CHUNK
      return jnp.square(jax.lax.dynamic_slice_in_dim(v, start, CHUNK, 1)).sum()

    return jnp.abs(jax.grad(loss)(y)).sum((0, 2, 3, 4)).reshape(-1, CHUNK).sum(1)

  return np.stack([gradient(inputs[where], jnp.int32(i)) for i in range(FRAMES // CHUNK)]) > 0


def test_a_noisy_chunk_sees_itself_and_the_clean_chunks_before_it():
  number = np.arange(FRAMES // CHUNK)
  np.testing.assert_array_equal(_influence('noisy'), number[:, None] == number[None])
  np.testing.assert_array_equal(_influence('clean'), number[:, None] > number[None])


def test_one_chunk_over_the_clip_has_no_context():
  x, t, clean, clean_t, text = _inputs()
  forced = _forced(tiny.params(), x, t, clean, clean_t, text, chunk=FRAMES)
  # Two programs of the same arithmetic: float32 rounding.
  np.testing.assert_allclose(forced, test_wan._clip(tiny.params(), x, t, text)[0], atol=1e-5)


def test_context_of_time_zero_is_what_a_sampler_caches():
  """The last chunk in the forced pass and behind a cache that was filled chunk by chunk, as inference does it."""
  x, t, clean, _, text = _inputs()
  params, zero = tiny.params(), jnp.zeros((BATCH, FRAMES))
  expected = _forced(params, x, t, clean, zero, text)[:, -CHUNK:]
  apply = jax.jit(functools.partial(wan.apply, cfg=tiny.WAN))
  cache = empty_cache(tiny.chunking(), BATCH)
  for start in range(0, FRAMES - CHUNK, CHUNK):
    part = slice(start, start + CHUNK)
    ctx = wan.Chunk(cache, jnp.int32(start))
    features = apply(params, clean[:, part], zero[:, part], text, ctx)[1]
    cache = write(cache, features.k, features.v, start)
  ctx = wan.Chunk(cache, jnp.int32(FRAMES - CHUNK))
  got, _ = apply(params, x[:, -CHUNK:], t[:, -CHUNK:], text, ctx)
  np.testing.assert_allclose(got, expected, atol=1e-5)
