"""Task `sums` of the recipes `tiny-paper`, `tiny-lookahead` and `tiny-tah2`: sums with every total written out.

Questions come from reasoning-gym's `chain_sum`, for example "8 + 7 - 9 =". This module adds the solution:

    8 + 7 = 15
    15 - 9 = 6
    Answer: 6

The first digit of a total depends on its last digits, and a wrong total makes all later totals wrong.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import Field, model_validator

from ...training.recipe import Part, Positive, one_of


class Sums(Part):
    """Section `data.generate` of a recipe, for sums.

    Args:
        task: `sums`, also if the field is missing.
        train: Number of training rows.
        validation: Number of validation rows.
        test: Number of test rows.
        min_terms: Smallest number of terms of a sum.
        max_terms: Largest number of terms of a sum.
        min_digits: Smallest number of digits of a term.
        max_digits: Largest number of digits of a term.
        negative: Whether totals may be negative.
    """

    task: Annotated[str, one_of(("sums", "arrows"))] = "sums"
    train: Positive
    validation: Positive
    test: Positive
    min_terms: Annotated[int, Field(ge=2)]
    max_terms: Annotated[int, Field(ge=2)]
    min_digits: Positive
    max_digits: Positive
    negative: bool

    @model_validator(mode="after")
    def _check(self) -> Sums:
        for name in ("terms", "digits"):
            low, high = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if low > high:
                raise ValueError(f"min_{name}={low} is more than max_{name}={high}")
        return self


def sums(settings: Sums, seed: int, count: int) -> Iterator[dict[str, Any]]:
    """Yield rows of sums; questions may repeat.

    Args:
        settings: Section `data.generate`.
        seed: Random seed.
        count: Number of questions to draw. Those with a negative total are left out unless `negative` allows them.

    Raises:
        ValueError: reasoning-gym is not installed.
    """
    try:
        import reasoning_gym
    except ImportError as error:
        raise ValueError("data.generate.task=sums needs reasoning-gym: pip install 'tah[train,tiny]'") from error
    names = ("min_terms", "max_terms", "min_digits", "max_digits")
    options = {name: getattr(settings, name) for name in names}
    for entry in reasoning_gym.create_dataset("chain_sum", seed=seed, size=count, **options):
        question = entry["metadata"]["expression"] + " ="
        working, totals = working_out(question)
        if min(totals) < 0 and not settings.negative:
            continue
        assert str(totals[-1]) == entry["answer"]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": working}]
        yield {"messages": messages, "answer": entry["answer"]}


def working_out(question: str) -> tuple[str, list[int]]:
    """Return the solution of a question and all its totals. The last total is the answer."""
    first, *rest = question.removesuffix(" =").split(" ")
    totals, lines = [int(first)], []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        before = totals[-1]
        totals.append(before + int(term) if sign == "+" else before - int(term))
        lines.append(f"{before} {sign} {term} = {totals[-1]}")
    return "\n".join([*lines, f"Answer: {totals[-1]}"]), totals
