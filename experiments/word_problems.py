"""Grade-school word problems with their working, for the checkpoint in the box: made from seeds, nothing downloaded.

    python experiments/word_problems.py --output out/word-problems
    tah run smollm2-word-problems --output out/smollm2 data.source=out/word-problems/train.jsonl \
        data.validation=out/word-problems/validation.jsonl

Four fifths are reasoning-gym's `gsm_symbolic` (100 kinds of problems after GSM8K, with new names and numbers), as they
come but for the last line, which is "Answer: N"; the others are the written-out sums of `tah run tiny`. A kind is told
by the names of its variables. A tenth of the kinds is never trained on:

    train.jsonl, validation.jsonl    kinds of the training
    test.jsonl                       the same kinds, other names and numbers
    new_kinds.jsonl                  kinds that were not trained on
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import reasoning_gym

from tah.training.tiny import Generate, distinct_rows

SUFFIX = " Give the result as your final answer. Do not include units."
SIZES = {"test": 200, "new_kinds": 200, "validation": 100, "train": 3000}
LONGEST = {"question": 320, "working": 240}  # characters: what a small model on a CPU reads and says in seconds
SUMS = 0.2  # of the rows that are trained on
SEED = 2026


def problems(seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """(kind, row), each question once, without end."""
    seen: set[str] = set()
    while True:
        for entry in reasoning_gym.create_dataset("gsm_symbolic", seed=seed, size=1000):
            question = " ".join(entry["question"].removesuffix(SUFFIX).split())
            working = "\n".join(" ".join(line.split()) for line in entry["metadata"]["answer_cot"].split("\n"))
            steps, _, answer = working.partition("\n#### ")
            fits = len(question) <= LONGEST["question"] and len(steps) <= LONGEST["working"]
            if not fits or not answer.isdigit() or question in seen:
                continue
            seen.add(question)
            yield (
                " ".join(sorted(entry["metadata"]["variables"])),
                chat(question, f"{steps}\nAnswer: {answer}", answer),
            )
        seed += 1000  # seed s + 1 begins with the second question of seed s


def chat(question: str, working: str, answer: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": working}]
    return {"messages": messages, "answer": answer}


def held_out(kind: str) -> bool:
    return hashlib.sha256(kind.encode()).digest()[0] < 26  # a tenth


def splits(sizes: dict[str, int], seed: int) -> dict[str, list[dict[str, Any]]]:
    """Rows by split; no question is in two of them."""
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in sizes}
    sums = round(SUMS * sizes["train"])
    wanted = sizes | {"train": sizes["train"] - sums}
    for kind, row in problems(seed):
        names = ("new_kinds",) if held_out(kind) else ("test", "validation", "train")
        open_ones = [name for name in names if len(found[name]) < wanted[name]]
        if open_ones:
            found[open_ones[0]].append(row)
        elif all(len(found[name]) == count for name, count in wanted.items()):
            break
    chains = Generate(
        train=1, validation=1, test=1, min_terms=2, max_terms=4, min_digits=1, max_digits=2, negative=False
    )
    rows, every = found["train"], max(1, len(found["train"]) // max(1, sums))
    for at, row in enumerate(distinct_rows(chains, seed, sums)):
        question, working = (message["content"] for message in row["messages"])
        rows.insert(at * (every + 1), chat(f"What is {question.removesuffix(' =')}?", working, row["answer"]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=SEED)
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    for name, rows in splits(SIZES, given.seed).items():
        (given.output / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{name}: {len(rows)}")


if __name__ == "__main__":
    main()
