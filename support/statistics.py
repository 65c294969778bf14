"""How sure a mean is: bootstrap intervals and p-values, and several comparisons at once."""

import numpy as np

RESAMPLES = 10_000


def resampled_means(values, seed, resamples):
    """Means of values drawn again with replacement: (n,) -> (resamples,), at least 100.

    The same seed draws the same places, so that differences of two models' values are paired.
    """
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(len(values), size=(max(1, resamples // 100), len(values)))].mean(1)
             for _ in range(100)]  # a hundredth at a time: the draws of 30,000 images fit in memory
    return np.concatenate(means)


def bootstrap(values, seed=0, resamples=RESAMPLES):
    """95 % percentile interval of the mean under resampling of images: (n,) -> (low, high).

    Too narrow for few values (of 10 it covers about 90 %); NaN of less than two.
    """
    if len(values) < 2:
        return np.nan, np.nan
    return tuple(np.percentile(resampled_means(values, seed, resamples), [2.5, 97.5]))


def p_value(values, seed=0, resamples=RESAMPLES):
    """Two-sided p-value of a mean difference that is not 0, by random sign flips: (n,) -> (0, 1].

    The share of means at least as far from 0 when each paired difference keeps or changes its sign
    by chance (Fisher's randomisation test): valid for few values, too, of which five can't go below
    0.06. One is added to either count, as no p-value is 0 (Davison and Hinkley 1997, section 4.2).
    """
    rng = np.random.default_rng(seed)
    limit = abs(values.mean()) * (1 - 1e-12)  # the same sum in another order is as far
    n = max(1, resamples // 100)  # a hundredth at a time, as in `resampled_means`
    as_far = sum(
        (abs((2 * rng.integers(2, size=(n, len(values))) - 1) @ values) / len(values)
         >= limit).sum() for _ in range(100))
    return (as_far + 1) / (100 * n + 1)


def holm(p_values):
    """p-values of comparisons made together, corrected by Holm (1979): (m,) -> (m,) in [0, 1].

    Among those below 0.05 there is with 95 % confidence no false one. NaN stays, and counts as no
    comparison.
    """
    p_values = np.asarray(p_values, float)
    corrected = np.full(len(p_values), np.nan)
    order = np.argsort(p_values)[:np.isfinite(p_values).sum()]  # NaN is sorted to the end
    steps = p_values[order] * np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(1, np.maximum.accumulate(steps))
    return corrected
