"""Common functions of the benchmarks: alternating runs, medians and ratios, memory of a new process, result files.

Variants alternate within every round, so changes in the speed of the machine affect all of them equally. The ratio of a
variant is the median over rounds of its time divided by the first variant's time in the same round.
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
    """Return random token ids [B, T], which are the same in every call."""
    generator = torch.Generator().manual_seed(SEED)
    vocab = model.config.get_text_config().vocab_size
    return torch.randint(3, vocab, (batch, length), generator=generator).to(model.device)


def texts(tokenizer: Any, lengths: Sequence[int]) -> list[list[int]]:
    """Return token ids of English texts (the help pages of Python) with these lengths.

    Raises:
        ValueError: The tokenizer returns no tokens.
    """
    pages = "\n".join(text for _, text in sorted(topics.items()))
    ids = tokenizer(pages[: 16 * sum(lengths)], add_special_tokens=False, verbose=False)["input_ids"]
    if not ids:
        raise ValueError("the tokenizer returns no tokens for an English text")
    ids = list(islice(cycle(ids), sum(lengths)))
    return [ids[stop - length : stop] for stop, length in zip(accumulate(lengths), lengths, strict=True)]


# -- time --------------------------------------------------------------------------------------------------------


def alternate(runs: Mapping[str, Callable[[], T]], repeats: int) -> dict[str, list[T]]:
    """Call every run in every round, and return the results by run.

    A warm-up round precedes the counted rounds. Each round begins with a different run.
    """
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
    """Return a function that calls `run` and returns the seconds until `device` has finished its work."""

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
    """Return the median over rounds of the ratio of two values of the same round."""
    return statistics.median(value / other for value, other in zip(values, first, strict=True))


# -- memory ------------------------------------------------------------------------------------------------------


def in_fresh_process(variant: str, measure: Callable[..., float], *arguments: Any) -> float:
    """Return the result of a function that runs in a new process.

    Args:
        variant: Name of the variant, for the error message.
        measure: Function of a module.
        *arguments: Arguments of the function.

    Raises:
        RuntimeError: The function failed.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), initializer=quiet) as pool:
        try:
            return pool.submit(measure, *arguments).result()
        except Exception as error:
            raise RuntimeError(f"measuring memory of {variant} failed: {error}") from error


def resident(field: str = "VmRSS") -> float:
    """Return the resident memory of this process in MiB; with `VmHWM`, its maximum so far."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def peak_during(run: Callable[[], object], device: torch.device, before: float) -> float:
    """Return the peak memory of a run in MiB: allocated memory on a GPU, else resident memory minus `before`."""
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
    """A row of a result: one variant on one task."""

    dtype: str
    task: str  # "decode, batch 4" or "prefill, 512 tokens" or "memory, 2048 tokens"
    variant: str
    median: float  # seconds or MiB
    ratio: float  # ratio to the first variant
    iterated: float  # iterated share of the tokens
    tokens_per_second: float | None

    @property
    def value(self) -> str:
        """The median with its unit."""
        if self.task.startswith("memory"):
            return f"{self.median:.0f} MiB" if self.median >= 100 else f"{self.median:.3g} MiB"
        return f"{self.median * 1000:.0f} ms"

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
    """Return a row per variant.

    Args:
        dtype: Data type of the products.
        task: Name of the task.
        values: Values of all rounds by variant; ratios are to the first variant.
        iterated: Iterated share by variant; a missing one is 0.
        tokens: Tokens of one run; 0 for memory.
        progress: Reporter, which gets a line for each row.
    """
    first, rows = next(iter(values.values())), []
    for name, its in values.items():
        median = statistics.median(its)
        speed = tokens / median if tokens else None
        rows.append(Row(dtype, task, name, median, median_ratio(its, first), iterated.get(name, 0.0), speed))
        progress.note(str(rows[-1]))
    return rows


def result_of(settings: Mapping[str, Any], rows: Iterable[Any]) -> dict[str, Any]:
    """Return a result: the machine, the settings, and rows, which are dataclasses."""
    return {"machine": machine(), "settings": {**settings, "seed": SEED}, "rows": [asdict(row) for row in rows]}


def machine() -> dict[str, Any]:
    """Return the hardware and the versions of this machine."""
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
    """Write the result as `name`.json and its Markdown as `name`.md into `folder`."""
    write_atomically(folder / f"{name}.json", json.dumps(result, indent=2) + "\n")
    write_atomically(folder / f"{name}.md", markdown + "\n")
