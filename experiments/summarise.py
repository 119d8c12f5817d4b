"""Print results of `lookahead.py` as Markdown tables.

    python experiments/summarise.py experiments/results/follow-small.jsonl
    python experiments/summarise.py experiments/results/follow-small.jsonl --against always-mix:always :never

*New* and *seen* are the exact match of generated answers, as means over seeds: on held-out problems and on problems of
the training. Differences are of the new problems, unless `--problems seen` is given. *Iterated in training* and
*iterated* are shares of the tokens to produce.

A difference is paired by seed: both models have the same problems in the same order. From three seeds on, it has a 95 %
Student's t interval over the seeds' differences. Weights, task and test problems change with the seed, so the interval
covers the noise of all three. A difference of one seed has an interval over its problems only, marked *, which does not
cover other weights. The controls are not generated, so they have no such interval.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t

CONTROLS = ("random", "second_choice", "hindsight")  # computed from the model's two depths, not generated
TITLES = ("variant", "policy", "seeds", "parameters", "training, CPU s (TFLOP)", "iterated in training", "iterated")

Line = dict[str, Any]
Against = Sequence[tuple[str, str]]


def estimate(values: Sequence[float]) -> dict[str, float | None]:
    """Return the mean and 95 % t-interval of one value per seed; without an interval for fewer than three values."""
    n, mean = len(values), float(np.mean(values))
    if n < 3:
        return {"value": mean, "low": None, "high": None}
    half = float(t.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n))
    return {"value": mean, "low": mean - half, "high": mean + half}


def by_seed(lines: list[Line], variant: str, policy: str, problems: str = "test") -> dict[int, float]:
    """Return the exact match by seed."""
    chosen = [line for line in lines if line["variant"] == variant and policy in line[problems]["policies"]]
    return {line["seed"]: line[problems]["policies"][policy]["exact_match"] for line in chosen}


def difference(
    lines: list[Line], one: tuple[str, str], other: tuple[str, str], problems: str = "test"
) -> dict[str, float | None] | None:
    """Return the difference in exact match over the seeds that both have, or None if there are none.

    Args:
        lines: Lines of results.
        one: (variant, policy) to subtract from.
        other: (variant, policy) to subtract.
        problems: `test` or `seen`.
    """
    a, b = by_seed(lines, *one, problems), by_seed(lines, *other, problems)
    shared = sorted(a.keys() & b.keys())
    if not shared:
        return None
    found = estimate([a[seed] - b[seed] for seed in shared])
    if len(shared) == 1:
        bits = [_right(lines, *which, shared[0], problems) for which in (one, other)]
        if bits[0] is not None and bits[1] is not None:
            half = 1.96 * float(np.std(bits[0] - bits[1])) / np.sqrt(len(bits[0]))
            found |= {"low": found["value"] - half, "high": found["value"] + half, "problems_only": 1.0}
    return found


def _right(lines: list[Line], variant: str, policy: str, seed: int, problems: str) -> np.ndarray | None:
    """Return `[R]`, 1 for a right answer and 0 for a wrong one; None for a control."""
    (line,) = [line[problems] for line in lines if (line["variant"], line["seed"]) == (variant, seed)]
    bits = line["policies"][policy].get("right")
    if bits is None:
        return None
    return np.unpackbits(np.frombuffer(bytes.fromhex(bits), np.uint8))[: line["problems"]].astype(float)


def table(lines: list[Line], against: Against | None = None, problems: str = "test") -> str:
    """Return a table with one row per variant and policy, in the order of the lines.

    Args:
        lines: Lines of results.
        against: Pairs (variant, policy) to subtract; by default each `standard`. A variant "" is the row's own variant.
        problems: Problems of the differences, `test` or `seen`.
    """
    names = list(dict.fromkeys(line["variant"] for line in lines))
    if against is None:
        against = [(name, "never") for name in names if "standard" in name]
    scored = sorted(("test", "seen"), key=lambda which: which != problems)
    titles = [*TITLES, *({"test": "new", "seen": "seen"}[which] for which in scored)]
    titles += [
        f"minus {name or 'own'}{'' if name and policy == 'never' else f', {policy}'}" for name, policy in against
    ]
    rows = [titles, ["---"] * len(titles)]
    for name in names:
        its = [line for line in lines if line["variant"] == name]
        for policy in its[0]["test"]["policies"]:
            others = [(other or name, its_policy) for other, its_policy in against]
            found = [difference(lines, (name, policy), other, problems) for other in others]
            compared = [
                _shown(it if other != (name, policy) else None) for it, other in zip(found, others, strict=True)
            ]
            rows.append([*_row(its, name, policy, scored), *compared])
    return _markdown(rows)


def _row(its: list[Line], name: str, policy: str, scored: list[str]) -> list[str]:
    training = [line["training"] for line in its]
    reached = {which: [line[which]["policies"][policy]["exact_match"] for line in its] for which in scored}
    spread = f" ({min(reached[scored[0]]):.3f} to {max(reached[scored[0]]):.3f})" if len(its) > 1 else ""
    return [
        name,
        f"({policy})" if policy in CONTROLS else policy,
        str(len(its)),
        f"{its[0]['parameters']:,}",
        f"{_mean(run['cpu_seconds'] for run in training):.0f} ({_mean(run['flops'] for run in training) / 1e12:.2f})",
        f"{_mean(run['iterated'] for run in training):.0%}",
        f"{_mean(line[scored[0]]['policies'][policy]['iterated'] for line in its):.1%}",
        f"{_mean(reached[scored[0]]):.3f}{spread}",
        f"{_mean(reached[scored[1]]):.3f}",
    ]


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _shown(found: dict[str, float | None] | None) -> str:
    if found is None:
        return ""
    text = f"{found['value']:+.3f}"
    if found["low"] is None:
        return text
    return f"{text} [{found['low']:+.3f}, {found['high']:+.3f}]" + ("*" if "problems_only" in found else "")


def operations(lines: list[Line], problems: str = "test") -> str:
    """Return a table of exact match by operations and of how well each policy finds tokens that a pass improves."""
    steps = list(lines[0][problems]["by_operations"]["never"])
    rows = [["variant", "policy", *(f"{count} operations" for count in steps), "AUROC for a gain"]]
    rows.append(["---"] * len(rows[0]))
    for name in dict.fromkeys(line["variant"] for line in lines):
        its = [line[problems] for line in lines if line["variant"] == name]
        for policy in its[0]["by_operations"]:
            right = [f"{_mean(scores['by_operations'][policy][count] for scores in its):.3f}" for count in steps]
            found = [scores["finding"][policy]["auroc"] for scores in its if policy in scores.get("finding", {})]
            rows.append([name, policy, *right, f"{_mean(found):.3f}" if found else ""])
    return _markdown(rows)


def _markdown(rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def read(path: Path) -> list[Line]:
    """Return the lines of a file, or [] if `lookahead.py` did not write it.

    Raises:
        ValueError: The settings of the lines differ, or a seed of a variant is there twice.
    """
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    if not all("test" in line for line in lines):
        return []
    for name in dict.fromkeys(name for line in lines for name in line["settings"]):
        values = {json.dumps(line["settings"].get(name)) for line in lines}
        if len(values) > 1:
            raise ValueError(
                f"{path}: lines with different {name} ({' and '.join(sorted(values))}) need different files"
            )
    made = [(line["task"], line["variant"], line["seed"]) for line in lines]
    twice = [one for one in made if made.count(one) > 1]
    if twice:
        raise ValueError(f"{path}: {' '.join(map(str, twice[0]))} occurs twice")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "results", type=Path, nargs="+", help="files of lookahead.py; files of other scripts are skipped"
    )
    parser.add_argument(
        "--against",
        nargs="+",
        metavar="VARIANT[:POLICY]",
        help="what to subtract; without a variant, the variant of the row",
    )
    parser.add_argument(
        "--problems", choices=("test", "seen"), default="test", help="held-out problems, or those of the training"
    )
    given = parser.parse_args(arguments)
    against = None
    if given.against:
        against = [(name, policy or "never") for name, _, policy in (one.partition(":") for one in given.against)]
    for path in given.results:
        try:
            lines = read(path)
        except (OSError, ValueError) as error:
            parser.error(str(error))
        known = {(line["variant"], policy) for line in lines for policy in line["test"]["policies"]}
        known |= {("", policy) for _, policy in known}
        unknown = [one for one in against or () if one not in known]
        if lines and unknown:
            choices = ", ".join(sorted(f"{name}:{policy}" for name, policy in known))
            parser.error(f"--against {':'.join(unknown[0])} is not in {path}, which has {choices}")
        shown = [table(lines, against, given.problems), operations(lines, given.problems)] if lines else []
        print("\n\n".join([path.name, *(shown or ["not written by lookahead.py"])]), end="\n\n")


if __name__ == "__main__":
    main()
