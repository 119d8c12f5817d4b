"""A base without its least useful layers: as a step of a recipe, and for `tah prune`. `prune.py` does the work."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from transformers import PreTrainedModel

from ..core.inputs import check_ids
from ..data.rows import load_rows, tokenize_row
from ..device import put
from ..load import find, load_base, load_tokenizer
from ..progress import EVERY, Reporter
from ..training.prune import PruneReport, Text, check_output, prune
from ..training.recipe import Recipe
from .preflight import plain_base
from .sources import default_device, release, rows_of

if TYPE_CHECKING:
    from datasets import Dataset

PRUNE_LENGTH = 2048  # tokens of a text that decides which layers are dropped


def prune_base(recipe: Recipe, run: Path) -> None:
    """`run/base`: the recipe's base without its least useful layers."""
    tokenizer = load_tokenizer(find(recipe.tokenizer_path(run))[0])
    _, held_out = rows_of(recipe, run)
    dtype = recipe.base.dtype  # a recipe's word, so the base computes in it wherever it is
    base = load_base(plain_base(str(recipe.base.model)), dtype).to(default_device())
    count, length = recipe.base.prune_texts, min(recipe.data.max_length, PRUNE_LENGTH, _positions(base))
    texts = _draw_texts(held_out, tokenizer, count, length, recipe.seed)
    with _bar("pruning") as report:
        prune(base, tokenizer, texts, recipe.base.prune_layers, run / "base", fewest=count, report=report)
    del base
    release()


def prune_model(
    source: str,
    data: str,
    split: str,
    layers: int,
    output: Path,
    texts: int,
    max_length: int,
    dtype: str = "auto",
    device: str = "auto",
    note: Callable[[str], None] = lambda line: None,
) -> PruneReport:
    """`tah prune`: a base without its least useful layers, in a directory of its own.

    Args:
        source: the base: directory, hub id, or `smollm2`.
        data: held-out texts.
        split: of them.
        layers: how many to drop.
        output: directory to make.
        texts: how many texts decide.
        max_length: longer texts are cut to so many tokens.
        dtype: to compute and save in. With `auto` it is saved as the base is, and computed in that where the device
            does so natively, else in float32.
        device: `auto` is CUDA, then MPS, then the CPU.
        note: is told where `auto` became float32.

    Raises:
        ValueError: the base, the data, the directory or the device cannot be used.
    """
    check_output(output)
    rows = load_rows(data, split)
    tokenizer = load_tokenizer(find(source)[0])
    base = load_base(plain_base(source), dtype)
    saved = base.dtype
    (progress := Reporter()).note = note  # type: ignore[method-assign, assignment]
    put(base, source, dtype=dtype, device=device, progress=progress)
    drawn = _draw_texts(rows, tokenizer, texts, min(max_length, _positions(base)))
    check_ids((max(text.tokens) for text in drawn), base, data, f"{source} comes with another model's tokenizer")
    with _bar("pruning") as report:
        return prune(base, tokenizer, drawn, layers, output, fewest=texts, report=report, dtype=saved)


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
