"""The commands that measure the cost of iterating: bench, bench train, bench trace, bench serve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from . import options
from .names import words
from .options import model_argument, number, quiet, reporter, word
from .serve import need_vllm

BaseArgument = Annotated[str, model_argument("Model directory, Hub id, or smollm2.")]
RepeatsOption = Annotated[int, number("Number of rounds; the result is their median.", int, 1)]
OutputOption = Annotated[
    Path | None,
    typer.Option("-o", "--output", metavar="DIR", help="Also write the result as JSON and as a Markdown table to DIR."),
]


def bench(
    model: BaseArgument = "smollm2",
    dtype: Annotated[
        list[str] | None,
        word("dtype", words.BENCH_DTYPES, "Data type: float32 or bfloat16; may be repeated. [default: both]"),
    ] = None,
    rate: Annotated[float, number("Iterated share of the variant `forced`.", float, 0, 1)] = 0.07,
    repeats: RepeatsOption = 5,
    quick: Annotated[bool, typer.Option("--quick", help="Run two rounds of batch 1 and 512 tokens only.")] = False,
    batch: Annotated[
        list[int] | None, number("Batch size of decoding; may be repeated. [default: 1, 4 and 16]", int, 1)
    ] = None,
    length: Annotated[
        list[int] | None,
        number(
            "Tokens of a prefill; may be repeated. Memory is measured with the last one. [default: 512 and 2048]",
            int,
            1,
        ),
    ] = None,
    output: OutputOption = None,
    as_json: options.Json = False,
) -> None:
    """Measure the cost of iterating.

    Compare decoding, prefill and memory with the base model. The run takes many minutes. The subcommands measure
    training, tracing and serving.
    """
    from tah.benchmarks import bench as benchmark

    quiet()
    sizes: dict[str, Any] = {"repeats": repeats}
    if quick:
        sizes = {"batches": (1,), "lengths": (512,), "repeats": min(2, repeats)}
    sizes |= {name: tuple(given) for name, given in (("batches", batch), ("lengths", length)) if given}
    dtypes = tuple(dtype or words.BENCH_DTYPES)
    result = benchmark.bench(model, dtypes=dtypes, rate=rate, progress=reporter(), **sizes)
    _finish(benchmark, result, output, as_json)


def bench_train(
    model: BaseArgument = "smollm2",
    dtype: Annotated[
        str,
        word(
            "dtype", words.PRECISIONS, "Precision: float32, bfloat16, or autocast (float32 weights, bfloat16 products)."
        ),
    ] = "float32",
    repeats: RepeatsOption = 5,
    quick: Annotated[
        bool, typer.Option("--quick", help="Run two rounds of 512 tokens only, without memory and labelling.")
    ] = False,
    output: OutputOption = None,
    as_json: options.Json = False,
) -> None:
    """Measure the cost of training and of labelling.

    Compare training steps with hard tokens with steps of the base model. The run takes many minutes.
    """
    from tah.benchmarks import bench_train as benchmark

    quiet()
    sizes: dict[str, Any] = {"repeats": repeats}
    if quick:
        sizes = {"repeats": min(2, repeats), "shapes": benchmark.SHAPES[:1], "labels": None, "memory": False}
    result = benchmark.bench_train(benchmark.Setup(model, dtype), progress=reporter(), **sizes)
    _finish(benchmark, result, output, as_json)


def bench_trace(
    model: BaseArgument = "smollm2",
    texts: Annotated[int, number("Number of texts of 512 tokens.", int, 1)] = 8,
    repeats: RepeatsOption = 5,
    output: OutputOption = None,
    as_json: options.Json = False,
) -> None:
    """Measure the cost of tracing.

    Compare a trace with as many forward passes of the base model. The run takes minutes.
    """
    from tah.benchmarks import bench_trace as benchmark
    from tah.policy import Rule
    from tah.session import Session
    from tah.tracing.trace import TraceRequest

    quiet()
    session = Session.open(model, dtype="float32", device="cpu")
    rule = Rule("confidence") if session.wrapped else Rule()  # a wrapped base iterates no token by default
    result = benchmark.throughput(session.model, session.tokenizer, (512,) * texts, TraceRequest(rule), repeats)
    _finish(benchmark, result, output, as_json)


def bench_serve(
    model: BaseArgument = "smollm2",
    dtype: Annotated[str, word("dtype", words.BENCH_DTYPES, "Data type: float32 or bfloat16.")] = "float32",
    repeats: RepeatsOption = 5,
    variants: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="Variants, separated by commas; base is required. base, generate and the other three together each "
            "load one copy of the weights.",
        ),
    ] = "base,never,two_pass,mixed,generate",
    tasks: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="Tasks, separated by commas: 1, 8 or 32 (requests that decode at a time), stream (96 requests, 32 at "
            "a time), prefill.",
        ),
    ] = ",".join(words.SERVE_TASKS),
    quick: Annotated[bool, typer.Option("--quick", help="Run two rounds of 8 requests only.")] = False,
    output: OutputOption = None,
    as_json: options.Json = False,
) -> None:
    """Measure the cost of serving on vLLM.

    Compare with the base model in vLLM and with `generate` of transformers. The policy random iterates 7 % of the
    tokens.
    """
    names = [name.strip() for name in ("8" if quick else tasks).split(",")]
    for name in names:
        if name not in words.SERVE_TASKS:
            raise ValueError(words.unknown("task", name, words.SERVE_TASKS))
    need_vllm()
    from tah.benchmarks import bench_serve as benchmark

    result = benchmark.bench_serve(
        model,
        dtype=dtype,
        variants=tuple(name.strip() for name in variants.split(",")),
        tasks=tuple(benchmark.TASKS[name] for name in names),
        repeats=min(2, repeats) if quick else repeats,
        progress=reporter(),
    )
    _finish(benchmark, result, output, as_json)


def _finish(benchmark: Any, result: dict[str, Any], output: Path | None, as_json: bool) -> None:
    """Print the result of a benchmark, and write it to `output` if that is given."""
    from tah.benchmarks.measure import save

    table = benchmark.markdown(result)
    if output is not None:
        save(result, table, output, benchmark.__name__.rpartition(".")[2])
    typer.echo(json.dumps(result) if as_json else table)
