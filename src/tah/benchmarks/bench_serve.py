"""`tah bench serve`: what iterating costs on vLLM, as a ratio to the stock base model on the same vLLM.

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

from ..load import find, load_base, load_tah
from ..model import TaHForCausalLM
from .bench import RATE, SEED, machine

SLOTS = 32  # requests that run at a time, at most
BATCHING = {"never": "two_pass", "two_pass": "two_pass", "mixed": "mixed"}
VARIANTS = ("base", *BATCHING)
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


def _engine(pipe: Any, model: str, variant: str, dtype: str, longest: int) -> None:
    """A variant's process: answers every task it is sent with a `Turn`, until None comes."""
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
    pipe.send(None)
    while (task := pipe.recv()) is not None:
        ask = [{"prompt_token_ids": ids} for ids in task.ids()]
        params = [SamplingParams(temperature=0, ignore_eos=True, max_tokens=n, detokenize=False) for n in task.new]
        wall, cpu = time.perf_counter(), time.process_time()
        outs = llm.generate(ask, params, use_tqdm=False)
        turn = Turn(time.process_time() - cpu, time.perf_counter() - wall, 0.0)
        if variant != "base":
            deep = sum(int((out.outputs[0].routed_experts > 1).sum()) for out in outs)
            turn.iterated = deep / (sum(task.prompts) + sum(task.new) - len(outs))  # the last token does not run
        pipe.send(turn)


@contextmanager
def engine(model: str, variant: str, dtype: str, longest: int) -> Iterator[Callable[[Task], Turn]]:
    """A function that runs a task on a fresh engine; the engine ends with the context."""
    here, there = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_engine, args=(there, model, variant, dtype, longest))
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
        receive()
        yield run
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
    """Measure all variants on vLLM: `{"machine", "settings", "rows"}`. `report` is called with each row as it comes.

    Raises:
        ImportError: there is no vLLM.
    """
    if find_spec("vllm") is None:
        raise ImportError("serving needs vLLM: pip install 'tah[serve]'")
    os.environ |= SETTINGS
    rows: list[Row] = []
    longest = max(p + n for task in tasks for p, n in zip(task.prompts, task.new, strict=True))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        paths = checkpoints(model, dtype, folder)
        engines = {name: stack.enter_context(engine(paths[name], name, dtype, longest)) for name in variants}
        for task in tasks:
            for row in _compare(task, engines, repeats):
                rows.append(row)
                report(row)
    settings = {"model": model, "dtype": dtype, "slots": SLOTS, "rate": RATE, "repeats": repeats, "seed": SEED}
    settings |= {"vllm": version("vllm-cpu"), "tasks": [asdict(task) for task in tasks]}
    return {"machine": machine() | {"threads": 1}, "settings": settings, "rows": [asdict(row) for row in rows]}


def _compare(task: Task, engines: dict[str, Callable[[Task], Turn]], repeats: int) -> list[Row]:
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
    return "\n".join(lines)


def save(result: dict[str, Any], folder: Path) -> None:
    """Write bench_serve.json and bench_serve.md."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bench_serve.json").write_text(json.dumps(result, indent=2) + "\n")
    (folder / "bench_serve.md").write_text(markdown(result) + "\n")
