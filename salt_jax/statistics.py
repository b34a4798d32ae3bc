"""Bootstrap intervals: of a mean over examples, over seeds and clips, and of figures over prompts."""

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

RESAMPLES = 2000
_ENDS = (0.025, 0.975)


class Estimate(NamedTuple):
  """A figure with its bootstrap 95 % interval."""

  mean: float
  low: float
  high: float


def estimate(value: float, resampled: Float[np.ndarray, 'n']) -> Estimate:
  """A figure and the percentile interval of its resampled values."""
  low, high = np.quantile(resampled, _ENDS)
  return Estimate(float(value), float(low), float(high))


def summary(
  results: Mapping[str, Float[np.ndarray, 'b']], seed: int = 0, draws: int = 1000
) -> dict[str, Estimate]:
  """Mean of each measure over the examples, with a percentile bootstrap over examples."""
  generator = np.random.Generator(np.random.Philox(seed))
  count = len(next(iter(results.values())))
  chosen = generator.integers(count, size=(draws, count))
  return {name: estimate(values.mean(), values[chosen].mean(1)) for name, values in results.items()}


def interval(values: Float[np.ndarray, 'seed clip'], seed: int = 0) -> Estimate:
  """Mean and interval over seeds and over clips; clips are resampled alike in every seed."""
  rng = np.random.default_rng(seed)
  seeds = rng.integers(0, values.shape[0], (RESAMPLES, values.shape[0]))
  clips = rng.integers(0, values.shape[1], (RESAMPLES, values.shape[1]))
  means = [values[np.ix_(s, c)].mean() for s, c in zip(seeds, clips, strict=True)]
  return estimate(values.mean(), np.array(means))


def multiplicities(
  strata: Sequence[Hashable], draws: int = RESAMPLES, seed: int = 0
) -> Float[np.ndarray, 'draws n']:
  """How often each unit is drawn when every stratum is resampled within itself.

  One draw serves all figures of a unit, and both sides of a pair.
  """
  rng = np.random.default_rng(seed)
  counts = np.zeros((draws, len(strata)))
  for stratum in dict.fromkeys(strata):
    members = np.flatnonzero([other == stratum for other in strata])
    share = np.full(len(members), 1 / len(members))
    counts[:, members] = rng.multinomial(len(members), share, size=draws)
  return counts
