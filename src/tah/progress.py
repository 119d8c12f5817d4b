"""Progress of long work: a bar on a terminal, elsewhere a line now and then, for logs."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

EVERY = 30.0  # seconds between lines where there is no terminal


class Work:
    """One piece of long work: so many units of so many are done. A context manager.

    Args:
        console: where to show it; None shows nothing.
        title: what is done: `labelling`.
        total: units there are; None where nobody knows yet.
        unit: what is counted: `rows`; empty where nothing is.
        done: units that were there before.
        clock: seconds of a clock that never goes back.
    """

    def __init__(
        self,
        console: Console | None,
        title: str,
        total: int | None,
        unit: str,
        done: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.console, self.title, self.total, self.unit, self.clock = console, title, total, unit, clock
        self.first = self.done = done
        self.tokens = 0
        self.note = ""  # shown after the counts: `loss 1.2`
        self.begun = self.shown = clock()
        self.ended: float | None = None
        self.bar: Bar | None = None
        if console is not None and console.is_terminal:
            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.fields[state]}", markup=False),
            )
            self.bar = Bar(*columns, console=console, transient=True)

    def __enter__(self) -> Work:
        if self.bar is not None:
            self.bar.start()
            self.bar.add_task(self.title, total=self.total, completed=self.done, state=str(self))
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        self.ended = self.clock()
        if self.bar is not None:
            self.bar.stop()
        if kind is None:
            self._line()

    def advance(self, units: int = 1, tokens: int = 0) -> None:
        """So many more units, of so many tokens, are done."""
        self.done, self.tokens = self.done + units, self.tokens + tokens
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=self.done, state=str(self))
        elif self.clock() - self.shown >= EVERY:
            self._line()

    @property
    def tokens_per_second(self) -> float:
        """By this process, until now or the end."""
        return self.tokens / max(self._seconds, 1e-9)

    @property
    def _seconds(self) -> float:
        return (self.clock() if self.ended is None else self.ended) - self.begun

    def _line(self) -> None:
        self.shown = self.clock()
        if self.console is not None:
            line = f"{self.title}: {self}" if self.unit else self.title
            self.console.print(line, highlight=False, soft_wrap=True)

    def __str__(self) -> str:
        """`3 of 12 rows, 1,204 tokens/s, 0:02:10 left`"""
        if not self.unit:
            return self.note
        parts = [f"{self.done:,} {self.unit}" if self.total is None else f"{self.done:,} of {self.total:,} {self.unit}"]
        if self.tokens:
            parts.append(f"{self.tokens_per_second:,.0f} tokens/s")
        fresh = self.done - self.first
        if self.total is not None and 0 < fresh and self.done < self.total and self.ended is None:
            parts.append(f"{timedelta(seconds=round(self._seconds * (self.total - self.done) / fresh))} left")
        return ", ".join([*parts, self.note] if self.note else parts)


class Reporter:
    """Where long work reports: every function of the library that takes a while has an argument `progress`.

    Args:
        console: a bar on a terminal, elsewhere a line every `EVERY` seconds and one at the end; None reports nothing.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console

    def note(self, line: str) -> None:
        """Something that the user should know, in one line."""
        if self.console is not None:
            self.console.print(f"tah: {line}", highlight=False, soft_wrap=True, markup=False)

    def work(self, title: str, total: int | None, unit: str, done: int = 0) -> Work:
        """Begin a piece of work."""
        return Work(self.console, title, total, unit, done)


SILENT = Reporter()
