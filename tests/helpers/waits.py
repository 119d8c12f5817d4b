"""Find, on a CPU, what a GPU would make slow or wrong: tensors made on no device, and operations that wait for it."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

MADE = {torch.tensor, torch.as_tensor, torch.zeros, torch.ones, torch.empty, torch.full, torch.arange, torch.rand}
READ = {"tolist", "item", "numpy", "cpu", "__bool__", "__int__", "__index__", "__float__", "__array__", "__contains__"}
SIZED_BY_VALUES = ("nonzero", "masked_select", "unique", "_unique2", "bincount", "repeat_interleave")


def _place() -> str | None:
    """The line of our own code that called the operation; None if another library did."""
    frame: Any = sys._getframe(2)
    while frame is not None and ("/torch/" in frame.f_code.co_filename or frame.f_code.co_filename == __file__):
        frame = frame.f_back
    name = "" if frame is None else frame.f_code.co_filename
    return f"{name.rpartition('/tah/')[2]}:{frame.f_lineno}" if "/src/tah/" in name else None


class _Calls(TorchFunctionMode):
    def __init__(self, bare: Counter[str], waits: Counter[str]) -> None:
        super().__init__()
        self.bare, self.waits = bare, waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in MADE and kwargs.get("device") is None and (place := _place()):
            self.bare[place] += 1
        if getattr(func, "__name__", "") in READ and (place := _place()):
            self.waits[place] += 1
        return func(*args, **kwargs)


class _Kernels(TorchDispatchMode):
    def __init__(self, waits: Counter[str]) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        waits = name.startswith(SIZED_BY_VALUES)
        if name.startswith(("index.Tensor", "index_put")):
            waits = any(index is not None and index.dtype == torch.bool for index in args[1])
        if waits and (place := _place()):
            self.waits[place] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def watched() -> Iterator[tuple[Counter[str], Counter[str]]]:
    """Lines of our own code inside that make a tensor without a device, and that wait for a device, with counts."""
    bare: Counter[str] = Counter()
    waits: Counter[str] = Counter()
    with _Calls(bare, waits), _Kernels(waits):
        yield bare, waits


@dataclass
class WatchedStep:
    """What one step of a served model did."""

    iterates: bool  # whether a request of the step may iterate
    taken: int  # tokens that iterate
    copies: int  # calls of `to_host`, the one place where the host may wait
    bare: dict[str, int]  # by line of our own code: tensors made without a device
    waits: dict[str, int]  # by line: other operations that wait


def watch_steps(monkeypatch: Any, model: Any) -> list[WatchedStep]:
    """Watch the steps that a served model runs from now on, and return the list that they are added to."""
    from tah.vllm import model as serving

    steps: list[WatchedStep] = []
    copies: list[int] = []
    to_host, run_step = serving.to_host, model.run_step

    def counted(x: Any) -> Any:
        copies.append(1)
        with torch._C.DisableTorchFunction():
            return to_host(x)

    def run(step: Any, depth_one: Any) -> Any:
        copies.clear()
        with watched() as (bare, waits):
            hidden = run_step(step, depth_one)
        iterates = any(one.iterates for one in step.options)
        steps.append(WatchedStep(iterates, len(model.report.taken), len(copies), dict(bare), dict(waits)))
        return hidden

    monkeypatch.setattr(serving, "to_host", counted)
    monkeypatch.setattr(model, "run_step", run)
    return steps
