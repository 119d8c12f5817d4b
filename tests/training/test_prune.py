"""Pruning: the right layer goes, what is left is a normal checkpoint of the same model, nothing is half-written."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from helpers.families import TINY, VOCAB, tiny
from tah import TaHForCausalLM
from tah.core.families import decoder_layers
from tah.training.prune import Text, drop_layer, perplexities, prune
from tah_cli.app import run

EXACT = ["llama", "qwen3", "gemma2", "gpt2", "smollm3", "cohere2", "opt", "olmoe", "llama4_text", "phi3"]


def texts(count: int = 3, length: int = 10, seed: int = 0) -> list[Text]:
    """Of different lengths, the first three tokens not counted."""
    dice = random.Random(seed)
    sizes = [length + dice.randrange(5) for _ in range(count)]
    return [Text([dice.randrange(3, VOCAB) for _ in range(n)], [False] * 3 + [True] * (n - 3)) for n in sizes]


def deep(layers: int = 4) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**TINY | {"num_hidden_layers": layers, "initializer_range": 0.3})).eval()


@torch.no_grad()
def brute(model, held_out) -> float:
    """Perplexity by the model's own forward, over all counted tokens alike."""
    loss, count = 0.0, 0
    for text in held_out:
        logits = model(torch.tensor([text.tokens])).logits[0, :-1].float()
        counted = torch.tensor(text.counts[1:])
        loss += F.cross_entropy(logits, torch.tensor(text.tokens[1:]), reduction="none")[counted].double().sum().item()
        count += int(counted.sum())
    return math.exp(loss / count)


@pytest.fixture
def rows(tmp_path) -> Path:
    path = tmp_path / "rows.jsonl"
    dice = random.Random(0)
    said = [(f"{dice.randrange(99)}+1", "x" * dice.randrange(1, 9)) for _ in range(70)]
    pairs = [[{"role": "user", "content": q}, {"role": "assistant", "content": a}] for q, a in said]
    path.write_text("".join(json.dumps({"messages": pair}) + "\n" for pair in pairs))
    return path


def test_perplexity_is_per_token_not_per_text():
    model, held_out = deep(), texts(4)
    assert perplexities(model, held_out)[0] == pytest.approx(brute(model, held_out), rel=1e-5)
    each = [brute(model, [text]) for text in held_out]
    assert perplexities(model, held_out)[0] != pytest.approx(sum(each) / 4, rel=1e-3)


@pytest.mark.parametrize("family", EXACT)
@torch.no_grad()
def test_leaving_a_layer_out_equals_dropping_it(family):
    for index in (0, 1):
        model, held_out = tiny(family).eval(), texts()
        before = brute(model, held_out)
        _, without = perplexities(model, held_out)
        assert brute(model, held_out) == before  # measuring leaves no trace
        drop_layer(model, index)
        assert brute(model, held_out) == pytest.approx(without[index], rel=1e-5)
        assert without[index] != pytest.approx(before, rel=1e-5)


@torch.no_grad()
def test_more_than_one_layer_is_dropped_greedily(tmp_path):
    model, held_out = deep(5), texts(4)
    shapes = [layer.mlp.up_proj.weight.clone() for layer in model.model.layers]
    made = prune(model, None, held_out, 2, tmp_path / "out", fewest=4)
    again, left = deep(5), list(range(5))
    for step in made.rounds:  # the same by brute force: every candidate a model of its own
        found = {}
        for at, layer in enumerate(left):
            candidate = deep(5)
            for gone in sorted(set(range(5)) - set(left) | {layer}, reverse=True):
                drop_layer(candidate, gone)
            found[layer] = brute(candidate, held_out)
            assert step.candidates[layer] == pytest.approx(found[layer], rel=1e-5), at
        assert step.dropped == min(found, key=found.get)
        left.remove(step.dropped)
    assert [step.before for step in made.rounds][1] == pytest.approx(made.rounds[0].after, rel=1e-6)
    kept = [layer.mlp.up_proj.weight for layer in model.model.layers]
    assert all(torch.equal(a, shapes[b]) for a, b in zip(kept, left, strict=True))
    assert made.parameters == again.num_parameters() > made.parameters_after == model.num_parameters()


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "smollm3"])
@torch.no_grad()
def test_the_checkpoint_is_the_pruned_model_and_can_be_wrapped(family, tmp_path):
    model = tiny(family).eval()
    made = prune(model, None, texts(), 1, tmp_path / "out", fewest=3)
    kernels = model.config._attn_implementation
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", attn_implementation=kernels)
    ids = torch.arange(3, 20)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)
    cached = [again(ids[:, :9], use_cache=True)]
    cached.append(again(ids[:, 9:], past_key_values=cached[0].past_key_values))  # layers number themselves in a cache
    assert torch.allclose(torch.cat([out.logits for out in cached], 1), again(ids).logits, atol=1e-4)
    assert again.config.num_hidden_layers == 1 == len(decoder_layers(again.model, 1))
    kinds = getattr(again.config, "layer_types", None)
    assert kinds is None or len(kinds) == 1
    wrapped = TaHForCausalLM.from_base(again, policy="always", decider=None)
    assert (wrapped(ids).depth_count == 2).all()
    report = json.loads((tmp_path / "out" / "prune.json").read_text())
    assert report["rounds"][0]["dropped"] == made.dropped[0] and report["parameters_after"] == model.num_parameters()
    assert f"**{made.rounds[0].after:.4f}**" in (tmp_path / "out" / "prune.md").read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


@torch.no_grad()
def test_a_family_that_counts_its_layers_is_refused_and_nothing_is_written(tmp_path):
    model = tiny("diffllama").eval()  # the first layer is scaled unlike the second
    first = decoder_layers(model.model, 2)[0]
    first.self_attn.o_proj.weight.zero_()
    first.mlp.down_proj.weight.zero_()
    said = model.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=9, min_new_tokens=9, do_sample=False)
    held_out = [Text(said[0].tolist(), [False] * 3 + [True] * 9)]  # its own words: the second layer is worth something
    before, without = perplexities(model, held_out)
    assert without[0] == pytest.approx(before) and without[1] > before * 1.01
    with pytest.raises(ValueError, match="DiffLlamaForCausalLM cannot be pruned"):
        prune(model, None, held_out, 1, tmp_path / "out", fewest=1)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    model = deep()

    def full(directory, *args, **kwargs):
        (Path(directory) / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device", str(directory))

    monkeypatch.setattr(model, "save_pretrained", full)
    with pytest.raises(OSError, match="No space left"):
        prune(model, None, texts(), 1, tmp_path / "out", fewest=3)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("layers", "fewest", "words"),
    [(4, 3, "layers=4 must be from 1 to 3"), (0, 3, "layers=0"), (1, 64, "only 3 of the 64 held-out texts")],
)
def test_refused(tmp_path, layers, fewest, words):
    with pytest.raises(ValueError, match=words):
        prune(deep(), None, texts(), layers, tmp_path / "out", fewest=fewest)
    assert list(tmp_path.iterdir()) == []


@torch.no_grad()
def test_nan_weights(tmp_path):
    model = deep()
    model.model.norm.weight.fill_(math.nan)
    with pytest.raises(ValueError, match="NaN"):
        prune(model, None, texts(), 1, tmp_path / "out", fewest=3)


# -- the command -----------------------------------------------------------------------------------------------------


def fails(capsys, *arguments) -> str:
    capsys.readouterr()
    assert run([str(argument) for argument in arguments]) == 2
    out, err = capsys.readouterr()
    assert err.count("\n") == 1 and err.startswith("tah: ") and out == "", err
    return err


def test_prune_and_inspect_side_by_side(capsys, tiny_base, rows, tmp_path):
    assert run(["prune", str(tiny_base), "--data", str(rows), "--output", str(tmp_path / "pruned")]) == 0
    out, err = capsys.readouterr()
    assert "Dropped: layer" in out and f"written to {tmp_path / 'pruned'}" in out
    assert err == "leaving out each layer: 64 of 64 texts\n"
    model = TaHForCausalLM.from_base(str(tmp_path / "pruned"), lora_rank=4)
    model.save_pretrained(tmp_path / "tah")
    assert run(["inspect", str(tmp_path / "tah"), "--against", str(tiny_base), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    plain = AutoModelForCausalLM.from_pretrained(tiny_base).num_parameters()
    assert found["total"] == model.num_parameters() == sum(found["parameters"].values())
    assert found["against"]["parameters"] == plain
    assert found["against"]["difference_percent"] == pytest.approx(100 * (model.num_parameters() / plain - 1))
    assert run(["inspect", str(tmp_path / "pruned"), "--against", str(tiny_base)]) == 0
    assert "against difference percent  -" in capsys.readouterr().out
    assert (tmp_path / "pruned" / "chat_template.jinja").is_file()


def test_bad_input_of_the_command(capsys, tiny_base, tiny_checkpoint, rows, tmp_path):
    few = tmp_path / "few.jsonl"
    few.write_text("\n".join(rows.read_text().splitlines()[:5]))
    before = sorted(tmp_path.rglob("*"))
    out = tmp_path / "out"
    assert "only 5 of the 64" in fails(capsys, "prune", tiny_base, "--data", few, "--output", out)
    assert "from 1 to 1" in fails(capsys, "prune", tiny_base, "--data", rows, "--output", out, "--layers", 2)
    assert "none.jsonl" in fails(capsys, "prune", tiny_base, "--data", tmp_path / "none.jsonl", "--output", out)
    assert "is a TaH checkpoint" in fails(capsys, "prune", tiny_checkpoint, "--data", rows, "--output", out)
    assert "nowhere" in fails(capsys, "prune", "./nowhere", "--data", rows, "--output", out)
    assert "--texts" in fails(capsys, "prune", tiny_base, "--data", rows, "--output", out, "--texts", 0)
    assert "--data" in fails(capsys, "prune", tiny_base, "--output", out)
    assert "gpu" in fails(capsys, "prune", tiny_base, "--data", rows, "--output", out, "--device", "gpu")
    assert "not an empty" in fails(capsys, "prune", tiny_base, "--data", rows, "--output", tmp_path)
    assert "--against" in fails(capsys, "inspect", tiny_base, "--against", tiny_checkpoint)
    assert sorted(tmp_path.rglob("*")) == before


def test_no_chat_template(capsys, tiny_base, rows, tmp_path):
    shutil.copytree(tiny_base, tmp_path / "base")
    (tmp_path / "base" / "chat_template.jinja").unlink()
    assert "chat template" in fails(capsys, "prune", tmp_path / "base", "--data", rows, "--output", tmp_path / "out")
