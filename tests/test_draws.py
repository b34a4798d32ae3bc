"""What a step draws: the triples of the released rule, references and their noise, probabilities."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from salt_jax.diffusion import draws, flow
from salt_jax.errors import InputError
from tests import tiny

SALT = draws.Schedule(steps=(8, 4, 2), probs=(0.4, 0.4, 0.2), shift=5.0)
EIGHT = draws.Schedule(steps=(8,), probs=(1.0,), shift=5.0)


def _label(sigma):
  """The label in [0, 1000] that the shift maps to sigma: equation (5) of flow solved for u."""
  sigma = np.asarray(sigma, np.float64)
  return np.rint(1000 * sigma / (5 - 4 * sigma)).astype(int)


def _many(schedule, count=4000, **configs):
  """`count` draws at step 10^6, as NumPy arrays."""

  def one(key):
    return draws.draw(key, jnp.int32(10**6), schedule, tiny.chunking(), **configs)

  return jax.tree.map(
    np.asarray, jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), count))
  )


def test_levels_are_those_of_the_method():
  levels = draws.level_table((8, 4, 2), 5.0)
  # salt_method.md 1.2, to the six digits it gives.
  expected = [1000, 972.222, 937.5, 892.857, 833.333, 750, 625, 416.667, 0]
  np.testing.assert_allclose(1000 * levels[0], expected, atol=5e-4)
  np.testing.assert_array_equal(levels[1, :5], levels[0, ::2])
  np.testing.assert_array_equal(levels[2, :3], levels[0, ::4])
  assert not levels[1, 5:].any() and not levels[2, 3:].any()


def test_triples_reproduce_the_table_entry_by_entry():
  seen = collections.defaultdict(lambda: collections.defaultdict(collections.Counter))
  got = _many(EIGHT, 20000, triples=draws.TripleConfig(skip_first=False))
  triple = got.triple
  exits = collections.Counter()
  for start, middle, end, active, exit_step in zip(
    _label(triple.start),
    _label(triple.middle),
    _label(triple.end),
    triple.active,
    got.plan.exit,
    strict=True,
  ):
    exits[int(exit_step)] += 1
    if active:
      seen[start][end][middle] += 1
  found = {s: {e: set(m) for e, m in ends.items()} for s, ends in seen.items()} | {125: {}}
  assert found == tiny.TRIPLES
  # 2500 draws an exit, an end has half of them: standard deviation 25.
  for start, ends in seen.items():
    total = sum(sum(m.values()) for m in ends.values())
    for middles in ends.values():
      assert abs(sum(middles.values()) - total / len(ends)) < 130, start
      share = sum(middles.values()) / len(middles)
      assert all(abs(n - share) < 130 for n in middles.values()), (start, middles)
  assert len(exits) == 8 and min(exits.values()) > 2250


def test_a_triple_costs_its_pass_only_where_it_weighs():
  cfg = draws.TripleConfig()
  assert [bool(draws.ends(8, e, cfg)) for e in range(8)] == [False] + 6 * [True] + [False]
  assert not any(draws.ends(k, 1, cfg) for k in (4, 2)), 'only rollouts of 8 steps have the term'
  got = _many(SALT, triples=cfg)
  assert set(got.steps[got.triple.active]) == {8}
  # 0.4 x 6 / 8, standard error 0.007.
  assert abs(got.triple.active.mean() - 0.3) < 0.03


@pytest.mark.parametrize(
  ('changes', 'expected'),
  [
    (dict(candidates=1), [4]),
    (dict(candidates=0), [4, 6, 8]),
    (dict(segments=2), [4, 8]),
    (dict(segments=8), [4, 5]),
    (dict(steps=(4,)), []),
  ],
)
def test_alternatives_of_the_rule(changes, expected):
  assert draws.ends(8, 2, draws.TripleConfig(**changes)) == expected


def test_terms_sleep_before_and_behind_their_steps():
  cfg = draws.TripleConfig(first_step=5, last_step=8)
  key = next(
    k
    for k in jax.random.split(jax.random.key(0), 64)
    if draws.draw(k, jnp.int32(6), EIGHT, tiny.chunking(), cfg).triple.active
  )
  active = [
    bool(draws.draw(key, jnp.int32(n), EIGHT, tiny.chunking(), cfg).triple.active)
    for n in (4, 5, 7, 8)
  ]
  assert active == [False, True, True, False]


def test_step_counts_and_exits_have_their_probabilities():
  got = _many(SALT)
  for steps, p in zip(SALT.steps, SALT.probs, strict=True):
    # Standard error 0.008.
    assert abs((got.steps == steps).mean() - p) < 0.035
    exits = np.bincount(got.plan.exit[got.steps == steps], minlength=steps)
    assert len(exits) == steps and exits.min() > 0.7 * exits.mean()
  row = {8: 0, 4: 1, 2: 2}
  table = draws.level_table(SALT.steps, 5.0)
  np.testing.assert_array_equal(got.plan.sigmas, table[[row[k] for k in got.steps]])


@pytest.mark.parametrize('coupling', draws.COUPLINGS)
def test_a_reference_goes_to_the_exit_level_with_the_coupled_noise(coupling):
  cfg = draws.ReferenceConfig(map=((2, (4,)), (4, (8,))), coupling=coupling)
  got = _many(SALT, 2000, reference=cfg)
  student, reference = got.plan, got.reference
  row = np.arange(len(got.steps))
  level = reference.sigmas[row, reference.exit]
  has = got.has_reference
  np.testing.assert_array_equal(has, (got.steps < 8) & (student.exit > 0))
  np.testing.assert_array_equal(level[has], student.sigmas[row, student.exit][has])
  assert not reference.euler[has & (got.steps == 2)][:, 1].any(), 'level 500 is one of the student'
  for i in np.flatnonzero(has)[:200]:
    labels = _label(student.sigmas[i, : got.steps[i] + 1]).tolist()
    for step in range(reference.exit[i]):
      above, below = _label(reference.sigmas[i, step : step + 2])
      own = labels.index(below) if below in labels else None
      enclosing = next(j for j in range(len(labels)) if labels[j] <= below)
      if coupling == 'independent':
        assert reference.draws[i, step] >= 500 and not reference.euler[i, step]
      elif own is not None:
        # The student's noise that leads to its level j has draw j.
        assert reference.draws[i, step] == own and not reference.euler[i, step]
      else:
        assert reference.euler[i, step] == (coupling == 'aligned_b')
        assert reference.draws[i, step] == enclosing


def test_released_and_reported_maps_and_a_random_one():
  released = _many(SALT, reference=draws.ReferenceConfig())
  assert set(released.steps[released.has_reference]) == {2}
  # 0.2 x 0.5, standard error 0.005.
  assert abs(released.has_reference.mean() - 0.1) < 0.02
  mixed = _many(SALT, reference=draws.ReferenceConfig(map=((2, (4, 8)), (4, (0, 8)))))
  twos = mixed.has_reference & (mixed.steps == 2)
  # Exit 1 of 2 is step 2 of 4 or step 4 of 8.
  assert set(mixed.reference.exit[twos]) == {2, 4}
  fours = (mixed.steps == 4) & (mixed.plan.exit > 0)
  assert 0.4 < mixed.has_reference[fours].mean() < 0.6


def test_a_reference_sleeps_before_its_step():
  two, cfg = draws.Schedule((2,), (1.0,), 5.0), draws.ReferenceConfig(start=7)

  @jax.jit
  def has(seed, n):
    return draws.draw(jax.random.key(seed), n, two, tiny.chunking(), reference=cfg).has_reference

  late = [bool(has(seed, 7)) for seed in range(10)]
  assert any(late) and not any(has(seed, 6) for seed in range(10))


def test_labels_of_shift():
  np.testing.assert_array_equal(_label(flow.few_step_sigmas(8, 5.0)), np.arange(1000, -1, -125))


@pytest.mark.parametrize(
  ('make', 'sentence'),
  [
    (lambda: draws.ReferenceConfig(map=((2, (3,)),)), '3 steps are no denser form of 2'),
    (lambda: draws.ReferenceConfig(map=((4, (4,)),)), '4 steps are no denser form of 4'),
    (lambda: draws.ReferenceConfig(coupling='b'), 'coupling=b is unknown'),
    (lambda: draws.Schedule((4, 4), (0.5, 0.5), 5.0), 'names a step count twice'),
    (lambda: draws.Schedule((4, 2), (0.5, 0.4), 5.0), 'sum to 1'),
  ],
)
def test_impossible_rules_are_refused(make, sentence):
  with pytest.raises(InputError, match=sentence):
    make()
