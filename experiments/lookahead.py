"""Train variants of one small model and score them: does a second pass help a policy that uses no labels?

    python experiments/lookahead.py --task follow --operations 1 1 2 --seed 0 1 2 3 --variant standard lookahead-mix
    python experiments/summarise.py out/follow-small.jsonl
    python experiments/lookahead.py --task nine --size nine --variant standard-wide    # one model for all nine tasks

Each (variant, seed) becomes one line of the results, written only when it is complete. Lines that the output already
has are skipped. Training, policies, thresholds and generation use the package. The seed determines the fixed part of
the task, the problems, the weights and the order. Variants of one seed share problems, steps and batches.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import platform
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

import tah
from measure import evaluate
from nine import mixture
from optimiser import OPTIMISER, MuonAdamW
from tah import TaHForCausalLM
from tah.data.rows import Collator, depth_labels
from tah.data.scoring import Reference
from tah.training.trainer import Objective, TaHTrainer
from tasks import MADE, TASKS, Task
from variants import SIZES, VARIANTS, Size, Variant, build, new_model, objective_of, parameters, weights_of

Family = Task | mixture.Mixture

LOSSES = ("loss", "loss_depth_1", "loss_depth_2", "loss_depth_3")
COUNTS = ("mean_depth", "decisions", "side_passes")  # of a TaH2 training, per token
LINEAR = {"decay_type": "linear", "min_lr_ratio": 0.0}
HELP = {
    "layers": "number of layers",
    "hidden": "width of the model",
    "steps": "optimiser steps",
    "batch": "problems per step",
    "test": "problems to score",
    "validation": "problems that determine the thresholds",
}
CHANGEABLE = tuple(HELP)


# -- training --------------------------------------------------------------------------------------------------------


def train(
    model: TaHForCausalLM,
    objective: Objective,
    rows: Any,
    tokenizer: Any,
    steps: int,
    size: Size,
    seed: int,
    what: str,
    **options: Any,
) -> list[dict[str, float]]:
    """Train the model and return the mean losses and `iterated_share` of each tenth of the training.

    `iterated_share` is a share of the supervised tokens. The loss of a depth is a mean over the tokens that have a loss
    at that depth. In a `paper` variant, the tokens of depth 1 are those that stop there.

    Args:
        model: Model to train, in place.
        objective: Loss of the training.
        rows: Data set of training rows, in the format of `data.rows.Collator`.
        tokenizer: Tokenizer with a padding token.
        steps: Number of optimiser steps.
        size: Batch size, learning rate and schedule.
        seed: Random seed.
        what: Name of the training in the progress lines.
        options: More `TrainingArguments`, such as `bf16`.

    Returns:
        One dict per logged tenth, with `step`, the losses and `iterated_share`.

    Raises:
        SystemExit: SIGTERM stopped the training.
    """
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
            **options,
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
        trainer.add_callback(Progress(what))
        trainer.train()
        if trainer.stopped:
            raise SystemExit("stopped by SIGTERM; the unfinished variant is not in the results")
        metrics = Path(directory, "metrics.jsonl").read_text().splitlines()
    lines = [line for line in map(json.loads, metrics) if "iterated_share" in line and "train_runtime" not in line]
    return [
        {name: line[name] for name in ("step", *LOSSES, "iterated_share", *COUNTS) if name in line} for line in lines
    ]


class Progress(TrainerCallback):
    """Print a line for each tenth of a training."""

    def __init__(self, what: str) -> None:
        self.what = what

    def on_log(self, arguments: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        if logs and "loss" in logs:
            shown = [f"{name} {logs[name]:.3f}" for name in (*LOSSES, "iterated_share") if name in logs]
            print(f"    {self.what}, step {state.global_step} of {state.max_steps}: {', '.join(shown)}", flush=True)


@dataclass(frozen=True)
class Labels:
    """Depth labels of a teacher, and their cost.

    Args:
        hard: Depth labels `[rows, T]`, int8: 2 where the teacher is wrong, else 1.
        flops: FLOPs of the teacher's training and labelling.
        cpu_seconds: Processor time of the same.
    """

    hard: np.ndarray
    flops: float
    cpu_seconds: float


@lru_cache(maxsize=2)
def _drawn(task: Family, counts: tuple[int, ...]) -> list[Any]:
    if isinstance(task, mixture.Mixture):
        return task.training(counts)
    stream, tokenizer = task.problems("train", distinct=False), task.tokenizer()
    return [task.rows(itertools.islice(stream, count), tokenizer) for count in counts]


def training_rows(task: Family, *counts: int) -> list[Any]:
    """Return training rows, the next `count` problems of the family for each of `counts`.

    The rows of the last two calls are kept, because the variants of a seed share them.

    Raises:
        ValueError: The family has fewer problems.
    """
    found = [copy.copy(rows) for rows in _drawn(task, counts)]  # a variant may set depth labels in its copy
    if (made := sum(map(len, found))) < sum(counts):
        raise ValueError(f"task {task.name} has only {made} training problems, not {sum(counts)}")
    return found


@lru_cache(maxsize=2)
def labels_of(task: Family, size: Size, larger: bool) -> Labels:
    """Return labels as in the paper.

    Hard tokens are the training tokens that a teacher, trained on the same problems, predicts wrong.

    Args:
        task: Family of problems.
        size: Size of the model that learns from the labels.
        larger: Whether the teacher has a layer more and twice the width. Otherwise it has the same size.
    """
    tokenizer, seed, before = task.tokenizer(), task.seed, time.process_time()
    own = replace(size, layers=size.layers + 1, hidden=2 * size.hidden) if larger else size
    teacher = new_model(own, 3 * own.hidden, None, tokenizer, seed + 1000)
    _, rows = training_rows(task, 0, size.steps * size.batch)
    train(teacher, Objective("backbone", "standard", 1), rows, tokenizer, size.steps, own, seed + 1000, "teacher")
    every = [rows[at] for at in range(len(rows))]
    measured = Reference(teacher).measure(
        [row["input_ids"] for row in every], [row["supervised"] for row in every], 16384
    )
    hard = np.ones(rows.ids.shape, np.int8)
    for at, its in enumerate(measured):
        found = depth_labels(its.rank, its.prob, every[at]["supervised"], "top1", 2, seed)
        hard[at, : len(found)] = found
    one = row_flops(teacher, VARIANTS["standard"], float(rows.lengths.mean()), 0.0)
    return Labels(hard, len(rows) * one * 4 / 3, time.process_time() - before)  # labelling is a forward pass: 2 of 6


def shuffled(hard: np.ndarray, rows: Any, noise: float, seed: int) -> np.ndarray:
    """Return the labels after shuffling those of a share `noise` of the tokens.

    The labels are shuffled among tokens of the same position in the answer. So a label contains less information about
    whether the first choice is wrong, and the number of iterated tokens per position stays the same.
    """
    rng, noisy = np.random.default_rng(seed), hard.copy()
    for place in range(MADE):
        (chosen,) = np.nonzero(rng.random(len(hard)) < noise)
        at = rows.lengths[chosen] - 2 - place  # predicts a supervised token
        noisy[chosen, at] = rng.permutation(hard[chosen, at])
    return noisy


def row_flops(
    model: TaHForCausalLM,
    variant: Variant,
    length: float,
    share: float,
    made: float = MADE,
    counts: dict[str, float] | None = None,
) -> float:
    """Return the FLOPs of training on one row: 2 per weight and token, and 6 with gradients.

    Attention itself, norms and the optimiser are not counted. For a share `share` of the supervised tokens, the passes
    at all depths are counted. Where the loss at depth 1 has weight 0, its head runs only for tokens that stop there.

    Args:
        model: Model to train.
        variant: Variant of the model.
        length: Tokens of a row.
        share: Share of the supervised tokens that iterate.
        made: Supervised tokens of a row.
        counts: `COUNTS` of a TaH2 training. Without them, the prompt is counted with the share `share`, too.
    """
    its = weights_of(model)
    entropy = its.head * length / 3 if variant.uncertain else 0.0  # the entropy of every token, without gradients
    mixed = 2 * its.head if model.config.next_input == "topk" else 0  # the next input: logits, a sum of embeddings
    again, added = made * share * (variant.depth - 1), its.added
    asked = made  # supervised tokens whose loss at depth 1 is computed
    if variant.loss_weights is not None and variant.loss_weights[0] == 0:
        asked = made * (1 - share)
    if variant.method == "tah2":
        # The prompt iterates too. Supervised tokens that stop run a side pass, without gradients. The decider reads the
        # logits of every token at depth 1, and is not asked at the last depth.
        counts = counts or {"mean_depth": 1 + share, "decisions": 1.0, "side_passes": made * (1 - share) / length}
        again = length * (counts["mean_depth"] - 1 + counts["side_passes"] / 3)
        entropy = (its.head + its.decider) * length * counts["decisions"]
        added -= its.decider
    return 6 * (its.body * length + its.head * asked + entropy + again * (its.body + added + its.head + mixed))


# -- the experiment --------------------------------------------------------------------------------------------------


def run(
    task: Family, size: Size, name: str, save: Path | None = None, variant: Variant | None = None, **options: Any
) -> dict[str, Any]:
    """Train and score a variant, and return its line of results.

    Args:
        task: Family of problems.
        size: Size of the model and its training.
        name: Name of the variant in the progress lines.
        save: Directory for the model, if it is to be saved.
        variant: Variant to train; by default the one of `VARIANTS` with that name.
        options: More `TrainingArguments`.
    """
    variant = VARIANTS[name] if variant is None else variant
    seed, tokenizer = task.seed, task.tokenizer()
    first, steps = round(size.steps * variant.first), round(size.steps * variant.steps)
    earlier, rows = training_rows(task, first * size.batch, steps * size.batch)
    model = build(size, variant, tokenizer, seed)
    length, cost, second = float(rows.lengths.mean()), 0.0, None
    before, start = time.process_time(), time.perf_counter()
    if variant.method == "paper":
        labels = labels_of(task, size, variant.larger_teacher)
        cost, before = labels.flops, time.process_time() - labels.cpu_seconds
        rows.depth_labels = shuffled(labels.hard, rows, variant.noise, seed)
    if first:
        train(
            model,
            Objective("backbone", "standard", 1),
            earlier,
            tokenizer,
            first,
            size,
            seed,
            f"{name} before",
            **options,
        )
        cost += first * size.batch * row_flops(model, VARIANTS["standard"], length, 0.0)
    curve = train(model, objective_of(variant, seed, steps=steps), rows, tokenizer, steps, size, seed, name, **options)
    tenths = max(1, len(curve))
    share = sum(tenth["iterated_share"] for tenth in curve) / tenths
    counts = {name: sum(tenth[name] for tenth in curve) / tenths for name in COUNTS if curve and name in curve[0]}
    cost += steps * size.batch * row_flops(model, variant, length, share, counts=counts)
    decider_cost = 0.0
    if variant.last:  # the decider is trained on the frozen model, in the paper's method on labels without noise
        model.requires_grad_(False)
        model.decider.requires_grad_(True)
        if variant.method == "paper":
            rows.depth_labels = labels.hard
        second = round(size.steps * 0.4)
        last = objective_of(variant, seed, "decider")
        train(model, last, rows, tokenizer, second, size, seed, f"{name} decider", **options)
        ran = 0.0 if variant.method == "paper" else 1.0  # gains need the second pass, labels do not
        decider_cost = second * size.batch * row_flops(model, variant, length, ran) / 3  # forward only: 2 of 6
    seconds, wall = time.process_time() - before, time.perf_counter() - start
    scores = evaluate(model, tokenizer, task, size.test, size.validation)
    if save is not None:
        model.config.update(_rule_of(model, variant, scores["test"]["policies"]))
        model.save_pretrained(save)
        tokenizer.save_pretrained(save)
    return {
        "training": {
            "steps": first + steps,
            "decider_steps": second,
            "batch": size.batch,
            "iterated": share,
            "flops": cost,
            "decider_flops": decider_cost,
            "cpu_seconds": seconds,
            "wall_seconds": wall,
            "curve": curve,
        },
        "parameters": parameters(model),
        **scores,
    }


def _rule_of(model: TaHForCausalLM, variant: Variant, policies: dict[str, Any]) -> dict[str, Any]:
    """Return the policy that a model was trained for, as fields of its config."""
    if variant.depth == 1:
        return {"policy": "never"}
    if variant.loss_weights is not None and variant.loss_weights[0] == 0:
        return {"policy": "always"}
    if model.decider is not None:
        return {"policy": "decider", "threshold": policies["decider"]["threshold"]}
    return {"policy": "confidence", "confidence_measure": "entropy", "threshold": policies["entropy"]["threshold"]}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    choices = (*TASKS, *mixture.CHOICES)
    parser.add_argument("--task", choices=choices, default="chain", help="family of problems")
    parser.add_argument("--size", choices=SIZES, default="small", help="size of the model and its training")
    parser.add_argument("--seed", type=int, nargs="+", default=[0], help="random seeds")
    parser.add_argument(
        "--variant", choices=VARIANTS, nargs="+", default=["standard", "lookahead"], help="what to train"
    )
    for name in CHANGEABLE:
        parser.add_argument(f"--{name}", type=int, help=f"{HELP[name]}; replaces the value of --size")
    parser.add_argument(
        "--schedule",
        choices=("warmup_stable_decay", "cosine"),
        help="learning-rate schedule; replaces the value of --size",
    )
    parser.add_argument(
        "--operations",
        type=int,
        nargs="+",
        help="operations per problem, drawn with equal odds; replaces the value of --size",
    )
    parser.add_argument("--output", type=Path, help="results file; default: out/TASK-SIZE.jsonl")
    parser.add_argument("--save", type=Path, help="directory for the trained models, saved as SAVE/VARIANT-SEED")
    given = parser.parse_args(arguments)
    output = given.output or Path("out", f"{given.task}-{given.size}.jsonl")
    names = (*CHANGEABLE, "schedule")
    changed: dict[str, Any] = {name: getattr(given, name) for name in names if getattr(given, name) is not None}
    if given.operations:
        changed["operations"] = tuple(given.operations)
    size = replace(SIZES[given.size], **changed)
    for name, value in asdict(size).items():
        if (isinstance(value, int) and value < 1) or (name == "operations" and min(value) < 1):
            parser.error(f"--{name} must be at least 1, not {value}")
    try:
        refuse_others(output, settings_of(size))
    except ValueError as error:
        parser.error(str(error))
    for seed in given.seed:
        task = task_of(given.task, seed, size)
        for variant in given.variant:
            record(output, task, given.size, size, variant, given.save and given.save / f"{variant}-{seed}")


def task_of(name: str, seed: int, size: Size) -> Family:
    """Return a family of problems, with the numbers of operations of the size; the nine tasks have their own."""
    return mixture.Mixture(name, seed) if name in mixture.CHOICES else Task(name, seed, size.operations)


def settings_of(size: Any, **more: Any) -> dict[str, Any]:
    """Return the settings of a run as a line of results has them; JSON has lists for tuples.

    Args:
        size: Dataclass of the size.
        more: What else determines the lines of a file, such as the recipe whose FLOPs a baseline has.
    """
    return json.loads(json.dumps(asdict(size) | {"optimiser": OPTIMISER} | more))


def refuse_others(output: Path, settings: dict[str, Any]) -> None:
    """Refuse a file of results that has lines of other settings.

    Raises:
        ValueError: It has some. The message names them.
    """
    for made in lines_of(output):
        names = sorted(made["settings"].keys() | settings.keys())
        if other := [name for name in names if made["settings"].get(name) != settings.get(name)]:
            raise ValueError(
                f"{output} has lines of other settings ({', '.join(other)}), which cannot be compared; "
                "choose another file"
            )


def record(
    output: Path,
    task: Family,
    size_name: str,
    size: Size,
    name: str,
    save: Path | None = None,
    variant: Variant | None = None,
    more: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Train and score a variant and append its line to `output`. Return the line, which may be there already.

    Args:
        output: File of the results.
        task: Family of problems.
        size_name: Name of the size.
        size: Size of the model and its training.
        name: Name of the variant in the line.
        save: Directory for the model, if it is to be saved.
        variant: Variant to train; by default the one of `VARIANTS` with that name.
        more: More settings of the line, see `settings_of`.
        options: More `TrainingArguments`.

    Raises:
        ValueError: The file has lines of other settings.
    """
    line: dict[str, Any] = {"task": task.name, "size": size_name, "variant": name, "seed": task.seed}
    line["settings"] = settings_of(size, **(more or {}))
    refuse_others(output, line["settings"])
    for made in lines_of(output):
        if line.items() <= made.items():
            return made
    line |= {"made_with": made_with(**options)} | run(task, size, name, save, variant, **options)
    append(output, line)
    scored = "  ".join(f"{name} {its['exact_match']:.3f}" for name, its in line["test"]["policies"].items())
    print(f"{name} seed {task.seed}: {line['training']['cpu_seconds']:.0f} s  {scored}", flush=True)
    return line


def append(output: Path, line: dict[str, Any]) -> None:
    """Append a line of results to a file."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(output, "a") as file:  # one write for the whole line
        file.write(json.dumps(line) + "\n")


def lines_of(output: Path) -> list[dict[str, Any]]:
    """Return the lines of results in a file; none if there is no file."""
    return [json.loads(line) for line in output.read_text().splitlines()] if output.is_file() else []


def made_with(**options: Any) -> dict[str, Any]:
    """Return the versions, the machine and the options of the trainer of a line of results."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    versions |= {"tah": tah.__version__, "device": device, "threads": torch.get_num_threads()}
    return versions | ({"options": options} if options else {})


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return platform.processor() or "cpu"
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
