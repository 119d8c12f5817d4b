"""Score generated answers to held-out word problems: greedy, up to 128 tokens, the last number counts.

    python experiments/score_problems.py out/smollm2/decider --policies never decider always \
        --problems out/word-problems --count 60 --output experiments/results/word-problems.jsonl --name tah
    python experiments/score_problems.py out/plain-lora --policies never --name plain-lora ...
    python experiments/score_problems.py --output experiments/results/word-problems.jsonl     # the table

Each (name, policy, set) becomes one line. Lines that the output already has are skipped. Differences in the table are
paired, with 95 % bootstrap intervals over problems. They are of one training run, so the intervals do not cover the
noise of another seed.
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

LONGEST = 128  # maximum number of tokens of an answer
SETS = {"sums": "sums", "test": "kinds of the training", "new_kinds": "other kinds"}


def score(session: Session, rows: list[dict[str, Any]], policy: str) -> dict[str, Any]:
    made = score_answers(session.model, session.tokenizer, rows, Rule(policy), read=last_number, max_new_tokens=LONGEST)
    return {"right": made.right.astype(int).tolist(), "iterated": made.iterated_share, "texts": made.texts}


def table(lines: list[dict[str, Any]]) -> str:
    """Return a Markdown table by set: exact match of each model and policy, minus the base and minus `always`."""
    rows = ["| problems | model, policy | right | iterated | minus the base | minus always |", "| --- " * 6 + "|"]
    for part, title in SETS.items():
        its = {(line["name"], line["policy"]): line for line in lines if line["set"] == part}
        for (name, policy), line in its.items():
            right = np.array(line["right"], np.float64)
            drawn = Resampled(np.arange(len(right)))
            compared = []
            for other in ("never", "always"):
                against = its.get(("tah", other))
                gain = right - np.array(against["right"], np.float64) if against else None
                compared.append("" if gain is None else _shown(drawn.estimate(drawn.mean(gain))))
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
    parser.add_argument("model", nargs="?", help="checkpoint to score; without it, only the table is printed")
    parser.add_argument("--policies", nargs="+", default=["never", "decider", "always"], help="policies to score")
    parser.add_argument("--problems", type=Path, help="output directory of word_problems.py")
    parser.add_argument("--count", type=int, default=100, help="number of problems per set")
    parser.add_argument("--output", type=Path, required=True, help="results file, extended by this run")
    parser.add_argument("--name", help="name of the model in the results")
    given = parser.parse_args()
    there = given.output.read_text().splitlines() if given.output.is_file() else []
    lines = [json.loads(line) for line in there]
    session = Session.open(given.model) if given.model else None
    for part in SETS if session is not None else ():
        rows = [json.loads(line) for line in (given.problems / f"{part}.jsonl").read_text().splitlines()]
        for policy in given.policies:
            key = {"name": given.name, "policy": policy, "set": part, "count": given.count}
            if any(key.items() <= line.items() for line in lines):
                continue
            line = key | score(session, rows[: given.count], policy)
            lines.append(line)
            given.output.parent.mkdir(parents=True, exist_ok=True)
            with open(given.output, "a") as file:
                file.write(json.dumps(line) + "\n")
            print(key, np.mean(line["right"]), flush=True)
    print(table(lines))


if __name__ == "__main__":
    main()
