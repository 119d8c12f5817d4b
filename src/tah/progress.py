"""Progress of labelling: rows done, tokens per second, time left."""

from __future__ import annotations

import time
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

EVERY = 30.0  # seconds between lines where there is no terminal


class Progress:
    """A bar on a terminal, a line now and then elsewhere, nothing without a console.

    Args:
        console: where to.
        rows: how many there are to do.
    """

    def __init__(self, console: Console | None, rows: int) -> None:
        self.console, self.rows = console, rows
        self.done = self.tokens = 0
        self.start = self.told = time.monotonic()
        self.stop: float | None = None
        self.bar: Bar | None = None
        if console is not None and console.is_terminal:
            columns = (TextColumn("labelling"), BarColumn(), TextColumn("{task.description}"))
            self.bar = Bar(*columns, console=console)

    def __enter__(self) -> Progress:
        if self.bar is not None:
            self.bar.start()
            self.bar.add_task(str(self), total=self.rows)
        return self

    def __exit__(self, *error: Any) -> None:
        self.stop = time.monotonic()
        if self.bar is not None:
            self.bar.stop()
        elif self.console is not None and self.done:
            self.console.print(f"labelled {self}", highlight=False, soft_wrap=True)

    def advance(self, rows: int, tokens: int) -> None:
        """So many more are done."""
        self.done, self.tokens = self.done + rows, self.tokens + tokens
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=self.done, description=str(self))
        elif self.console is not None and time.monotonic() - self.told > EVERY:
            self.told = time.monotonic()
            self.console.print(f"labelled {self}", highlight=False, soft_wrap=True)

    @property
    def tokens_per_second(self) -> float:
        """By this process, until now or the end."""
        return self.tokens / max((self.stop or time.monotonic()) - self.start, 1e-9)

    def __str__(self) -> str:
        left = (time.monotonic() - self.start) * (self.rows - self.done) / max(1, self.done)
        eta = f", {timedelta(seconds=round(left))} left" if 0 < self.done < self.rows else ""
        return f"{self.done:,} of {self.rows:,} rows, {self.tokens_per_second:,.0f} tokens/s{eta}"
