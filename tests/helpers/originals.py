"""Checkpoints of the original implementation, and what tests do to them.

Those in `tests/golden` were written by the original code itself; tests break copies of them.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.golden_tah2 import official
from tah import TaHForCausalLM, convert
from tah.checkpoints.convert import ConversionReport

GOLDEN = Path(__file__).parents[1] / "golden"


def copied(name: str, tmp_path: Path) -> Path:
    """A writable copy of checkpoint S, L or T."""
    source = tmp_path / f"original_{name}"
    if name == "T":
        return official(source)
    shutil.copytree(GOLDEN / name / "ckpt", source)
    return source


def edit(path: Path, *drop: str, **changes: Any) -> None:
    """Change or drop top-level entries of a JSON file."""
    data = json.loads(path.read_text())
    for key in drop:
        del data[key]
    path.write_text(json.dumps(data | changes))


def edit_decider_kwargs(source: Path, *drop: str, **changes: Any) -> None:
    kwargs = json.loads((source / "tah_config.json").read_text())["iter_decider_kwargs"]
    edit(source / "tah_config.json", iter_decider_kwargs={k: v for k, v in kwargs.items() if k not in drop} | changes)


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_pickle(source: Path, change: Callable[[dict[str, Any]], Any], name: str = "iter_decider.bin") -> None:
    data = torch.load(source / name, weights_only=True)
    change(data)
    torch.save(data, source / name)


def cut_in_half(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def refusal(source: Path, tmp_path: Path, **options: Any) -> str:
    """The one line with which a conversion is refused, after checking that it left nothing behind."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(ValueError) as error:
        convert(source, tmp_path / "out", **options)
    assert sorted(tmp_path.iterdir()) == before
    message = str(error.value)
    assert "\n" not in message and len(message) < 400, message
    return message


def converted(source: Path, tmp_path: Path, **options: Any) -> tuple[ConversionReport, TaHForCausalLM]:
    report = convert(source, tmp_path / "out", **options)
    return report, TaHForCausalLM.from_pretrained(tmp_path / "out")


class Command:
    """Runs a shell command when unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)
