"""What a recipe and this machine give a step to work with: texts, a device, memory."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..data.rows import load_rows
from ..training.recipe import Recipe

if TYPE_CHECKING:
    from datasets import Dataset


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


def default_device() -> torch.device:
    """Where this process computes."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def release() -> None:
    """Give a model's memory back before the next step takes its own."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
