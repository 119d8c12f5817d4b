"""A base model in the commands: it answers as itself, and a note says that nothing in it is trained to iterate."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from helpers.commands import one_line, questions, said
from tah.session import CONFIDENCE_THRESHOLD, Session

NOTE = "is a base model without a trained second pass"
pytestmark = pytest.mark.usefixtures("plain")


def test_a_base_answers_as_itself(capsys, tiny_base):
    code, out, err = said(capsys, "generate", tiny_base, "hi", "--json", "--max-new-tokens", 12)
    got = json.loads(out)
    base = AutoModelForCausalLM.from_pretrained(tiny_base).eval()
    session = Session.open(str(tiny_base), device="cpu")
    ids = torch.tensor([session.encode([{"role": "user", "content": "hi"}])])
    want = base.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
    assert code == 0 and [token["id"] for token in got["tokens"]] == want
    assert {token["depth"] for token in got["tokens"]} == {1} and got["policy"] == "never"
    assert NOTE in err and "--policy confidence" in err and err.count("\n") == 1


@pytest.mark.parametrize("command", [("generate", "hi"), ("chat",)])
@pytest.mark.parametrize("option", [("--threshold", 0.3), ("--max-depth", 2), ("--max-depth", 3, "--threshold", 0)])
def test_what_changes_nothing_is_refused_before_anything_is_loaded(capsys, tiny_base, tmp_path, command, option):
    """There is nothing to load, and nobody notices."""
    empty = shutil.copytree(tiny_base, tmp_path / "empty")
    (empty / "model.safetensors").unlink()
    name, *rest = command
    assert "changes nothing while the base model" in one_line(capsys, name, empty, *rest, *option)
    for options in (("--max-depth", 1), (*option, "--policy", "confidence")):  # controls: these would load it
        assert "has no model.safetensors" in one_line(capsys, name, empty, *rest, *options)


@pytest.mark.parametrize(
    ("options", "policy", "noted"),
    [
        ((), "never", True),
        (("--max-depth", 1), "never", True),
        (("--policy", "never"), "never", False),
        (("--policy", "confidence"), "confidence", False),
        (("--policy", "always"), "always", False),
        (("--policy", "random"), "random", False),
        (("--policy", "confidence", "--threshold", 0.4), "confidence", False),
        (("--policy", "confidence", "--max-depth", 3), "confidence", False),
        (("--policy", "always", "--max-depth", 3), "always", False),
        (("--policy", "never", "--threshold", 0.4), "never", False),  # nothing was left to guess
    ],
)
def test_the_note_appears_only_where_no_policy_was_given(capsys, tiny_base, options, policy, noted):
    code, out, err = said(capsys, "generate", tiny_base, "hi", "--json", "--max-new-tokens", 4, *options)
    got = json.loads(out)
    assert code == 0 and got["policy"] == policy and (NOTE in err) == noted
    asked = float(options[options.index("--threshold") + 1]) if "--threshold" in options else CONFIDENCE_THRESHOLD
    assert got["threshold"] == asked
    if policy == "always":
        assert {token["depth"] for token in got["tokens"]} == {got["max_depth"]}


@pytest.mark.parametrize("options", [("--threshold", 0.5), ("--max-depth", 2), ("--max-depth", 3, "--threshold", 0)])
@pytest.mark.parametrize("verb", ["generate", "chat", "eval"])
def test_an_option_that_would_change_nothing_is_refused(capsys, tmp_path, tiny_base, verb, options):
    words = {"generate": ("hi",), "chat": (), "eval": ("--tasks", "gsm8k", "-o", tmp_path / "out")}[verb]
    if verb == "eval":
        words = (*words, "--data", questions(tmp_path / "q.jsonl", "2 + 2"))
    line = one_line(capsys, verb, tiny_base, *words, *options)
    assert "answers as itself" in line and "--policy confidence" in line
    assert not (tmp_path / "out").exists()


def test_a_trained_model_is_not_taken_for_a_base(capsys, tiny_checkpoint):
    for options in ((), ("--threshold", 0.4), ("--max-depth", 2)):
        code, out, err = said(capsys, "generate", tiny_checkpoint, "hi", "--json", "--max-new-tokens", 4, *options)
        assert code == 0 and json.loads(out)["policy"] == "confidence" and err == ""


def test_chat_says_it_once_and_iterates_when_told(capsys, monkeypatch, tiny_base):
    lines = iter(["hi", "/threshold 0.2", "/policy always", "/reset", "hi"])

    def typed(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    code, out, err = said(capsys, "chat", tiny_base, "--max-new-tokens", 4)
    assert code == 0 and err.count(NOTE) == 1
    assert "0.0% iterated" in out and "100.0% iterated" in out
    assert "no token iterates under the policy never" in " ".join(out.split())


def policies(out: str) -> set[str]:
    return {entry["policy"] for entry in json.loads(out)["results"]}


def test_eval_says_it_and_answers_as_the_base(capsys, tmp_path, changed):
    words = ("--tasks", "gsm8k", "--data", questions(tmp_path / "q.jsonl", "2 + 2", "1 + 3"), "--max-new-tokens", 4)
    base = changed(positions=512)
    code, out, err = said(capsys, "eval", base, *words, "-o", tmp_path / "a", "--json")
    assert code == 0 and policies(out) == {"never"} and err.count(NOTE) == 1
    code, out, err = said(capsys, "eval", base, *words, "-o", tmp_path / "b", "--json", "--policy", "confidence")
    assert code == 0 and policies(out) == {"confidence"} and NOTE not in err
