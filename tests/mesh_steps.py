"""Runs a generator and a critic step on several meshes of eight devices and prints what came out, as JSON.

A learning rate of 1 and no Adam: what a step changes in the parameters is its gradient.
"""

import json
import sys
from collections import Counter

import jax
import numpy as np
import optax

from configs import base
from salt_jax import programs, recipe, sharding, stages, step, weights
from salt_jax import state as states
from tests import tiny_config

ONE = dict(data=1, fsdp=1, context=1, tensor=1)
MESHES = {
  'generator': dict(data=1, fsdp=2, context=2, tensor=2),
  'critic': dict(data=2, fsdp=2, context=2, tensor=1),
}
WAYS = {'generator': dict(parts=2), 'critic': dict(unroll=True)}
FUNCTIONS = {'generator': step.generator_step, 'critic': step.critic_step}
STEPS = (0, 2)  # of the generator the first aligns, the second is consistent
BATCH = 4


def _random(network, cfg, seed):
  rng = np.random.default_rng(seed)

  def noisy(path, x):
    centre = 1.0 if path[-1].key in ('weight', 'gamma') else 0.0
    spread = x.shape[-2] ** -0.5 if path[-1].key == 'kernel' else 0.1
    return (centre + spread * rng.standard_normal(x.shape)).astype(np.float32)

  return jax.tree_util.tree_map_with_path(noisy, weights.shapes(network, cfg))


def _config(mesh, unroll, parts):
  config = tiny_config.get_config('nowhere')
  for name in ('model', 'teacher'):
    config[name].update(dim=64, heads=4, layers=2)
  config.rollout.unroll = unroll
  config.update(batch=BATCH, accumulate=parts, mesh=mesh, rules=base.RULES, shard_min_size=0)
  config.schedule.update(steps=(8, 4, 2), probs=(0.34, 0.33, 0.33))
  return config


def _batch(rec):
  mask = np.arange(rec.text_length)[None].repeat(BATCH, 0) < 5
  return {
    'index': np.arange(BATCH, dtype=np.int32),
    'ids': np.ones((BATCH, rec.text_length), np.int32),
    'mask': mask,
  }


def run(name, mesh_sizes, unroll=False, parts=1):
  """Metrics and gradients of the steps of one network, traces, and in how many parts arrays lie."""
  config = _config(mesh_sizes, unroll, parts)
  rec = recipe.build(config)
  rec = rec.__class__(
    **(vars(rec) | {'optimizers': {name: optax.sgd(1.0) for name in rec.optimizers}})
  )
  count = int(np.prod(list(mesh_sizes.values())))
  mesh = sharding.make_mesh(config.mesh, jax.devices()[:count])
  student = _random('dit', rec.model, 1)
  host = {'generator': student, 'critic': _random('dit', rec.model, 2)}
  frozen = {'teacher': _random('dit', rec.teacher, 3), 'text': _random('umt5', rec.text, 4)}
  frozen['negative'] = {k: v[:1] for k, v in _batch(rec).items() if k != 'index'}
  shapes = states.shapes_of(host, rec.optimizers, ('generator',))
  _, placed = states.with_shardings(shapes, mesh, config)
  _, frozen_placed = states.with_shardings(frozen, mesh, config)
  layout, traces = programs.Layout(placed, frozen_placed, mesh), Counter()
  call = programs.step(stages.StepSpec(name, FUNCTIONS[name], 1, None), rec, layout, traces)
  found = {}
  for n in STEPS:
    state = states.create(host, rec.optimizers, ('generator',), placed)
    batch = sharding.to_global(_batch(rec), mesh)
    new, metrics = call(state, states.place(frozen, frozen_placed), batch, np.int32(n))
    grads = jax.tree.map(
      lambda a, b: np.float64(a) - np.float64(b), jax.device_get(new.params[name]), host[name]
    )
    found[n] = {'metrics': {k: float(v) for k, v in metrics.items()}, 'grads': grads}
  shards = {
    name: int(np.prod(x.shape) // np.prod(x.sharding.shard_shape(x.shape)))
    for name, x in (
      ('ffn', new.params['generator']['blocks']['ffn_0']['kernel']),
      ('average', new.ema['generator']['blocks']['self_attn']['o']['kernel']),
    )
  }
  return found, dict(traces), shards


def _norm(tree):
  return float(np.sqrt(sum(np.square(g).sum() for g in jax.tree.leaves(tree))))


def main():
  report = {}
  for name, sizes in MESHES.items():
    want, _, _ = run(name, ONE)
    # A batch in two parts, and chunks unrolled that are a loop there, are the same, too.
    got, traces, shards = run(name, sizes, **WAYS[name])
    steps = {}
    for n, one in want.items():
      apart = jax.tree.map(np.subtract, got[n]['grads'], one['grads'])
      apart = _norm(apart) / _norm(one['grads'])
      steps[n] = {'got': got[n]['metrics'], 'want': one['metrics'], 'apart': apart}
    report[name] = {'traces': traces[name], 'shards': shards, 'steps': steps}
  json.dump(report, sys.stdout)


if __name__ == '__main__':
  main()
