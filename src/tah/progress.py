"""Progress of long work: a bar on a terminal, elsewhere a line now and then, for logs."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.text import Text

EVERY = 30.0  # seconds between lines where there is no terminal
MINUTE = 60.0  # the same for an evaluation, which takes hours


class Counted(ProgressColumn):
    """`3 of 12 texts`, and nothing as long as nobody knows how many there are.

    Args:
        what: is counted.
    """

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def render(self, task: Task) -> Text:
        """For one task of the bar."""
        return Text("" if task.total is None else f"{task.completed:.0f} of {task.total:.0f} {self.what}")


class Answers:
    """The answers of an evaluation, task by task: as a bar on a terminal; elsewhere in a line when a task begins, one a
    minute, and one when it ends.

    Args:
        console: where to.
        clock: seconds of a clock that never goes back.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self.console, self.clock = console, clock
        self.task: tuple[str, str] | None = None  # policy and name
        self.begun = self.told = clock()  # when the task began, and when the last line was written
        self.first = 0  # answers that were there when it began
        columns = (TextColumn("{task.description}"), BarColumn(), Counted("answers"))
        times = (TimeElapsedColumn(), TimeRemainingColumn())
        self.bar = Bar(*columns, *times, console=console, disable=not console.is_terminal, transient=True)

    def __enter__(self) -> Answers:
        self.bar.start()
        self.bar.add_task("loading", total=None)
        return self

    def __exit__(self, *error: Any) -> None:
        self.bar.stop()

    def __call__(self, policy: str, task: str, done: int, of: int) -> None:
        """So many answers to a task are done, under a policy."""
        if self.console.is_terminal:
            self.bar.update(self.bar.task_ids[0], description=f"{task}, {policy}", completed=done, total=of)
            return
        now = self.clock()
        new = self.task != (policy, task)
        if new:
            self.task, self.begun, self.first = (policy, task), now, done
        if new or done == of or now - self.told >= MINUTE:
            self.told, fresh = now, done - self.first
            left = (now - self.begun) * (of - done) / max(1, fresh)
            eta = f", {timedelta(seconds=round(left))} left" if 0 < fresh and done < of else ""
            self.console.print(f"{task}, {policy}: {done:,} of {of:,} answers{eta}", soft_wrap=True)


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
