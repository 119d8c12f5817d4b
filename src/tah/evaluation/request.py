"""The settings of an evaluation, with the checks that need no model, and the tasks of lm-eval for them."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from ..names import BACKENDS, POLICIES, STOCK_TASK, check_questions, expand_tasks, nearest, unknown
from ..policy import Rule
from ..processes import count
from ..session import Session
from ..vllm.installed import vllm_version
from . import tasks as ours
from .tasks.protocols import DEFAULT, PROTOCOLS, Drawing, Protocol

import lm_eval  # isort: skip  # the error of `harness.py` names the packages to install
from lm_eval.api import task as lm_eval_task  # isort: skip
from lm_eval.tasks import TaskManager  # isort: skip

STOCK_NAMES = re.compile(
    r"^(?:task|group|tag):[ \t]*[\"']?([\w.+-]+)", re.MULTILINE
)  # task names in lm-eval's YAML files


@dataclass(frozen=True)
class Sampling:
    """Fields of `Drawing` that override those of the protocol. None keeps the protocol's value."""

    samples: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    max_new_tokens: int | None = None
    seed: int | None = None

    def given(self) -> dict[str, Any]:
        """Return the fields that override the protocol."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def under(self, protocol: Protocol, task: str | None = None) -> Drawing:
        """Return the sampling of a task under a protocol.

        Args:
            protocol: Protocol whose values apply where this object has None.
            task: Name of a task. Without it, the sampling of tasks for which the protocol has no entry of their own.

        Raises:
            ValueError: There are several samples at temperature 0, which would be identical.
        """
        drawing = replace(protocol.drawing, **({"samples": protocol.samples.get(task or "", 1)} | self.given()))
        if drawing.samples > 1 and drawing.greedy:
            where = "" if self.samples else f" (protocol {protocol.name}, task {task})"
            raise ValueError(f"samples={drawing.samples}{where} at temperature 0 would be identical; give --samples 1")
        return drawing


@dataclass(frozen=True)
class Request:
    """Settings of an evaluation. The checks that need no model run when the object is made.

    Args:
        model: Path of a checkpoint directory, Hub id, name of a bundled model, or open session.
        tasks: Names of `tah.names.TASKS`, `nine`, or `lm_eval:NAME` for a task of lm-eval.
        output: Directory of the answers and results.
        rules: Rules with policies by name. Each one answers all tasks. By default the policy of the checkpoint.
        protocol: `default`, or `paper` for the settings that the authors published (`tasks/protocols.py`).
        sampling: Values that override the protocol.
        limit: Maximum number of questions of each task, from the first.
        data: JSONL files by task, used instead of the Hub (`tasks/rows.py` has the schema).
        reference: Reference model of the policy `oracle`.
        raw: Whether to leave out the chat template.
        batch_size: Number of answers computed together; by default 1, or vLLM's choice.
        backend: `transformers` (`TaHForCausalLM.generate`), or `vllm` for large runs.
        engine: More options of `vllm.LLM`.
        allow_code_execution: Whether to run programs that the model writes, in a sandbox. Code benchmarks need it.
        dtype: Precision. `auto` is the checkpoint's if the device computes in it natively, else float32.
        device: Device. `auto` is CUDA, else MPS, else the CPU.

    Raises:
        ValueError: A value does not exist, or cannot be combined with another. The message names a solution.
        ImportError: The backend is vLLM, which is not installed.
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
            raise ValueError(f"engine={dict(self.engine)!r} needs backend='vllm'")
        if "oracle" in policies and self.reference is None:
            raise ValueError("policy oracle needs a reference model: give --reference MODEL")
        check_questions(self.data, self.tasks)
        if (code := [name for name in self.tasks if name in ours.CODE]) and not self.allow_code_execution:
            raise ValueError(
                f"{', '.join(code)} runs programs that the model writes; give --allow-code-execution to run them in a "
                "sandbox, or leave out the benchmark"
            )

    def _check_vllm(self) -> None:
        if any(rule.policy == "oracle" for rule in self.rules):
            raise ValueError(
                "policy oracle runs a reference model on every token, which vLLM does not support; "
                "use --backend transformers"
            )
        if self.device != "auto":
            raise ValueError(f"device {self.device!r}: vLLM uses the device it was built for; leave out --device")
        if not isinstance(self.model, str):
            raise ValueError(
                "backend='vllm' loads the checkpoint itself; give its directory or Hub id, not an open session"
            )
        if taken := sorted({"model", "dtype", "hf_overrides", "additional_config"} & self.engine.keys()):
            raise ValueError(f"engine[{taken[0]!r}] follows from the other arguments; leave it out")
        if not self.drawing.greedy and self.drawing.temperature < 0.01:
            given = self.drawing.temperature
            raise ValueError(f"temperature {given}: vLLM samples at 0.01 or more; give 0.01, or --greedy")
        if (processes := count()) > 1:
            raise ValueError(
                f"--backend vllm runs in one process, not in {processes}; start tah eval without torchrun and "
                "accelerate launch, or use --backend transformers"
            )
        try:
            vllm_version("eval")
        except ImportError as error:
            raise ImportError(f"--backend vllm: {error}") from None

    @property
    def asking(self) -> Protocol:
        """The protocol."""
        return PROTOCOLS[self.protocol]

    @property
    def drawing(self) -> Drawing:
        """Sampling of the tasks for which the protocol has no entry of their own."""
        return self.sampling.under(self.asking)


def build(
    names: Sequence[str], data: Mapping[str, str | Path], sampling: Sampling, protocol: Protocol = DEFAULT
) -> dict[str, Any]:
    """Return lm-eval's task objects by the names of this package, in the order of `names`.

    Args:
        names: Names of tasks.
        data: JSONL files by task.
        sampling: Values that override the protocol.
        protocol: Protocol of the prompts, sources and sampling.

    Raises:
        ValueError: A task does not exist, cannot be loaded, or is a task of lm-eval that runs programs.
    """
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
            raise ValueError(
                f"{name} runs programs of the model without a sandbox; use humaneval_plus or mbpp_plus instead"
            )
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
            task.set_fewshot_seed(1234)  # lm-eval's default
            built[name if own else STOCK_TASK + key] = task
    return built


def _ask(task: Any, protocol: Protocol) -> None:
    """Set the prompts of one of our tasks to those of the protocol."""
    kind = task.config.dataset_kwargs["kind"]
    if kind in protocol.questions:
        task.set_config("doc_to_text", protocol.questions[kind])
    if kind in protocol.openings:
        task.set_config("gen_prefix", protocol.openings[kind])


def _check_stock(names: Sequence[str]) -> None:
    """Check that the files of lm-eval contain these task names.

    This takes seconds. Building lm-eval's own index takes almost a minute.

    Raises:
        ValueError: A name is in no file. The message has the most similar name.
    """
    known, unseen = set[str](), set(names)
    for path in (Path(lm_eval.__file__).parent / "tasks").rglob("*"):
        if path.suffix not in ("", ".yaml") or not path.is_file():  # included files have no suffix
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


@contextmanager
def quiet() -> Iterator[None]:
    """Hide the warnings of lm-eval and of the Hub, and lm-eval's bar while it writes prompts.

    lm-eval logs settings and warns about intended choices. The Hub logs every retry without a network; the final error
    is enough. TQDM_DISABLE comes too late for the bar if the command runs as `python -m tah`, which imports tqdm first.
    """
    levels = {log: log.level for log in map(logging.getLogger, ("lm_eval", "huggingface_hub", "datasets"))}
    for log in levels:
        log.setLevel(logging.ERROR)
    bar, lm_eval_task.tqdm = lm_eval_task.tqdm, functools.partial(lm_eval_task.tqdm, disable=True)
    try:
        yield
    finally:
        lm_eval_task.tqdm = bar
        for log, level in levels.items():
            log.setLevel(level)
