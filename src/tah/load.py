"""Find and load the MODEL argument of the commands, and describe it: a TaH checkpoint or a base model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from transformers import AutoConfig, AutoTokenizer, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging

from .checkpoints.chat_template import check_template
from .checkpoints.hub import Snapshot, converted, is_original, is_repository
from .checkpoints.untrusted import build_empty, check_config, check_counts, empty_base, read_json
from .checkpoints.weights import load_plain
from .core.families import UnsupportedBase, check_base
from .model import TaHForCausalLM

FOLLOW = Path(__file__).parent / "assets" / "follow-tah"
DTYPES = ("auto", "float32", "bfloat16", "float16")
LONGEST = 300  # characters of another's message that we repeat
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
        raise ValueError("MODEL is empty; give a directory, a hub id, smollm2, smollm2-tah, or follow-tah")
    if source == "follow-tah" and not Path(source).is_dir():
        return str(FOLLOW), "tah"
    if source == "smollm2" and not Path(source).is_dir():
        from .checkpoints.smollm2 import smollm2_base

        return str(smollm2_base()), "base"
    if source == "smollm2-tah" and not Path(source).is_dir():
        from .checkpoints.smollm2 import smollm2_tah

        return str(smollm2_tah()), "tah"
    directory = Path(source)
    if directory.is_dir():
        return (str(converted(source, directory)), "tah") if is_original(directory) else _described(directory, source)
    if directory.exists():
        raise ValueError(f"{source} is a file; give the directory of a model")
    if not is_repository(source):
        raise ValueError(f"no model {source!r}: there is no such directory")
    found = Snapshot(source)
    if is_original(found.directory):
        return str(converted(source, found)), "tah"
    kind = _described(found.directory, str(found.directory))
    if weights:
        found.complete()
    return kind


def _described(directory: Path, source: str) -> tuple[str, Kind]:
    """`source` and its kind, as the configuration there says."""
    if not (directory / "config.json").is_file():
        raise ValueError(f"{source} is not a model: it has no config.json")
    described = read_json(directory / "config.json")
    if "model_type" not in described:
        raise ValueError(f"{source}/config.json is damaged: it has no model_type")
    check_config(described, f"{source}/config.json")
    return source, "tah" if described["model_type"] == "tah" else "base"


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


def load_base(path: str, dtype: str = "auto") -> PreTrainedModel:
    """The base model at `path`, complete.

    Raises:
        ValueError: it cannot be loaded, or tensors are missing.
    """
    return load_plain(path, dtype=_known(dtype), trust_remote_code=False)


def outline(path: str) -> PreTrainedModel:
    """The model at `path` without its weights, on the meta device: what its configuration says.

    Raises:
        ValueError: the configuration cannot be read, or is not of a causal language model.
    """
    where = f"{path}/config.json"
    described = read_json(Path(path, "config.json"))
    check_config(described, where)
    check_counts(described, None, where)
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
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    return dtype


def inspect(source: str, against: str | None = None) -> dict[str, Any]:
    """What a model is, for `tah inspect`; with `against`, its parameters beside those of a plain base.

    Raises:
        ValueError: there is no such model, or it is damaged, or `against` is not a base.
    """
    path, kind = find(source)
    baseline = None if against is None else _count_base(against)
    found = _inspect_tah(source, path) if kind == "tah" else _inspect_base(source, path)
    if baseline is not None:
        total = found["total"] if kind == "tah" else found["base"]["parameters"]
        percent = 100 * (total - baseline) / baseline
        found["against"] = {"model": against, "parameters": baseline, "difference_percent": percent}
    return found


def _count_base(source: str) -> int:
    """Parameters of a base; no weights are read."""
    path, kind = find(source, weights=False)
    if kind != "base":
        raise ValueError(f"--against {source}: that is not a plain base model")
    return outline(path).num_parameters()


def parameter_counts(model: TaHForCausalLM) -> dict[str, int]:
    """How many parameters each part has."""
    sizes = {"base": 0, "adapter": 0, "decider": 0, "maps": 0}
    for name, parameter in model.named_parameters():
        part = "decider" if name.startswith("decider.") else "adapter" if "lora_" in name else "base"
        sizes["maps" if name.startswith(("next_input_map.", "output_map.")) else part] += parameter.numel()
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
        "seams": {name: getattr(config, name) for name in ("next_input", "attention", "output")},
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
    """What an error says, or the beginning of it: others' messages go on for pages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    line = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]  # a heading says nothing by itself
    return line if len(line) <= LONGEST else f"{line[: LONGEST - 3]}..."
