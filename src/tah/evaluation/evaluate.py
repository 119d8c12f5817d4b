"""`tah eval`: benchmarks on lm-evaluation-harness, with several policies over the same checkpoint, resumable.

lm-eval builds the prompts, asks for answers and calls the graders; this module chooses tasks and settings, keeps every
answer in a file (`eval_files.py`) and makes the results from those files (`eval_report.py`).
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import platform
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..checkpoints.contents import weights_fingerprint
from ..files import write_atomically
from ..names import STOCK_TASK
from ..policy import Rule
from ..progress import SILENT, Reporter
from ..session import Session
from .eval_files import Samples, alone, facts_of_data, open_run, write_questions
from .eval_report import named_gaps, write_results
from .harness import TaHLM
from .request import Request, build, quiet, vllm_version
from .sandbox import Sandbox
from .tasks import CODE
from .vllm_backend import ServedLM

from lm_eval import evaluate as run_evaluator  # isort: skip  # after harness.py, which says what to install

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
    **options: Any,
) -> dict[str, Any]:
    """Evaluate a model; continues what `output` holds of the same evaluation.

        evaluate("DIR", ["gsm8k"], "runs/c", policies=["never", "decider"], sampling=Sampling(samples=4))

    Args:
        model: directory, hub id, `smollm2`, or an open session.
        tasks: names of `tah.names.TASKS`, `nine`, or `lm_eval:NAME` for one of lm-eval's own.
        output: directory for answers and results.
        policies: who iterates, one after the other; the model's own by default.
        threshold: iterate above this probability; the model's own by default.
        max_depth: most passes a token may take; the model's own by default.
        progress: gets each task's answers, and what the user should know.
        options: the other fields of [`Request`], by name; None is the default.

    Returns:
        what `results.json` holds: `results` by policy and task, `average` by policy, and the settings.

    Raises:
        ValueError: a setting, a file or the model is not usable; the message says what to do.
        ImportError: vLLM is asked for, and not installed.
    """
    asked = tuple(Rule(policy, threshold, max_depth) for policy in dict.fromkeys(policies or (None,)))
    given = {name: value for name, value in options.items() if value is not None}
    request = Request(model, tasks, output, rules=asked, **given)
    if any(name in CODE for name in request.tasks):
        Sandbox().check()
    with quiet():
        built = build(request.tasks, request.data, request.sampling, request.asking)
        session = _open(request, progress)
        if of_base := session.as_itself(request.rules[0]):
            progress.note(of_base)
        request = replace(request, rules=[session.rule(rule) for rule in request.rules])
        with closing(_harness(request, session, built, progress)) as lm:
            shared = [str(rule.policy) for rule in request.rules if rule.policy in ("decider", "confidence")]
            if len(shared) > 1:
                common = f"the threshold {lm.rule.threshold:.4g}, though their scales differ"
                progress.note(f"{' and '.join(shared)} share {common}")
            settings = _settings(request, lm, built)
            if gaps := settings["ours"]:
                progress.note(f"protocol {request.protocol}: not published, so decided by ours: {named_gaps(gaps)}")
            with alone(Path(output)):
                _answer_all(request, lm, built, settings, progress)
    return write_results(Path(output))


def _open(request: Request, progress: Reporter) -> Session:
    """The model of a request.

    Raises:
        ValueError: it has no chat template to ask with.
    """
    session = request.model
    if isinstance(session, str):
        as_saved = request.backend == "vllm"
        session = Session.open(
            session, dtype=request.dtype, device=request.device, as_saved=as_saved, progress=progress
        )
    if not request.raw and not session.tokenizer.chat_template:
        raise ValueError(f"{session.source} has no chat template; give --raw to ask without one")
    return session


def _harness(request: Request, session: Session, built: Mapping[str, Any], progress: Reporter) -> TaHLM:
    """lm-eval's model for a request.

    Raises:
        ValueError: the backend, or the model, cannot do what is asked for.
    """
    options = request.rules[0].arguments() | {
        "seed": request.drawing.seed,
        "add_bos_token": None if request.raw else False,  # a chat template writes it where it belongs
    }
    if request.backend == "vllm":
        for name, task in built.items():
            if task.OUTPUT_TYPE != "generate_until":
                raise ValueError(
                    f"{name} compares likelihoods, which --backend vllm does not compute; leave out --backend"
                )
        return ServedLM(session, rules=request.rules, batch_size=request.batch_size, engine=request.engine, **options)
    if request.reference is not None:
        options["reference"] = Session.open(
            request.reference, dtype=request.dtype, device=request.device, progress=progress
        )
    return TaHLM(session, batch_size=request.batch_size or 1, **options)


def _answer_all(
    request: Request, lm: TaHLM, built: Mapping[str, Any], settings: dict[str, Any], progress: Reporter
) -> None:
    """Every task under every policy, but what is there already."""
    output, limit = Path(request.output), request.limit
    open_run(output, settings)
    for rule, (name, task) in itertools.product(request.rules, built.items()):
        policy = str(rule.policy)
        questions = list(task.eval_docs)[:limit]
        ids = [str(doc.get("id", number)) for number, doc in enumerate(questions)]
        samples, of = Samples(output, policy, name, ids), len(ids) * int(task.config.repeats)
        if samples.repaired:
            progress.note(samples.repaired)
        stock = name.startswith(STOCK_TASK)
        with progress.work(f"{name}, {policy}", of, "answers", len(samples.lines)) as samples.work:
            if samples.scores.is_file() if stock else samples.graded(of):
                continue
            if not stock:
                write_questions(output, name, questions)
            lm.use(rule)
            answer_task(lm, task, samples, limit=limit, raw=request.raw)


def answer_task(lm: TaHLM, task: Any, samples: Samples, *, limit: int | None = None, raw: bool = False) -> None:
    """Answer and grade one task through lm-eval's evaluator.

    Args:
        lm: with the policy to answer with.
        task: of lm-eval.
        samples: where the answers are kept; the metrics of one of lm-eval's own tasks go beside them.
        limit: only the first so many questions.
        raw: without the chat template.
    """
    stock = samples.task.startswith(STOCK_TASK)
    lm.log, lm.think_end_token = samples, "</think>" if stock else None
    found = run_evaluator(
        lm,
        {"tasks": {task.task_name: task}},
        limit=limit,
        apply_chat_template=not raw,
        bootstrap_iters=1000 if stock else 0,
        confirm_run_unsafe_code=not stock,  # a request for our own is refused where it is not allowed
    )
    if stock:
        write_atomically(samples.scores, json.dumps(found["results"][task.task_name], default=str) + "\n")
    else:
        samples.grade({entry["doc_id"]: entry["graded"] for entry in found["samples"][task.task_name]})


def _settings(request: Request, lm: TaHLM, built: Mapping[str, Any]) -> dict[str, Any]:
    """What is evaluated, for `run.json`.

    Raises:
        ValueError: the model cannot follow one of the policies.
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
        "rule": rules | {name: getattr(config, name) for name in ("confidence_measure", "random_rate", "random_seed")},
        "limit": limit if any(len(task.eval_docs) > (limit or math.inf) for task in built.values()) else None,
        "tasks": {name: _facts(task, limit) for name, task in built.items()},
        "versions": versions | ({"vllm": vllm_version()} if request.backend == "vllm" else {}),
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _facts(task: Any, limit: int | None) -> dict[str, Any]:
    """What decides a task: its data and its prompt."""
    prompt = task.config.doc_to_text  # a function, in some of lm-eval's own, has no name that stays the same
    if isinstance(prompt, str) and task.config.gen_prefix:
        prompt += task.config.gen_prefix
    return facts_of_data(list(task.eval_docs)[:limit]) | {
        "samples": int(task.config.repeats),
        "prompt": hashlib.sha256(prompt.encode()).hexdigest()[:16] if isinstance(prompt, str) else None,
        "version": task.VERSION,
    }
