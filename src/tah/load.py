"""Find and load the MODEL argument of the commands: a TaH checkpoint or a base model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from .checkpoints import adapter, safe
from .checkpoints import convert as original
from .checkpoints.chat_template import check_template
from .checkpoints.smollm2 import smollm2_base, smollm2_tah
from .checkpoints.untrusted import build_empty, check_counts, checked_config, empty_base
from .errors import first_line
from .model import TaHForCausalLM
from .names import DTYPES, MODELS, nearest, unknown

FOLLOW = Path(__file__).parent / "assets" / "follow-tah"
Kind = Literal["tah", "base"]


def find(source: str, weights: bool = True) -> tuple[str, Kind]:
    """The directory of a model, and what it is: a TaH checkpoint, or a base.

    A model of the hub is downloaded. A checkpoint in the authors' layout, here or on the hub, is converted into the
    cache once, and found there.

    Args:
        source: a directory, a hub id, or a word: `smollm2`, `smollm2-tah`, `follow-tah`.
        weights: also download them; False where the configuration and the tokenizer will do.

    Raises:
        ValueError: there is no such thing, or it is not a model.
    """
    if not source.strip():
        raise ValueError(f"MODEL is empty; give a directory, a hub id, {', '.join(MODELS[:-1])}, or {MODELS[-1]}")
    if source in MODELS and not os.path.isdir(source):
        match source:
            case "smollm2":
                return str(smollm2_base()), "base"
            case "smollm2-tah":
                return str(smollm2_tah(TaHForCausalLM)), "tah"
        return str(FOLLOW), "tah"
    if os.path.exists(source) and not os.path.isdir(source):
        raise ValueError(f"{source} is a file; give the directory of a model")
    try:
        directory = safe.find(source, {}, TaHForCausalLM, weights)
    except ValueError as error:
        if (near := nearest(source, MODELS)) is None or not str(error).startswith("no model "):
            raise
        raise ValueError(f"{error}; did you mean {near}?") from error
    described = checked_config(directory)
    if "model_type" not in described:
        raise ValueError(f"{directory}/config.json is damaged: it has no model_type")
    return directory, "tah" if described["model_type"] == "tah" else "base"


def load_tah(path: str, dtype: str = "auto") -> TaHForCausalLM:
    """The TaH checkpoint at `path`.

    Raises:
        ValueError: it is damaged or incomplete.
    """
    try:
        return TaHForCausalLM.from_pretrained(path, dtype=_known(dtype))
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith(path) and "\n" not in str(error):
            raise  # a line of ours, which ends in what to do
        raise ValueError(f"{path} cannot be loaded: {first_line(error)}") from error


def check_tah(path: str) -> None:
    """Raise `ValueError` unless the TaH checkpoint at `path` is in order but for single tensors; loads nothing."""
    safe.check_checkpoint(path, TaHForCausalLM)


def load_base(path: str, dtype: str = "auto") -> PreTrainedModel:
    """The base model at `path`, complete.

    Raises:
        ValueError: it cannot be loaded, or tensors are missing.
    """
    return safe.load_plain(path, dtype=_known(dtype), trust_remote_code=False)


def outline(path: str) -> PreTrainedModel:
    """The model at `path` without its weights, built from its configuration on the meta device.

    Raises:
        ValueError: the configuration cannot be read, or is not of a causal language model.
    """
    where = f"{path}/config.json"
    check_counts(checked_config(path), None, where)
    return build_empty(lambda: empty_base(path), None, where)


def load_tokenizer(path: str, source: str | None = None, readable: bool = True) -> Any:
    """The tokenizer at `path`.

    Args:
        path: the directory of its model.
        source: what the user calls it, for messages.
        readable: also refuse a chat template that jinja cannot read; False where it may never be rendered.

    Raises:
        ValueError: there is none, or its chat template cannot be used.
    """
    name = path if source is None else source
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        tried = tokenizer("a", add_special_tokens=False)["input_ids"]  # settings of a wrong kind show only here
        tokenizer.decode(tried, skip_special_tokens=True)
    except Exception as error:
        raise ValueError(f"{name} has no usable tokenizer ({first_line(error)}); copy the base's into it") from error
    if not tried:  # transformers makes up an empty one
        raise ValueError(f"{name} has no usable tokenizer (it is empty); copy the base's into it")
    check_template(tokenizer, name, readable)
    return tokenizer


def _known(dtype: str) -> str:
    if dtype not in DTYPES:
        raise ValueError(unknown("dtype", dtype, DTYPES))
    return dtype


def parameter_counts(model: TaHForCausalLM) -> dict[str, int]:
    """How many parameters each part has."""
    sizes = {"base": 0, "adapter": 0, "decider": 0, "linear_maps": 0}
    for name, parameter in model.named_parameters():
        part = "decider" if name.startswith("decider.") else "adapter" if "lora_" in name else "base"
        sizes["linear_maps" if name.startswith(("next_input_map.", "output_map.")) else part] += parameter.numel()
    return sizes


def convert(src: str | Path, dst: str | Path, *, threshold: float | None = None) -> original.ConversionReport:
    """Convert the checkpoint of the original implementation in `src` to a TaH checkpoint in `dst`, or leave nothing.

    Args:
        src: its directory, or its id on the hub.
        dst: directory to make; it may exist if it is empty.
        threshold: in the place of the checkpoint's. The authors evaluate with 0.9, which their checkpoints lack.

    Raises:
        ValueError: the checkpoint is incomplete, damaged, asks for code, or asks for what a TaH model cannot do;
            or `dst` is not empty. One line with the file and the entry.
    """
    return original.convert(src, dst, TaHForCausalLM, threshold)


def load_adapter(base: PreTrainedModel, directory: str | Path) -> TaHForCausalLM:
    """`base` and the adapter that `tah.save_adapter` wrote into `directory` as one model, in the base's dtype.

    Raises:
        ValueError: a file is missing or damaged, or the adapter belongs to a base of another shape or other weights.
    """
    return adapter.load_adapter(TaHForCausalLM, base, directory)


def quiet() -> None:
    """Leave the terminal to us: no progress bars and no advice from transformers."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
