"""The threshold that a decider should use, and its quality, from its probabilities and the effect of second passes.

Shapes: n supervised tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from .bootstrap import ranking

BINS = 10  # of the calibration table


@dataclass
class Decisions:
    """The decider's probabilities for n supervised tokens after depth 1, and what a second pass does to them."""

    probability: np.ndarray  # [n] float64, of going on
    hard: np.ndarray  # [n] bool, whether the token should go on
    loss_one: np.ndarray  # [n] cross-entropy after depth 1, nats
    loss_two: np.ndarray  # [n] after a second pass of every supervised token


def threshold_for_share(probability: np.ndarray, share: float) -> float:
    """The threshold that a `share` of the probabilities [n] exceeds, half-way between the two that it separates."""
    return _between(np.sort(probability)[::-1], round(share * len(probability)))


def threshold_for_loss(decisions: Decisions) -> float:
    """The threshold at which the mean cross-entropy is lowest; it does not separate equal probabilities."""
    order = np.argsort(-decisions.probability, kind="stable")
    falling = decisions.probability[order]
    gained = np.concatenate([[0.0], np.cumsum((decisions.loss_one - decisions.loss_two)[order])])
    counts = np.concatenate([[0], np.flatnonzero(falling[1:] != falling[:-1]) + 1, [len(falling)]])
    return _between(falling, int(counts[gained[counts].argmax()]))


def _between(falling: np.ndarray, count: int) -> float:
    """A threshold that `count` of the falling probabilities [n] exceed (fewer where some are equal)."""
    above = falling[count - 1] if count > 0 else 1.0
    below = falling[count] if count < len(falling) else 0.0
    return float(np.clip((above + below) / 2, 0.0, 1.0))


def quality(decisions: Decisions, threshold: float) -> dict[str, Any]:
    """AUROC, average precision, precision and recall at the threshold, calibration, and the losses by policy.

    Numbers that are undefined (no token iterates; all or none are hard) are None. `calibration` has, for each tenth of
    probability, the number of tokens, their mean probability (`said`) and the share of them that is hard (`was`).
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
