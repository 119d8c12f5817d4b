"""Bootstrap intervals over texts (or questions), and AUROC and average precision of a score.

Shapes: N tokens of K texts, S samples. Sample 0 is the data itself, so a statistic is an array `[S]` whose entry 0 is
its value. The tokens of a text depend on each other, so the bootstrap draws texts, not tokens.
"""

from __future__ import annotations

import numpy as np

Estimate = dict[str, "float | None"]


class Resampled:
    """Bootstrap samples: draws of K texts out of K, with replacement.

    Args:
        text: Index of each token's text, `[N]`.
        samples: Number of draws.
        seed: Random seed.
        level: Share of the draws that an interval covers.
    """

    def __init__(self, text: np.ndarray, samples: int = 1000, seed: int = 0, level: float = 0.95) -> None:
        self.names, self.text = np.unique(text, return_inverse=True)
        K = len(self.names)
        draws = np.random.default_rng(seed).multinomial(K, np.full(K, 1 / K), size=samples)
        self.weights = np.vstack([np.ones(K), draws])  # [S, K] count of each text
        self.level = level

    def total(self, values: np.ndarray) -> np.ndarray:
        """Return the sum of `values` `[N]` in each sample, `[S]`."""
        return self.weights @ np.bincount(self.text, values, len(self.names))

    def mean(self, values: np.ndarray, weight: np.ndarray | None = None) -> np.ndarray:
        """Return the mean of `values` `[N]` in each sample, `[S]`; NaN if all weights `[N]` (1 by default) are 0."""
        weight = np.ones(len(self.text)) if weight is None else np.asarray(weight, np.float64)
        return ratio(self.total(values * weight), self.total(weight))

    def estimate(self, sampled: np.ndarray) -> Estimate:
        """Return the value and interval of a statistic `[S]`; an undefined number is None, as with a single text."""
        drawn = sampled[1:][np.isfinite(sampled[1:])]
        low = high = None
        if len(self.names) > 1 and len(drawn):
            low, high = np.quantile(drawn, [(1 - self.level) / 2, (1 + self.level) / 2]).tolist()
        return {"value": float(sampled[0]) if np.isfinite(sampled[0]) else None, "low": low, "high": high}


def ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Return above `[S]` / below `[S]`; NaN where `below` is 0."""
    return np.divide(above, below, out=np.full(len(above), np.nan), where=below != 0)


def ranking(
    score: np.ndarray, wanted: np.ndarray, text: np.ndarray | None = None, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return AUROC and average precision of a score, each `[S]`; NaN if all or none of the tokens are positive.

    Tokens with equal scores form one group. AUROC counts half of their pairs, and a threshold selects all or none.

    Args:
        score: Score of each token, `[N]`, higher for tokens that are predicted positive.
        wanted: Whether each token is positive, `[N]` bool.
        text: Index of each token's text from 0 to K - 1, `[N]`; required with `weights`.
        weights: Count of each text in each sample, `[S, K]`; by default each text counts once, with S = 1.
    """
    order = np.argsort(-score, kind="stable")
    falling, wanted = score[order], wanted[order].astype(np.float64)
    starts = np.flatnonzero(np.concatenate([[True], falling[1:] != falling[:-1]]))
    found = []
    for weight in [None] if weights is None else weights:
        each = np.ones(len(order)) if weight is None or text is None else weight[text[order]]
        hits, all_ = np.add.reduceat(each * wanted, starts), np.add.reduceat(each, starts)
        misses = all_ - hits
        above = np.cumsum(hits)
        positives, negatives = above[-1], misses.sum()
        if positives == 0 or negatives == 0:
            found.append((np.nan, np.nan))
            continue
        auroc = (misses * (above - hits / 2)).sum() / (positives * negatives)
        reached = np.cumsum(all_)
        precision = np.divide(above, reached, out=np.zeros(len(above)), where=reached > 0)
        found.append((auroc, (hits * precision).sum() / positives))
    aurocs, precisions = np.array(found).T
    return aurocs, precisions
