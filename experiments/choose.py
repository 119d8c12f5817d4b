"""Train the recipes of `variants.CHOICE` on two tasks and choose one by the rule of the plan in docs/results/log.md.

    python experiments/choose.py --output out                          # hours; trains what out/ does not have yet
    python experiments/choose.py --output experiments/results --table

Every recipe is trained with the seeds `FIRST`. Then the three recipes of docs/results/evidence.md (`TODAY`) and the
`FINALISTS` best ones are trained with the seeds `SECOND`. Each run is one line in `choose-TASK.jsonl`. While the file
`PAUSE` exists beside the results, no new run starts.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

import lookahead
from summarise import Line, by_seed, read
from variants import CHOICE, SIZES

TASKS = ("hops", "follow")
FIRST, SECOND = (10,), (11,)
BASELINE = "standard-wide"
TODAY = {"all": "decider", "uncertain": "entropy", "late": "entropy"}  # the recipes of evidence.md, with their policies
POLICIES = ("entropy", "entropy-tau", "decider")
FINALISTS = 6
HOURS = 8.0  # processor time of all trainings together after which no run starts
LOST, WORSE, EQUAL = 0.02, 0.01, 0.01  # exact match: allowed loss of depth 1, allowed loss of the policy, a tie


@dataclass(frozen=True)
class Candidate:
    """A recipe with its policy, and its means over tasks and seeds.

    Args:
        variant: Name of the recipe.
        policy: Name of the policy.
        score: Exact match of the policy, mean over tasks.
        lost: By how much depth 1 is below the one-pass baseline, on the task where that is most.
        worse: By how much the policy is below the best recipe of `TODAY`, on the task where that is most.
        flops: FLOPs of the training, with the decider's if the policy is `decider`.
        seeds: Number of seeds.
    """

    variant: str
    policy: str
    score: float
    lost: float
    worse: float
    flops: float
    seeds: int

    @property
    def qualified(self) -> bool:
        return self.lost <= LOST and self.worse <= WORSE


def candidates(results: dict[str, list[Line]]) -> list[Candidate]:
    """Return all recipes with each policy, best score first.

    The means of a recipe, and those that it is compared with, are over the seeds that all of them have on all tasks.

    Args:
        results: Lines of results by task.
    """
    found = []
    for variant in CHOICE:
        needed = (variant, BASELINE, *TODAY)
        seeds = set.intersection(*(set(by_seed(its, name, "never")) for its in results.values() for name in needed))
        if not seeds:
            continue
        trained = [
            line["training"]
            for its in results.values()
            for line in its
            if line["variant"] == variant and line["seed"] in seeds
        ]
        lost = [_mean(its, BASELINE, "never", seeds) - _mean(its, variant, "never", seeds) for its in results.values()]
        best = [max(_mean(its, *today, seeds) for today in TODAY.items()) for its in results.values()]
        for policy in POLICIES:
            scores = [_mean(its, variant, policy, seeds) for its in results.values()]
            worse = max(today - score for today, score in zip(best, scores, strict=True))
            flops = [run["flops"] + (run["decider_flops"] if policy == "decider" else 0) for run in trained]
            means = float(np.mean(scores)), max(lost), worse, float(np.mean(flops))
            found.append(Candidate(variant, policy, *means, len(seeds)))
    return sorted(found, key=lambda one: -one.score)


def _mean(lines: list[Line], variant: str, policy: str, seeds: set[int]) -> float:
    reached = by_seed(lines, variant, policy)
    return float(np.mean([reached[seed] for seed in sorted(seeds)]))


def chosen(found: Sequence[Candidate]) -> Candidate:
    """Return the candidate that the plan's rule chooses.

    Candidates with the most seeds take part. The qualified ones come first, if there are any. Of those within `EQUAL`
    of the best score, the one with the fewest parts is chosen: without decider, without LoRA, with the fewest FLOPs.
    """
    most = max(one.seeds for one in found)
    last = [one for one in found if one.seeds == most]
    last = [one for one in last if one.qualified] or last
    best = max(one.score for one in last)
    tied = [one for one in last if one.score >= best - EQUAL]
    return min(tied, key=lambda one: (one.policy == "decider", one.variant.endswith("-lora"), one.flops))


def runs(output: Path) -> Iterator[tuple[str, int, str]]:
    """Yield task, seed and variant of every run, in order. The finalists are known after the runs of `FIRST`."""
    for seed in FIRST:
        for variant in (BASELINE, *CHOICE):
            for task in TASKS:
                yield task, seed, variant
    first = {
        task: [line for line in lines if line["seed"] in FIRST] for task, lines in results_in(output, "choose").items()
    }
    best = dict.fromkeys(one.variant for one in candidates(first))
    for seed in SECOND:
        for variant in dict.fromkeys([BASELINE, *TODAY, *list(best)[:FINALISTS]]):
            for task in TASKS:
                yield task, seed, variant


def train_all(planned: Iterable[tuple[str, int, str]], output: Path, size: str, name: str, hours: float) -> None:
    """Train the runs that the results do not have yet, in order, one at a time.

    Args:
        planned: Task, seed and variant of each run.
        output: Directory of the results.
        size: Size of the model and its training.
        name: Start of the names of the results' files.
        hours: Processor time of all trainings together after which no run starts.

    Raises:
        SystemExit: The processor time is used up, or SIGTERM stopped a training.
    """
    output.mkdir(parents=True, exist_ok=True)
    for task, seed, variant in planned:
        while (output / "PAUSE").exists():
            time.sleep(10)
        lines = itertools.chain(*results_in(output, name).values())
        if sum(line["training"]["cpu_seconds"] for line in lines) > 3600 * hours:
            raise SystemExit(f"the budget of {hours} CPU hours is used up before {task} {variant} {seed}")
        run = ["--task", task, "--size", size, "--seed", str(seed), "--variant", variant]
        lookahead.main([*run, "--output", str(output / f"{name}-{task}.jsonl")])


def results_in(output: Path, name: str) -> dict[str, list[Line]]:
    """Return the lines of results by task; none if there is no file."""
    files = {task: output / f"{name}-{task}.jsonl" for task in TASKS}
    return {task: read(file) if file.exists() else [] for task, file in files.items()}


def table(found: Sequence[Candidate]) -> str:
    """Return a table of the candidates and a line with the chosen one."""
    rows = [
        f"| {one.variant} | {one.policy} | {one.seeds} | {one.score:.3f} | {-one.lost:+.3f} | {-one.worse:+.3f} | "
        f"{one.flops / 1e12:.2f} | {'yes' if one.qualified else 'no'} |"
        for one in found
    ]
    titles = (
        "recipe",
        "policy",
        "seeds",
        "score",
        "depth 1 minus baseline",
        "minus today's best",
        "TFLOP",
        "qualified",
    )
    head = [f"| {' | '.join(titles)} |", f"|{' --- |' * len(titles)}"]
    best = chosen(found)
    return "\n".join([*head, *rows, "", f"Chosen: {best.variant} with {best.policy}."])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("out"), help="directory of the results")
    parser.add_argument("--size", choices=SIZES, default="choice", help="size of the model and its training")
    parser.add_argument("--runs", type=int, help="number of runs after which to stop, made earlier or now")
    parser.add_argument("--table", action="store_true", help="print the table and what is chosen; train nothing")
    given = parser.parse_args(arguments)
    if given.table:
        if not (found := candidates(results_in(given.output, "choose"))):
            parser.error(f"{given.output} has no seed with {BASELINE}, {', '.join(TODAY)} on {' and '.join(TASKS)}")
        print(table(found))
        return
    train_all(itertools.islice(runs(given.output), given.runs), given.output, given.size, "choose", HOURS)


if __name__ == "__main__":
    main()
