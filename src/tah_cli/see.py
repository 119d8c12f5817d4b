"""The commands that look inside a model: trace, tune. Registered on the `tah` command by `cli.py`."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .app import (
    POLICIES,
    DeviceOption,
    DtypeOption,
    JsonOption,
    ModelArgument,
    ThresholdOption,
    _note,
    _number,
    _open,
    app,
)

if TYPE_CHECKING:
    from tah.session import Session
    from tah.tracing.trace_file import Trace

TRACED = (*POLICIES, "oracle")
LOOKED_AT = 100  # rows whose words the tokenizer may not know


def _policy(name: str | None) -> str | None:
    if name is None or name in TRACED:
        return name
    near = difflib.get_close_matches(name, TRACED, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise typer.BadParameter(f"unknown policy {name!r}; {hint}choose from {', '.join(TRACED)}")


DataArgument = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        help="Texts: hub id, directory, or file: .jsonl, .json, .parquet, .csv, .txt or .md.",
        show_default=False,
    ),
]
SplitOption = Annotated[str, typer.Option(metavar="NAME", help="Of the texts.")]
LengthOption = Annotated[
    int | None,
    _number("Longer texts are cut to so many tokens. [default: the model's positions, at most 2048]", int, 2),
]
LimitOption = Annotated[int | None, _number("At most so many texts, or parts of one .txt.", int, 1)]


@app.command()
def trace(
    model: ModelArgument,
    data: DataArgument,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Keep the trace; continues an unfinished one.")
    ] = None,
    policy: Annotated[
        str | None,
        typer.Option(
            callback=_policy, metavar="NAME", help=f"Who iterates: {', '.join(TRACED)}. [default: the model's]"
        ),
    ] = None,
    threshold: ThresholdOption = None,
    own_policy: Annotated[
        bool | None,
        typer.Option(
            "--own-policy/--no-own-policy",
            help="Run again as the policy decides. [default: where that is not known from the first run]",
            show_default=False,
        ),
    ] = None,
    max_length: LengthOption = None,
    limit: LimitOption = None,
    split: SplitOption = "train",
    top_k: Annotated[int, _number("Alternatives to keep.", int, 1)] = 5,
    every: Annotated[
        bool, typer.Option("--every", help="Count all tokens, not only those the model is to say.")
    ] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Measure what iterating corrects and breaks.

    Runs every token of the texts at every depth and prints what each policy would reach. A base that was never trained
    to iterate is traced with the policy confidence.
    """
    session = _open(model, dtype, device)
    if session.wrapped and policy is None:
        policy = "confidence"  # what it would answer with, itself, iterates nothing: there would be nothing to see
        _note(
            f"{model} is a base model without a trained second pass; traced with the policy confidence, --policy "
            "chooses another"
        )
    from tah.policy import Rule
    from tah.tracing.overthinking import statistics
    from tah.tracing.tables import as_markdown

    options = {"rule": Rule(policy, threshold), "run_policy": own_policy, "top_k": top_k}
    found = _trace(session, data, split, limit, output, max_length=max_length, **options)
    stats = statistics(found, every=every)
    typer.echo(json.dumps(stats, ensure_ascii=False) if as_json else as_markdown(stats), nl=as_json)


@app.command()
def tune(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Directory of a TaH checkpoint.", show_default=False)],
    data: DataArgument,
    target: Annotated[str, typer.Option(metavar="WHAT", help="share=0.07, or loss: the lowest.")],
    max_length: LengthOption = None,
    limit: LimitOption = None,
    split: SplitOption = "train",
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Choose the threshold and write it into the model.

    By the share of tokens that iterate, or by the lowest loss, on held-out texts. Only the threshold in config.json
    changes.
    """
    from tah.tracing.tune import check_tunable, parse_target, write_threshold
    from tah.tracing.tune import tune as choose

    parse_target(target)
    config = check_tunable(model)
    session = _open(model, dtype, device)
    found = _trace(session, data, split, limit, None, max_length=max_length, run_policy=False, top_k=1)
    chosen = choose(found, target, config.score)
    before = write_threshold(config.path, chosen["threshold"])
    if as_json:
        typer.echo(json.dumps({"model": model, "data": data, "before": before} | chosen))
        return
    typer.echo(
        f"threshold {chosen['threshold']:.6g} (was {before:.6g}): {chosen['iterated']:.2%} of tokens iterate, "
        f"loss {chosen['loss']:.4f}, accuracy {chosen['accuracy']:.2%}\nwritten to {config.path}"
    )


def _said(row: Mapping[str, Any]) -> str:
    """The words of a row of text or of a conversation; of others, which have ids or columns of their own, none."""
    if isinstance(row.get("text"), str):
        return str(row["text"])
    turns = row.get("messages", row.get("conversations"))
    turns = turns if isinstance(turns, list) else ()
    said = (turn.get("content", turn.get("value")) for turn in turns if isinstance(turn, Mapping))
    return " ".join(content for content in said if isinstance(content, str))


def _trace(session: Session, data: str, split: str, limit: int | None, output: Path | None, **options: Any) -> Trace:
    """Trace with a progress bar on a terminal."""
    from tah.data.rows import quiet
    from tah.progress import Reporter
    from tah.tracing.texts import read_rows
    from tah.tracing.trace import TraceRequest
    from tah.tracing.trace import trace as run_trace

    from .terminal import make_console

    with suppress(ImportError):  # a plain text is read without datasets; whatever needs it says what to install
        quiet()
    rows = read_rows(data, split, limit)
    if unknown := session.unknown_words(" ".join(_said(rows[at]) for at in range(min(len(rows), LOOKED_AT)))):
        _note(unknown)
    request = TraceRequest(data=data, model=session.source, limit=limit, **options)
    progress = Reporter(make_console(stderr=True))
    found = run_trace(session.model, session.tokenizer, rows, output, request, progress=progress)
    for reason, count in found.header["left_out"].items():
        _note(f"{count} of {len(rows)} rows: {reason}")
    return found
