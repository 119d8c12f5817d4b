"""`tah eval regrade`: grade the stored answers of an evaluation again, without a model."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..names import STOCK_TASK, check_questions
from ..progress import SILENT, Reporter, Work
from .eval_files import Samples, alone, facts_of_data, read_questions, read_run, write_questions
from .eval_report import write_results
from .grade import grade, grader
from .request import Sampling, build, quiet
from .sandbox import Sandbox
from .tasks import CODE, rows
from .tasks.protocols import PROTOCOLS


def regrade(
    directory: str | Path,
    *,
    data: Mapping[str, str | Path] | None = None,
    allow_code_execution: bool = False,
    progress: Reporter = SILENT,
) -> dict[str, Any]:
    """Grade the answers of an evaluation again with the installed grader. The answers do not change.

    Args:
        directory: Directory of the evaluation.
        data: JSONL files by task. They are needed only for a run that did not keep its questions and whose questions
            are not from the Hub.
        allow_code_execution: Whether to run programs, in a sandbox. Code benchmarks need it.
        progress: Reporter of each task's answers.

    Returns:
        `grader`: version of the grader. `changes`: number of answers by policy and task, and of verdicts that changed,
        by old and new verdict. `left`: unfinished tasks, which `tah eval` grades. `results`: content of
        `results.json`, or None if the evaluation is not finished.

    Raises:
        ValueError: There is no evaluation, another process uses it, or its questions are not available. The message
            names a solution.
    """
    directory = Path(directory)
    run = read_run(directory)
    policies, tasks = run["rule"]["policy"], run["tasks"]
    names = [name for name in tasks if not name.startswith(STOCK_TASK)]
    if code := [name for name in names if name in CODE]:
        if not allow_code_execution:
            raise ValueError(f"{', '.join(code)}: grading runs the programs again; give --allow-code-execution")
        Sandbox().check()
    files = {name: str(path) for name, path in (data or {}).items()}
    check_questions(files, names)
    changes: list[dict[str, Any]] = []
    left: list[dict[str, Any]] = []
    with alone(directory, tidy=False), quiet():
        questions = {
            name: _questions(directory, run, name, files) for name in names
        }  # fails before any verdict changes
        for name, policy in itertools.product(names, policies):
            samples, of = Samples(directory, policy, name), tasks[name]["questions"] * tasks[name]["samples"]
            found: dict[str, Any] = {"policy": policy, "task": name, "answers": len(samples.lines)}
            if not samples.graded(of):  # lm-eval grades a task when its last answer is there
                left.append(found | {"of": of})
                continue
            with progress.work(f"{name}, {policy}", of, "answers") as work:
                changes.append(found | {"changed": _regrade(samples, questions[name], work)})
        # lm-eval grades its own tasks, so they are not graded again
        stock = [Samples(directory, *its).scores for its in itertools.product(policies, tasks.keys() - set(names))]
        finished = not left and all(scores.is_file() for scores in stock)
        results = write_results(directory) if finished else None
    return {"grader": grader(), "changes": changes, "left": left, "results": results}


def _questions(directory: Path, run: Mapping[str, Any], name: str, files: Mapping[str, str]) -> list[Mapping[str, Any]]:
    """Return the questions of a task, from a given file, else from the run's directory, else from the Hub.

    Raises:
        ValueError: The questions are not available, or are not those that were answered.
    """
    facts, kept = run["tasks"][name], None if name in files else read_questions(directory, name)
    if kept is None:
        task = build([name], files, Sampling(), PROTOCOLS[run["protocol"]])[name]
        found = list(task.eval_docs)[: facts["questions"]]
    else:
        found = kept
    if not facts_of_data(found).items() <= facts.items():
        source = files.get(name, f"questions/{name}.jsonl" if kept is not None else "the Hub's data")
        raise ValueError(f"{directory}: {source} does not have the questions of {name} that were answered; give --data")
    if kept is None:
        write_questions(directory, name, found)
    return found


def _regrade(samples: Samples, questions: list[Mapping[str, Any]], work: Work) -> dict[str, int]:
    """Grade a file of answers again, and return the counts of verdicts that changed, by `old -> new`."""
    before = {key: line["verdict"] for key, line in sorted(samples.lines.items())}
    graded = {}
    for number, keys in itertools.groupby(before, key=lambda key: key[0]):
        row, texts = dict(questions[number]), [samples.lines[key]["text"] for key in keys]
        graded[number] = [asdict(answer) for answer in grade(rows.kind_of(row), row, texts)]
        work.advance(len(texts))
    samples.grade(graded)
    after = {key: samples.lines[key]["verdict"] for key in before}
    return dict(Counter(f"{before[key]} -> {after[key]}" for key in before if before[key] != after[key]))


def as_text(found: Mapping[str, Any]) -> str:
    """Return the result of `regrade` as text, one line per policy and task."""
    lines = (
        [f"Graded by version {found['grader']} of the grader:"] if found["changes"] else ["No answer was graded again."]
    )
    for its in found["changes"]:
        changed = ", ".join(f"{count} {how}" for how, count in sorted(its["changed"].items())) or "no verdict changed"
        lines.append(f"{its['policy']} on {its['task']}, {its['answers']} answers: {changed}")
    for its in found["left"]:
        lines.append(
            f"{its['policy']} on {its['task']}: not graded, because only {its['answers']} of {its['of']} answers exist"
        )
    if found["results"] is None:
        lines.append("The evaluation is not finished, so results.json is not written. Run the same tah eval again.")
    return "\n".join(lines) + "\n"
