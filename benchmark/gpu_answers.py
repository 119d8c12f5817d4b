"""Compare answers of two engines, where rounding may decide between two tokens that are nearly tied."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Any, NamedTuple

LEAST_TIES = 1  # answers that may differ at a tie, and the share of them
SHARE_OF_TIES = 1 / 16


class Answer(NamedTuple):
    """An answer; that of the reference has `gaps` and `margins`."""

    tokens: list[int]  # of the answer
    depths: list[int]  # of the tokens of prompt and answer, except the last
    gaps: Sequence[float] = ()  # of each token of the answer: between the scores of the best two tokens
    margins: Sequence[float] = ()  # of each depth: between continue probability and threshold


def compare(got: Sequence[Answer], want: Sequence[Answer], gap: float, margin: float) -> dict[str, Any]:
    """Compare answers with those of the reference, up to the first difference of each.

    Args:
        got: Answers.
        want: Answers of the reference, to the same prompts.
        gap: Two tokens are tied if their scores differ by at most this.
        margin: A decision is tied if continue probability and threshold differ by at most this.

    Returns:
        A row: the number of equal answers; the largest gap and the largest margin at which answers differ, if any do;
        `ok` is true if they differ at ties only, and in few answers.
    """
    gaps, margins = [], []
    for one, other in zip(got, want, strict=True):
        if (len(one.tokens), len(one.depths)) != (len(other.tokens), len(other.depths)):
            gaps.append(inf)
            continue
        token, depth = first_difference(one.tokens, other.tokens), first_difference(one.depths, other.depths)
        before = len(other.depths) - len(other.tokens) + 1  # tokens of the prompt
        if depth is not None and (token is None or depth < before + token):  # the decision changed the token
            margins.append(other.margins[depth])
        elif token is not None:
            gaps.append(other.gaps[token])
    different = len(gaps) + len(margins)
    few = different <= max(LEAST_TIES, SHARE_OF_TIES * len(want))
    near = all(x <= gap for x in gaps) and all(x <= margin for x in margins)
    row = {"equal": len(want) - different, "differ at a gap of": max(gaps, default=None)}
    return row | {"differ at a margin of": max(margins, default=None), "ok": few and near}


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Return the index of the first difference; None if there is none."""
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)
