"""What the steps of a recipe are: data, base, reference, labels, both stages of training, report.

`run.py` decides which of them have to be made; the work itself is done in the module of each.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from transformers import PreTrainedModel

from .data import COMPLETE, load_rows, tokenize_row
from .label import label as label_rows
from .load import find, first_line, load_base, load_tah, load_tokenizer
from .progress import EVERY
from .prune import PruneReport, Text, check_output, prune
from .recipe import Recipe
from .run import POLL, Run, Step, contents, flat
from .trainer import Stage

if TYPE_CHECKING:
    from datasets import Dataset

PRUNE_LENGTH = 2048  # tokens of a text that decides which layers are dropped


def chain(recipe: Recipe) -> list[Step]:
    """The steps of a recipe, each after those it needs."""
    whole = recipe.resolved()
    own_data, own_base = recipe.data.generate is not None, recipe.base.scratch is not None
    own_reference = recipe.label is not None and recipe.label.reference == "trained"
    data = flat(whole["data"], "data")
    if not own_data:
        data |= {f"data.{name}": contents(whole["data"][name]) for name in ("source", "validation")}
    base = flat(whole["base"], "base") | {"base.model": contents(recipe.base.model)}
    found = []
    if own_data or own_base:
        from .tiny import check_sections

        check_sections(recipe)  # before anything made earlier is moved aside
    if own_data:
        from .tiny import write_data

        generate = flat(whole["data"]["generate"], "data.generate")
        found.append(Step("data", "data", lambda recipe, run: write_data(recipe, run / "data"), generate))
    texts = ("data",) if own_data else ()
    if own_base:
        from .tiny import train_base

        base |= {"data.max_length": recipe.data.max_length, "backbone.packed": recipe.backbone.packed}
        found.append(Step("base", "base", _by_one_process(train_base), base, texts))
    elif recipe.makes_base:
        found.append(Step("base", "base", prune_base, base | data, texts))
    if own_reference:
        from .tiny import train_reference

        reads = flat(whole["backbone"]["training"], "backbone.training")
        found.append(Step("reference", "reference", _by_one_process(train_reference), reads, (*texts, "base")))
    tokenizer = {"tokenizer": _tokenizer_contents(recipe.base.tokenizer or recipe.base.model)}
    judge = recipe.label.reference if recipe.uses_labels and recipe.label is not None else None
    needs = (*texts, *(("base",) if own_base else ()), *(("reference",) if own_reference and judge else ()))
    reads = data | tokenizer | {"label.reference": contents(judge)}
    found.append(Step("label", "labels", make_labels, reads, needs, together=True, resumes=True))
    found += _stages(recipe, whole, base)
    if own_data:
        from .report import write_report

        needs = tuple(step.name for step in found if step.name != "base")
        found.append(Step("report", "report", _by_one_process(write_report), {}, needs))
    return found


def _stages(recipe: Recipe, whole: dict[str, Any], base: dict[str, Any]) -> list[Step]:
    reads = flat(whole["model"], "model") | flat(whole["backbone"], "backbone")
    reads |= {"backbone.init": contents(recipe.backbone.init), "data.max_length": recipe.data.max_length}
    if recipe.uses_labels and recipe.label is not None:
        reads["label.rule"] = recipe.label.rule
    if recipe.decider is not None and recipe.decider.joint:
        reads |= {"decider.joint": True, "decider.gain": recipe.decider.gain}
    if not recipe.makes_base:
        reads |= {name: base[name] for name in ("base.model", "base.dtype")}
    needs = ("label", *(("base",) if recipe.makes_base else ()))
    found = [Step("backbone", "backbone", _train("backbone"), reads, needs, together=True, resumes=True)]
    if recipe.decider is not None:
        reads, needs = flat(whole["decider"], "decider"), ("label", "backbone")
        found.append(Step("decider", "decider", _train("decider"), reads, needs, together=True, resumes=True))
    return found


# -- commands --------------------------------------------------------------------------------------------------------


def run(recipe: Recipe, directory: Path, note: Callable[[str], None]) -> Path:
    """`tah run`: every step; the directory of the last one that is a model."""
    steps = _steps(recipe, directory, note)
    steps.make(list(steps.steps))
    return steps.result("decider" if recipe.decider is not None else "backbone")


def label(recipe: Recipe, directory: Path, note: Callable[[str], None]) -> Path:
    """`tah label`: the labelled data, and what that needs."""
    steps = _steps(recipe, directory, note)
    steps.make(["label"])
    return steps.result("label")


def train(recipe: Recipe, directory: Path, stage: Stage, resume: bool, note: Callable[[str], None]) -> Path:
    """`tah train`: a stage; what is quick and missing is made first, a pruned base or tokens.

    Args:
        resume: go on with an unfinished training, if there is one.

    Raises:
        ValueError: labels or the stage before are not there, or `resume` does not go with what is.
    """
    steps = _steps(recipe, directory, note)
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


def _steps(recipe: Recipe, directory: Path, note: Callable[[str], None]) -> Run:
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not torch.accelerator.is_available():
        os.environ.setdefault("ACCELERATE_USE_CPU", "true")  # else every process trains alone, without a word
    return Run(recipe, directory, chain(recipe), note)


def _check_there(steps: Run, name: str, fix: str) -> None:
    state, result = steps.state(name), steps.result(name)
    if state == "changed":
        raise ValueError(f"{result} was made for something else: {steps.difference(name)}; {fix}")
    if state != "finished":
        if state == "unfinished" and name == "backbone":
            fix = "train --stage backbone --resume first"
        raise ValueError(f"{result} is {'not there' if state == 'missing' else 'not finished'}; {fix}")


def _check_resume(steps: Run, name: str, resume: bool) -> None:
    state, result = steps.state(name), steps.result(name)
    if state == "changed" and resume:
        raise ValueError(
            f"{result} was trained differently: {steps.difference(name)}; --resume needs the same recipe and data "
            "(without it, the stage is trained anew)"
        )
    if state == "unfinished" and not resume and any(result.glob("checkpoints/checkpoint-*")):
        raise ValueError(f"{result} holds an unfinished training: --resume goes on with it; or choose another --output")


# -- steps -----------------------------------------------------------------------------------------------------------


def rows_of(recipe: Recipe, run: Path) -> tuple[Dataset, Dataset]:
    """The texts to train on, and those held out.

    Raises:
        ValueError: the data cannot be read, or there are too few rows to hold any out.
    """
    data = recipe.data
    if data.generate is not None:
        return load_rows(str(run / "data" / "train.jsonl")), load_rows(str(run / "data" / "validation.jsonl"))
    rows = load_rows(data.source, data.split, data.columns, data.limit)
    if data.validation is not None or data.validation_split is not None:
        split = data.validation_split or data.split
        return rows, load_rows(data.validation or data.source, split, data.columns)
    count = max(1, round(data.validation_share * len(rows)))
    if len(rows) < 2:
        raise ValueError(f"{data.source} has one row, so none can be held out; give data.validation")
    held_out = np.zeros(len(rows), bool)
    held_out[np.random.default_rng(recipe.seed).permutation(len(rows))[:count]] = True
    return rows.select(np.flatnonzero(~held_out)), rows.select(np.flatnonzero(held_out))


def prune_base(recipe: Recipe, run: Path) -> None:
    """`run/base`: the recipe's base without its least useful layers."""
    tokenizer = load_tokenizer(find(recipe.tokenizer_path(run))[0])
    _, held_out = rows_of(recipe, run)
    base = _plain_base(str(recipe.base.model), recipe.base.dtype, _device())
    count, length = recipe.base.prune_texts, min(recipe.data.max_length, PRUNE_LENGTH, _positions(base))
    texts = _draw_texts(held_out, tokenizer, count, length, recipe.seed)
    with _bar("pruning") as report:
        prune(base, tokenizer, texts, recipe.base.prune_layers, run / "base", fewest=count, report=report)
    del base
    _release()


def prune_model(
    source: str,
    data: str,
    split: str,
    layers: int,
    output: Path,
    texts: int,
    max_length: int,
    dtype: str,
    device: str | None,
) -> PruneReport:
    """`tah prune`: a base without its least useful layers, in a directory of its own."""
    check_output(output)
    rows = load_rows(data, split)
    tokenizer = load_tokenizer(find(source)[0])
    base = _plain_base(source, dtype, device or _device())
    drawn = _draw_texts(rows, tokenizer, texts, min(max_length, _positions(base)))
    with _bar("pruning") as report:
        return prune(base, tokenizer, drawn, layers, output, fewest=texts, report=report)


def _draw_texts(rows: Dataset, tokenizer: Any, count: int, max_length: int, seed: int = 0) -> list[Text]:
    """`count` texts drawn from the rows, or as many as there are; longer ones are cut."""
    texts = []
    for at in np.random.default_rng(seed).permutation(len(rows)):
        row = tokenize_row(rows[int(at)], tokenizer, max_length, too_long="cut")
        if row is not None:
            texts.append(Text(row["input_ids"], row["supervised"]))
        if len(texts) == count:
            break
    return texts


def _plain_base(source: str, dtype: str, device: torch.device | str) -> PreTrainedModel:
    path, kind = find(source)
    if kind != "base":
        raise ValueError(f"{source} is not a base model but one that iterates, so it cannot be pruned")
    base = load_base(path, dtype)
    try:
        return base.to(device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used: {first_line(error)}") from error


def _by_one_process(make: Callable[[Recipe, Path], None]) -> Callable[[Recipe, Path], None]:
    """A step that trains, made by the first process alone, would wait forever for the others to join it."""

    def checked(recipe: Recipe, run: Path) -> None:
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            raise ValueError("this step is done by one process: start the command once without torchrun")
        make(recipe, run)

    return checked


def _positions(base: PreTrainedModel) -> int:
    """Most tokens it can read."""
    return getattr(base.config.get_text_config(decoder=True), "max_position_embeddings", None) or 2**31


@contextmanager
def _bar(title: str) -> Iterator[Callable[[float], None]]:
    """A bar on a terminal, a line now and then elsewhere; what it gives is told the share of the work that is done."""
    console, told = Console(stderr=True), time.monotonic()
    columns = (TextColumn(title), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Bar(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task(title, total=1.0)

        def report(share: float) -> None:
            nonlocal told
            bar.update(task, completed=share)
            if not console.is_terminal and time.monotonic() - told > EVERY:
                told = time.monotonic()
                console.print(f"{title}: {share:.0%}", highlight=False)

        yield report


def make_labels(recipe: Recipe, run: Path) -> None:
    """`run/labels/train` and `run/labels/validation`: tokens, and what the reference makes of them where it is used."""
    tokenizer = load_tokenizer(find(recipe.tokenizer_path(run))[0])
    parts = dict(zip(("train", "validation"), rows_of(recipe, run), strict=True))
    reference, sizes = None, {}
    if recipe.label is not None:
        sizes = {name: getattr(recipe.label, name) for name in ("tokens_per_batch", "rows_per_shard")}
    if recipe.label is not None and recipe.uses_labels:
        name = recipe.label.reference
        path, kind = find(str(run / "reference") if name == "trained" else name)
        reference = (load_tah if kind == "tah" else load_base)(path).to(_device())
    for name, rows in parts.items():
        target = run / "labels" / name
        label_rows(
            rows,
            tokenizer,
            reference,
            target,
            max_length=recipe.data.max_length,
            report=Console(stderr=True),
            **sizes,
        )
        while not (target / COMPLETE).is_file():  # other processes have shards to finish
            time.sleep(POLL)
    del reference
    _release()


def _train(stage: Stage) -> Callable[[Recipe, Path], object]:
    def make(recipe: Recipe, run: Path) -> None:
        from .train import train

        train(recipe, stage, run, resume=True)
        _release()

    return make


def _tokenizer_contents(source: str | None) -> str | None:
    """Of a tokenizer in a local directory: other weights beside it make no other tokens."""
    path = Path(source or "")
    if not source or not path.is_dir():
        return source
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    return " ".join(contents(str(path / name)) or "" for name in names if (path / name).is_file())


def _device() -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def _release() -> None:
    """Give a model's memory back before the next step takes its own."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
