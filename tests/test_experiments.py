"""Test the research scripts: problems, one small experiment from end to end, and the arithmetic of the tables."""

from __future__ import annotations

import itertools
import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

ROOT = Path(__file__).parents[1] / "experiments"
sys.path.insert(0, str(ROOT))

import choose  # noqa: E402
import compare  # noqa: E402
import gpu  # noqa: E402
import lookahead  # noqa: E402
import measure  # noqa: E402
import nine  # noqa: E402
import nine_runs  # noqa: E402
import optimiser  # noqa: E402
import summarise  # noqa: E402
import tasks  # noqa: E402
import text  # noqa: E402
import variants  # noqa: E402
import word_problems  # noqa: E402
from nine.mixture import Mixture  # noqa: E402
from nine.problem import MADE  # noqa: E402
from tah import Confidence, TaHForCausalLM  # noqa: E402
from tah.data.assistant_mask import encode  # noqa: E402
from tah.pipeline.experiment.scores import score_tokens  # noqa: E402
from tah.policy import Rule  # noqa: E402

VARIANTS = [
    "standard",
    "lookahead",
    "lookahead-entropy",
    "lookahead-quarter",
    "lookahead-mix-entropy-late-3",
    "paper",
    "paper-noisy",
    "paper-own",
    "late-lora-blind",
    "lookahead-mix-3",
    "continued-mix",
    "formed",
    "relaxed-lora",
    "continued-late",
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


@pytest.mark.slow
def test_a_finished_line_is_not_made_again(results):
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    made = [(line["variant"], line["seed"]) for line in lines]
    assert sorted(made) == sorted([("standard", 1), ("lookahead", 1), *((name, 0) for name in VARIANTS)])


@pytest.mark.slow
def test_other_settings_need_another_file(results, capsys):
    before = results.read_text()
    with pytest.raises(SystemExit):
        lookahead.main(["--task", "chain", "--size", "test", "--steps", "5", "--output", str(results)])
    assert "has lines of other settings" in capsys.readouterr().err and results.read_text() == before


@pytest.mark.slow
def test_lines_hold_what_the_table_needs(results):
    lines = {(line["variant"], line["seed"]): line for line in map(json.loads, results.read_text().splitlines())}
    standard, look = lines["standard", 0], lines["lookahead", 0]
    assert list(standard["test"]["policies"]) == ["never"]
    assert standard["parameters"] >= look["parameters"]  # wider layers match the linear maps and the decider
    names = ["never", "always", "decider", "entropy", "entropy-tau", "random", "second_choice", "hindsight"]
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
    own = lines["paper-own", 0]["training"]  # a teacher of the model's own size
    assert paper["flops"] > 3 * standard["training"]["flops"]  # includes those of the teacher
    assert 1.5 * standard["training"]["flops"] < own["flops"] < paper["flops"]
    once, again = lines["lookahead", 0]["training"]["flops"], lines["lookahead-mix-3", 0]["training"]["flops"]
    assert once < again < 3 * once
    assert lines["continued-mix", 0]["training"]["steps"] == 6 + 2 > standard["training"]["steps"]
    for name in ("formed", "relaxed-lora", "continued-late"):  # a decider is trained last
        training, scores = lines[name, 0]["training"], lines[name, 0]["test"]
        assert training["decider_steps"] == 2 and 0 < training["decider_flops"] < training["flops"]
        groups = [scores["choices"][group] for group in ("both", "decider_only", "entropy_only", "neither")]
        assert sum(group["tokens"] for group in groups) == 20 * tasks.MADE
        assert sum(group["mended"] for group in groups) == round(scores["mended"] * 20 * tasks.MADE)
    assert look["training"]["decider_flops"] == 0  # trained together with the model


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


def test_flops_of_tah2_count_the_decider_on_every_token_and_not_at_the_last_depth():
    variant, tokenizer = variants.VARIANTS["tah2"], tasks.Task("chain", 0, (1,)).tokenizer()
    model = variants.build(variants.SIZES["test"], variant, tokenizer, seed=0)
    decider, added = (sum(p.numel() for p in part.parameters()) for part in (model.decider, model.next_input_mlp))
    head = model.get_input_embeddings().weight.numel()
    body = variants.parameters(model) - decider - added - head
    assert 6 * 32**2 < decider < 6.5 * 32**2 and 5 * 32**2 < added < 5.5 * 32**2
    length, made = 12, tasks.MADE
    none, every = (lookahead.row_flops(model, variant, length, share) for share in (0.0, 1.0))
    first = 6 * (length * (body + head + decider) + made * head)
    assert none == pytest.approx(first + 2 * made * (body + added + head))  # side passes, without gradients
    assert every == pytest.approx(first + 6 * length * (body + added + head))
    counts = {"mean_depth": 1.5, "decisions": 1.0, "side_passes": 0.25}  # as the training has counted them
    measured = lookahead.row_flops(model, variant, length, 0.1, counts=counts)
    assert measured == pytest.approx(first + 6 * length * (0.5 + 0.25 / 3) * (body + added + head))


def test_policies_of_a_mixture(tmp_path):
    """Entropy may choose the tokens, but the decider weighs the passes; prompts count for both thresholds."""
    given = ["--task", "follow", "--size", "test", "--operations", "1", "2", "--variant", "tah2"]
    lookahead.main([*given, "--output", str(tmp_path / "results.jsonl"), "--save", str(tmp_path)])
    (line,) = map(json.loads, (tmp_path / "results.jsonl").open())
    assert {"decider-half", "always-weighed", "entropy"} <= line["test"]["policies"].keys()
    assert 1 < line["training"]["curve"][0]["mean_depth"] <= 2
    model = TaHForCausalLM.from_pretrained(tmp_path / "tah2-0").eval()
    ids = torch.randint(4, 20, (3, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logs = model(ids, policy="never").logits.float().log_softmax(-1)
        entropy = 1 - (logs.exp() * logs).sum(-1).exp()
        half = float(entropy.median())
        for threshold, chosen in ((half, entropy > half), (-1.0, torch.ones(3, 12, dtype=torch.bool))):
            out = model(ids, policy=measure.EntropyDecides(model.decider, threshold))
            assert torch.equal(out.depth_count == 2, chosen)
            by_decider = model(ids, policy="decider", threshold=0.0)
            kept = by_decider.mixture_weights[..., 0][chosen]
            assert torch.allclose(out.mixture_weights[..., 0][chosen], kept, atol=1e-6)
    assert 0 < kept.min() and kept.max() < 1
    task, found = tasks.Task("follow", 0, (1, 2)), line["test"]["policies"]
    rows = tasks.Rows(task.take("validation", variants.SIZES["test"].validation, distinct=True), task.tokenizer())
    rules = {"decider": "decider", "entropy": measure.EntropyDecides(model.decider, found["entropy"]["threshold"])}
    for name, policy in rules.items():
        rule = Rule(policy, found[name]["threshold"])
        along = score_tokens(model, [rows[at] for at in range(len(rows))], task.tokenizer().pad_token_id, rule)
        assert along.share_of_all == pytest.approx(measure.SHARE, abs=0.02)


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


@pytest.mark.slow
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


@pytest.mark.slow
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


def test_the_early_part_of_a_training_has_its_own_objective():
    """`formed` runs the second pass on all tokens first; `relaxed` changes the weights of the losses."""
    task = tasks.Task("hops", 0, (1, 2))
    tokenizer = task.tokenizer()
    rows = tasks.Rows(task.take("train", 4, distinct=False), tokenizer)
    batch = lookahead.Collator(tokenizer.pad_token_id)([rows[at] for at in range(4)])
    batch.pop("row")
    formed, relaxed = (variants.objective_of(variants.VARIANTS[name], 0, steps=10) for name in ("formed", "relaxed"))
    policies = [formed.arguments(batch, step, 2)["policy"] for step in (0, 3, 4, 9)]
    assert [policy == "oracle" for policy in policies] == [True, True, False, False]
    weights = [relaxed.arguments(batch, step, 2)["training"].loss_weights for step in (0, 5, 6, 9)]
    assert [list(its) for its in weights] == [[0.2, 0.8], [0.2, 0.8], [0.5, 0.5], [0.5, 0.5]]
    last = variants.objective_of(variants.VARIANTS["formed"], 0, "decider", steps=10)
    assert last.stage == "decider" and last.arguments(batch, 0, 2)["policy"] == "decider"


def test_muon_gets_the_matrices_of_the_base_and_adamw_the_adapter():
    task = tasks.Task("fold", 0, (1, 2))
    fields = variants.LOOKAHEAD | variants.LORA
    model = variants.new_model(variants.SIZES["test"], 96, fields, task.tokenizer(), seed=0, decides=True)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    adamw, muon = (
        {names[id(p)] for group in part.param_groups for p in group["params"]}
        for part in optimiser.MuonAdamW(model, 1e-3).parts
    )
    layers = [f"base.model.layers.{layer}.{name}.weight" for layer in range(2) for name in _LINEAR]
    assert muon == set(layers)
    assert adamw == set(names.values()) - muon
    adapter = {"decider.input.weight", "next_input_map.weight", "output_map.weight"}
    adapter |= {layer.replace(".weight", f".lora_{part}.weight") for layer in layers for part in "AB"}
    assert adapter <= adamw


_ATTENTION, _MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
_LINEAR = [*(f"self_attn.{name}" for name in _ATTENTION), *(f"mlp.{name}" for name in _MLP)]


class _AllMatricesToMuon(optimiser.MuonAdamW):
    """The grouping of earlier versions: Muon gets LoRA's A and B too."""

    def __init__(self, model: TaHForCausalLM, rate: float) -> None:
        super().__init__(model, rate)
        lora = [p for name, p in model.named_parameters() if "lora_" in name]
        adamw, muon = (part.param_groups[0]["params"] for part in self.parts)
        adamw[:] = [p for p in adamw if all(p is not other for other in lora)]
        muon += lora


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "learns"), [(optimiser.MuonAdamW, True), (_AllMatricesToMuon, False)])
def test_a_second_pass_with_lora_learns_a_second_hop(monkeypatch, optimizer, learns):
    """With LoRA in AdamW the second pass takes the second step; with LoRA in Muon both passes stay equal."""
    monkeypatch.setattr(lookahead, "MuonAdamW", optimizer)
    variant, seed = variants.VARIANTS["late-lora"], 0
    size = replace(variants.SIZES["small"], steps=600)
    task = tasks.Task("hops", seed, (1, 1, 2))
    tokenizer = task.tokenizer()
    rows = tasks.Rows(task.take("train", size.steps * size.batch, distinct=False), tokenizer)
    model = variants.build(size, variant, tokenizer, seed)
    curve = lookahead.train(
        model, variants.objective_of(variant, seed), rows, tokenizer, size.steps, size, seed, "late-lora"
    )
    one, two = (curve[-1][f"loss_depth_{depth}"] for depth in (1, 2))
    assert (two < one / 4) == learns
    if not learns:
        assert two == pytest.approx(one, rel=0.02)


def test_a_schedule_reaches_both_optimisers():
    """accelerate replaces an optimiser's groups by copies, which the inner optimisers do not see by themselves."""
    task = tasks.Task("fold", 0, (1, 2))
    model = variants.build(variants.SIZES["test"], variants.VARIANTS["lookahead"], task.tokenizer(), seed=0)
    optimizer = optimiser.MuonAdamW(model, 1e-3)
    optimizer.load_state_dict(optimizer.state_dict())
    muon = {id(p) for p in optimizer.parts[1].param_groups[0]["params"]}
    assert id(model.next_input_map.weight) not in muon and id(model.get_input_embeddings().weight) not in muon
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


def line_of(variant: str, seed: int, never: float, **policies: float) -> dict:
    """Return a line of results with the fields that `choose` reads."""
    reached = {"never": never} | policies
    training = {"flops": 1e12, "decider_flops": 1e11, "cpu_seconds": 60.0}
    scores = {"policies": {name: {"exact_match": value} for name, value in reached.items()}}
    found = {"task": "", "variant": variant, "seed": seed, "settings": {}, "parameters": 1000}
    return found | {"training": training, "test": scores}


def results_of(seeds: tuple[int, ...], **recipes: tuple[float, float]) -> dict[str, list[dict]]:
    """Return lines of both tasks: a baseline of .6, and per recipe its depth 1 and its score under every policy."""
    lines = []
    for seed in seeds:
        lines.append(line_of(choose.BASELINE, seed, 0.6))
        for name, (never, score) in recipes.items():
            lines.append(line_of(name, seed, never, **dict.fromkeys(choose.POLICIES, score)))
    return dict.fromkeys(choose.TASKS, lines)


def test_a_recipe_is_chosen_by_the_rule_of_the_plan():
    today = {"all": (0.59, 0.7), "uncertain": (0.5, 0.72), "late": (0.4, 0.8)}
    found = choose.candidates(results_of((10,), **today, hidden=(0.59, 0.9), formed=(0.5, 0.95)))
    assert [one.variant for one in found if one.qualified] == ["hidden"] * 3
    best = choose.chosen(found)
    assert (best.variant, best.policy, best.score) == ("hidden", "entropy", pytest.approx(0.9))
    assert (best.lost, best.worse) == (pytest.approx(0.01), pytest.approx(-0.1))
    found = choose.candidates(results_of((10,), **today, formed=(0.5, 0.95)))  # nobody qualifies: the best on average
    assert not any(one.qualified for one in found) and choose.chosen(found).variant == "formed"
    tie = {"formed": (0.59, 0.895), "formed-lora": (0.59, 0.9), "hidden": (0.59, 0.88)}
    assert choose.chosen(choose.candidates(results_of((10,), **today, **tie))).variant == "formed"


def test_one_task_below_what_is_allowed_disqualifies():
    results = results_of((10,), all=(0.59, 0.7), uncertain=(0.5, 0.7), late=(0.4, 0.8), hidden=(0.59, 0.9))
    for changed, wrong in (("never", 0.57), ("entropy", 0.78)):
        lines = [json.loads(json.dumps(line)) for line in results["follow"]]
        lines[-1]["test"]["policies"][changed]["exact_match"] = wrong
        found = {one.policy: one for one in choose.candidates(results | {"follow": lines}) if one.variant == "hidden"}
        assert found["decider"].qualified == (changed == "entropy") and not found["entropy"].qualified


def test_finalists_are_those_of_the_first_seeds_and_only_they_are_chosen(tmp_path):
    today = {"all": (0.5, 0.1), "uncertain": (0.5, 0.1), "late": (0.5, 0.2)}
    others = [name for name in variants.CHOICE if name not in today]
    first = results_of(choose.FIRST, **today, **{name: (0.5, 0.9 - 0.05 * at) for at, name in enumerate(others)})
    second = results_of(choose.SECOND[:1], **today, **{others[0]: (0.5, 0.3)})
    for task in choose.TASKS:
        lines = [*first[task], *second[task]]
        (tmp_path / f"choose-{task}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    planned = list(choose.runs(tmp_path))
    assert len(planned) == len(set(planned)) == 2 * (len(choose.FIRST) * 17 + len(choose.SECOND) * (4 + 6))
    assert {variant for _, seed, variant in planned if seed in choose.SECOND} == {
        choose.BASELINE,
        *today,
        *others[: choose.FINALISTS],
    }
    found = choose.candidates(choose.results_in(tmp_path, "choose"))
    assert (
        found[0].variant == others[1] and choose.chosen(found).variant == others[0]
    )  # others[1] lacks the second seed


def test_choosing_continues_where_it_stopped(tmp_path, capsys):
    given = ["--output", str(tmp_path), "--size", "test", "--runs"]
    choose.main([*given, "1"])
    before = (tmp_path / "choose-hops.jsonl").read_text()
    choose.main([*given, "2"])
    assert (tmp_path / "choose-hops.jsonl").read_text() == before
    lines = [json.loads((tmp_path / f"choose-{task}.jsonl").read_text()) for task in choose.TASKS]
    assert [line["variant"] for line in lines] == [choose.BASELINE] * 2
    with pytest.raises(SystemExit):
        choose.main(["--output", str(tmp_path), "--table"])
    assert "has no seed with standard-wide, all, uncertain, late" in capsys.readouterr().err


def test_recipes_are_compared_as_means_over_tasks_paired_by_seed(tmp_path, capsys):
    lines = {task: [] for task in choose.TASKS}
    for seed, noise in zip(compare.SEEDS, (0.0, 0.1, -0.1, 0.0), strict=True):
        for task, shift in (("hops", 0.1), ("follow", -0.1)):
            lines[task].append(line_of("late", seed, 0.5, **{"entropy-tau": 0.9 + noise + shift}))
            lines[task].append(line_of(choose.BASELINE, seed, 0.7 + noise + 2 * shift))
            lines[task].append(line_of("paper", seed, 0.6, decider=0.6 - noise))
    for task, its in lines.items():
        (tmp_path / f"compare-{task}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in its))
    compare.main(["late", "--policy", "entropy-tau", "--output", str(tmp_path), "--table"])
    told = capsys.readouterr().out.splitlines()
    cost = "1,000 | 1.10 | 60"
    assert told[2] == f"| late | entropy-tau | 4 | {cost} | 0.900 | |"
    assert told[3] == f"| {choose.BASELINE} | never | 4 | {cost} | 0.700 | +0.200 [+0.200, +0.200] |"
    half = 3.182 * np.std([0.0, 0.2, -0.2, 0.0], ddof=1) / 2
    assert told[4] == f"| paper | decider | 4 | {cost} | 0.600 | +0.300 [{0.3 - half:+.3f}, {0.3 + half:+.3f}] |"
    assert told[5].startswith(f"| late | never | 4 | {cost} | 0.500 | +0.400") and len(told) == 6


def test_tah2_is_compared_with_baselines_of_its_size_and_with_entropy_on_its_weights(tmp_path, capsys):
    for task in choose.TASKS:
        lines = []
        for seed in compare.SEEDS:
            lines.append(line_of("tah2", seed, 0.5, **{"decider-half": 0.8, "decider": 0.7, "entropy": 0.6}))
            lines.append(line_of("standard-tah2-x1.5", seed, 0.7))
            lines.append(line_of(choose.BASELINE, seed, 0.9))  # too small for a comparison with TaH2
        (tmp_path / f"compare-{task}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    compare.main(["tah2", "--policy", "decider-half", "--output", str(tmp_path), "--table"])
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in capsys.readouterr().out.splitlines()[2:]]
    assert [(variant, policy) for variant, policy, *_ in rows] == [
        ("tah2", "decider-half"),
        ("standard-tah2-x1.5", "never"),
        ("tah2", "never"),
        ("tah2", "entropy"),
        ("tah2", "decider"),
    ]
    assert [row[-1].split(" ")[0] for row in rows] == ["", "+0.100", "+0.300", "+0.200", "+0.100"]


# -- one model for nine tasks ----------------------------------------------------------------------------------------


TWO = {name: nine.TASKS[name] for name in ("carry", "relations")}


@pytest.fixture(scope="module")
def nine_results(tmp_path_factory) -> Path:
    """Six runs of two of the nine tasks, because many short generations take long."""
    output = tmp_path_factory.mktemp("nine")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("nine.mixture.TASKS", TWO)
        nine_runs.main(["late", "--policy", "entropy-tau", "--output", str(output), "--size", "test", "--runs", "6"])
    return output


def test_one_model_is_scored_by_task(nine_results):
    lines = {line["variant"]: line for line in summarise.read(nine_results / "nine.jsonl")}
    equal = ["standard-as-recipe", "standard-wide", "always-as-recipe"]
    assert list(lines) == ["late", *equal, "paper-own", "standard-wide-deep"]
    for line in lines.values():
        scores = line["test"]
        for policy, its in scores["by_task"].items():
            assert set(its) == set(TWO)
            assert scores["policies"][policy]["flops"] > 0
        assert all(0 <= its["iterated"] <= 1 for its in scores["by_task"]["never"].values())
    always = lines["always-as-recipe"]["test"]["by_task"]["always"]
    assert all(its["iterated"] == 1 for its in always.values())
    assert "decider" not in lines["late"]["test"]["policies"] and "decider" in lines["paper-own"]["test"]["policies"]
    table = summarise.table(list(lines.values()))  # the other tables read the same lines
    assert "| late | entropy-tau | 1 |" in table and "1 operations" in summarise.operations(list(lines.values()))


def test_baselines_have_at_least_the_flops_and_steps_of_the_recipe(nine_results):
    lines = {line["variant"]: line for line in summarise.read(nine_results / "nine.jsonl")}
    recipe = lines["late"]
    for name in ("standard-as-recipe", "standard-wide", "standard-wide-deep"):
        training = lines[name]["training"]
        assert training["flops"] >= recipe["training"]["flops"] and training["steps"] >= recipe["training"]["steps"]
        one_step = training["flops"] / training["steps"]
        if training["steps"] > recipe["training"]["steps"]:
            assert training["flops"] - one_step < recipe["training"]["flops"]
        assert lines[name]["parameters"] >= recipe["parameters"]
    task, size = Mixture("nine", 30), variants.SIZES["test"]
    primary, wide = (lines[name] for name in ("standard-as-recipe", "standard-wide"))
    assert primary["parameters"] == recipe["parameters"] == lines["always-as-recipe"]["parameters"]
    assert primary["training"]["steps"] > recipe["training"]["steps"]  # it has no other way to have the FLOPs
    assert wide["parameters"] > primary["parameters"] and wide["training"]["steps"] <= primary["training"]["steps"]
    its = variants.VARIANTS["standard-wide"]
    longer = nine_runs.matched(task, size, its, 10 * recipe["training"]["flops"])
    assert round(longer.steps * size.steps) > 3 * size.steps
    assert nine_runs.matched(task, size, its, 1.0).steps == 1


def test_models_beside_a_recipe_have_its_model():
    tokenizer, size = Mixture("nine", 0).tokenizer(), variants.SIZES["test"]
    for name, policy, decides in (
        ("hidden-lora", "entropy", True),
        ("late", "decider", True),
        ("late", "entropy", False),
    ):
        its = {
            which: nine_runs.variant_of(which, name, policy)
            for which in (name, nine_runs.BASELINE, nine_runs.ALWAYS, nine_runs.WIDE)
        }
        recipe, primary, always, wide = (variants.build(size, one, tokenizer, 0) for one in its.values())
        assert (recipe.decider is not None) == decides
        assert (
            always.config.next_input == recipe.config.next_input and always.config.lora_rank == recipe.config.lora_rank
        )
        less = variants.parameters(primary) - variants.parameters(recipe)
        assert 0 <= less < 3 * size.hidden * size.layers  # widths of the MLPs are whole numbers
        assert variants.parameters(wide) >= variants.parameters(primary) and always.decider is None


def test_flops_of_a_model_that_always_iterates_have_the_head_once():
    its, tokenizer = variants.VARIANTS["always"], tasks.Task("chain", 0, (1,)).tokenizer()
    model = variants.build(variants.SIZES["test"], its, tokenizer, seed=0)
    of, made = variants.weights_of(model), tasks.MADE
    both = lookahead.row_flops(model, replace(its, loss_weights=(0.5, 0.5)), 12, 1.0)
    deep = lookahead.row_flops(model, its, 12, 1.0)
    assert deep == 6 * (12 * of.body + made * (of.body + of.added + of.head)) == both - 6 * made * of.head
    assert lookahead.row_flops(model, its, 12, 0.0) == 6 * (12 * of.body + made * of.head)  # all tokens stop


def test_nine_runs_continue_and_stop_by_the_budget(nine_results, capsys):
    before = (nine_results / "nine.jsonl").read_text()
    given = ["late", "--policy", "entropy-tau", "--output", str(nine_results)]
    nine_runs.main([*given, "--size", "test", "--runs", "6"])
    assert (nine_results / "nine.jsonl").read_text() == before
    with pytest.raises(SystemExit, match="is used up before late 31, length 1"):
        nine_runs.main([*given, "--size", "test", "--hours", "0"])
    (nine_results / "PAUSE").touch()  # delays new runs only
    nine_runs.main([*given, "--size", "test", "--hours", "0", "--runs", "6"])
    (nine_results / "PAUSE").unlink()
    for other, differs in (
        ([*given, "--size", "small"], "batch, hidden"),
        (["all", *given[1:], "--size", "test"], r"\(recipe\)"),
        (["late", "--policy", "decider", *given[3:], "--size", "test"], r"\(policy\)"),
    ):
        with pytest.raises(ValueError, match=f"has lines of other settings .*{differs}"):
            nine_runs.main([*other, "--runs", "1"])
    assert (nine_results / "nine.jsonl").read_text() == before
    for other in (["late", "--policy", "entropy"], ["all", "--policy", "entropy-tau"]):
        with pytest.raises(SystemExit):
            nine_runs.main([*other, *given[3:], "--table"])
    assert "are those of late with entropy-tau" in capsys.readouterr().err
    nine_runs.main([*given, "--table"])
    told = capsys.readouterr().out
    assert "late with entropy-tau minus standard-as-recipe at equal FLOPs" in told and "| relations |" in told


def test_the_runs_of_the_curve_are_two_variants_on_two_seeds():
    planned = list(nine_runs.runs("all-lora", [4, 1]))
    assert len(planned) == len(set(planned)) == 3 * 6 + 2 * 2
    assert [one for one in planned if one[0] == 4] == [
        (4, seed, name) for seed in nine_runs.CURVE_SEEDS for name in ("all-lora", "standard-as-recipe")
    ]
    assert planned[:2] == [(1, 30, "all-lora"), (1, 30, "standard-as-recipe")]
    assert nine_runs.file_of(Path(), 1) != nine_runs.file_of(Path(), 4)


def test_the_primary_number_is_paired_by_seed_and_problem():
    def line(variant: str, seed: int, right: list[int]) -> dict:
        scores = {"exact_match": float(np.mean(right)), "right": np.packbits(right).tobytes().hex(), "iterated": 0.1}
        policies = dict.fromkeys(("never", "entropy-tau"), scores)
        by_task = {policy: dict.fromkeys(nine_runs.TASKS, {"exact_match": 0.5, "iterated": 0.1}) for policy in policies}
        made = line_of(variant, seed, 0.0)
        made["test"] = {"problems": len(right), "policies": policies, "by_task": by_task}
        made["training"]["steps"] = 6
        return made | {"parameters": 1000}

    lines = []
    for seed, shift in zip(nine_runs.SEEDS, (0, 10, -10), strict=True):
        lines.append(line("late", seed, [1] * (60 + shift) + [0] * (40 - shift)))
        lines.append(line("standard-as-recipe", seed, [1] * 40 + [0] * 60))
    found = nine_runs.over_problems(lines, ("late", "entropy-tau"), ("standard-as-recipe", "never"))
    assert found["value"] == pytest.approx(0.2)
    shares = np.array([0.2, 0.3, 0.1])  # a difference of 1 in so many problems, else 0
    assert found["high"] - 0.2 == pytest.approx(1.96 * np.sqrt((shares * (1 - shares) / 100).sum()) / 3)
    told = nine_runs.table(lines, "late", "entropy-tau").splitlines()
    half = 4.303 * 0.1 / np.sqrt(3)
    assert f"+0.200 [{0.2 - half:+.3f}, {0.2 + half:+.3f}] over 3 seeds" in told[0]
    curve = nine_runs.curve({1: lines, 2: lines[:4]}, "late", "entropy-tau").splitlines()
    assert curve[2].startswith("| 1 | 2 | 1.00 | 0.650 | 1.00 | 0.400 | +0.250")


def test_flops_of_an_answer_count_each_pass_once():
    task, size = Mixture("nine-carry", 0), variants.SIZES["test"]
    tokenizer = task.tokenizer()
    rows = task.rows(task.take("test", 4, distinct=True), tokenizer)
    every = [rows[at] for at in range(4)]
    model = variants.build(size, replace(variants.VARIANTS["late"], decider_after=False), tokenizer, seed=0)
    its = variants.weights_of(model)
    assert its.added == its.decider == 0 and its.body + its.head == variants.parameters(model)
    never, always = (
        measure.answer_flops(model, tokenizer, every, Rule(name), count)
        for name, count in (("never", 0), ("always", MADE))
    )
    prompt = len(every[0]["input_ids"]) - MADE
    assert never == 2 * (its.body * (prompt + MADE - 1) + its.head * MADE)
    assert always - never == 2 * MADE * (its.body + 2 * its.head)
    paper = variants.build(size, variants.VARIANTS["paper"], tokenizer, seed=0)
    own, duo = (measure.answer_flops(paper, tokenizer, every, Rule(name), MADE) for name in ("never", "always"))
    assert duo - own > 2 * prompt * its.body  # with `duo`, prompt tokens iterate too


def test_nine_problems_drawn_by_several_processes(monkeypatch):
    """The pool is replaced by a loop; `gpu.py --small` runs the processes."""

    class Pool:
        def __init__(self, processes):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def starmap(self, function, jobs, chunksize):
            return [function(*job) for job in jobs]

    monkeypatch.setattr("nine.mixture.multiprocessing.get_context", lambda method: type("Context", (), {"Pool": Pool}))
    one, other = Mixture("nine", 3, processes=2, drawn=9 * 8 * 2).training([100, 100])
    assert len(one) == len(other) == 100
    rows = [tuple(ids) for ids in np.concatenate([one.ids, other.ids])]
    assert len(set(rows)) == 9 * 8 * 2  # all that are drawn, and some of them again
    assert rows[: 200 - 144] == rows[144:]
    (plain,) = Mixture("nine", 3).training([18])  # the first problems of each task are those of one process
    assert {tuple(ids) for ids in plain.ids} <= set(rows)
    names = {tuple(ids)[1] for ids in rows}
    assert len(names) == 9


# -- text and GPU ----------------------------------------------------------------------------------------------------


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A library of small files, instead of Python's."""
    root = tmp_path / "library"
    (root / "site-packages").mkdir(parents=True)
    (root / "site-packages" / "other.py").write_text("other = 1\n" * 100)
    (root / "encoded.py").write_bytes("# -*- coding: latin-1 -*-\n# ä\n".encode("latin-1"))
    for at in range(60):
        (root / f"module_{at}.py").write_text("".join(f"value_{at} = {at} + {line}\n" for line in range(30)))
    found = text.sources.__wrapped__(str(root))
    monkeypatch.setattr(text, "sources", lambda: found)
    text.tokenizer_of.cache_clear()
    text.stream.cache_clear()
    yield found
    text.tokenizer_of.cache_clear()
    text.stream.cache_clear()


def test_files_are_held_out_by_their_path(library):
    assert len(library[False]) + len(library[True]) == 60 and library[True]
    assert not set(library[False]) & set(library[True])
    tokenizer = text.tokenizer_of(300)
    assert len(tokenizer) <= 300
    told = tokenizer.decode(text.stream(300, True).tolist())
    assert told == "".join(f"{its}<|end|>" for its in library[True])
    rows = text.rows_of(text.SIZES["test"], False, 1000)
    assert len(rows) == len(text.stream(300, False)) // 32 and rows[0]["supervised"].all()


def test_language_models_have_equal_flops(library, tmp_path, capsys):
    given = ["late", "--size", "test", "--output", str(tmp_path / "out"), "--tau", "5.7"]
    text.main(given)
    (tmp_path / "out" / "PAUSE").touch()
    text.main([*given, "--hours", "0"])  # nothing is made again, so there is nothing to wait for
    lines = lookahead.lines_of(tmp_path / "out" / "text.jsonl")
    assert [(line["variant"], line["seed"]) for line in lines] == [
        (name, seed) for seed in text.SEEDS for name in ("late", "standard", "always")
    ]
    recipe, standard, always = (line["training"] for line in lines[:3])
    assert recipe["flops"] <= standard["flops"] < 2 * recipe["flops"]
    assert standard["steps"] >= recipe["steps"] >= always["steps"]
    assert lines[1]["parameters"] >= lines[0]["parameters"] == lines[2]["parameters"]
    capsys.readouterr()
    text.main([*given, "--table"])
    told = capsys.readouterr().out
    assert "| late | entropy | 2 |" in told and "| from 4 |" in told
    text.main(["late", "--size", "test", "--look", "2"])
    found = re.findall(r"(\d+)% of the held-out tokens are above ([\d.]+) nats", capsys.readouterr().out)
    assert [share for share, _ in found] == ["10", "25", "50"]
    entropies = [float(entropy) for _, entropy in found]
    assert entropies == sorted(entropies, reverse=True) and 0 < entropies[-1] and entropies[0] < np.log(300) + 0.01
    told_changes = re.findall(r"([+-]\d\.\d+) \(40: ([+-]\d\.\d+), 41: ([+-]\d\.\d+)\)", told)
    assert len(told_changes) == 2 * (3 + 3)  # loss and accuracy of each policy of `late` and `always`
    assert all(float(mean) == pytest.approx((float(a) + float(b)) / 2, abs=1e-4) for mean, a, b in told_changes)
    with pytest.raises(ValueError, match="no line of late with seed 7"):
        text.record(tmp_path / "new.jsonl", "test", text.SIZES["test"], "standard", "late", 7)


def test_lines_of_another_text_and_twice_the_same_are_refused(library, tmp_path, monkeypatch):
    output, size = tmp_path / "text.jsonl", text.SIZES["test"]
    line = {"variant": "late", "seed": 40, "settings": text.own_settings(size, "late"), "training": {"flops": 1e9}}
    output.write_text(json.dumps(line) + "\n")
    monkeypatch.setattr(text, "sources", lambda: {False: [*library[False], "more = 1\n"], True: library[True]})
    with pytest.raises(ValueError, match=r"lines of other settings \(text_sha256\)"):
        text.main(["late", "--size", "test", "--output", str(tmp_path)])
    monkeypatch.setattr(text, "sources", lambda: library)
    output.write_text((json.dumps(line) + "\n") * 2)
    with pytest.raises(ValueError, match="late 40 occurs twice"):
        text.main(["late", "--size", "test", "--output", str(tmp_path)])


def test_tau_is_chosen_on_rows_that_are_not_scored(library):
    size = text.TextSize(1, 32, 300, 8, batch=4, steps=1, held_out=4, tau=2.0)
    scored, every = text.rows_of(size, True, size.held_out), text.rows_of(size, True, 10)
    after = text.rows_of(size, True, 6, size.held_out)
    assert np.array_equal(np.concatenate([scored.ids, after.ids]), every.ids)
    with pytest.raises(ValueError, match="no row after the 100000 that are scored"):
        text.look(replace(size, held_out=100_000), "late", 1)


def test_scores_of_text_are_those_of_the_policy(library):
    """The policy's output is put together from two forwards; a forward under the policy itself gives the same."""
    size = text.SIZES["test"]
    tokenizer = text.tokenizer_of(size.vocabulary)
    model = variants.build(size.model, text.variant_of("late", "late"), tokenizer, 0, positions=size.length)
    rows = text.rows_of(size, True, 4)
    every = [rows[at] for at in range(4)]
    probability = score_tokens(model, every, tokenizer.pad_token_id, Rule(Confidence("entropy"), 1.0)).probability
    tau = -np.log(1 - np.median(probability))
    found = text.score(model, tokenizer, rows, tau)
    along = score_tokens(model, every, tokenizer.pad_token_id, Rule(Confidence("entropy"), 1 - np.exp(-tau)))
    assert 0.3 < found["policies"]["entropy"]["iterated"] == (along.passes > 1).mean() < 0.7
    assert found["policies"]["entropy"]["loss"] == pytest.approx(along.loss.mean(), rel=1e-5)
    line = {"held_out": found}
    loss, right, goes = text.output_of(line, "entropy")
    assert np.abs(loss - along.loss).max() <= text.GRID / 2 + 1e-4
    assert (right == along.right).all() and (goes == (along.passes > 1)).all()
    assert text.output_of(line, "always")[2].all() and not text.output_of(line, "never")[2].any()


def test_tokens_are_sorted_by_the_loss_of_the_other_seed():
    def line(variant: str, seed: int, losses: list[float]) -> dict:
        packed = [text.pack(np.array(losses))] * 2
        right = [text.pack(np.array([0.0, 1.0]) * text.GRID)] * 2
        each = {"losses": packed, "right": right, "iterates": text.pack(np.array([0.0, 1.0]) * text.GRID)}
        return {"variant": variant, "seed": seed, "held_out": {"each": each}}

    lines = [line("standard", 0, [0.0, 3.0]), line("standard", 1, [3.0, 0.0]), line("late", 0, [1.0, 2.0])]
    rows = {row.split(" | ")[0].strip("| "): row for row in text.by_hardness(lines, "late").splitlines()}
    assert rows["2 to 4"].endswith("| 0.000 / 0.500 | 1.000 / 0.000 | 1.000 / 0.000 |")  # late: seed 1 is the judge
    assert rows["0 to 0.1"].endswith("| 3.000 / 0.500 | 2.000 / 1.000 | 2.000 / 1.000 |")
    assert "| 100% |" in rows["0 to 0.1"]
    assert text.unpack(text.pack(np.array([0.0, 0.07, 99.0]))).tolist() == [0.0, 0.0625, 255 / 16]


@pytest.mark.slow
def test_the_gpu_script_writes_each_model_and_leaves_out_what_is_too_late(library, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("nine.mixture.TASKS", TWO)
    monkeypatch.setattr(gpu, "SMALL", replace(gpu.SMALL, nine=gpu.SMALL.nine[:1], processes=1))
    given = ["late", "--small", "--most", "4", "--output", str(tmp_path)]
    gpu.main(given)
    made = {path.name: len(lookahead.lines_of(path)) for path in tmp_path.glob("*.jsonl")}
    assert made == {"nine-1x32.jsonl": 3, "text.jsonl": 2}
    measured = json.loads((tmp_path / "steps.json").read_text())
    assert {file: its["steps"] for file, its in measured.items()} == {"nine-1x32": 4, "text": 4}
    for other in (["formed", *given[1:]], [*given, "--policy", "entropy"]):
        with pytest.raises(ValueError, match="nine-1x32.jsonl has lines of other settings"):
            gpu.main(other)
    before = (tmp_path / "nine-1x32.jsonl").read_text()
    (tmp_path / "text.jsonl").unlink()
    gpu.main([*given, "--minutes", "0"])
    assert (tmp_path / "nine-1x32.jsonl").read_text() == before and not (tmp_path / "text.jsonl").exists()
    left_out = lookahead.lines_of(tmp_path / "left-out.jsonl")
    assert [(line["file"], line["variant"]) for line in left_out] == [("text", "late"), ("text", "standard")]


def test_the_gpu_script_leaves_out_a_file_whose_recipe_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(text, "sources", lambda: {False: ["x = 1\n"], True: ["y = 2\n"]})
    gpu.main(["late", "--small", "--output", str(tmp_path), "--minutes", "0.1"])  # less than a model takes
    left_out = [(line["file"], line["variant"]) for line in lookahead.lines_of(tmp_path / "left-out.jsonl")]
    others = [(file, name) for file in ("nine-2x32",) for name in ("late", "standard-as-recipe")]
    first = [("nine-1x32", name) for name in ("late", "standard-as-recipe", "always-as-recipe")]
    assert left_out == [*first, ("text", "late"), ("text", "standard"), *others]
    assert [path.name for path in tmp_path.iterdir()] == ["left-out.jsonl"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_script_trains_in_bfloat16(library, tmp_path):
    gpu.main(["late", "--small", "--most", "4", "--output", str(tmp_path)])
    line = lookahead.lines_of(tmp_path / "nine-1x32.jsonl")[0]
    assert line["made_with"]["options"]["bf16"] and line["made_with"]["device"] == torch.cuda.get_device_name()
