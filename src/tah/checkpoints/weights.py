"""Checkpoints that are either whole or not there: strict loading, atomic saving."""

from __future__ import annotations

import copy
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..config import FORMER_TENSORS, KERNELS
from .hub import OPTIONS, advice, local
from .untrusted import SLACK, check_model, empty_base

PLACES = {"subfolder", "revision", *OPTIONS}  # of a repository
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")


class SafeCheckpoint:
    """Mixin of `PreTrainedModel` that refuses incomplete checkpoints and never leaves one behind."""

    @classmethod
    def from_pretrained(cls, source: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a TaH checkpoint (transformers' `from_pretrained`, strict), or one of the authors, which is converted
        into the cache first.

        Raises:
            ValueError: weights are no safetensors, a tensor is missing, unexpected or of another shape, or a file is
                damaged.
        """
        named = source
        if isinstance(source, (str, os.PathLike)):  # else its tensors are given
            source, kwargs = checked(source, kwargs, cls)
        again = advice(source)
        wants_info = kwargs.pop("output_loading_info", False)
        ignore_mismatch = kwargs.pop("ignore_mismatched_sizes", False)
        kwargs |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # refused below, by name
        former = {f"^{old}\\.": f"{new}." for old, new in FORMER_TENSORS.items()}
        kwargs["key_mapping"] = former | (kwargs.get("key_mapping") or {})
        try:
            model, info = super().from_pretrained(source, *args, **kwargs)  # type: ignore[misc]
        except SafetensorError as error:
            again = again or "; copy them again"
            raise ValueError(f"{source}: the weights are damaged or cut short ({error}){again}") from error
        if source != str(named):
            model.name_or_path = model.config.name_or_path = str(named)
        problems = {"missing": info["missing_keys"], "unexpected": info["unexpected_keys"]}
        if not ignore_mismatch:
            problems["wrongly shaped"] = misshapen(info)
        for what, keys in problems.items():
            if keys:
                shown = ", ".join(sorted(keys)[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")
                raise ValueError(f"{source}: not a complete TaH checkpoint: {what} tensors {shown}{again}")
        return (model, info) if wants_info else model

    def save_pretrained(self, save_directory: Any, *args: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save configuration and weights (safetensors only); an older checkpoint survives until the new one is whole.

        Everything is written to a directory inside the target first and moved into place file by file afterwards.
        """
        target = Path(save_directory)
        if not kwargs.get("is_main_process", True):
            return super().save_pretrained(target, *args, **kwargs)  # type: ignore[misc]
        fresh = not target.exists()
        target.mkdir(parents=True, exist_ok=True)
        try:
            # Inside the target, since that may be a file system of its own; moving is then a rename.
            with tempfile.TemporaryDirectory(prefix=".saving-", dir=target) as temporary:
                super().save_pretrained(temporary, *args, **kwargs)  # type: ignore[misc]
                replace_files(Path(temporary), target)
        except BaseException:
            if fresh and not any(target.iterdir()):
                target.rmdir()
            raise
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", target.name), **kwargs)  # type: ignore[attr-defined]


def checked(source: str | os.PathLike[str], options: dict[str, Any], kind: Any = None) -> tuple[str, dict[str, Any]]:
    """The directory of a model, once all but single tensors is known to be in order, and how to load it from there.

    Args:
        source: a directory, or a hub id, which is downloaded.
        options: of `from_pretrained`.
        kind: the model's class; a base's is found in its configuration.

    Raises:
        ValueError: it is not there, or cannot be loaded.
    """
    if options.get("gguf_file"):  # data too, and asked for by name; read by transformers alone
        return os.fspath(source), options
    directory, given = local(source, options), options.get("config")

    def empty() -> Any:
        if kind is None:
            return empty_base(directory, bool(options.get("trust_remote_code")))
        chosen = {name: options[name] for name in KERNELS if options.get(name) is not None}
        own = isinstance(given, PreTrainedConfig)
        config: Any = copy.deepcopy(given) if own else kind.config_class.from_pretrained(directory, **chosen)
        config._attn_implementation = "eager"  # kernels change no shapes, and may be missing
        return kind(config)

    named_later = kind is not None or options.get("ignore_mismatched_sizes")  # single tensors that do not fit
    try:
        check_model(directory, empty, options, slack=SLACK if named_later else 0)
    except ValueError as error:
        again = advice(directory)
        raise ValueError(f"{str(error).removesuffix('; copy them again')}{again}" if again else str(error)) from error
    left = {name: value for name, value in options.items() if name not in PLACES}
    return str(directory), left | {"use_safetensors": True}


def load_plain(source: str | os.PathLike[str], **options: Any) -> PreTrainedModel:
    """A base, complete.

    Args:
        source: a directory or a hub id.
        options: of `from_pretrained`.

    Raises:
        ValueError: it is not there, cannot be loaded, or tensors are missing or of another shape.
    """
    directory, options = checked(source, options)
    accepted = options.pop("ignore_mismatched_sizes", False)  # transformers would only refer to a table in the log
    reading = options | {"output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(directory, **reading)
    except Exception as error:
        line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"{source} cannot be loaded: {line[:300]}") from error
    if missing := sorted(info["missing_keys"]):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(f"{source}: the weights lack {', '.join(missing[:3])}{more}; copy or download them again")
    if (wrong := misshapen(info)) and not accepted:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"{source}: the weights do not fit config.json: {', '.join(wrong[:3])}{more}")
    if directory != str(source):
        model.name_or_path = model.config.name_or_path = str(source)
    return model


def misshapen(info: dict[str, Any]) -> list[str]:
    """Tensors that transformers left out for their shapes, with both.

    Args:
        info: what it says about loading, `output_loading_info`.
    """
    return [f"{name} is {list(is_)}, not {list(wanted)}" for name, is_, wanted in sorted(info["mismatched_keys"])]


def replace_files(source: Path, target: Path) -> None:
    """Move the files of a finished checkpoint over an older one, and drop the older one's weights."""
    target.mkdir(parents=True, exist_ok=True)
    new = {path.name for path in source.iterdir()}
    for path in sorted(source.iterdir(), key=lambda path: path.name == "config.json"):
        if path.is_dir():
            shutil.rmtree(target / path.name, ignore_errors=True)
        os.replace(path, target / path.name)
    if any(WEIGHTS.fullmatch(name) for name in new):
        for old in target.iterdir():
            if WEIGHTS.fullmatch(old.name) and old.name not in new:
                old.unlink()
