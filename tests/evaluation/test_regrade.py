"""Answers that say why they were graded as they were, and that can be graded again without a model."""

from __future__ import annotations

import json
import shutil
from importlib.metadata import version

import pytest

from helpers.evaluations import ITEMS, go, lines_of
from tah.evaluation import grade as grading
from tah.evaluation.eval_report import as_markdown, compare, summarize
from tah.evaluation.evaluate import evaluate
from tah.evaluation.grade import GRADER, grade, grader
from tah.evaluation.regrade import as_text, regrade
from tah.evaluation.request import Sampling
from tah_cli.app import run

boxed = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is missing (apt-get install bubblewrap)")


@pytest.fixture(scope="module")
def done(pupil, tmp_path_factory):
    directory = tmp_path_factory.mktemp("regrade") / "done"
    go(pupil, directory)
    return directory


@pytest.fixture
def copy(done, tmp_path):
    shutil.copytree(done, tmp_path / "run")
    return tmp_path / "run"


def edit(directory, change):
    """Change the lines of every file of answers in place."""
    for path in (directory / "samples").rglob("*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            change(line)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def older(directory):
    """As the first version of the grader left it: without the fields that say why, and without the questions."""

    def strip(line):
        for name in ("gold", "extracted", "reason", "grader"):
            line.pop(name, None)

    edit(directory, strip)
    shutil.rmtree(directory / "questions", ignore_errors=True)


def test_a_line_says_why(done):
    golds = [json.loads(line)["answer"] for line in (ITEMS / "math.jsonl").read_text().splitlines()]
    for name, lines in lines_of(done).items():
        for line in lines:
            assert {"question", "gold", "extracted", "verdict", "reason", "grader", "text"} <= line.keys()
            assert line["grader"] == grader() == f"{GRADER} (math-verify {version('math-verify')})"
            assert (line["extracted"] is None) == (line["verdict"] == "unparsed")
            if "gsm8k" in name:
                assert line["gold"] == str(golds[line["number"]]).strip("$")
                assert (line["extracted"] or "") in line["text"]


@pytest.mark.parametrize(
    "kind, row, text, wanted",
    [
        ("math", {"answer": "5"}, "so \\boxed{5}", ("right", "5", "5")),
        ("math", {"answer": "5"}, "so \\boxed{6}", ("wrong", "5", "6")),
        ("math", {"answer": "5"}, "no idea", ("unparsed", "5", None)),
        ("choice", {"answer": "B", "choices": ["x", "y"]}, "The answer is B", ("right", "B", "B")),
        ("choice", {"answer": "B", "choices": ["x", "y"]}, "The answer is A", ("wrong", "B", "A")),
        ("choice", {"answer": "B", "choices": ["x", "y"]}, "perhaps", ("unparsed", "B", None)),
    ],
)
def test_what_a_grade_rests_on(kind, row, text, wanted):
    (found,) = grade(kind, row, [text])
    assert (found.verdict, found.gold, found.extracted) == wanted


@boxed
def test_a_program_says_its_reason(pupil, tmp_path):
    item = json.loads((ITEMS / "mbpp.jsonl").read_text().splitlines()[0])
    row = {"prompt": "", "entry_point": "", "test": "", "test_list": item["test_list"], "test_imports": []}
    row["code"] = item["code"]
    texts = [f"```python\n{item['code']}\n```", "```python\nraise ValueError('hm')\n```", "<think>"]
    right, wrong, unparsed = grade("code", row, texts)
    assert right.verdict == "right" and right.extracted == item["code"].strip("\n")
    assert right.gold == "\n".join(item["test_list"])
    assert wrong.verdict == "wrong" and "hm" in (wrong.reason or "")
    assert unparsed.verdict == "unparsed" and unparsed.extracted is None
    data = {"mbpp_plus": ITEMS / "mbpp.jsonl"}
    sampling = Sampling(max_new_tokens=24, temperature=0.0)
    evaluate(
        str(pupil), ["mbpp_plus"], tmp_path, data=data, policies=["never"], sampling=sampling, allow_code_execution=True
    )
    before = lines_of(tmp_path)
    assert all(line["reason"] for line in before["samples/never/mbpp_plus.jsonl"])
    with pytest.raises(ValueError, match="mbpp_plus: grading runs the programs again; give --allow-code-execution"):
        regrade(tmp_path)
    assert regrade(tmp_path, allow_code_execution=True)["changes"][0]["changed"] == {}
    assert lines_of(tmp_path) == before


def test_the_same_grader_gives_the_same_verdicts(copy, done):
    before = {path: path.read_bytes() for path in sorted(copy.rglob("*")) if path.is_file() and path.name != ".lock"}
    found = regrade(copy)
    assert {path: path.read_bytes() for path in before} == {path: text for path, text in before.items()}
    assert [its["changed"] for its in found["changes"]] == [{}] * 4 and found["results"] == summarize(done)


def test_wrong_verdicts_are_put_right(copy, done):
    """Whatever the lines say, the answers and the questions decide."""

    def damage(line):
        line["verdict"], line["gold"], line["extracted"] = "right", "1", "1"

    edit(copy, damage)
    found = regrade(copy)
    assert lines_of(copy) == lines_of(done)
    lines = [line for lines in lines_of(done).values() for line in lines]
    changed = sum(sum(its["changed"].values()) for its in found["changes"])
    assert changed == sum(line["verdict"] != "right" for line in lines) > 0
    assert "right -> wrong" in as_text(found) and "answers: " in as_text(found)


def test_an_old_run_is_brought_up_to_date(copy, done):
    """With the data it was answered on; its own directory has no questions."""
    older(copy)
    other = copy.with_name("other.jsonl")
    other.write_text('{"question": "q", "answer": "1"}\n')
    assert summarize(copy)["grader"] == "1"
    with pytest.raises(ValueError, match=r"versions 1 and 2 \(math-verify .*\) of the grader; run tah eval regrade"):
        compare(str(copy), str(done))
    with pytest.raises(ValueError, match="openai/gsm8k cannot be loaded"):
        regrade(copy)
    with pytest.raises(ValueError, match="does not have the questions of gsm8k that were answered; give --data"):
        regrade(copy, data={"gsm8k": other})
    data = {"gsm8k": ITEMS / "math.jsonl", "arc_e": ITEMS / "choice.jsonl"}
    found = regrade(copy, data=data)
    assert lines_of(copy) == lines_of(done) and found["results"]["grader"] == grader()
    assert compare(str(copy), str(done))["comparisons"][0]["average"]["difference"]["value"] == 0
    assert regrade(copy)["results"] == found["results"]  # the questions are kept now


def test_nothing_is_graded_before_all_questions_are_there(copy):
    """One file fits, the other does not."""
    older(copy)
    before = lines_of(copy)
    other = copy.with_name("other.jsonl")
    other.write_text('{"question": "q", "choices": ["a", "b"], "answer": "A"}\n')
    with pytest.raises(ValueError, match="does not have the questions of arc_e"):
        regrade(copy, data={"gsm8k": ITEMS / "math.jsonl", "arc_e": other})
    assert lines_of(copy) == before


def test_graders_of_different_tasks_are_not_mixed(copy, done):
    """Even where each task by itself has one version on both sides."""
    path = copy / "samples" / "never" / "gsm8k.jsonl"
    lines = [json.loads(line) | {"grader": "1"} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match="were graded by the versions 1 and 2"):
        compare(f"{copy}:never", f"{copy}:never")
    assert compare(f"{done}:never", f"{done}:never")["comparisons"]


def test_questions_hold_any_text(pupil, tmp_path):
    """Line separators of Unicode are part of a question."""
    (tmp_path / "q.jsonl").write_text('{"question": "one\u2028two\u0085three", "answer": "29"}\n', "utf-8")
    data, sampling = {"gsm8k": tmp_path / "q.jsonl"}, Sampling(max_new_tokens=24, temperature=0.0)
    evaluate(str(pupil), ["gsm8k"], tmp_path / "run", data=data, policies=["never"], sampling=sampling)
    assert regrade(tmp_path / "run")["results"] is not None


def test_a_run_without_answers_is_left_as_it_is(copy):
    shutil.rmtree(copy / "samples")
    for name in ("results.json", "results.md"):
        (copy / name).unlink()
    found = regrade(copy)
    assert found["results"] is None and as_text(found).startswith("No answer was graded again.")
    assert (copy / "run.json").is_file() and (copy / "questions").is_dir()


def test_lm_evals_tasks_that_are_not_scored_are_unfinished(copy):
    settings = json.loads((copy / "run.json").read_text())
    settings["tasks"]["lm_eval:arc_easy"] = dict(settings["tasks"]["arc_e"])
    (copy / "run.json").write_text(json.dumps(settings))
    found = regrade(copy)
    assert found["results"] is None and len(found["changes"]) == 4


def test_a_run_of_two_graders_is_refused(copy):
    path = copy / "samples" / "never" / "gsm8k.jsonl"
    lines = [json.loads(line) | {"grader": "1"} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(ValueError, match=r"was graded by the versions 1 and 2 .*; run tah eval regrade"):
        summarize(copy)
    assert regrade(copy)["results"]["grader"] == grader()


def test_results_name_the_grader(done):
    results = json.loads((done / "results.json").read_text())
    assert results["grader"] == grader() and f"grader {grader()}." in as_markdown(results)


def test_an_unfinished_run_keeps_its_open_tasks(copy, pupil, done):
    """What is finished is graded again; the rest is graded when its last answer is there."""
    path = copy / "samples" / "random" / "arc_e.jsonl"
    lines = [json.loads(line) | {"verdict": None} for line in path.read_text().splitlines()][:-1]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = regrade(copy)
    assert found["results"] is None and len(found["changes"]) == 3 and "is not finished" in as_text(found)
    assert "random on arc_e: not graded, because only 5 of 6 answers exist" in as_text(found)
    go(pupil, copy)
    assert lines_of(copy) == lines_of(done)


def test_a_grade_of_another_version_changes_the_verdicts(copy, monkeypatch):
    """The control: a grader that is never content."""
    monkeypatch.setattr(grading, "judge_math", lambda gold, text: grading.judge_choice("A", "A or B", 2))
    found = regrade(copy)
    assert {line["verdict"] for line in lines_of(copy)["samples/never/gsm8k.jsonl"]} == {"unparsed"}
    assert any("wrong -> unparsed" in its["changed"] for its in found["changes"])


def test_the_command(copy, capsys):
    assert run(["eval", "regrade", str(copy)]) == 0
    assert "never on gsm8k, 10 answers: no verdict changed" in capsys.readouterr().out
    assert run(["eval-regrade", str(copy), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["grader"] == grader()
    (copy / "questions" / "gsm8k.jsonl").write_text("{")
    assert run(["eval", "regrade", str(copy)]) == 2
    assert "gsm8k.jsonl is damaged" in capsys.readouterr().err
    assert run(["eval", "regrade", str(copy.parent / "nothing")]) == 2
    assert "no evaluation (no run.json)" in capsys.readouterr().err and not (copy.parent / "nothing").exists()
    assert run(["eval", "regrade", str(copy), "--data", "amc23=x"]) == 2
    assert "amc23 is not among the tasks gsm8k, arc_e" in capsys.readouterr().err
