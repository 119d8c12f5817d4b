"""`tah demo`: the two checkpoints in the box. SmolLM2 with a second pass answers three questions, tokens coloured by
depth; a small model, in which a second pass helps, answers problems it has not seen."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
from rich.console import Console
from rich.rule import Rule as Line
from rich.table import Table

from tah.load import FOLLOW, quiet
from tah.pipeline.experiment.scores import score_answers
from tah.policy import Rule
from tah.session import Answer, Session
from tah.stats.bootstrap import Resampled

from .terminal import Painter, make_console, printable, summary

LONGEST = 12  # tokens of an answer to a problem
QUESTIONS = (
    "Tom has 3 boxes with 14 apples each. He eats 2 apples. How many apples are left?",
    "A pencil costs 2 dollars and a book costs 5 dollars. How much do 3 pencils and 1 book cost?",
    "Lily reads 12 pages a day. How many pages does she read in one week?",
)
INTRODUCTION = (
    "SmolLM2-135M-Instruct with a second pass, trained on word problems: adapter, maps and decider only, so that depth "
    "1 is the model as published. Every token passes the model once; where the decider says so, twice. It shows where "
    "a second pass acts, not that it is the way to teach this model: a plain adapter learns such problems faster."
)
TASK = (
    "A small model made for one question: what does a second pass add? Follow the arrows from the last word until one "
    "leads to itself. One pass finds one arrow; how many there are, the line does not say."
)
POLICIES = ("never", "decider", "always")


def demo(
    *, max_new_tokens: int = 64, problems: int = 100, color: bool = True, questions: tuple[str, ...] = QUESTIONS
) -> dict[str, Any]:
    """Print the demo; return what was measured.

    Args:
        max_new_tokens: of an answer to one of `questions`.
        problems: how many held-out ones the small model is to answer under each policy; 0 for none.
        color: False prints brackets in place of colours.
        questions: to SmolLM2, one after another.
    """
    start = time.perf_counter()
    quiet()
    console = make_console(color=color)
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
    scores = _follow(console, problems) if problems else {}
    console.print(f"{time.perf_counter() - start:.0f} s in all", style="dim")
    return {"answers": answers, "scores": scores}


def _answer(session: Session, question: str, policy: str, max_new_tokens: int, show: Any) -> Answer:
    ids = session.encode([{"role": "user", "content": question}])
    session.forget()  # each policy pays for the prompt
    return session.answer(ids, show, Rule(policy), max_new_tokens=max_new_tokens, do_sample=False)


def _line(answer: Answer) -> str:
    return summary(len(answer.tokens), answer.seconds, answer.depths)


def _side_by_side(never: Answer, always: Answer) -> Table:
    """Two columns: the plain base model, and every token twice."""
    table = Table(expand=True, box=None, padding=(1, 2, 0, 0))
    for header in ("never (SmolLM2 as published)", "always (every token twice)"):
        table.add_column(header, ratio=1, header_style="dim", overflow="fold")
    table.add_row(printable(never.text), printable(always.text))
    table.add_row(_line(never), _line(always), style="dim")
    return table


# -- where it helps ----------------------------------------------------------------------------------------------------


def _follow(console: Console, problems: int) -> dict[str, dict[str, Any]]:
    """The small model answers problems that it has not seen: one of a single arrow and two of two to look at, then
    all of them under each policy."""
    session = Session.open("follow-tah")
    painter = Painter(console, session.model.config.threshold)
    console.print(Line(f"{problems} new problems, under each policy", style="dim"))
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
            console.print(f" (right: {row['answer']}; arrows: {row['arrows']})", style="dim")
    console.print()
    scores = {policy: _score(session, rows, policy) for policy in POLICIES}
    console.print(_table(scores))
    console.print("Four seeds, and a baseline without a second pass: docs/results/evidence.md", style="dim")
    return scores


def _score(session: Session, rows: list[dict[str, Any]], policy: str) -> dict[str, Any]:
    """`right` [R], iterated share of the tokens made."""
    made = score_answers(session.model, session.tokenizer, rows, Rule(policy))
    return {"right": made.right.tolist(), "iterated": made.iterated_share}


def _table(scores: dict[str, dict[str, Any]]) -> Table:
    """Right answers by policy, and what the decider changes, with 95 % bootstrap intervals over the problems."""
    right = {policy: np.array(its["right"], np.float64) for policy, its in scores.items()}
    drawn = Resampled(np.arange(len(right["never"])), seed=0)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("policy", "right", "95 %", "decider minus it", "95 %", "iterated"):
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
