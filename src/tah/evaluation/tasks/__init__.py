"""The benchmarks as tasks of lm-evaluation-harness, one YAML file each (zero-shot, chat template, boxed answers).

In lm-eval their names begin with `tah_`, so that lm-eval's own tasks of the same benchmarks remain available.
"""

from __future__ import annotations

from pathlib import Path

DIRECTORY = Path(__file__).parent
PREFIX = "tah_"  # prefix of the names in lm-eval
CODE = ("humaneval_plus", "mbpp_plus")
