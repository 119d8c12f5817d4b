"""Whether a directory holds a model that can be loaded: looked at before any of it is used.

What is read here is `config.json`, the index and the heads of the safetensors files. The model that the configuration
describes is built on the meta device, without memory, under a budget that the files set: a configuration may say ten
million layers, and would be believed otherwise. What remains to be found (a tensor missing here or there) is found by
the loaders, which then allocate little more than the files hold.
"""

from __future__ import annotations

import math
import os
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.nn.modules import module as hooks

from .files import parse_json

MOST = 16 * 2**20  # bytes of a JSON file beside the weights; the largest that is known has 3 MB
SLACK = 2**20  # elements that a model may have beyond those of its files; a tensor that lacks less is named by the loader
BUFFERS = 2**30  # bytes of buffers that no file holds, such as the causal masks of older families
LAYERS = re.compile(r"(num_|n_)?(hidden_|encoder_|decoder_)?layers?")
PICKLE = re.compile(r"(?!iter_decider).*\.(bin|pt|pth|ckpt|pkl|bin\.index\.json)")
KERNELS = ("attn_implementation", "experts_implementation")


@dataclass
class Held:
    """What weight files hold: dtype and shape of each tensor by its name, as their heads say."""

    tensors: dict[str, tuple[str, list[int]]] = field(default_factory=dict)
    size: int = 0  # bytes of the files

    @property
    def elements(self) -> int:
        return sum(math.prod(shape) for _, shape in self.tensors.values())


def check_model(directory: str | Path, build: Callable[[], nn.Module | None] | None = None, variant: str = "") -> Held:
    """What the weight files of a model hold, once its configuration fits them.

    Args:
        directory: with `config.json` and safetensors weights.
        build: makes the model that the configuration describes, or returns None where that is for others to refuse.
            It is called once, on the meta device, after all else.
        variant: of the weights, as transformers puts it into their names.

    Raises:
        ValueError: there are no safetensors weights, a file is damaged or is not to be followed, or the configuration
            describes more than the files hold.
    """
    source = Path(directory)
    described = read_json(source / "config.json")
    check_config(described, f"{source}/config.json")
    held = read_heads(weight_files(source, described, variant))
    check_counts(described, len(held.tensors), f"{source}/config.json")
    quantized = any("quantization_config" in part for part in _parts(described))
    if build is not None:
        model = build_empty(build, held, f"{source}/config.json", quantized)
        if model is not None and not quantized:
            _check_fit(model, held, source)
    return held


def check_adapted(directory: Path) -> None:
    """Raise `ValueError` for a directory that transformers would complete from elsewhere, or with a pickle."""
    if (directory / "adapter_config.json").exists():
        raise ValueError(
            f"{directory} has an adapter_config.json: a PEFT adapter is not loaded on the way; merge it into its base, "
            "or remove the file"
        )
    if directory.is_dir() and any(re.match(r"shard-\d{5}-model-", path.name) for path in directory.iterdir()):
        raise ValueError(f"{directory} holds a distributed checkpoint; save the model with save_pretrained")


def weight_files(directory: Path, described: dict[str, Any], variant: str = "") -> list[Path]:
    """The safetensors files of a model, in the order in which transformers looks for them.

    Raises:
        ValueError: there are none, one is missing, or a name leads out of the directory or to another kind of file.
    """
    check_adapted(directory)
    middle = f".{variant}" if variant else ""
    names = [f"model{middle}.safetensors", f"model.safetensors.index{middle}.json"]
    if (named := described.get("transformers_weights")) is not None:
        check_name(named, (".safetensors", ".safetensors.index.json"), f"{directory}/config.json: transformers_weights")
        names = [named]
    found = next((directory / name for name in names if (directory / name).is_file()), None)
    if found is None:
        others = sorted(path.name for path in directory.iterdir() if PICKLE.fullmatch(path.name))
        other = f"; {others[0]} is not read, since a pickle can run code: save the model as safetensors" if others else ""
        raise ValueError(f"{directory} has no {names[0]}{other}")
    return shards(found) if found.suffix == ".json" else [found]


def shards(index: Path, there: bool = True) -> list[Path]:
    """The files that an index of shards names.

    Args:
        there: whether they have to be there.

    Raises:
        ValueError: it is damaged, or names anything but safetensors files of its own directory, all of them there.
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
            raise ValueError(f"{index} is damaged or incomplete: {name}, which it lists, is missing; copy the shards again")
    return [index.parent / name for name in sorted(names)]


def check_name(name: Any, endings: tuple[str, ...], what: str) -> None:
    """Raise `ValueError` unless `name` is the plain name of a file of one of these kinds."""
    plain = isinstance(name, str) and re.fullmatch(r"[^./\\\0\n][^/\\\0\n]*", name) is not None
    if not plain or os.path.basename(name) != name or not name.endswith(endings):
        shown = repr(name) if len(repr(name)) < 100 else f"{repr(name)[:97]}..."
        raise ValueError(f"{what} is {shown}, not a {endings[0]} file of its own directory; it is not followed")


def read_heads(files: list[Path]) -> Held:
    """What safetensors files hold, without their contents.

    Raises:
        ValueError: a file is damaged or cut short.
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
            line = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
            raise ValueError(f"{path} is damaged or incomplete: the weights are damaged or cut short ({line}); copy them again") from error
    return held


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object that comes with weights.

    Raises:
        ValueError: it is missing, too large, or something else.
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


def check_config(described: dict[str, Any], where: str) -> None:
    """Raise `ValueError` for a configuration that names code to download, or a family that nobody knows."""
    from .config import check_family

    for part in _parts(described):
        for name, value in part.items():
            if name.lstrip("_").startswith(KERNELS) and "/" in str(value):
                raise ValueError(f"{where} asks for the kernel {str(value)[:100]!r}; pass {name.lstrip('_')} yourself if meant")
    for part in (described, described.get("base_config")):
        family = part.get("model_type") if isinstance(part, dict) else None
        if family is not None:
            try:
                check_family(family)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None


def check_counts(described: dict[str, Any], tensors: int | None, where: str) -> None:
    """Raise `ValueError` for more layers than there are tensors, or fewer than none.

    Args:
        tensors: in the weight files; None where they are not there yet, and anything that was ever built will do.
    """
    most = 10_000 if tensors is None else tensors
    for part in _parts(described):
        for name, value in part.items():
            if not LAYERS.fullmatch(name) or isinstance(value, bool) or not isinstance(value, (int, float)):
                continue
            if not 0 <= value <= most:
                held = "" if tensors is None else f", but the weights hold {tensors} tensors"
                raise ValueError(f"{where}: {name}={str(value)[:40]} cannot be{held}")


def build_empty(build: Callable[[], nn.Module | None], held: Held | None, where: str, quantized: bool = False) -> Any:
    """The model on the meta device, as long as it is of a size that the files could fill.

    Args:
        held: None where no files are there yet; then anything up to a trillion parameters is built.

    Raises:
        ValueError: it is larger, or cannot be built.
    """
    elements, modules, buffers = 10**12, 10**6, 64 * BUFFERS
    if held is not None:
        # Eight weights in a byte are the most that a quantized file can hold. An output layer that will be tied to the
        # embedding has a weight of its own at first, hence twice the elements.
        elements = 8 * held.size if quantized else 2 * held.elements + SLACK
        modules, buffers = 64 * len(held.tensors) + 4096, BUFFERS + 4 * held.size
    try:
        with _budget(elements, modules, buffers), torch.device("meta"):
            return build()
    except _TooLarge as error:
        raise ValueError(f"{where} describes a model of more {error} than its weights could fill") from None
    except Exception as error:
        line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        line = line if len(line) <= 300 else f"{line[:297]}..."
        kind = "" if isinstance(error, ValueError) else f"describes no model: {type(error).__name__}: "
        raise ValueError(line if line.startswith(where) else f"{where}: {kind}{line}") from error


class _TooLarge(Exception):
    """The budget is spent; the message says of what."""


def empty_base(directory: str | Path) -> nn.Module | None:
    """The base that a `config.json` describes; None where transformers has no causal language model of the family."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
    known = type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    return AutoModelForCausalLM.from_config(config, trust_remote_code=False) if known else None


@contextmanager
def _budget(elements: int, modules: int, buffers: int) -> Iterator[None]:
    """Count what this thread puts into modules, and raise where it becomes more than allowed."""
    me, left, seen = threading.get_ident(), {"parameters": elements, "layers": modules, "buffers": buffers}, {}

    def spend(what: str, value: Any, amount: int) -> None:
        if threading.get_ident() == me and value is not None and id(value) not in seen:
            seen[id(value)] = value  # kept, or another object might get its number
            left[what] -= amount
            if left[what] < 0:
                raise _TooLarge(what)

    handles = [
        hooks.register_module_module_registration_hook(lambda module, name, value: spend("layers", value, 1)),
        hooks.register_module_parameter_registration_hook(
            lambda module, name, value: spend("parameters", value, 0 if value is None else value.numel())
        ),
        hooks.register_module_buffer_registration_hook(
            lambda module, name, value: spend("buffers", value, 0 if value is None else value.nbytes)
        ),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _check_fit(model: nn.Module, held: Held, source: Path) -> None:
    """Raise `ValueError` where weights are no floating point numbers, or far fewer than the model needs."""
    wanted = dict(model.named_parameters())
    for name, (dtype, shape) in held.tensors.items():
        parameter = wanted.get(name)
        floats = name.endswith(".weight") if parameter is None else parameter.is_floating_point()
        if floats and not dtype.startswith(("F", "BF")):
            raise ValueError(f"{source}: the tensor {name} has integers or the like ({dtype}), not floating point numbers")
        if parameter is not None and parameter.numel() > math.prod(shape) + SLACK:
            raise ValueError(f"{source}: config.json makes {name} {list(parameter.shape)}, but the weights hold {shape}")
    if (needed := sum(parameter.numel() for parameter in wanted.values())) > 1.25 * held.elements + SLACK:
        raise ValueError(f"{source}: config.json needs {needed:,} weights, but the files hold {held.elements:,}")


def _parts(described: Any) -> Iterator[dict[str, Any]]:
    """The objects of a configuration: itself, and those that stand in it, however deep."""
    todo = [described]
    while todo:
        part = todo.pop()
        if isinstance(part, dict):
            yield part
            todo.extend(part.values())
        elif isinstance(part, list):
            todo.extend(item for item in part if isinstance(item, (dict, list)))
