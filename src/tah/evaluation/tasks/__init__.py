"""The benchmarks as tasks of lm-evaluation-harness: one YAML file each, our protocol (zero-shot, chat, boxed answers).

In lm-eval their names begin with `tah_`, so that its own tasks of the same benchmarks stay reachable beside them.
"""

from __future__ import annotations

from pathlib import Path

DIRECTORY = Path(__file__).parent
PREFIX = "tah_"  # of our tasks in lm-eval
STOCK = "lm_eval:"  # before the name of one of lm-eval's own tasks, in `tah eval`
NINE = (
    "aime25",
    "olympiadbench",
    "amc23",
    "math500",
    "gsm8k",
    "gpqa_diamond",
    "mmlu_redux",
    "humaneval_plus",
    "mbpp_plus",
)  # of the paper (spec D.1)
TASKS = (*NINE, "aime24", "aime26", "minerva", "mmlu_stem", "arc_c", "arc_e")
CODE = ("humaneval_plus", "mbpp_plus")
