"""The results of an evaluation as JSON and Markdown, and the comparison of two evaluations.

Shapes: N answers to K questions of a task, S bootstrap samples (`stats/bootstrap.py`). The bootstrap draws questions,
not answers, because the samples of one question depend on each other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..files import differences, write_atomically
from ..markdown import estimate, table
from ..names import STOCK_TASK
from ..stats.bootstrap import Estimate, Resampled
from .eval_files import Samples, read_run

PROTOCOL = ("temperature", "top_p", "top_k", "max_new_tokens")  # sampling fields that must be equal; seeds may differ
LEGEND = (
    "Accuracy is in %, with the 95 % bootstrap interval over questions (the exact binomial interval if all answers are "
    "right or all are wrong). Unparsed answers contain no answer that the grader finds; they count as wrong. Cut-off "
    "answers reached the token limit. Cost is the number of forward passes, with those of the prompt, divided by the "
    "passes of the base."
)


COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "accuracy": ("accuracy", lambda found: "".join(estimate(found, unit=""))),
    "unparsed": ("unparsed", "{:,}".format),
    "cut_off": ("cut off", "{:,}".format),
    "mean_depth": ("mean depth", "{:.3f}".format),
    "iterated_share": ("iterated", "{:.1%}".format),
    "tokens": ("tokens", "{:,}".format),
    "seconds": ("seconds", "{:,.1f}".format),
    "cost": ("cost", "{:.3f}".format),
}


def summarize(directory: str | Path) -> dict[str, Any]:
    """Return the results of an evaluation by policy and task.

    Raises:
        ValueError: There is no evaluation, it is not finished, a file is damaged, or verdicts are of several versions
            of the grader.
    """
    directory = Path(directory)
    run = read_run(directory)
    rows: list[dict[str, Any]] = []
    stock, averages, graders = [], [], set[str]()
    for policy in run["rule"]["policy"]:
        drawn: list[tuple[Resampled, np.ndarray]] = []
        for name, facts in run["tasks"].items():
            samples = Samples(directory, policy, name)
            if name.startswith(STOCK_TASK):
                scores = json.loads(samples.scores.read_text("utf-8")).items()
                metrics = {key: value for key, value in scores if isinstance(value, (int, float)) and "," in key}
                stock.append({"policy": policy, "task": name, "metrics": metrics} | _costs(samples))
                continue
            _check_finished(samples, facts)
            graders |= samples.graders
            resampled, right = _right(samples, seed=len(drawn))
            drawn.append((resampled, resampled.mean(right)))
            lines = samples.lines.values()
            accuracy = bounded(resampled.estimate(drawn[-1][1]), facts["questions"])
            unparsed = sum(line["verdict"] == "unparsed" for line in lines)
            untestable = sorted({line["question"] for line in lines if line["verdict"] == "untestable"})
            counts = {"questions": facts["questions"], "answers": len(lines), "unparsed": unparsed}
            counts["untestable"] = untestable
            rows.append({"policy": policy, "task": name, "accuracy": accuracy} | counts | _costs(samples))
        if drawn:
            averages.append(_average(policy, drawn, [row for row in rows if row["policy"] == policy]))
    if len(graders) > 1:
        raise ValueError(
            f"{directory} was graded by the versions {' and '.join(sorted(graders))}; run tah eval regrade {directory}"
        )
    grader = next(iter(graders), None)
    return run | {"grader": grader, "results": rows, "average": averages, "lm_eval": stock}


def _check_finished(samples: Samples, facts: Mapping[str, Any]) -> None:
    if not samples.graded(facts["questions"] * facts["samples"]):
        raise ValueError(f"{samples.path} is not finished; run the same tah eval again")


def write_results(directory: Path) -> dict[str, Any]:
    """Compute the results, write `results.json` and `results.md`, and return the results.

    Raises:
        ValueError: As in `summarize`.
    """
    results = summarize(directory)
    write_atomically(directory / "results.json", json.dumps(results, indent=2) + "\n")
    write_atomically(directory / "results.md", as_markdown(results))
    return results


def bounded(accuracy: Estimate, questions: int) -> Estimate:
    """Return an accuracy with exact binomial bounds if it is 0 or 1, where a bootstrap interval has no width."""
    bound = 1 - 0.025 ** (1 / questions)
    if accuracy["value"] == 0:
        return accuracy | {"low": 0.0, "high": bound}
    return accuracy | {"low": 1 - bound, "high": 1.0} if accuracy["value"] == 1 else accuracy


def widened(average: Mapping[str, Any], tasks: Sequence[Mapping[str, Any]]) -> Estimate:
    """Return a macro average whose interval also includes the exact bounds of tasks with an accuracy of 0 or 1.

    Such tasks add nothing to the width of a bootstrap interval.
    """
    alike = [its for its in tasks if its["value"] in (0, 1)]
    found: dict[str, Any] = dict(average)
    if len(alike) == len(tasks):
        found |= {"low": found["value"], "high": found["value"]}
    if found["low"] is not None:
        found["low"] -= sum(its["value"] - its["low"] for its in alike) / len(tasks)
        found["high"] += sum(its["high"] - its["value"] for its in alike) / len(tasks)
    return found


def _right(samples: Samples, seed: int) -> tuple[Resampled, np.ndarray]:
    """Return the bootstrap samples of a task's questions, and 1.0 for each right answer, `[N]`, by question."""
    lines = [samples.lines[key] for key in sorted(samples.lines)]
    questions = np.array([line["number"] for line in lines])
    return Resampled(questions, seed=seed), np.array([line["verdict"] == "right" for line in lines], np.float64)


def _costs(samples: Samples) -> dict[str, Any]:
    """Return depth, iterated share, tokens, seconds and cost of the answers of a task."""
    names = ("prompt_tokens", "tokens", "finished", "depths", "iterated", "passes", "seconds")
    total = {name: sum(line[name] for line in samples.lines.values()) for name in names}
    answers = len(samples.lines)
    if not answers:  # a task of lm-eval that compares likelihoods
        return {}
    return {
        "cut_off": answers - total["finished"],
        "mean_depth": total["depths"] / total["tokens"],
        "iterated_share": total["iterated"] / total["tokens"],
        "tokens": total["tokens"],
        "prompt_tokens": total["prompt_tokens"],
        "seconds": total["seconds"],
        # The last token of an answer is never an input, neither here nor in the base.
        "cost": total["passes"] / (total["prompt_tokens"] + total["tokens"] - answers),
    }


def _average(
    policy: str, drawn: Sequence[tuple[Resampled, np.ndarray]], rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return the macro average of a policy: every task has the same weight."""
    means = {name: float(np.mean([row[name] for row in rows])) for name in ("mean_depth", "iterated_share", "cost")}
    sums = {name: sum(row[name] for row in rows) for name in ("unparsed", "cut_off", "tokens", "seconds")}
    accuracy = widened(macro(drawn), [row["accuracy"] for row in rows])
    return {"policy": policy, "tasks": len(rows), "accuracy": accuracy} | means | sums


def macro(drawn: Sequence[tuple[Resampled, np.ndarray]]) -> Estimate:
    """Return the mean over tasks of statistics [S]. The questions of each task are drawn independently."""
    widest = max((resampled for resampled, _ in drawn), key=lambda resampled: len(resampled.names))
    return widest.estimate(np.mean([values for _, values in drawn], axis=0))


def as_markdown(results: Mapping[str, Any]) -> str:
    """Return the results as a Markdown table by policy and task."""
    sampling = results["sampling"]
    greedy = sampling["temperature"] < 1e-3
    drawn = "greedy" if greedy else "T {temperature}, top-p {top_p}, top-k {top_k}".format(**sampling)
    most = {name: facts["samples"] for name, facts in results["tasks"].items() if not name.startswith(STOCK_TASK)}
    others = [f"{name} avg@{samples}" for name, samples in most.items() if samples != sampling["samples"]]
    averaged = f"avg@{sampling['samples']}" + (f" ({', '.join(others)})" if others else "")
    graded = f", grader {results['grader']}" if results["grader"] else ""
    lines = [
        f"# {results['model']}\n\nProtocol {results['protocol']}: {averaged}, {drawn}, at most "
        f"{sampling['max_new_tokens']} tokens, seed {sampling['seed']}, template {results['template']}, backend "
        f"{results['backend']}{graded}.",
        "",
    ]
    if results["protocol"] != "default" and results["overrides"]:
        files = ", ".join(f"{task}={path}" for task, path in results["overrides"].get("data", {}).items())
        overrides = results["overrides"] | ({"data": files} if files else {})
        given = ", ".join(f"{name} {value}" for name, value in overrides.items())
        lines += [f"Options that override the protocol: {given}.", ""]
    if results["ours"]:
        lines += [f"Not published, so tah chose it: {named_gaps(results['ours'])}.", ""]
    if results["results"]:
        rows = [*results["results"], *({"task": "average", "questions": ""} | row for row in results["average"])]
        names = ("policy", "task", "questions")
        cells = (
            [*(str(row[name]) for name in names), *(show(row[name]) for name, (_, show) in COLUMNS.items())]
            for row in rows
        )
        lines += [table([*names, *(column for column, _ in COLUMNS.values())], cells, words=2), "", LEGEND]
        for row in results["results"]:
            if row["untestable"]:
                named = ", ".join(row["untestable"])
                why = "cannot run in the sandbox, so answers to them count as wrong"
                lines.append(f"\n{row['policy']} on {row['task']}: the tests of {named} {why}.")
    for row in results["lm_eval"]:
        metrics = ", ".join(f"{name} {value:.4f}" for name, value in row["metrics"].items())
        cost = f"; mean depth {row['mean_depth']:.3f}, cost {row['cost']:.3f}" if "cost" in row else ""
        lines.append(f"\n{row['policy']} on {row['task']} (lm-eval's own prompt and metrics): {metrics}{cost}")
    return "\n".join(lines) + "\n"


def named_gaps(ours: Mapping[str, str]) -> str:
    """Return `Protocol.ours` as text: each unpublished setting, with its tasks."""
    tasks: dict[str, list[str]] = {}
    for name, what in ours.items():
        tasks.setdefault(what, []).append(name)
    return "; ".join(f"{what} ({', '.join(names)})" for what, names in tasks.items())


# -- two evaluations -------------------------------------------------------------------------------------------------


def compare(a: str, b: str) -> dict[str, Any]:
    """Return B minus A over the same questions, by task, with paired bootstrap intervals.

    Args:
        a: Directory of evaluation A, or `DIRECTORY:POLICY` for one of its policies.
        b: Directory of evaluation B, likewise.

    Raises:
        ValueError: A and B have no task in common, or differ in data, protocol or grader. The message names the
            difference.
    """
    (first, run_a, policies_a), (second, run_b, policies_b) = _opened(a), _opened(b)
    names = [name for name in run_a["tasks"] if name in run_b["tasks"] and not name.startswith(STOCK_TASK)]
    if not names:
        raise ValueError(f"{a} and {b} have no task in common")
    before, after = (
        {
            "protocol": run["protocol"],
            "sampling": {name: run["sampling"][name] for name in PROTOCOL},
            "template": run["template"],
            "tasks": {name: run["tasks"][name] for name in names},
        }
        for run in (run_a, run_b)
    )
    if differs := differences(before, after, now="B has"):
        raise ValueError(f"{a} (A) and {b} (B) cannot be compared: A has {differs}")
    alone = [name for run in (run_a, run_b) for name in run["tasks"] if name not in names]
    if len(policies_a) == len(policies_b) == 1:
        pairs = [(policies_a[0], policies_b[0])]
    elif not (pairs := [(policy, policy) for policy in policies_a if policy in policies_b]):
        raise ValueError(
            f"{a} has the policies {', '.join(policies_a)}, {b} has {', '.join(policies_b)}: choose one, as {a}:POLICY"
        )
    found = [_compared(first, second, pair, {name: run_a["tasks"][name] for name in names}) for pair in pairs]
    return {"a": a, "b": b, "comparisons": found, "left_out": sorted(set(alone))}


def _opened(name: str) -> tuple[Path, dict[str, Any], list[str]]:
    """Return the directory, the content of run.json and the policies of DIRECTORY or DIRECTORY:POLICY."""
    directory, colon, policy = name.rpartition(":")
    if not colon or Path(name).is_dir():
        directory, policy = name, ""
    run = read_run(Path(directory))
    policies = run["rule"]["policy"]
    if policy and policy not in policies:
        raise ValueError(f"{directory} has no policy {policy!r}; it has {', '.join(policies)}")
    return Path(directory), run, [policy] if policy else policies


def _compared(first: Path, second: Path, pair: tuple[str, str], tasks: Mapping[str, Any]) -> dict[str, Any]:
    """Return the comparison of two policies over `tasks`, whose values are the entries of run.json."""
    rows: list[dict[str, Any]] = []
    drawn: list[tuple[Resampled, np.ndarray]] = []
    graders: set[str] = set()
    for name, facts in tasks.items():
        one, two = Samples(first, pair[0], name), Samples(second, pair[1], name)
        for samples in (one, two):
            _check_finished(samples, facts)
            graders |= samples.graders
        if len(graders) > 1:
            raise ValueError(
                f"{first} and {second} were graded by the versions {' and '.join(sorted(graders))} of the grader; run "
                "tah eval regrade on the older one"
            )
        resampled, before = _right(one, seed=len(drawn))
        _, after = _right(two, seed=len(drawn))
        drawn.append((resampled, resampled.mean(after - before)))
        row = {"task": name, "questions": len(resampled.names), "a": float(before.mean()), "b": float(after.mean())}
        row["difference"] = resampled.estimate(drawn[-1][1])
        rows.append(row | {"cost_a": _costs(one)["cost"], "cost_b": _costs(two)["cost"]})
    average: dict[str, Any] = {"task": "average", "questions": "", "difference": macro(drawn)}
    average |= {name: float(np.mean([row[name] for row in rows])) for name in ("a", "b", "cost_a", "cost_b")}
    return {"policy_a": pair[0], "policy_b": pair[1], "tasks": rows, "average": average}


def compared_markdown(found: Mapping[str, Any]) -> str:
    """Return a Markdown table for each pair of policies."""
    lines = []
    for pair in found["comparisons"]:
        lines += [f"A: {found['a']} ({pair['policy_a']}), B: {found['b']} ({pair['policy_b']})", ""]
        cells = (
            [row["task"], str(row["questions"]), f"{100 * row['a']:.1f}", f"{100 * row['b']:.1f}"]
            + ["".join(estimate(row["difference"], "+.1f", "")), f"{row['cost_a']:.3f}", f"{row['cost_b']:.3f}"]
            for row in (*pair["tasks"], pair["average"])
        )
        lines += [table(["task", "questions", "A", "B", "B - A", "cost A", "cost B"], cells, words=1), ""]
    lines.append("Differences are in percentage points, with 95 % paired bootstrap intervals over questions.")
    if found["left_out"]:
        lines.append(f"Left out (in one evaluation only, or a task of lm-eval): {', '.join(found['left_out'])}.")
    return "\n".join(lines) + "\n"
