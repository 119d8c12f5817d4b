"""Statistics of a trace: what passes correct and break, by policy. They need no model.

Shapes: N tokens, M = max_depth, S samples (`stats/bootstrap.py`: entry 0 is the data itself), P points of a curve.

A token is *right* or *wrong* by the first choice after depth 1. It is *iterated* if it takes more than one pass. A pass
*corrects* a wrong token and *breaks* a right one. Every policy is evaluated from the outputs of a trace, in which every
token ran all passes. That is exact for attention "own" and "blind". For "duo" it is exact only for `never`, `always`
and the policy that was run, and an approximation for all others.

A mixture weighs the passes by continue probabilities (method.md (15)), and a trace has those of one policy. A policy
with other weights would have other outputs, so its row and its curve are left out.

The policies:

    own policy          the passes that the model ran under its policy and threshold
    decider, confidence, entropy    tokens above a threshold: decider's probability, 1 - top probability, nats
    random, confidence, entropy (equal share)   as many tokens as the decider iterates (without one: the own policy)
    oracle              all passes where depth 1 is wrong (as in the paper)
    hindsight           all passes where they lower the loss
    second choice       no pass; where depth 1 is wrong, its second choice counts. A control for the oracle: a model can
                        learn that a token which an oracle iterates has a wrong first choice

A score is a continue probability after every pass but the last: the decider's; 1 - the probability of the first choice;
or 1 - exp(-entropy), as in the policy `confidence` with the entropy measure. A token reaches a depth if the least of
its scores so far exceeds the threshold (method.md (3)).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ..stats.bootstrap import Estimate, Resampled, ranking, ratio
from ..stats.threshold import Decisions, quality, threshold_for_share
from .trace_file import Tokens, Trace, check_comparable, loss_of, weights_of

CONFIDENCE, ENTROPY = 0.7, 0.3  # thresholds of the untrained policies: 1 - top probability, nats
GAIN = 0.05  # nats; a token gains from a pass that lowers its loss by more
LITTLE = 1e-3  # nats; a smaller change of the loss counts as none
POINTS = 101  # number of points of a curve
RANKED = 200  # number of samples for AUROC and average precision
COMPARED = ("never", "always", "own policy")
EQUAL_SHARE = " (equal share)"
CERTAIN = ("always", "oracle", "hindsight", f"random{EQUAL_SHARE}")  # they continue with probability 1, or not at all


@dataclass
class View:
    """The tokens of a trace as columns, and the bootstrap samples of its texts."""

    tokens: Tokens
    draw: Resampled
    right: np.ndarray  # [M, N] 0.0 or 1.0
    loss: np.ndarray  # [M, N] nats
    weights: str | None  # by which continue probabilities the trace weighs the passes of a mixture

    def measures(self, name: str) -> bool:
        """Return whether the outputs of the trace have the weights of a policy, so that its row can be given."""
        score = "certain" if name in CERTAIN else name.removesuffix(EQUAL_SHARE)
        return self.weights in (None, score) or name in ("never", "own policy", "second choice")

    def mean(self, values: np.ndarray, weight: np.ndarray | None = None) -> Estimate:
        """Return the mean of `values` [N], with its interval."""
        return self.draw.estimate(self.draw.mean(values, weight))

    @property
    def scores(self) -> dict[str, np.ndarray]:
        """Continue probabilities `[M - 1, N]` of each score, after every pass but the last; empty if M is 1."""
        scores = {
            "confidence": 1 - self.tokens.max_prob[:-1].astype(np.float64),
            "entropy": of_nats(self.tokens.entropy[:-1].astype(np.float64)),
        }
        if self.tokens.decider is not None:
            scores = {"decider": self.tokens.decider.astype(np.float64)} | scores
        return scores if len(self.right) > 1 else {}

    def outcome(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return whether each token is right (0.0 or 1.0) and its loss, `[N]` each, under one of `COMPARED`."""
        if name == "own policy":
            return (self.tokens.final_rank == 0).astype(np.float64), loss_of(self.tokens.final_prob)
        at = 0 if name == "never" else -1
        return self.right[at], self.loss[at]


def view_of(trace: Trace, every: bool = False, samples: int = 1000, seed: int = 0, level: float = 0.95) -> View:
    """Return the view of the supervised tokens of a trace, or of `every` token."""
    tokens = trace.tokens(every)
    draw = Resampled(tokens.text, samples, seed, level)
    right = (tokens.rank == 0).astype(np.float64)
    return View(tokens, draw, right, loss_of(tokens.prob), weights_of(trace.header))


def of_nats(entropy: Any) -> Any:
    """Return the continue probability of an entropy in nats, as in the policy `confidence`."""
    return -np.expm1(-entropy)


def to_nats(probability: float) -> float:
    """Return the entropy in nats of a continue probability: the inverse of `of_nats`. About 35 nats for 1."""
    return float(-np.log1p(-min(probability, 1 - 1e-15)))


def depths(least: np.ndarray, threshold: float) -> np.ndarray:
    """Return the number of passes of each token, `[N]`.

    Args:
        least: Least continue probability of each token so far, by pass, `[M - 1, N]`.
        threshold: Threshold of the policy.
    """
    return 1 + (least > threshold).sum(0)


def statistics(
    trace: Trace,
    *,
    threshold: float | None = None,
    every: bool = False,
    samples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    top: int = 20,
    least: int | None = None,
) -> dict[str, Any]:
    """Return all statistics of a trace as JSON values. An estimate is `{"value", "low", "high"}`.

    Args:
        trace: Trace to evaluate.
        threshold: Threshold of the decider; by default that of the trace.
        every: Whether all tokens count, not only supervised ones.
        samples: Number of bootstrap samples of texts.
        seed: Random seed of the bootstrap.
        level: Confidence level of the intervals.
        top: Number of tokens in the list of those most often iterated.
        least: Minimum number of occurrences of a token in that list. By default one per 1,000 tokens, but at least 2
            and at most 10.
    """
    view = view_of(trace, every, samples, seed, level)
    threshold = float(trace.header["decider_threshold"]) if threshold is None else threshold
    thresholds = {"decider": threshold, "confidence": CONFIDENCE, "entropy": of_nats(ENTROPY)}
    oracle = np.where(view.right[0] == 0, view.right[-1], view.right[0])
    return {
        "about": {name: value for name, value in trace.header.items() if name not in ("tah_trace", "contents")},
        "texts": len(view.draw.names),
        "missing_texts": trace.missing,
        "tokens": len(view.tokens.text),
        "every_token": every,
        "level": level,
        "exact": trace.header["attention"] != "duo" or len(view.right) < 2,
        "weights": view.weights,
        "depths": [
            {"depth": d, "accuracy": view.mean(right), "loss": view.mean(loss)}
            for d, (right, loss) in enumerate(zip(view.right, view.loss, strict=True), 1)
        ],
        "passes": [_change(view, d) for d in range(1, len(view.right))],
        "policies": _policies(view, thresholds),
        "headroom": {
            f"over {name}": view.mean(oracle - view.outcome(name)[0]) for name in COMPARED if view.measures("oracle")
        },
        "scores": {name: _ranking(view, name, score, thresholds[name]) for name, score in view.scores.items()},
        "curves": {name: _curve(view, name, score) for name, score in view.scores.items() if view.measures(name)},
        "iterated_tokens": _iterated(trace, view.tokens, top, least),
    }


def compare(one: Trace, other: Trace, *, samples: int = 1000, seed: int = 0, level: float = 0.95) -> dict[str, Any]:
    """Return the accuracy and loss of `other` minus those of `one`, with paired intervals.

    Only texts that are in both traces count, and only policies that both traces measure.

    Raises:
        ValueError: The tokens of a text differ, or no text is in both traces.
    """
    check_comparable(one, other)
    keys = {text.key for text in one.texts} & {text.key for text in other.texts}
    pair = [Trace(t.header, [text for text in t.texts if text.key in keys], t.strings) for t in (one, other)]
    views = [view_of(trace, False, samples, seed, level) for trace in pair]
    difference: dict[str, Any] = {}
    for name in COMPARED:
        if not all(view.measures(name) for view in views):
            continue
        (right, loss), (other_right, other_loss) = (view.outcome(name) for view in views)
        difference[name] = {"accuracy": views[0].mean(other_right - right), "loss": views[0].mean(other_loss - loss)}
    return {
        "models": [trace.header["model"] for trace in pair],
        "texts": len(keys),
        "tokens": len(views[0].tokens.text),
        "difference": difference,
    }


def _change(view: View, d: int) -> dict[str, Any]:
    """Return how the outputs after depth d + 1 differ from those after depth 1."""
    before, after, gained = view.right[0], view.right[d], view.loss[0] - view.loss[d]
    corrected, broken = view.draw.mean(after, 1 - before), view.draw.mean(1 - after, before)
    estimate = view.draw.estimate
    return {
        "depth": d + 1,
        "corrected": estimate(corrected),
        "broken": estimate(broken),
        "break_even_precision": estimate(ratio(broken, broken + corrected)),
        "improved": view.mean(gained > LITTLE),
        "little": view.mean(np.abs(gained) <= LITTLE),
        "worsened": view.mean(gained < -LITTLE),
    }


# -- policies --------------------------------------------------------------------------------------------------------


def _policies(view: View, thresholds: dict[str, float]) -> dict[str, dict[str, Any]]:
    M, tokens = len(view.right), view.tokens
    wrong = view.right[0] == 0
    least = {name: np.minimum.accumulate(score) for name, score in view.scores.items()}
    chosen = {
        "never": np.ones(len(wrong), int),
        "always": np.full(len(wrong), M),
        **{name: depths(its, thresholds[name]) for name, its in least.items()},
        "oracle": np.where(wrong, M, 1),
        "hindsight": np.where(view.loss[-1] < view.loss[0], M, 1),
    }
    used = {name: thresholds[name] for name in least}
    equal = {}
    guide = chosen.get("decider", tokens.depth)
    if (guide > 1).any():
        share = _one_hot(guide, M).mean(1, keepdims=True)
        equal[f"random{EQUAL_SHARE}"] = _policy(view, np.tile(share, len(wrong)))
        for name in least.keys() - {"decider"}:
            used[name + EQUAL_SHARE] = threshold_for_share(least[name][0], float(1 - share[0, 0]))
            chosen[name + EQUAL_SHARE] = depths(least[name], used[name + EQUAL_SHARE])
    rows = {name: _policy(view, _one_hot(depth, M)) for name, depth in chosen.items()} | equal
    for name, value in used.items():
        rows[name]["threshold"] = to_nats(value) if name.startswith("entropy") else value
    iterated, (final, loss) = (tokens.depth > 1).astype(np.float64), view.outcome("own policy")
    rows["own policy"] = _row(view, iterated, iterated * final, loss, tokens.depth)
    second = np.where(wrong, tokens.rank[0] == 1, True).astype(np.float64)
    rows["second choice"] = _row(view, np.zeros(len(wrong)), np.zeros(len(wrong)), None, np.ones(len(wrong)))
    rows["second choice"] |= {"accuracy": view.mean(second), "gain": view.mean(second - view.right[0])}
    order = [
        *("never", "always", "own policy", "decider", "confidence", "entropy"),
        *(name + EQUAL_SHARE for name in ("random", "confidence", "entropy")),
        *("oracle", "hindsight", "second choice"),
    ]
    return {name: rows[name] for name in order if name in rows and view.measures(name)}


def _one_hot(depth: np.ndarray, M: int) -> np.ndarray:
    """Return depths [N] as 0.0 and 1.0, [M, N]."""
    return (np.arange(1, M + 1)[:, None] == depth).astype(np.float64)


def _policy(view: View, share: np.ndarray) -> dict[str, Any]:
    """Return the row of a policy, given the probability [M, N] with which each token takes d passes."""
    deep_right = (share[1:] * view.right[1:]).sum(0)
    depth = (share * np.arange(1, len(share) + 1)[:, None]).sum(0)
    return _row(view, 1 - share[0], deep_right, (share * view.loss).sum(0), depth)


def _row(
    view: View, iterated: np.ndarray, deep_right: np.ndarray, loss: np.ndarray | None, depth: np.ndarray
) -> dict[str, Any]:
    """Return the row of a policy.

    Args:
        view: Tokens to evaluate.
        iterated: Probability that each token iterates, `[N]`.
        deep_right: Probability that each token iterates and is then right, `[N]`.
        loss: Loss of each token, `[N]`.
        depth: Number of passes of each token, `[N]`.
    """
    total, estimate = view.draw.total, view.draw.estimate
    right, wrong = view.right[0], 1 - view.right[0]
    fixed, broke = total(wrong * deep_right), total(right * (iterated - deep_right))
    hits, alarms = total(wrong * iterated), total(right * iterated)
    repaired, overturned = ratio(fixed, hits), ratio(broke, alarms)
    after = right * (1 - iterated) + deep_right
    second = right * (1 - iterated) + iterated * (view.tokens.rank[0] == 1)
    return {
        "threshold": None,
        "iterated": view.mean(iterated),
        "mean_depth": view.mean(depth),
        "accuracy": view.mean(after),
        "gain": view.mean(after - right),
        "loss": None if loss is None else view.mean(loss),
        "corrected": estimate(ratio(fixed, total(wrong))),
        "broken": estimate(ratio(broke, total(right))),
        "precision": estimate(ratio(hits, hits + alarms)),
        "recall": estimate(ratio(hits, total(wrong))),
        "break_even_precision": estimate(ratio(overturned, overturned + repaired)),
        "second_choice": view.mean(second),
    }


def _iterated(trace: Trace, tokens: Tokens, top: int, least: int | None) -> list[dict[str, Any]]:
    """Return the tokens that iterate most often under the policy of the trace."""
    least = min(max(len(tokens.target) // 1000, 2), 10) if least is None else least
    ids, inverse = np.unique(tokens.target, return_inverse=True)
    count = np.bincount(inverse)
    share = np.bincount(inverse, tokens.depth > 1) / count
    order = sorted(np.flatnonzero((count >= least) & (share > 0)), key=lambda at: (-share[at], -count[at], ids[at]))
    return [
        {"id": int(ids[at]), "text": trace.string(ids[at]), "count": int(count[at]), "iterated": float(share[at])}
        for at in order[:top]
    ]


# -- scores ----------------------------------------------------------------------------------------------------------


def _ranking(view: View, name: str, score: np.ndarray, threshold: float) -> dict[str, Any]:
    """Return how well a score finds tokens that are wrong after depth 1, and tokens that gain from the second pass."""
    found: dict[str, Any] = {}
    for label, wanted in {"wrong": view.right[0] == 0, "gain": view.loss[0] - view.loss[1] > GAIN}.items():
        auroc, precision = ranking(score[0], wanted, view.draw.text, view.draw.weights[: RANKED + 1])
        found[label] = {
            "share": float(wanted.mean()),
            "auroc": view.draw.estimate(auroc),
            "average_precision": view.draw.estimate(precision),
        }
        if name == "decider":
            found_by_decider = quality(Decisions(score[0], wanted, view.loss[0], view.loss[1]), threshold)
            found[label] |= {key: found_by_decider[key] for key in ("calibration_error", "calibration")}
    return found


def _curve(view: View, name: str, score: np.ndarray) -> dict[str, list[Any]]:
    """Return accuracy and loss against the iterated share, from no token to every token.

    Each (token, depth) is one event: a token reaches a depth if its least probability so far exceeds the threshold.
    A threshold therefore selects a prefix of the events, sorted by falling probability.
    """
    least, N = np.minimum.accumulate(score), score.shape[1]
    order = np.argsort(-least.ravel(), kind="stable")
    falling = least.ravel()[order]
    ends = np.concatenate([[0], np.flatnonzero(falling[1:] != falling[:-1]) + 1, [len(falling)]])
    wanted = np.linspace(0, len(falling), POINTS)
    # [P]; a cut never separates events of equal probability
    cuts = np.unique(ends[np.minimum(np.searchsorted(ends, wanted), len(ends) - 1)])
    segment = np.searchsorted(cuts, np.arange(len(falling)), side="right")  # segment of each event, 1..P - 1
    text, K, P = view.draw.text[order % N], len(view.draw.names), len(cuts)

    def along(start: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """Return the mean at every point, `[S, P]`, from values at depth 1 [N] and their changes by pass [M - 1, N]."""
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
        thresholds[-1] = None  # a threshold is at least 0 and the comparison strict, so probability 0 never iterates
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
