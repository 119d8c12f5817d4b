"""What the commands share: their common options, notes to the user, and the opening of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .checks import check_data, check_model
from .names import words

if TYPE_CHECKING:
    from tah.progress import Reporter
    from tah.session import Session


def note(text: str) -> None:
    """Print a line for the user on stderr."""
    typer.echo(f"tah: {text}", err=True)


def reporter() -> Reporter:
    """The progress of long work, on stderr."""
    from tah.progress import Reporter

    from .terminal import make_console

    return Reporter(make_console(stderr=True))


def quiet(data: bool = False) -> None:
    """Turn off the progress bars and the advice of transformers; with `data`, also those of datasets."""
    from tah import load

    load.quiet()
    if data:
        from tah.data import rows

        rows.quiet()


def open_session(model: str, dtype: str, device: str) -> Session:
    """Load the model that a command was given."""
    from tah.session import Session

    quiet()
    return Session.open(model, dtype=dtype, device=device, progress=reporter())


def number(help: str, kind: type[int] | type[float], low: int, high: int | None = None) -> Any:
    """An option for a number in a range; the messages of typer do not repeat what was typed."""
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
    """An option for one of the `allowed` words, or for several of them where its type is a list."""

    def check(given: Any) -> Any:
        for name in given if isinstance(given, (list, tuple)) else [given]:
            if name is not None and name not in allowed:
                raise typer.BadParameter(words.unknown(what, name, allowed))
        return given

    return typer.Option(callback=check, metavar="NAME", help=help)


def model_argument(help: str, metavar: str = "MODEL") -> Any:
    """An argument for a model."""
    return typer.Argument(metavar=metavar, callback=check_model, help=help)


def _system(text: str | None) -> str | None:
    try:
        (text or "").encode()
    except UnicodeError as error:
        raise typer.BadParameter("--system is not UTF-8 text") from error
    return text


Model = Annotated[str, model_argument("Directory, hub id, smollm2, smollm2-tah, or follow-tah.")]
Data = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        callback=check_data,
        help="Texts: hub id, directory, or file: .jsonl, .json, .parquet, .csv, .txt or .md.",
        show_default=False,
    ),
]
Split = Annotated[str, typer.Option(metavar="NAME", help="Dataset split.")]
Policy = Annotated[
    str | None,
    word("policy", words.LABEL_FREE, f"Who iterates: {', '.join(words.LABEL_FREE)}. [default: that of the model]"),
]
Threshold = Annotated[
    float | None, number("Iterate above this probability, 0 to 1. [default: that of the model]", float, 0, 1)
]
Depth = Annotated[int | None, number("Maximum number of passes per token. [default: that of the model]", int, 1, 1000)]
Tokens = Annotated[int, number("Longest answer, in tokens.", int, 1)]
Temperature = Annotated[float, number("Sampling temperature; 0 takes the most probable token.", float, 0, 100)]
TopP = Annotated[float, number("Sample among the most probable tokens up to this mass.", float, 0, 1)]
TopK = Annotated[int, number("Sample among this many tokens; 0 means all.", int, 0)]
Seed = Annotated[int, number("Random seed.", int, 0, 2**63 - 1)]
System = Annotated[
    str | None, typer.Option(callback=_system, metavar="TEXT", help="System message of the chat template.")
]
Dtype = Annotated[
    str,
    word(
        "dtype",
        words.DTYPES,
        "auto (as saved if the device computes in it natively, else float32), float32, bfloat16 or float16.",
    ),
]
Device = Annotated[
    str, typer.Option(metavar="NAME", help="auto (cuda, else mps, else cpu), cpu, cuda, cuda:1, mps, ...")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]
NoColor = Annotated[bool, typer.Option("--no-color", help="Mark iterated tokens with [brackets] (also NO_COLOR=1).")]
