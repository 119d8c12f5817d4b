"""`tah tune`: put a threshold into a checkpoint."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ..config import TaHConfig
from ..files import write_atomically
from ..load import find


@dataclass
class Tunable:
    """A checkpoint whose policy has a threshold."""

    path: Path  # its config.json
    score: str  # as in `trace_scores.View.scores`


def check_tunable(model: str) -> Tunable:
    """What there is to tune in a checkpoint.

    Raises:
        ValueError: it is no TaH checkpoint in a directory, or its policy knows no threshold.
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
        raise ValueError(f"{model} has the policy {config.policy!r}, which knows no threshold")
    if config.max_depth < 2:
        raise ValueError(f"{model} has max_depth=1: nothing iterates, whatever the threshold")
    return Tunable(Path(path) / "config.json", score)


def write_threshold(path: Path, threshold: float) -> float:
    """Change the threshold in a config.json and nothing else, at once or not at all; returns the one before."""
    config = json.loads(path.read_text("utf-8"))
    before = float(config.get("threshold", TaHConfig.threshold))
    write_atomically(path, json.dumps(config | {"threshold": threshold}, indent=2) + "\n")
    return before
