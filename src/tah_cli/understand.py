"""The commands that analyse a model: trace, report, tune."""

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
from .options import is_first, model_argument, note, number, open_session, quiet, reporter, word

if TYPE_CHECKING:
    from tah.processes import Processes
    from tah.session import Session
    from tah.tracing.trace_file import Trace

LOOKED_AT = 100  # number of rows that are checked for words without a token
TRACE = "trace.jsonl"  # file name in the directory of a run

LengthOption = Annotated[
    int | None,
    number(
        "Maximum tokens of a text; longer texts are cut. [default: number of positions of the model, at most 2048]",
        int,
        2,
    ),
]
LimitOption = Annotated[int | None, number("Maximum number of texts, or of parts of one .txt file.", int, 1)]
EveryOption = Annotated[bool, typer.Option("--every", help="Count all tokens, not only the supervised tokens.")]


def trace(
    model: options.Model,
    data: options.Data,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", metavar="FILE", help="File of the trace; an unfinished trace continues."),
    ] = None,
    policy: Annotated[
        str | None,
        word("policy", words.POLICIES, f"Policy: {', '.join(words.POLICIES)}. [default: that of the model]"),
    ] = None,
    threshold: options.Threshold = None,
    own_policy: Annotated[
        bool | None,
        typer.Option(
            "--own-policy/--no-own-policy",
            help="Run each text a second time, with passes for the tokens of the policy only. [default: only if the "
            "first run does not determine the result]",
            show_default=False,
        ),
    ] = None,
    max_length: LengthOption = None,
    limit: LimitOption = None,
    split: options.Split = "train",
    top_k: Annotated[int, number("Number of most probable tokens to store per position.", int, 1)] = 5,
    every: EveryOption = False,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Count the predictions that later passes correct and break.

    The command runs every token of the texts at every depth, and prints the accuracy of each policy. The default policy
    of a base model without a trained second pass is confidence. On several GPUs: torchrun --nproc-per-node 8 -m tah
    trace ... -o FILE
    """
    from tah.processes import Processes

    processes = Processes.started()
    session = open_session(model, dtype, device)
    if session.wrapped and policy is None:
        policy = "confidence"  # a wrapped base iterates no token by default, and such a trace would be empty
        note(
            f"{model} is a base model without a trained second pass; the trace uses the policy confidence; --policy "
            "selects another"
        )
    from tah.policy import Rule
    from tah.tracing.overthinking import statistics
    from tah.tracing.tables import as_markdown

    options = {"rule": Rule(policy, threshold), "run_policy": own_policy, "top_k": top_k}
    found = _trace(session, data, split, limit, output, processes, max_length=max_length, **options)
    if not is_first():
        return
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
            help="Target: share=X (iterated share of the tokens, such as share=0.07), or loss (lowest loss).",
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

    The command measures the iterated share or the loss on held-out texts. It changes only the threshold in config.json.
    """
    from tah.tracing.tune import check_tunable, write_threshold
    from tah.tracing.tune import tune as choose

    config = check_tunable(model)
    session = open_session(model, dtype, device)
    found = _trace(session, data, split, limit, None, None, max_length=max_length, run_policy=False, top_k=1)
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
            help="Trace files, or directories of runs; the page shows two traces of the same texts side by side.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="HTML file to write.")] = Path(
        "report.html"
    ),
    markdown: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the numbers as Markdown tables to FILE.")
    ] = None,
    png: Annotated[Path | None, typer.Option(metavar="DIR", help="Also write the charts as PNG files to DIR.")] = None,
    shown: Annotated[
        int, number("Maximum number of tokens that the page shows as text; tables and charts use all.", int, 1)
    ] = 50_000,
    every: EveryOption = False,
) -> None:
    """Write the depth lens, an HTML page of a trace.

    The page is one file that needs no server and no network. It shows the text with a colour for the depth of each
    token, the prediction of each pass, and the curves and tables of tah trace.
    """
    if len(traces) > 2:
        raise typer.BadParameter(f"{len(traces)} traces; give at most two")
    paths = [_trace_of(path) for path in traces]
    written = [output, *([] if markdown is None else [markdown])]
    for path in written:
        _check_file(path)
    places = [path.resolve() for path in (*paths, *written)]
    if twice := [path for at, path in enumerate(places) if path in places[:at] and at >= len(paths)]:
        raise typer.BadParameter(f"{twice[0]} would be overwritten; give every output a different name")
    from tah.files import write_atomically
    from tah.tracing.charts import save_charts
    from tah.tracing.lens import write_lens
    from tah.tracing.tables import as_markdown, different_weights
    from tah.tracing.trace_file import load_trace

    loaded = [load_trace(path) for path in paths]
    if png is not None:
        _make_directory(png)
    stats = write_lens(loaded, output, shown=shown, every=every)
    for path, its in zip(paths, loaded, strict=True):
        if its.missing:
            texts = its.header["texts"]
            note(f"{path} is unfinished: {its.missing} of {texts} texts are missing; tah trace continues it")
    if len(stats) == 2 and (different := different_weights(*(its["weights"] for its in stats))):
        note(different)
    typer.echo(f"{output}: {output.stat().st_size / 1e6:.1f} MB; open it in a browser")
    if markdown is not None:
        write_atomically(markdown, "\n".join(as_markdown(its) for its in stats).encode("utf-8", "replace"))
        typer.echo(str(markdown))
    if png is not None:
        typer.echo("\n".join(str(path) for path in save_charts(stats, png)))


def _trace_of(path: Path) -> Path:
    """Return the file of a trace.

    Args:
        path: Trace file, or directory of a run.

    Raises:
        BadParameter: There is no trace.
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
    """Make the directory of the charts; called before the page is written, so that an error leaves no partial output.

    Raises:
        BadParameter: `path` is a file, or the directory cannot be made.
    """
    if path.exists() and not path.is_dir():
        raise typer.BadParameter(f"--png {path} is a file; give a directory")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"--png {path} cannot be made: {error.strerror}; choose another directory") from error


def _check_file(path: Path) -> None:
    """Check, before the work, that `path` is not a directory and that its parent directory exists.

    Raises:
        BadParameter: One of the two does not hold.
    """
    if path.is_dir():
        raise typer.BadParameter(f"{path} is a directory; give a file name, like {path / 'report.html'}")
    if not path.parent.is_dir():
        raise typer.BadParameter(f"directory {path.parent} of {path} does not exist; make it or choose another file")


def _words_of(row: Mapping[str, Any]) -> str:
    """Return the text of a row with `text`, `messages` or `conversations`; "" for rows of other columns."""
    if isinstance(row.get("text"), str):
        return str(row["text"])
    turns = row.get("messages", row.get("conversations"))
    turns = turns if isinstance(turns, list) else ()
    contents = (turn.get("content", turn.get("value")) for turn in turns if isinstance(turn, Mapping))
    return " ".join(content for content in contents if isinstance(content, str))


def _trace(
    session: Session,
    data: str,
    split: str,
    limit: int | None,
    output: Path | None,
    processes: Processes | None,
    **options: Any,
) -> Trace:
    """Trace a source of texts; print notes about words without a token and about rows that are left out."""
    from tah.tracing.texts import read_rows
    from tah.tracing.trace import TraceRequest
    from tah.tracing.trace import trace as run_trace

    with suppress(ImportError):  # a text file needs no datasets; for other files `read_rows` names what to install
        quiet(data=True)
    rows = read_rows(data, split, limit)
    if unknown := session.unknown_words(" ".join(_words_of(rows[at]) for at in range(min(len(rows), LOOKED_AT)))):
        note(unknown)
    request = TraceRequest(data=data, model=session.source, limit=limit, **options)
    found = run_trace(session.model, session.tokenizer, rows, output, request, progress=reporter(), processes=processes)
    for reason, count in found.header["left_out"].items():
        note(f"{count} of {len(rows)} rows: {reason}")
    return found
