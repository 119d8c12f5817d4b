"""Save and load the adapter of a model: LoRA, linear maps U and Z, and decider, without the base.

The directory of an adapter has two files. `additions.json` contains the model's settings, and `additions.safetensors`
contains the tensors under their names in a whole checkpoint. The base is loaded from its own source. For SmolLM2-135M
the adapter has 6 MB, a whole checkpoint 540 MB.

A checkpoint of a model with a quantised base contains the adapter alone, too: `config.json` and `model.safetensors`, as
transformers writes and resumes them, and `base.json`, the facts of the base. `load_adapter` reads both formats.
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
from ..core.quantised import quantisation_of
from ..files import write_atomically
from .contents import weights_fingerprint
from .untrusted import build_empty, checked_config, read_json, weight_files

if TYPE_CHECKING:
    from ..model import TaHForCausalLM

SETTINGS, WEIGHTS = "additions.json", "additions.safetensors"
BASE = "base.json"  # facts of the base of a checkpoint without it
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
    settings = {"base": facts_of(model.base), **{name: getattr(model.config, name) for name in own_fields()}}
    tensors = {name: tensor.detach().to(dtype).contiguous() for name, tensor in _adapter(model).items()}
    if not tensors:
        raise ValueError("the model has nothing beside its base: no LoRA, no linear maps, no decider")
    weights, target = save(tensors, metadata={"format": "pt"}), Path(directory)
    write_atomically(target / WEIGHTS, weights)
    settings["sha256"] = hashlib.sha256(weights).hexdigest()  # prevents new weights with old settings
    write_atomically(target / SETTINGS, json.dumps(settings, indent=2) + "\n")


def load_adapter(
    model_class: type[TaHForCausalLM], base: PreTrainedModel, directory: str | Path, **fields: Any
) -> TaHForCausalLM:
    """Return a TaH model from a base and an adapter, in the base's dtype.

    Tensors of a checkpoint without its base that have another dtype than its model, such as a float32 LoRA beside a
    bfloat16 base, keep theirs.

    Args:
        model_class: Class of the model.
        base: Base model that the adapter was trained with.
        directory: Directory that `save_adapter` wrote, or `save_pretrained` of a model with a quantised base.
        fields: Fields of `TaHConfig` that replace the saved ones.

    Raises:
        ValueError: A file is missing or damaged, or the adapter belongs to a base of another shape or other weights.
    """
    source = Path(directory)
    alone = (source / BASE).is_file()
    shape, settings, file, saved = _read_checkpoint(source) if alone else _read(source)
    settings |= fields
    given = facts_of(base)
    if differ := [f"{name}={shape.get(name)!r}" for name in SHAPE if given[name] != shape.get(name)]:
        has = ", ".join(f"{name}={given[name]!r}" for name in SHAPE if given[name] != shape.get(name))
        raise ValueError(f"the adapter in {source} belongs to a base with {', '.join(differ)}, not {has}")
    formats = [facts.get("quantisation") or "not quantised" for facts in (shape, given)]
    if formats[0] != formats[1]:
        raise ValueError(
            f"the adapter in {source} belongs to a base that is {formats[0]}, but this one is {formats[1]}; load the "
            "base in the same format"
        )
    if shape.get("weights") != given["weights"]:
        raise ValueError(f"the adapter in {source} belongs to a base of the same shape with other weights")
    # The meta device comes first: the settings may have any sizes, and only the sizes of the file may be allocated.
    tensors = len(saved) + sum(1 for _ in base.parameters())
    config = {"base_config": base.config.to_dict(), **settings}
    own = _adapter(build_empty(lambda: model_class(TaHConfig(**config)), tensors, f"{source / file}"))
    wrong = sorted(own.keys() ^ saved.keys()) or [n for n in own if own[n].shape != saved[n].shape]
    if wrong := wrong or [n for n in own if not saved[n].is_floating_point()]:
        weights = WEIGHTS if file == SETTINGS else "model.safetensors"
        raise ValueError(f"{source / weights} does not fit its {file}: {wrong[0]}")
    model = model_class.from_base(base, **settings)
    common = str(checked_config(source).get("dtype")).removeprefix("torch.") if alone else None
    with torch.no_grad():
        for name, tensor in _adapter(model).items():
            dtype = saved[name].dtype
            if alone and str(dtype).removeprefix("torch.") != common:
                tensor.data = tensor.data.to(dtype)
            tensor.copy_(saved[name])
    return model


def facts_of(base: PreTrainedModel) -> dict[str, Any]:
    """Return what identifies a base: its shape, the format of its quantised layers, and a hash of its other weights."""
    facts = {name: getattr(base.config, name, None) for name in SHAPE}
    return facts | {"quantisation": quantisation_of(base), "weights": weights_fingerprint(base, of_base=True)}


def own_fields() -> list[str]:
    """Return the fields of `TaHConfig` that describe the model beside its base."""
    inherited = {field.name for field in dataclasses.fields(PreTrainedConfig)}
    return [field.name for field in dataclasses.fields(TaHConfig) if field.name not in {*inherited, "base_config"}]


def is_own(name: str) -> bool:
    """Return whether a tensor of a whole checkpoint belongs to the adapter."""
    return not name.startswith("base.") or ".lora_" in name


def base_source(directory: str | Path, base: str | None = None) -> tuple[str, dict[str, Any]]:
    """Return the source of the base of a checkpoint without it, and options of its `from_pretrained`.

    Args:
        directory: Directory of the checkpoint.
        base: Directory or hub id of the base. None: the one in the checkpoint.

    Raises:
        ValueError: The checkpoint does not name its base, or the base was quantised after it was loaded.
    """
    described = checked_config(directory)["base_config"]
    why = None if described.get("quantization_config") else "was quantised after loading"
    if why is None and not (base or described.get("_name_or_path")):
        why = "was loaded from a local directory"
    if why is not None:
        advice = f"load it, and pass it: TaHForCausalLM.from_pretrained({str(directory)!r}, base=...)"
        raise ValueError(f"{directory} contains the adapter alone, and its base {why}; {advice}")
    options = {name: described[name] for name in ("dtype", "quantization_config") if described.get(name)}
    return base or described["_name_or_path"], options


def _read(source: Path) -> tuple[dict[str, Any], dict[str, Any], str, dict[str, torch.Tensor]]:
    """Return what `save_adapter` wrote: facts of the base, settings, their file and the tensors."""
    try:
        settings: dict[str, Any] = json.loads((source / SETTINGS).read_text("utf-8"))
        weights = (source / WEIGHTS).read_bytes()
        shape, digest = dict(settings.pop("base")), settings.pop("sha256")
        settings = current_fields(settings)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{source} holds no adapter, or a damaged one ({error})") from error
    if hashlib.sha256(weights).hexdigest() != digest:
        raise ValueError(f"{source / WEIGHTS} is not what {SETTINGS} was written with; copy both again")
    return shape, settings, SETTINGS, _tensors(source / WEIGHTS, weights)


def _read_checkpoint(source: Path) -> tuple[dict[str, Any], dict[str, Any], str, dict[str, torch.Tensor]]:
    """Return the same of a checkpoint without its base."""
    described = checked_config(source)
    settings = {name: described[name] for name in own_fields() if name in described}
    saved: dict[str, torch.Tensor] = {}
    for file in weight_files(source, described):
        saved |= _tensors(file, file.read_bytes())
    return read_json(source / BASE), settings, "config.json", saved


def _tensors(file: Path, weights: bytes) -> dict[str, torch.Tensor]:
    try:
        return {current_tensor(name): tensor for name, tensor in load(weights).items()}
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def _adapter(model: TaHForCausalLM) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers outside the base, and those of its LoRA, by name."""
    return {name: tensor for name, tensor in model.state_dict(keep_vars=True).items() if is_own(name)}
