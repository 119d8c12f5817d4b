"""Choose the threshold of a decider, and measure its quality, from continue probabilities and losses by depth.

Shapes: n supervised tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .bootstrap import ranking

BINS = 10  # rows of the calibration table


@dataclass
class Decisions:
    """The continue probabilities of n supervised tokens after depth 1, and their losses at depth 1 and 2."""

    probability: np.ndarray  # [n] float64, continue probability
    hard: np.ndarray  # [n] bool, whether the token is labelled hard
    loss_one: np.ndarray  # [n] cross-entropy after depth 1, nats
    loss_two: np.ndarray  # [n] cross-entropy after depth 2 of every supervised token, nats


def threshold_for_share(probability: np.ndarray, share: float) -> float:
    """Return the threshold that a `share` of the probabilities `[n]` exceeds, midway between the two neighbours."""
    return _between(np.sort(probability)[::-1], round(share * len(probability)))


def threshold_for_loss(decisions: Decisions) -> float:
    """Return the threshold with the lowest mean cross-entropy; it does not separate equal probabilities."""
    order = np.argsort(-decisions.probability, kind="stable")
    falling = decisions.probability[order]
    gained = np.concatenate([[0.0], np.cumsum((decisions.loss_one - decisions.loss_two)[order])])
    counts = np.concatenate([[0], np.flatnonzero(falling[1:] != falling[:-1]) + 1, [len(falling)]])
    return _between(falling, int(counts[gained[counts].argmax()]))


def _between(falling: np.ndarray, count: int) -> float:
    """Return a threshold that `count` of the probabilities `[n]`, in falling order, exceed; fewer if some are equal."""
    above = falling[count - 1] if count > 0 else 1.0
    below = falling[count] if count < len(falling) else 0.0
    return float(np.clip((above + below) / 2, 0.0, 1.0))


def quality(decisions: Decisions, threshold: float) -> dict[str, Any]:
    """Return AUROC, average precision, precision and recall at the threshold, calibration, and the loss by policy.

    Undefined numbers (no token iterates; all or none are hard) are None. `calibration` has an entry for each tenth of
    the probability range: the number of tokens, their mean probability (`said`) and their share of hard tokens (`was`).
    """
    p, hard, goes = decisions.probability, decisions.hard, decisions.probability > threshold
    (auroc,), (average_precision,) = ranking(p, hard)
    hits = int((goes & hard).sum())
    index = np.minimum((p * BINS).astype(int), BINS - 1)
    bins = []
    for k in range(BINS):
        if count := int((index == k).sum()):
            bins.append({"tokens": count, "said": float(p[index == k].mean()), "was": float(hard[index == k].mean())})

    return {
        "tokens": len(p),
        "threshold": threshold,
        "iterated_share": float(goes.mean()),
        "hard_share": float(hard.mean()),
        "auroc": float(auroc) if np.isfinite(auroc) else None,
        "average_precision": float(average_precision) if np.isfinite(average_precision) else None,
        "precision": hits / int(goes.sum()) if goes.any() else None,
        "recall": hits / int(hard.sum()) if hard.any() else None,
        "calibration_error": sum(b["tokens"] * abs(b["said"] - b["was"]) for b in bins) / len(p),
        "calibration": bins,
        "loss": {
            "never": float(decisions.loss_one.mean()),
            "always": float(decisions.loss_two.mean()),
            "decider": float(np.where(goes, decisions.loss_two, decisions.loss_one).mean()),
            "oracle": float(np.where(hard, decisions.loss_two, decisions.loss_one).mean()),
        },
    }
