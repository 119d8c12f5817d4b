"""What only a published checkpoint needs: the module for the Auto classes, and the upload to the Hub."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, HfApi, ModelCard, hf_hub_download
from huggingface_hub.errors import RemoteEntryNotFoundError

from .card import CARD, is_ours, keep_results, warn_of

MODULE = "modeling_tah.py"
AUTO_MAP = {"AutoConfig": "modeling_tah.TaHConfig", "AutoModelForCausalLM": "modeling_tah.TaHForCausalLM"}
# The import is inside `try` because transformers would otherwise advise `pip install tah` for a missing package.
SOURCE = '''\
"""Load this checkpoint with the package tah. The module contains no code of the model."""

try:
    from tah import TaHConfig, TaHForCausalLM
except ImportError as error:
    raise ImportError(f"this checkpoint needs the Python package tah (Think-at-Hard): {error}; install it") from error
'''


def is_mapped(entry: Mapping[str, Any]) -> bool:
    """Return whether an entry `auto_map` is that of tah, perhaps with the name of a repository before it."""
    return {key: str(value).rpartition("--")[2] for key, value in entry.items()} == AUTO_MAP


def set_auto_map(directory: Path, wanted: bool) -> None:
    """Add `auto_map` and its module to a saved checkpoint, or remove the entry.

    A configuration keeps the entry of the checkpoint that it was loaded from, where it may name another repository.
    """
    path = directory / "config.json"
    described = json.loads(path.read_text("utf-8"))
    if not wanted and "auto_map" not in described:
        return
    described.pop("auto_map", None)
    if wanted:
        described["auto_map"] = AUTO_MAP
        (directory / MODULE).write_text(SOURCE, "utf-8")
    path.write_text(json.dumps(described, indent=2, sort_keys=True) + "\n", "utf-8")


def upload(
    directory: Path,
    names: Sequence[str],
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    keep: bool = False,
) -> Any:
    """Upload files of a directory to the Hub, in one commit. A card that a person wrote in the repository stays.

    Args:
        directory: Directory of the files.
        names: Names of the files and directories to upload, if they exist.
        repo_id: Id of the repository, created if it does not exist.
        commit_message: First line of the commit's message.
        commit_description: Rest of the commit's message.
        private: Whether a new repository is private; by default as the organization decides.
        token: Token of the Hub; by default that of `hf auth login`.
        revision: Branch, created if it does not exist.
        create_pr: Whether to open a pull request instead.
        keep: Whether the results in a card of tah in the repository are added to the card in the directory, if both
            are of the same weights.

    Returns:
        Description of the commit, from `huggingface_hub`.
    """
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None and not create_pr:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    try:
        theirs = Path(hf_hub_download(repo_id, CARD, revision=revision, token=token))
    except RemoteEntryNotFoundError:  # and not its parent, which also stands for a failed connection
        theirs = None
    if theirs is not None and not is_ours(theirs):
        warn_of(f"{CARD} of {repo_id}")
        names = [name for name in names if name != CARD]
    if theirs is not None and keep and CARD in names and is_ours(directory / CARD):
        made = ModelCard.load(directory / CARD)
        if keep_results(made, theirs, f"{CARD} of {repo_id}"):
            (directory / CARD).write_text(str(made), "utf-8")
    files = [path for name in names for path in sorted([directory / name, *(directory / name).rglob("*")])]
    return api.create_commit(
        repo_id,
        [
            CommitOperationAdd(path.relative_to(directory).as_posix(), str(path))
            for path in dict.fromkeys(files)
            if path.is_file()
        ],
        commit_message=commit_message or "Upload model",
        commit_description=commit_description,
        revision=revision,
        create_pr=create_pr,
    )
