"""The command that serves a model. Registered on the `tah` command by `cli.py`."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from .app import JsonOption, _note, _number, app

SERVER = "tah.vllm.launch"
MIDDLEWARE = "tah.vllm.responses.TellDepths"


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def serve(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Directory or hub id of a TaH checkpoint.", show_default=False)
    ],
) -> None:
    """Serve a model on vLLM, with the OpenAI API.

    Whatever else is given goes to vLLM's server as it is: --port 8000, --max-model-len 4096, --dtype float32, ...
    """
    _need_vllm()
    from tah.load import check_tah, find, load_tokenizer, quiet

    quiet()
    path, kind = find(model)
    if kind == "base":
        raise ValueError(
            f"{model} is a plain base model, which vLLM serves by itself; tah serve needs a TaH checkpoint"
        )
    # vLLM would read other weights than safetensors, and compares less; nothing is loaded here.
    check_tah(path)
    load_tokenizer(path, model)
    ours = [path, "--served-model-name", model, "--middleware", MIDDLEWARE]
    os.execv(sys.executable, [sys.executable, "-m", SERVER, *ours, *context.args])


@app.command("bench-serve")
def bench_serve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Directory of a base, hub id, or smollm2.")] = "smollm2",
    dtype: Annotated[str, typer.Option(metavar="NAME", help="float32 or bfloat16.")] = "float32",
    repeats: Annotated[int, _number("Rounds; the median counts.", int, 1)] = 5,
    variants: Annotated[
        str, typer.Option(metavar="LIST", help="base and others; base, generate and the rest each hold a model.")
    ] = "base,never,two_pass,mixed,generate",
    tasks: Annotated[
        str, typer.Option(metavar="LIST", help="Requests that decode at a time, stream (96 through 32), prefill.")
    ] = "1,8,32,stream,prefill",
    quick: Annotated[bool, typer.Option("--quick", help="Two rounds of 8 requests.")] = False,
    output: Annotated[Path | None, typer.Option(metavar="DIR", help="Also write the JSON and the table.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Measure serving on vLLM against the stock base in it, and transformers' generate beside it.

    Also written `tah bench serve`. 7 % of the tokens iterate, drawn beforehand.
    """
    _need_vllm()
    import json

    from tah.benchmarks.bench_serve import TASKS, markdown, save
    from tah.benchmarks.bench_serve import bench_serve as measure

    names = [name.strip() for name in ("8" if quick else tasks).split(",")]
    if unknown := sorted(set(names) - set(TASKS)):
        raise ValueError(f"--tasks {','.join(unknown)}: choose from {', '.join(TASKS)}")
    result = measure(
        model,
        dtype=dtype,
        variants=tuple(name.strip() for name in variants.split(",")),
        tasks=tuple(TASKS[name] for name in names),
        repeats=min(2, repeats) if quick else repeats,
        report=lambda row: _note(str(row)),
    )
    if output is not None:
        save(result, output)
    typer.echo(json.dumps(result) if as_json else markdown(result))


def _need_vllm() -> None:
    if find_spec("vllm") is None:
        raise ImportError(
            "serving needs vLLM, in an environment of its own: make serve-env, or pip install 'tah[serve]'"
        )
