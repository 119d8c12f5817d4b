"""The words that a user may write: policies, choices of the configuration, tasks, models. Each list stands here only.

Imports nothing of torch, so that the command line knows them at once (`tah_cli/names.py` reads this file alone).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Literal

POLICIES = ("decider", "oracle", "always", "never", "confidence", "random")
LABEL_FREE = ("decider", "confidence", "always", "never", "random")  # `oracle` needs labels, which a prompt has none of
CONFIDENCE_MEASURES = ("probability", "entropy")
NEXT_INPUT = ("topk", "hidden")
ATTENTION = ("duo", "own", "blind")
OUTPUT = ("sum", "zero_init")

STAGES = ("backbone", "decider")  # of training
Stage = Literal["backbone", "decider"]
METHODS = ("paper", "lookahead", "standard", "always", "random", "confidence", "blind")  # who iterates in training
BY_GAIN = ("lookahead", "blind")  # methods whose decider learns what a pass gains, so that nothing is labelled
BY_SHARE = (*BY_GAIN, "random")  # methods that iterate a sampled share of the tokens

DTYPES = ("auto", "float32", "bfloat16", "float16")
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
STOCK_TASK = "lm_eval:"  # before the name of one of lm-eval's own tasks


def nearest(word: object, allowed: Iterable[str]) -> str | None:
    """The allowed word that looks most like `word`; None where none is near."""
    found = difflib.get_close_matches(str(word), list(allowed), n=1)
    return found[0] if found else None


def suggest(word: object, allowed: Iterable[str]) -> str:
    """What to tell a user who wrote an unknown `word`: `did you mean never? choose from decider, never`."""
    allowed = list(allowed)
    near = nearest(word, allowed)
    return (f"did you mean {near}? " if near else "") + f"choose from {', '.join(allowed)}"
