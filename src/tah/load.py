"""Find and load the MODEL argument of the commands, and describe it: a TaH checkpoint or a base model."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any, Literal

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging

from .families import UnsupportedBase, check_base
from .model import TaHForCausalLM

FOLLOW = Path(__file__).parent / "assets" / "follow-tah"
ORIGINAL = "tah_config.json"  # only checkpoints of the original implementation have this file
DTYPES = ("auto", "float32", "bfloat16", "float16")
Kind = Literal["tah", "base", "original"]


def find(source: str) -> tuple[str, Kind]:
    """Where a model is, and what: a directory, a hub id, or a word: `smollm2`, `smollm2-tah`, `follow-tah`.

    Raises:
        ValueError: there is no such thing, or it is not a model.
    """
    if not source.strip():
        raise ValueError("MODEL is empty; give a directory, a hub id, smollm2, smollm2-tah, or follow-tah")
    if source == "follow-tah" and not Path(source).is_dir():
        return str(FOLLOW), "tah"
    if source == "smollm2" and not Path(source).is_dir():
        from .smollm2 import smollm2_base

        return str(smollm2_base()), "base"
    if source == "smollm2-tah" and not Path(source).is_dir():
        from .smollm2 import smollm2_tah

        return str(smollm2_tah()), "tah"
    directory = Path(source)
    if directory.is_dir():
        if (directory / ORIGINAL).is_file():
            return source, "original"
        if not (directory / "config.json").is_file():
            raise ValueError(f"{source} is not a model: it has no config.json")
        try:
            described = json.loads((directory / "config.json").read_text("utf-8"))
            return source, "tah" if described["model_type"] == "tah" else "base"
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{source}/config.json is damaged: {first_line(error)}") from error
    if directory.exists():
        raise ValueError(f"{source} is a file; give the directory of a model")
    if source.startswith((".", "/", "~")) or source.count("/") > 1 or not source.strip():
        raise ValueError(f"no model {source!r}: there is no such directory")
    try:
        path = source if hub_reachable() else snapshot_download(source, local_files_only=True)
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        why = "and the model hub cannot be reached" if isinstance(error, LocalEntryNotFoundError) else first_line(error)
        raise ValueError(f"no model {source!r}: there is no such directory, {why}") from error
    return path, "tah" if config.model_type == "tah" else "base"


def hub_reachable() -> bool:
    """False where asking the hub would only run into a minute of retries."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HF_ENDPOINT")):
        return True
    try:
        socket.getaddrinfo("huggingface.co", 443)
    except OSError:
        return False
    return not os.environ.get("HF_HUB_OFFLINE")


def load_tah(path: str, dtype: str = "auto") -> TaHForCausalLM:
    """The TaH checkpoint at `path`.

    Raises:
        ValueError: it is damaged or incomplete.
    """
    return _load(path, TaHForCausalLM, dtype)


def load_base(path: str, dtype: str = "auto") -> PreTrainedModel:
    """The base model at `path`, complete.

    Raises:
        ValueError: it cannot be loaded, or tensors are missing.
    """
    model, info = _load(path, AutoModelForCausalLM, dtype, output_loading_info=True, trust_remote_code=False)
    if missing := sorted(info["missing_keys"]):
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(f"{path}: the weights lack {', '.join(missing[:3])}{more}; copy or download them again")
    return model


def outline(path: str) -> PreTrainedModel:
    """The model at `path` without its weights, on the meta device: what its configuration says.

    Raises:
        ValueError: the configuration cannot be read, or is not of a causal language model.
    """
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        raise ValueError(f"{path}: {first_line(error)}") from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{path}: transformers has no causal language model for the family {config.model_type}")
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def load_tokenizer(path: str) -> Any:
    """The tokenizer at `path`.

    Raises:
        ValueError: there is none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        tried = tokenizer("a", add_special_tokens=False)["input_ids"]  # settings of a wrong kind show only here
        tokenizer.decode(tried, skip_special_tokens=True)
    except Exception as error:
        raise ValueError(f"{path} has no usable tokenizer ({first_line(error)})") from error
    if not tried:  # transformers makes up an empty one
        raise ValueError(f"{path} has no usable tokenizer (it is empty)")
    return tokenizer


def _load(path: str, kind: Any, dtype: str, **options: Any) -> Any:
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    try:
        return kind.from_pretrained(path, dtype=dtype, **options)
    except Exception as error:
        line = first_line(error)
        raise ValueError(line if line.startswith(path) else f"{path} cannot be loaded: {line}") from error


def inspect(source: str, against: str | None = None) -> dict[str, Any]:
    """What a model is, for `tah inspect`; with `against`, its parameters beside those of a plain base.

    Raises:
        ValueError: there is no such model, or it is damaged, or `against` is not a base.
    """
    path, kind = find(source)
    if kind == "original":
        return {"model": source, "kind": "original", "next": f"tah convert {source} NEW_DIRECTORY"}
    baseline = None if against is None else _count_base(against)
    found = _inspect_tah(source, path) if kind == "tah" else _inspect_base(source, path)
    if baseline is not None:
        total = found["total"] if kind == "tah" else found["base"]["parameters"]
        percent = 100 * (total - baseline) / baseline
        found["against"] = {"model": against, "parameters": baseline, "difference_percent": percent}
    return found


def _count_base(source: str) -> int:
    """Parameters of a base; no weights are read."""
    path, kind = find(source)
    if kind != "base":
        raise ValueError(f"--against {source}: that is not a plain base model")
    return outline(path).num_parameters()


def parameter_counts(model: TaHForCausalLM) -> dict[str, int]:
    """How many parameters each part has."""
    sizes = {"base": 0, "adapter": 0, "decider": 0, "maps": 0}
    for name, parameter in model.named_parameters():
        part = "decider" if name.startswith("decider.") else "adapter" if "lora_" in name else "base"
        sizes["maps" if name.startswith(("reembed_map.", "combine_map.")) else part] += parameter.numel()
    return sizes


def _inspect_tah(source: str, path: str) -> dict[str, Any]:
    model = load_tah(path)
    config, sizes = model.config, parameter_counts(model)
    decider = config.decider and {"kind": config.decider["kind"], "layers": config.decider["layers"]}
    return {
        "model": source,
        "kind": "tah",
        "base": _facts(model.base) | {"parameters": sizes["base"]},
        "parameters": sizes,
        "total": sum(sizes.values()),
        "extra_percent": {name: 100 * size / sizes["base"] for name, size in sizes.items() if name != "base"},
        "max_depth": config.max_depth,
        "policy": config.policy,
        "threshold": config.threshold,
        "decider": decider,
        "lora_rank": config.lora_rank,
        "seams": {name: getattr(config, name) for name in ("reembed", "attention", "combine")},
    }


def _inspect_base(source: str, path: str) -> dict[str, Any]:
    result: dict[str, Any] = {"model": source, "kind": "base", "supported": False, "reason": None}
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:
        raise ValueError(f"{path}: {first_line(error)}") from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return result | {"reason": f"transformers has no causal language model for the family {config.model_type}"}
    base = load_base(path)
    try:
        check_base(base)
        result["supported"] = True
    except UnsupportedBase as error:
        result["reason"] = str(error)
    return result | {"base": _facts(base)}


def _facts(base: PreTrainedModel) -> dict[str, Any]:
    text = base.config.get_text_config(decoder=True)
    return {
        "family": base.config.model_type,
        "parameters": base.num_parameters(),
        "layers": text.num_hidden_layers,
        "width": text.hidden_size,
        "vocabulary": text.vocab_size,
        "positions": getattr(text, "max_position_embeddings", None),
        "dtype": str(base.dtype).removeprefix("torch."),
    }


def as_lines(found: dict[str, Any]) -> str:
    """`tah inspect` for people: one fact per line, names of nested facts joined by a space."""
    flat: dict[str, Any] = {}
    for name, value in found.items():
        if isinstance(value, dict):
            flat |= {f"{name} {inner}": entry for inner, entry in value.items()}
        elif value is not None:
            flat[name] = value
    width = max(map(len, flat))
    return "\n".join(f"{name.replace('_', ' '):<{width}}  {_as_word(value, name)}" for name, value in flat.items())


def _as_word(value: Any, name: str) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and name.startswith("extra_percent"):
        return f"{value:.3g} % of the base"
    if isinstance(value, float) and name.endswith("percent"):
        return f"{value:+.3g} %"
    return f"{value:,}" if isinstance(value, int) else str(value)


def quiet() -> None:
    """Leave the terminal to us: no progress bars and no advice from transformers."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
