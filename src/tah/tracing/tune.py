"""`tah tune`: choose a threshold by a trace, and write it into a checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..config import TaHConfig
from ..files import write_atomically
from ..load import find
from ..names import parse_target
from ..stats.threshold import Decisions, threshold_for_loss, threshold_for_share
from .overthinking import depths, view_of
from .trace_file import Trace


@dataclass
class Tunable:
    """A checkpoint whose policy has a threshold."""

    path: Path  # its config.json
    score: str  # as in `overthinking.View.scores`


def check_tunable(model: str) -> Tunable:
    """What there is to tune in a checkpoint.

    Raises:
        ValueError: it is no TaH checkpoint in a directory, or its policy has no threshold.
    """
    path, kind = find(model)
    if kind != "tah":
        raise ValueError(f"{model} is not a TaH checkpoint: it has no threshold to write to")
    if not Path(model).is_dir() or not Path(path).samefile(model):
        what = "in the authors' layout" if Path(model).is_dir() else "no directory of yours"
        raise ValueError(f"{model} is {what}, so it stays as it is: copy {path}, then tune that directory")
    config = TaHConfig.from_pretrained(path)
    score = config.policy
    if score == "confidence":
        score = "confidence" if config.confidence_measure == "probability" else "entropy"
    if score not in ("decider", "confidence", "entropy"):
        raise ValueError(f"{model} has the policy {config.policy!r}, which has no threshold")
    if config.max_depth < 2:
        raise ValueError(f"{model} has max_depth=1: nothing iterates, whatever the threshold")
    return Tunable(Path(path) / "config.json", score)


def tune(trace: Trace, target: str, score: str = "decider") -> dict[str, Any]:
    """The threshold of a score that meets a target, and the outcome with it.

    Args:
        target: `share=0.07`: this share of tokens iterates; `loss`: the mean loss is lowest.
        score: `decider`, `confidence` or `entropy`, all as probabilities of going on.

    Raises:
        ValueError: not a target, or the trace has no such score.
    """
    share = parse_target(target)
    view = view_of(trace, samples=0)
    if score not in view.scores:
        raise ValueError(f"the trace of {trace.header['model']} has no {score} to tune")
    least = np.minimum.accumulate(view.scores[score])
    if share is not None:
        threshold = threshold_for_share(least[0], share)
    else:  # reaching each depth is one decision, taken where the least probability so far exceeds the threshold
        one, two = view.loss[:-1].ravel(), view.loss[1:].ravel()
        threshold = threshold_for_loss(Decisions(least.ravel(), one > two, one, two))
    depth = depths(least, threshold)
    at = depth - 1, np.arange(len(depth))
    return {
        "threshold": threshold,
        "target": target,
        "score": score,
        "iterated": float((depth > 1).mean()),
        "mean_depth": float(depth.mean()),
        "accuracy": float(view.right[at].mean()),
        "loss": float(view.loss[at].mean()),
    }


def write_threshold(path: Path, threshold: float) -> float:
    """Change the threshold in a config.json and nothing else, at once or not at all; returns the one before."""
    config = json.loads(path.read_text("utf-8"))
    before = float(config.get("threshold", TaHConfig.threshold))
    write_atomically(path, json.dumps(config | {"threshold": threshold}, indent=2) + "\n")
    return before
