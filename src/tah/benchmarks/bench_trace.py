"""`tah bench trace`: what a trace costs, as a ratio to as many plain forward passes of the base over the same batches.

A trace is all of `tah trace` but tokenizing: passes, statistics of every token, and lines on disk. Variants take turns
inside every round (`bench.py`); a ratio is the median over rounds of the plain passes' seconds over the trace's, so
above 1 the trace is faster.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from itertools import accumulate, cycle, islice
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor

from ..data.scoring import batches
from ..files import write_atomically
from ..model import TaHForCausalLM
from ..tracing.trace import trace
from .bench import interleave, machine


def throughput(
    model: TaHForCausalLM,
    tokenizer: Any,
    lengths: Sequence[int] = (512,) * 8,
    *,
    tokens_per_batch: int = 4096,
    repeats: int = 5,
    **options: Any,
) -> dict[str, Any]:
    """Tokens per second of tracing English texts, and of M plain passes of `model.base` with all logits.

    With `attention="duo"` a trace by default runs the model a second time, under its policy: `trace, run again` is
    that of one which iterates 7 % of the tokens.

    Args:
        lengths: tokens of each text.
        tokens_per_batch: of the trace; the plain passes run the same batches, without padding masks.
        repeats: rounds.
        options: of `trace`.
    """
    ids = _texts(tokenizer, lengths)
    rows = [{"input_ids": row, "supervised": [False] + [True] * (len(row) - 1)} for row in ids]
    M = options.get("max_depth") or model.config.max_depth
    inputs = []
    for batch in batches([length - 1 for length in lengths], tokens_per_batch):
        x = torch.zeros(len(batch), max(lengths[at] for at in batch) - 1, dtype=torch.int64)
        for row, at in enumerate(batch):
            x[row, : lengths[at] - 1] = torch.tensor(ids[at][:-1])
        inputs.append(x.to(model.device))

    with tempfile.TemporaryDirectory() as folder:

        def run(**given: Any) -> Callable[[], None]:
            def traced() -> None:
                file = Path(folder) / "trace.jsonl"
                file.unlink(missing_ok=True)
                trace(model, tokenizer, rows, file, tokens_per_batch=tokens_per_batch, **{**options, **given})

            return traced

        runs = {
            "plain": lambda: _plain(model, inputs, M),
            "trace": run(own_policy=False),
            "trace, run again": run(own_policy=True, policy="random"),
        }
        seconds = interleave(runs, repeats, model.device)
    tokens = sum(lengths) - len(lengths)
    return {
        "machine": machine(),
        "settings": {"lengths": list(lengths), "tokens_per_batch": tokens_per_batch, "repeats": repeats, "passes": M},
        "seconds": seconds,
        "tokens_per_second": {name: tokens / statistics.median(each) for name, each in seconds.items()},
        "ratio": {
            name: statistics.median(p / s for p, s in zip(seconds["plain"], each, strict=True))
            for name, each in seconds.items()
        },
    }


def _texts(tokenizer: Any, lengths: Sequence[int]) -> list[list[int]]:
    """As many tokens of Python's own help: what a true next token's rank costs depends on how likely the text is."""
    help_texts = "\n".join(text for _, text in sorted(topics.items()))
    ids = tokenizer(help_texts[: 16 * sum(lengths)], add_special_tokens=False, verbose=False)["input_ids"]
    if not ids:
        raise ValueError("the tokenizer makes no tokens of an English text")
    ids = list(islice(cycle(ids), sum(lengths)))
    stops = accumulate(lengths)
    return [ids[stop - length : stop] for stop, length in zip(stops, lengths, strict=True)]


def markdown(result: dict[str, Any]) -> str:
    """The result as a table."""
    rows = [
        f"| {name} | {result['tokens_per_second'][name]:.0f} | {ratio:.2f} |" for name, ratio in result["ratio"].items()
    ]
    passes = result["settings"]["passes"]
    return "\n".join([f"| run | tokens/s | ratio to {passes} plain passes |", "| --- | --- | --- |", *rows])


def save(result: dict[str, Any], folder: Path) -> None:
    """Write bench_trace.json and bench_trace.md."""
    write_atomically(folder / "bench_trace.json", json.dumps(result, indent=2) + "\n")
    write_atomically(folder / "bench_trace.md", markdown(result) + "\n")


@torch.no_grad()
def _plain(model: TaHForCausalLM, inputs: Sequence[Tensor], passes: int) -> None:
    for x in inputs:
        for _ in range(passes):
            model.base(input_ids=x, use_cache=False)
