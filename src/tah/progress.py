"""Progress of long work: a bar on a terminal, and log lines at intervals elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

EVERY = 30.0  # seconds between log lines


class Work:
    """Count the units of one long piece of work and show them. Use it as a context manager.

    A bar is drawn only if the console's stream is a terminal. FORCE_COLOR alone (as in CI and notebooks) draws none.

    Args:
        console: Console for the output; None shows nothing.
        title: Name of the work, such as `labelling`.
        total: Number of units in all; None if it is unknown.
        unit: Name of the counted units, such as `rows`; empty if nothing is counted.
        done: Number of units that an earlier run has completed.
        clock: Monotonic clock, in seconds.
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
        # With FORCE_COLOR or TTY_COMPATIBLE set, `is_terminal` is true for a pipe or a file, too.
        if console is not None and console.is_terminal and console.file.isatty():
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
        """Count further completed units.

        Args:
            units: Number of units.
            tokens: Number of tokens in these units.
        """
        self.done, self.tokens = self.done + units, self.tokens + tokens
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=self.done, state=str(self))
        elif self.clock() - self.shown >= EVERY:
            self._line()

    @property
    def tokens_per_second(self) -> float:
        """Tokens per second of this process, until now or until the end of the work."""
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
        """Return the state as text: `3 of 12 rows, 1,204 tokens/s, 0:02:10 left`."""
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
    """Show notes and progress. Every slow function of the library takes a reporter as its argument `progress`.

    Args:
        console: Console for the output. A terminal shows a bar; any other stream gets a line every `EVERY` seconds and
            one at the end. None shows nothing.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console

    def note(self, line: str) -> None:
        """Print a note for the user, in one line."""
        if self.console is not None:
            self.console.print(f"tah: {line}", highlight=False, soft_wrap=True, markup=False)

    def work(self, title: str, total: int | None, unit: str, done: int = 0) -> Work:
        """Return a `Work` on this reporter's console, with the given title, total, unit and completed units."""
        return Work(self.console, title, total, unit, done)


SILENT = Reporter()
