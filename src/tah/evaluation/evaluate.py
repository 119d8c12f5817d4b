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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .. import __version__
from ..checkpoints.contents import weights_fingerprint
from ..files import write_atomically
from ..policy import Rule
from ..progress import Reporter
from ..session import Session
from . import tasks as ours
from .eval_files import Samples, alone, facts_of_data, open_run, write_questions
from .eval_report import named_gaps, write_results
from .harness import TaHLM
from .request import Sampling, build, check_engine, check_request, expand, find_protocol, quiet, vllm_version
from .vllm_backend import ServedLM

from lm_eval import evaluate as run_evaluator  # isort: skip  # after harness.py, which says what to install

LIBRARIES = ("torch", "transformers", "lm_eval", "math_verify")


def evaluate(
    model: str | Session,
    tasks: Sequence[str],
    output: str | Path,
    *,
    policies: Sequence[str] | None = None,
    protocol: str = "default",
    sampling: Sampling | None = None,
    limit: int | None = None,
    data: Mapping[str, str | Path] | None = None,
    threshold: float | None = None,
    max_depth: int | None = None,
    reference: str | None = None,
    raw: bool = False,
    batch_size: int | None = None,
    backend: str = "transformers",
    engine: Mapping[str, Any] | None = None,
    allow_code_execution: bool = False,
    dtype: str = "auto",
    device: str = "auto",
    told: Callable[..., None] = lambda policy, task, done, of: None,
    note: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Evaluate a model; continues what `output` holds of the same evaluation.

    Args:
        model: directory, hub id, `smollm2`, or an open session.
        tasks: names of `tah.evaluation.tasks.TASKS`, `nine`, or `lm_eval:NAME` for one of lm-eval's own.
        output: directory for answers and results.
        policies: who iterates, one after the other; the model's own by default.
        protocol: `default`, or `paper` for what the authors published (`tasks/protocols.py`).
        sampling: what is given here overrides the protocol.
        limit: only the first so many questions of each task.
        data: JSONL files by task, instead of the Hub (`tasks/rows.py` has the schema).
        reference: for the policy `oracle`.
        raw: without the chat template.
        batch_size: answers at a time; 1, or with vLLM as many as it likes, by default.
        dtype: `auto` is the checkpoint's where the device computes in it natively, else float32.
        device: `auto` is CUDA, then MPS, then the CPU.
        backend: `transformers` (`TaHForCausalLM.generate`) or `vllm`, for large runs.
        engine: further options of `vllm.LLM`.
        allow_code_execution: needed for the code benchmarks; they run in a sandbox.
        told: progress: policy, task, answers done, of how many.
        note: what the user should know.

    Returns:
        what `results.json` holds: `results` by policy and task, `average` by policy, and the settings.

    Raises:
        ValueError: a setting, a file or the model is not usable; one line says what to do.
    """
    sampling, output, asking = sampling or Sampling(), Path(output), find_protocol(protocol)
    names, files = expand(tasks), {name: str(path) for name, path in (data or {}).items()}
    check_request(names, policies, files, reference, allow_code_execution, backend, device)
    drawing = sampling.under(asking)
    check_engine(backend, model, engine or {}, drawing)
    with quiet():
        built = build(names, files, sampling, asking)
        (progress := Reporter()).note = note  # type: ignore[method-assign, assignment]
        place: dict[str, Any] = {"dtype": dtype, "device": device, "progress": progress}
        handed_on = backend == "vllm"
        session = Session.open(model, **place, as_saved=handed_on) if isinstance(model, str) else model
        if not raw and not session.tokenizer.chat_template:
            raise ValueError(f"{session.source} has no chat template; give --raw to ask without one")
        if not policies and (told_of_base := session.as_itself(Rule(None, threshold, max_depth))):
            note(told_of_base)
        chosen = list(dict.fromkeys(policies or [session.model.config.policy]))
        check_request(names, chosen, files, reference, allow_code_execution, backend, device)
        options: dict[str, Any] = {
            "threshold": threshold,
            "max_depth": max_depth,
            "seed": drawing.seed,
            "add_bos_token": None if raw else False,  # a chat template writes it where it belongs
        }
        if backend == "vllm":
            _check_served(built)
            lm: TaHLM = ServedLM(session, policies=chosen, batch_size=batch_size, engine=engine, **options)
        else:
            options["reference"] = None if reference is None else Session.open(reference, **place)
            lm = TaHLM(session, batch_size=batch_size or 1, **options)
        if len(shared := [policy for policy in chosen if policy in ("decider", "confidence")]) > 1:
            note(f"{' and '.join(shared)} share the threshold {lm.rule['threshold']:.4g}, though their scales differ")
        settings = {
            "protocol": protocol,
            "overrides": sampling.given() | ({"data": files} if files else {}),
            "ours": asking.ours(built),
            "sampling": asdict(drawing),
            "template": "none" if raw else "chat",
            "chat_template": None if raw else hashlib.sha256(str(session.tokenizer.chat_template).encode()).hexdigest(),
            "backend": backend,
            "dtype": str(session.model.dtype).removeprefix("torch."),
            "device": str(session.model.device),
            "batch_size": batch_size,
            "engine": dict(engine or {}),
        } | _settings(lm, chosen, built, limit)
        if backend == "vllm":
            settings["versions"]["vllm"] = vllm_version()
        if gaps := settings["ours"]:
            note(f"protocol {protocol}: not published, so decided by ours: {named_gaps(gaps)}")
        try:
            with alone(output):
                _answer_all(lm, chosen, built, output, settings, limit=limit, raw=raw, told=told, note=note)
        finally:
            if isinstance(lm, ServedLM):
                lm.close()
    return write_results(output)


def _answer_all(
    lm: TaHLM,
    policies: Sequence[str],
    built: Mapping[str, Any],
    output: Path,
    settings: dict[str, Any],
    *,
    limit: int | None,
    raw: bool,
    told: Callable[..., None],
    note: Callable[[str], None],
) -> None:
    """Every task under every policy, but what is there already."""
    open_run(output, settings)
    for policy, (name, task) in itertools.product(policies, built.items()):
        ids = [str(doc.get("id", number)) for number, doc in enumerate(list(task.eval_docs)[:limit])]
        of = len(ids) * int(task.config.repeats)
        samples = Samples(output, policy, name, ids, partial(told, policy, name, of=of))
        scores = samples.path.with_suffix(".json") if name.startswith(ours.STOCK) else None
        if samples.repaired:
            note(samples.repaired)
        if not (samples.graded(of) if scores is None else scores.is_file()):
            if scores is None:
                write_questions(output, name, list(task.eval_docs)[:limit])
            _run(lm, task, samples, policy=policy, limit=limit, raw=raw, scores=scores)


def _check_served(tasks: Mapping[str, Any]) -> None:
    for name, task in tasks.items():
        if task.OUTPUT_TYPE != "generate_until":
            raise ValueError(f"{name} compares likelihoods, which --backend vllm does not compute; leave out --backend")


def _settings(lm: TaHLM, policies: Sequence[str], tasks: Mapping[str, Any], limit: int | None) -> dict[str, Any]:
    """What is evaluated, for `run.json`.

    Raises:
        ValueError: the model cannot follow one of the policies.
    """
    for policy in policies:
        lm.use(policy)
    config = lm.session.model.config
    rule = lm.rule | {
        "policy": policies,
        "reference": None if lm.reference is None else weights_fingerprint(lm.reference.model),
    }
    return {
        "tah": 1,
        "model": lm.session.source,
        "weights": weights_fingerprint(lm.session.model),
        "rule": rule | {name: getattr(config, name) for name in ("confidence_measure", "random_rate", "random_seed")},
        "limit": limit if any(len(task.eval_docs) > (limit or math.inf) for task in tasks.values()) else None,
        "tasks": {name: _facts(task, limit) for name, task in tasks.items()},
        "versions": {"tah": __version__, "python": platform.python_version()}
        | {name: version(name) for name in LIBRARIES},
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


# -- running ---------------------------------------------------------------------------------------------------------


def _run(
    lm: TaHLM, task: Any, samples: Samples, *, policy: str, limit: int | None, raw: bool, scores: Path | None
) -> None:
    """One policy, one task, through lm-eval's evaluator.

    Args:
        scores: for one of lm-eval's own tasks, where its metrics go.
    """
    lm.use(policy)
    lm.log, lm.think_end_token = samples, None if scores is None else "</think>"
    found = run_evaluator(
        lm,
        {"tasks": {task.task_name: task}},
        limit=limit,
        apply_chat_template=not raw,
        bootstrap_iters=0 if scores is None else 1000,
        confirm_run_unsafe_code=scores is None,  # of ours, refused above where it is not allowed
    )
    if scores is None:
        samples.grade({entry["doc_id"]: entry["graded"] for entry in found["samples"][task.task_name]})
    else:
        write_atomically(scores, json.dumps(found["results"][task.task_name], default=str) + "\n")
