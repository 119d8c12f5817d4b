"""`tah bench serve` on a tiny model."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

pytest.importorskip("vllm", reason="serving is tested where vLLM is installed: make serve-test")

from helpers.checkpoints import tiny
from tah.benchmarks.bench_serve import VARIANTS, bench_serve, decode, markdown, prefill, stream
from tah.progress import Reporter


@pytest.mark.timeout(900)  # engines start one after another, minutes each on a busy machine
def test_variants_take_turns(tmp_path):
    model = tiny(tmp_path / "model", "llama")
    lines = Console(file=io.StringIO(), width=200)
    tasks = (stream(40, new=12), prefill(4, 100), decode(8, 20))
    result = bench_serve(str(model), tasks=tasks, repeats=2, progress=Reporter(lines))
    assert [(row["task"], row["variant"]) for row in result["rows"]] == [(t.name, v) for t in tasks for v in VARIANTS]
    shares = {(row["task"], row["variant"]): row["iterated"] for row in result["rows"]}
    for task in tasks:
        assert shares[task.name, "base"] == shares[task.name, "never"] == 0
        assert 0.03 < shares[task.name, "two_pass"] < 0.12
    assert shares[tasks[1].name, "two_pass"] == shares[tasks[1].name, "mixed"]  # the same prompts, the same draws
    assert all(row["ratio"] == 1 for row in result["rows"] if row["variant"] == "base")
    assert shares[tasks[1].name, "generate"] == pytest.approx(shares[tasks[1].name, "mixed"])
    assert len(lines.file.getvalue().splitlines()) == 15 and len(markdown(result).splitlines()) == 2 + 15 + 2
    assert result["memory"]["base"] == 1 < result["memory"]["tah"] < 1.101 and len(result["memory"]) == 2


def test_variants_need_the_base():
    for wrong in (("mixed",), ("base", "both")):
        with pytest.raises(ValueError, match="give base and others of base, never, two_pass, mixed, generate"):
            bench_serve("anything", variants=wrong)
