"""`tah eval regrade`: kept answers graded again, without a model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import tasks as ours
from .eval_files import Samples, alone, facts_of_data, read_questions, read_run, write_questions
from .eval_report import write_results
from .grade import grade, grader
from .request import Sampling, build, find_protocol, quiet
from .sandbox import Sandbox
from .tasks import rows


def regrade(
    directory: str | Path,
    *,
    data: Mapping[str, str | Path] | None = None,
    allow_code_execution: bool = False,
    told: Callable[..., None] = lambda policy, task, done, of: None,
) -> dict[str, Any]:
    """Grade the answers of an evaluation again, with the present grader; the answers themselves stay as they are.

    Args:
        directory: of the evaluation.
        data: JSONL files by task, for a run that did not keep its questions and did not take them from the Hub.
        allow_code_execution: needed for the code benchmarks; the programs run in a sandbox.
        told: progress: policy, task, answers done, of how many.

    Returns:
        `grader`: its version; `changes`: for each policy and task the number of answers, and how many verdicts changed
        from what to what; `left`: those that are not finished, which `tah eval` grades; `results`: what `results.json`
        holds, or None where the evaluation is not finished.

    Raises:
        ValueError: there is no evaluation, it is in use, or its questions are not to be had; says what to do.
    """
    directory = Path(directory)
    run = read_run(directory)
    names = [name for name in run["tasks"] if not name.startswith(ours.STOCK)]
    if code := [name for name in names if name in ours.CODE]:
        if not allow_code_execution:
            raise ValueError(f"{', '.join(code)}: grading runs the programs again; give --allow-code-execution")
        Sandbox().check()
    files = {name: str(path) for name, path in (data or {}).items()}
    if unknown := [name for name in files if name not in names]:
        raise ValueError(f"--data {unknown[0]}=...: {unknown[0]} is not among the tasks {', '.join(names)}")
    changes: list[dict[str, Any]] = []
    left: list[dict[str, Any]] = []
    with alone(directory, tidy=False), quiet():
        questions = {name: _questions(directory, run, name, files) for name in names}  # before any verdict is changed
        for name in names:
            for policy in run["rule"]["policy"]:
                samples = Samples(directory, policy, name)
                found: dict[str, Any] = {"policy": policy, "task": name, "answers": len(samples.lines)}
                of = run["tasks"][name]["questions"] * run["tasks"][name]["samples"]
                if samples.graded(of):
                    changes.append(found | {"changed": _regrade(samples, questions[name], told)})
                else:  # lm-eval grades a task when its last answer is there
                    left.append(found | {"of": of})
        results = write_results(directory) if not left and _scored(directory, run) else None
    return {"grader": grader(), "changes": changes, "left": left, "results": results}


def _scored(directory: Path, run: Mapping[str, Any]) -> bool:
    """Whether lm-eval has scored those of its own tasks that the run has; that is not done again."""
    stock = [name for name in run["tasks"] if name.startswith(ours.STOCK)]
    paths = [Samples(directory, policy, name).path for name in stock for policy in run["rule"]["policy"]]
    return all(path.with_suffix(".json").is_file() for path in paths)


def _questions(directory: Path, run: Mapping[str, Any], name: str, files: Mapping[str, str]) -> list[Mapping[str, Any]]:
    """The questions of a task: those that were kept, else those of the file or of the Hub.

    Raises:
        ValueError: they cannot be had, or are not those that were answered.
    """
    kept = None if name in files else read_questions(directory, name)
    if kept is None:
        task = build([name], files, Sampling(), find_protocol(run["protocol"]))[name]
        found = list(task.eval_docs)[: run["tasks"][name]["questions"]]
    else:
        found = kept
    if facts_of_data(found) != {key: run["tasks"][name][key] for key in ("questions", "data")}:
        source = files.get(name, f"questions/{name}.jsonl" if kept is not None else "the Hub's data")
        raise ValueError(f"{directory}: {source} does not hold the questions of {name} that were answered; give --data")
    if kept is None:
        write_questions(directory, name, found)
    return found


def _regrade(samples: Samples, questions: list[Mapping[str, Any]], told: Callable[..., None]) -> dict[str, int]:
    """Grade a file of answers again; counts of `old -> new` verdicts that differ."""
    texts: dict[int, dict[int, str]] = {}
    for number, sample in sorted(samples.lines):
        texts.setdefault(number, {})[sample] = samples.lines[number, sample]["text"]
    before = {key: line["verdict"] for key, line in samples.lines.items()}
    graded, done = {}, 0
    for number, answers in texts.items():
        row = dict(questions[number])
        graded[number] = [asdict(answer) for answer in grade(rows.kind_of(row), row, list(answers.values()))]
        done += len(answers)
        told(samples.policy, samples.task, done, len(before))
    samples.grade(graded)
    after = {key: line["verdict"] for key, line in samples.lines.items()}
    return dict(Counter(f"{before[key]} -> {after[key]}" for key in before if before[key] != after[key]))


def as_text(found: Mapping[str, Any]) -> str:
    """A line for each policy and task."""
    lines = (
        [f"Graded by version {found['grader']} of the grader:"] if found["changes"] else ["Nothing was graded again."]
    )
    for its in found["changes"]:
        changed = ", ".join(f"{count} {how}" for how, count in sorted(its["changed"].items())) or "no verdict changed"
        lines.append(f"{its['policy']} on {its['task']}, {its['answers']} answers: {changed}")
    for its in found["left"]:
        lines.append(
            f"{its['policy']} on {its['task']}: {its['answers']} of {its['of']} answers are there; left as it is"
        )
    if found["results"] is None:
        lines.append("The evaluation is not finished, so results.json is not written: run the same tah eval again.")
    return "\n".join(lines) + "\n"
