"""Record the sources of a result (hashes, versions, sizes), and check that its files are unchanged."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open

from ..config import former_tensor
from ..core.quantised import is_packed, is_quantised_layer, plain_values

if TYPE_CHECKING:
    from torch import nn

    from ..model import TaHForCausalLM

LARGE = 64 * 2**20  # bytes; larger files count by size and time of change
LOGS = ("checkpoints", "tensorboard")  # parts of a result that no later step reads; a user may delete them
WORDS = (".md", ".png")  # suffixes of files that no later step reads


def contents(source: str | None, names: Iterable[str] | None = None) -> str | None:
    """Return a hash of a local file or directory; any other name is returned unchanged.

    Files of more than 64 MB count by size and time of change, smaller ones by their bytes.

    Args:
        source: Path of a file or directory, or a name such as a hub id.
        names: Names of the files in the directory to hash, if they exist. By default all files that are not hidden.
    """
    path = Path(source or "")
    if not source or not path.exists():
        return source
    digest = hashlib.sha256()
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    if names is not None:
        files = sorted({path / name for name in names})
    for file in files:
        inside = file.relative_to(path).parts
        if not file.is_file() or any(part.startswith(".") for part in inside):
            continue
        stat = file.stat()
        digest.update(json.dumps([inside, stat.st_size]).encode())
        digest.update(str(stat.st_mtime_ns).encode() if stat.st_size > LARGE else file.read_bytes())
    return f"files {digest.hexdigest()[:12]}"


def weights_fingerprint(model: nn.Module, of_base: bool = False, dtype: torch.dtype | None = None) -> str:
    """Return a hash of about 1024 values of every weight. Further training of the model changes the hash.

    Args:
        model: Model to hash.
        of_base: Whether to skip LoRA and round to bfloat16, so that a base has the same hash in every precision.
            Quantised weights are skipped, too: another machine may quantise a few of them otherwise.
        dtype: Precision to round to, for the hash of the model after a load in that precision.
    """
    digest = hashlib.sha256() if of_base else hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        if of_base and (".lora_" in name or is_packed(parameter)):
            continue
        digest.update(former_tensor(name).encode())  # results of versions before 0.2 keep their hash
        if not parameter.is_meta:
            values = plain_values(parameter.detach()).flatten()[:: max(1, parameter.numel() // 1024)].cpu()
            values = values.to(torch.bfloat16 if of_base else dtype or values.dtype)
            digest.update(values.float().numpy().tobytes())
    return digest.hexdigest()


def parameter_counts(model: TaHForCausalLM) -> dict[str, int]:
    """Return the number of parameters of each part: `base`, `adapter` (LoRA), `decider` and `linear_maps`.

    A model with a network of the next input also has the part `next_input`.

    A quantised layer has the weights of the layer that it replaces; its packed numbers and scales do not count.
    """
    counts = {name: parameter.numel() for name, parameter in model.named_parameters()}
    for path, layer in model.named_modules():
        if is_quantised_layer(layer):
            for name, _ in layer.named_parameters(path, recurse=False):
                counts.pop(name, None)
            inputs, outputs = layer.in_features, layer.out_features
            counts[f"{path}.weight"] = inputs * outputs + (0 if getattr(layer, "bias", None) is None else outputs)
    sizes = {"base": 0, "adapter": 0, "decider": 0, "linear_maps": 0}
    for name, size in counts.items():
        part = "decider" if name.startswith("decider.") else "adapter" if "lora_" in name else "base"
        maps = name.startswith(("next_input_map.", "output_map."))
        part = "next_input" if name.startswith("next_input_mlp.") else "linear_maps" if maps else part
        sizes[part] = sizes.get(part, 0) + size
    return sizes


def version_of(name: str) -> str | None:
    """Return the installed version of a package; None if it is not installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # tah may run from a source tree
        return sys.modules["tah"].__version__ if name == "tah" else None


def sizes_of(result: Path) -> dict[str, int]:
    """Return the sizes in bytes of the files of a result that later steps read, by relative path."""
    found = {}
    for path in sorted(result.rglob("*")):
        inside = path.relative_to(result).parts
        hidden = any(part.startswith(".") for part in inside)
        if path.is_file() and not hidden and not set(inside) & set(LOGS) and path.suffix not in WORDS:
            found["/".join(inside)] = path.stat().st_size
    return found


def wrong(path: Path, size: int) -> str | None:
    """Return how a file differs from its recorded state; None if it does not.

    A JSON file may have another size, since `tah tune` edits it, but must remain valid JSON.

    Args:
        path: Path of the file.
        size: Recorded size in bytes.
    """
    if not path.is_file():
        return "is missing"
    found = path.stat().st_size
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "np"):  # reads only the header
                pass
        elif path.suffix == ".json" and found != size:
            json.loads(path.read_text("utf-8"))
            return None
    except (SafetensorError, ValueError, OSError):
        return "is damaged"
    return None if found == size else f"has {found} bytes, not {size}"
