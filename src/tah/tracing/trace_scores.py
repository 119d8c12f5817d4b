"""Scores by which tokens may be chosen to iterate: how good they are, what each threshold gives, and which to take.

Shapes: N tokens, M = max_depth, S samples (`resample.py`: entry 0 is the data itself), P points of a curve.

A score says after every pass but the last how probable going on should be: the decider's probability, 1 - the
probability of the first choice, or the entropy, of which the policy `confidence` makes 1 - exp(-entropy). A token
reaches a depth where the least of its scores so far exceeds the threshold.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..stats.bootstrap import Estimate, Resampled, ranking
from ..stats.threshold import Judged, quality, threshold_for_loss, threshold_for_share
from .traced import Tokens, Trace, loss_of

POINTS = 101  # of a curve
RANKED = 200  # samples for AUROC and average precision


@dataclass
class View:
    """A trace as columns."""

    tokens: Tokens
    draw: Resampled
    right: np.ndarray  # [M, N] 0.0 or 1.0
    loss: np.ndarray  # [M, N] nats

    def mean(self, values: np.ndarray, weight: np.ndarray | None = None) -> Estimate:
        """Mean of `values` [N], and its interval."""
        return self.draw.estimate(self.draw.mean(values, weight))

    @property
    def scores(self) -> dict[str, np.ndarray]:
        """[M - 1, N] of each score after every pass but the last; a probability of going on, in [0, 1]."""
        scores = {
            "confidence": 1 - self.tokens.max_prob[:-1].astype(np.float64),
            "entropy": of_nats(self.tokens.entropy[:-1].astype(np.float64)),
        }
        if self.tokens.decider is not None:
            scores = {"decider": self.tokens.decider.astype(np.float64)} | scores
        return scores if len(self.right) > 1 else {}


def view_of(trace: Trace, every: bool, samples: int, seed: int, level: float) -> View:
    """Supervised tokens of a trace, or `every` token."""
    tokens = trace.tokens(every)
    draw = Resampled(tokens.text, samples, seed, level)
    return View(tokens, draw, (tokens.rank == 0).astype(np.float64), loss_of(tokens.prob))


def of_nats(entropy: Any) -> Any:
    """Entropy as the probability of going on that the policy `confidence` makes of it."""
    return -np.expm1(-entropy)


def to_nats(probability: float) -> float:
    """And back; some 35 nats for a probability of 1."""
    return float(-np.log1p(-min(probability, 1 - 1e-15)))


def depths(least: np.ndarray, threshold: float) -> np.ndarray:
    """Passes [N] of tokens whose least probabilities of going on so far are [M - 1, N]."""
    return 1 + (least > threshold).sum(0)


def tune(trace: Trace, target: str, score: str = "decider") -> dict[str, Any]:
    """The threshold of a score that meets a target, and what the trace says about it.

    Args:
        target: `share=0.07`: this share of tokens iterates; `loss`: the mean loss is lowest.
        score: `decider`, `confidence` or `entropy`, all as probabilities of going on.

    Raises:
        ValueError: not a target, or the trace has no such score.
    """
    share = parse_target(target)
    view = view_of(trace, every=False, samples=0, seed=0, level=0.95)
    if score not in view.scores:
        raise ValueError(f"the trace of {trace.header['model']} has no {score} to tune")
    found = np.minimum.accumulate(view.scores[score])
    if share is not None:
        threshold = threshold_for_share(found[0], share)
    else:  # reaching each depth is one decision, taken where the least probability so far exceeds the threshold
        one, two = view.loss[:-1].ravel(), view.loss[1:].ravel()
        threshold = threshold_for_loss(Judged(found.ravel(), one > two, one, two))
    depth = depths(found, threshold)
    here = depth - 1, np.arange(len(depth))
    return {
        "threshold": threshold,
        "target": target,
        "score": score,
        "iterated": float((depth > 1).mean()),
        "mean_depth": float(depth.mean()),
        "accuracy": float(view.right[here].mean()),
        "loss": float(view.loss[here].mean()),
    }


def parse_target(target: str) -> float | None:
    """The share of `share=0.07`; None for `loss`.

    Raises:
        ValueError: neither.
    """
    name, _, number = target.partition("=")
    try:
        share = float(number) if name == "share" else None
    except ValueError:
        share = None
    if target != "loss" and (share is None or not 0 <= share <= 1):
        raise ValueError(f"target {target!r} is not one of loss, share=X with X from 0 to 1")
    return share


def rank_scores(view: View, thresholds: dict[str, float], gain: float) -> dict[str, Any]:
    """How well each score finds tokens that are wrong after depth 1, and those that the second pass helps."""
    found: dict[str, Any] = {}
    weights = view.draw.weights[: RANKED + 1]
    for name, score in view.scores.items():
        labels = {"wrong": view.right[0] == 0, "gain": view.loss[0] - view.loss[1] > gain}
        found[name] = {}
        for label, wanted in labels.items():
            auroc, precision = ranking(score[0], wanted, view.draw.text, weights)
            found[name][label] = {
                "share": float(wanted.mean()),
                "auroc": view.draw.estimate(auroc),
                "average_precision": view.draw.estimate(precision),
            }
        if name == "decider":
            for label, wanted in labels.items():
                judged = quality(Judged(score[0], wanted, view.loss[0], view.loss[1]), thresholds[name])
                found[name][label] |= {key: judged[key] for key in ("calibration_error", "calibration")}
    return found


def curve(view: View, name: str, score: np.ndarray) -> dict[str, list[Any]]:
    """Accuracy and loss against the share of iterated tokens, by threshold, from nobody to everybody.

    A token reaches a depth where the least of its probabilities so far exceeds the threshold, so each (token, depth)
    is one event, and a threshold takes a prefix of the events in falling order.
    """
    least, N = np.minimum.accumulate(score), score.shape[1]
    order = np.argsort(-least.ravel(), kind="stable")
    falling = least.ravel()[order]
    ends = np.concatenate([[0], np.flatnonzero(falling[1:] != falling[:-1]) + 1, [len(falling)]])
    wanted = np.linspace(0, len(falling), POINTS)
    cuts = np.unique(ends[np.minimum(np.searchsorted(ends, wanted), len(ends) - 1)])  # [P]; never between equals
    segment = np.searchsorted(cuts, np.arange(len(falling)), side="right")  # of each event, 1..P - 1
    text, K, P = view.draw.text[order % N], len(view.draw.names), len(cuts)

    def along(start: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """Mean [S, P] at every point, from [N] values at depth 1 and [M - 1, N] changes."""
        sums = np.bincount(text * P + segment, steps.ravel()[order], K * P).reshape(K, P)
        sums[:, 0] = np.bincount(view.draw.text, start, K)
        counts = view.draw.weights @ np.bincount(view.draw.text, minlength=K)
        return view.draw.weights @ sums.cumsum(1) / counts[:, None]

    first = np.repeat([[1.0], *[[0.0]] * (len(score) - 1)], N, axis=1)  # events that make a token iterate
    iterated = along(np.zeros(N), first)[0]
    accuracy, loss = along(view.right[0], np.diff(view.right, axis=0)), along(view.loss[0], np.diff(view.loss, axis=0))
    below = np.concatenate([falling[cuts[1:-1]], [0.0]])
    thresholds: list[float | None] = [float(falling[0]), *((falling[cuts[1:] - 1] + below) / 2).tolist()]
    if falling[-1] <= 0:
        thresholds[-1] = None  # no threshold lets a probability of 0 go on
    intervals = [view.draw.estimate(accuracy[:, point]) for point in range(P)]
    return {
        "threshold": [t if t is None or name != "entropy" else to_nats(t) for t in thresholds],
        "iterated": iterated.tolist(),
        "mean_depth": (1 + cuts / N).tolist(),
        "accuracy": accuracy[0].tolist(),
        "low": [interval["low"] for interval in intervals],
        "high": [interval["high"] for interval in intervals],
        "loss": loss[0].tolist(),
    }
