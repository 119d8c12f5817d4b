"""Plain PEFT LoRA directories to and from a model's depth adapter.

A PEFT directory is `adapter_config.json` and `adapter_model.safetensors`. Its tensors are ours under another prefix:
`base_model.model.<layer>.lora_A.weight` there is `base.<layer>.lora_A.weight` here. PEFT knows no depth: loaded by
PEFT, the adapter makes of every pass what it makes here of the passes from depth 2 on.

Shapes: lora_A is [r, I] and lora_B [O, r], of rank r on a layer from width I to O.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from .lora import DepthLoRA
from .model import TaHForCausalLM

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
# Entries that are read below or change nothing about a finished adapter. PEFT leaves the others empty unless they are
# used, so a value in any other entry means more than a plain low-rank update.
PLAIN = """r lora_alpha lora_dropout target_modules exclude_modules use_rslora bias init_lora_weights fan_in_fan_out
    peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode megatron_core
    qalora_group_size""".split()
PLAIN_INIT = (True, False, None, "gaussian", "orthogonal", "eva")  # the others also rewrite the base


@dataclass
class Adapter:
    """A LoRA adapter on disk: PEFT's settings, and tensors named relative to the base (`<layer>.lora_A.weight`)."""

    source: Path
    settings: dict[str, Any]
    tensors: dict[str, Tensor]

    @property
    def fields(self) -> dict[str, Any]:
        """The `TaHConfig` fields of a model that this adapter fits."""
        rank, alpha = self.settings["r"], self.settings["lora_alpha"]
        return {
            "lora_rank": rank,
            "lora_alpha": float(alpha * math.sqrt(rank) if self.settings.get("use_rslora") else alpha),
            "lora_dropout": float(self.settings["lora_dropout"]),
            "lora_targets": sorted({name.split(".")[-3] for name in self.tensors}),
        }

    @torch.no_grad()
    def copy_to(self, model: TaHForCausalLM) -> None:
        """Copy into the model's adapter, in its dtype. `ValueError` where the layers or shapes differ."""
        own, path = tensors_of(model), self.source / WEIGHTS
        if differ := sorted(own.keys() ^ self.tensors.keys()):
            verb = "lacks" if differ[0] in own else "adapts"
            raise ValueError(f"{path} {verb} {differ[0]}, unlike the adapter of the model")
        for name, tensor in self.tensors.items():
            if own[name].shape != tensor.shape:
                raise ValueError(f"{path}: {name} is {list(tensor.shape)}, the model needs {list(own[name].shape)}")
        for name, tensor in self.tensors.items():
            own[name].copy_(tensor)


def read_adapter(directory: str | Path) -> Adapter:
    """Read a PEFT LoRA directory.

    Raises:
        ValueError: a file is missing or damaged, a layer lacks lora_A or lora_B, a target module has neither, or the
            adapter does more than add `alpha / r * B A x` to linear layers.
    """
    source = Path(directory)
    for file in (CONFIG, WEIGHTS):
        if not (source / file).is_file():
            raise ValueError(f"{source} has no {file}" + ("; a pickled adapter is not read" if file == WEIGHTS else ""))
    try:
        settings, saved = json.loads((source / CONFIG).read_text("utf-8")), load_file(source / WEIGHTS)
    except (ValueError, RecursionError, SafetensorError) as error:
        raise ValueError(f"the adapter in {source} is damaged or truncated: {error}") from error
    _check_plain(settings, source / CONFIG)
    for name in saved:
        layer, _, kind = name.rpartition(".lora_")
        pair = f"{layer}.lora_{'B' if kind == 'A.weight' else 'A'}.weight"
        if not layer.startswith(PREFIX) or kind not in ("A.weight", "B.weight"):
            raise ValueError(f"{source / WEIGHTS}: {name} does not belong to a LoRA adapter of linear layers")
        if pair not in saved:
            raise ValueError(f"{source / WEIGHTS} has {name} but not {pair}")
    targets = settings.get("target_modules")
    for target in targets if isinstance(targets, list) else []:
        if not any(name.endswith(f".{target}.lora_A.weight") for name in saved):
            raise ValueError(f"{source / CONFIG} targets {target}, but {WEIGHTS} has no such layer")
    if not saved:
        raise ValueError(f"{source / WEIGHTS} holds no tensors")
    return Adapter(source, settings, {name.removeprefix(PREFIX): tensor for name, tensor in saved.items()})


def _check_plain(settings: Any, path: Path) -> None:
    """Raise `ValueError` for settings that are not of a plain LoRA adapter."""
    if not isinstance(settings, dict) or settings.get("peft_type") != "LORA":
        raise ValueError(f"{path} does not describe a LoRA adapter (peft_type LORA)")
    for key, kinds in (("r", (int,)), ("lora_alpha", (int, float)), ("lora_dropout", (int, float))):
        value: Any = settings.setdefault(key, 0.0 if key == "lora_dropout" else None)
        if type(value) not in kinds or (key == "r" and value < 1):
            raise ValueError(f"{path}: {key}={value!r} is not {'an integer >= 1' if key == 'r' else 'a number'}")
    checked = {"bias": ("none",), "init_lora_weights": PLAIN_INIT}
    for key, value in settings.items():
        if value not in checked.get(key, (None, False, {}, [])) and (key in checked or key not in PLAIN):
            raise ValueError(f"{path}: {key}={value!r} is more than a depth adapter can represent")


def load_adapter(model: TaHForCausalLM, directory: str | Path) -> None:
    """Copy a PEFT LoRA directory into the model's adapter; if it does not fit, the `ValueError` says what would."""
    adapter, config = read_adapter(directory), model.config
    scale = adapter.fields["lora_rank"], adapter.fields["lora_alpha"]
    if scale != (config.lora_rank, config.lora_alpha) or tensors_of(model).keys() != adapter.tensors.keys():
        fit = ", ".join(f"{name}={value!r}" for name, value in adapter.fields.items())
        raise ValueError(f"the adapter in {directory} does not fit the model's; it fits from_base(base, {fit})")
    adapter.copy_to(model)


def save_adapter(model: TaHForCausalLM, directory: str | Path) -> None:
    """Write the model's adapter as a plain PEFT LoRA directory. `ValueError` if the model has none."""
    tensors, config = tensors_of(model), model.config
    if not tensors:
        raise ValueError("the model has no adapter to save (lora_rank=0)")
    modules = dict(model.base.named_modules())
    layers = {name.rpartition(".lora_")[0] for name in tensors}
    leaves = {name.rpartition(".")[2] for name in layers}
    # PEFT adapts every layer whose name ends in a target, so leaf names will do only where they select just ours.
    exact = layers == {name for name in modules if name.rpartition(".")[2] in leaves}
    settings: dict[str, Any] = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True, "bias": "none"}
    settings |= {"r": config.lora_rank, "lora_alpha": config.lora_alpha, "lora_dropout": config.lora_dropout}
    settings["target_modules"] = sorted(leaves if exact else layers)
    settings["fan_in_fan_out"] = any(isinstance(modules[name], Conv1D) for name in layers)
    (target := Path(directory)).mkdir(parents=True, exist_ok=True)
    plain = {PREFIX + name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    save_file(plain, target / WEIGHTS, metadata={"format": "pt"})
    (target / CONFIG).write_text(json.dumps(settings, indent=2) + "\n", "utf-8")


def tensors_of(model: TaHForCausalLM) -> dict[str, Tensor]:
    """The model's adapter parameters, named relative to the base."""
    layers = {name: layer for name, layer in model.base.named_modules() if isinstance(layer, DepthLoRA)}
    down = {f"{name}.lora_A.weight": layer.lora_A.weight for name, layer in layers.items()}
    return down | {f"{name}.lora_B.weight": layer.lora_B.weight for name, layer in layers.items()}
