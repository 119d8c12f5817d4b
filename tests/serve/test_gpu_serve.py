"""The first command for a machine with a GPU and vLLM, at a tiny size on a CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="serving is tested where vLLM is installed: make serve-test")

SCRIPT = Path(__file__).parents[2] / "benchmark" / "gpu_serve.py"


@pytest.mark.slow  # nine engines start one after another
@pytest.mark.timeout(3000)
def test_every_section(tmp_path):
    command = [sys.executable, str(SCRIPT), "--small", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    sections = json.loads((tmp_path / "gpu_serve.json").read_text())["sections"]
    assert list(sections) == ["answers", "layouts", "waits", "speed"]
    (layout,) = sections["layouts"]["rows"]
    assert [row["batching"] for row in sections["answers"]["rows"]] == ["two_pass", "mixed"]
    for row in sections["answers"]["rows"]:
        assert row["equal"] == row["answers"] == 6 and 0.1 < row["iterated"] < 0.9
    assert layout["backend"] == layout["compared with"] == "CPU_ATTN" and layout["equal"] == 4
    waits = sections["waits"]["rows"]
    kinds = [(policy, kind) for policy in ("confidence", "decider") for kind in ("prefill", "decode")]
    assert [(row["policy"], row["kind"]) for row in waits] == kinds
    assert all(row["copies to the host"] == 1 and row["with hard tokens"] > 0 for row in waits)  # it is intercepted
    rows = [(row["variant"], row["requests"]) for row in sections["speed"]["rows"]]
    assert rows == [(name, count) for name in ("base", "never", "two_pass", "mixed") for count in (1, 3)]
    assert all(row["tokens/s"] > 0 for row in sections["speed"]["rows"])
