"""The first commands for a machine with a GPU: every section runs at a tiny size, and results survive a failure."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmark"


@pytest.fixture
def first(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import gpu_first

    return gpu_first


def test_generate(first):
    rows = list(first.SECTIONS["generate 0.6B"].run(True))
    assert [(row["batch"], row["policy"]) for row in rows] == [
        (batch, policy) for batch in (1, 2) for policy in ("base", "never", "7 %", "always")
    ]
    assert [row["cost relative to base"] for row in rows if row["policy"] == "base"] == [1, 1]
    assert all(row["ok"] for row in rows if row["policy"] == "never")  # the tokens of the base
    shares = {row["policy"]: row["iterated"] for row in rows}
    assert (shares["base"], shares["never"], shares["always"]) == (0, 0, 1) and 0.05 < shares["7 %"] < 0.09


def test_train(first):
    rows = list(first.SECTIONS["train"].run(True))
    variants = ("plain", "standard", "stage 1")
    assert [(row["checkpointing"], row["variant"]) for row in rows] == [
        (on, v) for on in ("off", "on") for v in variants
    ]
    assert all(row["tokens/s"] > 0 for row in rows)


def test_both_sizes_have_the_shapes_of_qwen3(first):
    """Their parameters, without memory for them: 0.6B and 1.7B are what Qwen3's cards say."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from gpu_train import QWEN3, SMALLER

    with torch.device("meta"):
        sizes = [Qwen3ForCausalLM(Qwen3Config(**QWEN3 | more)).num_parameters() for more in (SMALLER, {})]
    assert sizes == [596_049_920, 1_720_574_976]


SECTIONS = """
import os, sys, time
sys.path.insert(0, {folder!r})
from gpu_sections import Section, Skipped, main

def good(small):
    yield {{"number": 1, "part": 0.12345, "ok": True}}
    yield {{"number": 2, "note": "more"}}

def wrong(small):
    yield {{"number": 3, "ok": False}}

def left_out(small):
    raise Skipped("there is no such thing")
    yield

def broken(small):
    yield {{"number": 4}}
    raise RuntimeError("no memory\\nmore lines")

def killed(small):
    yield {{"number": 5}}
    os.abort()

def slow(small):
    yield {{"number": 6}}
    time.sleep(60)

sections = {{f.__name__: Section(f, 0.4 if f is slow else 60) for f in (good, left_out, wrong, broken, killed, slow)}}
sys.exit(main("gpu_fake", "About.", sections, __file__, minutes=6))
"""


def run(tmp_path, *options):
    script = tmp_path / "fake.py"
    script.write_text(SECTIONS.format(folder=str(FOLDER)))
    command = [sys.executable, str(script), "--output", str(tmp_path / "out"), *options]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)


@pytest.mark.slow
def test_a_failure_costs_one_section(tmp_path):
    done = run(tmp_path, "--small", "--only", "good", "left_out", "broken", "killed")
    assert done.returncode == 1
    result = json.loads((tmp_path / "out" / "gpu_fake.json").read_text())
    assert result["machine"]["torch"] == torch.__version__ and result["machine"]["gpu"] is None
    sections = result["sections"]
    assert list(sections) == ["good", "left_out", "broken", "killed"]
    assert [row["number"] for section in sections.values() for row in section["rows"]] == [1, 2, 4, 5]
    assert sections["good"]["error"] is None and sections["left_out"]["skipped"] == "there is no such thing"
    assert sections["broken"]["error"] == "RuntimeError: no memory"
    assert sections["killed"]["error"] == "the process ended with -6"
    text = (tmp_path / "out" / "gpu_fake.md").read_text()
    assert text == done.stdout
    assert (
        "| number | part | ok | note |\n| --- | --- | --- | --- |\n| 1 | 0.123 | yes |  |\n| 2 |  |  | more |" in text
    )
    assert "Skipped: there is no such thing." in text and "**Failed**: RuntimeError: no memory." in text


@pytest.mark.slow
def test_a_wrong_result_is_an_exit_code(tmp_path):
    assert run(tmp_path, "--small", "--only", "good").returncode == 0
    assert run(tmp_path, "--small", "--only", "wrong").returncode == 1


@pytest.mark.slow
def test_time_is_limited(tmp_path):
    """Of a section, whose process is stopped, and of all."""
    done = run(tmp_path, "--small", "--only", "slow")
    section = json.loads((tmp_path / "out" / "gpu_fake.json").read_text())["sections"]["slow"]
    assert done.returncode == 1 and section["error"] == "stopped after 4 s" and section["seconds"] < 50
    done = run(tmp_path, "--small", "--only", "slow", "--minutes", "0")
    section = json.loads((tmp_path / "out" / "gpu_fake.json").read_text())["sections"]["slow"]
    assert done.returncode == 0 and section["skipped"] == "no time was left"


@pytest.mark.parametrize("name", ["gpu_first", pytest.param("gpu_serve", marks=pytest.mark.slow)])
def test_without_a_gpu_it_says_so(name):
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, str(FOLDER / f"{name}.py")], capture_output=True, text=True, env=env)
    want = f"{name}: this machine has no CUDA GPU; --small runs every section at a tiny size on a CPU"
    assert (done.returncode, done.stdout, done.stderr.splitlines()[-1]) == (2, "", want)
