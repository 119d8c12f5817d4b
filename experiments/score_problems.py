"""Exact match of generated answers to held-out word problems, greedy, up to 128 tokens, whatever form the answer has.

    python experiments/score_problems.py out/smollm2/decider --policies never decider always \
        --problems out/word-problems --count 60 --output experiments/results/word-problems.jsonl --name tah
    python experiments/score_problems.py out/plain-lora --policies never --name plain-lora ...
    python experiments/score_problems.py --output experiments/results/word-problems.jsonl     # the table

Every (name, policy, set) becomes one line; lines that are there are not made again. Differences in the table are
paired, with 95 % bootstrap intervals over problems: one training run, so they know nothing of another seed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

from tah.pipeline.experiment.scores import last_number, score_answers
from tah.policy import Rule
from tah.session import Session
from tah.stats.bootstrap import Resampled

LONGEST = 128  # tokens of an answer
SETS = {"sums": "sums", "test": "kinds of the training", "new_kinds": "other kinds"}


def score(session: Session, rows: list[dict[str, Any]], policy: str) -> dict[str, Any]:
    made = score_answers(session.model, session.tokenizer, rows, Rule(policy), read=last_number, max_new_tokens=LONGEST)
    return {"right": made.right.astype(int).tolist(), "iterated": made.iterated_share, "texts": made.texts}


def table(lines: list[dict[str, Any]]) -> str:
    """By set: exact match of each model and policy, and less the base and less `always`."""
    rows = ["| problems | model, policy | right | iterated | minus the base | minus always |", "| --- " * 6 + "|"]
    for part, title in SETS.items():
        its = {(line["name"], line["policy"]): line for line in lines if line["set"] == part}
        for (name, policy), line in its.items():
            right = np.array(line["right"], np.float64)
            drawn = Resampled(np.arange(len(right)))
            compared = []
            for other in ("never", "always"):
                against = its.get(("tah", other))
                less = right - np.array(against["right"], np.float64) if against else None
                compared.append("" if less is None else _shown(drawn.estimate(drawn.mean(less))))
            rows.append(
                f"| {title} | {name}, {policy} | {right.mean():.1%} of {len(right)} | {line['iterated']:.1%} | "
                + f"{compared[0]} | {compared[1]} |"
            )
    return "\n".join(rows)


def _shown(estimate: dict[str, Any]) -> str:
    if estimate["low"] is None:
        return ""
    return f"{100 * estimate['value']:+.1f} [{100 * estimate['low']:+.1f}, {100 * estimate['high']:+.1f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--policies", nargs="+", default=["never", "decider", "always"])
    parser.add_argument("--problems", type=Path)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--name")
    given = parser.parse_args()
    there = given.output.read_text().splitlines() if given.output.is_file() else []
    lines = [json.loads(line) for line in there]
    session = Session.open(given.model) if given.model else None
    for part in SETS if session is not None else ():
        rows = [json.loads(line) for line in (given.problems / f"{part}.jsonl").read_text().splitlines()]
        for policy in given.policies:
            told = {"name": given.name, "policy": policy, "set": part, "count": given.count}
            if any(told.items() <= line.items() for line in lines):
                continue
            line = told | score(session, rows[: given.count], policy)
            lines.append(line)
            given.output.parent.mkdir(parents=True, exist_ok=True)
            with open(given.output, "a") as file:
                file.write(json.dumps(line) + "\n")
            print(told, np.mean(line["right"]), flush=True)
    print(table(lines))


if __name__ == "__main__":
    main()
