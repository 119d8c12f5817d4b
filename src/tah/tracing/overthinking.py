"""What a second pass gains and what it breaks, by policy: statistics of a trace, without the model.

Shapes: N tokens, M = max_depth, S samples (`resample.py`: entry 0 is the data itself).

*Wrong* and *right* are the first choice after depth 1, *iterated* is more than one pass. A pass *corrects* a wrong
token and *breaks* a right one. Every policy is judged by the outputs of the trace, where everyone ran all passes: exact
for attention "own" and "blind", an approximation for "duo", but for `never`, `always` and the policy that was run.

The policies:

    own policy          what the model did under its policy and threshold
    decider, confidence, entropy    who exceeds a threshold: decider's probability, 1 - top probability, nats
    random, confidence, entropy (equal share)   as many tokens as the decider (or else the own policy) chose
    oracle              all passes where depth 1 is wrong (the paper's)
    hindsight           all passes where that lowers the loss
    second choice       where depth 1 is wrong, its second choice and no pass: a control, since being iterated by an
                        oracle tells a model that its first choice is wrong
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

from ..stats.bootstrap import Estimate, ratio
from ..stats.threshold import threshold_for_share
from .trace_scores import View, curve, depths, of_nats, rank_scores, to_nats, view_of
from .traced import Tokens, Trace, check_comparable, loss_of

CONFIDENCE, ENTROPY = 0.7, 0.3  # thresholds of the untrained policies: 1 - top probability, nats
GAIN = 0.05  # nats; a token is worth a pass that lowers its loss by more
LITTLE = 1e-3  # nats; a loss that changes by less has not changed
MARKS = re.compile(r"[\\`*\[\]<>&|#!~$]|(?<![^\W_])_|_(?![^\W_])")  # an underscore within a word is none
LINKS = re.compile(r"(?i)(https?|ftp):|www\.")  # which GitHub links without being asked


def statistics(
    trace: Trace,
    *,
    threshold: float | None = None,
    confidence: float = CONFIDENCE,
    entropy: float = ENTROPY,
    gain: float = GAIN,
    every: bool = False,
    samples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
    top: int = 20,
    least: int | None = None,
) -> dict[str, Any]:
    """All there is to say, ready for JSON; an estimate is {"value", "low", "high"}.

    Args:
        threshold: of the decider; the trace's by default.
        confidence: of 1 - the top probability.
        entropy: in nats.
        gain: in nats, that makes a pass worth it, for judging scores.
        every: all tokens, not only those the model is to say.
        samples: draws of texts for the intervals.
        seed: of the draws.
        level: share of the draws within an interval.
        top: how many of the tokens most often iterated.
        least: times a token must occur to be among them; by default once per 1,000 tokens, 2 to 10 times.
    """
    view = view_of(trace, every, samples, seed, level)
    threshold = float(trace.header["decider_threshold"]) if threshold is None else threshold
    thresholds = {"decider": threshold, "confidence": confidence, "entropy": of_nats(entropy)}
    policies = _policies(view, thresholds)
    return {
        "about": {name: value for name, value in trace.header.items() if name not in ("tah_trace", "contents")},
        "texts": len(view.draw.names),
        "missing_texts": trace.missing,
        "tokens": len(view.tokens.text),
        "every_token": every,
        "level": level,
        "exact": trace.header["attention"] != "duo" or len(view.right) < 2,
        "depths": [
            {"depth": d + 1, "accuracy": view.mean(view.right[d]), "loss": view.mean(view.loss[d])}
            for d in range(len(view.right))
        ],
        "passes": [_change(view, d) for d in range(1, len(view.right))],
        "policies": policies,
        "headroom": _headroom(view),
        "scores": rank_scores(view, thresholds, gain),
        "curves": {name: curve(view, name, score) for name, score in view.scores.items()},
        "iterated_tokens": _iterated(trace, view.tokens, top, least),
    }


def compare(one: Trace, other: Trace, *, samples: int = 1000, seed: int = 0, level: float = 0.95) -> dict[str, Any]:
    """Accuracy and loss of another trace less those of one, over the texts that both have, with paired intervals.

    Raises:
        ValueError: they have other tokens, or no text in common.
    """
    check_comparable(one, other)
    keys = {text.key for text in one.texts} & {text.key for text in other.texts}
    pair = [Trace(t.header, [text for text in t.texts if text.key in keys], t.strings) for t in (one, other)]
    views = [view_of(trace, False, samples, seed, level) for trace in pair]
    difference: dict[str, Any] = {}
    for name in ("never", "always", "own policy"):
        (right, loss), (other_right, other_loss) = (_outcome(view, name) for view in views)
        difference[name] = {
            "accuracy": views[0].mean(other_right - right),
            "loss": views[0].mean(other_loss - loss),
        }
    return {
        "models": [trace.header["model"] for trace in pair],
        "texts": len(keys),
        "tokens": len(views[0].tokens.text),
        "difference": difference,
    }


# -- parts -----------------------------------------------------------------------------------------------------------


def _one_hot(depth: np.ndarray, M: int) -> np.ndarray:
    """[N] -> [M, N]"""
    return (np.arange(1, M + 1)[:, None] == depth).astype(np.float64)


def _change(view: View, d: int) -> dict[str, Any]:
    """What the passes up to depth d + 1 do to depth 1."""
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


def _policies(view: View, thresholds: dict[str, float]) -> dict[str, dict[str, Any]]:
    M, tokens, scores = len(view.right), view.tokens, view.scores
    wrong = view.right[0] == 0
    least = {name: np.minimum.accumulate(score) for name, score in scores.items()}
    chosen = {
        "never": np.ones(len(wrong), int),
        "always": np.full(len(wrong), M),
        **{name: depths(least[name], thresholds[name]) for name in scores},
        "oracle": np.where(wrong, M, 1),
        "hindsight": np.where(view.loss[-1] < view.loss[0], M, 1),
    }
    nats = {"entropy": to_nats(thresholds["entropy"])}
    rows = {name: _policy(view, _one_hot(depth, M), (thresholds | nats).get(name)) for name, depth in chosen.items()}
    iterated, (final, loss) = (tokens.depth > 1).astype(np.float64), _outcome(view, "own policy")
    rows["own policy"] = _row(view, iterated, iterated * final, loss, tokens.depth, None)
    second = np.where(wrong, tokens.rank[0] == 1, True).astype(np.float64)
    rows["second choice"] = _row(view, np.zeros(len(wrong)), np.zeros(len(wrong)), None, np.ones(len(wrong)), None)
    rows["second choice"] |= {"accuracy": view.mean(second), "gain": view.mean(second - view.right[0])}
    guide = chosen.get("decider", tokens.depth)
    if (guide > 1).any():
        share = _one_hot(guide, M).mean(1, keepdims=True)
        rows["random (equal share)"] = _policy(view, np.tile(share, len(wrong)), None)
        for name in scores.keys() - {"decider"}:
            threshold = threshold_for_share(least[name][0], float(1 - share[0, 0]))
            depth = depths(least[name], threshold)
            shown = to_nats(threshold) if name == "entropy" else threshold
            rows[f"{name} (equal share)"] = _policy(view, _one_hot(depth, M), shown)
    order = [
        *("never", "always", "own policy", "decider", "confidence", "entropy"),
        *(f"{name} (equal share)" for name in ("random", "confidence", "entropy")),
        *("oracle", "hindsight", "second choice"),
    ]
    return {name: rows[name] for name in order if name in rows}


def _policy(view: View, share: np.ndarray, threshold: float | None) -> dict[str, Any]:
    """A policy by the probability [M, N] that it runs each token so many passes."""
    deep_right = (share[1:] * view.right[1:]).sum(0)
    depth = (share * np.arange(1, len(share) + 1)[:, None]).sum(0)
    return _row(view, 1 - share[0], deep_right, (share * view.loss).sum(0), depth, threshold)


def _row(
    view: View,
    iterated: np.ndarray,
    deep_right: np.ndarray,
    loss: np.ndarray | None,
    depth: np.ndarray,
    threshold: float | None,
) -> dict[str, Any]:
    """A policy by the probabilities [N] that a token iterates, and that it does and ends up right."""
    total, estimate = view.draw.total, view.draw.estimate
    right, wrong = view.right[0], 1 - view.right[0]
    fixed, broke = total(wrong * deep_right), total(right * (iterated - deep_right))
    hits, alarms = total(wrong * iterated), total(right * iterated)
    repaired, overturned = ratio(fixed, hits), ratio(broke, alarms)
    after = right * (1 - iterated) + deep_right
    second = right * (1 - iterated) + iterated * (view.tokens.rank[0] == 1)
    return {
        "threshold": threshold,
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


def _outcome(view: View, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Who is right, and the losses, [N] each, under `never`, `always` or the own policy."""
    if name == "own policy":
        return (view.tokens.final_rank == 0).astype(np.float64), loss_of(view.tokens.final_prob)
    at = 0 if name == "never" else -1
    return view.right[at], view.loss[at]


def _headroom(view: View) -> dict[str, Any]:
    """Accuracy of the oracle less that of others."""
    right = view.right
    oracle = np.where(right[0] == 0, right[-1], right[0])
    return {f"over {name}": view.mean(oracle - _outcome(view, name)[0]) for name in ("never", "always", "own policy")}


def _iterated(trace: Trace, tokens: Tokens, top: int, least: int | None) -> list[dict[str, Any]]:
    """The tokens whose predictions most often took more than one pass under the trace's policy."""
    least = min(max(len(tokens.target) // 1000, 2), 10) if least is None else least
    ids, inverse = np.unique(tokens.target, return_inverse=True)
    count = np.bincount(inverse)
    share = np.bincount(inverse, tokens.depth > 1) / count
    order = sorted(np.flatnonzero((count >= least) & (share > 0)), key=lambda at: (-share[at], -count[at], ids[at]))
    return [
        {"id": int(ids[at]), "text": trace.string(ids[at]), "count": int(count[at]), "iterated": float(share[at])}
        for at in order[:top]
    ]


# -- words -----------------------------------------------------------------------------------------------------------


def as_markdown(stats: dict[str, Any]) -> str:
    """Statistics as a page of tables."""
    lines = _about(stats)
    lines += ["", "## After each pass, if everyone runs it", ""]
    depths = [[str(row["depth"]), _percent(row["accuracy"]), _number(row["loss"])] for row in stats["depths"]]
    lines += _table(["depth", "accuracy", "loss"], depths)
    if stats["passes"]:
        names = ("corrected", "broken", "break_even_precision", "improved", "worsened")
        passes = [[str(row["depth"]), *(_percent(row[name]) for name in names)] for row in stats["passes"]]
        titles = ["wrong ones corrected", "right ones broken", "break-even precision", "loss falls", "loss rises"]
        lines += ["", "## What deeper passes change", "", *_table(["up to depth", *titles], passes)]
    shown = ("iterated", "accuracy", "gain", "loss", "precision", "break_even_precision", "second_choice")
    titles = ["iterated", "accuracy", "over never", "loss", "precision", "break-even", "second choice there"]
    rows = []
    for name, row in stats["policies"].items():
        title = plain(name) if row["threshold"] is None else f"{plain(name)} > {row['threshold']:.4g}"
        rows.append([title, *(_number(row[n]) if n == "loss" else _percent(row[n]) for n in shown)])
    lines += ["", "## Who iterates", "", *_table(["policy", *titles], rows)]
    over = ", ".join(f"{_percent(gap)} {plain(name)}" for name, gap in stats["headroom"].items())
    lines += ["", f"Headroom of the oracle: {over}."]
    if stats["scores"]:
        rows = [
            [
                plain(name),
                plain(label),
                _percent(found["auroc"]),
                _percent(found["average_precision"]),
                f"{found['share']:.2%}",
            ]
            for name, labels in stats["scores"].items()
            for label, found in labels.items()
        ]
        titles = ["score", "finds", "AUROC", "average precision", "share of such tokens"]
        lines += ["", "## How well scores find wrong tokens, and tokens that gain", "", *_table(titles, rows)]
    if stats["iterated_tokens"]:
        rows = [[_code(t["text"]), f"{t['count']:,}", f"{t['iterated']:.1%}"] for t in stats["iterated_tokens"]]
        lines += ["", "## Tokens most often iterated", "", *_table(["token", "count", "iterated"], rows)]
    return "\n".join(lines) + "\n"


def _about(stats: dict[str, Any]) -> list[str]:
    about, counted = stats["about"], "tokens" if stats["every_token"] else "supervised tokens"
    measure = f" ({plain(about['confidence_measure'])})" if about.get("confidence_measure") else ""
    model, data, policy = (plain(about[name]) for name in ("model", "data", "policy"))
    lines = [
        f"# {model} on {data}",
        "",
        f"{stats['tokens']:,} {counted} of {stats['texts']:,} texts, at most {about['max_depth']} passes, policy "
        f"{policy}{measure} at {about['threshold']:.4g}. Intervals: {stats['level']:.0%}, by drawing texts.",
    ]
    if stats["missing_texts"]:
        lines += ["", f"Unfinished: {stats['missing_texts']:,} texts are missing."]
    if not stats["exact"]:
        known = "never, always and own policy" if about["final"] == "run" else "never and always"
        why = f'Deeper passes read each other (attention "duo"): all but {known} are judged by outputs where everyone'
        lines += ["", f"{why} iterated."]
    return lines


def _table(titles: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (titles, ["---"] * len(titles), *rows)]


def _percent(estimate: Estimate) -> str:
    return _number(estimate, 100, " %")


def _number(estimate: Estimate | None, times: float = 1, unit: str = "") -> str:
    """`81.80 % (81.21 to 82.40)`, or - where undefined."""
    if estimate is None or estimate["value"] is None:
        return "-"
    digits = 2 if unit else 4
    text = f"{estimate['value'] * times:.{digits}f}{unit}"
    low, high = estimate["low"], estimate["high"]
    return text if low is None or high is None else f"{text} ({low * times:.{digits}f} to {high * times:.{digits}f})"


def plain(text: Any) -> str:
    """Any text as itself, on one line: what Markdown or HTML would make something of is escaped."""
    shown = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in str(text))
    shown = MARKS.sub(lambda mark: "&lt;" if mark[0] == "<" else "&amp;" if mark[0] == "&" else f"\\{mark[0]}", shown)
    return LINKS.sub(lambda link: f"{link[0][:-1]}\\{link[0][-1]}", shown)


def _code(text: str) -> str:
    """Any text in a cell of a table, as code."""
    return "`" + (repr(text)[1:-1].replace("|", "\\|").replace("`", "'") or "(empty)") + "`"
