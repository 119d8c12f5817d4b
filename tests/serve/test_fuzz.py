"""Random requests to random engines (`fuzz.py`): a few each time, 500 answers in the slow tests."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="serving is tested where vLLM is installed: make serve-test")

import fuzz

from helpers.interpreter import IS_V2

SOME = [(100, 6), (103, 6)] if IS_V2 else [(100, 20), (103, 20)]  # one of each way to batch


@pytest.mark.timeout(900)
@pytest.mark.parametrize(("seed", "answers"), SOME)
def test_some(seed, answers):
    result = fuzz.play(seed, answers)
    assert result.answers >= answers and not result.differences, result


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("seed", range(10))
def test_many(seed):
    result = fuzz.play(seed, 12 if IS_V2 else 50)
    assert not result.differences, result


def test_a_difference_is_seen(monkeypatch):
    """The control: answers of another rule."""
    monkeypatch.setattr(fuzz, "RULES", [{"threshold": 0.5}])
    reference = fuzz.reference
    monkeypatch.setattr(fuzz, "reference", lambda *given, **rule: reference(*given, threshold=0.6))
    assert len(fuzz.play(2, 4).differences) > 1
