"""Make grade-school word problems with their working, for the bundled checkpoint, from seeds without downloads.

    python experiments/word_problems.py --output out/word-problems
    tah run smollm2-word-problems --output out/smollm2 data.source=out/word-problems/train.jsonl \
        data.validation=out/word-problems/validation.jsonl

Half of the problems are short ones of reasoning-gym's `gsm_symbolic`: problems like those of GSM8K with new names and
numbers. 19 of its 100 kinds are short enough. Only the last line is changed, to "Answer: N". The other half are the
written-out sums of `tah run tiny-paper`. The names of its variables identify a kind. A tenth of the kinds is held out:

    train.jsonl, validation.jsonl    sums and kinds of the training
    sums.jsonl, test.jsonl           held-out sums; the same kinds, with other names and numbers
    new_kinds.jsonl                  kinds that were not trained on
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import reasoning_gym

from tah.pipeline.experiment.sums import Sums
from tah.pipeline.experiment.tiny import distinct_rows

SUFFIX = " Give the result as your final answer. Do not include units."
SIZES = {"test": 200, "new_kinds": 200, "sums": 200, "validation": 120, "train": 3000}
LONGEST = {"question": 260, "working": 140}  # characters; a small model on a CPU needs seconds for these
LARGEST = 200  # largest number in a word problem; larger ones are too hard for a small model
SEED = 2026


def problems(seed: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield pairs (kind, row) without end, each question once."""
    seen: set[str] = set()
    while True:
        for entry in reasoning_gym.create_dataset("gsm_symbolic", seed=seed, size=1000):
            question = " ".join(entry["question"].removesuffix(SUFFIX).split())
            working = "\n".join(" ".join(line.split()) for line in entry["metadata"]["answer_cot"].split("\n"))
            steps, _, answer = working.partition("\n#### ")
            numbers = [int(number) for number in re.findall(r"\d+", question + working)]
            fits = len(question) <= LONGEST["question"] and len(steps) <= LONGEST["working"]
            fits &= max(numbers) <= LARGEST
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


def sums(seed: int, count: int) -> Iterator[dict[str, Any]]:
    """Yield `count` different sums of two to four numbers below 100, with their working."""
    settings = Sums(train=1, validation=1, test=1, min_terms=2, max_terms=4, min_digits=1, max_digits=2, negative=False)
    for row in distinct_rows(settings, seed, count):
        question, working = (message["content"] for message in row["messages"])
        yield chat(f"What is {question.removesuffix(' =')}?", working, row["answer"])


def splits(sizes: dict[str, int], seed: int) -> dict[str, list[dict[str, Any]]]:
    """Return the rows by split; no question is in two splits."""
    half = {name: sizes[name] // 2 for name in ("train", "validation")}
    chains = sums(seed, sizes["sums"] + sum(half.values()))
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in sizes}
    found |= {name: list(itertools.islice(chains, count)) for name, count in {"sums": sizes["sums"], **half}.items()}
    for kind, row in problems(seed):
        names = ("new_kinds",) if held_out(kind) else ("test", "validation", "train")
        open_ones = [name for name in names if len(found[name]) < sizes[name]]
        if open_ones:
            found[open_ones[0]].append(row)
        elif all(len(found[name]) == count for name, count in sizes.items()):
            break
    for name in half:
        random.Random(seed).shuffle(found[name])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="directory for the files")
    parser.add_argument("--seed", type=int, default=SEED, help="random seed of the problems")
    given = parser.parse_args()
    given.output.mkdir(parents=True, exist_ok=True)
    for name, rows in splits(SIZES, given.seed).items():
        (given.output / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{name}: {len(rows)}")


if __name__ == "__main__":
    main()
