"""The golden vectors T: recorded from the authors' TaH2 code (tests/golden/T/README.md)."""

from __future__ import annotations

import json
import shutil
from collections import OrderedDict
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from .reference_tah2 import Tah2

FOLDER = Path(__file__).parents[1] / "golden" / "T"
MODULES = ("input_updater", "iter_decider")
LOGITS = {"atol": 5e-4, "rtol": 1e-4}  # of log-probabilities and of what deeper passes compute
LOSS = 2e-5
GRAD_NORM = 5e-3
OUR_NAMES = {
    "input_updater": {
        "norm_prev": "norm_embed",
        "norm_last": "norm_hidden",
        "projection": "proj",
        "norm_pre_mlp": "norm_pre",
        "norm_out": "norm_out",
    },
    "iter_decider": {
        "norm_first": "norm_embed",
        "norm_last": "norm_hidden",
        "norm_l": "norm_probs",
        "input_proj": "proj",
        "norm_out": "norm_out",
        "score": "score",
    },
}
for _names in OUR_NAMES.values():
    _names |= {f"mlp.{part}_proj": f"mlp.{part}_proj" for part in ("gate", "up", "down")}


def our_name(name: str) -> str:
    """Our name of a parameter of the authors' model."""
    first, _, rest = name.partition(".")
    if first == "simple_base_model":
        return f"base.{rest}"
    ours = {"input_updater": "next_input_mlp", "iter_decider": "decider"}[first]
    return f"{ours}.{OUR_NAMES[first][rest.removesuffix('.weight')]}.weight"


@cache
def golden() -> SimpleNamespace:
    """All tensors and facts, by file."""
    tensors = {path.stem: load_file(path) for path in FOLDER.glob("*.safetensors")}
    facts = {path.stem: json.loads(path.read_text()) for path in FOLDER.glob("*.json")}
    return SimpleNamespace(tensors=tensors, facts=facts, inputs=tensors["inputs"])


def side_modules() -> dict[str, Tensor]:
    """The tensors of updater and decider by our names, without the threshold."""
    found = {}
    for module in MODULES:
        for name, tensor in load_file(FOLDER / "ckpt" / f"{module}.safetensors").items():
            if name != "threshold":
                found[our_name(f"{module}.{name}")] = tensor
    return found


def reference_model(**settings: Any) -> Tah2:
    """The recorded model, for the slow reference. Its parameters take gradients."""
    base = AutoModelForCausalLM.from_pretrained(FOLDER / "ckpt", attn_implementation="eager")
    weights = {name: tensor.requires_grad_() for name, tensor in side_modules().items()}
    return Tah2(base, weights, **{"max_depth": 4, "threshold": 0.47, **settings})


def official(target: Path) -> Path:
    """Write the checkpoint in the authors' layout, with its two pickles, to a new directory."""
    described = json.loads((FOLDER / "ckpt" / "side_modules.json").read_text())
    written = shutil.ignore_patterns("input_updater.safetensors", "iter_decider.safetensors", "side_modules.json")
    shutil.copytree(FOLDER / "ckpt", target, ignore=written)
    for module in MODULES:
        facts, tensors = described[module], load_file(FOLDER / "ckpt" / f"{module}.safetensors")
        state = OrderedDict((name, tensors[name]) for name in facts["state_dict"])
        arguments = dict(facts["init_args"])
        if "dtype" in arguments:
            arguments["dtype"] = getattr(torch, arguments["dtype"].removeprefix("torch."))
        torch.save({"class": facts["class"], "state_dict": state, "init_args": arguments}, target / f"{module}.bin")
    return target


def unpadded(x: Tensor, mask: Tensor) -> list[Tensor]:
    """The tokens of each row."""
    return [row[valid.bool()].long() for row, valid in zip(x, mask, strict=True)]
