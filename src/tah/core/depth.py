"""The depth of the running pass, a context variable: `with at_depth(d)`.

Each thread has its value, and the value is restored on exit. Two threads can therefore use one model at different
depths, and no module changes. LoRA (`lora.py`) and the attention of flash kernels (`masks.py`) depend on the depth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class _Pass:
    depth: int = 1
    around: Callable[[], AbstractContextManager[Any]] = nullcontext


_running: ContextVar[_Pass] = ContextVar("tah_pass", default=_Pass())  # noqa: B039 - frozen


@contextmanager
def at_depth(depth: int, around: Callable[[], AbstractContextManager[Any]] = nullcontext) -> Iterator[None]:
    """Set the depth of the pass that runs inside. LoRA is on if `depth` > 1, method.md (6).

    Args:
        depth: Depth, >= 1.
        around: Function that makes another context, for the pass and for each replay of one of its layers.
    """
    token = _running.set(_Pass(depth, around))
    try:
        with around():
            yield
    finally:
        _running.reset(token)


def current_depth() -> int:
    """Return the depth of the pass that runs in this thread, 1 if there is none."""
    return _running.get().depth


def replay_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the `context_fn` of `torch.utils.checkpoint`, so that a replayed layer runs at its first depth."""
    running = _running.get()
    return nullcontext(), at_depth(running.depth, running.around)
