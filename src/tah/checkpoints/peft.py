"""Read PEFT LoRA directories into the LoRA of a model, and write them from it.

A PEFT directory has the files `adapter_config.json` and `adapter_model.safetensors`. Its tensors differ only by their
prefix: `base_model.model.<layer>.lora_A.weight` in PEFT is `base.<layer>.lora_A.weight` here. PEFT has no depth. Loaded
by PEFT, the adapter changes every pass; here it changes only the passes from depth 2 on.

Shapes: lora_A is [r, I] and lora_B [O, r], of rank r on a layer from width I to O.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..core.lora import DepthLoRA, is_target, widths

if TYPE_CHECKING:
    from ..model import TaHForCausalLM

CONFIG, WEIGHTS, PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
# Entries that are read below or do not affect a trained adapter. PEFT leaves the other entries empty unless they are
# used, so a value in one of them means more than a plain low-rank update.
PLAIN = """r lora_alpha lora_dropout target_modules exclude_modules use_rslora bias init_lora_weights fan_in_fan_out
    peft_type task_type auto_mapping peft_version base_model_name_or_path revision inference_mode megatron_core
    qalora_group_size""".split()
ALL = "all-linear"
PLAIN_INIT = (True, False, None, "gaussian", "orthogonal", "eva")  # other values also change the base


@dataclass
class Adapter:
    """A LoRA adapter on disk: PEFT's settings, and tensors named relative to the base (`<layer>.lora_A.weight`)."""

    source: Path
    settings: dict[str, Any]
    tensors: dict[str, Tensor]

    def fields(self, base: nn.Module) -> dict[str, Any]:
        """Return the `TaHConfig` fields of a model that this adapter fits.

        The targets are leaf names if these select exactly the adapted layers of the base, or if the settings have leaf
        names. Otherwise they are full names.
        """
        rank, alpha, targets = self.settings["r"], self.settings["lora_alpha"], self.settings.get("target_modules")
        leaves = {layer.rpartition(".")[2] for layer in self.layers}
        head = base.get_output_embeddings()  # type: ignore[operator]
        linear = {
            name
            for name, module in base.named_modules()
            if isinstance(module, (nn.Linear, Conv1D)) and module is not head
        }
        by_leaf = {name for name in linear if is_target(name, leaves)} <= self.layers or (
            not self.settings.get("exclude_modules")
            and (targets in (None, ALL) or (isinstance(targets, list) and not any("." in name for name in targets)))
            and not any(name.isdigit() for name in targets or ())
        )
        return {
            "lora_rank": rank,
            "lora_alpha": float(alpha * math.sqrt(rank) if self.settings.get("use_rslora") else alpha),
            "lora_dropout": float(self.settings["lora_dropout"]),
            "lora_targets": sorted(leaves if by_leaf else self.layers),
        }

    @property
    def layers(self) -> set[str]:
        """Names of the adapted layers, relative to the base."""
        return {name.rpartition(".lora_")[0] for name in self.tensors}

    def check_shapes(self, base: nn.Module) -> None:
        """Check the shapes of the tensors against the base's layers and the rank in the settings.

        Layers that the base does not have are not checked here; building the model raises an error for them.

        Raises:
            ValueError: A tensor has another shape.
        """
        rank, modules = self.settings["r"], dict(base.named_modules())
        for name, tensor in self.tensors.items():
            layer, _, kind = name.rpartition(".lora_")
            if type(modules.get(layer)) in (nn.Linear, Conv1D):
                inputs, outputs = widths(modules[layer])
                needed = [rank, inputs] if kind == "A.weight" else [outputs, rank]
                if list(tensor.shape) != needed:
                    path = self.source / WEIGHTS
                    raise ValueError(f"{path}: {name} is {list(tensor.shape)}, the model needs {needed}")

    @torch.no_grad()
    def copy_to(self, model: TaHForCausalLM) -> None:
        """Copy the tensors into the model's LoRA, in its dtype.

        Raises:
            ValueError: The layers or shapes differ.
        """
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
        ValueError: A file is missing or damaged, a layer lacks lora_A or lora_B, a target module has neither, or the
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
    adapter = Adapter(source, settings, {name.removeprefix(PREFIX): tensor for name, tensor in saved.items()})
    _check_layers(adapter)
    if not saved:
        raise ValueError(f"{source / WEIGHTS} holds no tensors")
    _check_tensors(adapter)
    return adapter


def _check_layers(adapter: Adapter) -> None:
    """Check that settings and tensors have the same adapted layers.

    A regular expression from an untrusted file is not run. In that case the layers are those of the tensors.

    Raises:
        ValueError: They differ.
    """
    config, layers = adapter.source / CONFIG, adapter.layers
    targets, left_out = (adapter.settings.get(key) for key in ("target_modules", "exclude_modules"))
    for key, value in (("target_modules", targets), ("exclude_modules", left_out)):
        names = isinstance(value, list) and all(isinstance(name, str) and name for name in value)
        if not (value is None or isinstance(value, str) or names):
            raise ValueError(f"{config}: {key}={str(value)[:100]} is neither a list of names nor a regular expression")
    for layer in sorted(layers) if isinstance(left_out, list) else []:
        if is_target(layer, left_out):
            raise ValueError(f"{config} leaves {layer} out (exclude_modules), but {WEIGHTS} has it")
    for target in targets if isinstance(targets, list) and not left_out else []:
        if not any(is_target(layer, [target]) for layer in layers):
            raise ValueError(f"{config} targets {target}, but {WEIGHTS} has no such layer")


def _check_tensors(adapter: Adapter) -> None:
    """Raise `ValueError` for tensors that are not floating point matrices."""
    path = adapter.source / WEIGHTS
    for name, tensor in adapter.tensors.items():
        if not tensor.is_floating_point() or tensor.ndim != 2:
            kind = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
            raise ValueError(f"{path}: {name} is {kind}, not a matrix of floating point numbers")


def _check_plain(settings: Any, path: Path) -> None:
    """Raise `ValueError` for settings of anything other than a plain LoRA adapter."""
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


def load_peft(model: TaHForCausalLM, directory: str | Path) -> None:
    """Copy a PEFT LoRA directory into the model's LoRA.

    Raises:
        ValueError: The adapter is damaged or does not fit the model. The message has the arguments of a fitting model.
    """
    adapter, config = read_adapter(directory), model.config
    fields = adapter.fields(model.base)
    fits = (fields["lora_rank"], fields["lora_alpha"]) == (config.lora_rank, config.lora_alpha)
    if not fits or tensors_of(model).keys() != adapter.tensors.keys():
        fit = ", ".join(f"{name}={value!r}" for name, value in fields.items())
        raise ValueError(f"the adapter in {directory} does not fit the model's; it fits from_base(base, {fit})")
    adapter.copy_to(model)


def save_peft(model: TaHForCausalLM, directory: str | Path) -> None:
    """Write the model's LoRA as a PEFT directory.

    Raises:
        ValueError: The model has no LoRA.
    """
    tensors, config = tensors_of(model), model.config
    if not tensors:
        raise ValueError("the model has no adapter to save (lora_rank=0)")
    modules = dict(model.base.named_modules())
    layers = {name.rpartition(".lora_")[0] for name in tensors}
    leaves = {name.rpartition(".")[2] for name in layers}
    # PEFT adapts every layer whose name ends in a target, so leaf names must select exactly the adapted layers.
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
    """Return the LoRA parameters of a model, with names relative to the base."""
    layers = {name: layer for name, layer in model.base.named_modules() if isinstance(layer, DepthLoRA)}
    down = {f"{name}.lora_A.weight": layer.lora_A.weight for name, layer in layers.items()}
    return down | {f"{name}.lora_B.weight": layer.lora_B.weight for name, layer in layers.items()}
