"""What `benchmark/gpu_serve.py` makes of answers that differ, and of attention backends that fail."""

from __future__ import annotations

from math import inf
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmark"
MISSING = "Selected backend FLASHINFER is not valid for this configuration. Reason: [ImportError: flashinfer]"


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


def answer(tokens, depths, gaps=(), margins=()):
    from gpu_answers import Answer

    return Answer(tokens, depths, gaps, margins)


WANT = ([5, 6, 7], [1, 2, 1, 1, 2], [2.0, 0.001, 3.0], [0.3, 0.2, 0.1, 0.00005, 0.4])  # three tokens of prompt


@pytest.mark.parametrize(
    ("tokens", "depths", "ok", "gap", "margin"),
    [
        ([5, 6, 7], [1, 2, 1, 1, 2], True, None, None),
        ([5, 9, 9], [1, 2, 1, 1, 1], True, 0.001, None),  # a tie of tokens; the depth after it follows from it
        ([9, 9, 9], [1, 2, 1, 2, 1], False, 2.0, None),
        ([5, 8, 9], [1, 2, 1, 2, 2], True, None, 0.00005),  # a tie of a decision, which changed the next token
        ([5, 6, 7], [1, 1, 1, 1, 2], False, None, 0.2),
        ([5, 6], [1, 2, 1, 1], False, inf, None),
    ],
)
def test_a_difference_is_judged_by_its_margin(tokens, depths, ok, gap, margin):
    from gpu_answers import compare

    row = compare([answer(tokens, depths)], [answer(*WANT)], 0.01, 0.0001)
    assert row["ok"] is ok and row["equal"] == (gap is None and margin is None)
    assert (row["differ at a gap of"], row["differ at a margin of"]) == (gap, margin)


def test_many_ties_are_no_ties():
    from gpu_answers import compare

    for count, ok in ((1, True), (2, False)):
        got = [answer([5, 9, 9], WANT[1])] * count + [answer(*WANT[:2])] * (16 - count)
        assert compare(got, [answer(*WANT)] * 16, 0.01, 0)["ok"] is ok


def layouts(outcomes):
    from gpu_serve import by_backend

    def start(backend):
        if isinstance(outcomes[backend], str):
            raise RuntimeError(outcomes[backend])
        return "(1,)", "(1,)", [answer(outcomes[backend], [2] * 6, [5.0] * 4)] * 2

    return by_backend(list(outcomes), start)


def test_a_backend_that_crashes_is_a_failure():
    right = [1, 2, 3, 4]
    cases = {"TRITON_ATTN": right, "FLASH_ATTN": "illegal memory access", "FLASHINFER": MISSING, "FLEX": [1, 2, 9, 9]}
    rows = {row["backend"]: row for row in layouts(cases)}
    assert {name: row.get("ok") for name, row in rows.items()} == {
        "TRITON_ATTN": True,
        "FLASH_ATTN": False,
        "FLASHINFER": None,
        "FLEX": False,
    }
    assert rows["FLEX"]["compared with"] == "TRITON_ATTN" and rows["FLEX"]["differ at a gap of"] == 5


def test_one_backend_at_least_has_to_pass():
    with pytest.raises(RuntimeError, match="none of the attention backends TRITON_ATTN, FLASHINFER passed"):
        list(layouts({"TRITON_ATTN": MISSING, "FLASHINFER": MISSING}))
