"""Test the nine tasks: right answers by other solvers, numbers of steps, what one step is worth, splits and rows."""

from __future__ import annotations

import itertools
import random
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parents[1] / "experiments"
sys.path.insert(0, str(ROOT))

import nine  # noqa: E402
from nine.machine import CHANGE  # noqa: E402
from nine.problem import BLANK, IDS, LENGTH, MADE, NAMES, QUESTIONS  # noqa: E402
from nine.rows import Rows, question, tokenizer  # noqa: E402
from tah.data.assistant_mask import encode  # noqa: E402
from tah.data.rows import Collator  # noqa: E402

Problem = nine.Problem
every_task = pytest.mark.parametrize("task", nine.TASKS)


@cache
def drawn(task: str, count: int, seed: int = 0) -> list[Problem]:
    return nine.TASKS[task](random.Random(seed), count)


# -- other solvers: each reads the text of the user, and returns the answers and numbers of steps --------------------


def parsed(problem: Problem) -> tuple[list[str], list[str]]:
    words = problem.line.split()
    assert words[0] == problem.task and words[-2 * QUESTIONS + 1 :: 2] == [BLANK] * QUESTIONS
    return words[1 : -2 * QUESTIONS], words[-2 * QUESTIONS :: 2]


def pairs(facts: list[str]) -> list[tuple[int, int]]:
    return [(int(fact[0]), int(fact[2])) for fact in facts]


def solve_follow(facts: list[str], asked: list[str]) -> list[tuple[str, int]]:
    """Apply the whole map to itself; a place takes as many steps as maps are needed until it does not change."""
    once = np.array([target for _, target in sorted(pairs(facts))])
    powers = [np.arange(len(once))]
    for _ in range(len(once)):
        powers.append(once[powers[-1]])
    return [
        (
            str(powers[-1][int(word)]),
            next(n for n, power in enumerate(powers) if power[int(word)] == powers[-1][int(word)]),
        )
        for word in asked
    ]


def solve_swaps(facts: list[str], asked: list[str]) -> list[tuple[str, int]]:
    """Keep the ball of every cup, and count its moves."""
    cups, moves = list(range(9)), Counter()
    for one, other in pairs(facts)[::2]:
        moves.update((cups[one], cups[other]))
        cups[one], cups[other] = cups[other], cups[one]
    return [(str(cups.index(int(word))), moves[int(word)]) for word in asked]


def solve_assign(facts: list[str], asked: list[str]) -> list[tuple[str, int]]:
    """Run the assignments forwards, with the number of copies beside each value."""
    memory = {name: (str(name), 0) for name in range(9)}
    for to, source in pairs(facts):
        value, copies = memory[source]
        memory[to] = (value, copies + 1)
    return [memory[int(word)] for word in asked]


def solve_carry(facts: list[str], asked: list[str]) -> list[tuple[str, int]]:
    """Add whole numbers; the carry is decided at the first column whose digits do not add up to 8."""
    columns = pairs(facts)
    one, other = (int("".join(map(str, digits)), 9) for digits in zip(*columns, strict=True))
    total = one + other
    found = []
    for column in map(int, asked):
        digit = total // 9 ** (len(columns) - 1 - column) % 9
        decided = next(at for at in range(column + 1, len(columns)) if sum(columns[at]) != 8)
        found.append((str(digit), decided - column))
    return found


CORNERS = {  # where each relation moves the corners of a triangle: turned by 0, 1, 2 corners, and then flipped or not
    letter: tuple((-corner if flip else corner) % 3 for corner in ((start + turn) % 3 for start in range(3)))
    for (flip, turn), letter in zip(itertools.product((False, True), range(3)), "abcdef", strict=True)
}


def solve_relations(facts: list[str], asked: list[str]) -> list[tuple[str, int]]:
    """Move the corners of a triangle along the way."""
    above, relation = {}, {}
    for word in facts:
        if len(word) == 3:
            above[word[0]] = word[2]
        else:
            relation[word[0]] = word[1]
    found = []
    for place in asked:
        corners, count = (0, 1, 2), 0
        while above[place] != place:
            corners = tuple(CORNERS[relation[place]][corner] for corner in corners)
            place, count = above[place], count + 1
        found.append((next(letter for letter, moved in CORNERS.items() if moved == corners), count))
    return found


def solve_machine(facts: list[str], asked: list[str]) -> list[tuple[str, int]]:
    """Run all start states at once."""
    final, letters = facts[:3], facts[3:]
    states, counts, running = list(asked), [0] * len(asked), [True] * len(asked)
    for letter in letters:
        for at, state in enumerate(states):
            if running[at]:
                states[at], counts[at] = CHANGE[letter][state], counts[at] + 1
                running[at] = states[at] not in final
    return list(zip(states, counts, strict=True))


def solve_circuit(facts: list[str], asked: list[str]) -> list[tuple[str, int]]:
    """Compute each value from all inputs, and the level of a gate by recursion over the certificates of its value."""
    reads = defaultdict(list)
    for gate, _, wire in facts:
        reads[gate].append(wire)

    def value(wire: str) -> bool:
        return wire == "1" if wire in "01" else not all(map(value, reads[wire]))

    def level(wire: str) -> int:
        if wire in known:
            return 0
        zeros = [level(one) for one in reads[wire] if not value(one)]
        return 1 + (min(zeros) if zeros else max(map(level, reads[wire])))

    known, found = {"0", "1"}, []
    for gate in asked:
        found.append((str(int(value(gate))), level(gate)))
        known.add(gate)
    return found


def solve_insertion(facts: list[str], asked: list[str]) -> list[tuple[str, int]]:
    """Insert into a list, and count how often each thing moves."""
    row: list[int] = []
    steps = Counter()
    for thing, place in pairs(facts):
        steps.update([thing, *row[place:]])
        row.insert(place, thing)
    return [(str(row.index(int(word))), steps[int(word)]) for word in asked]


def solve_collatz(facts: list[str], asked: list[str]) -> list[tuple[str, int]]:
    """Look up the whole sequence in a table of the rule."""
    ((even, odd),) = pairs(facts[:1])
    rule = {str(n): str((n * 3 + odd) % 9 if n % 2 else (n // 2 + even) % 9) for n in range(9)}
    found = []
    for word in asked:
        sequence = list(itertools.accumulate(range(9), lambda number, _: rule[number], initial=word))[1:]
        count = next(n for n, number in enumerate(sequence, 1) if number in facts[1:])
        found.append((sequence[count - 1], count))
    return found


SOLVERS = {
    "follow": solve_follow,
    "swaps": solve_swaps,
    "assign": solve_assign,
    "carry": solve_carry,
    "relations": solve_relations,
    "machine": solve_machine,
    "circuit": solve_circuit,
    "insertion": solve_insertion,
    "collatz": solve_collatz,
}


@every_task
def test_answers_and_steps_are_those_of_another_solver(task):
    for problem in drawn(task, 1000):
        assert list(zip(problem.answers, map(len, problem.traces), strict=True)) == SOLVERS[task](*parsed(problem))


def test_no_question_is_on_the_way_of_a_later_one():
    """An answer that is already in the text would save steps."""
    for task in ("follow", "assign", "collatz"):
        for problem in drawn(task, 1000):
            for at, trace in enumerate(problem.traces):
                assert not set(trace[:-1]) & set(problem.questions[:at])
    for problem in drawn("relations", 1000):
        above = {fact[0]: fact[2] for fact in problem.facts if len(fact) == 3}
        for at, place in enumerate(problem.questions):
            while (place := above[place]) != above[place]:
                assert place not in problem.questions[:at]
    for problem in drawn("carry", 1000):  # the carry of an answered column is not open at a later question
        assert all(sum(pairs(problem.facts)[int(column)]) != 8 for column in problem.questions[1:])


def test_the_example_of_the_docstring_is_right():
    (example,) = re.findall(r"^    (\w.*)$", nine.__doc__, re.MULTILINE)
    line, reply = re.split(r"\s+->\s+", example)
    task, *words = line.split()
    answers = SOLVERS[task](words[:-6], words[-6::2])
    assert reply.split() == [
        word for asked, (answer, _) in zip(words[-6::2], answers, strict=True) for word in (asked, answer)
    ]


def test_the_solver_of_another_task_is_wrong():
    """The check above can fail: `swaps` and `assign` have the same words and another meaning."""
    wrong = [
        [answer for answer, _ in solve_swaps(*parsed(problem))] != list(problem.answers)
        for problem in drawn("assign", 200)
    ]
    assert np.mean(wrong) > 0.9


@every_task
def test_traces_change_where_a_step_matters(task):
    """At least half of the answers of two or three steps differ from the result of the first step."""
    deep = [trace for problem in drawn(task, 1000) for trace in problem.traces if len(trace) > 1]
    assert np.mean([trace[0] != trace[-1] for trace in deep]) > 0.45


# -- what one step is worth ------------------------------------------------------------------------------------------


def right(task: str, key: Callable[[int, tuple[str, ...]], Hashable]) -> np.ndarray:
    """Return which answers `[problems, QUESTIONS]` the best table from keys to answers gets right.

    The table has the most frequent answer of each key in 9,000 problems; others are scored.
    """
    every = drawn(task, 12_000)
    counts: dict[Hashable, Counter[str]] = defaultdict(Counter)
    for problem in every[:9000]:
        for at, trace in enumerate(problem.traces):
            counts[key(at, trace)][trace[-1]] += 1
    best = {seen: count.most_common(1)[0][0] for seen, count in counts.items()}
    return np.array(
        [[best.get(key(at, trace)) == trace[-1] for at, trace in enumerate(p.traces)] for p in every[9000:]]
    )


def one_step(task: str) -> np.ndarray:
    return right(task, lambda at, trace: (at, trace[0], len(trace) == 1))


@every_task
def test_one_step_is_not_enough_and_the_table_has_its_accuracy(task):
    (row,) = [line for line in nine.__doc__.splitlines() if line.startswith(f"| {task} ")]
    stated = [float(cell) for cell in re.findall(r"\| (\.\d\d) ", row)]
    found = one_step(task)
    assert [found.mean(), found.all(1).mean()] == pytest.approx(stated, abs=0.02)
    assert found.mean() < 0.8 and found.all(1).mean() < 0.5
    full = right(task, lambda at, trace: trace)
    assert full.all()  # the control: with all steps, the same table is always right


@every_task
def test_without_a_step_answers_are_guesses(task):
    guessed = right(task, lambda at, trace: at)
    assert guessed.mean() < (0.7 if task == "circuit" else 0.25) and guessed.all(1).mean() < 0.3


@every_task
def test_the_second_step_looks_up_the_first_result_only_in_three_tasks(task):
    """A lookup: a fact has the results of both steps."""
    deep = [(set(p.facts), trace) for p in drawn(task, 2000) for trace in p.traces if len(trace) > 1]
    looked = np.mean([bool({f"{a}>{b}", f"{b}>{a}"} & facts) for facts, (a, b, *_) in deep])
    assert looked == 1 if task in nine.LOOKUPS else looked < 0.4
    assert len(set(nine.TASKS) - set(nine.LOOKUPS)) == 6


# -- numbers of steps ------------------------------------------------------------------------------------------------


@every_task
def test_numbers_of_steps_are_distributed_as_stated_and_independent(task):
    counts = np.array([[len(trace) for trace in problem.traces] for problem in drawn(task, 12_000)])
    shares = [(counts == n).mean(0) for n in (1, 2, 3)]  # [QUESTIONS] each
    for share, stated in zip(shares, (0.5, 0.25, 0.25), strict=True):
        assert share == pytest.approx(stated, abs=0.02)
    both = ((counts[:, 0] == 1) & (counts[:, 1] == 1)).mean()
    assert both == pytest.approx(0.25, abs=0.02)


@every_task
def test_the_line_does_not_tell_the_number_of_steps(task):
    """No word at any place of the line predicts the number of steps much better than always 1, which is right in half.

    In `carry`, the column to the right of a question reveals whether its carry is open, and no more.
    """
    every = drawn(task, 12_000)
    lines = np.array([[IDS[word] for word in problem.line.split()] for problem in every])  # one length per task
    counts = np.array([[len(trace) for trace in problem.traces] for problem in every])
    accuracy = []
    for words, numbers in itertools.product(lines.T, counts.T):
        table = np.zeros((len(IDS), 4))
        np.add.at(table, (words[:9000], numbers[:9000]), 1)
        accuracy.append((table.argmax(1)[words[9000:]] == numbers[9000:]).mean())
    assert max(accuracy) < (0.78 if task == "carry" else 0.55)


# -- splits, rows and tokens -----------------------------------------------------------------------------------------


@every_task
def test_no_facts_are_in_two_splits(task):
    seen: dict[str, set[tuple[str, ...]]] = {}
    for split, count in (("train", 1500), ("validation", 300), ("test", 300)):
        found = list(itertools.islice(nine.problems(task, split, seed=3), count))
        seen[split] = {tuple(sorted(problem.facts)) for problem in found}
        if split != "train":
            assert len({problem.line for problem in found}) == count
    assert not seen["train"] & (seen["validation"] | seen["test"]) and not seen["validation"] & seen["test"]
    every = Counter(nine.split_of(problem) for problem in drawn(task, 12_000))
    assert [every[split] / 12_000 for split in nine.SPLITS] == pytest.approx([0.7, 0.1, 0.2], abs=0.03)


def test_another_order_of_the_facts_is_in_the_same_split():
    rng = random.Random(0)
    for problem in drawn("collatz", 100) + drawn("follow", 100):
        facts = rng.sample(problem.facts, len(problem.facts))
        other = Problem(problem.task, tuple(facts), problem.questions[::-1], problem.traces)
        assert nine.split_of(other) == nine.split_of(problem)


@every_task
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**64), count=st.integers(0, 5))
def test_a_seed_determines_the_problems_and_rows_are_bounded(task, seed, count):
    made = nine.TASKS[task](random.Random(seed), count)
    assert made == nine.TASKS[task](random.Random(seed), count) and len(made) == count
    if count > 1:
        assert made != nine.TASKS[task](random.Random(seed + 1), count)
    for problem in made:
        tokens, mask, steps = problem.tokens, problem.mask, problem.steps
        assert len(tokens) == len(mask) == len(steps) <= LENGTH
        assert tokens[1] == IDS[task] and max(tokens) < len(IDS) < 256
        assert sum(mask) == MADE and all(mask[-MADE:])
        answers = [tokens[at] for at, count in enumerate(steps) if count]
        assert answers == [IDS[answer] for answer in problem.answers]
        assert [count for count in steps if count] == [len(trace) for trace in problem.traces]
        assert all(inside for inside, count in zip(mask, steps, strict=True) if count)
        assert len(set(problem.questions)) == QUESTIONS


def test_the_longest_row_fills_the_length():
    assert max(len(drawn(task, 1)[0].tokens) for task in nine.TASKS) == LENGTH
    assert tuple(nine.TASKS) == NAMES and len(NAMES) == 9


def test_copies_are_at_the_same_distance():
    """A model copies a question from the line, or a blank where the answer belongs, always as many tokens back."""
    for task in nine.TASKS:
        (problem,) = drawn(task, 1)
        reply = problem.tokens[-MADE:-1]
        line = problem.tokens[-2 * MADE : -MADE - 1]
        assert reply[::2] == line[::2] and set(line[1::2]) == {IDS[BLANK]}


def test_problems_are_mixed_in_turn_and_repeat_from_the_seed():
    first = list(itertools.islice(nine.mixed("train", seed=1), 45))
    assert [problem.task for problem in first] == [*NAMES] * 5
    assert first == list(itertools.islice(nine.mixed("train", seed=1), 45))
    assert first != list(itertools.islice(nine.mixed("train", seed=2), 45))


def test_rows_are_the_tokenizers():
    made = list(itertools.islice(nine.mixed("validation", seed=0), 90))
    rows, words = Rows(made), tokenizer()
    assert len(words) == len(IDS)
    for at, problem in enumerate(made):
        ids, supervised = encode(question(problem), words)
        assert rows[at]["input_ids"].tolist() == list(ids) == problem.tokens
        assert rows[at]["supervised"].tolist() == list(supervised) == problem.mask
        assert rows.steps[at, : rows.lengths[at]].tolist() == problem.steps
        assert not rows.ids[at, rows.lengths[at] :].any() and not rows.steps[at, rows.lengths[at] :].any()
    batch = Collator(words.pad_token_id)([rows[at] for at in range(9)])
    assert batch["input_ids"].shape == (9, LENGTH) and (batch["labels"] != -100).sum() == 9 * MADE


@pytest.mark.parametrize(
    ("task", "split", "message"), [("hops", "train", "task 'hops' is not one of"), ("carry", "dev", "split 'dev' is")]
)
def test_unknown_names_raise(task, split, message):
    with pytest.raises(ValueError, match=message):
        next(nine.problems(task, split, 0))
