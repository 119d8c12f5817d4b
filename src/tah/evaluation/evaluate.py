"""`tah eval`: benchmarks on lm-evaluation-harness, with several policies over the same checkpoint, resumable.

lm-eval builds the prompts, asks for answers and calls the graders; this module chooses tasks and settings, keeps every
answer in a file (`eval_files.py`) and makes the results from those files (`eval_report.py`).
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import logging
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from .. import __version__
from .. import tasks as ours
from ..session import Session
from ..training.reference import weights_fingerprint
from .eval_files import Samples, alone, open_run, write_text
from .eval_report import as_markdown, summarize
from .harness import TaHLM
from .sandbox import Sandbox

from lm_eval import evaluate as run_evaluator  # isort: skip  # after harness.py, which says what to install
from lm_eval.tasks import TaskManager  # isort: skip

POLICIES = ("decider", "confidence", "always", "never", "random", "oracle")
LIBRARIES = ("torch", "transformers", "lm_eval", "math_verify")


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn; the paper's settings (spec D.1) by default.

    Args:
        samples: answers to each question, whose mean counts (avg@k).
        temperature: 0 takes the most probable token.
        top_p: among the most probable tokens up to this mass.
        top_k: among so many; 0 means all.
        max_new_tokens: where an answer is cut off.
        seed: with the question and the number of the sample, decides what is drawn.

    Raises:
        ValueError: several samples that would all be alike.
    """

    samples: int = 1
    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = 20
    max_new_tokens: int = 4096
    seed: int = 0

    def __post_init__(self) -> None:
        if self.samples > 1 and self.temperature < 1e-3:
            raise ValueError(f"samples={self.samples} at temperature 0 would all be alike; give --samples 1")

    def options(self) -> dict[str, Any]:
        """As lm-eval's `generation_kwargs`."""
        if self.temperature < 1e-3:
            return {"max_gen_toks": self.max_new_tokens, "do_sample": False, "temperature": 0.0}
        drawn = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return {"max_gen_toks": self.max_new_tokens, "do_sample": True} | drawn


def evaluate(
    model: str | Session,
    tasks: Sequence[str],
    output: str | Path,
    *,
    policies: Sequence[str] | None = None,
    sampling: Sampling | None = None,
    limit: int | None = None,
    data: Mapping[str, str | Path] | None = None,
    threshold: float | None = None,
    max_depth: int | None = None,
    reference: str | None = None,
    raw: bool = False,
    batch_size: int = 1,
    allow_code_execution: bool = False,
    dtype: str = "auto",
    device: str = "cpu",
    told: Callable[..., None] = lambda policy, task, done, of: None,
    note: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Evaluate a model; continues what `output` holds of the same evaluation.

    Args:
        model: directory, hub id, `smollm2`, or an open session.
        tasks: names of `tah.tasks.TASKS`, `nine`, or `lm_eval:NAME` for one of lm-eval's own.
        output: directory for answers and results.
        policies: who iterates, one after the other; the model's own by default.
        limit: only the first so many questions of each task.
        data: JSONL files by task, instead of the Hub (`tasks/rows.py` has the schema).
        reference: for the policy `oracle`.
        raw: without the chat template.
        allow_code_execution: needed for the code benchmarks; they run in a sandbox.
        told: progress: policy, task, answers done, of how many.
        note: what the user should know.

    Returns:
        what `results.json` holds: `results` by policy and task, `average` by policy, and the settings.

    Raises:
        ValueError: a setting, a file or the model is not usable; one line says what to do.
    """
    sampling, output = sampling or Sampling(), Path(output)
    names, files = expand(tasks), {name: str(path) for name, path in (data or {}).items()}
    _check_request(names, policies, files, reference, allow_code_execution)
    with _quiet():
        built = _build(names, files, sampling)
        place = {"dtype": dtype, "device": device}
        session = Session.open(model, **place) if isinstance(model, str) else model
        if not raw and not session.tokenizer.chat_template:
            raise ValueError(f"{session.source} has no chat template; give --raw to ask without one")
        if session.wrapped and not policies:
            note(f"{session.source} is a base model without a trained second pass; policy: confidence")
        lm = TaHLM(
            session,
            threshold=threshold,
            max_depth=max_depth,
            seed=sampling.seed,
            reference=None if reference is None else Session.open(reference, **place),
            batch_size=batch_size,
            add_bos_token=None if raw else False,  # a chat template writes it where it belongs
        )
        chosen = list(dict.fromkeys(policies or [session.model.config.policy]))
        if len(shared := [policy for policy in chosen if policy in ("decider", "confidence")]) > 1:
            note(f"{' and '.join(shared)} share the threshold {lm.rule['threshold']:.4g}, though their scales differ")
        settings = _settings(lm, chosen, built, limit) | {
            "sampling": asdict(sampling),
            "template": "none" if raw else "chat",
            "chat_template": None if raw else hashlib.sha256(str(session.tokenizer.chat_template).encode()).hexdigest(),
            "batch_size": batch_size,
        }
        with alone(output):
            open_run(output, settings)
            for policy, (name, task) in itertools.product(chosen, built.items()):
                ids = [str(doc.get("id", number)) for number, doc in enumerate(list(task.eval_docs)[:limit])]
                of = len(ids) * int(task.config.repeats)
                samples = Samples(output, policy, name, ids, partial(told, policy, name, of=of))
                scores = samples.path.with_suffix(".json") if name.startswith(ours.STOCK) else None
                if samples.repaired:
                    note(samples.repaired)
                if not (samples.graded(of) if scores is None else scores.is_file()):
                    _run(lm, task, samples, policy=policy, limit=limit, raw=raw, scores=scores)
    results = summarize(output)
    write_text(output / "results.json", json.dumps(results, indent=2) + "\n")
    write_text(output / "results.md", as_markdown(results))
    return results


# -- what is asked for -----------------------------------------------------------------------------------------------


def expand(names: Sequence[str]) -> list[str]:
    """Names of tasks, `nine` replaced, each once.

    Raises:
        ValueError: an unknown one, with the nearest.
    """
    found: dict[str, None] = {}
    for name in names:
        if name == "nine":
            found |= dict.fromkeys(ours.NINE)
        elif name in ours.TASKS or name.startswith(ours.STOCK):
            found[name] = None
        else:
            near = difflib.get_close_matches(name, (*ours.TASKS, "nine"), n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(
                f"unknown task {name!r}; {hint}choose from nine, {', '.join(ours.TASKS)}, "
                f"or {ours.STOCK}NAME for lm-eval's own"
            )
    if not found:
        raise ValueError("no tasks; give --tasks nine or names")
    return list(found)


def _check_request(
    names: Sequence[str],
    policies: Sequence[str] | None,
    data: Mapping[str, str],
    reference: str | None,
    allow_code_execution: bool,
) -> None:
    """What can be refused before anything is loaded."""
    for policy in policies or ():
        if policy not in POLICIES:
            near = difflib.get_close_matches(policy, POLICIES, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"unknown policy {policy!r}; {hint}choose from {', '.join(POLICIES)}")
    if "oracle" in (policies or ()) and reference is None:
        raise ValueError("policy oracle needs a model that knows better: give --reference MODEL")
    for name in data:
        if name not in names or name.startswith(ours.STOCK):
            raise ValueError(f"--data {name}=...: {name} is not among the tasks {', '.join(names)}")
    if code := [name for name in names if name in ours.CODE]:
        if not allow_code_execution:
            raise ValueError(
                f"{', '.join(code)}: runs programs that the model writes; give --allow-code-execution to run them in a "
                "sandbox, or leave it out"
            )
        Sandbox().check()


def _build(names: Sequence[str], data: Mapping[str, str], sampling: Sampling) -> dict[str, Any]:
    """lm-eval's tasks by our names, in the order asked for."""
    stock = [name.removeprefix(ours.STOCK) for name in names if name.startswith(ours.STOCK)]
    metadata: Any = {"data": dict(data)}
    manager = TaskManager(include_path=str(ours.DIRECTORY), include_defaults=bool(stock), metadata=metadata)
    for name in stock:
        if name not in manager.all_tasks or name.startswith(ours.PREFIX):
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f"; did you mean {ours.STOCK}{near[0]}?" if near else ""
            raise ValueError(f"lm-eval has no task {name!r}{hint}")
        path = manager.task_index[name].yaml_path  # loading such a task already fetches code from the Hub
        if path is not None and any(
            "unsafe_code: true" in file.read_text() for file in Path(path).parent.glob("*.y*ml")
        ):
            raise ValueError(f"{name} runs programs of the model in this process; take humaneval_plus or mbpp_plus")
    built: dict[str, Any] = {}
    for name in names:
        own = not name.startswith(ours.STOCK)
        try:
            loaded = manager.load([ours.PREFIX + name if own else name.removeprefix(ours.STOCK)])["tasks"]
        except (OSError, ConnectionError, ImportError) as error:
            raise ValueError(f"task {name} cannot be loaded: {' '.join(str(error).split())[:300]}") from error
        for key, task in loaded.items():
            if task.OUTPUT_TYPE == "generate_until":
                task.set_config("generation_kwargs", sampling.options(), update=True)
            if own:
                task.set_config("repeats", sampling.samples)
            if task.get_config("num_fewshot") is None:
                task.set_config("num_fewshot", 0)
            task.set_fewshot_seed(1234)  # lm-eval's own
            built[name if own else ours.STOCK + key] = task
    return built


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
        "limit": limit,
        "tasks": {name: _facts(task, limit) for name, task in tasks.items()},
        "versions": {"tah": __version__, "python": platform.python_version()}
        | {name: version(name) for name in LIBRARIES},
        "started": time.strftime("%Y-%m-%d %H:%M:%S"),
    }


def _facts(task: Any, limit: int | None) -> dict[str, Any]:
    """What decides a task: its data and its prompt."""
    docs = list(task.eval_docs)[:limit]
    told = json.dumps(docs, sort_keys=True, default=str).encode()
    prompt = task.config.doc_to_text  # a function, in some of lm-eval's own, has no name that stays the same
    return {
        "questions": len(docs),
        "data": hashlib.sha256(told).hexdigest()[:16],
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
        write_text(scores, json.dumps(found["results"][task.task_name], default=str) + "\n")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's log, which repeats settings and warns of what is meant."""
    log = logging.getLogger("lm_eval")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)
