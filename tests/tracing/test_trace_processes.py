"""`tah trace` in several processes: the file of one, byte for byte, also after a kill. Real processes on CPUs."""

from __future__ import annotations

import json
import sys

import pytest
import torch

from helpers.checkpoints import save, shake, tiny_base
from helpers.processes import lines_of_tah, run, torchrun
from tah import TaHForCausalLM
from tah.device import Machine
from tah.tracing.trace_file import VERSION, Parts, load_trace, part_of

LENGTHS = (9, 40, 23, 150, 31, 64, 12, 77, 55, 18)


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    """A trace of ten texts in four batches, with a second forward that follows the policy."""
    directory = tmp_path_factory.mktemp("model")
    model = TaHForCausalLM.from_base(tiny_base("llama"), lora_rank=4, decider={"kind": "lean", "width": 32})
    save(shake(model, torch.randint(3, 200, (4, 32))), directory / "tah")
    text = "So the bell rings, but nobody hears it: 29 pencils, 7 boxes. " * 3
    lines = [json.dumps({"text": text[number : number + length]}) for number, length in enumerate(LENGTHS)]
    (directory / "texts.jsonl").write_text("\n".join(lines))
    return ["trace", str(directory / "tah"), str(directory / "texts.jsonl")]


@pytest.fixture(scope="module")
def alone(words, tmp_path_factory):
    """The file and the output of one process, which also traces batches of `helpers.processes.TOKENS` tokens."""
    path = tmp_path_factory.mktemp("alone") / "trace.jsonl"
    done = run([sys.executable, "-m", "helpers.processes", "none", "0", "0", *words, "-o", str(path)])
    assert done.returncode == 0, done.stderr[-2000:]
    return path, done.stdout


def test_two_processes_equal_one(words, alone, tmp_path):
    path = tmp_path / "trace.jsonl"
    done = torchrun("-m", "helpers.processes", "none", 0, 0, *words, "-o", path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert path.read_bytes() == alone[0].read_bytes() and done.stdout == alone[1] != ""
    assert [line for line in done.stderr.splitlines() if line.startswith("tracing")] == [
        line for line in done.stderr.splitlines() if line.startswith("tracing: 10 of 10 texts, ")
    ]
    assert list(tmp_path.iterdir()) == [path] and lines_of_tah(done) == []


@pytest.mark.slow
def test_killed_and_continued_in_other_numbers(words, alone, tmp_path):
    path, part = tmp_path / "trace.jsonl", tmp_path / "trace.jsonl.part1"
    done = torchrun("-m", "helpers.processes", "kill", 1, 1, *words, "-o", path)
    assert done.returncode != 0 and done.stdout == ""
    order = [json.loads(line)["row"] for line in alone[0].open() if '"row"' in line]
    assert part == part_of(path, 1) and {text.row for text in load_trace(part).texts} == set(order[1:3])  # one batch
    assert len(load_trace(path).texts) < len(order)
    (header, *_), content = path.read_bytes().splitlines(keepends=True), part.read_bytes()
    cut = b'{"row": 3,'  # the beginning of a line
    part.write_bytes(content + cut)
    done = torchrun("-m", "helpers.processes", "none", 0, 0, *words, "-o", path, processes=3)
    assert done.returncode == 0, done.stderr[-2000:]
    assert path.read_bytes() == alone[0].read_bytes() and list(tmp_path.iterdir()) == [path]

    mark = b'"pieces":["', b'"pieces":["~'  # a text of the part is not traced again
    path.write_bytes(header)
    part.write_bytes(content.replace(*mark) + cut)
    done = run([sys.executable, "-m", "helpers.processes", "none", "0", "0", *words, "-o", str(path)])
    assert done.returncode == 0, done.stderr[-2000:]
    lines = alone[0].read_bytes().splitlines(keepends=True)
    lines[2:4] = [line.replace(*mark) for line in lines[2:4]]
    assert path.read_bytes() == b"".join(lines) and list(tmp_path.iterdir()) == [path]
    part.write_bytes(content.replace(b'"dtype":"float32"', b'"dtype":"bfloat16"', 1))
    with pytest.raises(ValueError, match=r"trace.jsonl.part1 is a trace with other settings: dtype=.*bfloat16"):
        Parts(path, load_trace(path).header)


def test_a_copy_of_the_trace_is_not_a_part(tmp_path):
    path, header = tmp_path / "trace.jsonl", {"tah_trace": VERSION}
    names = ("trace.jsonl.1", "trace.jsonl.part1.old", "trace.jsonl.partial", "trace.jsonl.part1")
    for name in names:
        (tmp_path / name).write_text(json.dumps(header) + "\n")
    parts = Parts(path, header)
    assert parts.files() == [part_of(path, 1)]
    parts.remove()
    assert {each.name for each in tmp_path.iterdir()} == set(names[:3])


@pytest.mark.parametrize(
    ("how", "arguments", "line"),
    [
        ("raise", ["-o", "trace.jsonl"], "tah: process 1: the disk is full"),
        ("none", [], "2 processes join their texts in a file: give -o FILE (output)"),
    ],
)
def test_a_failure_is_one_line(words, tmp_path, monkeypatch, how, arguments, line):
    monkeypatch.chdir(tmp_path)
    done = torchrun("-m", "helpers.processes", how, 1, 1, *words, *arguments)
    assert done.returncode != 0 and done.stdout == ""
    (found,) = lines_of_tah(done)
    assert found.endswith(line)


def test_each_process_has_a_gpu_of_its_own():
    machine = Machine(cuda=True, gpus=2, process=1)
    assert [str(machine.check_device(name)) for name in ("auto", "cuda", "cuda:0", "cpu")] == [
        "cuda:1",
        "cuda:1",
        "cuda:0",
        "cpu",
    ]
    assert str(Machine(cuda=True, gpus=2).check_device("auto")) == "cuda"
    with pytest.raises(ValueError, match="process 2 of this machine has no GPU of its own, because there are 2"):
        Machine(cuda=True, gpus=2, process=2).check_device("auto")
