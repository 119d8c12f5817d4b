"""The commands that measure what iterating costs: bench, bench-train, bench-trace. `cli.py` registers them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from .app import JsonOption, _number, app

OutputOption = Annotated[Path | None, typer.Option(metavar="DIR", help="Also write the JSON and the table.")]


@app.command()
def bench(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Directory, hub id, or smollm2.")] = "smollm2",
    dtype: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="float32 or bfloat16; may be repeated. [default: both]"),
    ] = None,
    repeats: Annotated[int, _number("Rounds; the median counts.", int, 1)] = 5,
    quick: Annotated[bool, typer.Option("--quick", help="Two rounds, batch 1, 512 tokens.")] = False,
    output: OutputOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure the cost of iterating (many minutes).

    tah bench train: of training; tah bench trace: of tracing; tah bench serve: of serving.
    """
    for name in dtype or ():
        if name not in ("float32", "bfloat16"):
            raise typer.BadParameter(f"dtype {name!r} is not one of float32, bfloat16")
    from tah.benchmarks.bench import bench as run_bench
    from tah.benchmarks.bench import markdown
    from tah.benchmarks.measure import save
    from tah.load import quiet
    from tah.progress import Reporter

    quiet()
    sizes: dict[str, Any] = (
        {"batches": (1,), "lengths": (512,), "repeats": min(2, repeats)} if quick else {"repeats": repeats}
    )
    result = run_bench(
        model, dtypes=tuple(dtype or ("float32", "bfloat16")), progress=Reporter(Console(stderr=True)), **sizes
    )
    if output is not None:
        save(result, markdown(result), output, "bench")
    typer.echo(json.dumps(result) if as_json else markdown(result))


@app.command("bench-train")
def bench_train(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Directory, hub id, or smollm2.")] = "smollm2",
    dtype: Annotated[str, typer.Option(metavar="NAME", help="float32, bfloat16, or autocast.")] = "float32",
    repeats: Annotated[int, _number("Rounds; the median counts.", int, 1)] = 5,
    quick: Annotated[bool, typer.Option("--quick", help="Two rounds of 512 tokens, without labelling.")] = False,
    output: OutputOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure the cost of training with hard tokens, and of labelling (many minutes)."""
    from tah.benchmarks.bench_train import SHAPES, Setup, markdown
    from tah.benchmarks.bench_train import bench_train as run_bench
    from tah.benchmarks.measure import save
    from tah.load import quiet
    from tah.progress import Reporter

    quiet()
    setup = Setup(model, dtype)
    sizes: dict[str, Any] = {"repeats": repeats}
    if quick:
        sizes = {"repeats": min(2, repeats), "shapes": SHAPES[:1], "labels": None, "memory": False}
    result = run_bench(setup, progress=Reporter(Console(stderr=True)), **sizes)
    if output is not None:
        save(result, markdown(result), output, "bench_train")
    typer.echo(json.dumps(result) if as_json else markdown(result))


@app.command("bench-trace")
def bench_trace(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Directory, hub id, or smollm2.")] = "smollm2",
    texts: Annotated[int, _number("How many, of 512 tokens each.", int, 1)] = 8,
    repeats: Annotated[int, _number("Rounds; the median counts.", int, 1)] = 5,
    output: OutputOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure the cost of tracing against as many plain passes (minutes)."""
    from tah.benchmarks.bench_trace import markdown, throughput
    from tah.benchmarks.measure import save
    from tah.load import quiet
    from tah.session import Session

    quiet()
    session = Session.open(model, dtype="float32", device="cpu")
    options: dict[str, Any] = {"policy": "confidence"} if session.wrapped else {}  # one that costs something
    result = throughput(session.model, session.tokenizer, (512,) * texts, repeats=repeats, **options)
    if output is not None:
        save(result, markdown(result), output, "bench_trace")
    typer.echo(json.dumps(result) if as_json else markdown(result))
