r"""Protocols: the prompt, the sampling, the seed, the number of samples and the data sources of an evaluation.

The grader is not part of a protocol. `default` has one prompt for each kind of task, in the YAML files of this
directory. `paper` has the settings that the authors of Think-at-Hard published. Settings that they did not publish are
those of `default`, and `Protocol.ours` lists them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...names import STOCK_TASK
from . import CODE, rows


@dataclass(frozen=True)
class Source:
    """Data source of a task: arguments of `rows.load`."""

    hub: str
    split: str
    read: Callable[[rows.Row], rows.Row | None]
    subsets: tuple[str | None, ...] = (None,)


@dataclass(frozen=True)
class Drawing:
    """Sampling of the answers to a task.

    Args:
        samples: Number of answers per question. Their mean accuracy counts (avg@k).
        temperature: Temperature; 0 is greedy decoding.
        top_p: Cumulative probability of the candidate tokens.
        top_k: Number of candidate tokens; 0 means all.
        max_new_tokens: Maximum number of tokens of an answer.
        seed: Random seed. It is combined with the question and the sample number.
    """

    samples: int = 1
    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = 20
    max_new_tokens: int = 4096
    seed: int = 0

    @property
    def greedy(self) -> bool:
        """Whether decoding is greedy: the temperature is 0, or too small to divide by."""
        return self.temperature < 1e-3

    def options(self) -> dict[str, Any]:
        """Return the sampling as `generation_kwargs` of lm-eval."""
        if self.greedy:
            return {"max_gen_toks": self.max_new_tokens, "do_sample": False, "temperature": 0.0}
        drawn = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return {"max_gen_toks": self.max_new_tokens, "do_sample": True} | drawn


@dataclass(frozen=True)
class Protocol:
    """A protocol of evaluation.

    Args:
        name: `default` or `paper`.
        drawing: Sampling. `samples` overrides its number of samples.
        samples: Number of answers per question, by task, if it is not 1.
        questions: Templates of the user's turn by kind of task; by default those of the YAML files.
        openings: Templates of the beginning of the assistant's turn, by kind of task.
        sources: Data sources by task; by default those of the YAML files.
        unpublished: Settings that are not published, by task. `default` has them.
    """

    name: str
    drawing: Drawing = Drawing()
    samples: Mapping[str, int] = field(default_factory=dict)
    questions: Mapping[str, str] = field(default_factory=dict)
    openings: Mapping[str, str] = field(default_factory=dict)
    sources: Mapping[str, Source] = field(default_factory=dict)
    unpublished: Mapping[str, str] = field(default_factory=dict)

    def ours(self, tasks: Mapping[str, Any]) -> dict[str, str]:
        """Return the unpublished settings of these tasks, by task; empty for `default`."""
        stock = "prompt and metrics of lm-eval"
        left = {name: stock if name.startswith(STOCK_TASK) else self.unpublished.get(name) for name in tasks}
        return {name: what for name, what in left.items() if what and self.name != "default"}


DEFAULT = Protocol("default")

# The instruction and the opening are those of EvalPlus (evalplus.codegen), which the authors' evaluation uses.
PAPER = Protocol(
    "paper",
    drawing=Drawing(seed=42),
    samples={"aime25": 8, "amc23": 8},
    questions={
        "math": "{{question}}",
        "code": "Please provide a self-contained Python script that solves the following problem in a markdown code "
        "block:\n```\n{{prompt.strip()}}\n```\n",
    },
    openings={
        "code": "Below is a Python script with a self-contained function that solves the problem and passes "
        "corresponding tests:\n```python\n"
    },
    sources={
        "olympiadbench": Source("realtreetune/olympiadbench", "test", rows.plain),
        "gsm8k": Source("pss0204/gsm8k_test", "test", rows.gsm8k),
    },
    unpublished={
        **dict.fromkeys(("gpqa_diamond", "arc_c", "arc_e"), "prompt"),
        **dict.fromkeys(("mmlu_redux", "mmlu_stem"), "prompt, and which MMLU it is"),
        **dict.fromkeys(CODE, "the copy of the data on the Hub"),
        **dict.fromkeys(("aime24", "minerva"), "number of samples"),
        "aime26": "the task itself, which the paper does not have",
    },
)

PROTOCOLS = {protocol.name: protocol for protocol in (DEFAULT, PAPER)}
