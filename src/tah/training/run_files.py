"""The files of a training run, `run.json`, `metrics.jsonl` and `curves.png`, and its progress."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from ..checkpoints.contents import version_of
from ..config import current_fields
from ..files import differences, write_atomically
from ..model import TaHForCausalLM
from ..names import Stage
from ..progress import Work
from .recipe import Recipe
from .trainer import CHECKPOINTS, last_checkpoint

LIBRARIES = ("tah", "torch", "transformers", "accelerate", "datasets", "safetensors")


class TrainingProgress(TrainerCallback):
    """Reports the steps of a training, with its loss and the share of tokens that iterated.

    Args:
        open_work: begins the piece of work, given its steps and those that were done before.
    """

    def __init__(self, open_work: Callable[[int, int], Work]) -> None:
        self.open_work = open_work
        self.work: Work | None = None
        self.newest: dict[str, float] = {}  # of each value, since training and evaluation log theirs apart

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.work = self.open_work(state.max_steps, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.work is not None
        self.work.advance()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        names = {"loss": "loss", "eval_loss": "validation loss", "iterated_share": "iterated"}
        self.newest |= {name: logs[name] for name in names if name in (logs or {})}
        if self.work is not None:
            self.work.note = ", ".join(
                f"{text} {self.newest[name]:.3g}" for name, text in names.items() if name in self.newest
            )


def run_facts(recipe: Recipe, stage: Stage, rows: Path, model: TaHForCausalLM) -> dict[str, Any]:
    """What is trained on what, for `run.json` and to compare with on resume."""
    data: dict[str, Any] = {
        str(path.relative_to(rows)): path.stat().st_size for path in sorted(rows.glob("*/data/*.parquet"))
    }
    data |= {str(path.relative_to(rows)): path.read_text() for path in sorted(rows.glob("*/settings.json"))}
    return {
        "stage": stage,
        "recipe": recipe.resolved(),
        "seed": recipe.seed,
        "data": data,
        "parameters": {
            "all": sum(p.numel() for p in model.parameters()),
            "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        },
        "git": _git_commit(),
        "python": platform.python_version(),
        "versions": {name: version_of(name) for name in LIBRARIES},
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def check_directory(directory: Path, facts: dict[str, Any], resume: bool) -> Path | None:
    """The checkpoint to resume from, if any.

    Raises:
        ValueError: the directory holds a run that is not to be resumed, or that differs from this one.
    """
    checkpoint = last_checkpoint(directory / CHECKPOINTS)
    if not resume:
        if (directory / "config.json").is_file() or checkpoint is not None:
            state = "a finished" if (directory / "config.json").is_file() else "an unfinished"
            raise ValueError(f"{directory} holds {state} run; give --resume, or another --output")
        return None
    if checkpoint is not None:
        before = read_facts(directory)
        if differs := differences(_decisive(before), _decisive(facts)):
            raise ValueError(f"{directory} was trained with {differs}; resume with the same, or use another --output")
    return checkpoint


def read_facts(directory: Path) -> dict[str, Any]:
    """The `run.json` of a training that has begun.

    Raises:
        ValueError: it is missing or damaged, so that what the checkpoints beside it were made from is unknown.
    """
    try:
        facts: dict[str, Any] = json.loads((directory / "run.json").read_text("utf-8"))
        if {"stage", "recipe", "data"} <= set(facts):
            return facts
    except (OSError, ValueError, TypeError):
        pass
    raise ValueError(
        f"{directory / 'run.json'} is missing or damaged, so its checkpoints cannot be used; move {directory}"
    )


def is_last(checkpoint: Path) -> bool:
    """Whether training had reached its last step."""
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    return bool(state["global_step"] >= state["max_steps"])


def _decisive(facts: dict[str, Any]) -> dict[str, Any]:
    """The part of `run.json` that decides what a training makes."""
    recipe = json.loads(json.dumps(facts["recipe"]))
    names = ["seed", "base", "model", "backbone"]
    if facts["stage"] == "decider" or (recipe["decider"] or {}).get("joint"):
        names.append("decider")
    parts = {name: recipe[name] for name in names} | {"model": current_fields(recipe["model"])}
    return {"stage": facts["stage"], "recipe": parts, "data": facts["data"]}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`, without one that a crash cut short."""
    lines = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        with suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


def trim_metrics(path: Path, checkpoint: Path | None) -> None:
    """Drop what was logged after the checkpoint that training resumes from."""
    step = int(checkpoint.name.rpartition("-")[2]) if checkpoint is not None else 0
    kept = [line for line in read_metrics(path) if line["step"] <= step]
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))


def draw_curves(directory: Path) -> None:
    """`curves.png` from `metrics.jsonl`: losses and the iterated share by step."""
    from matplotlib.figure import Figure

    from ..stats.charts import as_png, styled

    lines = read_metrics(directory / "metrics.jsonl")
    losses = sorted({key for line in lines for key in line if key.startswith(("loss", "eval_loss"))})
    with styled():
        figure = Figure(figsize=(10, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        for axes, names in ((left, losses), (right, ["iterated_share", "eval_iterated_share"])):
            for name in names:
                points = [(line["step"], line[name]) for line in lines if name in line]
                if points:
                    axes.plot(*zip(*points, strict=True), label=name)
            axes.set_xlabel("step")
            if axes.lines:
                axes.legend()
        left.set_ylabel("loss (nats)")
        write_atomically(directory / "curves.png", as_png(figure))


def write_json(path: Path, value: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(value, indent=2) + "\n")


def _git_commit() -> str | None:
    """The commit this code is at, "+" appended where files differ from it; None outside a checkout."""
    root = Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        return git("rev-parse", "HEAD").strip() + ("+" if git("status", "--porcelain", "--", str(root)).strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return None
