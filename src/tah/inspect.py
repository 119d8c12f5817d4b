"""A description of a model, for `tah inspect`."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from .core.families import UnsupportedBase, check_base
from .errors import first_line
from .load import find, load_base, load_tah, outline, parameter_counts
from .policy import Rule


def inspect(source: str, against: str | None = None) -> dict[str, Any]:
    """Return the description of a model for `tah inspect`.

    Args:
        source: Path of a model directory, a hub id, or the name of a bundled checkpoint.
        against: Base model whose number of parameters is compared with that of the model.

    Raises:
        ValueError: A model does not exist or is damaged, or `against` is not a base model.
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
    """Return the number of parameters of a base, without reading its weights."""
    path, kind = find(source, weights=False)
    if kind != "base":
        raise ValueError(f"--against {source}: that is not a base model")
    return outline(path).num_parameters()


def _inspect_tah(source: str, path: str) -> dict[str, Any]:
    model = load_tah(path)
    config, sizes = model.config, parameter_counts(model)
    decider = config.decider and {name: config.decider[name] for name in ("kind", "layers") if name in config.decider}
    names = ["next_input", "attention", "output"]
    width = config.next_input_width or config.get_text_config().hidden_size
    return {
        "model": source,
        "kind": "tah",
        "base": _facts(model.base) | {"parameters": sizes["base"]},
        "parameters": sizes,
        "total": sum(sizes.values()),
        "extra_percent": {name: 100 * size / sizes["base"] for name, size in sizes.items() if name != "base"},
        "max_depth": config.max_depth,
        "policy": config.policy,
        "threshold": None if Rule().draws(config) else config.threshold,
        "decision": config.decision,
        "decider": decider,
        "lora_rank": config.lora_rank,
        "method": {name: getattr(config, name) for name in names}
        | ({"next_input_width": width} if config.next_input == "mlp" else {}),
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
    """Return a description as text: one entry per line, the names of nested entries joined by a space."""
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
