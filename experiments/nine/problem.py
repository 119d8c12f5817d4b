"""Define what the nine tasks share: the vocabulary, the form of a problem, and how questions are chosen."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from tah.pipeline.experiment.tiny import SPECIAL

NAMES = ("follow", "swaps", "assign", "carry", "relations", "machine", "circuit", "insertion", "collatz")
SYMBOLS = tuple("012345678")
LETTERS = tuple("abcdef")
BLANK = "?"
PAIRS = tuple(f"{one}>{other}" for one in SYMBOLS for other in SYMBOLS)
LABELS = tuple(f"{symbol}{letter}" for symbol in SYMBOLS for letter in LETTERS)
WORDS = (*SPECIAL, BLANK, *NAMES, *SYMBOLS, *LETTERS, *PAIRS, *LABELS)
IDS = {word: at for at, word in enumerate(WORDS)}

QUESTIONS = 3  # questions about one line
ODDS = (1, 1, 2, 3)  # numbers of steps of a question, drawn with equal odds
FACTS = 13  # most words of a line before the questions
MADE = 2 * QUESTIONS + 1  # words that a model has to produce: three questions with their answers, and the end
LENGTH = 2 + FACTS + 2 * QUESTIONS + 1 + MADE  # tokens of a row: <|user|>, task, facts, questions, <|assistant|>, reply

Trace = Sequence[str]
Solve = Callable[[str, Mapping[str, str]], Trace]
Line = tuple[Iterable[str], Sequence[str], Solve]  # facts, words that may be asked about, and how to answer


@dataclass(frozen=True)
class Problem:
    """Represent a line, three questions about it, and how each answer is reached.

    Args:
        task: Name of the task, the first word of the line.
        facts: Words of the line before the questions.
        questions: Words that are asked about, all different.
        traces: For each question, the result after each step; the last result is the answer.
    """

    task: str
    facts: tuple[str, ...]
    questions: tuple[str, ...]
    traces: tuple[tuple[str, ...], ...]

    @property
    def answers(self) -> tuple[str, ...]:
        return tuple(trace[-1] for trace in self.traces)

    @property
    def line(self) -> str:
        """Return the text of the user: the task, the facts, and each question with a blank after it."""
        return " ".join([self.task, *self.facts, *(word for asked in self.questions for word in (asked, BLANK))])

    @property
    def reply(self) -> str:
        """Return the text of the assistant: the questions again, with the answers in place of the blanks."""
        return " ".join(word for pair in zip(self.questions, self.answers, strict=True) for word in pair)

    @property
    def tokens(self) -> list[int]:
        """Return the token ids of the conversation, at most `LENGTH`."""
        _, user, assistant, end = SPECIAL
        return [IDS[word] for word in (user, *self.line.split(), assistant, *self.reply.split(), end)]

    @property
    def mask(self) -> list[bool]:
        """Return for each token whether it is supervised; a problem is right if all these tokens are."""
        return [False] * (len(self.tokens) - MADE) + [True] * MADE

    @property
    def steps(self) -> list[int]:
        """Return for each token the number of steps that lead to it: 0 for all tokens but the answers."""
        made = [count for trace in self.traces for count in (0, len(trace))]
        return [0] * (len(self.tokens) - MADE) + [*made, 0]


def draw(task: str, rng: random.Random, line: Callable[[], Line]) -> Problem:
    """Draw a problem whose questions have numbers of steps as in `ODDS`.

    The numbers are drawn before the line, and lines are drawn until one has fitting questions. So the numbers of a
    problem are independent of each other, and their distribution is the same in every task.

    Args:
        task: Name of the task.
        rng: Source of randomness.
        line: Function that draws a line. It returns the facts, the words that may be asked about, and a function that
            maps a question and the questions already answered (with their answers) to the trace. The trace is empty if
            the question must not be asked.
    """
    wanted = rng.choices(ODDS, k=QUESTIONS)
    while True:
        facts, words, solve = line()
        answered: dict[str, str] = {}
        traces: list[tuple[str, ...]] = []
        for count in wanted:
            found = {word: tuple(solve(word, answered)) for word in words if word not in answered}
            fitting = [word for word, trace in found.items() if len(trace) == count]
            if not fitting:
                break
            word = rng.choice(fitting)
            traces.append(found[word])
            answered[word] = found[word][-1]
        else:
            return Problem(task, tuple(facts), tuple(answered), tuple(traces))
