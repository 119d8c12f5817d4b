"""Names that a user may write: policies, choices of the configuration, tasks and models. Each is defined only here.

The commands check these names early, before they import torch. This module therefore must not import torch
(`tah_cli/names.py` reads this file alone).
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

POLICIES = ("decider", "oracle", "always", "never", "confidence", "random")
LABEL_FREE = ("decider", "confidence", "always", "never", "random")  # `oracle` needs labels, and a prompt has none
CONFIDENCE_MEASURES = ("probability", "entropy")
NEXT_INPUT = ("topk", "hidden", "mlp")
ATTENTION = ("duo", "own", "blind")
OUTPUT = ("sum", "zero_init", "mixture", "even")
MIXTURES = ("mixture", "even")  # outputs that are log-probabilities
DECISIONS = ("threshold", "sample")

STAGES = ("backbone", "decider")  # of training
Stage = Literal["backbone", "decider"]
METHODS = (
    "paper",
    "lookahead",
    "standard",
    "always",
    "random",
    "confidence",
    "blind",
    "tah2",
)  # rules for iteration in training
BY_GAIN = ("lookahead", "blind")  # methods whose decider is trained on the gain of a pass, without depth labels
BY_SHARE = (*BY_GAIN, "random")  # methods that iterate a sampled share of the tokens

TOO_LONG = ("drop", "cut")  # treatment of rows longer than max_length
DATA_FILES = (".jsonl", ".json", ".parquet", ".csv")  # files of rows
TEXT_FILES = (".txt", ".md")  # files that hold one text each
RECIPES = Path(__file__).with_name("recipes")  # packaged recipes
RECIPE_FILES = dict(sorted((path.stem, path) for path in RECIPES.glob("*.yaml")))

DTYPES = ("auto", "float32", "bfloat16", "float16")
BENCH_DTYPES = ("float32", "bfloat16")
PRECISIONS = (*BENCH_DTYPES, "autocast")  # of tah bench train; autocast: weights float32, products bfloat16
SERVE_TASKS = ("1", "8", "32", "stream", "prefill")  # of tah bench serve
MODELS = ("smollm2", "smollm2-tah", "follow-tah")  # besides directories and hub ids

NINE = (  # the benchmarks of the paper
    "aime25",
    "olympiadbench",
    "amc23",
    "math500",
    "gsm8k",
    "gpqa_diamond",
    "mmlu_redux",
    "humaneval_plus",
    "mbpp_plus",
)
TASKS = (*NINE, "aime24", "aime26", "minerva", "mmlu_stem", "arc_c", "arc_e")
PROTOCOLS = ("default", "paper")
BACKENDS = ("transformers", "vllm")
STOCK_TASK = "lm_eval:"  # prefix of a task of lm-eval


def nearest(word: str, allowed: Iterable[str]) -> str | None:
    """Return the allowed word most similar to `word`; None if none is similar."""
    found = difflib.get_close_matches(word, list(allowed), n=1)
    return found[0] if found else None


def suggest(word: str, allowed: Iterable[str]) -> str:
    """Return the advice for an unknown `word`: `did you mean never? choose from decider, never`."""
    allowed = list(allowed)
    near = nearest(word, allowed)
    return (f"did you mean {near}? " if near else "") + f"choose from {', '.join(allowed)}"


def unknown(what: str, word: object, allowed: Iterable[str]) -> str:
    """Return the error message for a word that is not allowed."""
    return f"unknown {what} {word!r}; {suggest(str(word), allowed)}"


def expand_tasks(names: Iterable[str]) -> list[str]:
    """Return the names of tasks without repetitions; `nine` becomes the nine benchmarks of the paper.

    Raises:
        ValueError: A task is unknown (the message names the most similar one), or there is no task.
    """
    found = list(dict.fromkeys(each for name in names for each in (NINE if name == "nine" else [name])))
    for name in found:
        if name not in TASKS and not name.startswith(STOCK_TASK):
            raise ValueError(f"{unknown('task', name, ('nine', *TASKS))}, or {STOCK_TASK}NAME for lm-eval's own")
    if not found:
        raise ValueError("no tasks; give --tasks nine or names")
    return found


def check_questions(files: Mapping[str, str | Path], tasks: Sequence[str]) -> None:
    """Check the question files of an evaluation.

    Args:
        files: Paths of question files by task.
        tasks: Names of the evaluated tasks.

    Raises:
        ValueError: A file does not exist, its task is not evaluated, or its task belongs to lm-eval.
    """
    for name, path in files.items():
        if name not in tasks or name.startswith(STOCK_TASK):
            raise ValueError(f"--data {name}=...: {name} is not among the tasks {', '.join(tasks)}")
        if not os.path.exists(path):
            raise ValueError(f"{path} cannot be read: there is no such file")


def check_data(source: str) -> str:
    """Check that a data source exists if it has the form of a path, and return it. Hub ids are not checked.

    Raises:
        ValueError: There is no such file or directory.
    """
    is_path = source.startswith((".", "/", "~")) or Path(source).suffix in (*DATA_FILES, *TEXT_FILES)
    if is_path and not os.path.exists(source):
        raise ValueError(f"data {source!r} cannot be read: there is no such file or directory")
    return source


def find_recipe(source: str) -> Path:
    """Return the path of a recipe file.

    Args:
        source: Path of a recipe, or the name of a packaged recipe.

    Raises:
        ValueError: There is no such recipe; the message names the most similar one.
    """
    if os.path.isfile(source):
        return Path(source)
    if source in RECIPE_FILES:
        return RECIPE_FILES[source]
    if "/" in source or source.endswith((".yaml", ".yml")):
        raise ValueError(f"no recipe {source!r}: there is no such file")
    raise ValueError(f"no recipe {source!r}; {suggest(source, RECIPE_FILES)}")


def parse_target(target: str) -> float | None:
    """Return the number X of the target `share=X`; None for the target `loss`.

    Raises:
        ValueError: The target has neither form.
    """
    name, _, number = target.partition("=")
    try:
        share = float(number) if name == "share" else None
    except ValueError:
        share = None
    if target != "loss" and (share is None or not 0 <= share <= 1):
        raise ValueError(f"target {target!r} is not one of loss, share=X with X from 0 to 1")
    return share
