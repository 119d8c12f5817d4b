"""Our output against vectors recorded from the authors' implementation (tests/golden/*/README.md).

Their depth counts from 0, ours from 1. S is a Qwen3, L a Llama; both are random float32 weights.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from tah import DuoCache, TaHForCausalLM, convert
from tah.policy import Policy

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module", params=["S", "L"])
def golden(request, tmp_path_factory):
    folder = GOLDEN / request.param
    target = tmp_path_factory.mktemp("golden") / request.param
    convert(folder / "ckpt", target)
    manifest = json.loads((folder / "manifest.json").read_text())
    tensors = {p.stem: load_file(p) for p in folder.glob("*.safetensors")}
    facts = {p.stem: json.loads(p.read_text()) for p in folder.glob("*.json")}
    tolerance = manifest["suggested_tolerances"]
    return SimpleNamespace(
        load=lambda: TaHForCausalLM.from_pretrained(target),
        model=TaHForCausalLM.from_pretrained(target),
        manifest=manifest,
        tensors=tensors,
        facts=facts,
        inputs=tensors["inputs"],
        logits={"atol": tolerance["logits_atol"], "rtol": tolerance["logits_rtol"]},
        tolerance=tolerance,
    )


class Spy(Policy):
    """The model's decider, keeping what it saw and said at each depth."""

    def __init__(self, decider, layers):
        self.decider, self.states, self.said = decider, [], []
        self.layers = layers

    def __call__(self, state):
        self.states.append(state)
        self.said.append(self.decider(state))
        return self.said[-1]


def close(got, want, golden, mask=None):
    if mask is not None:
        got, want = got[mask], want[mask]
    torch.testing.assert_close(got, want, **golden.logits)


@pytest.mark.parametrize("side", ["right", "left"])
@torch.no_grad()
def test_eval_forward(golden, side):
    want, ids, mask = (
        golden.tensors[f"eval_{side}"],
        *(golden.inputs[f"{side}_{k}"] for k in ("input_ids", "attention_mask")),
    )
    model, valid = golden.model, mask.bool()
    layers = model.config.get_text_config().num_hidden_layers
    spy = Spy(model.decider, tuple(range(layers + 1)))
    out = model(ids, attention_mask=mask, policy=spy)

    assert torch.equal(out.depth_count, want["iter_count"])
    close(out.logits, want["final_logits"], golden, valid)
    assert torch.equal(out.logits.argmax(-1)[valid], want["final_argmax"][valid])
    assert want["iter_count"].max() == 2  # the vectors do iterate

    first = model(ids, attention_mask=mask, policy="never")
    close(first.logits, want["depth0_cumulative_logits"], golden, valid)
    state = spy.states[0]
    assert torch.equal(state.positions, want["depth0_position_ids"][valid])
    close(spy.said[0].sigmoid(), want["depth0_decider_prob"][valid], golden)
    close(spy.said[0], want["depth0_decider_logit"][valid], golden)
    chosen = spy.said[0].sigmoid() > model.config.threshold
    assert torch.equal(chosen, want["depth0_decision"][valid].bool())
    if side == "right":
        for k in range(layers + 1):
            close(state.hidden[k], want["depth0_hidden_states"][:, :, k][valid], golden)

    # Depth 2 alone: what it was fed, its hidden states and its own logits.
    again = want["depth1_active"].bool()
    labels = torch.where(again, 2, 1)

    class Watch(Spy):
        def __call__(self, state):
            self.states.append(state)
            return torch.where(state.depth_labels > state.depth, torch.inf, -torch.inf)

    watch = Watch(None, tuple(range(layers + 1)))
    deep = model(ids, attention_mask=mask, policy=watch, depth_labels=labels, max_depth=3)
    close(deep.logits, want["final_logits"], golden, valid)
    state = watch.states[1]
    assert torch.equal(state.positions, want["depth1_position_ids"][again])
    close(state.hidden[0], want["depth1_input_embeds"][again], golden)
    close(deep.logits[again] - first.logits[again], want["depth1_delta_logits"][again], golden)
    close(deep.logits[again], want["depth1_cumulative_logits"][again], golden)
    if side == "right":
        for k in range(layers + 1):
            close(state.hidden[k], want["depth1_hidden_states"][:, :, k][again], golden)


@torch.no_grad()
def test_decisions_have_margin_and_would_notice(golden):
    """Negative control: without the adapter, or with attention to depth 1 only, the vectors are missed."""
    ids, mask = golden.inputs["right_input_ids"], golden.inputs["right_attention_mask"]
    want, again = golden.tensors["eval_right"]["final_logits"], golden.tensors["eval_right"]["iter_count"] > 1
    model = golden.load()
    model.config.attention = "own"
    assert (model(ids, attention_mask=mask).logits - want)[again].abs().max() > 0.01
    model = golden.load()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.zero_()
    assert (model(ids, attention_mask=mask).logits - want)[again].abs().max() > 0.1


def peft_name(name):
    """Our parameter name as the authors' PEFT-wrapped model spells it."""
    name = name.removeprefix("base.")
    if ".lora_" in name:
        return "base_model.model." + name.replace("lora_A.weight", "lora_A.default.weight").replace(
            "lora_B.weight", "lora_B.default.weight"
        )
    parent = name.rpartition(".")[0]
    adapted = parent.endswith("_proj")
    return "base_model.model." + (f"{parent}.base_layer.weight" if adapted else name)


def test_training_with_labels(golden):
    want, facts = golden.tensors["train_label"], golden.facts["train_label"]
    grads = golden.tensors["train_label_grads"]
    ids, mask = golden.inputs["right_input_ids"], golden.inputs["right_attention_mask"]
    labels, depth_labels = golden.inputs["labels"], golden.inputs["iter_count_labels"]
    model = golden.load().train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            assert module.p == 0
    given = dict(attention_mask=mask, labels=labels, depth_labels=depth_labels, policy="oracle", logits_to_keep=0)
    out = model(ids, **given)
    valid = mask.bool()
    assert torch.equal(out.depth_count, want["iter_count"])
    close(out.logits, want["final_logits"], golden, valid)
    shifted = F.pad(labels[:, 1:], (0, 1), value=-100)
    assert torch.equal(shifted, want["labels_shifted"])
    ce = F.cross_entropy(out.logits.transpose(1, 2), shifted, reduction="none")
    close(ce, want["per_token_ce"], golden)
    rtol = golden.tolerance["loss_rtol"]
    assert out.loss.item() == pytest.approx(facts["loss_mean"], rel=rtol)
    items = torch.tensor(facts["num_items_in_batch"])
    assert model(ids, **given, num_items_in_batch=items).loss.item() == pytest.approx(facts["loss_num_items"], rel=rtol)

    out.loss.backward()
    checked = 0
    for name, parameter in model.named_parameters():
        if name.startswith("decider."):
            assert parameter.grad is None
            continue
        expected = facts["grad_norms"][peft_name(name)]
        checked += 1
        if expected is None:
            assert parameter.grad is None or parameter.grad.norm() == 0
            continue
        assert parameter.grad.norm().item() == pytest.approx(expected, rel=golden.tolerance["grad_norm_rtol"], abs=1e-7)
        full = grads.get(f"grad::{peft_name(name)}")
        if full is not None:
            torch.testing.assert_close(parameter.grad, full, atol=3e-4, rtol=2e-3)
    assert checked == len([k for k in facts["grad_norms"] if "threshold" not in k and "decider" not in k])


def test_training_the_decider(golden):
    want, facts = golden.tensors["train_decider"], golden.facts["train_decider"]
    ids, mask = golden.inputs["right_input_ids"], golden.inputs["right_attention_mask"]
    depth_labels = golden.inputs["iter_count_labels"]
    model = golden.load().train().requires_grad_(False)
    model.decider.requires_grad_(True)
    out = model(ids, attention_mask=mask)
    z = out.continue_logits[:, :, 0]
    included = mask.bool() & (depth_labels != -100)
    assert torch.equal(included, want["depth0_bce_included"].bool())
    target = (depth_labels > 1).float()
    assert torch.equal(target[included], want["depth0_bce_target"].float()[included])
    positive = torch.tensor(facts["pos_weight"])
    bce = F.binary_cross_entropy_with_logits(z[included], target[included], pos_weight=positive)
    assert bce.item() == pytest.approx(facts["bce_mean_per_depth"][0], rel=golden.tolerance["loss_rtol"])
    loss = bce / ids.numel()  # the reference divides its mean once more, by all positions
    assert loss.item() == pytest.approx(facts["loss"], rel=golden.tolerance["loss_rtol"])
    assert (bce / facts["num_items_in_batch"]).item() == pytest.approx(facts["loss_num_items"], rel=1e-4)
    correct = ((z[included].sigmoid() > model.config.threshold) == target[included].bool()).sum()
    assert [int(correct), int(included.sum())] == facts["decider_accuracy_correct_total"]

    loss.backward()
    grads = golden.tensors["train_decider_grads"]
    names = {name for name, norm in facts["grad_norms"].items() if norm is not None}
    assert names == {name for name, _ in model.decider.named_parameters()}
    for name, parameter in model.decider.named_parameters():
        norm = facts["grad_norms"][name]
        assert parameter.grad.norm().item() == pytest.approx(norm, rel=golden.tolerance["grad_norm_rtol"], abs=1e-8)
        if f"grad::{name}" in grads:
            torch.testing.assert_close(parameter.grad, grads[f"grad::{name}"], atol=1e-5, rtol=2e-3)
    assert all(p.grad is None for n, p in model.named_parameters() if not n.startswith("decider."))


@torch.no_grad()
def test_greedy_generation(golden):
    want, facts = golden.tensors["generate"], golden.facts["generate"]
    ids, mask = golden.inputs["left_input_ids"], golden.inputs["left_attention_mask"]
    prompt, new = ids.shape[1], facts["max_new_tokens"]
    given = dict(attention_mask=mask, max_new_tokens=new, do_sample=False, return_dict_in_generate=True)
    out = golden.model.generate(ids, **given, eos_token_id=None, output_logits=True)
    assert torch.equal(out.sequences[:, prompt:], want["tokens"])
    assert torch.equal(out.depth_count[:, :prompt], want["prefill_iter_count"])
    assert torch.equal(out.depth_count[:, prompt - 1 : -1], want["producing_iter_count"])
    assert torch.equal(out.depth_count[:, prompt:-1], want["decode_iter_count"][:, :-1])
    close(torch.stack(out.logits, dim=1), want["step_logits"], golden)

    eos, pad = facts["eos_token_id"], golden.manifest["pad_token_id"]
    stopped = golden.model.generate(ids, **given, eos_token_id=eos, pad_token_id=pad).sequences[:, prompt:].tolist()
    for row, expected in zip(stopped, facts["tokens_with_eos"], strict=True):
        assert row[: len(expected)] == expected
        assert (
            row[len(expected) :] == [] or row[len(expected)] == eos
        )  # ours keeps the EOS itself, as transformers does
    alone = golden.model.generate(ids[:1], **{**given, "attention_mask": mask[:1]}, eos_token_id=eos, pad_token_id=pad)
    assert [t for t in alone.sequences[0, prompt:].tolist() if t != eos] == facts["row0_alone_tokens_with_eos"][0]


@pytest.mark.parametrize("chunks", [[12] + [1] * 8, [5, 6, 9], [20]])
@torch.no_grad()
def test_cached_equals_uncached(golden, chunks):
    want = golden.tensors["cache"]
    ids, mask = want["input_ids"], want["attention_mask"]
    valid = mask.bool()
    full = golden.model(ids, attention_mask=mask)
    close(full.logits, want["full_logits"], golden, valid)
    assert torch.equal(full.depth_count, want["full_iter_count"])
    cache, logits, counts, start = DuoCache(), [], [], 0
    for size in chunks:
        end = start + size
        out = golden.model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
        logits.append(out.logits)
        counts.append(out.depth_count)
        start = end
    close(torch.cat(logits, 1), want["full_logits"], golden, valid)
    close(torch.cat(logits, 1)[:, 12:], want["incremental_logits"], golden)
    assert torch.equal(torch.cat(counts, 1), want["incremental_iter_count"])
    assert torch.equal(cache.depth_count.view, want["full_iter_count"])
