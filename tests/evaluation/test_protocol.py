"""Protocols of evaluation: what they ask, how they draw, what overrides them, and that they are not mixed."""

from __future__ import annotations

import json
import shutil

import pytest

from helpers.evaluations import ITEMS, Notes, go
from helpers.models import CHAT_TEMPLATE
from tah.evaluation.code_tasks import extract_code
from tah.evaluation.eval_files import Asked
from tah.evaluation.eval_report import as_markdown, compare
from tah.evaluation.evaluate import evaluate
from tah.evaluation.harness import TaHLM
from tah.evaluation.request import Sampling, build
from tah.evaluation.tasks import CODE, rows
from tah.evaluation.tasks.protocols import DEFAULT, PAPER, PROTOCOLS
from tah.names import NINE, TASKS
from tah.session import Session

FILES = {name: str(ITEMS / "math.jsonl") for name in ("gsm8k", "aime25", "amc23", "olympiadbench")}
FILES |= {"arc_e": str(ITEMS / "choice.jsonl"), "mbpp_plus": str(ITEMS / "mbpp.jsonl")}


def test_the_paper_asks_the_bare_question():
    built = build(list(FILES), FILES, Sampling(), PAPER)
    ours = build(list(FILES), FILES, Sampling(), DEFAULT)
    for name in ("gsm8k", "aime25", "olympiadbench"):
        doc = built[name].eval_docs[0]
        assert built[name].doc_to_text(doc) == doc["question"] != ours[name].doc_to_text(doc)
        assert "boxed" in ours[name].doc_to_text(doc)
    letters = built["arc_e"].eval_docs[0]  # its prompt is not published
    assert built["arc_e"].doc_to_text(letters) == ours["arc_e"].doc_to_text(letters)


def test_the_paper_begins_the_answer_to_a_programming_task(pupil):
    built = build(["mbpp_plus"], FILES, Sampling(), PAPER)["mbpp_plus"]
    doc = built.eval_docs[0]
    lm = TaHLM(str(pupil), batch_size=1)
    built.build_all_requests(limit=1, apply_chat_template=True, chat_template=lm.apply_chat_template)
    prompt = built.instances[0].args[0]
    asked, opened = prompt.split("<|im_start|>assistant\n")
    assert f"markdown code block:\n```\n{doc['prompt'].strip()}\n```\n" in asked
    assert opened.startswith("Below is a Python script") and opened.rstrip("\n").endswith("tests:\n```python")
    assert "<|im_end|>" not in opened  # the turn is open, so that the model goes on with it
    assert "im_start" in CHAT_TEMPLATE


def test_a_begun_program_is_read_whole(pupil):
    """The block that the prompt opened belongs to the answer, even where the model goes on with a remark."""
    lm = TaHLM(str(pupil), batch_size=1)
    options = {"until": [], "max_gen_toks": 4, "do_sample": False}
    (found,) = lm.generate_batch([Asked("t", 0, 0, "Below is a script:\n```python\n", options)])
    assert found.text.startswith("```python\n") and found.tokens <= 4
    assert extract_code("```python\n# adds\ndef add(a, b):\n    return a + b\n```\nIt adds.", "add").startswith(
        "# adds"
    )
    (found,) = lm.generate_batch([Asked("t", 0, 0, "Below is a script in ```python", options | {"max_gen_toks": 1})])
    assert found.text.startswith("```python\n")


def test_what_the_paper_draws():
    built = build(list(FILES), FILES, Sampling(), PAPER)
    assert {name: task.config.repeats for name, task in built.items()} == {
        "gsm8k": 1, "aime25": 8, "amc23": 8, "olympiadbench": 1, "arc_e": 1, "mbpp_plus": 1
    }  # fmt: skip
    drawing = Sampling().under(PAPER)
    assert (drawing.seed, drawing.temperature, drawing.top_p, drawing.top_k) == (42, 0.6, 0.95, 20)
    assert Sampling().under(DEFAULT).seed == 0 and Sampling().under(DEFAULT, "aime25").samples == 1
    overridden = Sampling(samples=2, seed=7, temperature=1.0)
    assert overridden.under(PAPER, "aime25").samples == 2 and overridden.under(PAPER).seed == 7
    with pytest.raises(
        ValueError, match=r"samples=8 \(protocol paper, task amc23\) at temperature 0 would be identical"
    ):
        build(["gsm8k", "amc23"], FILES, Sampling(temperature=0.0), PAPER)
    assert build(["amc23"], FILES, Sampling(temperature=0.0, samples=1), PAPER)["amc23"].config.repeats == 1


@pytest.mark.parametrize("protocol, hub", [(DEFAULT, "Hothan/OlympiadBench"), (PAPER, "realtreetune/olympiadbench")])
def test_sources(monkeypatch, protocol, hub):
    """Each protocol asks the Hub for its own data; a file given with --data comes before both."""
    asked = []

    def load_dataset(name, subset, split):
        asked.append((name, split))
        return [{"question": "q", "problem": "q", "answer": "1", "final_answer": ["$1$"]}]

    monkeypatch.setattr(rows, "load_dataset", load_dataset)
    (doc,) = build(["olympiadbench"], {}, Sampling(), protocol)["olympiadbench"].eval_docs
    assert asked == [(hub, "train" if protocol is DEFAULT else "test")]
    assert (doc["question"], doc["answer"]) == ("q", "1")
    assert len(build(["olympiadbench"], FILES, Sampling(), protocol)["olympiadbench"].eval_docs) == 5
    assert len(asked) == 1


def test_what_is_not_published_is_listed():
    listed = PAPER.ours(dict.fromkeys([*TASKS, "lm_eval:hellaswag"]))
    assert {"gpqa_diamond", "mmlu_redux", *CODE} <= listed.keys() and not {"aime25", "gsm8k"} & listed.keys()
    assert listed["lm_eval:hellaswag"] == "prompt and metrics of lm-eval"
    assert not DEFAULT.ours(dict.fromkeys(NINE)) and set(PROTOCOLS) == {"default", "paper"}
    assert PAPER.unpublished.keys() <= set(TASKS) and PAPER.samples.keys() | PAPER.sources.keys() <= set(TASKS)


@pytest.fixture(scope="module")
def paper(pupil, tmp_path_factory):
    directory = tmp_path_factory.mktemp("protocol") / "paper"
    progress = Notes()
    found = go(pupil, directory, protocol="paper", progress=progress)
    return directory, found, progress.lines


def test_a_run_records_its_protocol(pupil, paper, tmp_path):
    directory, found, notes = paper
    run = json.loads((directory / "run.json").read_text())
    assert run["protocol"] == "paper" and run["sampling"]["seed"] == 42
    assert run["overrides"]["samples"] == 2 and run["overrides"]["temperature"] == 0.7
    assert run["overrides"]["data"].keys() == {"gsm8k", "arc_e"} and run["ours"] == {"arc_e": "prompt"}
    assert notes == ["protocol paper: not published, so tah chose it: prompt (arc_e)"]
    assert "Protocol paper: avg@2, T 0.7" in as_markdown(found)
    given = "Options that override the protocol: samples 2, temperature 0.7, max_new_tokens 24, data gsm8k="
    assert given in as_markdown(found)
    assert "Not published, so tah chose it: prompt (arc_e)." in as_markdown(found)
    with pytest.raises(ValueError, match=r"has an evaluation with protocol='paper' \(now 'default'\)"):
        go(pupil, directory)
    with pytest.raises(ValueError, match="unknown protocol 'papers'; did you mean paper. choose from default, paper"):
        go(pupil, tmp_path / "new", protocol="papers")


def test_samples_by_task_are_told(pupil, tmp_path):
    """8 samples of the task that has 8 in the paper, 1 of the other."""
    found = evaluate(
        str(pupil), ["gsm8k", "amc23"], tmp_path, data={name: FILES[name] for name in ("gsm8k", "amc23")},
        protocol="paper", policies=["never"], sampling=Sampling(max_new_tokens=24), limit=1, batch_size=9,
    )  # fmt: skip
    assert [(row["task"], row["questions"], row["answers"]) for row in found["results"]] == [
        ("gsm8k", 1, 1), ("amc23", 1, 8)
    ]  # fmt: skip
    assert "Protocol paper: avg@1 (amc23 avg@8), T 0.6" in as_markdown(found)
    assert compare(str(tmp_path), str(tmp_path))["comparisons"][0]["average"]["difference"]["value"] == 0


def test_protocols_are_not_compared(pupil, paper, tmp_path):
    go(pupil, tmp_path / "default")
    with pytest.raises(ValueError, match=r"cannot be compared: A has protocol='default' \(B has 'paper'\)"):
        compare(str(tmp_path / "default"), str(paper[0]))


def test_a_run_from_before_protocols_is_of_the_default(pupil, tmp_path):
    """It is continued, compared and reported as what it was."""
    go(pupil, tmp_path / "new")
    shutil.copytree(tmp_path / "new", tmp_path / "old")
    path = tmp_path / "old" / "run.json"
    run = json.loads(path.read_text())
    for name in ("protocol", "overrides", "ours", "dtype", "device"):
        del run[name]
    for facts in run["tasks"].values():
        del facts["samples"]
    path.write_text(json.dumps(run))
    again = go(pupil, tmp_path / "old")
    assert again["protocol"] == "default" and "Protocol default: avg@2" in as_markdown(again)
    found = compare(str(tmp_path / "new"), str(tmp_path / "old"))
    assert all(pair["average"]["difference"]["value"] == 0 for pair in found["comparisons"])


def test_a_run_goes_on_in_its_own_precision(pupil, tmp_path):
    """`--dtype auto` may mean another one on another machine."""
    found = go(pupil, tmp_path / "run", tasks=["gsm8k"], limit=1, data={"gsm8k": FILES["gsm8k"]})
    assert found["dtype"] == "float32" and found["device"] == "cpu"
    with pytest.raises(ValueError, match=r"dtype='float32' \(now 'bfloat16'\)"):
        go(pupil, tmp_path / "run", tasks=["gsm8k"], limit=1, data={"gsm8k": FILES["gsm8k"]}, dtype="bfloat16")


def test_the_prompt_of_the_paper_reaches_the_model(pupil, paper):
    """The lines keep a hash of what was asked: the template around the bare question."""
    from hashlib import sha256

    session = Session.open(str(pupil))
    question = json.loads((ITEMS / "math.jsonl").read_text().splitlines()[0])["question"]
    messages = [{"role": "user", "content": question}]
    prompt = session.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    line = json.loads((paper[0] / "samples" / "never" / "gsm8k.jsonl").read_text().splitlines()[0])
    assert line["prompt"] == sha256(prompt.encode()).hexdigest()[:16]
