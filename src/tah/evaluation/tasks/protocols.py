r"""What fixes an evaluation besides the model: the prompt, the sampling, the seed, the samples and the sources.

The grader is never part of a protocol. `default` is ours: one prompt for each kind of task, in the YAML files of this
folder. `paper` follows what the authors of Think-at-Hard published about their evaluation; where they published
nothing, `default` fills in, and `Protocol.ours` names it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ...names import STOCK_TASK
from . import CODE, rows


@dataclass(frozen=True)
class Source:
    """Where the questions of a task come from, as `rows.load` takes it."""

    hub: str
    split: str
    read: Callable[[rows.Row], rows.Row | None]
    subsets: tuple[str | None, ...] = (None,)


@dataclass(frozen=True)
class Drawing:
    """How the answers to a task are drawn.

    Args:
        samples: answers to each question, whose mean counts (avg@k).
        temperature: 0 takes the most probable token.
        top_p: tokens are drawn from the most probable ones up to this mass.
        top_k: and from at most so many; 0 means all.
        max_new_tokens: where an answer is cut off.
        seed: decides what is drawn, with the question and the number of the sample.
    """

    samples: int = 1
    temperature: float = 0.6
    top_p: float = 0.95
    top_k: int = 20
    max_new_tokens: int = 4096
    seed: int = 0

    @property
    def greedy(self) -> bool:
        """Whether only the most probable token is taken: this temperature is too small to divide by."""
        return self.temperature < 1e-3

    def options(self) -> dict[str, Any]:
        """As lm-eval's `generation_kwargs`."""
        if self.greedy:
            return {"max_gen_toks": self.max_new_tokens, "do_sample": False, "temperature": 0.0}
        drawn = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return {"max_gen_toks": self.max_new_tokens, "do_sample": True} | drawn


@dataclass(frozen=True)
class Protocol:
    """A protocol of evaluation.

    Args:
        name: `default` or `paper`.
        drawing: of the tasks that `samples` does not name.
        samples: how many answers a question of a task gets, where it is more than one.
        questions: templates of the user's turn by kind of task, where they are not those of the YAML files.
        openings: templates of the words that begin the assistant's turn, by kind of task.
        sources: of the questions by task, where they are not those of the YAML files.
        unpublished: what the protocol leaves to `default`, by task.
    """

    name: str
    drawing: Drawing = Drawing()
    samples: Mapping[str, int] = field(default_factory=dict)
    questions: Mapping[str, str] = field(default_factory=dict)
    openings: Mapping[str, str] = field(default_factory=dict)
    sources: Mapping[str, Source] = field(default_factory=dict)
    unpublished: Mapping[str, str] = field(default_factory=dict)

    def ours(self, tasks: Mapping[str, Any]) -> dict[str, str]:
        """What of these tasks the protocol does not fix, by task: `default` decides it."""
        stock = "prompt and metrics of lm-eval"
        left = {name: stock if name.startswith(STOCK_TASK) else self.unpublished.get(name) for name in tasks}
        return {name: what for name, what in left.items() if what and self.name != "default"}


DEFAULT = Protocol("default")

# The instruction and the opening are EvalPlus' own (evalplus.codegen), which the authors' evaluation uses.
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
