"""The depth of the running pass: a context variable, entered with `with at_depth(d)`.

It is per thread and restored on exit, so two threads may use one model at different depths, and nothing about the
modules is ever toggled. LoRA (`lora.py`) and the attention of a flash kernel (`masks.py`) depend on it.
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
    """Run the base at this depth: LoRA is active inside iff `depth` > 1.

    Args:
        around: makes a context to run the pass in, and each replay of a layer of it.
    """
    token = _running.set(_Pass(depth, around))
    try:
        with around():
            yield
    finally:
        _running.reset(token)


def current_depth() -> int:
    """Depth of the pass that is running in this thread (1 outside of any)."""
    return _running.get().depth


def replay_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """`context_fn` of `torch.utils.checkpoint`: a replayed layer runs as it first ran."""
    running = _running.get()
    return nullcontext(), at_depth(running.depth, running.around)
