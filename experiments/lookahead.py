"""Does a second pass help a policy that knows no labels? Trains variants of one small model and scores them.

    python experiments/lookahead.py --task chain --size small --seed 0 1 2 3 --variant standard lookahead always
    python experiments/summarise.py experiments/results/chain-small.jsonl

Every (variant, seed) becomes one line of the results, whole or not at all; lines that are there are not made again.
Training, policies, thresholds and generation are the package's own. With a seed everything changes: what is fixed in
the task, the problems, the weights, the order. Variants of a seed share problems, steps and batches.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

import tah
from measure import evaluate
from optimiser import MuonAdamW
from tah import TaHForCausalLM
from tah.training.data import Collator, depth_labels
from tah.training.reference import Reference
from tah.training.trainer import Objective, TaHTrainer
from tasks import MADE, TASKS, Rows, Task
from variants import SIZES, VARIANTS, Size, build, new_model, objective_of, parameters

RESULTS = Path(__file__).parent / "results"
LOSSES = ("loss", "loss_depth_1", "loss_depth_2", "loss_depth_3")
LINEAR = {"decay_type": "linear", "min_lr_ratio": 0.0}
CHANGEABLE = ("layers", "hidden", "steps", "batch", "test", "validation")


# -- training --------------------------------------------------------------------------------------------------------


def train(
    model: TaHForCausalLM, objective: Objective, rows: Rows, tokenizer: Any, steps: int, size: Size, seed: int
) -> tuple[float, list[dict[str, float]]]:
    """Train; the mean share of supervised tokens that ran a second pass, and losses by depth after each tenth."""
    with tempfile.TemporaryDirectory() as directory:
        arguments = TrainingArguments(
            output_dir=os.path.join(directory, "checkpoints"),
            max_steps=steps,
            per_device_train_batch_size=size.batch,
            lr_scheduler_type=size.schedule,
            lr_scheduler_kwargs={} if size.schedule == "cosine" else {"num_decay_steps": steps // 2} | LINEAR,
            warmup_steps=min(30, steps // 4),
            logging_steps=max(1, steps // 10),
            save_strategy="no",
            remove_unused_columns=False,
            prediction_loss_only=True,
            label_names=["labels"],
            disable_tqdm=True,
            report_to=[],
            use_cpu=not torch.cuda.is_available(),
            seed=seed,
        )
        trainer = TaHTrainer(
            objective=objective,
            model=model,
            args=arguments,
            train_dataset=rows,
            data_collator=Collator(tokenizer.pad_token_id),
            processing_class=tokenizer,
            optimizers=(MuonAdamW(model, size.rate), None),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(Progress)
        trainer.train()
        if trainer.stopped:
            raise SystemExit("stopped by SIGTERM; the unfinished variant is not in the results")
        metrics = Path(directory, "metrics.jsonl").read_text().splitlines()
    lines = [line for line in map(json.loads, metrics) if "iterated_share" in line and "train_runtime" not in line]
    curve = [{name: line[name] for name in ("step", *LOSSES) if name in line} for line in lines]
    return sum(line["iterated_share"] for line in lines) / max(1, len(lines)), curve


class Progress(TrainerCallback):
    """A line for each tenth of a training."""

    def on_log(self, arguments: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            told = [f"{name} {logs[name]:.3f}" for name in (*LOSSES, "iterated_share") if name in logs]
            print(f"    step {state.global_step} of {state.max_steps}: {', '.join(told)}", flush=True)


@cache
def hard_tokens(task: Task, size: Size) -> tuple[Rows, np.ndarray]:
    """Rows of the training, and labels as in the paper: which of their tokens a larger model, trained on the same
    problems in another order, gets wrong (2), or not (1); [rows, T] int8."""
    tokenizer, seed = task.tokenizer(), task.seed
    problems = task.take("train", size.steps * size.batch, distinct=False)
    larger = replace(size, layers=size.layers + 1, hidden=2 * size.hidden)
    teacher = new_model(larger, 3 * larger.hidden, None, tokenizer, seed + 1000)
    other = Rows(problems[::-1], tokenizer)
    train(teacher, Objective("backbone", "standard", 1), other, tokenizer, size.steps, larger, seed + 1000)
    rows = Rows(problems, tokenizer)
    every = [rows[at] for at in range(len(rows))]
    judged = Reference(teacher).measure(
        [row["input_ids"] for row in every], [row["supervised"] for row in every], 16384
    )
    labels = np.ones(rows.ids.shape, np.int8)
    for at, its in enumerate(judged):
        found = depth_labels(its.rank, its.prob, every[at]["supervised"], "top1", 2, seed)
        labels[at, : len(found)] = found
    return rows, labels


def shuffled(labels: np.ndarray, rows: Rows, noise: float, seed: int) -> np.ndarray:
    """Labels, those of a share `noise` of the tokens that predict a supervised one dealt out among them anew."""
    rng = np.random.default_rng(seed)
    at = np.arange(labels.shape[1])
    last = rows.lengths[:, None] - 1  # predicts nothing
    chosen = (at >= last - MADE) & (at < last) & (rng.random(labels.shape) < noise)
    noisy = labels.copy()
    noisy[chosen] = rng.permutation(labels[chosen])
    return noisy


# -- the experiment --------------------------------------------------------------------------------------------------


def run(task: Task, size: Size, name: str, save: Path | None = None) -> dict[str, Any]:
    """Train a variant and score it: one line of results. With `save`, the model is kept there."""
    variant, seed, tokenizer = VARIANTS[name], task.seed, task.tokenizer()
    first, steps = round(size.steps * variant.first), round(size.steps * variant.steps)
    problems = task.take("train", (first + steps) * size.batch, distinct=False)
    earlier, rows = (Rows(its, tokenizer) for its in (problems[: first * size.batch], problems[first * size.batch :]))
    model, second = build(size, variant, tokenizer, seed), None
    if variant.method == "paper":
        rows, labels = hard_tokens(task, size)
        rows.depth_labels = shuffled(labels, rows, variant.noise, seed)
    before = time.process_time()
    if first:
        train(model, Objective("backbone", "standard", 1), earlier, tokenizer, first, size, seed)
    share, curve = train(model, objective_of(variant, seed), rows, tokenizer, steps, size, seed)
    if variant.method == "paper":  # its decider is trained afterwards, on the frozen model
        model.requires_grad_(False)
        model.decider.requires_grad_(True)
        second = round(size.steps * 0.4)
        train(model, objective_of(variant, seed, "decider"), rows, tokenizer, second, size, seed)
    seconds = time.process_time() - before
    body = sum(p.numel() for n, p in model.base.named_parameters() if "embed" not in n and "lm_head" not in n)
    head, maps = len(tokenizer) * size.hidden, parameters(model) - parameters(model.base)
    # Per weight and token 2 operations, with gradients 6; attention itself and the optimiser are not counted.
    again = MADE * share * (variant.depth - 1)  # supervised tokens of deeper passes
    one = body * float(rows.lengths.mean()) + head * MADE
    flops = 6 * size.batch * (one * (first + steps) + (body + maps + head) * again * steps)
    scores = evaluate(model, tokenizer, task, size.test, size.validation)
    if save is not None:
        if model.config.max_depth > 1:
            rule = "decider" if model.decider is not None else "entropy"
            policy = (
                {"policy": "decider"} if rule == "decider" else {"policy": "confidence", "confidence_measure": rule}
            )
            model.config.update(policy | {"threshold": scores["test"]["policies"][rule]["threshold"]})
        model.save_pretrained(save)
        tokenizer.save_pretrained(save)
    return {
        "training": {
            "steps": first + steps,
            "decider_steps": second,
            "batch": size.batch,
            "iterated": share,
            "flops": flops,
            "cpu_seconds": seconds,
            "curve": curve,
        },
        "parameters": parameters(model),
        **scores,
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="chain")
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--variant", choices=VARIANTS, nargs="+", default=["standard", "lookahead"])
    for name in CHANGEABLE:
        parser.add_argument(f"--{name}", type=int, help="instead of the size's")
    parser.add_argument("--schedule", choices=("warmup_stable_decay", "cosine"), help="instead of the size's")
    parser.add_argument("--operations", type=int, nargs="+", help="instead of the size's")
    parser.add_argument("--output", type=Path, help="results; by default experiments/results/TASK-SIZE.jsonl")
    parser.add_argument("--save", type=Path, help="keep the trained models in SAVE/VARIANT-SEED")
    given = parser.parse_args(arguments)
    output = given.output or RESULTS / f"{given.task}-{given.size}.jsonl"
    names = (*CHANGEABLE, "schedule")
    changed: dict[str, Any] = {name: getattr(given, name) for name in names if getattr(given, name)}
    if given.operations:
        changed["operations"] = tuple(given.operations)
    size = replace(SIZES[given.size], **changed)
    for seed in given.seed:
        task = Task(given.task, seed, size.operations)
        for variant in given.variant:
            line: dict[str, Any] = {"task": given.task, "size": given.size, "variant": variant, "seed": seed}
            line["settings"] = asdict(size) | {"operations": list(size.operations)}
            if _is_there(line, output):
                continue
            save = given.save and given.save / f"{variant}-{seed}"
            line |= {"made_with": _made_with()} | run(task, size, variant, save)
            output.parent.mkdir(parents=True, exist_ok=True)
            with open(output, "a") as file:  # a single write of a whole line
                file.write(json.dumps(line) + "\n")
            scored = "  ".join(f"{name} {its['exact_match']:.3f}" for name, its in line["test"]["policies"].items())
            print(f"{variant} seed {seed}: {line['training']['cpu_seconds']:.0f} s  {scored}", flush=True)


def _is_there(line: dict[str, Any], output: Path) -> bool:
    lines = output.read_text().splitlines() if output.is_file() else []
    return any(line.items() <= made.items() for made in map(json.loads, lines))


def _made_with() -> dict[str, Any]:
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return versions | {"tah": tah.__version__, "device": device}


if __name__ == "__main__":
    main()
