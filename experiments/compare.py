"""Compare the chosen recipe with others on new seeds, by part 2 of the plan in docs/results/log.md.

    python experiments/compare.py RECIPE --policy entropy-tau --output out        # hours; trains what is missing
    python experiments/compare.py RECIPE --policy entropy-tau --output experiments/results --table
    python experiments/compare.py tah2 --policy decider-half --output out   # TaH2 and its comparison

Two processes with different seeds (`--seed`) need an output each; their lines are put together afterwards. Each run is
one line in `compare-TASK.jsonl`. While the file `PAUSE` exists beside the results, no new run starts. The
table has parameters, training FLOPs and CPU seconds, the mean over the tasks of the exact match on new problems, and
the difference of the recipe from it, paired by seed. `summarise.py` prints the tables by task.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from choose import BASELINE, POLICIES, TASKS, results_in, train_all
from summarise import Line, by_seed, estimate
from variants import CHOICE, SIZES

SEEDS = (20, 21, 22, 23)
HOURS = 7.0  # processor time of all trainings together after which no run starts
OTHERS = {
    "paper-own": "decider",
    "paper": "decider",
    "paper-noisy": "decider",
    "always-mix": "always",
    "tah2": "decider-half",
}
CONTROLS = ("never", "always", "always-weighed", "entropy", "decider", "random", "second_choice")
OF_TAH2 = {  # what TaH2 is compared with, by the plan of its own
    "standard-tah2": "never",
    "standard-tah2-x1.5": "never",
    "paper-own": "decider",
    "all": "decider",
    "always-mix": "always",
}


def averages(results: dict[str, list[Line]], variant: str, policy: str) -> dict[int, float]:
    """Return the exact match by seed, as a mean over the tasks; only seeds that all tasks have."""
    found = [by_seed(lines, variant, policy) for lines in results.values()]
    seeds = set.intersection(*(set(its) for its in found))
    return {seed: float(np.mean([its[seed] for its in found])) for seed in sorted(seeds)}


def others_of(recipe: str, policy: str) -> dict[str, str]:
    """Return the variants that a recipe is compared with, and their policies."""
    return OF_TAH2 if recipe == "tah2" else {BASELINE: "never", f"{recipe}-blind": policy} | OTHERS


def table(results: dict[str, list[Line]], recipe: str, policy: str) -> str:
    """Return a table of the recipe, its controls and the others; the first difference is the primary number."""
    its = averages(results, recipe, policy)
    rows = [
        "| variant | policy | seeds | parameters | TFLOP | CPU s | exact match | recipe minus this |",
        "| --- " * 8 + "|",
    ]
    compared = list(others_of(recipe, policy).items())
    compared += [(recipe, name) for name in CONTROLS]
    rows.append(f"| {recipe} | {policy} | {len(its)} | {cost(results, recipe)} | {np.mean(list(its.values())):.3f} | |")
    for variant, name in compared:
        theirs = averages(results, variant, name)
        if shared := sorted(its.keys() & theirs.keys()):
            change = estimate([its[seed] - theirs[seed] for seed in shared])
            low, high = change["low"], change["high"]
            interval = "" if low is None or high is None else f" [{low:+.3f}, {high:+.3f}]"
            mean = np.mean([theirs[seed] for seed in shared])
            numbers = f"{len(shared)} | {cost(results, variant)} | {mean:.3f} | {change['value']:+.3f}{interval}"
            rows.append(f"| {variant} | {name} | {numbers} |")
    return "\n".join(rows)


def cost(results: dict[str, list[Line]], variant: str) -> str:
    """Return three cells: parameters, training FLOPs and CPU seconds of a variant, means over tasks and seeds."""
    lines = [line for its in results.values() for line in its if line["variant"] == variant]
    flops = [line["training"]["flops"] + line["training"]["decider_flops"] for line in lines]
    parameters = np.mean([line["parameters"] for line in lines])
    seconds = np.mean([line["training"]["cpu_seconds"] for line in lines])
    return f"{parameters:,.0f} | {np.mean(flops) / 1e12:.2f} | {seconds:.0f}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=(*CHOICE, "tah2"), help="the recipe that choose.py chose, or tah2")
    parser.add_argument("--policy", choices=(*POLICIES, "decider-half"), required=True, help="its policy")
    parser.add_argument("--output", type=Path, default=Path("out"), help="directory of the results")
    parser.add_argument("--size", choices=SIZES, default="choice", help="size of the model and its training")
    parser.add_argument(
        "--seed", type=int, nargs="+", choices=SEEDS, default=SEEDS, help="seeds of one of several processes"
    )
    parser.add_argument("--runs", type=int, help="number of runs after which to stop, made earlier or now")
    parser.add_argument("--table", action="store_true", help="print the table; train nothing")
    given = parser.parse_args(arguments)
    if given.table:
        results = results_in(given.output, "compare")
        if not averages(results, given.recipe, given.policy):
            parser.error(f"{given.output} has no seed of {given.recipe} on {' and '.join(TASKS)}")
        print(table(results, given.recipe, given.policy))
        return
    variants = (given.recipe, *others_of(given.recipe, given.policy))
    runs = ((task, seed, variant) for seed in given.seed for variant in variants for task in TASKS)
    train_all(itertools.islice(runs, given.runs), given.output, given.size, "compare", HOURS)


if __name__ == "__main__":
    main()
