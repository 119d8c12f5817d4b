"""The steps of a recipe (data, base, reference, labels, both stages of training, report) and the commands over them.

`run.py` decides which steps are made. The module of each step does the work.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..checkpoints.contents import contents
from ..data.data_files import COMPLETE
from ..load import find, load_base, load_tah, load_tokenizer
from ..names import Stage
from ..progress import SILENT, Reporter
from ..training.label import label as label_rows
from ..training.label import name_for_card
from ..training.recipe import Recipe
from ..training.train import train as train_stage
from . import preflight
from .experiment.baselines import train_base, train_blind, train_reference, train_standard_compute
from .experiment.report import write_report
from .experiment.tiny import check_sections, write_data
from .pruned import prune_base
from .run import Run, Step, device_of_process, flat, wait_until

SHARED: dict[str, Any] = {"together": True, "resumes": True}  # every process takes part
ALONE: dict[str, Any] = {"single": True, "resumes": True}


def chain(recipe: Recipe) -> list[Step]:
    """Return the steps of a recipe, each after the steps that it needs."""
    whole = recipe.resolved()
    own_data, own_base = recipe.data.generate is not None, recipe.base.scratch is not None
    own_reference = recipe.label is not None and recipe.label.reference == "trained"
    data = flat(whole["data"], "data")
    if not own_data:
        data |= {f"data.{name}": contents(whole["data"][name]) for name in ("source", "validation")}
    base = flat(whole["base"], "base") | {"base.model": contents(recipe.base.model)}
    found = []
    if own_data or own_base:
        check_sections(recipe)  # a mistake is found before an earlier result is moved
    if own_data:
        generate = flat(whole["data"]["generate"], "data.generate")
        found.append(Step("data", "data", write_data, generate))
    texts = ("data",) if own_data else ()
    if own_base:
        base |= {"data.max_length": recipe.data.max_length, "backbone.packed": recipe.backbone.packed}
        found.append(Step("base", "base", train_base, base, texts, **ALONE))
    elif recipe.makes_base:
        found.append(Step("base", "base", prune_base, base | data, texts, check=preflight.check_pruning))
    if own_reference:
        reads = flat(whole["backbone"]["training"], "backbone.training")
        found.append(Step("reference", "reference", train_reference, reads, (*texts, "base"), **ALONE))
    tokenizer = {"tokenizer": _tokenizer_contents(recipe.base.tokenizer or recipe.base.model)}
    reference = whole["label"]["reference"] if recipe.uses_labels else None
    needs = (*texts, *(("base",) if own_base else ()), *(("reference",) if own_reference and reference else ()))
    reads = data | tokenizer | {"label.reference": contents(reference)}
    found.append(Step("label", "labels", make_labels, reads, needs, check=preflight.check_labelling, **SHARED))
    found += _stages(recipe, whole, base)
    if own_data:
        found += _controls(recipe, whole)
        needs = tuple(step.name for step in found if step.name != "base")
        found.append(Step("report", "report", write_report, {}, needs, single=True))
    return found


def _stages(recipe: Recipe, whole: dict[str, Any], base: dict[str, Any]) -> list[Step]:
    """Return the steps of the two stages of training."""
    reads = flat(whole["model"], "model") | flat(whole["backbone"], "backbone")
    reads |= {"backbone.init": contents(recipe.backbone.init), "data.max_length": recipe.data.max_length}
    if recipe.uses_labels:
        reads["label.rule"] = whole["label"]["rule"]
    if recipe.decider is not None and recipe.decider.joint:
        reads |= {"decider.joint": True, "decider.gain": recipe.decider.gain}
    if not recipe.makes_base:
        reads |= {name: base[name] for name in ("base.model", "base.dtype")}
    needs = ("label", *(("base",) if recipe.makes_base else ()))
    check = preflight.check_backbone
    found = [Step("backbone", "backbone", _train("backbone"), reads, needs, check=check, **SHARED)]
    if recipe.decider is not None:
        reads, needs = flat(whole["decider"], "decider"), ("label", "backbone")
        check = preflight.check_decider
        found.append(Step("decider", "decider", _train("decider"), reads, needs, check=check, **SHARED))
    return found


def _controls(recipe: Recipe, whole: dict[str, Any]) -> list[Step]:
    """Return the steps that train further models for the comparisons of the report."""
    backbone, found = flat(whole["backbone"], "backbone"), []
    if recipe.controls.equal_compute:
        needs = ("data", "base", "label", "backbone", *(("decider",) if recipe.decider is not None else ()))
        found.append(Step("standard_compute", "standard_compute", train_standard_compute, backbone, needs, **ALONE))
    if recipe.controls.blind:
        reads = backbone | flat(whole["model"], "model") | flat(whole["decider"], "decider")
        if recipe.uses_labels:
            reads["label.rule"] = whole["label"]["rule"]
        found.append(Step("blind", "blind", train_blind, reads, ("base", "label"), **ALONE))
    return found


# -- commands --------------------------------------------------------------------------------------------------------


def run(recipe: Recipe, directory: Path, progress: Reporter = SILENT) -> Path:
    """Make every step of a recipe (`tah run`).

    Args:
        recipe: Recipe to make.
        directory: Directory of the run.
        progress: Reporter of the steps.

    Returns:
        Directory of the trained model.

    Raises:
        ValueError: `Run.make` or a step found a mistake.
    """
    steps = _steps(recipe, directory, progress)
    steps.make(list(steps.steps))
    return steps.result("decider" if recipe.decider is not None else "backbone")


def label(recipe: Recipe, directory: Path, progress: Reporter = SILENT) -> Path:
    """Make the labelled data and the steps that it needs (`tah label`).

    Args:
        recipe: Recipe to make.
        directory: Directory of the run.
        progress: Reporter of the steps.

    Returns:
        Directory of the labelled data.

    Raises:
        ValueError: `Run.make` or a step found a mistake.
    """
    steps = _steps(recipe, directory, progress)
    steps.make(["label"])
    return steps.result("label")


def train(recipe: Recipe, directory: Path, stage: Stage, resume: bool, progress: Reporter = SILENT) -> Path:
    """Train one stage of a recipe (`tah train`).

    A missing pruned base or missing tokens are made first. Labels of a reference model must exist.

    Args:
        recipe: Recipe to make.
        directory: Directory of the run.
        stage: Stage to train.
        resume: Whether an unfinished training continues.
        progress: Reporter of the steps.

    Returns:
        Directory of the trained stage.

    Raises:
        ValueError: Labels or the stage before are missing, or an unfinished training does not match `resume` or the
            recipe.
    """
    steps = _steps(recipe, directory, progress)
    if stage == "decider" and recipe.decider is None:
        raise ValueError("the recipe has no decider section, so there is no stage decider")
    if steps.lead:
        if stage == "decider":
            _check_there(steps, "backbone", "train --stage backbone first")
        if recipe.uses_labels:
            _check_there(steps, "label", f"run `tah label` with this recipe and --output {directory}")
        _check_resume(steps, stage, resume)
    steps.make([stage])
    return steps.result(stage)


def _steps(recipe: Recipe, directory: Path, progress: Reporter) -> Run:
    """Return the chain of a recipe in a directory."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.accelerator.is_available():
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")  # otherwise every process trains alone, without a warning
    return Run(recipe, directory, chain(recipe), progress)


def _check_there(steps: Run, name: str, fix: str) -> None:
    """Raise ValueError unless the result of a step exists, is finished and matches the recipe."""
    result = steps.result(name)
    if not steps.begun(name):
        raise ValueError(f"{result} does not exist; {fix}")
    if why := steps.change(name):
        raise ValueError(f"{result} does not match the recipe: {why}; {fix}")
    if not steps.finished(name):
        fix = "train --stage backbone --resume first" if name == "backbone" else fix
        raise ValueError(f"{result} is not finished; {fix}")


def _check_resume(steps: Run, name: str, resume: bool) -> None:
    """Raise ValueError if an unfinished training of a stage does not match `resume` or the recipe."""
    result = steps.result(name)
    if not steps.begun(name) or steps.finished(name):
        return
    if resume and (why := steps.difference(name)):
        raise ValueError(
            f"{result} was trained differently: {why}; --resume needs the same recipe and data "
            "(without --resume, the stage is trained again from the start)"
        )
    if not resume and steps.change(name) is None and any(result.glob("checkpoints/checkpoint-*")):
        raise ValueError(f"{result} contains an unfinished training; add --resume, or choose another --output")


# -- steps -----------------------------------------------------------------------------------------------------------


def make_labels(recipe: Recipe, run: Path, progress: Reporter = SILENT) -> None:
    """Make `run/labels/train` and `run/labels/validation`: tokens, and scores if the method uses labels.

    Args:
        recipe: Recipe of the run.
        run: Directory of the run.
        progress: Reporter of the rows.

    Raises:
        ValueError: The data, the tokenizer or the reference model cannot be used.
    """
    tokenizer = load_tokenizer(find(recipe.tokenizer_path(run))[0])
    reference, sizes = None, {}
    named: str | None = None
    if recipe.label is not None:
        sizes = {name: getattr(recipe.label, name) for name in ("tokens_per_batch", "rows_per_shard")}
        if recipe.uses_labels:
            name = recipe.label.reference
            named = str(run / "reference") if name == "trained" else name
            path, kind = find(named)
            reference = (load_tah if kind == "tah" else load_base)(path).to(device_of_process())
    sizes["max_length"] = recipe.data.max_length
    for part, rows in zip(("train", "validation"), recipe.rows(run), strict=True):
        target = run / "labels" / part
        label_rows(rows, tokenizer, reference, target, reference_name=name_for_card(named), progress=progress, **sizes)
        wait_until((target / COMPLETE).is_file)  # other processes may still make shards


def _train(stage: Stage) -> Callable[[Recipe, Path, Reporter], object]:
    return lambda recipe, run, progress: train_stage(recipe, stage, run, resume=True, progress=progress)


def _tokenizer_contents(source: str | None) -> str | None:
    """Return what identifies a tokenizer: the contents of its files in a local directory, else `source`.

    Weights in the same directory do not count, because they do not change the tokens.
    """
    path = Path(source or "")
    if not source or not path.is_dir():
        return source
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    return " ".join(contents(str(path / name)) or "" for name in names if (path / name).is_file())
