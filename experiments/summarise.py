"""Results of `lookahead.py` as a Markdown table.

    python experiments/summarise.py experiments/results/chain-small.jsonl

Exact match of generated answers is the mean over seeds. A difference is paired: same seed, so same problems, same
order. Its interval is Student's t over the seeds' differences, 95 %: weights, task and test problems change with the
seed, so it has the noise of all three. One seed gives an interval over its problems only, marked *: it knows nothing of
other weights. The controls' differences have none then, as they were not generated.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t

CONTROLS = ("random", "second_choice", "hindsight")  # of the model's own two depths, not policies that generate
TITLES = ("variant", "policy", "seeds", "parameters", "training TFLOP", "CPU s", "iterated", "exact match")

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


def table(lines: list[Line]) -> str:
    """One row per variant and policy, in the order in which they were made."""
    names = list(dict.fromkeys(line["variant"] for line in lines))
    against = [name for name in names if name.startswith("standard")]
    titles = [*TITLES, *(f"minus {name}" for name in against), "minus own never", "minus own always"]
    rows = [titles, ["---"] * len(titles)]
    for name in names:
        its = [line for line in lines if line["variant"] == name]
        for policy in its[0]["policies"]:
            rows.append(_row(lines, its, name, policy, against))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(lines: list[Line], its: list[Line], name: str, policy: str, against: list[str]) -> list[str]:
    scored = [line["policies"][policy]["exact_match"] for line in its]
    here = (name, policy)
    compared = [difference(lines, here, (other, "never")) if other != name else None for other in against]
    own = [difference(lines, here, (name, other)) if policy != other else None for other in ("never", "always")]
    return [
        name,
        f"({policy})" if policy in CONTROLS else policy,
        str(len(its)),
        f"{its[0]['parameters']:,}",
        f"{np.mean([line['training']['flops'] for line in its]) / 1e12:.2f}",
        f"{np.mean([line['training']['cpu_seconds'] for line in its]):.0f}",
        f"{np.mean([line['policies'][policy]['iterated'] for line in its]):.1%}",
        f"{np.mean(scored):.3f}" + (f" ({min(scored):.3f} to {max(scored):.3f})" if len(scored) > 1 else ""),
        *(_shown(found) for found in (*compared, *own)),
    ]


def _shown(found: dict[str, float | None] | None) -> str:
    if found is None:
        return ""
    text = f"{found['value']:+.3f}"
    if found["low"] is None:
        return text
    return f"{text} [{found['low']:+.3f}, {found['high']:+.3f}]" + ("*" if "problems_only" in found else "")


def operations(lines: list[Line]) -> str:
    """Exact match by the problem's operations, under `never` and `always`."""
    steps = list(lines[0]["by_operations"]["never"])
    rows = [["variant", "policy", *(f"{count} operations" for count in steps)], ["---"] * (2 + len(steps))]
    for name in dict.fromkeys(line["variant"] for line in lines):
        its = [line["by_operations"] for line in lines if line["variant"] == name]
        for policy in [policy for policy in ("never", "always") if policy in its[0]]:
            rows.append([name, policy, *(f"{np.mean([row[policy][count] for row in its]):.3f}" for count in steps)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    for path in parser.parse_args(arguments).results:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for problems, title in (("test", "new problems"), ("seen", "problems of the training")):
            scored = [line | line[problems] for line in lines]
            print(f"{path.name}: {title}\n\n{table(scored)}\n\n{operations(scored)}\n")


if __name__ == "__main__":
    main()
