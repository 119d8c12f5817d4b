"""Save and load the adapter of a model: LoRA, linear maps U and Z, and decider, without the base.

The directory of an adapter has two files. `additions.json` contains the model's settings, and `additions.safetensors`
contains the tensors under their names in a whole checkpoint. The base is loaded from its own source. For SmolLM2-135M
the adapter has 6 MB, a whole checkpoint 540 MB.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from transformers import PreTrainedConfig, PreTrainedModel

from ..config import TaHConfig, current_fields, current_tensor
from ..files import write_atomically
from .contents import weights_fingerprint
from .untrusted import build_empty

if TYPE_CHECKING:
    from ..model import TaHForCausalLM

SETTINGS, WEIGHTS = "additions.json", "additions.safetensors"
SHAPE = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers")  # config entries of the base


def save_adapter(model: TaHForCausalLM, directory: str | Path, dtype: torch.dtype = torch.bfloat16) -> None:
    """Save the adapter of a model, and a fingerprint of its base.

    Args:
        model: Model with an adapter.
        directory: Target directory, created if it is missing.
        dtype: Dtype of the saved tensors.

    Raises:
        ValueError: The model has no adapter.
    """
    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    own = [field.name for field in dataclasses.fields(TaHConfig) if field.name not in {*inherited, "base_config"}]
    base = {name: getattr(model.base.config, name, None) for name in SHAPE} | {
        "weights": weights_fingerprint(model.base, of_base=True)
    }
    settings = {"base": base, **{name: getattr(model.config, name) for name in own}}
    tensors = {name: tensor.detach().to(dtype).contiguous() for name, tensor in _adapter(model).items()}
    if not tensors:
        raise ValueError("the model has nothing beside its base: no LoRA, no linear maps, no decider")
    weights, target = save(tensors, metadata={"format": "pt"}), Path(directory)
    write_atomically(target / WEIGHTS, weights)
    settings["sha256"] = hashlib.sha256(weights).hexdigest()  # prevents new weights with old settings
    write_atomically(target / SETTINGS, json.dumps(settings, indent=2) + "\n")


def load_adapter(model_class: type[TaHForCausalLM], base: PreTrainedModel, directory: str | Path) -> TaHForCausalLM:
    """Return a TaH model from a base and an adapter, in the base's dtype.

    Args:
        model_class: Class of the model.
        base: Base model that the adapter was trained with.
        directory: Directory that `save_adapter` wrote.

    Raises:
        ValueError: A file is missing or damaged, or the adapter belongs to a base of another shape or other weights.
    """
    source = Path(directory)
    try:
        settings: dict[str, Any] = json.loads((source / SETTINGS).read_text("utf-8"))
        weights = (source / WEIGHTS).read_bytes()
        shape, digest = dict(settings.pop("base")), settings.pop("sha256")
        settings = current_fields(settings)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{source} holds no adapter, or a damaged one ({error})") from error
    if hashlib.sha256(weights).hexdigest() != digest:
        raise ValueError(f"{source / WEIGHTS} is not what {SETTINGS} was written with; copy both again")
    try:
        saved = {current_tensor(name): tensor for name, tensor in load(weights).items()}
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{source / WEIGHTS} is damaged: {error}") from error
    given = {name: getattr(base.config, name, None) for name in SHAPE}
    if differ := [f"{name}={shape.get(name)!r}" for name in SHAPE if given[name] != shape.get(name)]:
        has = ", ".join(f"{name}={given[name]!r}" for name in SHAPE if given[name] != shape.get(name))
        raise ValueError(f"the adapter in {source} belongs to a base with {', '.join(differ)}, not {has}")
    if shape.get("weights") != weights_fingerprint(base, of_base=True):
        raise ValueError(f"the adapter in {source} belongs to a base of the same shape with other weights")
    # The meta device comes first: the settings may have any sizes, and only the sizes of the file may be allocated.
    tensors = len(saved) + sum(1 for _ in base.parameters())
    config = {"base_config": base.config.to_dict(), **settings}
    own = _adapter(build_empty(lambda: model_class(TaHConfig(**config)), tensors, f"{source / SETTINGS}"))
    wrong = sorted(own.keys() ^ saved.keys()) or [n for n in own if own[n].shape != saved[n].shape]
    if wrong := wrong or [n for n in own if not saved[n].is_floating_point()]:
        raise ValueError(f"{source / WEIGHTS} does not fit its {SETTINGS}: {wrong[0]}")
    model = model_class.from_base(base, **settings)
    with torch.no_grad():
        for name, tensor in _adapter(model).items():
            tensor.copy_(saved[name])
    return model


def _adapter(model: TaHForCausalLM) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers outside the base, and those of its LoRA, by name."""
    state = model.state_dict(keep_vars=True)
    return {name: tensor for name, tensor in state.items() if not name.startswith("base.") or ".lora_" in name}
