"""Checks that find mistakes in a recipe before any step begins.

Each check raises ValueError with a message of one line. Only configurations, tokenizers and a few rows are read. Models
are built without weights, on the meta device.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from ..config import TaHConfig
from ..data.rows import tokenize_row
from ..data.scoring import check_positions, check_reference
from ..load import find, load_tokenizer, outline
from ..model import TaHForCausalLM
from ..training.prune import check_layers, check_texts, drop_layer
from ..training.recipe import Recipe
from ..training.run_files import read_facts
from ..training.train import check_fields, fields_of
from ..training.trainer import CHECKPOINTS, last_checkpoint


def check_pruning(recipe: Recipe, run: Path) -> None:
    """Raise ValueError if the base has too few layers to prune, or if there are too few held-out texts."""
    base = outline(plain_base(str(recipe.base.model)))
    check_layers(base, recipe.base.prune_layers)
    if recipe.data.generate is None:
        check_texts(len(recipe.rows(run)[1]), recipe.base.prune_texts)


def check_labelling(recipe: Recipe, run: Path) -> None:
    """Raise ValueError if no row can be used for training, or if the reference model has another tokenizer."""
    if recipe.base.scratch is not None:
        _look_for_reference(recipe)  # tokenizer and texts do not exist yet
        return
    tokenizer = load_tokenizer(find(recipe.tokenizer_path(run), weights=False)[0])
    if recipe.data.generate is None:
        for rows in recipe.rows(run):
            _check_rows(rows, tokenizer, recipe.data.max_length)
    reference = _look_for_reference(recipe)
    if reference is not None:
        check_reference(reference, tokenizer, None, recipe.data.max_length)


def _look_for_reference(recipe: Recipe) -> PreTrainedModel | None:
    """Return the reference model without its weights, or None if the recipe names none."""
    if not recipe.uses_labels or recipe.label is None or recipe.label.reference == "trained":
        return None
    try:
        path, _ = find(recipe.label.reference, weights=False)
        reference = outline(path)
        check_positions(reference, recipe.data.max_length)
    except ValueError as error:
        raise ValueError(f"label.reference={recipe.label.reference}: {error}") from error
    return reference


def check_backbone(recipe: Recipe, run: Path) -> None:
    """Raise ValueError if stage `backbone` cannot begin.

    The family of the base must be supported, the `model` section must be valid for it, and an unfinished training must
    have its `run.json`.
    """
    _check_left(run / "backbone")
    if recipe.base.scratch is not None:
        layers = recipe.base.scratch["num_hidden_layers"]
        TaHConfig(base_config={"model_type": "llama", "num_hidden_layers": layers}, **fields_of(recipe))
        return
    source = str(recipe.backbone.init or recipe.base.model)
    path, kind = find(source, weights=False)
    if kind == "tah":
        config = TaHConfig.from_pretrained(path)
        check_fields(recipe, config, source)
        if recipe.decider is not None and config.decider is None:
            raise ValueError(f"{source} has no decider to train; set decider=null, or start from a base")
        return
    base = outline(path)
    for _ in range(recipe.base.prune_layers):
        drop_layer(base, 0)
    with torch.device("meta"):
        TaHForCausalLM(TaHConfig(base_config=base.config.to_dict(), **fields_of(recipe)))


def check_decider(recipe: Recipe, run: Path) -> None:
    """Raise ValueError if an unfinished training of stage `decider` has no `run.json`."""
    _check_left(run / "decider")


def _check_left(directory: Path) -> None:
    """Raise ValueError if a stage has checkpoints but no readable `run.json`."""
    if last_checkpoint(directory / CHECKPOINTS) is not None:
        read_facts(directory)


def plain_base(source: str) -> str:
    """Return the directory of a base.

    Args:
        source: Directory, Hub id, or name of a bundled model.

    Raises:
        ValueError: The model is a TaH checkpoint, or does not exist.
    """
    path, kind = find(source, weights=False)
    if kind != "base":
        raise ValueError(f"{source} is a TaH checkpoint, not a base model, so it cannot be pruned")
    return path


def _check_rows(rows: Any, tokenizer: Any, max_length: int) -> None:
    """Raise ValueError if no row can be used for training. Reading stops at the first usable row."""
    dropped = Counter[str]()
    for row in rows.with_format(None):
        if tokenize_row(row, tokenizer, max_length, dropped=dropped) is not None:
            return
    why = ", ".join(f"{reason} ({count})" for reason, count in dropped.items())
    raise ValueError(f"nothing to train on in {len(rows)} rows: {why}")
