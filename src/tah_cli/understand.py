"""The commands that look inside a model: trace, report, tune."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .checks import check_target
from .names import words
from .options import model_argument, note, number, open_session, quiet, reporter, word

if TYPE_CHECKING:
    from tah.session import Session
    from tah.tracing.trace_file import Trace

LOOKED_AT = 100  # rows whose words the tokenizer may not know
TRACE = "trace.jsonl"  # in the directory of a run

LengthOption = Annotated[
    int | None,
    number("Longer texts are cut to this number of tokens. [default: positions of the model, at most 2048]", int, 2),
]
LimitOption = Annotated[int | None, number("Maximum number of texts, or of parts of one .txt.", int, 1)]
EveryOption = Annotated[bool, typer.Option("--every", help="Count all tokens, not only the supervised ones.")]


def trace(
    model: options.Model,
    data: options.Data,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Keep the trace; continues an unfinished one.")
    ] = None,
    policy: Annotated[
        str | None,
        word("policy", words.POLICIES, f"Who iterates: {', '.join(words.POLICIES)}. [default: that of the model]"),
    ] = None,
    threshold: options.Threshold = None,
    own_policy: Annotated[
        bool | None,
        typer.Option(
            "--own-policy/--no-own-policy",
            help="Run once more and follow the policy. [default: if the first run does not show the result]",
            show_default=False,
        ),
    ] = None,
    max_length: LengthOption = None,
    limit: LimitOption = None,
    split: options.Split = "train",
    top_k: Annotated[int, number("Most probable tokens to keep per position.", int, 1)] = 5,
    every: EveryOption = False,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Measure what iterating corrects and breaks.

    Runs every token of the texts at every depth and prints the accuracy that each policy would reach. A base that was
    never trained to iterate is traced with the policy confidence.
    """
    session = open_session(model, dtype, device)
    if session.wrapped and policy is None:
        policy = "confidence"  # what it would answer with, itself, iterates nothing: there would be nothing to see
        note(
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


def tune(
    model: Annotated[str, model_argument("Directory of a TaH checkpoint.")],
    data: options.Data,
    target: Annotated[
        str,
        typer.Option(
            metavar="WHAT",
            callback=check_target,
            help="share=0.07 (of the tokens iterate), or loss (as low as possible).",
        ),
    ],
    max_length: LengthOption = None,
    limit: LimitOption = None,
    split: options.Split = "train",
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Choose the threshold and write it into the model.

    By the share of tokens that iterate, or by the lowest loss, on held-out texts. Only the threshold in config.json
    changes.
    """
    from tah.tracing.tune import check_tunable, write_threshold
    from tah.tracing.tune import tune as choose

    config = check_tunable(model)
    session = open_session(model, dtype, device)
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


def report(
    traces: Annotated[
        list[Path],
        typer.Argument(
            metavar="TRACE...",
            help="Files of tah trace, or directories of runs; two over the same texts are shown side by side.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The page to write.")] = Path(
        "report.html"
    ),
    markdown: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the numbers as Markdown tables.")
    ] = None,
    png: Annotated[Path | None, typer.Option(metavar="DIR", help="Also draw the charts as PNG files.")] = None,
    shown: Annotated[int, number("Maximum number of tokens in the text; tables and charts use all.", int, 1)] = 50_000,
    every: EveryOption = False,
) -> None:
    """Make the depth lens: a page that shows a trace.

    One HTML file that needs no server and loads nothing: the text with every token shaded by depth, the prediction of
    each pass, and the curves and tables of tah trace.
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
            note(f"{path} is unfinished: {its.missing} of {its.header['texts']} texts are missing; tah trace goes on")
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


def _words_of(row: Mapping[str, Any]) -> str:
    """The words of a row of text or of a conversation; of others, which have ids or columns of their own, none."""
    if isinstance(row.get("text"), str):
        return str(row["text"])
    turns = row.get("messages", row.get("conversations"))
    turns = turns if isinstance(turns, list) else ()
    contents = (turn.get("content", turn.get("value")) for turn in turns if isinstance(turn, Mapping))
    return " ".join(content for content in contents if isinstance(content, str))


def _trace(session: Session, data: str, split: str, limit: int | None, output: Path | None, **options: Any) -> Trace:
    """Trace a source of texts, with notes about words that the tokenizer does not know and rows that are left out."""
    from tah.tracing.texts import read_rows
    from tah.tracing.trace import TraceRequest
    from tah.tracing.trace import trace as run_trace

    with suppress(ImportError):  # a plain text is read without datasets; whatever needs it names what to install
        quiet(data=True)
    rows = read_rows(data, split, limit)
    if unknown := session.unknown_words(" ".join(_words_of(rows[at]) for at in range(min(len(rows), LOOKED_AT)))):
        note(unknown)
    request = TraceRequest(data=data, model=session.source, limit=limit, **options)
    found = run_trace(session.model, session.tokenizer, rows, output, request, progress=reporter())
    for reason, count in found.header["left_out"].items():
        note(f"{count} of {len(rows)} rows: {reason}")
    return found
