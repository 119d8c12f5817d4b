"""The slow TaH2 reference of the tests against vectors recorded from the authors' code (tests/golden/T/README.md).

Their depth counts from 0, ours from 1.
"""

import pytest
import torch

from helpers.golden_tah2 import GRAD_NORM, LOGITS, LOSS, golden, our_name, reference_model, unpadded
from helpers.reference_tah2 import run, train

T = golden()
RIGHT, RIGHT_MASK = T.inputs["right_input_ids"], T.inputs["right_attention_mask"]
VALID = RIGHT_MASK.bool()
LABELS = [row[: int(m.sum())].long() for row, m in zip(T.inputs["labels"], RIGHT_MASK, strict=True)]
SUPERVISED = T.tensors["train_m4"]["labels_shifted"] != -100


def close(got, want, atol=LOGITS["atol"]):
    torch.testing.assert_close(got, want, atol=atol, rtol=LOGITS["rtol"])


def rows(side):
    ids, mask = (T.inputs[f"{side}_{name}"] for name in ("input_ids", "attention_mask"))
    return unpadded(ids, mask), mask.bool()


@pytest.mark.parametrize("side", ["right", "left"])
@torch.no_grad()
def test_passes_and_mixture(side):
    want, (inputs, valid) = T.tensors[f"eval_{side}_m4"], rows(side)
    done = [run(reference_model(), ids) for ids in inputs]
    assert torch.equal(torch.cat([row.depth_count for row in done]), want["iter_count"][valid])
    close(torch.cat([row.log_probs for row in done]), want["final_logprobs"][valid])
    close(torch.cat([row.mixture_weights(4) for row in done]), want["weights"][valid])
    for depth in (1, 2, 3, 4):
        atol = 2e-5 if depth == 1 else LOGITS["atol"]
        active = want[f"depth{depth - 1}_active"].bool() & valid
        names = {"inputs": "input_embeds", "hidden": "last_hidden", "logits": "logits"}
        names |= {"continue_logits": "decider_logit"} if depth < 4 else {}
        for ours, theirs in names.items():
            got = torch.cat([row.at_depth(ours, depth) for row in done])
            close(got, want[f"depth{depth - 1}_{theirs}"][active], atol)


@pytest.mark.parametrize(
    ("mode", "settings"),
    [
        ("duo_stop_m2", {"max_depth": 2}),
        ("duo_stop_m2_lean", {"max_depth": 2}),
        ("causal_even_always_m2", {"max_depth": 2, "attention": "own", "output": "even", "policy": "always"}),
        ("causal_even_always_m2_labels", {"max_depth": 2, "attention": "own", "output": "even", "policy": "always"}),
        ("duo_stop_m4_labels", {}),
    ],
)
@torch.no_grad()
def test_modes(mode, settings):
    want = {name.partition(".")[2]: x for name, x in T.tensors["modes"].items() if name.startswith(f"{mode}.")}
    model, inputs = reference_model(**settings), rows("right")[0]
    if mode.endswith("_labels"):
        out = train(model, inputs, LABELS, num_items=24)
        done = out.rows
        close(out.target_logprob, want["final"][SUPERVISED][:, 0])
        assert out.nll.item() == pytest.approx(want["loss"].item(), rel=LOSS)
    else:
        done = [run(model, ids) for ids in inputs]
        close(torch.cat([row.log_probs for row in done]), want["final"][VALID])
    assert torch.equal(torch.cat([row.depth_count for row in done]), want["iter_count"][VALID])
    weights = want["weights"][VALID]  # those of `even` are recorded as 1 per pass
    close(torch.cat([row.mixture_weights(model.max_depth) for row in done]), weights / weights.sum(-1, keepdim=True))


@torch.no_grad()
def test_a_changed_formula_is_noticed():
    """Negative controls: each changes one thing and misses the recorded numbers."""
    want, inputs = T.tensors["eval_right_m4"], rows("right")[0]
    forced = unpadded(want["iter_count"], RIGHT_MASK)  # so that only the numbers can differ

    def missed_by(model):
        done = [run(model, ids, forced=counts) for ids, counts in zip(inputs, forced, strict=True)]
        return (torch.cat([row.log_probs for row in done]) - want["final_logprobs"][VALID]).abs().max().item()

    assert missed_by(reference_model()) < 5e-4
    assert missed_by(reference_model(attention="own")) > 0.01
    assert missed_by(reference_model(output="even")) > 0.01
    for name in ("next_input_mlp.norm_pre.weight", "next_input_mlp.norm_out.weight", "decider.norm_probs.weight"):
        model = reference_model()
        del model.weights[name]
        assert missed_by(model) > 0.01, name


@torch.no_grad()
def test_metadata():
    want = T.tensors["eval_metadata_m4"]
    out = train(reference_model(), rows("right")[0], LABELS, num_items=24)
    assert torch.equal(torch.cat([row.depth_count for row in out.rows]), want["iter_count"][VALID])
    assert torch.equal(out.depth_labels, want["iter_count_labels"][SUPERVISED].long())
    assert not want["iter_count_labels"][~SUPERVISED].any()
    for depth in (1, 2, 3, 4):
        close(out.losses[depth - 1], want[f"iter_score_{depth}"][SUPERVISED])
    close(torch.cat([row.mixed_hidden() for row in out.rows]), want["weighted_hidden"][VALID])
    close(torch.cat([row.at_depth("hidden", 1) for row in out.rows]), want["first_iter_hidden"][VALID])


@torch.no_grad()
def test_cache():
    want = T.tensors["cache"]
    mask = want["attention_mask"]
    done = [run(reference_model(), ids) for ids in unpadded(want["input_ids"], mask)]
    assert torch.equal(torch.cat([row.depth_count for row in done]), want["full_iter_count"][mask.bool()])
    close(torch.cat([row.log_probs for row in done]), want["full_logprobs"][mask.bool()])
    close(torch.stack([row.log_probs[-8:] for row in done]), want["incremental_logprobs"])


@torch.no_grad()
def test_greedy_tokens():
    """The whole recorded row at once: each of its tokens is the argmax of the mixture before it."""
    want, facts = T.tensors["generate"], T.facts["generate"]
    for depth, tokens in ((4, want["tokens"]), (2, torch.tensor(facts["tokens_max_iter2"]))):
        for prompt, new, logprobs, counts in zip(
            rows("left")[0], tokens, want["step_logprobs"], want["producing_iter_count"], strict=True
        ):
            row = run(reference_model(max_depth=depth), torch.cat([prompt, new[:-1].long()]))
            assert torch.equal(row.log_probs[-24:].argmax(-1), new.long())
            if depth == 4:
                close(row.log_probs[-24:], logprobs)
                assert torch.equal(row.depth_count[-24:], counts.long())


@pytest.mark.parametrize("depth", [4, 2])
def test_training(depth):
    want, facts = T.tensors[f"train_m{depth}"], T.facts["train"][f"m{depth}"]
    out = train(reference_model(max_depth=depth), rows("right")[0], LABELS, num_items=24)
    assert torch.equal(out.depth_count, want["iter_count"][SUPERVISED].long())
    assert torch.equal(out.depth_labels, want["iter_count_labels"][SUPERVISED].long())
    close(out.target_logprob, want["target_logprob"][SUPERVISED])
    for d in range(1, depth + 1):
        filled = want[f"score_filled_depth{d}"][SUPERVISED].bool()
        close(out.losses[d - 1][filled], want[f"score_depth{d}"][SUPERVISED][filled])
    for d in range(1, depth):
        ran = out.depth_count >= d
        close(out.costs[d - 1][ran], want[f"bce_cost_depth{d}"])
        assert torch.equal((out.depth_labels > d)[ran].float(), want[f"bce_targets_depth{d}"])
        assert out.pos_weights[d - 1] == pytest.approx(facts["pos_weight_by_depth"][str(d)])
    recorded = {entry["depth"]: entry for entry in facts["boundaries"]}
    assert len(recorded) == len(out.boundaries) == depth - 1
    for d, entry in recorded.items():
        assert out.boundaries[d - 1] == pytest.approx(entry["boundary"], abs=1e-4)
        assert (out.candidates[d - 1], out.hard[d - 1]) == (entry["candidates"], entry["hard"])
    assert out.nll.item() == pytest.approx(facts["nll"], rel=LOSS)
    assert out.decider_loss.item() == pytest.approx(facts["decider_loss"], rel=LOSS)
    assert out.loss().item() == pytest.approx(facts["loss"], rel=LOSS)


@pytest.mark.parametrize(
    ("run_name", "depth", "weights"),
    [
        ("m4", 4, (1.0, 0.05)),
        ("m2", 2, (1.0, 0.05)),
        ("m4_nll_only", 4, (1.0, 0.0)),
        ("m4_decider_only", 4, (0.0, 1.0)),
    ],
)
def test_gradients(run_name, depth, weights):
    model, facts = reference_model(max_depth=depth), T.facts["train"][run_name]
    train(model, rows("right")[0], LABELS, num_items=24).loss(*weights).backward()
    parameters = {f"base.{name}": p for name, p in model.base.named_parameters()} | dict(model.weights)
    names = {our_name(name): name for name in facts["grad_norms"]}
    assert names.keys() == parameters.keys()
    for name, parameter in parameters.items():
        expected = facts["grad_norms"][names[name]]
        found = 0.0 if parameter.grad is None else parameter.grad.norm().item()
        assert found == pytest.approx(expected or 0.0, rel=GRAD_NORM, abs=1e-6), name
        full = T.tensors["train_m4_grads"].get(f"grad::{names[name]}") if run_name == "m4" else None
        if full is not None:
            # Two of the sorted probabilities that the decider reads may be so close that rounding swaps them; then
            # their gradients swap, too.
            assert (parameter.grad - full).norm() < GRAD_NORM * full.norm(), name
