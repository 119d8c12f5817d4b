"""`tah bench serve`: what iterating costs on vLLM, as a ratio to the stock base model on the same vLLM.

Beside it stands transformers' `generate` of the same TaH model, in batches of as many requests as vLLM has slots.

Each variant is an engine in a process of its own; they take turns, so that a machine whose speed drifts slows all of
them alike. CPU seconds are counted beside the clock: with one thread they hold on a shared machine, where the clock
does not. Prefix caching is off, so every turn does the same work.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ..files import write_atomically
from ..load import find, load_base, load_tah
from ..model import TaHForCausalLM
from .bench import RATE, SEED, machine

SLOTS = 32  # requests that run at a time, at most
BATCHING = {"never": "two_pass", "two_pass": "two_pass", "mixed": "mixed"}
VARIANTS = ("base", *BATCHING, "generate")
SETTINGS = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in the measured process
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_LOGGING_LEVEL": "ERROR",
    "OMP_NUM_THREADS": "1",
}


@dataclass
class Task:
    """Requests that are handed over at once."""

    name: str
    prompts: list[int]  # lengths
    new: list[int]  # tokens asked for

    def ids(self) -> list[list[int]]:
        """Token ids, the same for every variant."""
        draw = random.Random(SEED)
        return [[draw.randrange(3, 200) for _ in range(length)] for length in self.prompts]


def decode(batch: int, new: int = 32) -> Task:
    return Task(f"decode, batch {batch}", [8] * batch, [new] * batch)


def stream(requests: int = 96, new: int = 32) -> Task:
    """More requests than slots, of mixed length, as a loaded server has them."""
    draw = random.Random(SEED)
    lengths = [draw.randint(new // 2, new * 3 // 2) for _ in range(requests)]
    return Task(f"{requests} requests through {SLOTS} slots", [8] * requests, lengths)


def prefill(requests: int = 8, length: int = 128) -> Task:
    return Task(f"prefill, {requests} x {length} tokens", [length] * requests, [1] * requests)


TASKS = (decode(1), decode(8), decode(32), stream(), prefill())


@dataclass
class Turn:
    """One task run once by one variant."""

    cpu: float  # seconds, of all threads
    wall: float  # seconds
    iterated: float  # share of the tokens that ran


@dataclass
class Row:
    """One line of the result: medians of a variant on a task."""

    task: str
    variant: str
    cpu: float  # seconds
    wall: float  # seconds
    ratio: float  # of CPU seconds to the base's in the same round
    wall_ratio: float
    iterated: float
    tokens_per_cpu_second: float  # prompt tokens where the task is prefill


Runner = Callable[[Task], Turn]


def _vllm(model: str, variant: str, dtype: str, longest: int) -> tuple[Runner, float]:
    """Runs tasks on vLLM; and the bytes for keys and values of both depths, to those of depth 1."""
    from vllm import LLM, SamplingParams

    options: dict[str, Any] = {}
    if variant != "base":
        policy = "never" if variant == "never" else "random"
        options["hf_overrides"] = {"policy": policy, "random_rate": RATE}
        options["additional_config"] = {"batching": BATCHING[variant]}
    llm = LLM(
        model, dtype=dtype, skip_tokenizer_init=True, enforce_eager=True, enable_prefix_caching=False,
        max_num_seqs=SLOTS, max_model_len=longest, block_size=32, gpu_memory_utilization=0.05, **options,
    )  # fmt: skip

    def run(task: Task) -> Turn:
        ask = [{"prompt_token_ids": ids} for ids in task.ids()]
        params = [SamplingParams(temperature=0, ignore_eos=True, max_tokens=n, detokenize=False) for n in task.new]
        wall, cpu = time.perf_counter(), time.process_time()
        outs = llm.generate(ask, params, use_tqdm=False)
        turn = Turn(time.process_time() - cpu, time.perf_counter() - wall, 0.0)
        if variant != "base":
            depths = np.concatenate([out.outputs[0].routed_experts for out in outs])
            turn.iterated = float((depths > 1).mean())
        return turn

    served = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    depth_one = sum(cache.nbytes for cache in served.kv_caches)
    pool = 0 if variant == "base" else served.model.pool.keys.nbytes + served.model.pool.values.nbytes
    return run, 1 + pool / depth_one


def _transformers(model: str, dtype: str) -> Runner:
    """Runs tasks with `generate`: whole batches, each as long as its longest answer."""
    import torch

    tah = load_tah(model, dtype).eval()
    tah.config.random_rate = RATE
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "return_dict_in_generate": True}

    def run(task: Task) -> Turn:
        ids, depths = torch.tensor(task.ids()), []
        wall, cpu = time.perf_counter(), time.process_time()
        for start in range(0, len(ids), SLOTS):
            part, new = ids[start : start + SLOTS], max(task.new[start : start + SLOTS])
            mask = torch.ones_like(part)
            out = tah.generate(part, attention_mask=mask, policy="random", max_new_tokens=new, **options)
            depths.append(out.depth_count[:, :-1].flatten())
        turn = Turn(time.process_time() - cpu, time.perf_counter() - wall, 0.0)
        turn.iterated = float((torch.cat(depths) > 1).float().mean())
        return turn

    return run


def _process(pipe: Any, model: str, variant: str, dtype: str, longest: int) -> None:
    """A variant's process: says what memory it takes, then answers every task with a `Turn`, until None comes."""
    run, memory = (
        (_transformers(model, dtype), None) if variant == "generate" else _vllm(model, variant, dtype, longest)
    )
    pipe.send(memory)
    while (task := pipe.recv()) is not None:
        pipe.send(run(task))


@contextmanager
def engine(model: str, variant: str, dtype: str, longest: int) -> Iterator[tuple[Runner, float | None]]:
    """A function that runs a task on a fresh engine, and the engine's memory; it ends with the context."""
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=_process, args=(there, model, variant, dtype, longest))
    process.start()
    there.close()

    def receive() -> Any:
        try:
            return here.recv()
        except EOFError as error:
            raise RuntimeError(f"the engine of {variant} ended; its own message is above") from error

    def run(task: Task) -> Turn:
        here.send(task)
        return receive()

    try:
        yield run, receive()
        here.send(None)
        process.join(60)
    finally:
        process.kill()
        process.join()


def checkpoints(model: str, dtype: str, folder: Path) -> dict[str, str]:
    """Directory of each variant's model; what is missing of base and TaH checkpoint is made in `folder`."""
    path, kind = find(model)
    if kind == "tah":
        base, tah = str(folder), path
        inner = load_tah(path, dtype).base
        weights = {name: tensor for name, tensor in inner.state_dict().items() if ".lora_" not in name}
        inner.save_pretrained(folder, state_dict=weights)
    else:
        base, tah = path, str(folder)
        TaHForCausalLM.from_base(load_base(path, dtype)).save_pretrained(folder)
    return {variant: base if variant == "base" else tah for variant in VARIANTS}


def bench_serve(
    model: str = "smollm2",
    *,
    dtype: str = "float32",
    variants: tuple[str, ...] = VARIANTS,
    tasks: tuple[Task, ...] = TASKS,
    repeats: int = 3,
    report: Callable[[Row], None] = lambda row: None,
) -> dict[str, Any]:
    """Measure `variants`: `{"machine", "settings", "rows", "memory"}`. `report` is called with each row as it comes.

    Raises:
        ImportError: there is no vLLM.
        ValueError: a variant nobody knows, or no base to compare with.
    """
    if "base" not in variants or set(variants) - set(VARIANTS):
        raise ValueError(f"variants {','.join(variants)}: give base and others of {', '.join(VARIANTS)}")
    if find_spec("vllm") is None:
        raise ImportError("serving needs vLLM: pip install 'tah[serve]'")
    os.environ |= SETTINGS
    rows: list[Row] = []
    longest = max(p + n for task in tasks for p, n in zip(task.prompts, task.new, strict=True))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        paths = checkpoints(model, dtype, folder)
        engines = {name: stack.enter_context(engine(paths[name], name, dtype, longest)) for name in variants}
        memory = {name: ratio for name, (_, ratio) in engines.items() if ratio is not None}
        for task in tasks:
            for row in _compare(task, {name: run for name, (run, _) in engines.items()}, repeats):
                rows.append(row)
                report(row)
    settings = {"model": model, "dtype": dtype, "slots": SLOTS, "rate": RATE, "repeats": repeats, "seed": SEED}
    settings |= {"vllm": version("vllm-cpu"), "tasks": [asdict(task) for task in tasks]}
    result = {"machine": machine() | {"threads": 1}, "settings": settings}
    return result | {"rows": [asdict(row) for row in rows], "memory": memory}


def _compare(task: Task, engines: dict[str, Runner], repeats: int) -> list[Row]:
    """All variants on one task; a warm-up turn of each is not counted."""
    turns: dict[str, list[Turn]] = {name: [] for name in engines}
    for number in range(repeats + 1):
        first = number % len(engines)
        for name in [*list(engines)[first:], *list(engines)[:first]]:
            turn = engines[name](task)
            if number:
                turns[name].append(turn)
    work = sum(task.prompts) if set(task.new) == {1} else sum(task.new)
    rows = []
    for name, took in turns.items():
        pairs = list(zip(took, turns["base"], strict=True))
        cpu = statistics.median(turn.cpu for turn in took)
        wall = statistics.median(turn.wall for turn in took)
        ratio = statistics.median(turn.cpu / base.cpu for turn, base in pairs)
        wall_ratio = statistics.median(turn.wall / base.wall for turn, base in pairs)
        rows.append(Row(task.name, name, cpu, wall, ratio, wall_ratio, took[0].iterated, work / cpu))
    return rows


def markdown(result: dict[str, Any]) -> str:
    """The result as the table of docs/serving.md."""
    lines = [
        "| task | variant | CPU s | tokens per CPU s | ratio to base | by the clock | iterated |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        numbers = (
            f"{row['cpu']:.2f} | {row['tokens_per_cpu_second']:.0f} | {row['ratio']:.2f} | {row['wall_ratio']:.2f}"
        )
        lines.append(f"| {row['task']} | {row['variant']} | {numbers} | {row['iterated']:.1%} |")
    told = ", ".join(f"{name} {ratio:.2f}" for name, ratio in result["memory"].items())
    lines += ["", f"Memory for keys and values of as many tokens, to the base's: {told}."]
    return "\n".join(lines)


def save(result: dict[str, Any], folder: Path) -> None:
    """Write bench_serve.json and bench_serve.md."""
    write_atomically(folder / "bench_serve.json", json.dumps(result, indent=2) + "\n")
    write_atomically(folder / "bench_serve.md", markdown(result) + "\n")
