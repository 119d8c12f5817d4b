"""Measure what a model of the task `follow` predicts after one pass.

    python experiments/first_words.py follow-tah
    python experiments/first_words.py out/follow/lookahead-mix-entropy-late-0 --operations 1 1 2

The script groups held-out problems by the number of their arrows. For each group it prints three shares:

    the next place            the first choice after one pass is the place that one arrow leads to
    the answer                the first choice after one pass is the answer
    a guess is the answer     the root that most arrows lead to is the answer; this guess needs no lookup
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoTokenizer

from tah import TaHForCausalLM
from tah.load import find
from tasks import Rows, Task


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint directory, Hub id, or name of a bundled checkpoint")
    parser.add_argument(
        "--operations",
        type=int,
        nargs="+",
        default=[1, 1, 2],
        help="operations per problem, as in the model's training",
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed of the problems")
    parser.add_argument("--count", type=int, default=500, help="number of problems")
    given = parser.parse_args()
    try:
        path, _ = find(given.model)
    except ValueError as error:
        parser.error(str(error))
    model, tokenizer = TaHForCausalLM.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    problems = Task("follow", given.seed, tuple(given.operations)).take("test", given.count, distinct=True)
    rows = Rows(problems, tokenizer)
    predicted = model(torch.tensor(rows.ids.astype("int64")), policy="never").logits.argmax(
        -1
    )  # all lines have the same length
    for arrows in sorted({problem.steps for problem in problems}):
        found = {"the next place": 0, "the answer": 0, "a guess is the answer": 0}
        chosen = [at for at, problem in enumerate(problems) if problem.steps == arrows]
        for at in chosen:
            *facts, start = problems[at].line.split()
            targets = dict(fact.split(">") for fact in facts)
            word = tokenizer.convert_ids_to_tokens(int(predicted[at, rows.lengths[at] - 3]))
            found["the next place"] += word == targets[start]
            found["the answer"] += word == problems[at].answer
            roots = [place for place, target in targets.items() if place == target]
            guess = max(roots, key=list(targets.values()).count)
            found["a guess is the answer"] += guess == problems[at].answer
        shares = ", ".join(f"{what} {count / len(chosen):.3f}" for what, count in found.items())
        print(f"{arrows} arrows, {len(chosen)} problems: {shares}")


if __name__ == "__main__":
    main()
