"""The commands about a model as a whole: inspect, convert, demo. Registered on the `tah` command by `cli.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from .app import PACKAGE, JsonOption, ModelArgument, NoColorOption, TokensOption, _number, app


@app.command()
def inspect(
    model: ModelArgument,
    against: Annotated[
        str | None, typer.Option(metavar="BASE", help="Also compare the number of parameters with a plain base.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a model is, or if it can be wrapped."""
    from tah.inspect import as_lines
    from tah.inspect import inspect as look
    from tah.load import quiet

    quiet()
    found = look(model, against)
    if card := _card(model):
        found["card"] = card
    typer.echo(json.dumps(found) if as_json else as_lines(found))


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Checkpoint of the original implementation, or hub id.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="Directory to make.")],
    threshold: Annotated[float | None, _number("Instead of the checkpoint's.", float, 0, 1)] = None,
) -> None:
    """Convert a checkpoint of the original code.

    None of its code runs. Prints what was converted and anything about it that might surprise.
    """
    from tah.load import convert as run_convert
    from tah.load import quiet

    quiet()
    report = run_convert(source, target, threshold=threshold)
    typer.echo(f"{report}\nwritten to {target}")


@app.command()
def demo(
    max_new_tokens: TokensOption = 64,
    problems: Annotated[int, _number("Held-out problems that the small model answers.", int, 0, 100)] = 100,
    no_color: NoColorOption = False,
) -> None:
    """Run the two checkpoints in the box."""
    from .demo import demo as run_demo

    run_demo(max_new_tokens=max_new_tokens, problems=problems, color=not no_color)


def _card(model: str) -> str | None:
    """Where the model card is: in the package for what comes with it, else in the model's own directory."""
    packaged = PACKAGE / "assets" / model / "README.md"
    own = Path(model) / "README.md"
    path = own if Path(model).is_dir() else packaged
    return str(path) if path.is_file() else None
