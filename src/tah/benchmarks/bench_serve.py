"""`tah bench serve`: what iterating costs on vLLM, as a ratio to the stock base model on the same vLLM.

A further variant is transformers' `generate` of the same TaH model, in batches of as many requests as vLLM has slots.

Base, TaH model and `generate` run in a process each. Every variant takes turns with the base step by step, so that a
machine whose speed drifts slows both alike (`generate` has no steps: it runs after the base's first). CPU seconds are
measured beside seconds: with one thread they are reliable on a shared machine. Prefix caching is off, so that every
turn does the same work.
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
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from ..load import find, load_base, load_tah
from ..markdown import table
from ..model import TaHForCausalLM
from ..names import SERVE_TASKS
from ..progress import SILENT, Reporter
from ..vllm.launch import IN_PROCESS
from .bench import RATE
from .measure import SEED, alternate, result_of

SLOTS = 32  # requests that run at a time, at most
OF_TAH = ("never", "two_pass", "mixed")  # one engine runs them all: the weights are in memory once
VARIANTS = ("base", *OF_TAH, "generate")
SETTINGS = IN_PROCESS | {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "OMP_NUM_THREADS": "1",
}


@dataclass
class Task:
    """Requests that arrive at once."""

    name: str
    prompts: list[int]  # lengths
    new: list[int]  # tokens asked for
    steady: bool = False  # measured while all run: from their first tokens until as many as `new` in sum follow
    of_prompts: bool = False  # the prompts' tokens are what counts

    def ids(self) -> list[list[int]]:
        """Token ids, the same for every variant."""
        draw = random.Random(SEED)
        return [[draw.randrange(3, 200) for _ in range(length)] for length in self.prompts]


def decode(batch: int, new: int = 32) -> Task:
    """A server with a constant number of requests: none ends while it is measured."""
    return Task(f"decode, batch {batch}", [8] * batch, [new] * batch, steady=True)


def stream(requests: int = 96, new: int = 32) -> Task:
    """More requests than slots, with answers of mixed length: a loaded server."""
    draw = random.Random(SEED)
    lengths = [draw.randint(new // 2, new * 3 // 2) for _ in range(requests)]
    return Task(f"{requests} requests through {SLOTS} slots", [8] * requests, lengths)


def prefill(requests: int = 8, length: int = 128) -> Task:
    """Until the second token of each answer, since hard tokens of a prompt may run with the step after it."""
    return Task(f"prefill, {requests} x {length} tokens", [length] * requests, [2] * requests, of_prompts=True)


TASKS = dict(zip(SERVE_TASKS, (decode(1), decode(8), decode(32), stream(), prefill()), strict=True))


@dataclass
class Turn:
    """One task run once by one variant."""

    cpu: float  # seconds of all threads per token of the answers, or of the prompts where the task is prefill
    wall: float  # seconds, the same
    iterated: float  # share of the tokens that ran


@dataclass
class Row:
    """One line of the result: medians of a variant on a task."""

    task: str
    variant: str
    cpu: float  # seconds a token
    wall: float  # seconds a token
    ratio: float  # of CPU seconds a token to the base's in the same round
    wall_ratio: float
    iterated: float

    def speeds(self) -> list[str]:
        """Tokens per CPU second and per second, and the cost of a token to the base's by both clocks."""
        return [f"{1 / self.cpu:.1f}", f"{1 / self.wall:.1f}", f"{self.ratio:.2f}", f"{self.wall_ratio:.2f}"]

    def __str__(self) -> str:
        per_cpu, per_second, cost, by_clock = self.speeds()
        speed = f"{per_cpu} tokens per CPU second, {per_second} per second"
        return f"{self.task}, {self.variant}: {speed}, cost to base {cost} (by the clock {by_clock})"


Steps = Iterator[Turn | None]  # of a task: None after each step but the last
Runner = Callable[[Task, str], Steps]


def _vllm(model: str, dtype: str, longest: int, tah: bool) -> tuple[Runner, float]:
    """Runs tasks on vLLM; with the bytes of keys and values of both depths, relative to those of depth 1."""
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
    """One task on one of vLLM's engines, step by step."""
    from vllm import SamplingParams

    rule = {"extra_args": {"policy": "never"}} if variant == "never" else {}
    for number, (ids, new) in enumerate(zip(task.ids(), task.new, strict=True)):
        most = 2 * new if task.steady else new
        params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=most, detokenize=False, **rule)
        engine.add_request(str(number), {"prompt_token_ids": ids}, params)
    done: dict[str, int] = {}
    depths: list[Any] = []  # arrays, of answers
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
    """Runs tasks with `generate`, in whole batches that end with their longest answer; it has no memory to report.

    The time for prompts is included; where answers count, these have 8 tokens.
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
    """An engine's process: its memory first, then a step for each message; a task and a variant begin a turn."""
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
    """A process of a fresh engine (`base`, `tah` or `generate`), which ends with the context: its runner and memory.

    Raises:
        RuntimeError: the process ended by itself; it has said why on stderr.
    """
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    process = spawn.Process(target=_serve, args=(there, model, kind, dtype, longest))
    process.start()
    there.close()  # so that its end is seen here

    def receive(*asked: tuple[()] | tuple[Task, str]) -> Any:
        try:
            for message in asked:
                here.send(message)
            return here.recv()
        except (EOFError, OSError) as error:
            raise RuntimeError(f"the engine of {kind} ended; its own message is above") from error

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
        process.kill()  # it may hang
        process.join()


def checkpoints(model: str, dtype: str, folder: Path) -> tuple[str, str]:
    """Directories of the base and of the TaH checkpoint; the one that `model` is not is made in `folder`."""
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
    """Measure `variants`: `{"machine", "settings", "rows", "memory"}`.

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
    settings |= {"vllm": version("vllm-cpu"), "tasks": [asdict(task) for task in tasks]}
    result = result_of(settings, rows) | {"memory": memory}
    result["machine"]["threads"] = 1  # as `SETTINGS` says
    return result


def _compare(task: Task, engines: dict[str, Runner], repeats: int) -> list[Row]:
    """A row per variant, each measured beside the base."""
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
    """One turn of each, step by step in alternation."""
    steps = {name: run(task, name) for name, run in engines.items()}
    turns: dict[str, Turn] = {}
    while steps:
        for name in list(steps):
            if (turn := next(steps[name])) is not None:
                turns[name] = turn
                del steps[name]
    return turns


def markdown(result: dict[str, Any]) -> str:
    """The result as the table of docs/how-to/serve.md."""
    rows = [Row(**row) for row in result["rows"]]
    lines = table(
        ("task", "variant", "tokens per CPU second", "per second", "cost to base, CPU", "by the clock", "iterated"),
        [(row.task, row.variant, *row.speeds(), f"{row.iterated:.1%}") for row in rows],
    )
    memory = ", ".join(f"{name} {ratio:.2f}" for name, ratio in result["memory"].items())
    return f"{lines}\n\nMemory for keys and values of as many tokens, to the base's: {memory}."
