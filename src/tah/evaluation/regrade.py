"""`tah eval regrade`: kept answers graded again, without a model."""

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
    """Grade the answers of an evaluation again, with the present grader; the answers themselves stay as they are.

    Args:
        directory: of the evaluation.
        data: JSONL files by task, for a run that did not keep its questions and did not take them from the Hub.
        allow_code_execution: needed for the code benchmarks; the programs run in a sandbox.
        progress: gets the answers of each task.

    Returns:
        `grader`: its version; `changes`: for each policy and task the number of answers, and how many verdicts changed
        from what to what; `left`: those that are not finished, which `tah eval` grades; `results`: what `results.json`
        holds, or None where the evaluation is not finished.

    Raises:
        ValueError: there is no evaluation, it is in use, or its questions are not to be had; says what to do.
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
        questions = {name: _questions(directory, run, name, files) for name in names}  # before any verdict is changed
        for name, policy in itertools.product(names, policies):
            samples, of = Samples(directory, policy, name), tasks[name]["questions"] * tasks[name]["samples"]
            found: dict[str, Any] = {"policy": policy, "task": name, "answers": len(samples.lines)}
            if not samples.graded(of):  # lm-eval grades a task when its last answer is there
                left.append(found | {"of": of})
                continue
            with progress.work(f"{name}, {policy}", of, "answers") as work:
                changes.append(found | {"changed": _regrade(samples, questions[name], work)})
        # lm-eval scores its own tasks; that is not done again
        stock = [Samples(directory, *its).scores for its in itertools.product(policies, tasks.keys() - set(names))]
        finished = not left and all(scores.is_file() for scores in stock)
        results = write_results(directory) if finished else None
    return {"grader": grader(), "changes": changes, "left": left, "results": results}


def _questions(directory: Path, run: Mapping[str, Any], name: str, files: Mapping[str, str]) -> list[Mapping[str, Any]]:
    """The questions of a task: those that were kept, else those of the file or of the Hub.

    Raises:
        ValueError: they cannot be had, or are not those that were answered.
    """
    facts, kept = run["tasks"][name], None if name in files else read_questions(directory, name)
    if kept is None:
        task = build([name], files, Sampling(), PROTOCOLS[run["protocol"]])[name]
        found = list(task.eval_docs)[: facts["questions"]]
    else:
        found = kept
    if not facts_of_data(found).items() <= facts.items():
        source = files.get(name, f"questions/{name}.jsonl" if kept is not None else "the Hub's data")
        raise ValueError(f"{directory}: {source} does not hold the questions of {name} that were answered; give --data")
    if kept is None:
        write_questions(directory, name, found)
    return found


def _regrade(samples: Samples, questions: list[Mapping[str, Any]], work: Work) -> dict[str, int]:
    """Grade a file of answers again; counts of `old -> new` verdicts that differ."""
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
