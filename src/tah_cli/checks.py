"""What can be refused before torch is imported: the checks of `names.py`, which the library makes again."""

from __future__ import annotations

import os

from .names import words


def check_model(source: str | None) -> str | None:
    """Refuse a path that leads nowhere, and a misspelt word for one of our models.

    A repository of the Hub may have a name that resembles one of these words, so the Hub is asked.

    Raises:
        ValueError: there is no such model.
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
    """Whether the Hub or its cache here has a model of this name; False where the Hub cannot be reached."""
    from huggingface_hub import model_info, try_to_load_from_cache

    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str) or model_info(name, timeout=5) is not None
    except Exception:  # not there, not a name, no network: whatever the Hub's client raises
        return False


def check_data(source: str) -> str:
    """Refuse a file of texts that does not exist."""
    return words.check_data(source)


def check_recipe(source: str) -> str:
    """Refuse a recipe that is neither a file nor in the package."""
    words.find_recipe(source)
    return source


def check_target(target: str) -> str:
    """Refuse what is no aim of tah tune."""
    words.parse_target(target)
    return target


def split(text: str | None) -> list[str]:
    """The words of a list with commas."""
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def check_tasks(text: str) -> str:
    """Refuse unknown benchmarks."""
    words.expand_tasks(split(text))
    return text


def check_policies(text: str | None) -> str | None:
    """Refuse unknown policies.

    Raises:
        ValueError: an unknown name, with the nearest.
    """
    for name in split(text):
        if name not in words.POLICIES:
            raise ValueError(words.unknown("policy", name, words.POLICIES))
    return text


def check_run(name: str) -> str:
    """Refuse a directory without an evaluation.

    Args:
        name: DIR, or DIR:POLICY.

    Raises:
        ValueError: there is no run.json.
    """
    before, colon, _ = name.rpartition(":")
    directory = before if colon and not os.path.isdir(name) else name
    if not os.path.isfile(os.path.join(directory, "run.json")):
        raise ValueError(f"{directory} holds no evaluation (no run.json); give the -o directory of tah eval")
    return name
