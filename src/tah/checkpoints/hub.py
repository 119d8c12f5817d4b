"""Models of the hub as directories of this machine, so that they are looked at before any of them is used.

A model comes in two parts: what describes it (JSON, tokenizer, chat template), and then, by name, the weights that the
first part leads to. So nothing else of a repository is downloaded: no pickle but the authors' `iter_decider.bin`, no
copies of the weights in other formats.
"""

from __future__ import annotations

import os
import re
import socket
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import LocalEntryNotFoundError

from .untrusted import shards

ORIGINAL = "tah_config.json"  # only checkpoints of the original implementation have this file
OPTIONS = {"cache_dir", "token", "local_files_only", "force_download"}  # of from_pretrained and of a download alike
TOKENIZER = (  # what tokenizers of transformers read; a repository's other JSON may have any size
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json merges.txt vocab.txt "
    "tokenizer.model spiece.model sentencepiece.bpe.model chat_template.jinja chat_template.json"
).split()
RARE = (
    "tokenizer.*.json byte_maps.json emoji.json entity_vocab.json normalizer.json target_vocab.json vocab-src.json "
    "vocab-tgt.json word_pronunciation.json word_shape.json bpe.codes dict.txt prophetnet.tokenizer "
    "sentencepiece.model spm.model spm_char.model source.spm target.spm tekken.json tokenizer.model.v* *.tiktoken "
    "additional_chat_templates/*.jinja"
).split()
MODEL = ("config.json", "generation_config.json", "model.safetensors.index*.json", ORIGINAL)


class Snapshot:
    """A revision of a repository in the hub's cache.

    Args:
        repository: its id, like `nics-efc/TaH-plus-1.7B`.
        revision: branch, tag or commit.
        options: of `snapshot_download`: `cache_dir`, `token`, `local_files_only`, `force_download`.

    Raises:
        ValueError: there is no such repository or revision, or the hub cannot be reached and nothing is in the cache.
    """

    def __init__(self, repository: str, revision: str | None = None, subfolder: str = "", **options: Any) -> None:
        self.repository, self.inside = repository, f"{subfolder.strip('/')}/" if subfolder.strip("/") else ""
        if not options.get("local_files_only"):
            options["local_files_only"] = not hub_reachable()
        self._download = partial(snapshot_download, repository, **options)
        patterns = [self.inside + name for name in (*MODEL, *TOKENIZER, *RARE)]
        self.root = self._get(revision=revision, allow_patterns=patterns)
        self.directory = self.root / self.inside

    @property
    def commit(self) -> str:
        return self.root.name

    def complete(self, *more: str, variant: str = "") -> Path:
        """Its directory, once the weights are there too, and `more` files where the repository has them."""
        middle = f".{variant}" if variant else ""
        names, index = [f"model{middle}.safetensors"], self.directory / f"model.safetensors.index{middle}.json"
        if index.is_file():
            names += [path.name for path in shards(index, there=False)]
        wanted = [self.inside + name for name in (*names, *more)]
        self._get(revision=self.commit, allow_patterns=wanted)
        return self.directory

    def _get(self, **options: Any) -> Path:
        try:
            return Path(self._download(**options))
        except Exception as error:
            unreachable = isinstance(error, LocalEntryNotFoundError)  # or what is in the cache is not all of it
            line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
            why = "the model hub cannot be reached" if unreachable else line[:300]
            raise ValueError(f"no model {self.repository!r}: there is no such directory, and {why}") from error


def is_repository(source: str) -> bool:
    """Whether `source` can be a repository's id, and not a path."""
    return re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source) is not None


def hub_reachable() -> bool:
    """False where the user wants no requests, or asking the hub would only run into a minute of retries."""
    if constants.HF_HUB_OFFLINE:  # as huggingface_hub reads the variable: `0` and `no` are not offline
        return False
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HF_ENDPOINT")):
        return True
    try:
        socket.getaddrinfo("huggingface.co", 443)
    except OSError:
        return False
    return True


def local(source: str | os.PathLike[str], options: dict[str, Any]) -> Path:
    """The directory of a model that `from_pretrained` was asked for, complete; a repository is downloaded.

    Args:
        options: what else `from_pretrained` was given; what says where in a repository is read, and nothing taken out.

    Raises:
        ValueError: there is no such directory or repository.
    """
    name, subfolder = os.fspath(source), options.get("subfolder") or ""
    if os.path.isdir(name):
        directory = Path(name, subfolder)
        return converted(name, directory) if is_original(directory) else directory
    if not is_repository(name):
        raise ValueError(f"no model {name!r}: there is no such directory")
    found = Snapshot(
        name, options.get("revision"), subfolder, **{key: options[key] for key in OPTIONS & options.keys()}
    )
    if is_original(found.directory):
        return converted(name, found)
    code = ["*.py"] if options.get("trust_remote_code") else []
    return found.complete(*code, variant=options.get("variant") or "")


def converted(name: str, found: Path | Snapshot) -> Path:
    """A checkpoint in the authors' layout as one of ours: in the cache, by revision, or, where it is local, by the
    contents of the files that are converted.

    Raises:
        ValueError: it cannot be converted.
    """
    from .contents import contents
    from .convert import convert_once, files_read

    if isinstance(found, Snapshot):
        return convert_once(name, found.commit[:12], lambda: original_directory(found))
    key = str(contents(str(found), files_read(found))).rpartition(" ")[2]
    return convert_once(os.path.basename(os.path.abspath(name)), key, lambda: found)


def advice(directory: Any) -> str:
    """What to do about a damaged directory, to be put behind the reason: it may be one that `converted` has made."""
    from .smollm2 import cache_dir

    if not isinstance(directory, (str, os.PathLike)) or not re.search(r"-tah-v\d+$", os.path.basename(directory)):
        return ""
    ours = os.path.realpath(os.path.dirname(directory)) == os.path.realpath(cache_dir())
    return "; delete that directory, and it is converted again" if ours else ""


def is_original(directory: Path) -> bool:
    """Whether it has the layout of the original implementation (spec C.1)."""
    return (directory / ORIGINAL).is_file()


def original_directory(found: Snapshot) -> Path:
    """A checkpoint of the authors, with all of it that `convert` reads; what cannot be converted is not downloaded."""
    from .original import read_config

    return found.complete(*own_files(read_config(found.directory)))


def own_files(config: dict[str, Any]) -> list[str]:
    """Where the decider and the adapter of the authors' checkpoint may be, by its `tah_config.json`."""
    kwargs = config.get("iter_decider_kwargs")
    moved = kwargs.get("load_path") if isinstance(kwargs, dict) else None
    files = ["iter_decider.bin", "lora/adapter_config.json", "lora/adapter_model.safetensors"]
    if isinstance(moved, str) and not set("*?[") & set(moved):
        files += [os.path.normpath(moved), f"{os.path.normpath(moved)}/iter_decider.bin"]
    return files
