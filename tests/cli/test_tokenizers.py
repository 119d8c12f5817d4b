"""Tokenizers that have tokens without an embedding, and words without a token."""

from __future__ import annotations

import io
import json
import re

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from helpers.commands import one_line, questions, said
from tah.session import Session

pytestmark = pytest.mark.usefixtures("plain")


# -- a tokenizer longer than the embedding ---------------------------------------------------------------------------

NEW = ("<new>", "<tool>", "\u00e9t\u00e9", " dimension")


@pytest.mark.parametrize(
    "prompt", ["<new>", "a <new> b", "<tool><new>", "un \u00e9t\u00e9", "the dimension", "x" * 9 + "<tool>"]
)
def test_generate_with_a_tokenizer_longer_than_the_embedding(capsys, changed, prompt):
    model = changed(more=NEW)
    for words in (("--policy", "never"), ("--policy", "never", "--raw"), ("--policy", "always")):
        line = one_line(capsys, "generate", model, prompt, *words)
        assert re.search(r"the prompt has the token 2(59|6\d), but the model has only 259 tokens: ", line)
        assert str(model) in line


@pytest.mark.parametrize("prompt", ["new", "<ne", "tool", "hi", "dimensio"])
def test_what_such_a_tokenizer_writes_with_tokens_that_have_one(capsys, changed, prompt):
    code, _, err = said(capsys, "generate", changed(more=NEW), prompt, "--max-new-tokens", 2, "--policy", "never")
    assert code == 0 and "token 2" not in err


def test_a_chat_goes_on_after_such_a_token(capsys, monkeypatch, changed):
    monkeypatch.setattr("sys.stdin", io.StringIO("<new>\nhi\n"))
    code, out, _ = said(capsys, "chat", changed(more=NEW), "--max-new-tokens", 2, "--policy", "never")
    assert code == 0 and "has the token 259, but the model has only 259 tokens" in out and out.count("tokens/s") == 1


def test_eval_with_a_tokenizer_longer_than_the_embedding(capsys, tmp_path, changed):
    model = changed(more=NEW, positions=512)
    words = ("--tasks", "gsm8k", "-o", "out", "--max-new-tokens", 3, "--policy", "never")
    code, out, err = said(capsys, "eval", model, *words, "--data", questions(tmp_path / "q.jsonl", "2", "a <new> b"))
    last = err.splitlines()[-1]
    assert (code, out) == (2, "") and "a question has the token 259, but the model has only 259 tokens" in last
    data = questions(tmp_path / "r.jsonl", "2 + 2", "3 + 3")
    code, _, err = said(capsys, "eval", model, *words[:2], "-o", "other", *words[4:], "--data", data)
    assert code == 0, err


def test_padding_may_have_no_embedding(capsys, tmp_path, changed):
    """Many a tokenizer was given a padding token that the model never sees."""
    texts = ("2 + 2", "a much longer question than the first", "3")
    kept = {}
    for name, model in (
        ("without", changed(positions=512)),
        ("with", changed(more=("<pad>",), pad=True, positions=512)),
    ):
        words = ("--tasks", "gsm8k", "--greedy", "--max-new-tokens", 6, "--policy", "never,always", "--batch-size", 3)
        code, _, err = said(capsys, "eval", model, *words, "-o", name, "--data", questions(tmp_path / "q", *texts))
        assert code == 0, err
        kept[name] = [
            json.loads(line)["text"]
            for policy in ("never", "always")
            for line in (tmp_path / name / "samples" / policy / "gsm8k.jsonl").read_text().splitlines()
        ]
    assert kept["with"] == kept["without"] and any(kept["with"])


def test_trace_and_prune_with_a_tokenizer_longer_than_the_embedding(capsys, tmp_path, changed):
    model = changed(more=NEW)
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": "a <new> b"}) + "\n")
    assert "t.jsonl has the token 259, but the model has only 259 tokens" in one_line(
        capsys, "trace", model, "t.jsonl", "--policy", "never"
    )
    line = one_line(capsys, "prune", model, "--data", "t.jsonl", "--output", "less", "--texts", 1)
    assert "t.jsonl has the token 259, but the model has only 259 tokens" in line and not (tmp_path / "less").exists()


# -- words without a token ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompt", "unknown"),
    [
        ("e3>e5 e5>e5 e3", []),
        ("e0", []),
        ("e1>e2 hello e1", ["hello"]),
        ("hello world", ["hello", "world"]),
        ("hello hello", ["hello"]),
        ("e16>e1 e1", ["e16>e1"]),
        ("E1", ["E1"]),
        ("e1 \x1b[2J", ["[2J"]),
        ("a b c d e f g", ["'a', 'b', 'c', 'd', 'e' and 2 more"]),
        ("x" * 100 + " e1", ["x" * 21 + "..."]),
        ("<|pad|> e1", []),  # the very token that stands for the unknown
        ("e1\ne2\te3", []),
    ],
)
def test_unknown_words_are_named(capsys, prompt, unknown):
    code, _, err = said(capsys, "generate", "follow-tah", prompt, "--max-new-tokens", 2)
    lines = [line for line in err.splitlines() if line.startswith("tah: ")]
    assert code == 0 and len(lines) == bool(unknown) and "\x1b" not in err
    if unknown:
        assert "the tokenizer of follow-tah has no token for" in lines[0] and all(word in lines[0] for word in unknown)


def small_tokenizer(kind) -> PreTrainedTokenizerFast:
    inner = Tokenizer(kind)
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>")


@pytest.mark.parametrize(
    ("kind", "unknown"),
    [
        (models.BPE({"</s>": 0, "a": 1, "b": 2}, []), "'c'"),  # drops what it has no token for
        (models.BPE({"</s>": 0, "a": 1, "b": 2, "?": 3}, [], unk_token="?"), "'c'"),
        (models.WordPiece({"</s>": 0, "a": 1, "b": 2, "[UNK]": 3}, unk_token="[UNK]"), "'c'"),
        (models.WordLevel({"</s>": 0, "a": 1, "b": 2, "c": 3}, "</s>"), None),
    ],
)
def test_unknown_words_of_other_tokenizers(tiny_base, kind, unknown):
    session = Session.open(str(tiny_base), device="cpu")
    assert session.unknown_words("\u6f22 \U0001f600 anything") is None  # bytes know everything
    session.tokenizer = small_tokenizer(kind)
    told = session.unknown_words("a b c")
    assert told is None if unknown is None else told is not None and told.endswith(f"has no token for {unknown}")


def test_unknown_words_are_named_in_a_chat(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("hello e1\ne1\n"))
    code, out, _ = said(capsys, "chat", "follow-tah", "--max-new-tokens", 2)
    assert code == 0 and out.count("has no token for 'hello'") == 1 and out.count("has no token") == 1
