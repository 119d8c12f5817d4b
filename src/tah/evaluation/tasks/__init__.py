"""The benchmarks as tasks of lm-evaluation-harness: one YAML file each, our protocol (zero-shot, chat, boxed answers).

In lm-eval their names begin with `tah_`, so that its own tasks of the same benchmarks stay reachable beside them.
"""

from __future__ import annotations

from pathlib import Path

DIRECTORY = Path(__file__).parent
PREFIX = "tah_"  # of our tasks in lm-eval
CODE = ("humaneval_plus", "mbpp_plus")
