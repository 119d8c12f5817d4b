"""What can be refused before torch is imported. The messages are those of the library, which checks again."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from .names import PACKAGE, RECIPES, words

DATA_FILES = (".jsonl", ".json", ".parquet", ".csv", ".txt", ".md")


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
    """Refuse a file of texts that does not exist.

    Raises:
        ValueError: it is a path, not an id of the Hub, and leads nowhere.
    """
    path = Path(source)
    is_file = path.suffix in DATA_FILES and os.path.isdir(path.parent)
    if (is_file or source.startswith((".", "/", "~"))) and not os.path.exists(source):
        raise ValueError(f"data {source!r} cannot be read: there is no such file or directory")
    return source


def check_recipe(source: str) -> str:
    """Refuse a recipe that is neither a file nor in the package.

    Raises:
        ValueError: there is no such recipe; names the nearest.
    """
    if os.path.isfile(source) or ("/" not in source and PACKAGE.joinpath("recipes", f"{source}.yaml").is_file()):
        return source
    if "/" in source or source.endswith((".yaml", ".yml")):
        raise ValueError(f"no recipe {source!r}: there is no such file")
    raise ValueError(f"no recipe {source!r}; {words.suggest(source, RECIPES)}")


def split(text: str | None) -> list[str]:
    """The words of a list with commas."""
    return [word.strip() for word in (text or "").split(",") if word.strip()]


def check_tasks(text: str) -> str:
    """Refuse unknown benchmarks.

    Raises:
        ValueError: an unknown name, or no name at all.
    """
    for name in split(text):
        if name not in ("nine", *words.TASKS) and not name.startswith(words.STOCK_TASK):
            known = words.suggest(name, ("nine", *words.TASKS))
            raise ValueError(f"unknown task {name!r}; {known}, or {words.STOCK_TASK}NAME for lm-eval's own")
    if not split(text):
        raise ValueError("no tasks; give --tasks nine or names")
    return text


def check_policies(text: str | None) -> str | None:
    """Refuse unknown policies.

    Raises:
        ValueError: an unknown name, with the nearest.
    """
    for name in split(text):
        if name not in words.POLICIES:
            raise ValueError(f"unknown policy {name!r}; {words.suggest(name, words.POLICIES)}")
    return text


def check_questions(files: Mapping[str, str], tasks: Sequence[str]) -> None:
    """Refuse files of questions that do not exist, or are for other tasks.

    Raises:
        ValueError: names the file, or the task.
    """
    names = dict.fromkeys(each for name in tasks for each in (words.NINE if name == "nine" else [name]))
    for name, path in files.items():
        if name not in names:
            raise ValueError(f"--data {name}=...: {name} is not among the tasks {', '.join(names)}")
        if not os.path.exists(path):
            raise ValueError(f"{path} cannot be read: there is no such file")


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
