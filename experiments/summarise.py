"""Results of `lookahead.py` as a Markdown table.

    python experiments/summarise.py experiments/results/follow-small.jsonl
    python experiments/summarise.py experiments/results/follow-small.jsonl --against always-mix:always

Exact match of generated answers is the mean over seeds. A difference is paired: same seed, so same problems, same
order. Its interval is Student's t over the seeds' differences, 95 %: weights, task and test problems change with the
seed, so it has the noise of all three. One seed gives an interval over its problems only, marked *: it knows nothing of
other weights. The controls' differences have none then, as they were not generated.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t

CONTROLS = ("random", "second_choice", "hindsight")  # of the model's own two depths, not policies that generate
TITLES = ("variant", "policy", "seeds", "parameters", "training, CPU s (TFLOP)", "trained", "iterated", "new", "seen")

Line = dict[str, Any]


def estimate(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and 95 % t-interval of one value per seed; no interval for a single one."""
    n, mean = len(values), float(np.mean(values))
    if n < 2:
        return {"value": mean, "low": None, "high": None}
    half = float(t.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n))
    return {"value": mean, "low": mean - half, "high": mean + half}


def by_seed(lines: list[Line], variant: str, policy: str) -> dict[int, float]:
    """Exact match by seed."""
    chosen = [line for line in lines if line["variant"] == variant and policy in line["policies"]]
    return {line["seed"]: line["policies"][policy]["exact_match"] for line in chosen}


def difference(lines: list[Line], one: tuple[str, str], other: tuple[str, str]) -> dict[str, float | None] | None:
    """Of exact match, (variant, policy) less (variant, policy), over the seeds that both have; None without any."""
    a, b = by_seed(lines, *one), by_seed(lines, *other)
    shared = sorted(a.keys() & b.keys())
    if not shared:
        return None
    found = estimate([a[seed] - b[seed] for seed in shared])
    if len(shared) == 1:
        bits = [_right(lines, *which, shared[0]) for which in (one, other)]
        if bits[0] is not None and bits[1] is not None:
            half = 1.96 * float(np.std(bits[0] - bits[1])) / np.sqrt(len(bits[0]))
            found |= {"low": found["value"] - half, "high": found["value"] + half, "problems_only": 1.0}
    return found


def _right(lines: list[Line], variant: str, policy: str, seed: int) -> np.ndarray | None:
    """[R] 1 where the answer was right, 0 where not; None for a control."""
    (line,) = [line for line in lines if (line["variant"], line["seed"]) == (variant, seed)]
    told = line["policies"][policy].get("right")
    if told is None:
        return None
    return np.unpackbits(np.frombuffer(bytes.fromhex(told), np.uint8))[: line["problems"]].astype(float)


def table(lines: list[Line], against: Sequence[tuple[str, str]] | None = None) -> str:
    """One row per variant and policy, in the order in which they were made.

    Args:
        against: (variant, policy) to subtract, in exact match of new problems; by default each `standard`.
    """
    names = list(dict.fromkeys(line["variant"] for line in lines))
    if against is None:
        against = [(name, "never") for name in names if "standard" in name]
    titles = [*TITLES, *(f"less {name}" + (f", {policy}" if policy != "never" else "") for name, policy in against)]
    rows = [titles, ["---"] * len(titles)]
    for name in names:
        its = [line for line in lines if line["variant"] == name]
        rows += [_row(lines, its, (name, policy), against) for policy in its[0]["test"]["policies"]]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(lines: list[Line], its: list[Line], here: tuple[str, str], against: Sequence[tuple[str, str]]) -> list[str]:
    name, policy = here
    new = [line | line["test"] for line in lines]
    training = [line["training"] for line in its]
    return [
        name,
        f"({policy})" if policy in CONTROLS else policy,
        str(len(its)),
        f"{its[0]['parameters']:,}",
        f"{_mean(its['cpu_seconds'] for its in training):.0f} ({_mean(its['flops'] for its in training) / 1e12:.2f})",
        f"{_mean(its['iterated'] for its in training):.0%}",
        f"{_mean(line['test']['policies'][policy]['iterated'] for line in its):.1%}",
        _scores([line["test"]["policies"][policy]["exact_match"] for line in its]),
        f"{_mean(line['seen']['policies'][policy]['exact_match'] for line in its):.3f}",
        *(_shown(difference(new, here, other) if here != other else None) for other in against),
    ]


def _mean(values: Iterable[float]) -> float:
    return float(np.mean(list(values)))


def _scores(scored: list[float]) -> str:
    return f"{np.mean(scored):.3f}" + (f" ({min(scored):.3f} to {max(scored):.3f})" if len(scored) > 1 else "")


def _shown(found: dict[str, float | None] | None) -> str:
    if found is None:
        return ""
    text = f"{found['value']:+.3f}"
    if found["low"] is None:
        return text
    return f"{text} [{found['low']:+.3f}, {found['high']:+.3f}]" + ("*" if "problems_only" in found else "")


def operations(lines: list[Line]) -> str:
    """Exact match of new problems by their operations, and how well scores find the tokens that a pass improves."""
    steps = list(lines[0]["test"]["by_operations"]["never"])
    titles = ["variant", "policy", *(f"{count} operations" for count in steps), "AUROC for a gain"]
    rows = [titles, ["---"] * len(titles)]
    for name in dict.fromkeys(line["variant"] for line in lines):
        its = [line["test"] for line in lines if line["variant"] == name]
        for policy in its[0]["by_operations"]:
            right = [f"{_mean(row['by_operations'][policy][count] for row in its):.3f}" for count in steps]
            found = [row["finding"][policy]["auroc"] for row in its if policy in row.get("finding", {})]
            rows.append([name, policy, *right, f"{_mean(found):.3f}" if found else ""])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+", help="of lookahead.py; other files are passed over")
    parser.add_argument("--against", nargs="+", metavar="VARIANT[:POLICY]", help="what to subtract")
    given = parser.parse_args(arguments)
    against = given.against and [
        (name, policy or "never") for name, _, policy in (a.partition(":") for a in given.against)
    ]
    for path in given.results:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        if not all("test" in line for line in lines):
            print(f"{path.name}: not made by lookahead.py\n")
            continue
        print(f"{path.name}\n\n{table(lines, against)}\n\n{operations(lines)}\n")


if __name__ == "__main__":
    main()
