"""Bootstrap intervals cover what they say, and pairs are resampled alike."""

import numpy as np
import pytest

from salt_jax import statistics


def test_summary_covers_the_mean_as_often_as_it_says():
  generator = np.random.default_rng(1)
  draws = [statistics.summary({'x': generator.normal(size=60)}, draws=200)['x'] for _ in range(100)]
  # About 94 of 100 (deviation 2.4); a 90 % or 99 % interval would not fail, a wrong one would.
  assert 84 <= sum(e.low < 0 < e.high for e in draws) <= 100
  # 2 x 1.96 / sqrt(60) = 0.506
  assert np.mean([e.high - e.low for e in draws]) == pytest.approx(0.506, rel=0.1)
  estimate = statistics.summary({'x': np.arange(4.0)})['x']
  assert estimate.mean == 1.5 and estimate == statistics.summary({'x': np.arange(4.0)})['x']


def test_interval_covers_the_mean_and_pairs_clips():
  rng = np.random.default_rng(0)
  hard = rng.uniform(0, 1, 400)  # how hard a clip is, alike for every run
  one = hard + rng.normal(0, 0.01, (3, 400))
  other = hard + 0.05 + rng.normal(0, 0.01, (3, 400))
  mean, low, high = statistics.interval(one)
  assert low < mean < high and abs(mean - 0.5) < 0.05 and 0.03 < high - low < 0.09
  mean, low, high = statistics.interval(other - one)
  assert 0.045 < low < mean < high < 0.055, (
    'the difference of paired clips is far surer than either'
  )


def test_interval_knows_that_few_seeds_are_few():
  """Seeds that disagree widen the interval however many clips there are."""
  values = np.repeat([[0.0], [1.0]], 1000, axis=1)
  assert statistics.interval(values)[1:] == (0.0, 1.0)


def test_multiplicities_resample_each_stratum_within_itself():
  strata = ['a', 'b', 'a', 'a', 'b']
  counts = statistics.multiplicities(strata, draws=4000)
  a, b = np.array(strata) == 'a', np.array(strata) == 'b'
  assert (counts[:, a].sum(1) == 3).all() and (counts[:, b].sum(1) == 2).all()
  # Drawing 3 of 3 with replacement: mean 1, variance 2/3, covariance -1/3; of 2: 1, 1/2, -1/2.
  np.testing.assert_allclose(counts.mean(0), 1, atol=0.06)
  expected = np.where(a[:, None] & a, -1 / 3, 0) + np.where(b[:, None] & b, -1 / 2, 0)
  expected += np.diag(np.where(a, 1, 1))
  np.testing.assert_allclose(np.cov(counts.T), expected, atol=0.06)
  np.testing.assert_array_equal(counts, statistics.multiplicities(strata, draws=4000))
