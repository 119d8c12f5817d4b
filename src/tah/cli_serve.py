"""The command that serves a model. Registered on the `tah` command by `cli.py`."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from typing import Annotated

import typer

from .cli import app

SERVER = "vllm.entrypoints.openai.api_server"  # not the command `vllm`: the CPU package's does not find its own version


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
    if find_spec("vllm") is None:
        raise ImportError("tah serve needs vLLM: pip install 'tah[serve]'")
    from .load import find, quiet

    quiet()
    path, kind = find(model)
    if kind == "original":
        raise ValueError(
            f"{model} is a checkpoint of the original implementation; first: tah convert {model} NEW_DIRECTORY"
        )
    if kind == "base":
        raise ValueError(
            f"{model} is a plain base model, which vLLM serves by itself; tah serve needs a TaH checkpoint"
        )
    arguments = [sys.executable, "-m", SERVER, "--model", path, "--served-model-name", model, *context.args]
    os.execv(sys.executable, arguments)
