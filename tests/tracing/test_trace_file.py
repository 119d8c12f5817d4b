"""Traces on disk: continued, damaged, and read as they were written."""

import json

import numpy as np
import pytest
import torch

from helpers.traces import model_of, rows, trace
from tah import TaHForCausalLM
from tah.progress import Reporter
from tah.tracing.overthinking import statistics
from tah.tracing.trace_file import TracedText, as_line, load_trace, parse_line


class Killed(Exception):
    pass


class Killer(Reporter):
    """Kills a trace after three texts."""

    def work(self, *given):
        work = super().work(*given)
        advance = work.advance

        def counted(units, tokens):
            advance(units, tokens)
            if work.done >= 3:
                raise Killed

        work.advance = counted
        return work


@pytest.mark.parametrize("attention", ["own", "duo"])
def test_resumed_equals_uninterrupted(words, tmp_path, attention):
    """Killed between batches, within a line, and within the lines of a batch: the same bytes in the end."""
    model = model_of(attention)
    once, again = tmp_path / "once.jsonl", tmp_path / "again.jsonl"
    whole = trace(model, words, rows(), once, tokens_per_batch=24)
    with pytest.raises(Killed):
        trace(model, words, rows(), again, tokens_per_batch=24, progress=Killer())
    content = once.read_bytes()
    assert content.startswith(again.read_bytes()) and len(again.read_bytes()) < len(content)
    assert load_trace(again).missing > 0
    lines = content.splitlines(keepends=True)
    for kept in (again.read_bytes(), b"".join(lines[:2]), b"".join(lines[:3]) + lines[3][:40], content[:-1], content):
        again.write_bytes(kept)
        trace(model, words, rows(), again, tokens_per_batch=24)
        assert again.read_bytes() == content
    again.write_bytes(b"".join(lines[:-1]) + b'{"row":\n')  # a disk that was full
    trace(model, words, rows(), again, tokens_per_batch=24)
    assert again.read_bytes() == content and len(list(tmp_path.iterdir())) == 2
    assert whole.missing == 0 and json.dumps(statistics(whole)) == json.dumps(statistics(load_trace(again)))


def test_loaded_equals_traced(words, tmp_path):
    for attention in ("own", "duo"):
        path = tmp_path / f"{attention}.jsonl"
        traced = trace(model_of(attention), words, rows(), path)
        loaded = load_trace(path)
        assert loaded.header == traced.header and loaded.strings == traced.strings
        assert loaded.string(loaded.texts[0].ids[0]).startswith("w") and loaded.string(96_000) == "<96000>"
        for one, other in zip(traced.texts, loaded.texts, strict=True):
            for name, value in vars(one).items():
                assert np.array_equal(value, getattr(other, name)), name


def test_damaged_files_are_named(words, tmp_path, monkeypatch):
    path = tmp_path / "trace.jsonl"
    model = model_of("own")
    trace(model, words, rows(), path)
    lines = path.read_text().splitlines(keepends=True)

    def refuses(content, message, load=True):
        path.write_text(content)
        with pytest.raises(ValueError, match=message):
            load_trace(path) if load else trace(model, words, rows(), path)
        assert path.read_text() == content

    for broken in (lines[2][:50] + "\n", "12\n", lines[2].replace('"depth":[', '"depth":[1,')):
        refuses("".join([*lines[:2], broken, *lines[3:]]), "trace.jsonl: line 3 is damaged")
        refuses("".join([*lines[:2], broken, *lines[3:]]), "trace.jsonl: line 3 is damaged", load=False)
    refuses("hello\n", "trace.jsonl is not a trace")
    refuses("hello\n", "trace.jsonl is not a trace", load=False)
    refuses(lines[0].replace('"tah_trace":1', '"tah_trace":9') + lines[1], "of format 9; this version reads 1")
    other = lines[0].replace('"threshold":0.5', '"threshold":0.7')
    refuses(other + lines[1], r"other settings: threshold=0.7 \(now 0.5\)", load=False)
    sure = lines[0].replace('"policy":"decider"', '"policy":"confidence"').replace('"confidence_measure":null,', "")
    refuses(sure + lines[1], "has no confidence_measure of its policy")
    with pytest.raises(ValueError, match="is a directory: give a file name"):
        trace(model, words, rows(), tmp_path)
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        load_trace(tmp_path / "none")

    path.unlink()
    monkeypatch.setattr("os.replace", lambda *names: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError):
        trace(model, words, rows(), path)
    assert list(tmp_path.iterdir()) == []


def test_another_model_or_text_is_not_continued(words, tmp_path):
    path = tmp_path / "trace.jsonl"
    trace(model_of("own"), words, rows(), path)
    before = path.read_bytes()
    model = model_of("own")
    with torch.no_grad():
        model.decider.output.bias += 1
    with pytest.raises(ValueError, match="other settings: weights"):
        trace(model, words, rows(), path)
    with pytest.raises(ValueError, match="other settings: .*contents"):
        trace(model_of("own"), words, rows((7, 12, 5)), path)
    assert path.read_bytes() == before


def test_pieces_of_text_with_characters_of_several_tokens(tiny_base, tmp_path):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_base)
    model = TaHForCausalLM.from_base(str(tiny_base), policy="confidence", threshold=0.9)
    written = "na\u00efve \U0001f600 <script>"
    path = tmp_path / "trace.jsonl"
    trace(model, tokenizer, [{"text": written}], path)
    (text,) = load_trace(path).texts
    assert "".join(text.pieces) == written + "<|im_end|>" and text.pieces.count("") == 1 + 3
    assert text.pieces[3] == "\u00ef" and text.pieces[2] == ""
    strings = load_trace(path).strings
    assert strings[int(text.ids[0])] == "n" and "\ufffd" not in "".join(strings.values())
    assert set(text.top_ids.ravel().tolist()) <= strings.keys()


def test_size_and_speed_of_lines():
    """20,000 tokens of a vocabulary of 150,000, two passes, five alternatives: under 5 MB."""
    generator = np.random.default_rng(0)
    n = 500
    sharp = generator.dirichlet(np.full(200, 0.02), (2, n)).astype(np.float32)
    sharp = -np.sort(-sharp, axis=-1)
    text = TracedText(
        row=123,
        part=0,
        ids=generator.integers(0, 150_000, n + 1),
        pieces=[" word"] * (n + 1),
        supervised=np.ones(n, bool),
        rank=generator.geometric(0.3, (2, n)) - 1,
        prob=sharp[:, :, 0],
        entropy=generator.random((2, n)),
        max_prob=sharp[:, :, 0],
        top_ids=generator.integers(0, 150_000, (2, n, 5)),
        top_probs=sharp[:, :, :5],
        decider=generator.random((1, n)).astype(np.float32),
        depth=1 + (generator.random(n) < 0.1),
        final_rank=np.zeros(n, int),
        final_prob=sharp[1, :, 0],
        final_top=generator.integers(0, 150_000, n),
    )
    line = as_line(text, {at: " word" for at in range(n)}, exact=False)
    assert len(line.encode()) / n * 20_000 < 5e6
    back, _ = parse_line(line, {"max_depth": 2, "top_k": 5})
    assert (back.decider == text.decider).all() and (back.depth == text.depth).all()
    again = as_line(back, {at: " word" for at in range(n)}, exact=False)
    assert again == line
