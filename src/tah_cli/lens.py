"""The command that shows what a trace holds: report. Registered on the `tah` command by `cli.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .app import _note, _number, app

TRACE = "trace.jsonl"  # in the directory of a run


@app.command()
def report(
    traces: Annotated[
        list[Path],
        typer.Argument(
            metavar="TRACE...", help="Of tah trace; two of the same texts go side by side. Or runs.", show_default=False
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The page to write.")] = Path(
        "report.html"
    ),
    markdown: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the numbers as Markdown tables.")
    ] = None,
    png: Annotated[Path | None, typer.Option(metavar="DIR", help="Also draw the charts for a paper.")] = None,
    shown: Annotated[int, _number("Most tokens in the text; tables and charts are of all.", int, 1)] = 50_000,
    every: Annotated[
        bool, typer.Option("--every", help="Count all tokens, not only those the model is to say.")
    ] = False,
) -> None:
    """Make a page to look at: the depth lens.

    One HTML file that needs no server and loads nothing: the text with every token shaded by depth, what each pass
    made of it, and the curves and tables of tah trace.
    """
    if len(traces) > 2:
        raise typer.BadParameter(f"{len(traces)} traces; at most two fit side by side")
    paths = [_trace_of(path) for path in traces]
    written = [output, *([] if markdown is None else [markdown])]
    for path in written:
        _check_file(path)
    places = [path.resolve() for path in (*paths, *written)]
    if twice := [path for at, path in enumerate(places) if path in places[:at] and at >= len(paths)]:
        raise typer.BadParameter(f"{twice[0]} would be overwritten; give every output a name of its own")
    from tah.files import write_atomically
    from tah.tracing.charts import save_charts
    from tah.tracing.lens import write_lens
    from tah.tracing.tables import as_markdown
    from tah.tracing.trace_file import load_trace

    loaded = [load_trace(path) for path in paths]
    if png is not None:
        _make_directory(png)
    stats = write_lens(loaded, output, shown=shown, every=every)
    for path, its in zip(paths, loaded, strict=True):
        if its.missing:
            _note(f"{path} is unfinished: {its.missing} of {its.header['texts']} texts are missing; tah trace goes on")
    typer.echo(f"{output}: {output.stat().st_size / 1e6:.1f} MB; open it in a browser")
    if markdown is not None:
        write_atomically(markdown, "\n".join(as_markdown(its) for its in stats).encode("utf-8", "replace"))
        typer.echo(str(markdown))
    if png is not None:
        typer.echo("\n".join(str(path) for path in save_charts(stats, png)))


def _trace_of(path: Path) -> Path:
    """The trace itself, or that of a run's directory.

    Raises:
        BadParameter: there is none.
    """
    if not path.exists():
        raise typer.BadParameter(f"trace {path} does not exist; make one: tah trace MODEL DATA -o {path}")
    if not path.is_dir():
        return path
    if (path / TRACE).is_file():
        return path / TRACE
    steps = [name for name in ("decider", "backbone") if (path / name / "config.json").is_file()]
    model = path / steps[0] if steps else path if (path / "config.json").is_file() else "MODEL"
    test = path / "data" / "test.jsonl"
    data = test if test.is_file() else "DATA"
    raise typer.BadParameter(f"{path} holds no {TRACE}; make one: tah trace {model} {data} -o {path / TRACE}")


def _make_directory(path: Path) -> None:
    """Before the page is written, so that all is written or nothing.

    Raises:
        BadParameter: it cannot be made.
    """
    if path.exists() and not path.is_dir():
        raise typer.BadParameter(f"--png {path} is a file; give a directory")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"--png {path} cannot be made: {error.strerror}; choose another directory") from error


def _check_file(path: Path) -> None:
    """That a file can be written there, before the work."""
    if path.is_dir():
        raise typer.BadParameter(f"{path} is a directory; give a file name, like {path / 'report.html'}")
    if not path.parent.is_dir():
        raise typer.BadParameter(f"directory {path.parent} of {path} does not exist; make it or choose another file")
