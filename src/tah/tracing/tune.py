"""`tah tune`: choose a threshold from a trace, and write it to the config of a checkpoint."""

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
    """A checkpoint whose policy has a threshold.

    Attributes:
        path: Its `config.json`.
        score: Name of the score that the policy compares with the threshold: a key of `overthinking.View.scores`.
    """

    path: Path
    score: str


def check_tunable(model: str) -> Tunable:
    """Return the config file and the score of a checkpoint whose threshold can be tuned.

    Raises:
        ValueError: `model` is not the directory of a TaH checkpoint, its policy has no threshold, or its `max_depth`
            is 1.
    """
    path, kind = find(model)
    if kind != "tah":
        raise ValueError(f"{model} is not a TaH checkpoint, so it has no threshold to tune")
    if not Path(model).is_dir() or not Path(path).samefile(model):
        what = "an original checkpoint of the authors" if Path(model).is_dir() else "not a local directory"
        raise ValueError(f"{model} is {what}, which tah tune does not change: copy {path}, then tune the copy")
    config = TaHConfig.from_pretrained(path)
    score = config.policy
    if score == "confidence":
        score = "confidence" if config.confidence_measure == "probability" else "entropy"
    if score not in ("decider", "confidence", "entropy"):
        raise ValueError(f"{model} has the policy {config.policy!r}, which has no threshold")
    if config.decision == "sample":
        raise ValueError(f"{model} has decision='sample', which draws its decisions: it has no threshold")
    if config.max_depth < 2:
        raise ValueError(f"{model} has max_depth=1: no token iterates at any threshold")
    return Tunable(Path(path) / "config.json", score)


def tune(trace: Trace, target: str, score: str = "decider") -> dict[str, Any]:
    """Return the threshold of a score that meets a target, with the accuracy, loss and depth that it gives.

    Args:
        trace: Trace whose supervised tokens count.
        target: `share=0.07` for the threshold at which this share of tokens iterates; `loss` for the one with the
            lowest mean loss.
        score: `decider`, `confidence` or `entropy`. Each is a continue probability.

    Raises:
        ValueError: `target` is not valid, or the trace does not have this score, or is of a mixture with the weights
            of another policy.
    """
    share = parse_target(target)
    view = view_of(trace, samples=0)
    if score not in view.scores:
        raise ValueError(f"the trace of {trace.header['model']} does not contain the score {score!r}")
    if not view.measures(score):
        raise ValueError(
            f"the trace of {trace.header['model']} weighs the passes of its mixture by the policy "
            f"{trace.header['policy']}, so it does not measure {score!r}: trace again with that policy"
        )
    least = np.minimum.accumulate(view.scores[score])
    if share is not None:
        threshold = threshold_for_share(least[0], share)
    else:  # each (token, depth) is one decision: a token reaches a depth if its least probability so far > threshold
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
    """Set the threshold in a `config.json` and return the previous one.

    All other entries stay. The write is atomic.
    """
    config = json.loads(path.read_text("utf-8"))
    before = float(config.get("threshold", TaHConfig.threshold))
    write_atomically(path, json.dumps(config | {"threshold": threshold}, indent=2) + "\n")
    return before
