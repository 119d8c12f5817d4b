"""`tah eval` in several processes: the results of one, also after a kill, and one line about a failure.

The processes are real: torchrun starts them, on CPUs.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from helpers.checkpoints import tiny
from helpers.commands import said
from helpers.evaluations import ITEMS, lines_of
from helpers.processes import lines_of_tah, run, torchrun
from tah.evaluation.eval_files import Samples, join_parts, part_of
from tah.evaluation.eval_report import as_markdown
from tah.evaluation.harness import TaHLM
from tah.evaluation.request import Request
from tah.processes import Processes
from tah_cli.options import is_first

TIMES = ("seconds", "started")


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> list[str]:
    """An evaluation of two tasks with two policies: 10 answers in 5 batches, and 6 in 3."""
    model = tiny(tmp_path_factory.mktemp("model") / "tah")
    given = ["eval", str(model), "--tasks", "gsm8k,arc_e", "--policy", "never,decider", "--samples", "2"]
    given += ["--data", f"gsm8k={ITEMS / 'math.jsonl'}", "--data", f"arc_e={ITEMS / 'choice.jsonl'}"]
    return [*given, "--max-new-tokens", "24", "--temperature", "0.7", "--batch-size", "2"]


@pytest.fixture(scope="module")
def alone(words, tmp_path_factory) -> Path:
    """The directory of the evaluation in one process."""
    directory = tmp_path_factory.mktemp("alone") / "run"
    done = run([sys.executable, "-m", "tah", *words, "-o", str(directory)])
    assert done.returncode == 0, done.stderr[-2000:]
    return directory


def without_times(value):
    """A JSON value without its entries of time."""
    if isinstance(value, dict):
        return {key: without_times(entry) for key, entry in value.items() if key not in TIMES}
    return [without_times(entry) for entry in value] if isinstance(value, list) else value


def check_equal(directory: Path, other: Path) -> None:
    """The same files with the same contents, in the same order; only the times differ."""
    names = {path.relative_to(other): path for path in other.rglob("*") if path.is_file()}
    assert {path.relative_to(directory) for path in directory.rglob("*") if path.is_file()} == names.keys()
    for name, path in names.items():
        if name.parts[0] == "questions":
            assert (directory / name).read_bytes() == path.read_bytes()
    assert lines_of(directory) == lines_of(other)
    for name in ("run.json", "results.json"):
        one, two = (json.loads((run / name).read_text()) for run in (directory, other))
        assert without_times(one) == without_times(two)


def test_two_processes_equal_one(words, alone, tmp_path):
    """With the console script, and with one table and one set of progress lines for both processes."""
    done = torchrun("--no-python", Path(sys.executable).with_name("tah"), *words, "-o", tmp_path / "run")
    assert done.returncode == 0, done.stderr[-2000:]
    check_equal(tmp_path / "run", alone)
    assert done.stdout == as_markdown(json.loads((tmp_path / "run" / "results.json").read_text()))
    shown = [line for line in done.stderr.splitlines() if line.startswith(("gsm8k", "arc_e"))]
    parts = [("gsm8k", 10), ("arc_e", 6)]
    assert shown == [f"{task}, {p}: {of} of {of} answers" for p in ("never", "decider") for task, of in parts]
    assert lines_of_tah(done) == []


@pytest.mark.slow
def test_killed_and_continued_in_other_numbers(words, alone, tmp_path):
    """Two processes, of which one is killed; continued in three, and in one: the files of an uninterrupted process."""
    directory = tmp_path / "run"
    done = torchrun("-m", "helpers.processes", "kill", 1, 1, *words, "-o", directory)
    assert done.returncode != 0 and done.stdout == ""
    path = Samples(directory, "never", "gsm8k").path
    keys = {
        part: [(line["number"], line["sample"]) for line in map(json.loads, part.open())]
        for part in path.parent.glob("gsm8k*")
    }
    assert keys[path.with_name("gsm8k.jsonl.part1")] == [(1, 0), (1, 1)]  # its first batch, the second of all
    assert set(keys.get(path, [])) <= {(number, sample) for number in (0, 2, 4) for sample in (0, 1)}
    shutil.copytree(directory, tmp_path / "again")
    done = torchrun("-m", "tah", *words, "-o", directory, processes=3)
    assert done.returncode == 0, done.stderr[-2000:]
    check_equal(directory, alone)
    line = lines_of(alone)["samples/never/gsm8k.jsonl"][2]
    assert (line["number"], line["sample"]) == (1, 0)

    path = tmp_path / "again" / path.relative_to(directory)
    with open(path, "ab") as file:
        file.write(b'{"policy":')
    part = path.with_name("gsm8k.jsonl.part1")
    kept = [json.loads(line) | {"seconds": 99} for line in part.open()]
    part.write_text("".join(json.dumps(line) + "\n" for line in kept))
    done = run([sys.executable, "-m", "tah", *words, "-o", str(tmp_path / "again")])
    assert done.returncode == 0, done.stderr[-2000:]
    check_equal(tmp_path / "again", alone)
    finished = [json.loads(line) for line in path.open()]
    assert [(line["number"], line["sample"]) for line in finished if line["seconds"] == 99] == [(1, 0), (1, 1)]
    (note,) = lines_of_tah(done)
    assert note == f"tah: {path}: the last line is incomplete, so its question is answered again"


def test_a_copy_of_the_answers_is_not_a_part(alone, tmp_path):
    path = Samples(tmp_path, "never", "gsm8k").path
    shutil.copytree(alone / "samples", tmp_path / "samples")
    copies = [path.with_name(f"{path.name}{suffix}") for suffix in (".1", ".part1.old", ".partial")]
    for copy in (*copies, part_of(path, 1)):
        shutil.copy(path, copy)
    assert join_parts(tmp_path) == []
    assert [copy.exists() for copy in (*copies, part_of(path, 1))] == [True, True, True, False]


@pytest.mark.slow
def test_a_process_that_fails_stops_the_others(words, tmp_path):
    """One line, with the number of the process; the first process is in the middle of its own share, or waits."""
    done = torchrun("-m", "helpers.processes", "raise", 1, 1, *words, "-o", tmp_path / "run")
    assert done.returncode != 0 and done.stdout == ""
    assert lines_of_tah(done) == ["tah: process 1: the disk is full"]


@pytest.mark.slow
def test_an_error_of_all_processes_is_one_line(words, tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    done = torchrun("-m", "tah", *words, "-o", tmp_path)
    assert done.returncode != 0
    assert lines_of_tah(done) == [f"tah: {tmp_path} is not empty and has no evaluation; choose another directory"]
    done = torchrun("-m", "tah", *words, "--greedy", "-o", tmp_path / "run")
    (line,) = lines_of_tah(done)
    assert "--greedy does not sample, so --temperature 0.7 has no effect" in line


@pytest.fixture
def second(monkeypatch):
    """The environment of the second of two processes, without the others."""
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "1"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MASTER_ADDR", raising=False)


def test_what_runs_in_one_process_only_is_refused(second, pupil, tmp_path, capsys):
    with pytest.raises(ValueError, match="^--backend vllm runs in one process, not in 2; start tah eval without"):
        Request(str(pupil), ["gsm8k"], tmp_path, backend="vllm")
    with pytest.raises(ValueError, match=r"^the model tah of lm-eval runs in one process, not in 2; several processes"):
        TaHLM(str(pupil))
    for command in ("bench", "tune", "generate", "eval regrade"):
        code, out, err = said(capsys, *command.split(), "a")
        assert (code, out) == (2, "") and err.count("\n") == 1
        assert err.startswith(f"tah: process 1: tah {command} runs in one process; start it without torchrun and "), err


def test_processes_without_a_launcher_are_refused(second, words, tmp_path, capsys):
    code, out, err = said(capsys, *words, "-o", tmp_path / "run")
    assert (code, out) == (2, "") and not (tmp_path / "run").exists()
    assert (
        err.startswith("tah: process 1: the 2 processes of WORLD_SIZE cannot reach each other (") and "torchrun" in err
    )


def test_a_number_without_other_processes_is_one_process(monkeypatch):
    """RANK is the number of a machine in the examples of serving."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert is_first() and Processes.started().lead
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not is_first()
