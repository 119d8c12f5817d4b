"""Prune a base, as a step of a recipe and for `tah prune`. `training/prune.py` has the method."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from transformers import PreTrainedModel

from ..core.inputs import check_ids
from ..data.rows import load_rows, tokenize_row
from ..device import put
from ..load import find, load_base, load_tokenizer
from ..progress import SILENT, Reporter
from ..training.prune import PruneReport, Text, check_output, prune
from ..training.recipe import Recipe
from .preflight import plain_base
from .run import device_of_process

if TYPE_CHECKING:
    from datasets import Dataset

PRUNE_LENGTH = 2048  # largest number of tokens of a held-out text


def prune_base(recipe: Recipe, run: Path, progress: Reporter = SILENT) -> None:
    """Make `run/base`: the recipe's base without its least useful layers.

    Args:
        recipe: Recipe of the run.
        run: Directory of the run.
        progress: Reporter of the texts.

    Raises:
        ValueError: The base cannot be pruned, or there are too few held-out texts.
    """
    tokenizer = load_tokenizer(find(recipe.tokenizer_path(run))[0])
    _, held_out = recipe.rows(run)
    dtype = recipe.base.dtype  # the recipe's dtype, so that every machine drops the same layers
    base = load_base(plain_base(str(recipe.base.model)), dtype).to(device_of_process())
    count, length = recipe.base.prune_texts, min(recipe.data.max_length, PRUNE_LENGTH, _positions(base))
    texts = _draw_texts(held_out, tokenizer, count, length, recipe.seed)
    prune(base, tokenizer, texts, recipe.base.prune_layers, run / "base", fewest=count, progress=progress)


@dataclass(frozen=True)
class Pruning:
    """The arguments of `tah prune`.

    Args:
        source: Directory or Hub id of the base, or `smollm2`.
        data: Held-out texts, as `load_rows` reads them.
        output: Directory to create.
        split: Split of the texts.
        layers: Number of layers to drop.
        texts: Number of held-out texts.
        max_length: Number of tokens to which longer texts are cut.
        dtype: Data type to compute and save in. With `auto` the checkpoint has that of the base. The computation uses
            the same if the device has native support for it, else float32.
        device: Device to compute on. `auto` is CUDA, then MPS, then the CPU.
    """

    source: str
    data: str
    output: Path
    split: str = "train"
    layers: int = 1
    texts: int = 64
    max_length: int = PRUNE_LENGTH
    dtype: str = "auto"
    device: str = "auto"


def prune_model(asked: Pruning, progress: Reporter = SILENT) -> PruneReport:
    """Write a base without its least useful layers (`tah prune`).

    Args:
        asked: Arguments of the command.
        progress: Reporter of the texts.

    Returns:
        The dropped layers and the perplexities.

    Raises:
        ValueError: The base, the data, the directory or the device cannot be used.
    """
    check_output(asked.output)
    rows = load_rows(asked.data, asked.split)
    source = asked.source
    tokenizer = load_tokenizer(find(source)[0])
    base = load_base(plain_base(source), asked.dtype)
    saved = base.dtype
    put(base, source, dtype=asked.dtype, device=asked.device, progress=progress)
    drawn = _draw_texts(rows, tokenizer, asked.texts, min(asked.max_length, _positions(base)))
    check_ids((max(text.tokens) for text in drawn), base, asked.data, f"{source} comes with another model's tokenizer")
    return prune(base, tokenizer, drawn, asked.layers, asked.output, fewest=asked.texts, progress=progress, dtype=saved)


def _draw_texts(rows: Dataset, tokenizer: Any, count: int, max_length: int, seed: int = 0) -> list[Text]:
    """Return `count` random texts, or all texts if there are fewer. Texts are cut to `max_length` tokens."""
    texts = []
    for at in np.random.default_rng(seed).permutation(len(rows)):
        row = tokenize_row(rows[int(at)], tokenizer, max_length, too_long="cut")
        if row is not None:
            texts.append(Text(row["input_ids"], row["supervised"]))
        if len(texts) == count:
            break
    return texts


def _positions(base: PreTrainedModel) -> int:
    """Return the largest number of tokens that the base can read."""
    return getattr(base.config.get_text_config(decoder=True), "max_position_embeddings", None) or 2**31
