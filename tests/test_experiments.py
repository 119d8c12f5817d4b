"""Test the research scripts: problems, one small experiment from end to end, and the arithmetic of the tables."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

ROOT = Path(__file__).parents[1] / "experiments"
sys.path.insert(0, str(ROOT))

import lookahead  # noqa: E402
import measure  # noqa: E402
import optimiser  # noqa: E402
import summarise  # noqa: E402
import tasks  # noqa: E402
import variants  # noqa: E402
import word_problems  # noqa: E402
from tah import TaHForCausalLM  # noqa: E402
from tah.data.assistant_mask import encode  # noqa: E402

VARIANTS = [
    "standard",
    "lookahead",
    "lookahead-entropy",
    "lookahead-quarter",
    "lookahead-mix-entropy-late-3",
    "paper",
    "paper-noisy",
    "lookahead-mix-3",
    "continued-mix",
]


@pytest.mark.parametrize("name", tasks.TASKS)
def test_problems_are_held_out_by_their_line_and_rows_are_the_tokenizers(name):
    task = tasks.Task(name, seed=3, steps=(1, 2, 3))
    held_out = {split: {p.line for p in task.take(split, 60, distinct=True)} for split in ("test", "validation")}
    training = task.take("train", 2000, distinct=False)
    assert not held_out["test"] & held_out["validation"]
    assert not {p.line for p in training} & (held_out["test"] | held_out["validation"])
    assert {p.steps for p in training} == {1, 2, 3}
    tokenizer = task.tokenizer()
    rows = tasks.Rows(training[:20], tokenizer)
    for at, problem in enumerate(training[:20]):
        ids, supervised = encode(tasks.question(problem), tokenizer)
        assert rows[at]["input_ids"].tolist() == list(ids)
        assert rows[at]["supervised"].tolist() == list(supervised)


def test_answers_follow_from_the_line():
    for problem in tasks.Task("chain", 0, (1, 2, 3)).take("test", 50, distinct=True):
        *definitions, at = problem.line.split()
        value = dict(definition.split("=") for definition in definitions)
        taken = 0
        while at in value:
            at, taken = value[at], taken + 1
        assert (at, taken) == (problem.answer, problem.steps)


def test_hops_need_as_many_lookups_as_the_line_names():
    for problem in tasks.Task("hops", 0, (1, 2, 5)).take("test", 50, distinct=True):
        *facts, count, at = problem.line.split()
        following = dict(fact.split(">") for fact in facts)
        passed = [at := following[at] for _ in range(int(count[1:]))]
        assert passed[-1] == problem.answer and len(passed) == problem.steps == len(set(passed))


def test_word_problems_are_held_out_by_kind_and_by_question():
    found = word_problems.splits({"test": 20, "new_kinds": 10, "sums": 5, "validation": 10, "train": 50}, seed=5)
    sizes = {"test": 20, "new_kinds": 10, "sums": 5, "validation": 10, "train": 50}
    assert {name: len(rows) for name, rows in found.items()} == sizes
    questions = [row["messages"][0]["content"] for rows in found.values() for row in rows]
    assert len(set(questions)) == len(questions)
    for row in (row for rows in found.values() for row in rows):
        assert row["messages"][1]["content"].endswith(f"\nAnswer: {row['answer']}")
    kinds = {row["messages"][0]["content"]: kind for kind, row in itertools.islice(word_problems.problems(5), 400)}
    told = {name: [kinds.get(question_of(row)) for row in rows] for name, rows in found.items()}
    held = {name: {word_problems.held_out(kind) for kind in its if kind is not None} for name, its in told.items()}
    assert held == {"test": {False}, "new_kinds": {True}, "sums": set(), "validation": {False}, "train": {False}}


def question_of(row: dict) -> str:
    return row["messages"][0]["content"]


def test_a_family_that_is_too_small_raises():
    with pytest.raises(ValueError, match="task fold has only .* different test problems, not 500"):
        tasks.Task("fold", 0, (2,)).take("test", 500, distinct=True)


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("experiment") / "results.jsonl"
    given = ["--task", "chain", "--size", "test", "--output", str(output)]
    lookahead.main([*given, "--seed", "0", "1", "--variant", *VARIANTS[:2]])
    lookahead.main([*given, "--seed", "0", "--variant", *VARIANTS])
    return output


def test_a_finished_line_is_not_made_again(results):
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    made = [(line["variant"], line["seed"]) for line in lines]
    assert sorted(made) == sorted([("standard", 1), ("lookahead", 1), *((name, 0) for name in VARIANTS)])


def test_other_settings_need_another_file(results, capsys):
    before = results.read_text()
    with pytest.raises(SystemExit):
        lookahead.main(["--task", "chain", "--size", "test", "--steps", "5", "--output", str(results)])
    assert "has lines of other settings" in capsys.readouterr().err and results.read_text() == before


def test_lines_hold_what_the_table_needs(results):
    lines = {(line["variant"], line["seed"]): line for line in map(json.loads, results.read_text().splitlines())}
    standard, look = lines["standard", 0], lines["lookahead", 0]
    assert list(standard["test"]["policies"]) == ["never"]
    assert standard["parameters"] >= look["parameters"]  # wider layers match the linear maps and the decider
    names = ["never", "always", "decider", "entropy", "random", "second_choice", "hindsight"]
    for problems in ("test", "seen"):
        policies = look[problems]["policies"]
        assert list(policies) == names
        assert policies["always"]["iterated"] == 1 and policies["never"]["iterated"] == 0
    assert look["training"]["iterated"] == 1 and standard["training"]["iterated"] == 0
    assert 0.05 < lines["lookahead-quarter", 0]["training"]["iterated"] < 0.5
    assert standard["training"]["flops"] < look["training"]["flops"]
    curve = lines["lookahead-mix-entropy-late-3", 0]["training"]["curve"]
    assert [tenth["step"] for tenth in curve] == [1, 2, 3, 4, 5, 6]
    weighted = sum(weight * curve[-1][f"loss_depth_{depth}"] for depth, weight in ((1, 0.1), (2, 0.2), (3, 0.7)))
    assert curve[-1]["loss"] == pytest.approx(weighted, rel=1e-3)
    assert curve[-1]["loss"] < curve[0]["loss"]
    paper, noisy = (lines[name, 0]["training"] for name in ("paper", "paper-noisy"))
    assert lookahead.labels_of.cache_info().hits >= 1  # one teacher for both
    assert paper["decider_steps"] > 0 and paper["curve"] != noisy["curve"]
    assert paper["flops"] > 3 * standard["training"]["flops"]  # includes those of the teacher
    once, again = lines["lookahead", 0]["training"]["flops"], lines["lookahead-mix-3", 0]["training"]["flops"]
    assert once < again < 3 * once
    assert lines["continued-mix", 0]["training"]["steps"] == 6 + 2 > standard["training"]["steps"]


def test_a_trained_model_is_kept_with_its_rule(tmp_path):
    given = ["--task", "follow", "--size", "test", "--operations", "1", "2", "--variant", "lookahead-mix"]
    lookahead.main([*given, "--output", str(tmp_path / "results.jsonl"), "--save", str(tmp_path)])
    line = json.loads((tmp_path / "results.jsonl").read_text())
    model = TaHForCausalLM.from_pretrained(tmp_path / "lookahead-mix-0")
    assert model.config.policy == "decider"
    assert model.config.threshold == line["test"]["policies"]["decider"]["threshold"]
    assert AutoTokenizer.from_pretrained(tmp_path / "lookahead-mix-0").chat_template


def test_a_model_without_a_decider_is_kept_with_its_entropy_rule(tmp_path):
    given = ["--task", "follow", "--size", "test", "--operations", "1", "2", "--variant", "lookahead-mix-entropy-late"]
    lookahead.main([*given, "--output", str(tmp_path / "results.jsonl"), "--save", str(tmp_path)])
    line = json.loads((tmp_path / "results.jsonl").read_text())
    config = TaHForCausalLM.from_pretrained(tmp_path / "lookahead-mix-entropy-late-0").config
    assert (config.policy, config.confidence_measure) == ("confidence", "entropy")
    assert config.threshold == line["test"]["policies"]["entropy"]["threshold"]


def test_a_model_trained_to_iterate_everywhere_is_kept_so(tmp_path):
    given = ["--task", "follow", "--size", "test", "--operations", "1", "2", "--variant", "always-mix", "standard"]
    lookahead.main([*given, "--output", str(tmp_path / "results.jsonl"), "--save", str(tmp_path)])
    for name, policy in (("always-mix", "always"), ("standard", "never")):
        assert TaHForCausalLM.from_pretrained(tmp_path / f"{name}-0").config.policy == policy


def test_noise_deals_labels_out_among_tokens_of_the_same_place():
    task = tasks.Task("chain", 0, (1, 2))
    rows = tasks.Rows(task.take("train", 400, distinct=False), task.tokenizer())
    wide = rows.ids.shape[1]
    may = np.array([np.pad(rows[at]["supervised"][1:], (0, wide + 1 - rows.lengths[at])) for at in range(len(rows))])
    places = rows.lengths[:, None] - 2 - np.arange(wide)  # 0 predicts the end, 1 the answer
    hard = np.where((places == 1) & (np.arange(len(rows)) % 4 == 0)[:, None], 2, 1)  # a quarter of the answers
    assert (lookahead.shuffled(hard, rows, 0.0, 0) == hard).all()
    noisy = lookahead.shuffled(hard, rows, 0.5, 0)
    assert (noisy[~may] == 1).all() and (noisy[places != 1] == 1).all()
    assert (noisy == 2).sum() == (hard == 2).sum() == 100
    assert 0.5 < (hard[noisy == 2] == 2).mean() < 0.75  # 1 without noise, 0.25 with nothing but noise


def test_table_and_intervals(results):
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    table = summarise.table(lines)
    assert "| lookahead | decider | 2 |" in table and "| paper | decider | 1 |" in table
    assert table.splitlines()[0].endswith("| new | seen | minus standard |")
    own = summarise.table(lines, [("", "never")]).splitlines()
    assert own[0].endswith("| minus own, never |")
    assert [line.endswith("|  |") for line in own[2:]] == ["| never |" in line for line in own[2:]]
    assert "| paper | entropy |" in summarise.operations(lines)
    found = summarise.estimate([0.1, 0.2, 0.3, 0.4])
    assert found["value"] == pytest.approx(0.25)
    assert found["high"] - found["value"] == pytest.approx(3.182 * np.std([0.1, 0.2, 0.3, 0.4], ddof=1) / 2, rel=1e-3)
    assert summarise.estimate([0.1, 0.2])["low"] is None
    assert summarise.difference(lines, ("lookahead", "never"), ("paper", "nothing")) is None


def test_one_seed_gets_an_interval_over_problems():
    def line(variant: str, right: list[int]) -> dict:
        policy = {"exact_match": float(np.mean(right)), "right": np.packbits(right).tobytes().hex()}
        return {"variant": variant, "seed": 0, "test": {"problems": len(right), "policies": {"never": policy}}}

    lines = [line("a", [1, 1, 1, 0] * 25), line("b", [1, 0, 0, 1] * 25)]
    found = summarise.difference(lines, ("a", "never"), ("b", "never"))
    assert found["value"] == pytest.approx(0.25)
    assert found["high"] - found["value"] == pytest.approx(1.96 * np.std([0, 1, 1, -1]) / 10)


def test_tables_from_the_command_line(results, tmp_path, capsys):
    other = tmp_path / "others.jsonl"
    other.write_text('{"model": "tah"}\n')
    summarise.main([str(results), str(other), "--against", "lookahead:always", ":never", "--problems", "seen"])
    told = capsys.readouterr().out
    assert "| seen | new | minus lookahead, always | minus own, never |" in told
    assert "others.jsonl\n\nnot written by lookahead.py" in told
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    another = lines[1] | {"settings": lines[1]["settings"] | {"hidden": 64}}
    for bad, said in (([lines[0], lines[0]], "occurs twice"), ([lines[0], another], "different hidden (32 and 64)")):
        other.write_text("".join(json.dumps(line) + "\n" for line in bad))
        with pytest.raises(SystemExit):
            summarise.main([str(other)])
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        summarise.main([str(results), "--against", "lookahaed"])
    assert "--against lookahaed:never is not in" in capsys.readouterr().err


def test_controls_from_two_depths():
    row = np.array([0, 0, 1, 1])
    assert measure.exact(np.array([True, True, True, False]), row).tolist() == [1, 0]
    assert measure.exact(np.array([0.5, 1, 0.5, 0.5]), row).tolist() == [0.5, 0.25]


def test_only_uncertain_supervised_tokens_look_ahead():
    objective = variants.objective_of(variants.VARIANTS["lookahead-entropy"], seed=0)
    task = tasks.Task("chain", 0, (1, 2))
    tokenizer = task.tokenizer()
    rows = tasks.Rows(task.take("train", 8, distinct=False), tokenizer)
    batch = lookahead.Collator(tokenizer.pad_token_id)([rows[at] for at in range(8)])
    batch.pop("row")
    model = variants.build(variants.SIZES["test"], variants.VARIANTS["lookahead-entropy"], tokenizer, seed=0)
    with torch.no_grad():
        out = model(**objective.arguments(batch, 0, 2))
    supervised = torch.nn.functional.pad(batch["labels"][:, 1:], (0, 1), value=-100) != -100
    with torch.no_grad():
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"], policy="never").logits
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    objective.tau = float(entropy[supervised].median()) + 1e-4
    with torch.no_grad():
        few = model(**objective.arguments(batch, 0, 2))
    assert (out.depth_count[supervised] == 2).all()  # an untrained model is uncertain everywhere
    assert (out.depth_count[~supervised] == 1).all()
    assert torch.equal(few.depth_count == 2, supervised & (entropy > objective.tau))
    assert 0.3 < (few.depth_count[supervised] == 2).float().mean() < 0.7


def test_a_schedule_reaches_both_optimisers():
    """accelerate replaces an optimiser's groups by copies, which the inner optimisers do not see by themselves."""
    task = tasks.Task("fold", 0, (1, 2))
    model = variants.build(variants.SIZES["test"], variants.VARIANTS["lookahead"], task.tokenizer(), seed=0)
    optimizer = optimiser.MuonAdamW(model, 1e-3)
    optimizer.load_state_dict(optimizer.state_dict())
    muon = {id(p) for p in optimizer.parts[1].param_groups[0]["params"]}
    assert id(model.next_input_map.weight) in muon and id(model.get_input_embeddings().weight) not in muon
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    for rate, moves in ((0.0, False), (1e-3, True)):
        for group in optimizer.param_groups:
            group["lr"] = rate
        before = [p.clone() for p in model.parameters()]
        optimizer.step()
        assert all((a != b).any() == moves for a, b in zip(before, model.parameters(), strict=True))


def test_muon_is_torchs_with_more_digits():
    """torch's rounds to bfloat16, 8 bits, in between."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(24, 24), (72, 24), (24, 72)]
    ours, theirs = ([torch.nn.Parameter(torch.ones(shape)) for shape in shapes] for _ in range(2))
    optimizers = optimiser.Muon(ours, 0.02, weight_decay=0.01), torch.optim.Muon(theirs, 0.02, weight_decay=0.01)
    for _ in range(10):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=generator)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(ours, theirs, strict=True):
        moved = (other - 1).norm()
        assert moved > 0.05 and (one - other).norm() < 0.01 * moved


def test_muon_moves_along_directions_not_sizes():
    """The singular values of the update are near 1 whatever those of the gradient."""
    gradient = torch.randn(24, 72, generator=torch.Generator().manual_seed(0)) * torch.logspace(0, -2, 24)[:, None]
    for matrix in (gradient, gradient.T):
        values = torch.linalg.svdvals(optimiser.orthogonal(matrix))
        assert 0.6 < values.min() and values.max() < 1.3
