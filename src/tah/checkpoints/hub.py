"""Download models of the hub, so that they can be checked before use.

A download has two parts. The first has the files that describe a model (JSON, tokenizer, chat template). The second has
the weights, under the names that the first part contains. No other files are downloaded: no pickle except
`iter_decider.bin` and `input_updater.bin` of an original checkpoint, and no copies of the weights in other formats.
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

from ..errors import first_line
from .original import CONFIG
from .untrusted import shards

OPTIONS = {
    "cache_dir",
    "token",
    "local_files_only",
    "force_download",
}  # options shared by from_pretrained and snapshot_download
TOKENIZER = (  # files that tokenizers of transformers read; other JSON files may have any size
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json vocab.json merges.txt vocab.txt "
    "tokenizer.model spiece.model sentencepiece.bpe.model chat_template.jinja chat_template.json"
).split()
RARE = (
    "tokenizer.*.json byte_maps.json emoji.json entity_vocab.json normalizer.json target_vocab.json vocab-src.json "
    "vocab-tgt.json word_pronunciation.json word_shape.json bpe.codes dict.txt prophetnet.tokenizer "
    "sentencepiece.model spm.model spm_char.model source.spm target.spm tekken.json tokenizer.model.v* *.tiktoken "
    "additional_chat_templates/*.jinja"
).split()
MODEL = ("config.json", "generation_config.json", "base.json", "model.safetensors.index*.json", CONFIG)


class Snapshot:
    """A revision of a repository in the hub's cache.

    Args:
        repository: Id such as `nics-efc/TaH-plus-1.7B`.
        revision: Branch, tag or commit.
        subfolder: Folder of the model in the repository.
        options: Options of `snapshot_download`: `cache_dir`, `token`, `local_files_only`, `force_download`.

    Raises:
        ValueError: The repository or revision does not exist, or the hub cannot be reached and the cache has no copy.
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
        """Download the weights, and return the directory.

        Args:
            more: Patterns of further files to download if they exist.
            variant: Variant of the weights.
        """
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
            unreachable = isinstance(error, LocalEntryNotFoundError)  # also raised for an incomplete copy in the cache
            why = "the model hub cannot be reached" if unreachable else first_line(error)
            raise ValueError(f"no model {self.repository!r}: there is no such directory, and {why}") from error


def is_repository(source: str) -> bool:
    """Return whether `source` has the form of a repository's id."""
    return re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", source) is not None


def hub_reachable() -> bool:
    """Return whether requests to the hub are allowed and likely to succeed.

    A failed request costs about a minute of retries, so the host name is resolved first.
    """
    if constants.HF_HUB_OFFLINE:  # parsed by huggingface_hub, so that `0` and `no` do not mean offline
        return False
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "HF_ENDPOINT")):
        return True
    try:
        socket.getaddrinfo("huggingface.co", 443)
    except OSError:
        return False
    return True
