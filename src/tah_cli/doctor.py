"""The command that checks a machine: doctor."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import options
from .options import model_argument, open_session, reporter

if TYPE_CHECKING:
    from rich.table import Table

    from tah.doctor.report import Report

STYLES = {"ok": "green", "failed": "bold red", "skipped": "dim", "measured": ""}


def doctor(
    model: Annotated[
        str, model_argument("Model directory, Hub id, smollm2, smollm2-tah, or follow-tah.")
    ] = "follow-tah",
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="DIR", help="Also write the result as JSON and Markdown to DIR."),
    ] = None,
    as_json: options.Json = False,
    no_color: Annotated[bool, typer.Option("--no-color", help="Print no colours (also NO_COLOR=1).")] = False,
) -> None:
    """Check that this machine computes TaH correctly, and measure its speed.

    The exit code is 1 if a check fails. A line that is skipped has a reason.
    """
    if output is not None and output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; give a directory for the result")
    session = open_session(model, dtype, device)
    from tah.benchmarks.measure import save
    from tah.doctor.report import doctor as examine

    from .terminal import make_console

    report = examine(session, reporter())
    if output is not None:
        save(report.as_dict(), report.markdown(), output, "doctor")
    if as_json:
        typer.echo(json.dumps(report.as_dict(), allow_nan=False))
    else:
        console = make_console(color=not no_color)
        console.print(report.title, style="bold", soft_wrap=True)
        console.print(_table(report))
        console.print(report.summary, soft_wrap=True)
    if not report.passed:
        raise typer.Exit(1)


def _table(report: Report) -> Table:
    """Return the lines as a table, with the name of a section in its first line only."""
    from rich.table import Table
    from rich.text import Text

    from tah.doctor.report import COLUMNS

    table, section = Table(box=None, padding=(0, 2, 0, 0)), ""
    for title in COLUMNS:
        table.add_column(title, header_style="dim", no_wrap=title != "found", overflow="fold")
    for line in report.lines:
        name = "" if line.section == section else line.section
        section = line.section
        table.add_row(name, line.name, Text(line.status, STYLES[line.status]), Text(line.found))
    return table
