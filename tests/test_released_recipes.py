"""The configs that ship are the released recipes (salt_method.md 3.5, 4.1, 7.4), nano's own numbers apart."""

import pytest

from configs import dmd, selfforcing

# Of the backbones: first step of the alignment, coupling of the noise, window and sink.
BACKBONES = {
  'self_forcing': (1000, 'independent', 0, 0),
  'causal_forcing': (700, 'aligned_b', 0, 0),
  'longlive': (1200, 'aligned_b', 12, 3),
}
SALT = dict(dmd=1.0, consistency=0.2, alignment=0.1)
MIXED = ((8, 4, 2), (0.4, 0.4, 0.2))
# Of the methods: weights of the terms, step counts and their probabilities.
METHODS = {
  'salt': (SALT, *MIXED),
  'mixed_sc': (SALT | dict(alignment=0.0), *MIXED),
  'mixed': (dict(dmd=1.0, consistency=0.0, alignment=0.0), *MIXED),
  'sc': (SALT | dict(alignment=0.0), (8,), (1.0,)),
  'dmd': (dict(dmd=1.0, consistency=0.0, alignment=0.0), (4,), (1.0,)),
}


@pytest.mark.parametrize('size', ['nano', '1.3b'])
@pytest.mark.parametrize('method', METHODS)
def test_methods(method, size):
  config = selfforcing.get_config(f'{size},{method}')
  schedule = config.schedule
  assert (dict(config.losses), schedule.steps, schedule.probs) == METHODS[method]
  assert schedule.shift == 5.0


@pytest.mark.parametrize('backbone', BACKBONES)
def test_backbones(backbone):
  config = selfforcing.get_config(f'1.3b,backbone={backbone}')
  reference, roll = config.reference, config.rollout
  found = reference.start, reference.coupling, roll.window, roll.sink
  assert found == BACKBONES[backbone]
  assert (roll.frames, roll.chunk, roll.mode, roll.context_noise) == (21, 3, 'sde', 0.0)


def test_terms_and_training():
  config = selfforcing.get_config('1.3b')
  assert dict(config.consistency) == dict(
    form='endpoint', stop_grad='composed', weight='linear', target='online', warmup=0
  )
  assert dict(config.triples) == dict(
    steps=(8,), segments=4, candidates=2, first_step=0, last_step=0
  )
  assert config.reference.map == ((2, (4,)),) and not config.reference.share_exit_input
  alignment = config.alignment
  assert (alignment.kind, alignment.network, alignment.layer) == ('relations', 'teacher', 20)
  assert (alignment.margin, alignment.t_low, alignment.t_high) == (0.1, 0, 200)
  for term in (config.dmd, alignment):
    assert (term.shift, term.t_min, term.t_max) == (5.0, 20.0, 980.0)
  assert config.dmd.guidance == 3.0 and config.generator_every == 5
  for name, rate in (('generator', 2e-6), ('critic', 4e-7)):
    optimizer = config.optim[name]
    assert (optimizer.lr, optimizer.b1, optimizer.b2) == (rate, 0.0, 0.999)
    assert (optimizer.weight_decay, optimizer.clip) == (0.01, 10.0)
  # From iteration 200 on: the average counts generator updates.
  assert (config.ema.decay, config.ema.start, config.batch) == (0.99, 200 // 5, 64)


@pytest.mark.parametrize('arg', ['1.3b', 'nano', 'nano,i2v', '14b,i2v'])
def test_the_bidirectional_student(arg):
  config = dmd.get_config(arg)
  assert config.rollout.chunk == config.rollout.frames == 21
  assert (config.schedule.steps, config.schedule.probs) == ((8,), (1.0,))
  assert dict(config.losses) == SALT | dict(alignment=0.0)
  assert (config.triples.segments, config.triples.candidates) == (4, 2)
