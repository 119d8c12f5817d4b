"""`tah eval`: benchmarks on lm-evaluation-harness, with several policies over the same checkpoint, resumable.

lm-eval builds the prompts, requests the answers and calls the graders. This module chooses tasks and settings, keeps
every answer in a file (`eval_files.py`), and computes the results from those files (`eval_report.py`).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..checkpoints.contents import weights_fingerprint
from ..files import write_atomically
from ..names import STOCK_TASK
from ..policy import Rule
from ..processes import Processes
from ..progress import SILENT, Reporter
from ..session import Session
from ..vllm.installed import vllm_version
from .eval_files import Samples, alone, facts_of_data, join_parts, open_run, write_questions
from .eval_report import named_gaps, write_results
from .harness import ShareDone, TaHLM
from .request import Request, build, quiet
from .sandbox import Sandbox
from .tasks import CODE
from .vllm_backend import ServedLM

from lm_eval import evaluate as run_evaluator  # isort: skip  # after harness.py, whose error names the packages to install

LIBRARIES = ("torch", "transformers", "lm_eval", "math_verify")


def evaluate(
    model: str | Session,
    tasks: Sequence[str],
    output: str | Path,
    *,
    policies: Sequence[str] | None = None,
    threshold: float | None = None,
    max_depth: int | None = None,
    progress: Reporter = SILENT,
    processes: Processes | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Evaluate a model on tasks, and return the results. An unfinished evaluation in `output` is continued.

        evaluate("DIR", ["gsm8k"], "runs/c", policies=["never", "decider"], sampling=Sampling(samples=4))

    Args:
        model: Path of a checkpoint directory, Hub id, name of a bundled model, or open session.
        tasks: Names of `tah.names.TASKS`, `nine`, or `lm_eval:NAME` for a task of lm-eval.
        output: Directory of the answers and results.
        policies: Names of policies. Each one answers all tasks. By default the policy of the checkpoint.
        threshold: Threshold of the policies; by default that of the checkpoint.
        max_depth: Maximum number of passes per token; by default that of the checkpoint.
        progress: Reporter of each task's answers and of notes to the user. Only the first process reports.
        processes: Processes that share the answers, as `Processes.started()` returns them; all of them make this call.
            By default this process answers alone.
        options: Other fields of `Request`, by name. None is the default.

    Returns:
        Content of `results.json`: `results` by policy and task, `average` by policy, and the settings.

    Raises:
        ValueError: A setting, a file or the model cannot be used. The message names a solution. `OtherProcessFailed`:
            another process has raised an error.
        ImportError: The backend is vLLM, which is not installed.
    """
    processes = processes or Processes()
    asked = tuple(Rule(policy, threshold, max_depth) for policy in dict.fromkeys(policies or (None,)))
    given = {name: value for name, value in options.items() if value is not None}
    with processes, quiet():
        request = Request(model, tasks, output, rules=asked, **given)
        if any(name in CODE for name in request.tasks):
            Sandbox().check()
        return _evaluate(request, processes, progress if processes.lead else SILENT)


def _evaluate(request: Request, processes: Processes, progress: Reporter) -> dict[str, Any]:
    """Run a request, and return the results. The first process writes all files but the parts of the others."""
    output = Path(request.output)
    built = build(request.tasks, request.data, request.sampling, request.asking)
    session = _open(request, progress)
    if of_base := session.as_itself(request.rules[0]):
        progress.note(of_base)
    request = replace(request, rules=[session.rule(rule) for rule in request.rules])
    with closing(_harness(request, session, built, processes, progress)) as lm:
        shared = [str(rule.policy) for rule in request.rules if rule.policy in ("decider", "confidence")]
        if len(shared) > 1:
            common = f"the threshold {lm.rule.threshold:.4g}, although their probabilities are not comparable"
            progress.note(f"{' and '.join(shared)} both use {common}")
        settings = _settings(request, lm, built)
        if gaps := settings["ours"]:
            progress.note(f"protocol {request.protocol}: not published, so tah chose it: {named_gaps(gaps)}")
        with alone(output) if processes.lead else nullcontext():
            if processes.lead:
                open_run(output, settings)
                for note in join_parts(output):
                    progress.note(note)
            processes.agree("evaluation", settings, without=("started", "device"))
            processes.see((output / "run.json").is_file, f"{output}/run.json of the first process is not there")
            _answer_all(request, lm, built, progress)
    if processes.lead:
        results = write_results(output)
        processes.tell("results", _hash_of(output / "results.json"))
        return results
    path, told = output / "results.json", processes.wait_for("results")
    processes.see(lambda: path.is_file() and _hash_of(path) == told, f"{path} is not that of the first process")
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found


def _hash_of(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _open(request: Request, progress: Reporter) -> Session:
    """Return the session of a request.

    Raises:
        ValueError: The model has no chat template, and the request is not `raw`.
    """
    session = request.model
    if isinstance(session, str):
        as_saved = request.backend == "vllm"
        session = Session.open(
            session, dtype=request.dtype, device=request.device, as_saved=as_saved, progress=progress
        )
    if not request.raw and not session.tokenizer.chat_template:
        raise ValueError(f"{session.source} has no chat template; give --raw to evaluate without one")
    return session


def _harness(
    request: Request, session: Session, built: Mapping[str, Any], processes: Processes, progress: Reporter
) -> TaHLM:
    """Return the model that lm-eval evaluates.

    Raises:
        ValueError: The backend or the model does not support the request.
    """
    options = request.rules[0].arguments() | {
        "seed": request.drawing.seed,
        "add_bos_token": None if request.raw else False,  # a chat template adds it itself
    }
    if request.backend == "vllm":
        for name, task in built.items():
            if task.OUTPUT_TYPE != "generate_until":
                raise ValueError(
                    f"{name} compares likelihoods, which --backend vllm does not compute; use --backend transformers"
                )
        return ServedLM(session, rules=request.rules, batch_size=request.batch_size, engine=request.engine, **options)
    if request.reference is not None:
        options["reference"] = Session.open(
            request.reference, dtype=request.dtype, device=request.device, progress=progress
        )
    return TaHLM(session, batch_size=request.batch_size or 1, processes=processes, **options)


def _answer_all(request: Request, lm: TaHLM, built: Mapping[str, Any], progress: Reporter) -> None:
    """Answer every task with every policy. Answers that the directory already has are not computed again."""
    output, limit, processes = Path(request.output), request.limit, lm.processes
    for rule, (name, task) in itertools.product(request.rules, built.items()):
        policy = str(rule.policy)
        questions = list(task.eval_docs)[:limit]
        ids = [str(doc.get("id", number)) for number, doc in enumerate(questions)]
        samples, of = Samples(output, policy, name, ids, processes), len(ids) * int(task.config.repeats)
        if samples.repaired:
            progress.note(samples.repaired)
        stock = name.startswith(STOCK_TASK)
        with progress.work(f"{name}, {policy}", of, "answers", len(samples.lines)) as samples.work:
            if samples.scores.is_file() if stock else samples.graded(of):
                continue
            if not stock and processes.lead:
                write_questions(output, name, questions)
            if task.OUTPUT_TYPE != "generate_until" and processes.world > 1:
                progress.note(f"{name} compares likelihoods, which the first process computes alone")
                if not processes.lead:
                    continue
            lm.use(rule)
            answer_task(lm, task, samples, limit=limit, raw=request.raw)


def answer_task(lm: TaHLM, task: Any, samples: Samples, *, limit: int | None = None, raw: bool = False) -> None:
    """Answer and grade one task with lm-eval's evaluator.

    Args:
        lm: Model, set to the policy that answers.
        task: Task object of lm-eval.
        samples: File of the answers. The metrics of lm-eval's own tasks are written next to it.
        limit: Maximum number of questions, from the first.
        raw: Whether to leave out the chat template.

    Of several processes, only the first one grades. The function returns when its share is answered in the others.
    """
    stock = samples.task.startswith(STOCK_TASK)
    lm.log, lm.think_end_token = samples, "</think>" if stock else None
    try:
        found = run_evaluator(
            lm,
            {"tasks": {task.task_name: task}},
            limit=limit,
            apply_chat_template=not raw,
            bootstrap_iters=1000 if stock else 0,
            confirm_run_unsafe_code=not stock,  # for our tasks, `Request` has already checked allow_code_execution
        )
    except ShareDone:
        return
    if stock:
        write_atomically(samples.scores, json.dumps(found["results"][task.task_name], default=str) + "\n")
    else:
        samples.grade({entry["doc_id"]: entry["graded"] for entry in found["samples"][task.task_name]})


def _settings(request: Request, lm: TaHLM, built: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of `run.json`: everything that determines the answers, and versions.

    Raises:
        ValueError: The model does not support one of the policies.
    """
    for rule in request.rules:
        lm.use(rule)
    session, config, limit = lm.session, lm.session.model.config, request.limit
    rules = lm.rule.arguments() | {
        "policy": [rule.policy for rule in request.rules],
        "reference": None if lm.reference is None else weights_fingerprint(lm.reference.model),
    }
    template = str(session.tokenizer.chat_template).encode()
    versions = {"tah": version("tah"), "python": platform.python_version()} | {
        each: version(each) for each in LIBRARIES
    }
    return {
        "protocol": request.protocol,
        "overrides": request.sampling.given()
        | ({"data": {name: str(path) for name, path in request.data.items()}} if request.data else {}),
        "ours": request.asking.ours(built),
        "sampling": asdict(request.drawing),
        "template": "none" if request.raw else "chat",
        "chat_template": None if request.raw else hashlib.sha256(template).hexdigest(),
        "backend": request.backend,
        "dtype": str(session.model.dtype).removeprefix("torch."),
        "device": str(session.model.device),
        "batch_size": request.batch_size,
        "engine": dict(request.engine),
        "tah": 1,
        "model": session.source,
        "weights": weights_fingerprint(session.model),
        "rule": rules
        | {name: getattr(config, name) for name in ("confidence_measure", "random_rate", "random_seed")}
        | ({"decision": "sample"} if config.decision == "sample" else {}),
        "limit": limit if any(len(task.eval_docs) > (limit or math.inf) for task in built.values()) else None,
        "tasks": {name: _facts(task, limit) for name, task in built.items()},
        "versions": versions | ({"vllm": vllm_version()} if request.backend == "vllm" else {}),
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _facts(task: Any, limit: int | None) -> dict[str, Any]:
    """Return what defines a task: its data, its prompt and its number of samples."""
    prompt = task.config.doc_to_text  # some tasks of lm-eval have a function, which has no stable hash
    if isinstance(prompt, str) and task.config.gen_prefix:
        prompt += task.config.gen_prefix
    return facts_of_data(list(task.eval_docs)[:limit]) | {
        "samples": int(task.config.repeats),
        "prompt": hashlib.sha256(prompt.encode()).hexdigest()[:16] if isinstance(prompt, str) else None,
        "version": task.VERSION,
    }
