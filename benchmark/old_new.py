"""Compare the speed of two source trees on one machine: generation, prefill and a training step.

    git worktree add ../old main && python benchmark/old_new.py ../old/src src --rounds 5 --output old_new.json

In every round each tree runs in a new process. The old tree is first in even rounds, the new tree in odd rounds. A
process warms up every task and repeats it for two seconds, but at least once and at most three times; the tasks
alternate. It reports medians. The result is the median of each tree, and the median over rounds of the ratio new / old.
Everything is float32 on the CPU. With SmolLM2-135M a round takes about 80 seconds on two idle cores.

Generation runs `policy="never"` and a forced policy. The forced policy runs the decider on every token and then
iterates a fixed 7 % of the tokens, as in `tah bench`; prompts and answers are shorter here. The training step is the
smallest one of `tah bench train`: 512 supervised tokens, 12 % of them hard, all weights trained, AdamW.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

TREES = ("old", "new")
RATE, HARD = 0.07, 0.12  # iterated share; share of hard tokens in training
PROMPT, NEW, WARM = 14, 14, 4  # tokens of a prompt, an answer (7 % of 14 are one token) and a warm-up answer
PREFILL, TRAIN = 512, 512  # tokens
SECONDS = 2.0  # time for which a process repeats each task


# -- in the process of one tree ----------------------------------------------------------------------------------


def worker(src: str, model: str, threads: int, repeats: int) -> None:
    """Measure the tree that is first on the path; print the median seconds of each task as JSON."""
    import torch
    import transformers

    import tah
    from tah.load import find, load_base, load_tah, quiet

    if not Path(tah.__file__).is_relative_to(src):
        raise RuntimeError(f"tah was imported from {tah.__file__}, which is not in {src}")
    torch.set_num_threads(threads)
    quiet()
    path, kind = find(model)
    base = None if kind == "tah" else load_base(path, "float32")
    loaded = (load_tah(path, "float32") if base is None else tah.TaHForCausalLM.from_base(base)).eval()
    runs = tasks(loaded)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for name, run in runs.items():
        run(**({"max_new_tokens": WARM} if name.startswith("decode") else {}))
    for _ in range(repeats):
        for name, run in runs.items():
            if sum(seconds[name]) < SECONDS:
                start = time.perf_counter()
                run()
                seconds[name].append(time.perf_counter() - start)
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    medians = {name: statistics.median(its) for name, its in seconds.items()}
    print(json.dumps({"versions": versions, "seconds": medians}))


def tasks(model: Any) -> dict[str, Callable[..., Any]]:
    """Return the tasks by name. The training step is the last one; its learning rate is so small that weights stay."""
    import torch

    draw = torch.Generator().manual_seed(0)
    vocab = model.config.get_text_config().vocab_size

    def tokens(batch: int, length: int) -> Any:
        return torch.randint(3, vocab, (batch, length), generator=draw)

    def generate(batch: int, policy: Any) -> Callable[..., Any]:
        ids = tokens(batch, PROMPT)
        options = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        return partial(model.generate, ids, attention_mask=torch.ones_like(ids), policy=policy, **options)

    @torch.no_grad()
    def prefill(ids: Any, policy: Any) -> None:
        model.eval()(ids, use_cache=True, logits_to_keep=1, policy=policy)

    found: dict[str, Callable[..., Any]] = {}
    for batch in (1, 16):
        found[f"decode, batch {batch}, never"] = generate(batch, "never")
        found[f"decode, batch {batch}, forced 7 %"] = generate(batch, Forced(model, batch, (PROMPT, NEW)))
    ids, forced = tokens(1, PREFILL), Forced(model, 1, (PREFILL,))
    found[f"prefill, {PREFILL} tokens, never"] = partial(prefill, ids, "never")
    found[f"prefill, {PREFILL} tokens, forced 7 %"] = partial(prefill, ids, forced)
    found[f"training step, 1 x {TRAIN}"] = training_step(model, tokens(1, TRAIN))
    return found


def training_step(model: Any, ids: Any) -> Callable[[], None]:
    """Return a function that runs forward, backward and AdamW on a batch and zeroes the gradients."""
    import torch

    labels = torch.ones_like(ids)
    hard = torch.randperm(ids.shape[1] - 1, generator=torch.Generator().manual_seed(0))
    labels[:, hard[: round(HARD * (ids.shape[1] - 1))]] = 2
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9, fused=True)

    def step() -> None:
        model.train()(ids, labels=ids, depth_labels=labels, policy="oracle").loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        model.eval()

    return step


class Forced:
    """A policy that runs the model's decider on every token, then iterates a fixed 7 % of the tokens.

    Args:
        model: Model whose decider runs.
        batch: Number of rows, without padding.
        lengths: Lengths of the parts of a row; 7 % of each part iterate.
    """

    def __init__(self, model: Any, batch: int, lengths: tuple[int, ...]) -> None:
        import torch

        self.decider = model.decider
        self.layers = () if model.decider is None else model.decider.layers
        self.chosen = torch.zeros(batch, sum(lengths), dtype=torch.bool)
        draw, start = torch.Generator().manual_seed(0), 0
        for length in lengths:
            for row in self.chosen:
                row[start + torch.randperm(length, generator=draw)[: round(RATE * length)]] = True
            start += length

    def __call__(self, state: Any) -> Any:
        """Return whether each of the N tokens takes another pass, [N] bool."""
        if self.decider is not None:
            self.decider(state)
        batch, length = self.chosen.shape
        row = state.positions.new_ones(len(state.positions)).cumsum(0).sub(1) // (len(state.positions) // batch)
        return self.chosen[row, state.positions.clamp(max=length - 1)]


# -- in the process that compares --------------------------------------------------------------------------------


def measure(src: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return the result of a new process that runs the tree in `src`."""
    command = [sys.executable, __file__, "--worker", str(src), str(src), "--model", options.model]
    command += ["--threads", str(options.threads), "--repeats", str(options.repeats)]
    threads = {"OMP_NUM_THREADS": str(options.threads), "MKL_NUM_THREADS": str(options.threads)}
    quiet = {"TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
    env = os.environ | threads | quiet | {"PYTHONPATH": str(src)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"old_new: measuring {src} failed:\n{done.stderr.strip()}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(rounds: list[dict[str, dict[str, float]]]) -> list[dict[str, Any]]:
    """Return a row per task, given the seconds of both trees in every round."""
    rows = []
    for task in rounds[0]["old"]:
        ratios = [took["new"][task] / took["old"][task] for took in rounds]
        medians = {tree: statistics.median(took[tree][task] for took in rounds) for tree in TREES}
        spread = {"ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)}
        rows.append({"task": task, **medians, **spread})
    return rows


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    lines = ["| task | old | new | new / old | range of the rounds |", "|" + " --- |" * 5]
    for row in rows:
        times = f"{1000 * row['old']:.0f} ms | {1000 * row['new']:.0f} ms"
        lines.append(f"| {row['task']} | {times} | {row['ratio']:.3f} | {row['lowest']:.3f} to {row['highest']:.3f} |")
    return "\n".join(lines)


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    """Return the options of a command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("old", type=Path, metavar="OLD_SRC", help="directory of the old package `tah`")
    parser.add_argument("new", type=Path, metavar="NEW_SRC", help="directory of the new package `tah`")
    parser.add_argument("--model", default="smollm2", help="model, as for `tah bench` [%(default)s]")
    parser.add_argument("--rounds", type=int, default=5, help="number of rounds [%(default)s]")
    parser.add_argument("--repeats", type=int, default=3, help="maximum repetitions per process [%(default)s]")
    parser.add_argument("--threads", type=int, default=2, help="threads of each process [%(default)s]")
    parser.add_argument("--output", type=Path, metavar="FILE.json", help="file for all numbers")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)  # measure one tree in this process
    options = parser.parse_args(arguments)
    for src in (options.old, options.new):
        if not (src / "tah").is_dir():
            parser.error(f"{src} has no directory tah")
    if min(options.rounds, options.repeats, options.threads) < 1:
        parser.error("--rounds, --repeats and --threads must be at least 1")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Compare two trees; with --worker, measure one."""
    options = parsed(arguments)
    trees = {"old": options.old.resolve(), "new": options.new.resolve()}
    if options.worker:
        worker(str(trees["old"]), options.model, options.threads, options.repeats)
        return
    rounds: list[dict[str, dict[str, float]]] = []
    found: dict[str, Any] = {}
    for number in range(options.rounds):
        for tree in TREES if number % 2 == 0 else TREES[::-1]:
            print(f"old_new: round {number + 1} of {options.rounds}, {tree}", file=sys.stderr)
            found[tree] = measure(trees[tree], options)
        rounds.append({tree: found[tree]["seconds"] for tree in TREES})
    rows = compare(rounds)
    if options.output is not None:
        settings = {"model": options.model, "threads": options.threads, "repeats": options.repeats}
        machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
        result = {"machine": machine | found["new"]["versions"], "settings": settings, "rows": rows, "rounds": rounds}
        options.output.write_text(json.dumps(result, indent=2) + "\n")
    print(markdown(rows))


if __name__ == "__main__":
    main()
