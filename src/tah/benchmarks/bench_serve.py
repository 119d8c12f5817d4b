"""`tah bench serve`: the cost of iterating on vLLM, as a ratio to the base model on the same vLLM.

One more variant is `generate` of transformers with the same TaH model, in batches of as many requests as vLLM runs at a
time.

Base, TaH model and `generate` run in separate processes. Each variant alternates with the base step by step, so changes
in the speed of the machine affect both equally. (`generate` has no steps: it runs after the first step of the base.)
The benchmark measures seconds and CPU seconds: with one thread, CPU seconds are reliable on a shared machine. Prefix
caching is off, so every turn does the same work.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from ..load import find, load_base, load_tah
from ..markdown import table
from ..model import TaHForCausalLM
from ..names import SERVE_TASKS
from ..progress import SILENT, Reporter
from ..vllm.installed import vllm_version
from ..vllm.launch import IN_PROCESS
from .bench import RATE
from .measure import SEED, alternate, result_of

SLOTS = 32  # maximum number of requests that run at a time
OF_TAH = ("never", "two_pass", "mixed")  # one engine runs all of them, with one copy of the weights
VARIANTS = ("base", *OF_TAH, "generate")
SETTINGS = IN_PROCESS | {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "OMP_NUM_THREADS": "1",
}


@dataclass
class Task:
    """A set of requests that arrive at the same time."""

    name: str
    prompts: list[int]  # tokens of each prompt
    new: list[int]  # new tokens of each request
    steady: bool = False  # measure only while all requests run: from their first tokens, for sum(new) tokens
    of_prompts: bool = False  # count the tokens of the prompts, not those of the answers

    def ids(self) -> list[list[int]]:
        """Return token ids of the prompts, which are the same for every variant."""
        draw = random.Random(SEED)
        return [[draw.randrange(3, 200) for _ in range(length)] for length in self.prompts]


def decode(batch: int, new: int = 32) -> Task:
    """Return the task of a server with a constant number of requests: none ends during the measurement."""
    return Task(f"decode, batch {batch}", [8] * batch, [new] * batch, steady=True)


def stream(requests: int = 96, new: int = 32) -> Task:
    """Return the task of a loaded server: more requests than run at a time, with answers of different lengths."""
    draw = random.Random(SEED)
    lengths = [draw.randint(new // 2, new * 3 // 2) for _ in range(requests)]
    return Task(f"{requests} requests through {SLOTS} slots", [8] * requests, lengths)


def prefill(requests: int = 8, length: int = 128) -> Task:
    """Return the task of a prefill. It ends with the second token of each answer, as hard tokens may be deferred."""
    return Task(f"prefill, {requests} x {length} tokens", [length] * requests, [2] * requests, of_prompts=True)


TASKS = dict(zip(SERVE_TASKS, (decode(1), decode(8), decode(32), stream(), prefill()), strict=True))


@dataclass
class Turn:
    """One run of a task by one variant."""

    cpu: float  # CPU seconds of all threads per token of the answers, or of the prompts in prefill
    wall: float  # seconds per token
    iterated: float  # iterated share of the tokens that ran


@dataclass
class Row:
    """A row of the result: medians of one variant on one task."""

    task: str
    variant: str
    cpu: float  # CPU seconds per token
    wall: float  # seconds per token
    ratio: float  # CPU seconds per token, divided by the base's in the same round
    wall_ratio: float  # the same with seconds
    iterated: float  # iterated share of the tokens

    def speeds(self) -> list[str]:
        """Return tokens per CPU second and per second, and the cost of a token relative to the base by both clocks."""
        return [f"{1 / self.cpu:.1f}", f"{1 / self.wall:.1f}", f"{self.ratio:.2f}", f"{self.wall_ratio:.2f}"]

    def __str__(self) -> str:
        per_cpu, per_second, cost, by_clock = self.speeds()
        speed = f"{per_cpu} tokens per CPU second, {per_second} per second"
        return f"{self.task}, {self.variant}: {speed}, cost relative to base {cost} (by wall time {by_clock})"


Steps = Iterator[Turn | None]  # the steps of a task: None after each step except the last
Runner = Callable[[Task, str], Steps]


def _vllm(model: str, dtype: str, longest: int, tah: bool) -> tuple[Runner, float]:
    """Return a runner of tasks on vLLM, and the bytes of both depths' keys and values divided by those of depth 1."""
    from vllm import LLM

    options: dict[str, Any] = {}
    if tah:
        options["hf_overrides"] = {"policy": "random", "random_rate": RATE}
    llm = LLM(
        model, dtype=dtype, skip_tokenizer_init=True, enforce_eager=True, enable_prefix_caching=False,
        max_num_seqs=SLOTS, max_model_len=longest, block_size=32, gpu_memory_utilization=0.05, **options,
    )  # fmt: skip
    engine = llm.llm_engine
    served = engine.model_executor.driver_worker.worker.model_runner

    def run(task: Task, variant: str) -> Steps:
        if tah:
            served.model.mixed = variant == "mixed"
        return _turn(engine, task, variant)

    depth_one = sum(cache.nbytes for cache in served.kv_caches)
    pool = served.model.pool.keys.nbytes + served.model.pool.values.nbytes if tah else 0
    return run, 1 + pool / depth_one


def _turn(engine: Any, task: Task, variant: str) -> Steps:
    """Run a task on an engine of vLLM, step by step."""
    from vllm import SamplingParams

    rule = {"extra_args": {"policy": "never"}} if variant == "never" else {}
    for number, (ids, new) in enumerate(zip(task.ids(), task.new, strict=True)):
        most = 2 * new if task.steady else new
        params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=most, detokenize=False, **rule)
        engine.add_request(str(number), {"prompt_token_ids": ids}, params)
    done: dict[str, int] = {}
    depths: list[Any] = []  # arrays of the depths of prompts and answers
    took = Turn(0.0, 0.0, 0.0)

    def step() -> None:
        wall, cpu = time.perf_counter(), time.process_time()
        outs = engine.step()
        took.wall += time.perf_counter() - wall
        took.cpu += time.process_time() - cpu
        for out in outs:
            done[out.request_id] = len(out.outputs[0].token_ids)
            if out.finished and variant != "base":
                depths.append(out.outputs[0].routed_experts)

    while task.steady and len(done) < len(task.prompts):
        step()
        yield None
    before, took.wall, took.cpu = sum(done.values()), 0.0, 0.0
    while engine.has_unfinished_requests() and (not task.steady or sum(done.values()) - before < sum(task.new)):
        step()
        yield None
    tokens = sum(task.prompts) if task.of_prompts else sum(done.values()) - before
    turn = Turn(took.cpu / tokens, took.wall / tokens, 0.0)
    if variant != "base":
        depths += [log.depths for log in engine.engine_core.engine_core.scheduler.logs.values()]
        turn.iterated = float((np.concatenate(depths) > 1).mean())
    engine.abort_request(list(done))
    while engine.has_unfinished_requests():
        engine.step()
    yield turn


def _transformers(model: str, dtype: str) -> tuple[Runner, None]:
    """Return a runner of tasks with `generate`, and None, as its memory is not measured.

    A batch ends with its longest answer. The time includes the prompts, which have 8 tokens if answers count.
    """
    import torch

    tah = load_tah(model, dtype).eval()
    tah.config.random_rate = RATE
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "return_dict_in_generate": True}

    def run(task: Task, _: str) -> Steps:
        ids, depths = torch.tensor(task.ids()), []
        wall, cpu = time.perf_counter(), time.process_time()
        for start in range(0, len(ids), SLOTS):
            part, new = ids[start : start + SLOTS], max(task.new[start : start + SLOTS])
            mask = torch.ones_like(part)
            out = tah.generate(part, attention_mask=mask, policy="random", max_new_tokens=new, **options)
            depths.append(out.depth_count[:, :-1].flatten())
        tokens = sum(task.prompts if task.of_prompts else task.new)
        turn = Turn((time.process_time() - cpu) / tokens, (time.perf_counter() - wall) / tokens, 0.0)
        turn.iterated = float((torch.cat(depths) > 1).float().mean())
        yield turn

    return run, None


def _serve(pipe: Connection, model: str, kind: str, dtype: str, longest: int) -> None:
    """Run an engine in this process: send its memory, then run a step for each message.

    A message with a task and a variant begins a turn. None ends the process.
    """
    loaded = _transformers(model, dtype) if kind == "generate" else _vllm(model, dtype, longest, kind == "tah")
    run, memory = loaded
    pipe.send(memory)
    steps: Steps = iter(())
    while (asked := pipe.recv()) is not None:
        if asked:
            steps = run(*asked)
        pipe.send(next(steps))


@contextmanager
def engine(model: str, kind: str, dtype: str, longest: int) -> Iterator[tuple[Runner, float | None]]:
    """Start a process with a new engine, yield its runner and memory, and end the process with the context.

    Args:
        model: Checkpoint of the engine.
        kind: `base`, `tah` or `generate`.
        dtype: Data type of the weights.
        longest: Maximum tokens of a request.

    Raises:
        RuntimeError: The process ended; its stderr has the reason.
    """
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(there, model, kind, dtype, longest))
    process.start()
    there.close()  # so that `recv` raises EOFError if the process ends

    def receive(*asked: tuple[()] | tuple[Task, str]) -> Any:
        try:
            for message in asked:
                here.send(message)
            return here.recv()
        except (EOFError, OSError) as error:
            raise RuntimeError(f"the engine of {kind} ended; its error message is above") from error

    def run(task: Task, variant: str) -> Steps:
        turn = receive((task, variant))
        while turn is None:
            yield None
            turn = receive(())
        yield turn

    try:
        yield run, receive()
        here.send(None)
        process.join(60)
    finally:
        process.kill()  # the process may hang
        process.join()


def checkpoints(model: str, dtype: str, folder: Path) -> tuple[str, str]:
    """Return the directories of base and TaH checkpoint: one is that of `model`, `folder` gets the other."""
    path, kind = find(model)
    if kind == "tah":
        inner = load_tah(path, dtype).base
        weights = {name: tensor for name, tensor in inner.state_dict().items() if ".lora_" not in name}
        inner.save_pretrained(folder, state_dict=weights)
        return str(folder), path
    TaHForCausalLM.from_base(load_base(path, dtype)).save_pretrained(folder)
    return path, str(folder)


def bench_serve(
    model: str = "smollm2",
    *,
    dtype: str = "float32",
    variants: tuple[str, ...] = VARIANTS,
    tasks: tuple[Task, ...] = tuple(TASKS.values()),
    repeats: int = 3,
    progress: Reporter = SILENT,
) -> dict[str, Any]:
    """Measure variants of serving.

    Args:
        model: TaH checkpoint, base model, or `smollm2`.
        dtype: Data type of the weights.
        variants: Variants of `VARIANTS`, including the base.
        tasks: Tasks.
        repeats: Number of rounds.
        progress: Reporter, which gets a line for each row.

    Returns:
        `{"machine", "settings", "rows", "memory"}`.

    Raises:
        ImportError: vLLM is not installed.
        ValueError: A variant is unknown, or the base is missing.
    """
    if "base" not in variants or set(variants) - set(VARIANTS):
        raise ValueError(f"variants {','.join(variants)}: give base and others of {', '.join(VARIANTS)}")
    installed = vllm_version()
    os.environ |= SETTINGS
    rows: list[Row] = []
    longest = max(p + 2 * n for task in tasks for p, n in zip(task.prompts, task.new, strict=True))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        base, tah = checkpoints(model, dtype, folder)
        kinds = {name: "tah" if name in OF_TAH else name for name in variants}
        engines = {
            kind: stack.enter_context(engine(base if kind == "base" else tah, kind, dtype, longest))
            for kind in dict.fromkeys(kinds.values())
        }
        memory = {kind: ratio for kind, (_, ratio) in engines.items() if ratio is not None}
        for task in tasks:
            for row in _compare(task, {name: engines[kind][0] for name, kind in kinds.items()}, repeats):
                rows.append(row)
                progress.note(str(row))
    settings = {"model": model, "dtype": dtype, "slots": SLOTS, "rate": RATE, "repeats": repeats}
    settings |= {"vllm": installed, "tasks": [asdict(task) for task in tasks]}
    result = result_of(settings, rows) | {"memory": memory}
    result["machine"]["threads"] = 1  # OMP_NUM_THREADS of `SETTINGS`
    return result


def _compare(task: Task, engines: dict[str, Runner], repeats: int) -> list[Row]:
    """Return a row per variant; each variant alternates with the base."""
    others = [name for name in engines if name != "base"] or ["base"]
    pairs = {name: {one: engines[one] for one in ("base", name)} for name in others}
    rounds = alternate({name: partial(_beside_each_other, task, pair) for name, pair in pairs.items()}, repeats)
    rows = []
    for name in engines:
        turns = [(both[name], both["base"]) for other in others if name in ("base", other) for both in rounds[other]]
        cpu = statistics.median(mine.cpu for mine, _ in turns)
        wall = statistics.median(mine.wall for mine, _ in turns)
        ratio = statistics.median(mine.cpu / base.cpu for mine, base in turns)
        wall_ratio = statistics.median(mine.wall / base.wall for mine, base in turns)
        rows.append(Row(task.name, name, cpu, wall, ratio, wall_ratio, turns[0][0].iterated))
    return rows


def _beside_each_other(task: Task, engines: dict[str, Runner]) -> dict[str, Turn]:
    """Run one turn of each engine, alternating step by step."""
    steps = {name: run(task, name) for name, run in engines.items()}
    turns: dict[str, Turn] = {}
    while steps:
        for name in list(steps):
            if (turn := next(steps[name])) is not None:
                turns[name] = turn
                del steps[name]
    return turns


def markdown(result: dict[str, Any]) -> str:
    """Return the result as a Markdown table."""
    rows = [Row(**row) for row in result["rows"]]
    lines = table(
        (
            "task",
            "variant",
            "tokens per CPU second",
            "tokens per second",
            "cost relative to base, CPU time",
            "cost, wall time",
            "iterated",
        ),
        [(row.task, row.variant, *row.speeds(), f"{row.iterated:.1%}") for row in rows],
    )
    memory = ", ".join(f"{name} {ratio:.2f}" for name, ratio in result["memory"].items())
    return f"{lines}\n\nMemory of keys and values for the same number of tokens, relative to the base: {memory}."
