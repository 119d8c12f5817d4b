"""The command that serves a model on vLLM."""

from __future__ import annotations

import os
import sys
from importlib.util import find_spec
from typing import Annotated

import typer

from .options import model_argument, quiet

SERVER = "tah.vllm.launch"
MIDDLEWARE = "tah.vllm.responses.TellDepths"


def serve(
    context: typer.Context,
    model: Annotated[str, model_argument("Directory or hub id of a TaH checkpoint.")],
) -> None:
    """Serve a model on vLLM, with the OpenAI API.

    All other options go to the server of vLLM unchanged: --port 8000, --max-model-len 4096, --dtype float32, ...
    """
    need_vllm()
    from tah.load import check_tah, find, load_tokenizer

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


def need_vllm() -> None:
    """Refuse to serve without vLLM.

    Raises:
        ImportError: it is not installed.
    """
    if find_spec("vllm") is None:
        raise ImportError(
            "serving needs vLLM, in an environment of its own: make serve-env, or pip install 'tah[serve]'"
        )
