"""Count where the host waits for the GPU in the second pass of a served model."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tah.vllm import model as serving


@contextmanager
def watched(places: Counter[str]) -> Iterator[None]:
    """Count, by line, the operations inside that wait for the GPU; without a GPU nothing is counted.

    PyTorch warns of each. It knows most operations that wait, not all.
    """
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        _warn(True)
        try:
            yield
        finally:
            _warn(False)
    at = [f"{Path(one.filename).name}:{one.lineno}" for one in seen if "called a synchronizing" in str(one.message)]
    places.update(at)


def _warn(on: bool) -> None:
    if torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("warn" if on else "default")


def control() -> bool:
    """Return whether the watch sees a wait that is known; true without a GPU."""
    if not torch.cuda.is_available():
        return True
    places: Counter[str] = Counter()
    with watched(places):
        torch.ones(1, device="cuda").item()
    return [at.partition(":")[0] for at in places] == [Path(__file__).name]


class WatchedSteps:
    """Runs the steps of a model with a watch, and has a row for steps of each kind.

    The wait of `to_host`, the only one that is meant to be, is counted for itself.

    Args:
        model: The served model.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.stock, self.copy = model, model.run_step, serving.to_host
        self.told = 0  # copies to the host of the running step
        self.steps: dict[str, Counter[str]] = {"prefill": Counter(), "decode": Counter()}
        self.places: dict[str, Counter[str]] = {kind: Counter() for kind in self.steps}

    def __enter__(self) -> WatchedSteps:
        self.model.run_step, serving.to_host = self._run, self._to_host
        return self

    def __exit__(self, *_: object) -> None:
        del self.model.run_step
        serving.to_host = self.copy

    def _to_host(self, x: Tensor) -> Any:
        self.told += 1
        _warn(False)
        try:
            return self.copy(x)
        finally:
            _warn(True)

    def _run(self, step: Any, depth_one: Callable[[], Any]) -> Tensor:
        out = depth_one()  # with runner V1 this is vLLM's own pass, which may wait
        kind = "decode" if step.tokens == len(step.request_ids) else "prefill"
        self.told = 0
        with watched(self.places[kind]):
            hidden = self.stock(step, lambda: out)
        seen = self.steps[kind]
        seen["steps"] += 1
        seen["with hard tokens"] += bool(self.model.report.taken)
        seen["copies to the host"] = max(seen["copies to the host"], self.told)
        return hidden

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield a row per kind of step. `ok`: some have hard tokens, and the host waited once in each at most."""
        for kind, seen in self.steps.items():
            places = self.places[kind]
            row = {"kind": kind, **seen, "other waits": ", ".join(f"{at} ({n})" for at, n in places.items()) or "none"}
            yield row | {"ok": not places and seen["copies to the host"] == 1 and seen["with hard tokens"] > 0}
