"""The trace command on a base, on unknown words and on other data than conversations; numbers on the page."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from helpers.commands import said
from tah.session import CONFIDENCE_THRESHOLD

ROOT = Path(__file__).parents[2]
NOTE = "is a base model without a trained second pass"
pytestmark = pytest.mark.usefixtures("plain")


def test_a_trace_of_a_base_looks_at_confidence(capsys, tmp_path, tiny_base):
    (tmp_path / "prose.txt").write_text("It was the best of times, it was the worst of times. " * 3)
    code, out, err = said(capsys, "trace", tiny_base, "prose.txt", "-o", "t.jsonl")
    header = json.loads((tmp_path / "t.jsonl").read_text().splitlines()[0])
    assert code == 0 and header["policy"] == "confidence" and header["threshold"] == CONFIDENCE_THRESHOLD
    assert err.count(NOTE) == 1 and "None" not in out + err
    code, out, err = said(capsys, "trace", tiny_base, "prose.txt", "--policy", "never")
    assert code == 0 and NOTE not in err and "policy never" in out


def test_unknown_words_of_a_trace_are_named(capsys, tmp_path):
    turns = [{"role": "user", "content": "hello e1>e2"}, {"role": "assistant", "content": "e1 e2"}]
    rows = {"text": {"text": "hello e1"}, "messages": {"messages": turns}, "known": {"text": "e1 e2 e3"}}
    for name, row in rows.items():
        (tmp_path / "t.jsonl").write_text(json.dumps(row) + "\n")
        code, _, err = said(capsys, "trace", "follow-tah", "t.jsonl")
        assert code == 0 and ("has no token for 'hello'" in err) == (name != "known"), err


@pytest.mark.parametrize("turns", ["5", "true", '"x"', "null", "{}", "[5]", '[{"content": 5}]'])
def test_a_trace_of_no_conversation_is_one_line(capsys, tmp_path, tiny_checkpoint, turns):
    (tmp_path / "rows.jsonl").write_text(f'{{"messages": {turns}}}\n')
    code, _, err = said(capsys, "trace", tiny_checkpoint, tmp_path / "rows.jsonl", "-o", tmp_path / "trace.jsonl")
    assert code == 2 and "unexpected" not in err and len(err.splitlines()) == 1, err


@pytest.mark.skipif(shutil.which("node") is None, reason="node is missing (apt-get install nodejs)")
def test_the_lens_writes_small_probabilities_as_numbers():
    source = (ROOT / "src" / "tah" / "assets" / "token.js").read_text()
    function = re.search(r"(^function small\(.*?^}$|^const small = .*?;$)", source, re.MULTILINE | re.DOTALL)
    cases = {
        1: "1.0000", 0.12345: "0.1235", 0.0001: "0.0001", 0.00007: "0.00007", 0.00003: "0.00003", 2e-6: "0.000002",
        3e-7: "3e-7", 1.2e-38: "1e-38", 0: "<1e-38",
    }  # fmt: skip
    program = f"{function[0]}; console.log(JSON.stringify({json.dumps(list(cases))}.map((p) => small(p))))"
    done = subprocess.run(["node", "-e", program], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == list(cases.values())
    program = f"{function[0]}; console.log(small(0, '0.0001'), small(0.0002, '0.0001'))"
    done = subprocess.run(["node", "-e", program], capture_output=True, text=True, check=True)
    assert done.stdout == "<0.0001 0.0002\n"
