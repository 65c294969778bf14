"""How well faces are recognised: identification, verification, LFW's protocol.

A similarity is a cosine, or minus a distance. Intervals come from drawing people, not pictures,
again: a person's pictures, and the pairs that one is part of, are not independent.
"""

from pathlib import Path

import numpy as np

from support.cli import InputError

RESAMPLES = 1_000  # of people
PAIRS = 5e8        # to look at in all resamples together, of which there are fewer on larger sets


def similarity(probes, gallery, by_distance=False, paired=False):
    """Embeddings (n, D), (m, D) -> (n, m): cosines, or minus the Euclidean distances.

    paired: of row i with row i alone, (n,). NaN where an embedding is none: NaN, or for a cosine
    all zeros.
    """
    probes, gallery = (np.asarray(x, np.float64) for x in (probes, gallery))
    if by_distance:  # |a|^2 + |b|^2 - 2ab would lose the digits where a is almost b
        if paired:
            return -np.linalg.norm(probes - gallery, axis=1)
        return -np.stack([np.linalg.norm(gallery - probe, axis=1) for probe in probes])
    with np.errstate(invalid="ignore"):
        probes, gallery = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (probes, gallery))
    return (probes * gallery).sum(1) if paired else probes @ gallery.T


def verification(genuine, impostors, fars):
    """How well a threshold tells pairs of one person from pairs of two.

    genuine, impostors: similarities of the pairs, (n,) and (m,). -> function of the pairs' weights
    (whole numbers, (n,) and (m,); all 1: the sample itself) -> (AUC, TAR at each FAR of `fars`).
    What exceeds a threshold is accepted, and of the impostors at most a share `far` does. NaN where
    no pair of a kind has weight.
    """
    order = np.argsort(impostors)
    impostors = impostors[order]
    below, up_to = (np.searchsorted(impostors, genuine, side) for side in ("left", "right"))

    def rates(of_genuine, of_impostors):
        weight = np.concatenate([[0], np.cumsum(of_impostors[order])])
        total, n = weight[-1], of_genuine.sum()
        if not total or not n:
            return [np.nan] * (1 + len(fars))
        found = [of_genuine @ (weight[below] + weight[up_to]) / (2 * total * n)]
        for far in fars:
            accepted = np.floor(far * total + 1e-9)  # 0.29 * 100 is 28.999...
            threshold = impostors[np.searchsorted(weight[1:], total - accepted)]
            found.append(of_genuine @ (genuine > threshold) / n)
        return found

    return rates


def identification(scores, person_of_probe):
    """Gallery faces that are before or level with the right one: (n, m) similarities -> (n,).

    Person k is gallery face k. A tie is no identification; an embedding that is none is like nobody
    and in the way of everybody.
    """
    genuine = np.nan_to_num(scores[np.arange(len(scores)), person_of_probe], nan=-np.inf)
    level = np.nan_to_num(scores, nan=np.inf) >= genuine[:, None]
    return level.sum(1) - np.isfinite(genuine)


def recognition(scores, person_of_probe=None, fars=(0.01,), seed=0, resamples=None):
    """Rates of probes against a gallery with one face of each person.

    scores: (n, m) similarities; person_of_probe: (n,), the column of each probe's own person, the
    row's number if not given. -> {rate: (value, low, high)} with 95 % bootstrap intervals:
    "rank1" and "rank5", the identification rates; "auc" and "tar_at_far_1" (per cent), of all n m
    pairs. People are drawn again as probes and in impostor pairs, with their threshold; for the
    ranks the gallery stays, as one of fewer people would be easier. resamples: RESAMPLES, or
    fewer where that would take minutes, but at least 200.
    """
    n, m = scores.shape
    resamples = resamples or max(200, min(RESAMPLES, int(PAIRS / (n * m))))
    person = np.arange(n) if person_of_probe is None else np.asarray(person_of_probe)
    rank = identification(scores, person)
    is_genuine = person[:, None] == np.arange(m)
    row, column = np.nonzero(~is_genuine)
    verify = verification(np.nan_to_num(scores[is_genuine], nan=-np.inf),
                          np.nan_to_num(scores[row, column], nan=np.inf), fars)
    row = person[row]

    def rates(weight):
        of_probe = weight[person]
        ranks = [of_probe @ (rank < k) / of_probe.sum() if of_probe.any() else np.nan
                 for k in (1, 5)]
        return [*ranks, *verify(of_probe, weight[row] * weight[column])]

    names = ["rank1", "rank5", "auc", *(f"tar_at_far_{100 * far:g}" for far in fars)]
    return with_intervals(names, rates, m, seed, resamples)


def with_intervals(names, rates, n_people, seed, resamples=RESAMPLES):
    """{name: (value, low, high)} of rates: function of people's weights (n_people,) -> values.

    Weights are how often each person was drawn; the same seed draws the same people.
    """
    rng = np.random.default_rng(seed)
    drawn = [rates(np.bincount(rng.integers(n_people, size=n_people), minlength=n_people))
             for _ in range(resamples)]
    values = rates(np.ones(n_people, int))
    bounds = [np.nanpercentile(of_rate, [2.5, 97.5]) if np.isfinite(value) else (np.nan, np.nan)
              for value, of_rate in zip(values, np.array(drawn).T)]
    return {name: (value, *bound) for name, value, bound in zip(names, values, bounds)}


# ---------------------------------------------------------------------------------------------
# LFW's protocol


def read_pairs(path):
    """pairs.txt as LFW has it -> [(fold, (name, number), (name, number)), ...].

    The first line holds the number of folds and of pairs of either kind in each; then come, fold
    by fold, lines "name 1 2" of one person and lines "name 1 other 3" of two. Raises InputError
    naming the line.
    """
    try:
        if Path(path).is_fifo():  # would be waited for
            raise OSError
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "no text"
        raise InputError(f"--pairs {path}: {reason}; give a list in the format of LFW's "
                         "pairs.txt") from None
    lines = [(number, line.split()) for number, line in enumerate(lines, 1) if line.strip()]
    _, head = lines[0] if lines else (0, [])
    if len(head) != 2 or not all(word.isdecimal() and int(word) for word in head) or (
            int(head[0]) == 1):
        raise InputError(f"--pairs {path}: the first line must hold the number of folds, two or "
                         "more, and of pairs of either kind in each, as LFW's \"10 300\"")
    folds, size = map(int, head)
    if len(lines) - 1 != 2 * folds * size:
        raise InputError(f"--pairs {path}: {len(lines) - 1} pairs, but the first line announces "
                         f"2 x {folds} x {size}")
    pairs = []
    for place, (number, words) in enumerate(lines[1:]):
        of_one = place % (2 * size) < size
        first, second = words[:2], [words[0], words[-1]] if of_one else words[2:]
        good = len(words) == (3 if of_one else 4) and (words[0] != words[2] or of_one)
        if not good or not (first[1].isdecimal() and second[1].isdecimal()):
            raise InputError(f"--pairs {path}, line {number}: must be "
                             + ("\"name 1 2\"" if of_one else "\"name 1 other 3\""))
        pairs.append((place // (2 * size), *((name, int(n)) for name, n in (first, second))))
    return pairs


def best_threshold(scores, is_genuine):
    """The threshold that decides most pairs right: a pair above it is taken for one person.

    (n,) similarities, (n,) bool -> the middle between two neighbouring scores; the lowest of
    equally good ones.
    """
    order = np.argsort(scores, kind="stable")
    scores, is_genuine = scores[order], is_genuine[order]
    # with the threshold above k scores, k pairs are refused
    right = (np.concatenate([[0], np.cumsum(~is_genuine)])
             + is_genuine.sum() - np.concatenate([[0], np.cumsum(is_genuine)]))
    apart = np.concatenate([[True], scores[1:] > scores[:-1], [True]])  # equal ones stay together
    k = int(np.argmax(np.where(apart, right, -1)))
    edges = np.concatenate([[scores[0] - 1], scores, [scores[-1] + 1]])
    return (edges[k] + edges[k + 1]) / 2


def decided_right(scores, is_genuine, fold):
    """Whether each pair is decided right by the threshold of all other folds: (n,) bool."""
    right = np.zeros(len(scores), bool)
    for number in np.unique(fold):
        here = fold == number
        threshold = best_threshold(scores[~here], is_genuine[~here])
        right[here] = (scores[here] > threshold) == is_genuine[here]
    return right


def pair_rates(scores, people, fold, fars=(0.01, 0.001), seed=0, resamples=RESAMPLES):
    """Rates of a list of pairs: {rate: (value, low, high)} with 95 % bootstrap intervals.

    scores: (n,) similarities, NaN where an embedding is none, which decides a pair wrong; people:
    (n, 2), whose pictures they are, as numbers from 0; fold: (n,), at least two. "accuracy" is the
    mean over the folds, each with the threshold of the others; "auc" and the TARs are of all pairs.
    """
    is_genuine = people[:, 0] == people[:, 1]
    scores = np.where(np.isnan(scores), np.where(is_genuine, -1e9, 1e9), scores)
    right = decided_right(scores, is_genuine, fold)
    verify = verification(scores[is_genuine], scores[~is_genuine], fars)
    _, number, size = np.unique(fold, return_inverse=True, return_counts=True)
    share = 1 / size[number]  # of a pair in its fold

    def rates(weight):
        drawn = np.where(is_genuine, weight[people[:, 0]], weight[people].prod(1))
        of_pair = drawn * share
        accuracy = of_pair @ right / of_pair.sum() if of_pair.any() else np.nan
        return [accuracy, *verify(drawn[is_genuine], drawn[~is_genuine])]

    names = ["accuracy", "auc", *(f"tar_at_far_{100 * far:g}" for far in fars)]
    return with_intervals(names, rates, people.max() + 1, seed, resamples)
