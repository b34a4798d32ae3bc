"""FLOPs by formula: published sizes, a count of every product in a traced program, and the draws themselves."""

import collections
import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import causal_init, dmd, pretrain, selfforcing
from salt_jax import causal_steps, flops, recipe, step, weights
from salt_jax import state as states
from salt_jax.diffusion.rollout import Chunking, empty_cache, rollout, student_plan
from salt_jax.models import text as text_model
from salt_jax.models import wan
from salt_jax.models.cache import visible_runs
from tests import tiny, tiny_config

SIZES = {'1.3b': wan.wan_1_3b(), '14b': wan.wan_14b()}


def _of_size(cfg, **changes) -> Chunking:
  cache = (cfg.layers, 1560, cfg.heads, cfg.head_dim)
  return Chunking(**dict(frames=21, chunk=3, latent=(60, 104, 16), cache=cache) | changes)


def products(jaxpr, passes=None, names='', scale=1, found=None) -> collections.Counter:
  """FLOPs of all matrix products of a traced program by the named scope that they stand in.

  Args:
    jaxpr: the program.
    passes: how often a loop without a fixed length runs, by scope.
    names, scale, found: of the program around it.
  """
  found = collections.Counter() if found is None else found
  for eqn in jaxpr.eqns:
    stack, times = f'{names}/{eqn.source_info.name_stack}', scale
    scope = next(iter(SCOPES.findall(stack)), '')
    if eqn.primitive.name == 'dot_general':
      (contracted, _), _ = eqn.params['dimension_numbers']
      terms = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
      found[scope] += scale * 2 * terms * math.prod(eqn.outvars[0].aval.shape)
    elif eqn.primitive.name == 'scan':
      times = scale * eqn.params['length']
    elif eqn.primitive.name == 'while':
      times = scale * passes[scope]
    elif eqn.primitive.name == 'cond' and len(eqn.params['branches']) > 2:
      times = scale / len(eqn.params['branches'])  # chunks of a loop, each as often as the others
    for inner in jax.tree.leaves(tuple(eqn.params.values()), is_leaf=_is_program):
      if _is_program(inner):
        products(getattr(inner, 'jaxpr', inner), passes, stack, times, found)
  return found


SCOPES = re.compile(
  r'\b(text|rollout|student|teacher|critic|consistency|reference|alignment|average|recache)\b'
)


def _is_program(x) -> bool:
  return hasattr(x, 'eqns') or hasattr(getattr(x, 'jaxpr', None), 'eqns')


def _traced(f, *args) -> float:
  return products(jax.make_jaxpr(f)(*args).jaxpr).total()


@pytest.mark.parametrize(
  'size, tokens, tera, attention',
  [
    ('1.3b', 1560, 283, 0.70),
    ('1.3b', 3600, 1250, 0.84),
    ('14b', 1560, 1678, 0.52),
    ('14b', 3600, 6523, 0.72),
  ],
)
def test_one_pass_over_a_clip(size, tokens, tera, attention):
  parts = flops.forward(SIZES[size], 21, tokens)
  total = sum(parts.values())
  assert round(total / 1e12) == tera
  assert parts['self_attention'] / total == pytest.approx(attention, abs=0.005)


@pytest.mark.parametrize('size, growing, fixed', [('1.3b', 199, 284), ('14b', 1314, 1691)])
def test_one_denoising_pass_over_seven_chunks(size, growing, fixed):
  cfg = SIZES[size]
  one = sum(flops.rollout(cfg, _of_size(cfg), 0).values())  # the cache's pass alone
  assert one / 1e12 == pytest.approx(growing, abs=0.8)
  masked = 7 * sum(flops.forward(cfg, 3, 1560, 3 * 1560 * 21 * 1560).values())
  assert masked / 1e12 == pytest.approx(fixed, abs=0.6)
  five = flops.rollout(cfg, _of_size(cfg), 4)
  assert sum(five.values()) == pytest.approx(5 * one)


def test_bytes_of_a_cache():
  for size, frame, clip, window in (('1.3b', 274 / 1024, 5.6, 3.2), ('14b', 1.19, 25.0, 14.3)):
    for frames, gib in ((1, frame), (21, clip), (12, window)):
      found = flops.cache_bytes(SIZES[size], frames, 1560) / 2**30
      assert found == pytest.approx(gib, abs=0.05 if frames > 1 else 0.005)
  like = jax.eval_shape(lambda: empty_cache(tiny.chunking(), 1))
  held = sum(x.size * x.dtype.itemsize for x in (like.k, like.v))
  assert held == flops.cache_bytes(tiny.WAN, tiny.FRAMES, 6, 'float32')


TOKENS = math.prod(tiny.LATENT[:2]) // 4


@pytest.mark.parametrize(
  'cfg, chunk', [(tiny.WAN, None), (tiny.WAN, 2), (tiny.I2V, 2), (tiny.FLF2V, None)]
)
def test_a_clip_against_every_product_of_the_traced_pass(cfg, chunk):
  apply = functools.partial(wan.apply, ctx=wan.Clip(chunk=chunk), cfg=cfg)
  x, t = tiny.latents(0, batch=1), tiny.levels(1, batch=1)
  found = _traced(apply, wan.param_shapes(cfg), x, t, tiny.prompt(cfg, batch=1))
  if chunk is None:
    expected = flops.forward(cfg, tiny.FRAMES, TOKENS)
  else:
    expected = flops.chunk_causal(cfg, tiny.chunking(chunk=chunk))
  assert found == sum(expected.values())


@pytest.mark.parametrize('window, sink', [(None, 0), (5, 1)])
def test_a_chunk_and_a_cached_clip_against_the_traced_pass(window, sink):
  """A static start reads what a chunk may see and no more, so the program holds no other product."""
  cfg, chunking = tiny.WAN, tiny.chunking(window=window, sink=sink, chunk=1)
  cache = empty_cache(chunking, 1)
  params, text = wan.param_shapes(cfg), tiny.prompt(batch=1)
  for start in range(tiny.FRAMES):
    x, t = tiny.latents(0, 1, 1), tiny.levels(1, 1, 1)
    apply = functools.partial(wan.apply, ctx=wan.Chunk(cache, start), cfg=cfg)
    one = flops.forward(cfg, 1, TOKENS, flops.chunk_pairs(chunking, start))
    assert _traced(apply, params, x, t, text) == sum(one.values())
  x, t = tiny.latents(0, batch=1), tiny.levels(1, batch=1)
  apply = functools.partial(wan.apply, ctx=wan.Clip(chunk=1, past=cache), cfg=cfg)
  assert _traced(apply, params, x, t, text) == sum(flops.chunk_causal(cfg, chunking).values())


@pytest.mark.parametrize('window, sink', [(None, 0), (5, 1)])
def test_a_loop_over_chunks_multiplies_no_more_than_the_chunks_by_themselves(window, sink):
  cfg, chunking = tiny.WAN, tiny.chunking(window=window, sink=sink)
  plan = student_plan(chunking, jnp.array([1.0, 0.5, 0.0]), jnp.int32(1))
  args = wan.param_shapes(cfg), tiny.keys(1), tiny.prompt(batch=1)

  def count(unroll):
    static = dataclasses.replace(chunking, unroll=unroll)

    def run(*args):
      return rollout(functools.partial(wan.apply, cfg=cfg), *args, plan.replace(chunking=static))

    return products(jax.make_jaxpr(run)(*args).jaxpr, {'': 1}).total()

  assert count(False) == pytest.approx(count(True), rel=1e-9)


@pytest.mark.parametrize('window, sink', [(None, 0), (6, 0), (9, 3), (12, 3), (21, 3), (30, 3)])
def test_frames_that_a_chunk_sees(window, sink):
  chunking = tiny.chunking(frames=21, chunk=3, window=window, sink=sink)
  cache = jax.eval_shape(lambda: empty_cache(chunking, 1))
  for start in range(0, 21, 3):
    runs = visible_runs(cache, start, 3)
    assert flops.seen(chunking, start) == sum(run.stop - run.start for run in runs), start


def test_the_encoder_against_the_traced_pass():
  cfg = dataclasses.replace(text_model.nano_text(), dim_attn=32)
  ids, mask = jnp.zeros((1, 7), jnp.int32), jnp.ones((1, 7), bool)
  encode = functools.partial(text_model.encode, cfg=cfg)
  assert _traced(encode, text_model.param_shapes(cfg), ids, mask) == flops.encoder(cfg, 7)


def _traced_step(config, rec, run, **fields) -> collections.Counter:
  """Products of a step by scope, from shapes alone, at any size.

  Args:
    config: with unrolled chunks, which read of the cache what they may see and no more.
    rec: the same, built.
    run: the step.
    **fields: of the batch: axes between those of batch and latents.
  """
  dit, encoder = (weights.shapes(*of) for of in (('dit', rec.model), ('umt5', rec.text)))
  names = ('dit', 'text') if config.stage == 'flow' else ('generator', 'critic')
  networks = {name: encoder if name == 'text' else dit for name in names}
  optimizers = dict.fromkeys(names, next(iter(rec.optimizers.values())))
  state = states.shapes_of(networks, rec.optimizers | optimizers, names)
  row = {'ids': jnp.int32, 'mask': bool}
  row = {name: jax.ShapeDtypeStruct((1, rec.text_length), of) for name, of in row.items()}
  teacher = weights.shapes('dit', rec.teacher or rec.model)
  frozen = {'negative': row, 'text': encoder, 'teacher': teacher, 'ar': teacher}
  shape = recipe.latent_shape(config)
  batch = {name: jnp.zeros((1, *of, *shape)) for name, of in fields.items()}
  program = jax.make_jaxpr(functools.partial(run, recipe=rec))
  traced = program(state, frozen, row | batch | {'index': jnp.zeros(1, jnp.int32)}, jnp.int32(0))
  return products(traced.jaxpr, _passes(rec))


def _passes(rec) -> dict[str, float]:
  """How often a chunk's loop runs in the mean, in the student's rollout and in a reference."""
  found = {}
  if rec.schedule is not None:
    found['rollout'] = flops.mean_steps(rec.schedule) + rec.chunking.causal
  if rec.reference is not None:
    found['reference'] = flops.reference_share(rec.schedule, rec.reference)[1] + 1
  return found


def _large(argument, make=selfforcing, **changes):
  config = make.get_config(argument)
  config.update_from_flattened_dict(changes)
  return config


# Two chunks are traced faster than seven; unrolled, all that is traced is executed.
SHORT = {'video.frames': 21, 'rollout.frames': 6, 'rollout.unroll': True}
STEPS = {
  'salt': (
    _large(
      '1.3b',
      **SHORT,
      **{'reference.share_exit_input': True, 'reference.map': ((2, (4,)), (4, (8, 0)))},
    ),
    {'generator': step.generator_step, 'critic': step.critic_step},
    {},
  ),
  'mmd and a live second pass': (
    _large(
      '1.3b,backbone=longlive',
      **SHORT,
      **{'rollout.window': 5, 'rollout.sink': 1},
      **{'alignment.kind': 'mmd', 'alignment.network': 'critic', 'consistency.stop_grad': 'none'},
    ),
    {'generator': step.generator_step},
    {},
  ),
  'bidirectional, the average asked': (
    _large('1.3b', dmd, **{'consistency.stop_grad': 'none', 'consistency.target': 'ema'}),
    {'generator': step.generator_step},
    {},
  ),
  'causal consistency': (
    _large('1.3b,stage=causal_cd', causal_init, **SHORT),
    {'generator': causal_steps.causal_cd_step},
    {'latents': ()},
  ),
  'trajectories': (
    _large('1.3b,stage=ode', causal_init, **SHORT),
    {'generator': step.ode_step},
    {'trajectory': (5,)},
  ),
  'flow': (_large('teacher', pretrain), {'dit': step.flow_step}, {'latents': ()}),
}


@pytest.mark.parametrize('kind', STEPS)
def test_every_part_of_a_step_against_the_traced_step(kind):
  """What the program holds in each scope, sleeping terms by the share of the steps that have them."""
  config, steps, fields = STEPS[kind]
  rec = recipe.build(config)
  shares = collections.defaultdict(lambda: 1.0)
  if rec.consistency is not None:
    shares['consistency'] = flops.consistency_share(rec.schedule, rec.triples)
  if rec.reference is not None:
    shares['reference'] = flops.reference_share(rec.schedule, rec.reference)[0]
    shares['alignment'] = shares['reference']
  parts = flops.of_steps(config, rec)
  assert parts.keys() >= steps.keys()
  for name, run in steps.items():
    found = _traced_step(config, rec, run, **fields)
    if name == 'critic' or kind == 'trajectories':
      found['text'] /= 2  # the compiler drops the unconditional prompt, which nobody asks for here
    assert set(found) == {part.name for part in parts[name]}
    for part in parts[name]:
      # Formula and trace differ in gradients to inputs: of patches, of text, of a clean clip's head.
      expected = (part.flops + part.again) / shares[part.name]
      assert found[part.name] == pytest.approx(expected, rel=3e-3), part.name


def test_shares_and_means_are_those_of_the_draws():
  config = selfforcing.get_config('1.3b')
  config.reference.map = ((2, (4,)), (4, (8, 0)))
  rec = recipe.build(config)
  keys, n = jax.random.split(jax.random.key(0), 20000), jnp.int32(5000)
  drawn = jax.jit(jax.vmap(lambda key: recipe.draw(rec, key, n)))(keys)
  share, steps = flops.reference_share(rec.schedule, rec.reference)
  has = np.asarray(drawn.has_reference)
  # Three standard errors of 20,000 draws are at most 0.011 of a share and 0.05 of a step.
  assert np.mean(drawn.plan.exit + 1) == pytest.approx(flops.mean_steps(rec.schedule), abs=0.05)
  assert np.mean(drawn.triple.active) == pytest.approx(
    flops.consistency_share(rec.schedule, rec.triples), abs=0.011
  )
  assert has.mean() == pytest.approx(share, abs=0.011)
  assert np.mean(np.asarray(drawn.reference.exit)[has] + 1) == pytest.approx(steps, abs=0.05)


def test_terms_that_sleep_cost_nothing():
  config = selfforcing.get_config('1.3b')
  config.triples.update(first_step=10, last_step=20)
  config.reference.start = 30
  rec = recipe.build(config)

  def awake(n):
    return {part.name for part in flops.of_steps(config, rec, n)['generator'] if part.flops}

  networks = {'text', 'rollout', 'student', 'teacher', 'critic'}
  terms = {'consistency', 'reference', 'alignment'}
  assert [awake(n) - networks for n in (9, 10, 19, 20, 29)] == [
    set(), {'consistency'}, {'consistency'}, set(), set()
  ]  # fmt: skip
  assert awake(30) - networks == terms - {'consistency'}
  assert awake(None) - networks == terms
  config.data.kind = 'text_store'
  assert 'text' not in awake(None)


def test_streams_are_the_mean_over_their_clips():
  """Two clips by hand: frames 0 to 5, then 3 to 8, of which three are new; window 5, sink 1, chunks of 3."""
  config = tiny_config.get_streaming('')
  config.streaming.frames = 9
  rec = recipe.build(config)
  parts = {
    step: {part.name: part for part in parts} for step, parts in flops.of_steps(config, rec).items()
  }
  frame, cfg = rec.chunking.cache[1], rec.model
  behind = {0: 0, 3: 2, 6: 2}  # a chunk of 3 leaves room for the sink and one frame more

  def chunk(start):
    return sum(flops.forward(cfg, 3, frame, 3 * (3 + behind[start]) * frame**2).values())

  passes = flops.mean_steps(rec.schedule) + 1
  expected = passes * (chunk(0) + chunk(3) + chunk(6)) / 2
  pairs = [3 * frame**2 * sum(3 + behind[start] for start in clip) for clip in ((0, 3), (3, 6))]
  student = 3 * sum(sum(flops.forward(cfg, 6, frame, p).values()) for p in pairs) / 2
  # Two products less of each pair with a frame of the cache: of those keys nobody asks a gradient.
  student -= 4 * cfg.layers * cfg.dim * 3 * frame**2 * (behind[0] + 2 * behind[3] + behind[6]) / 2
  recache = flops.forward(cfg, 5, frame) | {'head': 0}
  for found in parts.values():
    assert found['rollout'].flops == pytest.approx(expected)
    assert found['recache'].flops == pytest.approx(sum(recache.values()) / 2)
  assert parts['generator']['student'].flops == pytest.approx(student)
  assert set(parts['critic']) == {'text', 'rollout', 'recache', 'critic'}
  # Behind a sink that stays the other four frames are cached anew, which see it too.
  config.streaming.global_sink = True
  kept = flops.of_steps(config, recipe.build(config))['critic']
  recache = flops.forward(cfg, 4, frame, 4 * 5 * frame**2) | {'head': 0}
  found = next(part for part in kept if part.name == 'recache')
  assert found.flops == pytest.approx(sum(recache.values()) / 2)


def test_the_table_adds_up():
  lines = flops.table([flops.Part('rollout', 3e12), flops.Part('student', 1e12, 5e11)]).splitlines()
  assert [line.split() for line in lines] == [
    ['TFLOP', 'again', 'share'],
    ['rollout', '3', '0', '75.0%'],
    ['student', '1', '0.5', '25.0%'],
    ['total', '4', '0.5', '100.0%'],
  ]


def test_no_formula_for_the_vae():
  config = pretrain.get_config('vae')
  assert flops.of_steps(config, recipe.build(config)) == {}
