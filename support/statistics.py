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

    NaN of no values.
    """
    if not len(values):
        return np.nan, np.nan
    return tuple(np.percentile(resampled_means(values, seed, resamples), [2.5, 97.5]))


def p_value(values, seed=0, resamples=RESAMPLES):
    """Two-sided bootstrap p-value of a mean that differs from 0: (n,) -> (0, 1].

    Twice the smaller share of resampled means that are not on the mean's side of 0: below 0.05
    where `bootstrap`'s interval excludes 0. One is added to the count, as no p-value is 0 (Davison
    and Hinkley 1997, section 4.2).
    """
    means = resampled_means(values, seed, resamples)
    against = min((means <= 0).sum(), (means >= 0).sum())
    return min(1.0, 2 * (against + 1) / (len(means) + 1))


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
