"""A stand-in for the hub: its cache on this machine, laid out as huggingface_hub does, with no network behind it."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest

FIRST, SECOND = "1" * 40, "2" * 40


def publish(cache: Path, repository: str, source: Path, commit: str = FIRST) -> Path:
    """Put the files of `source` into the cache as the newest revision of `repository`; its snapshot."""
    folder = cache / f"models--{repository.replace('/', '--')}"
    snapshot = folder / "snapshots" / commit
    for path in sorted(source.rglob("*")):
        if path.is_file():
            blob = folder / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
            blob.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, blob)
            link = snapshot / path.relative_to(source)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(commit)
    return snapshot


def use(cache: Path, ours: Path, patch: pytest.MonkeyPatch) -> None:
    """Have this process take `cache` for the hub's and `ours` for tah's, and no network."""
    patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    patch.setenv("HF_HUB_OFFLINE", "1")  # for other processes; this one has read it
    patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    patch.setenv("TAH_CACHE", str(ours))
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HF_ENDPOINT"):
        patch.delenv(name, raising=False)
