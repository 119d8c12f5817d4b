"""The demo on the real model, with few tokens."""

from __future__ import annotations

from tah.demo import NOT_TRAINED, QUESTIONS, demo


def test_demo_answers_and_says_that_nothing_is_trained(smollm2, monkeypatch, capsys):
    monkeypatch.setenv("TAH_CACHE", str(smollm2.parent))
    monkeypatch.setenv("COLUMNS", "80")
    measured = demo(max_new_tokens=8, questions=QUESTIONS[:1])
    depths = {run["policy"]: set(run["depths"]) for run in measured}
    assert depths["never"] == {1} and depths["always"] == {2} and depths["confidence"] <= {1, 2}
    out = capsys.readouterr().out
    assert QUESTIONS[0] in out and "tokens/s" in out and "iterated" in out and "\x1b" not in out and "\ufffd" not in out
    assert "".join(NOT_TRAINED.split()) in "".join(out.split())
    assert "never" in out and "always" in out
