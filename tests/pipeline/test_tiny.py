"""The embedded experiment with the task `sums`: its data, the whole chain in miniature, and what its report says."""

from __future__ import annotations

import functools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from helpers.notes import Notes
from tah import TaHForCausalLM
from tah.core.next_input import NextInputMLP
from tah.data.assistant_mask import encode
from tah.decider import TaH2Decider
from tah.load import load_base, load_tah, load_tokenizer
from tah.pipeline.experiment.baselines import equal_steps
from tah.pipeline.experiment.report import paired, write_report
from tah.pipeline.experiment.report_text import as_markdown, statements
from tah.pipeline.experiment.scores import answer_of, proportion, score_answers, score_tokens
from tah.pipeline.experiment.sums import Sums
from tah.pipeline.experiment.tiny import check_disjoint, digest, distinct_rows, make_tokenizer, write_data
from tah.pipeline.run import Run
from tah.pipeline.steps import chain as chain_of
from tah.pipeline.steps import run
from tah.policy import Rule
from tah.progress import SILENT
from tah.stats.bootstrap import Resampled
from tah.training.recipe import Recipe
from tah.training.recipe_file import load_recipe, validated
from tah.training.trainer import CHECKPOINTS, TaHTrainer, last_checkpoint
from tah_cli.app import run as command

TRAINING = {"max_steps": 6, "per_device_train_batch_size": 4, "warmup_steps": 1, "logging_steps": 2}
MINIATURE = [
    *(f"data.generate.{name}" for name in ("train=40", "validation=8", "test=12", "max_terms=3", "max_digits=1")),
    *(f"base.scratch.{name}" for name in ("hidden_size=32", "intermediate_size=48", "num_attention_heads=2")),
    "model.decider.width=8",
    *(
        f"{part}.training.{name}={value}"
        for part in ("base.scratch", "backbone", "decider")
        for name, value in TRAINING.items()
    ),
]
MODEL = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
STAGE = MODEL | {"README.md", "run.json", "metrics.jsonl", "curves.png", "checkpoints"}
FILES = {
    "data": {"train.jsonl", "validation.jsonl", "test.jsonl"},
    "base": MODEL | {"training-run.json", "training-metrics.jsonl", "training-curves.png"},
    "reference": MODEL | {"training-run.json", "training-metrics.jsonl", "training-curves.png"},
    "labels/train": {"settings.json", "complete.json", "README.md", "data"},
    "labels/validation": {"settings.json", "complete.json", "README.md", "data"},
    "backbone": STAGE,
    "decider": STAGE | {"quality.json"},
    "report": {"report.md", "report.json", "answers.png", "sweep.png"},
    "steps": {f"{name}.json" for name in "data base reference label backbone decider report".split()},
    ".": {"recipe.yaml"},
}


def settings(**changed) -> Sums:
    sizes = {"train": 30, "validation": 5, "test": 5}
    shape = {"min_terms": 2, "max_terms": 4, "min_digits": 1, "max_digits": 2, "negative": False}
    return Sums(**sizes | shape | changed)


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return load_recipe("tiny-paper", MINIATURE)


@pytest.fixture(scope="module")
def chain(recipe, tmp_path_factory) -> Path:
    """Directory of a finished run."""
    directory = tmp_path_factory.mktemp("chain") / "run"
    run(recipe, directory, SILENT)
    return directory


def test_the_command_says_where_the_report_is(chain, tmp_path, capfd):
    shutil.copytree(chain, tmp_path / "run")
    assert command(["run", "tiny-paper", *MINIATURE, "--output", str(tmp_path / "run")]) == 0
    told = capfd.readouterr()
    assert told.out.splitlines() == [str(tmp_path / "run" / "decider")]
    assert told.err.splitlines()[-1] == f"tah: report: {tmp_path / 'run' / 'report' / 'report.md'}"
    assert "done before" in told.err and "again" not in told.err


# -- data ------------------------------------------------------------------------------------------------------------


def test_every_total_is_written_out_and_right():
    for row in distinct_rows(settings(), seed=3, count=30):
        question, working = (message["content"] for message in row["messages"])
        *lines, last = working.split("\n")
        begun = question.split(" ")[0]
        for line in lines:
            sum_, total = line.split(" = ")
            assert sum_.split(" ")[0] == begun and eval(sum_) == int(total) >= 0
            begun = total
        assert eval(question.removesuffix(" =")) == int(row["answer"]) and last == f"Answer: {row['answer']}"
        assert len(lines) == question.count("+") + question.count(" - ")


def test_totals_may_be_negative_where_allowed():
    answers = [int(row["answer"]) for row in distinct_rows(settings(negative=True), seed=3, count=30)]
    assert min(answers) < 0


def test_splits_are_disjoint(recipe, chain):
    asked = {}
    for name in ("train", "validation", "test"):
        rows = [json.loads(line) for line in (chain / "data" / f"{name}.jsonl").read_text().splitlines()]
        asked[name] = {digest(row["messages"][0]["content"]) for row in rows}
        assert len(asked[name]) == len(rows) == recipe.data.generate[name]
    assert not (asked["train"] & asked["test"] or asked["train"] & asked["validation"])
    assert not asked["test"] & asked["validation"]


def test_an_overlap_is_an_error():
    def row(question: str) -> dict:
        return {"messages": [{"role": "user", "content": question}]}

    check_disjoint({"train": [row("1 + 2 =")], "test": [row("2 + 1 =")]})
    with pytest.raises(ValueError, match=r"'1  \+ 2 =' is in train and in test"):
        check_disjoint({"train": [row("1 + 2 =")], "test": [row("1  + 2 =")]})
    with pytest.raises(ValueError, match="in train and in train"):
        check_disjoint({"train": [row("1 + 2 ="), row("1 + 2 =")]})


def test_a_seed_gives_its_own_data():
    first, again, other = (list(distinct_rows(settings(min_digits=2), seed, 30)) for seed in (0, 0, 1))
    assert first == again
    assert sum(row in first for row in other) < 3  # reasoning-gym's seeds 0 and 1 differ by one question


def test_too_few_questions():
    few = settings(max_terms=2, max_digits=1)  # 100 sums and 55 differences
    assert len(list(distinct_rows(few, 0, 155))) == 155
    with pytest.raises(ValueError, match="data.generate allows only 155 different questions, not 156"):
        list(distinct_rows(few, 0, 156))


def test_without_reasoning_gym_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(
        ValueError, match=r"^data.generate.task=sums needs reasoning-gym: pip install 'tah\[train,tiny\]'$"
    ):
        next(distinct_rows(settings(), 0, 1))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"max_term": 3}, "data.generate.max_term is unknown; did you mean max_terms?"),
        ({"min_terms": 5}, "data.generate.min_terms=5 is more than max_terms=4"),
        ({"task": "sum"}, "data.generate.task='sum' is unknown; did you mean sums? choose from sums, arrows"),
        ({"train": 0}, "data.generate.train=0: must be greater than or equal to 1"),
        ({"train": "many"}, "data.generate.train='many': must be a valid integer"),
    ],
)
def test_wrong_settings_are_one_line(tmp_path, recipe, change, says):
    generate = settings().model_dump() | change
    wrong = recipe.model_copy(update={"data": recipe.data.model_copy(update={"generate": generate})})
    with pytest.raises(ValueError) as error:
        write_data(wrong, tmp_path)
    assert str(error.value) == says and not (tmp_path / "data").exists()


def test_a_wrong_base_is_told_before_data_is_made(tmp_path, recipe):
    scratch = recipe.base.scratch | {"num_attention_heads": 3}
    wrong = recipe.model_copy(update={"base": recipe.base.model_copy(update={"scratch": scratch})})
    with pytest.raises(ValueError, match="base.scratch.hidden_size=32 must be an even multiple of num_attention_he"):
        write_data(wrong, tmp_path)
    assert not (tmp_path / "data").exists()


def test_a_missing_setting_is_named():
    with pytest.raises(ValueError, match="^data.generate.test is required"):
        validated(Sums, {"train": 3, "validation": 3}, "data.generate")


def test_tokenizer_keeps_digits_apart_and_marks_what_is_said():
    rows = list(distinct_rows(settings(), 0, 30))
    tokenizer = make_tokenizer((said["content"] for row in rows for said in row["messages"]), 320)
    ids, supervised = encode(rows[0], tokenizer)
    said = tokenizer.decode([token for token, flag in zip(ids, supervised, strict=True) if flag])
    assert said == rows[0]["messages"][1]["content"] + tokenizer.eos_token
    tokens = tokenizer.convert_ids_to_tokens(ids)
    assert all(len(token) == 1 for token in tokens if any(letter.isdigit() for letter in token))
    assert "\u0120+\u0120" in tokenizer.get_vocab() and tokenizer.decode(tokenizer("Z\u00fcrich 7")["input_ids"]) == (
        "Z\u00fcrich 7"
    )


# -- the chain -------------------------------------------------------------------------------------------------------


def test_the_run_directory_is_complete(chain):
    for place, names in FILES.items():
        found = {path.name for path in (chain / place).iterdir()}
        assert names <= found, f"{place} lacks {names - found}"
    assert {path.name for path in chain.glob(".*")} <= {".lock"}
    assert all(json.loads(path.read_text())["finished"] for path in (chain / "steps").iterdir())


def test_base_and_reference_are_plain_checkpoints(chain):
    start, trained = (AutoModelForCausalLM.from_pretrained(chain / name) for name in ("base", "reference"))
    assert start.config.model_type == trained.config.model_type == "llama"
    assert not torch.equal(start.model.embed_tokens.weight, trained.model.embed_tokens.weight)
    assert load_tokenizer(str(chain / "reference")).get_chat_template()


def test_a_second_run_skips_everything(recipe, chain):
    before = {path: path.stat().st_mtime_ns for path in chain.rglob("*") if path.is_file() and path.parent != chain}
    notes = []
    run(recipe, chain, Notes(notes))
    assert notes == [f"{name}: done before" for name in "data base reference label backbone decider report".split()]
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_two_runs_are_equal(recipe, chain, tmp_path):
    run(recipe, tmp_path / "run", SILENT)
    for name in ("base", "reference", "backbone", "decider"):
        a, b = (load_file(directory / name / "model.safetensors") for directory in (chain, tmp_path / "run"))
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a), name
    a, b = (json.loads((where / "report" / "report.json").read_text()) for where in (chain, tmp_path / "run"))
    assert a.pop("seconds").keys() == b.pop("seconds").keys() and a == b


SLOW = """
import sys, time
from pathlib import Path
from tah.training.recipe_file import load_recipe
from tah.pipeline.steps import run
from tah.training.trainer import TaHTrainer
real = TaHTrainer.compute_loss
def slow(self, *args, **kwargs):
    time.sleep(0.3)
    return real(self, *args, **kwargs)
TaHTrainer.compute_loss = slow
run(load_recipe("tiny-paper", sys.argv[2:]), Path(sys.argv[1]))
"""


def test_a_killed_base_goes_on(chain, tmp_path, monkeypatch):
    """SIGKILL in the middle: the rest of the steps is done, and the weights are those of a run that was left alone."""
    directory, overrides = tmp_path / "run", [*MINIATURE, "base.scratch.training.save_steps=1"]
    work = directory / "base" / "work" / "trained" / CHECKPOINTS
    with subprocess.Popen([sys.executable, "-c", SLOW, directory, *overrides], env=os.environ) as process:
        end = time.monotonic() + 100
        while last_checkpoint(work) is None:
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.02)
        process.kill()
    done = int(last_checkpoint(work).name.rpartition("-")[2])
    real, steps, notes = TaHTrainer.training_step, [], []
    monkeypatch.setattr(TaHTrainer, "training_step", lambda *a, **k: (steps.append(1), real(*a, **k))[1])
    recipe = load_recipe("tiny-paper", overrides)
    Run(recipe, directory, chain_of(recipe), Notes(notes)).make(["base"])
    assert notes == ["data: done before", "base: continues"] and 0 < len(steps) == TRAINING["max_steps"] - done
    assert {path.name for path in (directory / "base").iterdir()} >= FILES["base"] - {"work"}
    assert not (directory / "base" / "work").exists()
    again, before = (load_file(where / "base" / "model.safetensors") for where in (directory, chain))
    assert all(torch.equal(again[name], before[name]) for name in before)


def test_controls_are_further_models_and_rows(chain, tmp_path):
    shutil.copytree(chain, tmp_path / "run")
    wanted = load_recipe("tiny-paper", [*MINIATURE, "controls.equal_compute=true", "controls.blind=true"])
    notes = []
    run(wanted, tmp_path / "run", Notes(notes))
    done = [f"{name}: done before" for name in "data base reference label backbone decider".split()]
    assert notes[:8] == [*done, "standard_compute: begins", "blind: begins"] and notes[8].startswith("report: again")

    counts = [json.loads((chain / "labels" / x / "complete.json").read_text()) for x in ("train", "validation")]
    row = counts[0]["tokens"] / 40
    lines = [json.loads(line) for line in (chain / "backbone" / "metrics.jsonl").read_text().splitlines()]
    shares = [line["iterated_share"] for line in lines if "iterated_share" in line]
    assert len(shares) == 3 and 0 < min(shares)  # every two of the six steps
    passes = sum(2 * 4 * (row + share * counts[0]["supervised"] / 40) for share in shares)  # steps of 4 rows
    cost = 3 * passes + 6 * 4 * row + counts[0]["tokens"] + counts[1]["tokens"]  # decider and labels: no gradients
    steps = equal_steps(wanted, tmp_path / "run")
    assert steps == round(cost / (3 * 4 * row)) > 6
    lines = (tmp_path / "run" / "standard_compute" / "training-metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == steps

    found = json.loads((tmp_path / "run" / "report" / "report.json").read_text())
    assert set(found["answers"]) == {
        *("standard", "standard_compute", "never", "always", "decider", "confidence", "random", "blind")
    }
    assert set(found["tokens"]["decider"]) >= {
        f"minus_{name}" for name in ("standard", "standard_compute", "never", "blind")
    }
    assert found["tokens"]["blind"]["fixed"] is None and found["equal_compute_steps"] == steps
    blind = load_tah(str(tmp_path / "run" / "blind" / "decider"))
    assert (blind.config.attention, blind.config.policy) == ("blind", "decider")
    own = load_tah(str(chain / "decider"))
    assert not torch.equal(blind.get_input_embeddings().weight, own.get_input_embeddings().weight)
    text = (tmp_path / "run" / "report" / "report.md").read_text()
    assert "| baseline (equal compute) |" in text and "| blind |" in text and f"equal compute: {steps} steps" in text


def test_equal_compute_of_tah2_counts_side_passes_and_networks(chain, tmp_path, monkeypatch):
    """The baseline of the same chain has as many steps as cost what ran: 3 per token with gradients, 1 without."""
    for name in ("data", "base", "reference"):
        shutil.copytree(chain / name, tmp_path / name)
        (tmp_path / "steps").mkdir(exist_ok=True)
        shutil.copy(chain / "steps" / f"{name}.json", tmp_path / "steps")
    ran = {"first": 0, "deeper": 0, "side": 0, "decider": 0, "next_input": 0}  # tokens; of networks, in trained weights
    forward, again = TaHForCausalLM.forward, TaHForCausalLM._run_again

    @functools.wraps(forward)  # transformers reads its signature
    def count_first(self, *args, **kwargs):
        if self.training and kwargs["training"].side_passes:
            ran["first"] += int(kwargs["attention_mask"].sum())
        return forward(self, *args, **kwargs)

    def count_deeper(self, depth, cache, policy, tokens, active, embeds, alone=False):
        if self.training:
            assert torch.is_grad_enabled() is not alone
            ran["side" if alone else "deeper"] += len(active)
        return again(self, depth, cache, policy, tokens, active, embeds, alone)

    def weighted(network, name, tokens):
        """Count the weights that the tokens of each call use, 3 times with gradients."""
        right = network.forward

        def count(self, first, *rest):
            if self.training:
                each = 3 if torch.is_grad_enabled() else 1
                ran[name] += each * tokens(first) * sum(weight.numel() for weight in self.parameters())
            return right(self, first, *rest)

        monkeypatch.setattr(network, "forward", count)

    weighted(TaH2Decider, "decider", lambda state: len(state.positions))
    weighted(NextInputMLP, "next_input", len)
    monkeypatch.setattr(TaHForCausalLM, "forward", count_first)
    monkeypatch.setattr(TaHForCausalLM, "_run_again", count_deeper)
    small = [override for override in MINIATURE if not override.startswith("decider.")]
    depths = ["model.max_depth=3", "backbone.training.logging_steps=1"]
    wanted = load_recipe("tiny-tah2", [*small, *depths, "controls.equal_compute=true"])
    run(wanted, tmp_path, SILENT)
    assert min(ran.values()) > 0
    layers = load_tah(str(tmp_path / "backbone")).base.model.layers
    networks = (ran["decider"] + ran["next_input"]) / sum(weight.numel() for weight in layers.parameters())
    passes = 3 * (ran["first"] + ran["deeper"]) + ran["side"]
    steps = equal_steps(wanted, tmp_path)
    assert steps == pytest.approx(6 * (passes + networks) / (3 * ran["first"]), abs=1)
    assert steps > round(6 * passes / (3 * ran["first"])) + 1  # control: without the networks
    assert passes > 3.3 * (ran["first"] + ran["deeper"])  # control: without the side passes
    found = json.loads((tmp_path / "report" / "report.json").read_text())
    assert found["equal_compute_steps"] == steps and "minus_standard_compute" in found["tokens"]["decider"]
    lines = (tmp_path / "backbone" / "metrics.jsonl").read_text().replace("decisions", "x")
    (tmp_path / "backbone" / "metrics.jsonl").write_text(lines)  # as an older version wrote it
    with pytest.raises(ValueError, match=r"has no decisions; remove .*backbone to train that stage again"):
        equal_steps(wanted, tmp_path)


def test_look_ahead_runs_through_the_same_chain(chain, tmp_path):
    for name in ("data", "base", "reference"):
        shutil.copytree(chain / name, tmp_path / name)
        (tmp_path / "steps").mkdir(exist_ok=True)
        shutil.copy(chain / "steps" / f"{name}.json", tmp_path / "steps")
    notes = []
    recipe = load_recipe("tiny-lookahead", MINIATURE)
    run(recipe, tmp_path, Notes(notes))
    assert notes[:3] == [f"{name}: done before" for name in ("data", "base", "reference")]
    found = json.loads((tmp_path / "report" / "report.json").read_text())
    assert found["method"] == "lookahead" and found["parameters"]["tah"]["linear_maps"] > 0
    model = load_tah(str(tmp_path / "decider"))
    assert (model.config.attention, model.config.next_input, model.config.output) == ("own", "hidden", "zero_init")


def test_a_report_without_test_rows_uses_validation(recipe, chain, tmp_path):
    shutil.copytree(chain, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "data")
    shutil.rmtree(tmp_path / "run" / "reference")
    shutil.rmtree(tmp_path / "run" / "report")
    write_report(recipe, tmp_path / "run")
    found = json.loads((tmp_path / "run" / "report" / "report.json").read_text())
    assert found["answers"] == {} and "standard" not in found["tokens"] and "oracle" in found["tokens"]
    assert found["test"]["source"].startswith("validation") and found["test"]["rows"] == 8
    assert "no baseline trained on the same data" in found["statements"][0]


def test_a_report_needs_a_model(recipe, tmp_path):
    with pytest.raises(ValueError, match="decider does not exist"):
        write_report(recipe, tmp_path)
    assert not list(tmp_path.iterdir())


# -- what the report says --------------------------------------------------------------------------------------------


def test_token_scores_are_the_models_own(chain):
    tokenizer, reference = load_tokenizer(str(chain / "reference")), load_base(str(chain / "reference"))
    texts = [json.loads(line) for line in (chain / "data" / "test.jsonl").read_text().splitlines()]
    rows = [dict(zip(("input_ids", "supervised"), encode(row, tokenizer), strict=True)) for row in texts]
    plain = TaHForCausalLM.from_base(load_base(str(chain / "reference")), max_depth=1, lora_rank=0, decider=None)
    plain.config.policy = "never"
    found = score_tokens(plain, rows, tokenizer.pad_token_id, Rule())
    for place, row in enumerate(rows):  # one by one, unpadded
        logits = reference(torch.tensor([row["input_ids"]])).logits[0].detach().log_softmax(-1)
        target = torch.tensor(row["input_ids"])[1:]
        asked = torch.tensor(row["supervised"])[1:]
        loss = -logits[:-1].gather(1, target[:, None])[:, 0][asked]
        mine = found.row == place
        assert np.allclose(found.loss[mine], loss, atol=1e-5)
        assert (found.right[mine] == (logits[:-1].argmax(-1) == target)[asked].numpy()).all()
    assert (found.passes == 1).all() and found.share_of_all == 0


def test_answers_are_those_of_generating_alone(chain):
    tokenizer, model = load_tokenizer(str(chain / "decider")), load_tah(str(chain / "decider"))
    rows = [json.loads(line) for line in (chain / "data" / "test.jsonl").read_text().splitlines()][:3]
    found = score_answers(model, tokenizer, rows, Rule("always"))
    assert found.iterated_share == 1
    for row, text in zip(rows, found.texts, strict=True):
        ids = tokenizer.apply_chat_template(
            row["messages"][:1], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        alone = model.generate(**ids, policy="always", do_sample=False, max_new_tokens=20)
        said = tokenizer.decode(alone[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        assert text.startswith(said[:20]) and said


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("1 + 2 = 3\nAnswer: 3", "3"),
        ("Answer: 4 \nno, Answer: 5", "5"),
        ("so \\boxed{12}.", "12"),
        ("#### 8", "8"),
        ("1 + 2 = 3", None),
    ],
)
def test_the_final_answer_is_found(text, answer):
    assert answer_of(text) == answer


def test_intervals():
    right, rows = np.array([True] * 30 + [False] * 70), Resampled(np.arange(100), 2000)
    low, high = proportion(right)["interval"]
    assert low == pytest.approx(0.2189, abs=1e-4) and high == pytest.approx(0.3958, abs=1e-4)  # Wilson, by hand
    worse = right & (np.arange(100) >= 10)
    found = paired(worse, right, rows)
    assert found["value"] == pytest.approx(-0.1) and found["low"] < -0.1 < found["high"] < 0
    assert paired(right, right, rows) == {"value": 0, "low": 0, "high": 0}
    assert paired(worse, right, Resampled(np.zeros(100, int)))["low"] is None  # one row: nothing to draw from


@pytest.mark.parametrize(
    ("interval", "word"),
    [([0.01, 0.05], " beats "), ([-0.05, -0.01], " is worse than "), ([-0.01, 0.05], " does not measurably beat ")],
)
def test_the_first_line_follows_the_numbers(chain, interval, word):
    found = json.loads((chain / "report" / "report.json").read_text())
    found["answers"]["decider"]["minus_standard"] = {
        "value": sum(interval) / 2,
        "low": interval[0],
        "high": interval[1],
    }
    first = statements(found)[0]
    assert f"the decider's policy{word}the baseline" in first and f"{50 * sum(interval):+.1f} points" in first


def test_report_is_consistent(chain):
    found = json.loads((chain / "report" / "report.json").read_text())
    tokens, answers = found["tokens"], found["answers"]
    assert set(answers) == {"standard", "never", "always", "decider", "confidence", "random"}
    assert set(tokens) == {*answers, "oracle", "second_choice", "second_choice_of_policy"}
    assert tokens["never"]["iterated_share"] == 0 and tokens["always"]["iterated_share"] == 1
    assert tokens["oracle"]["iterated_share"] == pytest.approx(found["test"]["hard_share"])
    for name in ("decider", "always", "oracle", "random"):
        its = tokens[name]
        change = (its["fixed"] - its["broke"]) / found["test"]["tokens"]
        assert its["accuracy"] - tokens["never"]["accuracy"] == pytest.approx(change)
        assert its["minus_never"]["value"] == pytest.approx(change)
    assert 1 - tokens["standard"]["accuracy"] == pytest.approx(found["test"]["hard_share"])
    text = (chain / "report" / "report.md").read_text()
    assert text == as_markdown(found) and text.splitlines()[2] == "- " + found["statements"][0]
    assert set(found["seconds"]) == {"data", "base", "reference", "label", "backbone", "decider"}
    assert all(spent["cpu"] >= 0 for spent in found["seconds"].values())


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("base.scratch.hidden_sise=3", "base.scratch.hidden_sise is unknown; did you mean hidden_size"),
        ("data.generate.min_terms=9", "min_terms"),
        ("base.scratch.num_attention_heads=7", "num_attention_heads=7"),
    ],
)
def test_mistakes_are_found_before_anything_is_moved(override, message, tmp_path):
    """A typo must not take a finished run apart: nothing is written or moved."""
    from tah.pipeline.steps import run

    with pytest.raises(ValueError, match=message):
        run(load_recipe("tiny-paper", [override]), tmp_path / "run", SILENT)
    assert not (tmp_path / "run").exists()


def test_a_base_from_scratch_needs_generated_data():
    with pytest.raises(ValueError, match="base.scratch is trained on generated data"):
        load_recipe("tiny-paper", ["data.generate=null", "data.source=mine.jsonl"])
    with pytest.raises(ValueError, match="output"):
        load_recipe("tiny-paper", ["output=''"])
