"""Check a directory of unknown origin before the model in it is loaded.

The check reads `config.json`, the index and the headers of the safetensors files. It builds the configured model on the
meta device, without memory for weights. The number of layers is limited by the files, since a configuration may contain
ten million of them. Single tensors that are missing or have another shape are found by the loaders, which then allocate
little more than the files contain.
"""

from __future__ import annotations

import math
import os
import re
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.quantizers import AutoHfQuantizer

from ..config import KERNELS, TaHConfig, check_family, current_tensor, parts, refuse_kernels, without_kernels
from ..core.compat import LOADING, set_attention
from ..errors import first_line, some
from ..files import parse_json

MOST = 64 * 2**20  # most bytes of a JSON file beside the weights; the index of DeepSeek-V3 has about 8 MB
SLACK = 2**20  # allowed difference in elements between files and model; the loaders find smaller ones
BUFFERS = 2**30  # bytes of buffers that are in no file, such as the causal masks of older families
LAYERS = re.compile(r"(num_|n_)?(hidden_|encoder_|decoder_)?layers?")
PICKLE = re.compile(r"(?!iter_decider).*\.(bin|pt|pth|ckpt|pkl|bin\.index\.json)")


@dataclass
class Held:
    """Contents of weight files according to their headers: dtype and shape of each tensor by its name."""

    tensors: dict[str, tuple[str, list[int]]] = field(default_factory=dict)
    size: int = 0  # bytes of the files

    @property
    def elements(self) -> int:
        return sum(math.prod(shape) for _, shape in self.tensors.values())


def check_model(
    directory: str | Path, build: Callable[[], Any] | None = None, options: Mapping[str, Any] | None = None
) -> Held:
    """Check that the configuration of a model fits its weight files, and return the contents of the files.

    Args:
        directory: Directory with `config.json` and safetensors weights.
        build: Function that builds the configured model; called once, on the meta device, after all other checks.
        options: Options of `from_pretrained`: the `variant` of the weights, kernels, and `trust_remote_code`.

    Raises:
        ValueError: There are no safetensors weights, a file is damaged or names a forbidden file, or the configuration
            describes more than the files contain.
    """
    source, options = Path(directory), options or {}
    described = checked_config(source, options)
    held = read_heads(weight_files(source, described, options.get("variant") or ""))
    check_counts(described, len(held.tensors), f"{source}/config.json")
    if build is not None:
        _check_fit(build_empty(build, len(held.tensors), f"{source}/config.json"), held, source)
    return held


def checked_config(directory: str | Path, options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the `config.json` of a model after a check of its kernels, dtypes and family.

    Args:
        directory: Directory of the model.
        options: Options of `from_pretrained`: kernels that replace the configuration's, and `trust_remote_code`, with
            which the model's own code may define its family.

    Raises:
        ValueError: The file is missing or damaged, names code to download, or has an unknown family or dtype.
    """
    path, options = Path(directory, "config.json"), options or {}
    if not path.is_file():
        raise ValueError(f"{directory} is not a model: it has no config.json")
    described = read_json(path)
    given = [name for name in KERNELS if options.get(name) is not None]
    own = described.get("model_type") == TaHConfig.model_type
    refuse_kernels(without_kernels(described, given) if own and given else described, str(path), given)
    for part in (described, described.get("base_config")):
        if not isinstance(part, dict):
            continue
        for name in ("dtype", "torch_dtype"):
            if isinstance(value := part.get(name), str) and not _is_float(value):
                raise ValueError(f"{path}: {name}={value[:40]!r} is no floating point type of torch, such as bfloat16")
        if part.get("model_type") is not None and not options.get("trust_remote_code"):
            try:
                check_family(part["model_type"])
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from None
    return described


def _is_float(dtype: str) -> bool:
    found = getattr(torch, dtype.removeprefix("torch."), None)
    return dtype == "auto" or (isinstance(found, torch.dtype) and found.is_floating_point)


def refuse_incomplete(info: Mapping[str, Any], what: str, advice: str = "", ignored: Collection[str] = ()) -> None:
    """Raise `ValueError` unless exactly the tensors of a model were loaded.

    Args:
        info: `output_loading_info` of transformers.
        what: Beginning of the message, such as `DIR: not a complete base`.
        advice: End of the message.
        ignored: Kinds of differences to ignore, from `missing`, `unexpected` and `mismatched`.
    """
    shapes = [f"{name} is {list(found)}, not {list(wanted)}" for name, found, wanted in info["mismatched_keys"]]
    problems = {"missing": info["missing_keys"], "unexpected": info["unexpected_keys"], "mismatched": shapes}
    for problem, keys in problems.items():
        if keys and problem not in ignored:
            word = "wrongly shaped" if problem == "mismatched" else problem
            raise ValueError(f"{what}: {word} tensors {some(keys)}{advice}")


def weight_files(directory: Path, described: dict[str, Any], variant: str = "") -> list[Path]:
    """Return the safetensors files of a model. Candidates are tried in the order of transformers.

    Raises:
        ValueError: There are no such files, one is missing, or a name is outside the directory or has another type; or
            transformers would also load files from elsewhere, or a pickle.
    """
    if (directory / "adapter_config.json").exists():
        raise ValueError(
            f"{directory} has an adapter_config.json: a PEFT adapter is not loaded on the way; merge it into its base, "
            "or remove the file"
        )
    if any(re.match(r"shard-\d{5}-model-", path.name) for path in directory.iterdir()):
        raise ValueError(f"{directory} holds a distributed checkpoint; save the model with save_pretrained")
    middle = f".{variant}" if variant else ""
    names = [f"model{middle}.safetensors", f"model.safetensors.index{middle}.json"]
    if (named := described.get("transformers_weights")) is not None:
        check_name(named, (".safetensors", ".safetensors.index.json"), f"{directory}/config.json: transformers_weights")
        names = [named]
    found = next((directory / name for name in names if (directory / name).is_file()), None)
    if found is None:
        others = sorted(path.name for path in directory.iterdir() if PICKLE.fullmatch(path.name))
        other = f"; {others[0]} is not read: a pickle can run code; save the model as safetensors" if others else ""
        raise ValueError(f"{directory} has no {names[0]}{other}")
    return shards(found) if found.suffix == ".json" else [found]


def shards(index: Path, there: bool = True) -> list[Path]:
    """Return the files in an index of shards.

    Args:
        index: Path of the index.
        there: Whether the files must exist.

    Raises:
        ValueError: The index is damaged, names files other than safetensors files of its own directory, or a required
            file is missing.
    """
    data = read_json(index)
    where = data.get("weight_map")
    if not isinstance(where, dict) or not where or not isinstance(data.get("metadata", {}), dict):
        raise ValueError(f"{index} is damaged or incomplete: it needs a weight_map, from tensors to files")
    names: dict[str, None] = {}
    for tensor, name in where.items():
        check_name(name, (".safetensors",), f"{index}: weight_map[{tensor[:80]!r}]")
        names[name] = None
    for name in names:
        if there and not (index.parent / name).is_file():
            raise ValueError(f"{index} is damaged or incomplete: {name}, which it lists, is missing; copy it again")
    return [index.parent / name for name in sorted(names)]


def check_name(name: Any, endings: tuple[str, ...], what: str) -> None:
    """Raise `ValueError` unless `name` is a plain file name with one of the endings."""
    plain = isinstance(name, str) and re.fullmatch(r"[^./\\\0\n][^/\\\0\n]*", name) is not None
    if not plain or os.path.basename(name) != name or not name.endswith(endings):
        shown = repr(name) if len(repr(name)) < 100 else f"{repr(name)[:97]}..."
        raise ValueError(f"{what} is {shown}, not a {endings[0]} file of its own directory; it is not followed")


def read_heads(files: list[Path]) -> Held:
    """Return the names, dtypes and shapes in safetensors files, read from their headers.

    Raises:
        ValueError: A file is damaged or truncated.
    """
    held = Held()
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118  # no mapping
                    part = file.get_slice(name)
                    held.tensors[name] = (part.get_dtype(), part.get_shape())
            held.size += path.stat().st_size
        except (SafetensorError, OSError, OverflowError, TypeError, ValueError) as error:
            why = f"the weights are damaged or cut short ({first_line(error)})"
            raise ValueError(f"{path} is damaged or incomplete: {why}; copy them again") from error
    return held


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file beside the weights.

    Raises:
        ValueError: The file is missing, too large, or does not contain a JSON object.
    """
    try:
        if path.stat().st_size > MOST:
            raise ValueError(f"has {path.stat().st_size:,} bytes, which no such file needs")
        data = parse_json(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError(f"{path} is damaged or incomplete: it {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} is damaged or incomplete: it is not a JSON object")
    return data


def check_counts(described: dict[str, Any], tensors: int | None, where: str) -> None:
    """Raise `ValueError` for a negative number of layers, or more layers than tensors.

    Args:
        described: Content of a `config.json`.
        tensors: Number of tensors in the weight files. None, before the files exist, allows 10,000 layers.
        where: Name of the file in messages.
    """
    most = 10_000 if tensors is None else tensors
    for part in parts(described):
        for name, value in part.items():
            if not LAYERS.fullmatch(name) or isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            if not 0 <= value <= most:
                held = "" if tensors is None else f", but the weights hold {tensors} tensors"
                raise ValueError(f"{where}: {name}={str(value)[:40]} cannot be{held}")


def build_empty(build: Callable[[], nn.Module], tensors: int | None, where: str) -> Any:
    """Build a model on the meta device and return it.

    Weights take no memory there, but modules do, so their number is limited.

    Args:
        build: Function that builds the model.
        tensors: Number of tensors in the weight files. None, before the files exist, allows a million modules.
        where: Name of the configuration in messages.

    Raises:
        ValueError: The model has too many modules or cannot be built.
    """
    try:
        with LOADING, _at_most(10**6 if tensors is None else 64 * tensors + 4096), torch.device("meta"):
            return build()
    except _TooMany:
        raise ValueError(f"{where} describes a model of more layers than its weights could fill") from None
    except Exception as error:
        line = first_line(error)
        kind = "" if isinstance(error, ValueError) else f"describes no model: {type(error).__name__}: "
        located = line.startswith(where.removesuffix("/config.json"))
        raise ValueError(line if located else f"{where}: {kind}{line}") from error


def empty_base(directory: str | Path, trust_remote_code: bool = False) -> nn.Module:
    """Build the base that a `config.json` describes, on the current device.

    It has eager attention, since kernels do not change shapes and may not be installed.

    Args:
        directory: Directory with the `config.json`.
        trust_remote_code: Whether to run Python code of the model.

    Raises:
        ValueError: Transformers has no causal language model of the family.
    """
    config = AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not trust_remote_code:
        raise ValueError(f"{directory}: transformers has no causal language model for the family {config.model_type}")
    set_attention(config, "eager")
    return AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)


def load_base(
    directory: str | Path, options: Mapping[str, Any], name: str, ignored: Collection[str] = ("unexpected",)
) -> PreTrainedModel:
    """Check a base and load it with all its tensors.

    Args:
        directory: Directory of the base.
        options: Options of `from_pretrained`.
        name: Name of the base in messages.
        ignored: Kinds of differences to ignore, from `missing`, `unexpected` and `mismatched`.

    Raises:
        ValueError: The base cannot be loaded, or tensors are missing or have another shape.
    """
    reading = dict(options)
    if reading.pop("ignore_mismatched_sizes", False):
        ignored = (*ignored, "mismatched")
    if not options.get("gguf_file"):  # a GGUF file is data, too, and only transformers reads it
        trusted = bool(options.get("trust_remote_code"))
        check_model(directory, lambda: empty_base(directory, trusted), options)
        reading["use_safetensors"] = True
    reading |= {
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,
    }  # `refuse_incomplete` raises for them, by name
    try:
        with LOADING:
            model, info = AutoModelForCausalLM.from_pretrained(directory, **reading)
    except Exception as error:
        raise ValueError(f"{name} cannot be loaded: {first_line(error)}") from error
    refuse_incomplete(info, f"{name}: not a complete base", "; copy or download it again", ignored)
    return model


class _TooMany(Exception):
    """The model has more modules than allowed."""


@contextmanager
def _at_most(modules: int) -> Iterator[None]:
    """Raise `_TooMany` if this thread registers more than the given number of modules within the block."""
    me, left = threading.get_ident(), modules

    def count(module: nn.Module, name: str, value: nn.Module | None) -> None:
        nonlocal left
        left -= threading.get_ident() == me
        if left < 0:
            raise _TooMany

    handle = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def _check_fit(model: PreTrainedModel, held: Held, source: Path) -> None:
    """Raise `ValueError` if weights are not floating point numbers, or far fewer than the model needs."""
    wanted, quantized = dict(model.named_parameters()), _is_quantized(model.config)
    # A quantized file has at most eight weights per byte.
    needed, most = sum(its.numel() for its in wanted.values()), 8 * held.size if quantized else held.elements
    if needed > 1.25 * most + SLACK:
        raise ValueError(f"{source}: config.json needs {needed:,} weights, but the files hold {most:,}")
    if (needed := sum(its.nbytes for its in model.buffers())) > BUFFERS + 4 * held.size:
        raise ValueError(f"{source}: config.json needs {needed:,} bytes beside the weights, which have {held.size:,}")
    for name, (dtype, shape) in held.tensors.items() if not quantized else ():
        parameter = wanted.get(current_tensor(name))
        floats = name.endswith(".weight") if parameter is None else parameter.is_floating_point()
        if floats and not dtype.startswith(("F", "BF")):
            raise ValueError(f"{source}: the tensor {name} has {dtype} numbers, not floating point ones")
        if parameter is not None and abs(parameter.numel() - math.prod(shape)) > SLACK:
            raise ValueError(f"{source}: config.json makes {name} {list(parameter.shape)}, the weights hold {shape}")


def _is_quantized(config: Any) -> bool:
    """Return whether transformers will read the weights as quantized; it checks these two entries."""
    found = getattr(config, "quantization_config", None)
    found = found or getattr(config.get_text_config(decoder=True), "quantization_config", None)
    try:
        return isinstance(found, dict) and bool(AutoHfQuantizer.supports_quant_method(found))
    except (ValueError, TypeError):  # the entry has no known method
        return False
