"""`tah demo`: SmolLM2-135M answers three grade-school questions, each token coloured by the passes it took."""

from __future__ import annotations

import time
from typing import Any

from rich.rule import Rule
from rich.table import Table

from .load import quiet
from .session import CONFIDENCE_THRESHOLD as THRESHOLD
from .session import Answer, Session
from .terminal import Painter, make_console, printable, summary

QUESTIONS = (
    "Tom has 3 boxes with 4 apples each. He eats 2 apples. How many apples are left?",
    "A pencil costs 2 dollars and a book costs 5 dollars. How much do 3 pencils and 1 book cost?",
    "Lily reads 12 pages a day. How many pages does she read in one week?",
)
INTRODUCTION = (
    "SmolLM2-135M-Instruct, wrapped by TaHForCausalLM.from_base. Every token passes the model once. Where the model is "
    f"not sure of the next one (policy confidence, threshold {THRESHOLD}), the token at hand passes it again."
)
NOT_TRAINED = (
    "Nothing is trained yet: the adapter of the second pass starts at zero and the decider has seen no data, so the "
    "second pass is not expected to help, and here it often harms. This shows where it would act and what it costs."
)


def demo(
    *, max_new_tokens: int = 48, color: bool = True, questions: tuple[str, ...] = QUESTIONS
) -> list[dict[str, Any]]:
    """Print the demo; return what was measured, one entry per question and policy."""
    start = time.perf_counter()
    quiet()
    console = make_console(color=color)
    painter = Painter(console, THRESHOLD)
    session = Session.open("smollm2")
    console.print(INTRODUCTION)
    console.print(NOT_TRAINED, style="bold")
    console.print(painter.legend())
    measured = []
    for number, question in enumerate(questions, 1):
        console.print(Rule(f"{number}", style="dim"))
        console.print(question, style="bold")
        console.print("\nconfidence: ", end="", style="dim")
        answers = {"confidence": _answer(session, question, "confidence", max_new_tokens, painter.show)}
        console.print()
        console.print(_line(answers["confidence"]), style="dim")
        for policy in ("never", "always"):
            answers[policy] = _answer(session, question, policy, max_new_tokens, lambda token: None)
        console.print(_side_by_side(answers["never"], answers["always"]))
        measured += [
            {
                "question": question,
                "policy": policy,
                "text": answer.text,
                "seconds": answer.seconds,
                "depths": answer.depths,
            }
            for policy, answer in answers.items()
        ]
    console.print(Rule(style="dim"))
    console.print(_total(measured, time.perf_counter() - start))
    console.print(NOT_TRAINED, style="bold")
    return measured


def _answer(session: Session, question: str, policy: str, max_new_tokens: int, show: Any) -> Answer:
    ids = session.encode([{"role": "user", "content": question}])
    session.forget()  # each policy pays for the prompt
    rule = {"policy": policy, "threshold": THRESHOLD, "max_depth": 2}
    return session.answer(ids, show, max_new_tokens=max_new_tokens, do_sample=False, **rule)


def _line(answer: Answer) -> str:
    return summary(len(answer.tokens), answer.seconds, answer.depths)


def _side_by_side(never: Answer, always: Answer) -> Table:
    """Two columns: the plain base model, and every token twice."""
    table = Table(expand=True, box=None, padding=(1, 2, 0, 0))
    for header in ("never (the plain model)", "always (every token twice)"):
        table.add_column(header, ratio=1, header_style="dim", overflow="fold")
    table.add_row(printable(never.text), printable(always.text))
    table.add_row(_line(never), _line(always), style="dim")
    return table


def _total(measured: list[dict[str, Any]], seconds: float) -> str:
    """Tokens per second of each policy over all questions."""
    rates = []
    for policy in ("never", "confidence", "always"):
        runs = [run for run in measured if run["policy"] == policy]
        tokens = sum(len(run["depths"]) for run in runs)
        rates.append(f"{policy} {tokens / sum(run['seconds'] for run in runs):.1f} tokens/s")
    return f"{', '.join(rates)}; {seconds:.0f} s in all"
