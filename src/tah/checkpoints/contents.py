"""What a result was made from: hashes of files and models, versions; and whether it is still as it was written."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import SafetensorError, safe_open

from ..config import former_tensor

if TYPE_CHECKING:
    from torch import nn

LARGE = 64 * 2**20  # bytes; of larger files size and time count, and not every byte
LOGS = ("checkpoints", "tensorboard")  # in a result, but nobody builds on them: they may be deleted
WORDS = (".md", ".png")  # as these


def contents(source: str | None, names: Iterable[str] | None = None) -> str | None:
    """What a local file or directory holds, as a hash; any other name as it is.

    Files of more than 64 MB count by size and time of change, smaller ones by their bytes.

    Args:
        source: the file, the directory or the name.
        names: those files of the directory that count, where they are there; by default all that are not hidden.
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


def weights_fingerprint(model: nn.Module, of_base: bool = False) -> str:
    """A hash of up to 1024 values of every weight: it tells a model from the same model after more training.

    Args:
        of_base: leave LoRA adapters out, and round to bfloat16, so that a base has the same hash in every precision.
    """
    digest = hashlib.sha256() if of_base else hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        if of_base and ".lora_" in name:
            continue
        digest.update(former_tensor(name).encode())  # so that results of before 0.2 can be continued
        if not parameter.is_meta:
            values = parameter.detach().flatten()[:: max(1, parameter.numel() // 1024)].cpu()
            digest.update((values.bfloat16() if of_base else values).float().numpy().tobytes())
    return digest.hexdigest()


def version_of(name: str) -> str | None:
    """The version of a library that is installed."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # tah may run from a source tree
        return sys.modules["tah"].__version__ if name == "tah" else None


def sizes_of(result: Path) -> dict[str, int]:
    """Size of each file of a result that others build on."""
    found = {}
    for path in sorted(result.rglob("*")):
        inside = path.relative_to(result).parts
        hidden = any(part.startswith(".") for part in inside)
        if path.is_file() and not hidden and not set(inside) & set(LOGS) and path.suffix not in WORDS:
            found["/".join(inside)] = path.stat().st_size
    return found


def wrong(path: Path, size: int) -> str | None:
    """How a file differs from what was written, in words. JSON may be edited (`tah tune` does), but must be JSON."""
    if not path.is_file():
        return "is missing"
    found = path.stat().st_size
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "np"):  # reads the head alone
                pass
        elif path.suffix == ".json" and found != size:
            json.loads(path.read_text("utf-8"))
            return None
    except (SafetensorError, ValueError, OSError):
        return "is damaged"
    return None if found == size else f"has {found} bytes, not {size}"
