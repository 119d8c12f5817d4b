"""Find and load the MODEL argument of the commands: a TaH checkpoint or a base model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from transformers import AutoTokenizer, PreTrainedModel
from transformers.utils import logging

from .checkpoints import adapter, safe
from .checkpoints import convert as original
from .checkpoints.card import CARD, MARK, is_ours, keep_results, model_card, trained_with
from .checkpoints.chat_template import check_template
from .checkpoints.contents import parameter_counts as parameter_counts
from .checkpoints.smollm2 import smollm2_base, smollm2_tah
from .checkpoints.untrusted import build_empty, check_counts, checked_config, empty_base
from .errors import first_line
from .files import write_atomically
from .model import TaHForCausalLM
from .names import DTYPES, MODELS, nearest, unknown

FOLLOW = Path(__file__).parent / "assets" / "follow-tah"
Kind = Literal["tah", "base"]


def find(source: str, weights: bool = True) -> tuple[str, Kind]:
    """Return the directory of a model and its kind.

    A model of the hub is downloaded first. An original checkpoint, local or on the hub, is converted into the cache
    once; the result is its directory there.

    Args:
        source: Path of a directory, a hub id, or one of `smollm2`, `smollm2-tah` and `follow-tah`.
        weights: Whether to download the weights, too. False is enough for the configuration and the tokenizer.

    Returns:
        The path of the directory, and `tah` for a TaH checkpoint or `base` for a base model.

    Raises:
        ValueError: The source does not exist or is not a model.
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


def load_tah(path: str, dtype: str = "auto", base: str | None = None) -> TaHForCausalLM:
    """Load the TaH checkpoint at `path`.

    Args:
        path: Path of the checkpoint.
        dtype: Dtype of the model.
        base: Directory or hub id of the base, if the checkpoint has none because the base is quantised.

    Raises:
        ValueError: The checkpoint is damaged or incomplete.
    """
    try:
        return TaHForCausalLM.from_pretrained(path, dtype=_known(dtype), **({} if base is None else {"base": base}))
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith(path) and "\n" not in str(error):
            raise  # the message is one line of this package and ends with advice
        raise ValueError(f"{path} cannot be loaded: {first_line(error)}") from error


def check_tah(path: str) -> None:
    """Check a TaH checkpoint without loading it. Missing tensors of the base are found at loading only.

    Raises:
        ValueError: The checkpoint is damaged or incomplete.
    """
    safe.check_checkpoint(path, TaHForCausalLM)


def load_base(path: str, dtype: str = "auto") -> PreTrainedModel:
    """Load the base model at `path`.

    Raises:
        ValueError: The model cannot be loaded, or tensors are missing.
    """
    return safe.load_plain(path, dtype=_known(dtype), trust_remote_code=False)


def outline(path: str) -> PreTrainedModel:
    """Build the model at `path` from its configuration on the meta device, without weights.

    Raises:
        ValueError: The configuration cannot be read, or describes no causal language model.
    """
    where = f"{path}/config.json"
    check_counts(checked_config(path), None, where)
    return build_empty(lambda: empty_base(path), None, where)


def load_tokenizer(path: str, source: str | None = None, readable: bool = True) -> Any:
    """Load the tokenizer at `path`.

    Args:
        path: Path of a model directory.
        source: Name of the model in messages; `path` by default.
        readable: Whether a chat template that jinja cannot parse is an error. Pass False if the template may never be
            rendered.

    Raises:
        ValueError: There is no usable tokenizer, or its chat template cannot be used.
    """
    name = path if source is None else source
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        tried = tokenizer("a", add_special_tokens=False)["input_ids"]  # settings of a wrong type raise only here
        tokenizer.decode(tried, skip_special_tokens=True)
    except Exception as error:
        raise ValueError(f"{name} has no usable tokenizer ({first_line(error)}); copy the base's into it") from error
    if not tried:  # transformers returns an empty tokenizer if the files are missing
        raise ValueError(f"{name} has no usable tokenizer (it is empty); copy the base's into it")
    check_template(tokenizer, name, readable)
    return tokenizer


def _known(dtype: str) -> str:
    if dtype not in DTYPES:
        raise ValueError(unknown("dtype", dtype, DTYPES))
    return dtype


def convert(src: str | Path, dst: str | Path, *, threshold: float | None = None) -> original.ConversionReport:
    """Convert an original checkpoint to a TaH checkpoint. After an error `dst` is not left behind.

    Args:
        src: Path or hub id of the original checkpoint.
        dst: Directory to create; it may exist if it is empty.
        threshold: Threshold that replaces the checkpoint's. The authors evaluate with 0.9, which their checkpoints do
            not contain.

    Raises:
        ValueError: The checkpoint is incomplete or damaged, requires code, or requires something that a TaH model does
            not support; or `dst` is not empty. The message is one line with the file and the entry.
    """
    return original.convert(src, dst, TaHForCausalLM, threshold)


def write_card(
    directory: str, results: Sequence[str | Path] = (), *, name: str | None = None, license: str | None = None
) -> Path:
    """Write the model card of a TaH checkpoint on this machine, and return its path.

    Args:
        directory: Directory of the checkpoint. If it is one of `tah train`, the card has the facts of the training.
        results: Directories of finished evaluations of the checkpoint (`tah eval -o`). Without one the results in an
            earlier card of the same weights stay.
        name: Id of the repository in which the checkpoint will be published.
        license: License, as an identifier of the Hub; by default that of the base, if it is known.

    Raises:
        ValueError: The directory has no TaH checkpoint, or a card that tah did not make, or an evaluation cannot be
            used.
    """
    path = Path(directory, CARD)
    if not os.path.isdir(directory) or find(directory) != (directory, "tah"):
        raise ValueError(f"{directory} is not the directory of a TaH checkpoint")
    if path.exists() and not is_ours(path):
        raise ValueError(f"{path} is not a card that tah made, so it stays; move it, or add this line to it: {MARK}")
    model = load_tah(directory)
    run, mapped = directory if trained_with(directory) else None, bool(getattr(model.config, "auto_map", None))
    made = model_card(model, results, name=name, license=license, run=run, auto_map=mapped)
    keep_results(made, path, path)
    write_atomically(path, str(made))
    return path


def load_adapter(base: PreTrainedModel, directory: str | Path) -> TaHForCausalLM:
    """Return a TaH model from a base and an adapter, in the base's dtype.

    Args:
        base: Base model that the adapter was trained with.
        directory: Directory that `tah.save_adapter` wrote.

    Raises:
        ValueError: A file is missing or damaged, or the adapter belongs to a base of another shape or other weights.
    """
    return adapter.load_adapter(TaHForCausalLM, base, directory)


def quiet() -> None:
    """Switch off the progress bars and warnings of transformers."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
