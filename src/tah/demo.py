"""`tah demo`: the checkpoint in the box answers three questions, tokens coloured by depth, then held-out problems."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
from rich.rule import Rule
from rich.table import Table

from .load import quiet
from .session import Answer, Session
from .smollm2 import TAH
from .terminal import Painter, make_console, printable, summary
from .tracing.resample import Resampled
from .training.scores import last_number, score_answers

QUESTIONS = (
    "Tom has 3 boxes with 14 apples each. He eats 2 apples. How many apples are left?",
    "A pencil costs 2 dollars and a book costs 5 dollars. How much do 3 pencils and 1 book cost?",
    "Lily reads 12 pages a day. How many pages does she read in one week?",
)
INTRODUCTION = (
    "SmolLM2-135M-Instruct with a second pass, trained on word problems: adapter, maps and decider only, so that depth "
    "1 is the model as published. Every token passes the model once; where the decider says so, twice."
)
CAVEAT = (
    "This shows where a second pass acts on top of an untouched base, not that it is the way to teach one: a plain "
    "adapter of the same size, trained alike with a single pass, learns such problems faster (docs/results.md)."
)
POLICIES = ("never", "decider", "always")
LONGEST = 72  # tokens of an answer to a problem: as many as the longest worked one; some would never end


def demo(
    *, max_new_tokens: int = 64, problems: int = 100, color: bool = True, questions: tuple[str, ...] = QUESTIONS
) -> dict[str, Any]:
    """Print the demo; return what was measured.

    Args:
        max_new_tokens: of an answer to one of `questions`.
        problems: how many of the held-out ones to answer under each policy; 0 for none.
        color: False prints brackets in place of colours.
        questions: to answer one after another.
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
        console.print(Rule(f"{number}", style="dim"))
        console.print(question, style="bold")
        console.print("\ndecider: ", end="", style="dim")
        given = {"decider": _answer(session, question, "decider", max_new_tokens, painter.show)}
        console.print()
        console.print(_line(given["decider"]), style="dim")
        for policy in ("never", "always"):
            given[policy] = _answer(session, question, policy, max_new_tokens, lambda token: None)
        console.print(_side_by_side(given["never"], given["always"]))
        answers += [{"question": question, "policy": policy, **answer.as_dict()} for policy, answer in given.items()]
    scores = {}
    if problems:
        console.print(Rule(f"{problems} held-out problems, under each policy (minutes)", style="dim"))
        scores = _score(session, _problems()[:problems], console)
        console.print(_table(scores))
        console.print(CAVEAT, style="bold")
    console.print(f"{time.perf_counter() - start:.0f} s in all", style="dim")
    return {"answers": answers, "scores": scores}


def _answer(session: Session, question: str, policy: str, max_new_tokens: int, show: Any) -> Answer:
    ids = session.encode([{"role": "user", "content": question}])
    session.forget()  # each policy pays for the prompt
    return session.answer(ids, show, max_new_tokens=max_new_tokens, do_sample=False, policy=policy)


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


# -- held-out problems -------------------------------------------------------------------------------------------------


def _problems() -> list[dict[str, Any]]:
    """With `messages` and `answer`, of kinds that were trained on and of others, alternating."""
    return [json.loads(line) for line in (TAH / "problems.jsonl").read_text("utf-8").splitlines()]


def _score(session: Session, rows: list[dict[str, Any]], console: Any) -> dict[str, dict[str, Any]]:
    """By policy: `right` [R], seconds, iterated share of the tokens made."""
    scores: dict[str, dict[str, Any]] = {}
    for number, policy in enumerate(POLICIES, 1):
        start = time.perf_counter()
        with console.status(f"answering, policy {number} of {len(POLICIES)}: {policy}"):
            made = score_answers(
                session.model, session.tokenizer, rows, read=last_number, max_new_tokens=LONGEST, policy=policy
            )
        seconds = time.perf_counter() - start
        scores[policy] = {"right": made.right.tolist(), "iterated": made.iterated_share, "seconds": seconds}
    return scores


def _table(scores: dict[str, dict[str, Any]]) -> Table:
    """Right answers by policy, and what the decider changes, with 95 % bootstrap intervals over the problems."""
    right = {policy: np.array(its["right"], np.float64) for policy, its in scores.items()}
    drawn = Resampled(np.arange(len(right["never"])), seed=0)
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("policy", "right", "95 %", "decider less this", "95 %", "iterated", "seconds"):
        table.add_column(title, header_style="dim", justify="left" if title == "policy" else "right")
    for policy, its in scores.items():
        here, less = (
            drawn.estimate(drawn.mean(values)) for values in (right[policy], right["decider"] - right[policy])
        )
        compared = ("", "") if policy == "decider" else (f"{less['value']:+.1%}", _interval(less, "+"))
        share = (f"{here['value']:.1%}", _interval(here), *compared, f"{its['iterated']:.1%}")
        table.add_row(policy, *share, f"{its['seconds']:.0f}")
    return table


def _interval(estimate: dict[str, Any], sign: str = "") -> str:
    if estimate["low"] is None:
        return ""
    return f"{format(100 * estimate['low'], f'{sign}.1f')} to {format(100 * estimate['high'], f'{sign}.1f')}"
