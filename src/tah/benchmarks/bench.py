"""`tah bench`: what selective iteration costs, as a ratio to the stock base model in the same run.

Variants take turns inside every round, so a machine whose speed drifts slows all of them alike; the ratio of a variant
is the median over rounds of its time divided by the base's time in the same round. Memory is measured in one fresh
process per variant.
"""

from __future__ import annotations

import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from ..files import write_atomically
from ..load import find, load_base, load_tah
from ..model import TaHForCausalLM
from ..policy import DepthState, Policy

VARIANTS = ("base", "never", "forced", "always")
RATE = 0.07  # the paper's share of iterated tokens
PROMPT, NEW = 64, 64  # tokens, for decode
SEED = 0


class Forced(Policy):
    """Pays for the model's decider on every token, then iterates 7 % of them, drawn beforehand.

    In each row, 7 % of the first `prompt` positions and 7 % of the later ones, at seeded random places.

    Args:
        model: whose decider to run.
        batch: rows of the input; it may have no padding.
        prompt: positions of the prompt.
        new: positions after it.
    """

    def __init__(self, model: TaHForCausalLM, batch: int, prompt: int, new: int) -> None:
        self.decider = model.decider
        self.layers = model.decider.layers if model.decider is not None else ()
        generator = torch.Generator().manual_seed(SEED)
        table = torch.zeros(batch, prompt + new, dtype=torch.bool)
        for row in range(batch):
            for start, length in ((0, prompt), (prompt, new)):
                share = round(RATE * length, 6)
                count = math.ceil(share) if row % 2 == 0 else math.floor(share)  # 5 and 4 of 64: 7.0 % of two rows
                table[row, start + torch.randperm(length, generator=generator)[:count]] = True
        self.table = table.to(model.device)

    def __call__(self, state: DepthState) -> Tensor:
        if self.decider is not None:
            self.decider(state)
        row = torch.arange(len(state.positions), device=self.table.device) // (len(state.positions) // len(self.table))
        chosen = self.table[row, state.positions.clamp(max=self.table.shape[1] - 1)]
        return torch.where(chosen, math.inf, -math.inf)


@dataclass
class Row:
    """One line of the result: a variant on a task."""

    dtype: str
    task: str  # "decode, batch 4" or "prefill, 512 tokens" or "memory, 2048 tokens"
    variant: str
    median: float  # seconds, or MiB
    ratio: float  # to the base
    iterated: float  # share of tokens that took a second pass
    tokens_per_second: float | None


def load(model: str, dtype: str) -> TaHForCausalLM:
    """`model` is a TaH checkpoint, a base model, or `smollm2`."""
    path, kind = find(model)
    return load_tah(path, dtype).eval() if kind == "tah" else TaHForCausalLM.from_base(load_base(path, dtype))


def policy_of(variant: str, model: TaHForCausalLM, batch: int, prompt: int, new: int = 0) -> str | Policy:
    return Forced(model, batch, prompt, new) if variant == "forced" else variant


def prompts(model: PreTrainedModel, batch: int, length: int) -> Tensor:
    """Random token ids [B, T], the same for every variant."""
    generator = torch.Generator().manual_seed(SEED)
    vocab = model.config.get_text_config().vocab_size
    return torch.randint(3, vocab, (batch, length), generator=generator).to(model.device)


def sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def decode(model: TaHForCausalLM, variant: str, batch: int) -> Callable[[], None]:
    """`generate` as a user calls it: a prompt of 64 tokens, 64 new ones, greedy."""
    ids = prompts(model, batch, PROMPT)
    given: dict[str, Any] = dict(max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
    given["attention_mask"] = torch.ones_like(ids)
    runner: Any = model.base if variant == "base" else model
    if variant != "base":
        given["policy"] = policy_of(variant, model, batch, PROMPT, NEW)
    return lambda: runner.generate(ids, **given)


@torch.no_grad()
def prefill(model: TaHForCausalLM, variant: str, length: int) -> Callable[[], None]:
    """One forward over a prompt, keeping the cache and the last token's logits, as `generate` begins."""
    ids = prompts(model, 1, length)
    runner: Any = model.base if variant == "base" else model
    given: dict[str, Any] = {} if variant == "base" else {"policy": policy_of(variant, model, 1, length)}

    def run() -> None:
        with torch.no_grad():
            runner(ids, use_cache=True, logits_to_keep=1, **given)

    return run


@torch.no_grad()
def iterated(model: TaHForCausalLM, variant: str, batch: int, length: int) -> float:
    """Share of tokens that take a second pass."""
    if variant in ("base", "never"):
        return 0.0
    ids = prompts(model, batch, length)
    if length == PROMPT:
        policy = policy_of(variant, model, batch, PROMPT, NEW)
        given = dict(max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0, policy=policy)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, **given)
        return (out.depth_count[:, :-1] > 1).float().mean().item()
    policy = policy_of(variant, model, batch, length)
    return (model(ids, logits_to_keep=1, policy=policy).depth_count > 1).float().mean().item()


def interleave(runs: dict[str, Callable[[], None]], repeats: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds of every run in every round; one warm-up round is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        names = list(runs)[turn % len(runs) :] + list(runs)[: turn % len(runs)]
        for name in names:
            sync(device)
            start = time.perf_counter()
            runs[name]()
            sync(device)
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def peak_memory(model: str, dtype: str, variant: str, length: int) -> float:
    """MiB that a fresh process takes for the weights and one prefill: peak resident memory (on a GPU: allocated)
    during the prefill, less what the libraries take before the model is loaded."""
    call = f"from tah.benchmarks.bench import _peak; _peak({model!r}, {dtype!r}, {variant!r}, {length})"
    return in_fresh_process(call, variant)


def in_fresh_process(call: str, variant: str) -> float:
    """The number that a piece of Python prints last."""
    done = subprocess.run(
        [sys.executable, "-c", call], capture_output=True, text=True, env=os.environ | {"TQDM_DISABLE": "1"}
    )
    if done.returncode:
        raise RuntimeError(f"measuring memory of {variant} failed: {done.stderr.strip().splitlines()[-1]}")
    return float(done.stdout.strip().splitlines()[-1])


def _peak(model: str, dtype: str, variant: str, length: int) -> None:
    """Runs in the fresh process of `peak_memory`; prints MiB."""
    before, (path, kind) = _resident(), find(model)
    given: dict[str, Any] = {}
    base: Any
    if variant == "base":
        base = load_tah(path, dtype).base if kind == "tah" else load_base(path, dtype)
    else:
        base = load(model, dtype)
        given["policy"] = policy_of(variant, base, 1, length)
    ids = prompts(base, 1, length)
    if base.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark of resident memory
    with torch.no_grad():
        base(ids, use_cache=True, logits_to_keep=1, **given)
    peak = torch.cuda.max_memory_allocated() / 2**20 if base.device.type == "cuda" else _high_water() - before
    print(peak)


def _status(field: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return int(line.split()[1]) / 1024


def _resident() -> float:
    return _status("VmRSS")


def _high_water() -> float:
    return (
        _status("VmHWM")
        if Path("/proc/self/status").exists()
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    )


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


def bench(
    model: str = "smollm2",
    *,
    dtypes: tuple[str, ...] = ("float32", "bfloat16"),
    batches: tuple[int, ...] = (1, 4, 16),
    lengths: tuple[int, ...] = (512, 2048),
    repeats: int = 5,
    report: Callable[[Row], None] = lambda row: None,
) -> dict[str, Any]:
    """Measure all variants: `{"machine", "settings", "rows"}`. `report` is called with each row as it comes."""
    rows: list[Row] = []

    def add(
        dtype: str, task: str, name: str, values: list[float], base: list[float], share: float, tokens: int
    ) -> None:
        ratio = statistics.median(v / b for v, b in zip(values, base, strict=True))
        median = statistics.median(values)
        rows.append(Row(dtype, task, name, median, ratio, share, tokens / median if tokens else None))
        report(rows[-1])

    for dtype in dtypes:
        loaded = load(model, dtype)
        tasks: list[tuple[str, Any, int, int]] = [(f"decode, batch {b}", decode, b, PROMPT) for b in batches]
        tasks += [(f"prefill, {n} tokens", prefill, 1, n) for n in lengths]
        for task, make, batch, length in tasks:
            size = batch if make is decode else length
            runs = {name: make(loaded, name, size) for name in VARIANTS}
            seconds = interleave(runs, repeats, loaded.device)
            for name in VARIANTS:
                share = iterated(loaded, name, batch, length)
                add(dtype, task, name, seconds[name], seconds["base"], share, batch * NEW if make is decode else length)
        del loaded, runs
        for length in lengths[-1:]:
            peaks = {name: [peak_memory(model, dtype, name, length)] for name in VARIANTS}
            for name in VARIANTS:
                add(dtype, f"memory, {length} tokens", name, peaks[name], peaks["base"], 0.0, 0)
    settings = {"model": model, "prompt": PROMPT, "new": NEW, "rate": RATE, "repeats": repeats, "seed": SEED}
    return {"machine": machine(), "settings": settings, "rows": [asdict(row) for row in rows]}


def markdown(result: dict[str, Any]) -> str:
    """The result as the table of docs/benchmarks.md."""
    lines = ["| dtype | task | variant | median | ratio to base | iterated |", "| --- | --- | --- | --- | --- | --- |"]
    for row in result["rows"]:
        memory = row["task"].startswith("memory")
        value = f"{row['median']:.0f} MiB" if memory else f"{row['median'] * 1000:.0f} ms"
        share = "" if memory else f"{row['iterated']:.1%}"
        lines.append(f"| {row['dtype']} | {row['task']} | {row['variant']} | {value} | {row['ratio']:.2f} | {share} |")
    return "\n".join(lines)


def save(result: dict[str, Any], folder: Path) -> None:
    """Write bench.json and bench.md."""
    write_atomically(folder / "bench.json", json.dumps(result, indent=2) + "\n")
    write_atomically(folder / "bench.md", markdown(result) + "\n")
