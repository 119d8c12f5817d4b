"""Train one model on nine tasks: the recipe, other recipes and baselines, by parts 3 and 4 of docs/results/log.md.

    python experiments/nine_runs.py RECIPE --policy entropy-tau --output out                   # hours; part 3
    python experiments/nine_runs.py RECIPE --policy entropy-tau --output out --lengths 1 2 4   # with part 4, the curve
    python experiments/nine_runs.py RECIPE --policy entropy-tau --output experiments/results --table

Each run is one line in `nine.jsonl`, or in `nine-x2.jsonl` and `nine-x4.jsonl` for twice and four times the training.
Runs that have a line are not made again. A file has the lines of one recipe with one policy, because these determine
the FLOPs of its baselines; lines of others are refused. While the file `PAUSE` exists beside the results, no new run
starts. The one-pass baselines have as many training FLOPs as the recipe of the same seed and length, and never fewer
steps. The primary one, `standard-as-recipe`, has the parameters of the recipe as it is trained, so it is trained
longer. The wider ones have those of a model with LoRA, linear maps and a decider.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from choose import POLICIES
from lookahead import Family, record, refuse_others, row_flops, settings_of, task_of, training_rows
from nine import TASKS
from summarise import Line, by_seed, estimate, read
from variants import CHOICE, SIZES, VARIANTS, Size, Variant, always_of, build, one_pass_of

SEEDS, CURVE_SEEDS = (30, 31, 32), (30, 31)
HOURS = 8.0  # processor time of all trainings together after which no run starts
BASELINE, ALWAYS = "standard-as-recipe", "always-as-recipe"  # have the parameters of the recipe, as it is trained
WIDE, DEEP = "standard-wide", "standard-wide-deep"
PAPER = "paper-own"  # a larger teacher would take more than 40 CPU minutes
POLICY_OF = {BASELINE: "never", WIDE: "never", ALWAYS: "always", PAPER: "decider", DEEP: "never"}
CONTROLS = ("never", "always", "random", "second_choice")


def names(recipe: str, length: int) -> tuple[str, ...]:
    """Return the variants of a length, in the order of their training."""
    return (recipe, *POLICY_OF) if length == 1 else (recipe, BASELINE)


def runs(recipe: str, lengths: Sequence[int]) -> Iterator[tuple[int, int, str]]:
    """Yield length, seed and variant of every run. A stop leaves complete seeds, shorter lengths first."""
    for length in sorted(lengths):
        for seed in SEEDS if length == 1 else CURVE_SEEDS:
            for name in names(recipe, length):
                yield length, seed, name


def file_of(output: Path, length: int) -> Path:
    """Return the file of the results of a length."""
    return output / ("nine.jsonl" if length == 1 else f"nine-x{length}.jsonl")


def variant_of(name: str, recipe: str, policy: str) -> Variant:
    """Return the variant of a name: the recipe, one with its parameters, or one of `VARIANTS`.

    The recipe has no decider that is trained after the model, if the policy does not ask it.
    """
    its = VARIANTS[recipe] if policy == "decider" else replace(VARIANTS[recipe], decider_after=False)
    derived = {recipe: its, BASELINE: one_pass_of(its), ALWAYS: always_of(its)}
    return derived[name] if name in derived else VARIANTS[name]


def matched(task: Family, size: Size, its: Variant, flops: float) -> Variant:
    """Return a one-pass variant that is trained for at least `flops` FLOPs, and for at least `size.steps` steps."""
    (_, rows) = training_rows(task, 0, size.steps * size.batch)
    model = build(size, its, task.tokenizer(), task.seed)
    steps = math.ceil(flops / (size.batch * row_flops(model, its, float(rows.lengths.mean()), 0.0)))
    return replace(its, steps=max(size.steps, steps) / size.steps)


def spent(line: Line, policy: str) -> float:
    """Return the training FLOPs of a line, with the decider's if the policy asks it."""
    training = line["training"]
    return training["flops"] + (training["decider_flops"] if policy == "decider" else 0.0)


@dataclass(frozen=True)
class Plan:
    """Represent what is trained.

    Args:
        recipe: Name of the recipe.
        policy: Its policy.
        output: Directory of the results.
        size_name: Name of the size.
        size: Size of the model, and its training at length 1.
    """

    recipe: str
    policy: str
    output: Path
    size_name: str
    size: Size

    @property
    def more(self) -> dict[str, Any]:
        """Return what determines the lines besides the size."""
        return {"recipe": self.recipe, "policy": self.policy}

    def made(self, length: int) -> list[Line]:
        """Return the lines of a length.

        Raises:
            ValueError: The file has lines of other settings, or a seed of a variant twice.
        """
        file = file_of(self.output, length)
        refuse_others(file, settings_of(self.sized(length), **self.more))
        return read(file) if file.exists() else []

    def sized(self, length: int) -> Size:
        """Return the size with the steps of a length."""
        return replace(self.size, steps=self.size.steps * length)

    def train(self, length: int, seed: int, name: str, **options: Any) -> Line:
        """Train a variant that has no line yet, and append its line.

        Args:
            length: Multiple of the size's steps.
            seed: Random seed.
            name: Name of the variant. A one-pass variant needs the line of the recipe.
            options: More `TrainingArguments`.
        """
        size = self.sized(length)
        task, variant = task_of("nine", seed, size), variant_of(name, self.recipe, self.policy)
        if variant.method == "standard":
            (recipe,) = [its for its in self.made(length) if (its["variant"], its["seed"]) == (self.recipe, seed)]
            variant = matched(task, size, variant, spent(recipe, self.policy))
        file = file_of(self.output, length)
        return record(file, task, self.size_name, size, name, variant=variant, more=self.more, **options)


def train_all(plan: Plan, planned: Iterator[tuple[int, int, str]], hours: float) -> None:
    """Train the runs that the results do not have yet, in order, one at a time.

    Raises:
        SystemExit: The processor time is used up, or SIGTERM stopped a training.
    """
    plan.output.mkdir(parents=True, exist_ok=True)
    for length, seed, name in planned:
        if any((line["variant"], line["seed"]) == (name, seed) for line in plan.made(length)):
            continue
        while (plan.output / "PAUSE").exists():
            time.sleep(10)
        made = itertools.chain(*lines_in(plan.output).values())
        if sum(line["training"]["cpu_seconds"] for line in made) > 3600 * hours:
            raise SystemExit(f"the budget of {hours} CPU hours is used up before {name} {seed}, length {length}")
        plan.train(length, seed, name)


def lines_in(output: Path) -> dict[int, list[Line]]:
    """Return the lines of results by length."""
    found = {length: file_of(output, length) for length in range(1, 9)}
    return {length: read(file) for length, file in found.items() if file.exists()}


# -- tables ----------------------------------------------------------------------------------------------------------


def over_problems(lines: list[Line], one: tuple[str, str], other: tuple[str, str]) -> dict[str, float]:
    """Return the mean difference, paired by seed and problem, with a 95 % interval over the problems."""
    changes = []
    for seed in sorted(by_seed(lines, *one).keys() & by_seed(lines, *other).keys()):
        bits = []
        for name, policy in (one, other):
            (line,) = [its["test"] for its in lines if (its["variant"], its["seed"]) == (name, seed)]
            packed = np.frombuffer(bytes.fromhex(line["policies"][policy]["right"]), np.uint8)
            bits.append(np.unpackbits(packed)[: line["problems"]].astype(float))
        changes.append(bits[0] - bits[1])
    value = float(np.mean([its.mean() for its in changes]))
    half = 1.96 * math.sqrt(sum(its.var() / len(its) for its in changes)) / len(changes)
    return {"value": value, "low": value - half, "high": value + half}


def shown(found: dict[str, Any]) -> str:
    """Return a difference with its interval, if it has one."""
    interval = "" if found["low"] is None else f" [{found['low']:+.3f}, {found['high']:+.3f}]"
    return f"{found['value']:+.3f}{interval}"


def table(lines: list[Line], recipe: str, policy: str) -> str:
    """Return the primary number, a table of the variants and a table by task, for one length."""
    its = by_seed(lines, recipe, policy)
    titles = "variant | policy | seeds | parameters | steps | TFLOP | CPU s | iterated | MFLOP per answer | exact match"
    rows = [f"| {titles} | recipe minus this |", f"|{' --- |' * 11}"]
    for name, its_policy in [(recipe, policy), *POLICY_OF.items(), *((recipe, control) for control in CONTROLS)]:
        theirs = by_seed(lines, name, its_policy)
        if not (shared := sorted(its.keys() & theirs.keys())):
            continue
        own = [line for line in lines if line["variant"] == name and line["seed"] in shared]
        change = estimate([its[seed] - theirs[seed] for seed in shared])
        rows.append(f"| {_row(own, name, its_policy)} | {'' if theirs == its else shown(change)} |")
    seeds = sorted(its.keys() & by_seed(lines, BASELINE, "never").keys())
    head = [f"{recipe} with {policy} has no seed with {BASELINE}."]
    if seeds:
        primary = estimate([its[seed] - by_seed(lines, BASELINE, "never")[seed] for seed in seeds])
        within = over_problems(lines, (recipe, policy), (BASELINE, "never"))
        head = [
            f"Average exact match, {recipe} with {policy} minus {BASELINE} at equal FLOPs, paired by seed and problem: "
            f"{shown(primary)} over {len(seeds)} seeds; over problems {shown(within)}."
        ]
    return "\n".join([*head, "", *rows, "", _by_task(lines, recipe, policy)])


def _row(lines: list[Line], name: str, policy: str) -> str:
    def mean(values: Any) -> float:
        return float(np.mean(list(values)))

    reached = [line["test"]["policies"][policy] for line in lines]
    flops = f"{mean(one['flops'] for one in reached) / 1e6:.1f}" if "flops" in reached[0] else ""
    training = [line["training"] for line in lines]
    return " | ".join(
        [
            name,
            policy,
            str(len(lines)),
            f"{lines[0]['parameters']:,}",
            f"{mean(run['steps'] for run in training):.0f}",
            f"{mean(spent(line, policy) for line in lines) / 1e12:.2f}",
            f"{mean(run['cpu_seconds'] for run in training):.0f}",
            f"{mean(one['iterated'] for one in reached):.1%}",
            flops,
            f"{mean(one['exact_match'] for one in reached):.3f}",
        ]
    )


def _by_task(lines: list[Line], recipe: str, policy: str) -> str:
    """Return exact match by task of every variant, and the recipe's iterated share."""
    columns = [(name, recipe_policy) for name, recipe_policy in [(recipe, policy), *POLICY_OF.items()]]
    columns = [one for one in columns if by_seed(lines, *one)]
    rows = [f"| task | iterated | {' | '.join(name for name, _ in columns)} |", f"|{' --- |' * (2 + len(columns))}"]

    def mean(task: str, name: str, its_policy: str, what: str) -> float:
        chosen = [line["test"]["by_task"][its_policy][task][what] for line in lines if line["variant"] == name]
        return float(np.mean(chosen))

    for task in (one for one in TASKS if one in lines[0]["test"]["by_task"]["never"]):
        reached = [f"{mean(task, name, its_policy, 'exact_match'):.3f}" for name, its_policy in columns]
        rows.append(f"| {task} | {mean(task, recipe, policy, 'iterated'):.1%} | {' | '.join(reached)} |")
    return "\n".join(rows)


def curve(found: dict[int, list[Line]], recipe: str, policy: str) -> str:
    """Return exact match against training FLOPs, over the seeds that all lengths have."""
    both = {
        length: [by_seed(lines, recipe, policy), by_seed(lines, BASELINE, "never")] for length, lines in found.items()
    }
    seeds = sorted(set.intersection(*(set(its) for pair in both.values() for its in pair)))
    rows = [
        f"| length | seeds | {recipe}: TFLOP | exact match | {BASELINE}: TFLOP | exact match | difference |",
        f"|{' --- |' * 7}",
    ]
    for length, (ours, theirs) in both.items() if seeds else ():
        flops = [
            np.mean([spent(line, its) for line in found[length] if line["variant"] == name and line["seed"] in seeds])
            for name, its in ((recipe, policy), (BASELINE, "never"))
        ]
        means = [np.mean([its[seed] for seed in seeds]) for its in (ours, theirs)]
        change = estimate([ours[seed] - theirs[seed] for seed in seeds])
        rows.append(
            f"| {length} | {len(seeds)} | {flops[0] / 1e12:.2f} | {means[0]:.3f} | {flops[1] / 1e12:.2f} | "
            f"{means[1]:.3f} | {shown(change)} |"
        )
    return "\n".join(rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=CHOICE, help="the recipe that choose.py chose")
    parser.add_argument("--policy", choices=POLICIES, required=True, help="its policy")
    parser.add_argument("--output", type=Path, default=Path("out"), help="directory of the results")
    parser.add_argument("--size", choices=SIZES, default="nine", help="size of the model and its training")
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[1], choices=range(1, 9), help="multiples of the size's steps"
    )
    parser.add_argument("--runs", type=int, help="number of runs after which to stop, made earlier or now")
    parser.add_argument("--hours", type=float, default=HOURS, help="CPU hours after which no run starts")
    parser.add_argument("--table", action="store_true", help="print the tables; train nothing")
    given = parser.parse_args(arguments)
    if given.table:
        found = lines_in(given.output)
        if not by_seed(found.get(1, []), given.recipe, given.policy):
            parser.error(f"{file_of(given.output, 1)} has no seed of {given.recipe} with {given.policy}")
        for line in itertools.chain(*found.values()):
            its = tuple(line["settings"].get(name) for name in ("recipe", "policy"))
            if its != (given.recipe, given.policy):
                parser.error(f"the lines in {given.output} are those of {its[0]} with {its[1]}")
        print(table(found[1], given.recipe, given.policy))
        if len(found) > 1:
            print("", curve(found, given.recipe, given.policy), sep="\n")
        return
    plan = Plan(given.recipe, given.policy, given.output, given.size, SIZES[given.size])
    train_all(plan, itertools.islice(runs(given.recipe, given.lengths), given.runs), given.hours)


if __name__ == "__main__":
    main()
