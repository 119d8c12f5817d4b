"""Checks of arguments that need no import of torch; the library repeats them."""

from __future__ import annotations

import os

from .names import words

SHARED = ("run", "label", "train", "eval", "trace")  # commands that several processes run together


def process() -> int:
    """Return the number of this process among those that a launcher started; 0 for the first, or for one alone."""
    return int(os.environ.get("RANK") or 0) if int(os.environ.get("WORLD_SIZE") or 1) > 1 else 0


def check_processes(command: str) -> None:
    """Check that torchrun or `accelerate launch` started a command that several processes run together.

    Raises:
        ValueError: Every process would run the whole command.
    """
    if command not in SHARED and "LOCAL_RANK" in os.environ and int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise ValueError(
            f"tah {command} runs in one process; start it without torchrun and accelerate launch (in several processes "
            f"run: {', '.join(SHARED)})"
        )


def check_model(source: str | None) -> str | None:
    """Return `source`, if it may be a model.

    A name like `smolm2` is either a misspelt bundled checkpoint or a repository, so the function queries the Hub.

    Args:
        source: Path, Hub id, or name of a bundled checkpoint.

    Raises:
        ValueError: There is no such model.
    """
    if source is None or not source.strip() or source in words.MODELS or os.path.exists(source):
        return source
    near = words.nearest(source, words.MODELS)
    hint = "" if near is None else f"; did you mean {near}?"
    if source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise ValueError(f"no model {source!r}: there is no such directory{hint}")
    if near is not None and "/" not in source and not _is_repository(source):
        raise ValueError(f"no model {source!r}: there is no such directory or repository{hint}")
    return source


def _is_repository(name: str) -> bool:
    """Return whether the Hub or its local cache has a model of this name; False if the Hub cannot be reached."""
    from huggingface_hub import model_info, try_to_load_from_cache

    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str) or model_info(name, timeout=5) is not None
    except Exception:  # no such repository, invalid name, no network: the Hub client has many exceptions
        return False


def check_data(source: str) -> str:
    """Return `source`; raise ValueError if it is a path that does not exist."""
    return words.check_data(source)


def check_recipe(source: str) -> str:
    """Return `source`; raise ValueError if it is neither a file nor a packaged recipe."""
    words.find_recipe(source)
    return source


def check_target(target: str) -> str:
    """Return `target`; raise ValueError if it is not a target of `tah tune`."""
    words.parse_target(target)
    return target


def split(text: str | None) -> list[str]:
    """Return the words of a comma-separated list."""
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def check_tasks(text: str) -> str:
    """Return `text`; raise ValueError if it names an unknown task."""
    words.expand_tasks(split(text))
    return text


def check_policies(text: str | None) -> str | None:
    """Return `text`, a comma-separated list of policies.

    Raises:
        ValueError: A policy is unknown; the message names the nearest one.
    """
    for name in split(text):
        if name not in words.POLICIES:
            raise ValueError(words.unknown("policy", name, words.POLICIES))
    return text


def check_run(name: str) -> str:
    """Return `name`, if its directory contains an evaluation.

    Args:
        name: DIR, or DIR:POLICY.

    Raises:
        ValueError: The directory has no run.json.
    """
    before, colon, _ = name.rpartition(":")
    directory = before if colon and not os.path.isdir(name) else name
    if not os.path.isfile(os.path.join(directory, "run.json")):
        raise ValueError(f"{directory} has no evaluation (no run.json); give the -o directory of tah eval")
    return name
