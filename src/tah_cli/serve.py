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
    model: Annotated[str, model_argument("Directory or Hub id of a TaH checkpoint.")],
) -> None:
    """Serve a model with the OpenAI API, on vLLM.

    All other options are options of the vLLM server: --port 8000, --max-model-len 4096, --dtype float32, ...
    """
    need_vllm()
    from tah.load import check_tah, find, load_tokenizer

    quiet()
    path, kind = find(model)
    if kind == "base":
        raise ValueError(f"{model} is a base model, which vLLM serves without tah; tah serve needs a TaH checkpoint")
    # vLLM also reads weights of other formats and checks fewer names and shapes. No weights are loaded here.
    check_tah(path)
    load_tokenizer(path, model)
    ours = [path, "--served-model-name", model, "--middleware", MIDDLEWARE]
    os.execv(sys.executable, [sys.executable, "-m", SERVER, *ours, *context.args])


def need_vllm() -> None:
    """Check that one vLLM is installed.

    Raises:
        ImportError: vLLM is not installed.
        ValueError: Two distributions of it are.
    """
    from tah.vllm.installed import advice, check_installed

    if find_spec("vllm") is None:
        raise ImportError(f"serving needs vLLM, in a separate environment: {advice()}")
    check_installed()
