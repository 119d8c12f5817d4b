"""Read the files of original checkpoints as plain data.

This module reads checkpoints of TaH, and what they have in common with those of TaH2; `original_tah2.py` reads the
rest of the latter. The files are untrusted downloads. Pickles are opened by torch's restricted unpickler without
additional permitted objects. `tah_config.json` may name dtypes but no other objects. An entry that a TaH model does not
support raises `ValueError` with the file and the entry; nothing is guessed.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CONFIG, DECIDER, UPDATER = "tah_config.json", "iter_decider.bin", "input_updater.bin"
DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16)}
MLP, LABEL = "MLPIterDecider", "IterLabelDecider"
ARGUMENTS: dict[
    str, dict[str, Any]
] = {  # arguments of each decider class with their defaults; convert.py names the source
    MLP: {
        "topk": 100,
        "hidden_states_size": 1024,
        "hidden_states_layer_nums": [16, 20, 24, 28],
        "hidden_dims": [256, 512, 256],
        "expansion_factor": 4,
        "dropout_rate": 0.3,
        "normalize_input": False,
        "threshold": 0.5,
        "max_iter": 3,
        "dtype": torch.bfloat16,
    },
    LABEL: {"max_iter": 3},
}
ONLY: dict[str, tuple[Any, ...]] = {  # entries whose other values a TaH model cannot represent
    "adapter": ("lora", "none", None),
    "input_updater": ("TrivialUpdater", None),
    "output_updater": ("AdditiveLogitsUpdater",),  # null means NoneUpdater: no residual
    "iter_attention_mode": ("duo", None),
    "use_iter_embedding": (False, None),
}
READ = {"embedding_key", "max_iter", "iter_decider", "eval_iter_decider", "iter_label_generator", "train_loss"}
READ |= {"eval_loss", *ONLY}
READ |= {f"{key}_kwargs" for key in READ}

# The same for TaH2, where null stands for the class in the file.
MLP_UPDATER, NO_UPDATER = "Qwen3MLPUpdater", "IdentityUpdater"
MLP_DECIDER, ALWAYS, NEVER = "Qwen3MLPIterDecider", "AlwaysIterDecider", "TrivialIterDecider"
ONLY_TAH2: dict[str, tuple[Any, ...]] = {
    "input_updater": (MLP_UPDATER, NO_UPDATER, None),
    "iter_decider": (MLP_DECIDER, ALWAYS, NEVER, None),
    "iter_attention_mode": ("duo", "causal"),
    "weighted_hidden_method": ("stop_prob_mix", "even_mix"),
}
SIGNS_OF_TAH2 = {"weighted_hidden_method", "iter_attention_impl", "memory_lean_fp32_reductions"}
READ_TAH2 = (READ | SIGNS_OF_TAH2 | {"attn_implementation"}) - {"adapter", "adapter_kwargs"}


def read_config(source: Path) -> dict[str, Any]:
    """Return the content of `tah_config.json` with decoded dtypes. Only the arguments of classes are not checked here.

    Raises:
        ValueError: The file is missing or malformed, requires an object, or requires something that a TaH model does
            not support.
    """
    path = source / CONFIG
    if not path.is_file():
        raise ValueError(f"{source} has no {CONFIG}, so it is not a checkpoint of the original implementation")
    try:
        config = _plain(json.loads(path.read_text("utf-8")), "")
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"{CONFIG} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{CONFIG} is not a JSON object")
    tah2 = is_tah2(source, config)
    for key, value in config.items():
        only, model = (ONLY_TAH2, "TaH2") if tah2 else (ONLY, "TaH")
        if key in only and value not in only[key]:
            allowed = " or ".join(repr(option) for option in only[key])
            raise ValueError(f"{CONFIG}: {key} is {value!r}, which a {model} model cannot represent; only {allowed}")
        if key in READ and key.endswith("_kwargs") and not isinstance(value, dict | None):
            raise ValueError(f"{CONFIG}: {key} is {value!r}, not a JSON object")
    config = {"embedding_key": "model.embed_tokens", **config}
    _check_count(config.get("max_iter"), "max_iter")
    if tah2:
        return config
    config = {"adapter": "lora", **config}
    mixing = {"topk": 100, **(config.get("input_updater_kwargs") or {})}
    if mixing.get("use_hidden_states"):
        raise ValueError(f"{CONFIG}: input_updater_kwargs.use_hidden_states, which a TaH model cannot represent")
    config["mix_topk"] = mixing["topk"]
    _check_count(config["mix_topk"], "input_updater_kwargs.topk")
    return config


def _check_count(value: Any, name: str) -> None:
    if type(value) is not int or value < 1:
        raise ValueError(f"{CONFIG}: {name} is {value!r}, not an integer >= 1")


def is_tah2(source: Path, config: dict[str, Any]) -> bool:
    """Return whether a checkpoint with this `tah_config.json` is one of TaH2."""
    named = [str(config.get(key)) for key in ("input_updater", "iter_decider")]
    by_name = any(name.startswith("Qwen3MLP") for name in named)
    return bool(SIGNS_OF_TAH2 & config.keys()) or (source / UPDATER).exists() or by_name


def is_original(directory: Path) -> bool:
    """Return whether a directory has the layout of the original implementation."""
    return (directory / CONFIG).is_file()


def own_files(config: dict[str, Any]) -> list[str]:
    """Return the possible paths of decider, updater and adapter for a `tah_config.json`."""
    kwargs = config.get("iter_decider_kwargs")
    moved = kwargs.get("load_path") if isinstance(kwargs, dict) else None
    files = [DECIDER, UPDATER, "lora/adapter_config.json", "lora/adapter_model.safetensors"]
    if isinstance(moved, str) and not set("*?[") & set(moved):
        files += [os.path.normpath(moved), f"{os.path.normpath(moved)}/{DECIDER}"]
    return files


def _plain(value: Any, path: str) -> Any:
    """Return a JSON value with decoded dtypes; any other reference to an object raises `ValueError`."""
    if isinstance(value, list):
        return [_plain(item, f"{path}[{index}]") for index, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    if not any(key.startswith("__") for key in value):
        return {key: _plain(item, f"{path}.{key}".lstrip(".")) for key, item in value.items()}
    dtype = DTYPES.get(str(value.get("__str__")))
    if value.keys() == {"__dtype__", "__str__"} and value["__dtype__"] is True and dtype:
        return dtype
    asked = f"{value.get('__module__')}.{value.get('__name__')}" if "__type__" in value else json.dumps(value)
    raise ValueError(f"{CONFIG} requires {asked} at {path or 'its top'}, which is not data; refused")


@dataclass
class OriginalDecider:
    """The policy at inference, and the trained MLP if there is one.

    Attributes:
        policy: Name of the policy, `decider` or `oracle`.
        max_depth: Smaller one of the maximum depths of the model and its decider.
        arguments: All arguments of the MLP; without an MLP only `threshold` and `dtype`.
        state: Tensors of the MLP by name, or None.
    """

    policy: str
    max_depth: int
    arguments: dict[str, Any]
    state: dict[str, Tensor] | None


def read_decider(source: Path, config: dict[str, Any], notes: list[str]) -> OriginalDecider:
    """Return the decider that the original implementation uses at inference.

    Args:
        source: Directory of the checkpoint.
        config: Result of `read_config`.
        notes: List to which the function appends notes about unexpected properties.

    Raises:
        ValueError: The decider is missing or damaged, is not plain data, or has a class that a TaH model does not have.
    """
    given = dict(config.get("iter_decider_kwargs") or {})
    path = decider_file(source, given.pop("load_path", None))
    saved = read_pickle(path) if path.is_file() else None
    trained = config.get("iter_decider") or (saved["class"] if saved else None)
    if saved is None:
        given = {"max_iter": config["max_iter"]} | given
    elif not given and saved["class"] == trained:
        given = saved["init_args"]
        notes.append(f"{CONFIG} has no iter_decider_kwargs; the arguments saved in {DECIDER} are used")
    arguments = arguments_of(trained, given, "iter_decider", ARGUMENTS)
    deciding, stop = config.get("eval_iter_decider") or "iter_decider", arguments["max_iter"]
    if deciding == "iter_decider":
        deciding = trained
    else:
        fresh = config.get("eval_iter_decider_kwargs") or {}
        fresh_arguments = {"max_iter": config["max_iter"]} | fresh
        stop = arguments_of(deciding, fresh_arguments, "eval_iter_decider", ARGUMENTS)["max_iter"]
        if deciding == trained == MLP:
            arguments = arguments_of(MLP, given | fresh, "eval_iter_decider", ARGUMENTS)
            notes.append(
                "eval_iter_decider names a class, which the original would build untrained; this one is trained"
            )
    if MLP in (trained, deciding) and (saved is None or trained != MLP):
        missing = f"{path.name} is missing" if saved is None else f"iter_decider is {trained}"
        raise ValueError(f"{CONFIG} requires a trained {MLP}, but {missing}")
    if stop < config["max_iter"]:
        notes.append(f"max_iter is {config['max_iter']}, but the decider stops at its own {stop}: max_depth is {stop}")
    policy, depth = "oracle" if deciding == LABEL else "decider", min(stop, config["max_iter"])
    if saved is None or trained != MLP:
        return OriginalDecider(policy, depth, {"threshold": 0.5, "dtype": torch.float32}, None)
    weight = saved["state_dict"].get("threshold")
    if weight is not None and weight.numel() == 1 and abs(weight.item() - arguments["threshold"]) > 4e-3:
        used = f"the config's {arguments['threshold']}"
        notes.append(f"the threshold among the weights, {weight.item():.6g}, is not used: {used} is")
    state = {name: tensor for name, tensor in saved["state_dict"].items() if name not in {"threshold", *given}}
    return OriginalDecider(policy, depth, arguments, state)


def arguments_of(name: Any, given: dict[str, Any], entry: str, known: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the arguments of a class, completed with defaults.

    Args:
        name: Name of the class.
        given: Arguments in the file.
        entry: Entry of `tah_config.json` that names the class.
        known: Arguments of each class with their defaults.

    Raises:
        ValueError: The class or an argument is unknown, or an argument has another type than its default.
    """
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"{CONFIG}: {entry} is {name!r}, which a TaH model does not have; only {' or '.join(known)}")
    for key, value in given.items():
        default = known[name].get(key)
        if default is None:
            raise ValueError(f"{CONFIG}: {entry}_kwargs.{key} is not an argument of {name}")
        kinds = (int, float) if type(default) is float else (type(default),)
        fits = type(value) in kinds
        if fits and isinstance(default, list):
            fits = value != [] and all(type(item) is int for item in value)
        if not fits:
            raise ValueError(f"{CONFIG}: {entry}_kwargs.{key} is {value!r}, which {name} does not take")
    return known[name] | given


def decider_file(source: Path, load_path: Any) -> Path:
    """Return the path of the decider. `iter_decider_kwargs.load_path` may change it, but only within the checkpoint."""
    if load_path is None:
        return source / DECIDER
    inside = os.path.normpath(load_path) if isinstance(load_path, str) else ".."
    if os.path.isabs(inside) or inside.split(os.sep)[0] == "..":
        raise ValueError(f"{CONFIG}: iter_decider_kwargs.load_path is {load_path!r}, not a path inside the checkpoint")
    path = source / inside
    path = path / DECIDER if path.is_dir() else path
    if not path.is_file():
        raise ValueError(f"{CONFIG}: iter_decider_kwargs.load_path is {load_path!r}, but there is no decider")
    return path


def read_pickle(path: Path) -> dict[str, Any]:
    """Return the `{"class": str, "state_dict": {name: tensor}, "init_args": {...}}` of a decider or an updater.

    Raises:
        ValueError: The file is damaged, has another content, or requires objects other than tensors, dtypes and
            containers.
    """
    with open(path, "rb") as file:
        if (
            file.read(4) != b"PK\x03\x04"
        ):  # the format of torch.save; torch also reads bare pickles, which are not supported here
            raise ValueError(f"{path.name} is not an archive written by torch.save; refused")
    admitted = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        text = str(error)
        asked = re.search(r"GLOBAL (\S+)", text)
        what = f"requires {asked[1]}" if asked else f"holds more than tensors and containers ({_reason(text)})"
        raise ValueError(f"{path.name} {what}, which is not data; refused") from None
    except Exception as error:  # damaged bytes raise errors of many types
        raise ValueError(f"{path.name} is damaged or truncated: torch.load cannot read it") from error
    finally:
        torch.serialization.add_safe_globals(admitted)
    return _checked(data, path.name)


def _reason(text: str) -> str:
    """Return the reason in torch's message, which is its second-last paragraph."""
    paragraphs = [part.strip().splitlines()[0] for part in text.split("\n\n") if part.strip()]
    return paragraphs[-2].rstrip(".") if len(paragraphs) > 1 else "a pickle that torch refuses"


def _checked(data: Any, name: str) -> dict[str, Any]:
    """Check the types of all parts of the dictionary in a file `name`, and return it."""
    parts = {"class": str, "state_dict": dict, "init_args": dict}
    if not isinstance(data, dict) or any(not isinstance(data.get(key), kind) for key, kind in parts.items()):
        raise ValueError(f"{name} does not hold class, state_dict and init_args")
    for key, tensor in data["state_dict"].items():
        plain = isinstance(tensor, Tensor) and tensor.device.type == "cpu" and tensor.layout == torch.strided
        if not isinstance(key, str) or not plain or not tensor.is_floating_point():
            raise ValueError(f"{name}: state_dict entry {key!r} is not a dense tensor of floating point numbers")
    return data
