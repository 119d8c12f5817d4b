"""Common options of the commands, notes to the user, and the loading of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .checks import check_data, check_model, process
from .names import words

if TYPE_CHECKING:
    from tah.progress import Reporter
    from tah.session import Session


def is_first() -> bool:
    """Return whether this is the first of the processes that torchrun or `accelerate launch` started: it prints."""
    return process() == 0


def note(text: str) -> None:
    """Print a line on stderr, in the first process only."""
    if is_first():
        typer.echo(f"tah: {text}", err=True)


def reporter() -> Reporter:
    """Return a reporter that prints progress on stderr, in the first process only."""
    from tah.progress import SILENT, Reporter

    from .terminal import make_console

    return Reporter(make_console(stderr=True)) if is_first() else SILENT


def quiet(data: bool = False) -> None:
    """Turn off the progress bars and warnings of transformers; with `data`, also those of datasets."""
    from tah import load

    load.quiet()
    if data:
        from tah.data import rows

        rows.quiet()


def open_session(model: str, dtype: str, device: str) -> Session:
    """Load the model and the tokenizer of a command."""
    from tah.session import Session

    quiet()
    return Session.open(model, dtype=dtype, device=device, progress=reporter())


def number(help: str, kind: type[int] | type[float], low: int, high: int | None = None) -> Any:
    """Return an option for a number from `low` to `high`; unlike typer's own message, its error quotes the input."""
    name = "an integer" if kind is int else "a number"
    allowed = f"{name} >= {low}" if high is None else f"{name} from {low} to {high}"

    def parse(text: Any) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = kind(low - 1)
        if not (low <= value and (high is None or value <= high)):
            raise typer.BadParameter(f"{text} must be {allowed}")
        return value

    return typer.Option(parser=parse, metavar="N" if kind is int else "X", help=help)


def word(what: str, allowed: Sequence[str], help: str) -> Any:
    """Return an option for one of the `allowed` words, or for several of them if its type is a list."""

    def check(given: Any) -> Any:
        for name in given if isinstance(given, (list, tuple)) else [given]:
            if name is not None and name not in allowed:
                raise typer.BadParameter(words.unknown(what, name, allowed))
        return given

    return typer.Option(callback=check, metavar="NAME", help=help)


def model_argument(help: str, metavar: str = "MODEL") -> Any:
    """Return an argument for a model, which `check_model` checks."""
    return typer.Argument(metavar=metavar, callback=check_model, help=help)


def _system(text: str | None) -> str | None:
    try:
        (text or "").encode()
    except UnicodeError as error:
        raise typer.BadParameter("--system is not UTF-8 text") from error
    return text


Model = Annotated[str, model_argument("Model directory, Hub id, smollm2, smollm2-tah, or follow-tah.")]
Data = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        callback=check_data,
        help="Texts: Hub id, directory, or file (.jsonl, .json, .parquet, .csv, .txt or .md).",
        show_default=False,
    ),
]
Split = Annotated[str, typer.Option(metavar="NAME", help="Dataset split.")]
Policy = Annotated[
    str | None,
    word("policy", words.LABEL_FREE, f"Policy: {', '.join(words.LABEL_FREE)}. [default: that of the model]"),
]
Threshold = Annotated[
    float | None,
    number(
        "Threshold from 0 to 1: a token with a higher continue probability takes another pass. "
        "[default: that of the model]",
        float,
        0,
        1,
    ),
]
Depth = Annotated[int | None, number("Maximum number of passes per token. [default: that of the model]", int, 1, 1000)]
Tokens = Annotated[int, number("Maximum number of tokens in an answer.", int, 1)]
Temperature = Annotated[float, number("Sampling temperature; 0 selects the most probable token.", float, 0, 100)]
TopP = Annotated[float, number("Sample from the most probable tokens up to this total probability.", float, 0, 1)]
TopK = Annotated[int, number("Sample from this number of most probable tokens; 0 means all tokens.", int, 0)]
Seed = Annotated[int, number("Random seed.", int, 0, 2**63 - 1)]
System = Annotated[
    str | None, typer.Option(callback=_system, metavar="TEXT", help="System message of the chat template.")
]
Dtype = Annotated[
    str,
    word(
        "dtype",
        words.DTYPES,
        "Data type: float32, bfloat16, float16, or auto (the saved type if the device supports it natively, "
        "else float32).",
    ),
]
Device = Annotated[
    str, typer.Option(metavar="NAME", help="Device: cpu, cuda, cuda:1, mps, ..., or auto (cuda, else mps, else cpu).")
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")]
NoColor = Annotated[
    bool, typer.Option("--no-color", help="Mark iterated tokens with [brackets], not with colours (also NO_COLOR=1).")
]
