"""`tah bench trace`: the cost of a trace, as a ratio to as many forward passes of the base over the same batches.

A trace is the work of `tah trace` without tokenizing: passes, statistics of every token, and lines on disk. A ratio is
the median over rounds of the seconds of the base's passes divided by the seconds of the trace: above 1, the trace is
faster.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.scoring import batches
from ..markdown import table
from ..model import TaHForCausalLM
from ..tracing.trace import TraceRequest, trace
from .measure import alternate, machine, median_ratio, texts, timed


def throughput(
    model: TaHForCausalLM,
    tokenizer: Any,
    lengths: Sequence[int] = (512,) * 8,
    request: TraceRequest | None = None,
    repeats: int = 5,
) -> dict[str, Any]:
    """Measure tracing of English texts, and M passes of `model.base` with all logits.

    With `attention="duo"`, a trace by default runs the model a second time, under its policy. The variant `trace, run
    again` does this with a policy that iterates 7 % of the tokens.

    Args:
        model: Model to trace.
        tokenizer: Its tokenizer.
        lengths: Tokens of each text.
        request: Request of the trace; the passes of the base run the same batches, without padding masks.
        repeats: Number of rounds.

    Returns:
        Machine, settings, seconds of all rounds, tokens per second, and ratios to the base's passes, by variant.
    """
    request = request or TraceRequest()
    ids = texts(tokenizer, lengths)  # English, since the cost of the next token's rank depends on its probability
    rows = [{"input_ids": row, "supervised": [False] + [True] * (len(row) - 1)} for row in ids]
    M = int(request.rule.max_depth or model.config.max_depth)
    inputs = []
    for batch in batches([length - 1 for length in lengths], request.tokens_per_batch):
        x = torch.zeros(len(batch), max(lengths[at] for at in batch) - 1, dtype=torch.int64)
        for row, at in enumerate(batch):
            x[row, : lengths[at] - 1] = torch.tensor(ids[at][:-1])
        inputs.append(x.to(model.device))

    with tempfile.TemporaryDirectory() as folder:

        def run(variant: TraceRequest) -> None:
            file = Path(folder) / "trace.jsonl"
            file.unlink(missing_ok=True)
            trace(model, tokenizer, rows, file, variant)

        again = replace(request, run_policy=True, rule=replace(request.rule, policy="random"))
        runs = {
            "plain": partial(_plain, model, inputs, M),
            "trace": partial(run, replace(request, run_policy=False)),
            "trace, run again": partial(run, again),
        }
        seconds = alternate({name: timed(run, model.device) for name, run in runs.items()}, repeats)
    tokens = sum(lengths) - len(lengths)
    return {
        "machine": machine(),
        "settings": {
            "lengths": list(lengths),
            "tokens_per_batch": request.tokens_per_batch,
            "repeats": repeats,
            "passes": M,
        },
        "seconds": seconds,
        "tokens_per_second": {name: tokens / statistics.median(each) for name, each in seconds.items()},
        "ratio": {name: median_ratio(seconds["plain"], each) for name, each in seconds.items()},
    }


def markdown(result: dict[str, Any]) -> str:
    """Return the result as a Markdown table."""
    speeds, passes = result["tokens_per_second"], result["settings"]["passes"]
    rows = [(name, f"{speeds[name]:.0f}", f"{ratio:.2f}") for name, ratio in result["ratio"].items()]
    return table(("run", "tokens/s", f"ratio to {passes} plain passes"), rows)


@torch.no_grad()
def _plain(model: TaHForCausalLM, inputs: Sequence[Tensor], passes: int) -> None:
    for x in inputs:
        for _ in range(passes):
            model.base(input_ids=x, use_cache=False)
