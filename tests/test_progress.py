"""Progress of long work: lines in a log, a bar on a terminal."""

from __future__ import annotations

import io
import subprocess

import pytest
from rich.console import Console

from helpers.commands import questions, start_command
from tah.progress import Work

pytestmark = pytest.mark.usefixtures("plain")


class Stream(io.StringIO):
    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def in_memory(terminal: bool) -> Console:
    return Console(file=Stream(terminal), force_terminal=terminal, width=100, markup=False, highlight=False)


def test_work_has_a_line_every_half_minute_and_at_its_end_without_a_terminal():
    now = [0.0]
    console = in_memory(terminal=False)
    for title, start in (("gsm8k, never", 0), ("gsm8k, decider", 960)):
        with Work(console, title, 1000, "answers", done=start, clock=lambda: now[0]) as work:
            for _ in range(40):
                now[0] += 1.0
                work.advance()
    assert console.file.getvalue().splitlines() == [
        "gsm8k, never: 30 of 1,000 answers, 0:16:10 left",
        "gsm8k, never: 40 of 1,000 answers",
        "gsm8k, decider: 990 of 1,000 answers, 0:00:10 left",
        "gsm8k, decider: 1,000 of 1,000 answers",
    ]


def test_an_evaluation_in_a_log(tmp_path, changed):
    words = ("--tasks", "gsm8k", "--policy", "never,always", "--max-new-tokens", 2, "-o", "out")
    data = questions(tmp_path / "q.jsonl", "2 + 2", "3 + 3")
    process = start_command("eval", changed(positions=512), *words, "--data", data, stdout=subprocess.PIPE)
    _, err = process.communicate()
    assert process.returncode == 0 and err.splitlines() == [
        f"gsm8k, {policy}: 2 of 2 answers" for policy in ("never", "always")
    ]


def test_forced_colours_draw_no_bar_into_a_log(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    console = Console(file=Stream(terminal=False), width=100, markup=False, highlight=False)
    assert console.is_terminal
    with Work(console, "labelling", 2, "rows") as work:
        assert work.bar is None
        work.advance(2)
    assert console.file.getvalue() == "labelling: 2 of 2 rows\n"


def test_a_bar_never_shows_of_none():
    console = in_memory(terminal=True)
    with Work(console, "gsm8k [b], never", None, "answers") as work:
        work.bar.refresh()
        work.total = 7
        work.advance(2)
        work.bar.refresh()
    shown = console.file.getvalue()
    assert "None" not in shown and "2 of 7 answers" in shown and "gsm8k [b], never" in shown


def test_work_that_counts_nothing_is_its_title():
    shown = {}
    for terminal in (True, False):
        console = in_memory(terminal=terminal)
        with Work(console, "Converting it (once)", None, "") as work:
            assert str(work) == ""
        shown[terminal] = console.file.getvalue()
    assert "Converting it (once)" in shown[True] and shown[False] == "Converting it (once)\n"
