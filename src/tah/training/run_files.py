"""The files of a training run (`run.json`, `metrics.jsonl`, `curves.png`) and its progress line."""

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
    """Callback that reports the steps of a training, with its loss and iterated share.

    Args:
        open_work: Function that begins the progress line. It gets the number of all steps and of the steps already
            done.
        iterates: Whether the line contains the iterated share. It is left out in stage `decider`, where it does not
            depend on what is trained.
    """

    def __init__(self, open_work: Callable[[int, int], Work], iterates: bool = True) -> None:
        self.open_work = open_work
        self.names = {"loss": "loss", "eval_loss": "validation loss"}
        if iterates:
            self.names["iterated_share"] = "iterated"
        self.work: Work | None = None
        self.newest: dict[str, float] = {}  # newest value of each name: training and evaluation log separately

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.work = self.open_work(state.max_steps, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.work is not None
        self.work.advance()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.newest |= {name: logs[name] for name in self.names if name in (logs or {})}
        if self.work is not None:
            self.work.note = ", ".join(
                f"{text} {self.newest[name]:.3g}" for name, text in self.names.items() if name in self.newest
            )


def run_facts(recipe: Recipe, stage: Stage, rows: Path, model: TaHForCausalLM) -> dict[str, Any]:
    """Return the contents of `run.json`: recipe, data, parameters and versions. A resumed run is compared with them.

    Args:
        recipe: Recipe of the run.
        stage: Stage that is trained.
        rows: Directory of the labelled rows, with `train` and `validation`.
        model: Model with `requires_grad` set for the stage.
    """
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
    """Return the checkpoint to resume from, or None if training starts at step 0.

    Args:
        directory: Directory of the stage.
        facts: Result of `run_facts` for the current call.
        resume: Whether an existing run may continue.

    Raises:
        ValueError: The directory contains a run and `resume` is false, or that run differs from `facts`.
    """
    checkpoint = last_checkpoint(directory / CHECKPOINTS)
    if not resume:
        if (directory / "config.json").is_file() or checkpoint is not None:
            state = "a finished" if (directory / "config.json").is_file() else "an unfinished"
            raise ValueError(f"{directory} contains {state} run; use --resume, or choose another --output")
        return None
    if checkpoint is not None:
        before = read_facts(directory)
        if differs := differences(_decisive(before), _decisive(facts)):
            raise ValueError(
                f"{directory} was trained with {differs}; resume with the same settings, or choose another --output"
            )
    return checkpoint


def read_facts(directory: Path) -> dict[str, Any]:
    """Return the `run.json` of a training that has begun.

    Raises:
        ValueError: The file is missing or damaged. The origin of the checkpoints beside it is then unknown.
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
    """Return whether the checkpoint is of the last step of its training."""
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    return bool(state["global_step"] >= state["max_steps"])


def _decisive(facts: dict[str, Any]) -> dict[str, Any]:
    """Return the part of `run.json` that the result of a training depends on."""
    recipe = json.loads(json.dumps(facts["recipe"]))
    names = ["seed", "base", "model", "backbone"]
    if facts["stage"] == "decider" or (recipe["decider"] or {}).get("joint"):
        names.append("decider")
    parts = {name: recipe[name] for name in names} | {"model": current_fields(recipe["model"])}
    return {"stage": facts["stage"], "recipe": parts, "data": facts["data"]}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the lines of `metrics.jsonl`, without incomplete lines; a crash can leave one."""
    lines = []
    for line in path.read_text().splitlines() if path.is_file() else ():
        with suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


def trim_metrics(path: Path, checkpoint: Path | None) -> None:
    """Remove the lines that were logged after the checkpoint that training resumes from."""
    step = int(checkpoint.name.rpartition("-")[2]) if checkpoint is not None else 0
    kept = [line for line in read_metrics(path) if line["step"] <= step]
    write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept))


def draw_curves(directory: Path) -> None:
    """Draw `curves.png` from `metrics.jsonl`: losses and iterated share by step."""
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
    """Write a JSON file in one step, with an indent of 2."""
    write_atomically(path, json.dumps(value, indent=2) + "\n")


def _git_commit() -> str | None:
    """Return the commit of this code, with "+" if files differ from it; None outside a git checkout."""
    root = Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True).stdout

    try:
        return git("rev-parse", "HEAD").strip() + ("+" if git("status", "--porcelain", "--", str(root)).strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return None
