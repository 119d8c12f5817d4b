"""What all benchmarks share: runs that take turns, medians and ratios, memory in a fresh process, tables and files.

Variants take turns inside every round, so a machine whose speed drifts slows all of them alike; the ratio of a variant
is the median over rounds of its time divided by the first variant's time in the same round.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import accumulate, cycle, islice
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, TypeVar

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from ..files import write_atomically
from ..load import quiet
from ..progress import Reporter

SEED = 0
T = TypeVar("T")


def prompts(model: PreTrainedModel, batch: int, length: int) -> Tensor:
    """Random token ids [B, T], the same for every variant."""
    generator = torch.Generator().manual_seed(SEED)
    vocab = model.config.get_text_config().vocab_size
    return torch.randint(3, vocab, (batch, length), generator=generator).to(model.device)


def texts(tokenizer: Any, lengths: Sequence[int]) -> list[list[int]]:
    """Token ids of as many tokens of English, the help pages of Python."""
    pages = "\n".join(text for _, text in sorted(topics.items()))
    ids = tokenizer(pages[: 16 * sum(lengths)], add_special_tokens=False, verbose=False)["input_ids"]
    if not ids:
        raise ValueError("the tokenizer makes no tokens of an English text")
    ids = list(islice(cycle(ids), sum(lengths)))
    return [ids[stop - length : stop] for stop, length in zip(accumulate(lengths), lengths, strict=True)]


# -- time --------------------------------------------------------------------------------------------------------


def alternate(runs: Mapping[str, Callable[[], T]], repeats: int) -> dict[str, list[T]]:
    """What every run returns in every round. A warm-up round is not counted; each round begins with another run."""
    found: dict[str, list[T]] = {name: [] for name in runs}
    names = list(runs)
    for turn in range(repeats + 1):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            value = runs[name]()
            if turn:
                found[name].append(value)
    return found


def timed(run: Callable[[], object], device: torch.device | str) -> Callable[[], float]:
    """A run that returns its seconds, until `device` has finished."""

    def sync() -> None:
        if torch.device(device).type == "cuda":
            torch.cuda.synchronize(device)

    def seconds() -> float:
        sync()
        start = time.perf_counter()
        run()
        sync()
        return time.perf_counter() - start

    return seconds


def median_ratio(values: Sequence[float], first: Sequence[float]) -> float:
    """The median over rounds of the ratio of two values of the same round."""
    return statistics.median(value / other for value, other in zip(values, first, strict=True))


# -- memory ------------------------------------------------------------------------------------------------------


def in_fresh_process(variant: str, measure: Callable[..., float], *arguments: Any) -> float:
    """What a function of a module returns when it runs in a new process.

    Raises:
        RuntimeError: it failed.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=quiet) as pool:
        try:
            return pool.submit(measure, *arguments).result()
        except Exception as error:
            raise RuntimeError(f"measuring memory of {variant} failed: {error}") from error


def resident(field: str = "VmRSS") -> float:
    """MiB that this process has in memory now; with `VmHWM`, the most that it had."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def peak_during(run: Callable[[], object], device: torch.device, before: float) -> float:
    """MiB at the peak of a run: allocated on a GPU, elsewhere resident less what there was `before`."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark of resident memory
    run()
    return resident("VmHWM") - before


# -- results -----------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One line of a result: a variant on a task."""

    dtype: str
    task: str  # "decode, batch 4" or "prefill, 512 tokens" or "memory, 2048 tokens"
    variant: str
    median: float  # seconds, or MiB
    ratio: float  # to the first variant
    iterated: float  # share of tokens that took a second pass
    tokens_per_second: float | None

    @property
    def value(self) -> str:
        """The median with its unit."""
        return f"{self.median:.0f} MiB" if self.task.startswith("memory") else f"{self.median * 1000:.0f} ms"

    def __str__(self) -> str:
        return f"{self.dtype}, {self.task}, {self.variant}: {self.value}, ratio {self.ratio:.2f}"


def rows_of(
    dtype: str,
    task: str,
    values: Mapping[str, list[float]],
    iterated: Mapping[str, float],
    tokens: int,
    progress: Reporter,
) -> list[Row]:
    """A row per variant.

    Args:
        dtype: of the products.
        task: its name.
        values: of every round, by variant; ratios are to the first variant.
        iterated: share of tokens that took a second pass, by variant; 0 where it is missing.
        tokens: of one run; 0 for memory.
        progress: has a line for each row.
    """
    first, rows = next(iter(values.values())), []
    for name, its in values.items():
        median = statistics.median(its)
        speed = tokens / median if tokens else None
        rows.append(Row(dtype, task, name, median, median_ratio(its, first), iterated.get(name, 0.0), speed))
        progress.note(str(rows[-1]))
    return rows


def result_of(settings: Mapping[str, Any], rows: Iterable[Any]) -> dict[str, Any]:
    """A whole result, of rows that are dataclasses."""
    return {"machine": machine(), "settings": {**settings, "seed": SEED}, "rows": [asdict(row) for row in rows]}


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(":")[2].strip() if names else cpu
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def save(result: Any, markdown: str, folder: Path, name: str) -> None:
    """Write `name`.json and `name`.md."""
    write_atomically(folder / f"{name}.json", json.dumps(result, indent=2) + "\n")
    write_atomically(folder / f"{name}.md", markdown + "\n")
