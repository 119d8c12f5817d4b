"""Our TaH2 against vectors recorded from the authors' code (tests/golden/T/README.md), through `tah convert`.

Their depth counts from 0, ours from 1.
"""

import pytest
import torch

from helpers.golden_tah2 import GRAD_NORM, LOGITS, LOSS, golden, official, our_name
from tah import DuoCache, TaHForCausalLM, TrainingPass, convert
from tah.policy import Policy
from tah.training.joint import gain_labels, joint_decider_loss

T = golden()
IDS, MASK, LABELS = (T.inputs[name].long() for name in ("right_input_ids", "right_attention_mask", "labels"))
VALID = MASK.bool()
SHIFTED = T.tensors["train_m4"]["labels_shifted"].long()
SUPERVISED = SHIFTED != -100


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The recorded checkpoint, from the authors' layout."""
    directory = tmp_path_factory.mktemp("golden")
    convert(official(directory / "original"), directory / "T")
    return directory / "T"


@pytest.fixture
def load(checkpoint):
    def load(**changes):
        model = TaHForCausalLM.from_pretrained(checkpoint)
        for name, value in changes.items():
            setattr(model.config, name, value)
        return model

    return load


def close(got, want, atol=LOGITS["atol"]):
    torch.testing.assert_close(got, want, atol=atol, rtol=LOGITS["rtol"])


class Spy(Policy):
    """The model's decider, which keeps what it reads and returns at each depth, and every layer's hidden states."""

    def __init__(self, model):
        self.decider, self.seen = model.decider, []
        self.layers = tuple(range(model.config.get_text_config().num_hidden_layers + 1))

    def __call__(self, state):
        logits = self.decider(state)
        self.seen.append((state, logits, state.map_pass_logits(torch.Tensor.clone)))
        return logits


@pytest.mark.parametrize("side", ["right", "left"])
@torch.no_grad()
def test_passes_and_mixture(load, side):
    ids, mask = (T.inputs[f"{side}_{name}"].long() for name in ("input_ids", "attention_mask"))
    model, valid, want = load(), mask.bool(), T.tensors[f"eval_{side}_m4"]
    out = model(ids, attention_mask=mask)
    assert torch.equal(out.depth_count[valid], want["iter_count"][valid].long())
    close(out.logits[valid], want["final_logprobs"][valid])
    assert out.logits.dtype == torch.float32
    assert torch.equal(out.logits[valid].argmax(-1), want["final_argmax"][valid].long())
    close(out.mixture_weights[valid], want["weights"][valid])
    spy = Spy(model)
    again = model(ids, attention_mask=mask, policy=spy, max_depth=5)  # one more, so that the policy is asked after 4
    at_four = want["iter_count"] == 4
    assert torch.equal(again.depth_count[~at_four & valid], want["iter_count"][~at_four & valid].long())
    for depth, (state, logits, own) in enumerate(spy.seen[:4], 1):
        atol = 2e-5 if depth == 1 else LOGITS["atol"]
        recorded = {name.partition("_")[2]: x for name, x in want.items() if name.startswith(f"depth{depth - 1}_")}
        active = recorded["active"].bool() & valid
        assert torch.equal(state.positions, recorded["position_ids"][active].long())
        close(state.hidden[0], recorded["input_embeds"][active], atol)
        close(state.hidden[spy.layers[-1]], recorded["last_hidden"][active], atol)
        close(own, recorded["logits"][active], atol)
        if depth < 4:
            close(logits, recorded["decider_logit"][active], atol)
            close(logits.sigmoid(), recorded["decider_prob"][active], atol)
            close(out.continue_logits[:, :, depth - 1][active], recorded["decider_logit"][active], atol)
            assert torch.equal(logits.sigmoid() > model.config.threshold, recorded["decision"][active].bool())


FIXED_DEPTH = {"attention": "own", "output": "even", "policy": "always", "max_depth": 2}


@pytest.mark.parametrize(
    ("mode", "changes"),
    [
        ("duo_stop_m2", {"max_depth": 2}),
        ("duo_stop_m2_lean", {"max_depth": 2}),
        ("causal_even_always_m2", FIXED_DEPTH),
        ("causal_even_always_m2_labels", FIXED_DEPTH),
        ("duo_stop_m4_labels", {}),
    ],
)
@torch.no_grad()
def test_modes(load, mode, changes):
    want = {name.partition(".")[2]: x for name, x in T.tensors["modes"].items() if name.startswith(f"{mode}.")}
    model, given = load(**changes), {}
    if mode == "causal_even_always_m2_labels":  # what nothing supervises takes one pass
        given = {"depth_labels": (~SUPERVISED).long(), "training": TrainingPass(follow_labels=True)}
    out = model(IDS, attention_mask=MASK, labels=LABELS, **given)
    assert torch.equal(out.depth_count[VALID], want["iter_count"][VALID].long())
    weights = want["weights"]  # those of `even` are recorded as 1 per pass
    close(out.mixture_weights[VALID], (weights / weights.sum(-1, keepdim=True))[VALID])
    if mode.endswith("_labels"):
        target = out.logits[SUPERVISED].gather(-1, SHIFTED[SUPERVISED][:, None])
        close(target, want["final"][SUPERVISED])
        assert out.loss.item() == pytest.approx(want["loss"].item(), rel=LOSS)
    else:
        close(out.logits[VALID], want["final"][VALID])


@torch.no_grad()
def test_other_settings_miss_the_vectors(load):
    """Negative control: each changed setting gives other log-probabilities for the same decisions."""
    want = T.tensors["eval_right_m4"]
    forced = {"depth_labels": want["iter_count"].long(), "training": TrainingPass(follow_labels=True)}

    def missed_by(model):
        got = model(IDS, attention_mask=MASK, **forced).logits
        return (got - want["final_logprobs"])[VALID].abs().max().item()

    assert missed_by(load()) < 5e-4
    assert missed_by(load(attention="own")) > 0.01
    assert missed_by(load(output="even")) > 0.01
    for part, name in (("next_input_mlp", "norm_out"), ("next_input_mlp", "norm_pre"), ("decider", "norm_probs")):
        model = load()
        setattr(getattr(model, part), name, torch.nn.Identity())
        assert missed_by(model) > 0.01, name


@torch.no_grad()
def test_losses_of_each_pass_and_labels(load):
    want = T.tensors["eval_metadata_m4"]
    model = load()
    side = TrainingPass(side_passes=True)
    out = model(IDS, attention_mask=MASK, labels=LABELS, training=side, output_last_hidden_state=True)
    close(out.last_hidden_state[VALID], want["weighted_hidden"][VALID])
    for depth in (1, 2, 3, 4):
        known = SUPERVISED & (out.depth_count >= depth - 1)  # one more than a token took
        close(out.pass_loss[:, :, depth - 1][known], want[f"iter_score_{depth}"][known])
        assert out.pass_loss[:, :, depth - 1][~known].isnan().all()
    found = gain_labels(out, SUPERVISED, [0.99])
    assert torch.equal(found.depth_labels, want["iter_count_labels"].long())
    for depth in (1, 2, 3):
        close(out.continue_logits[:, :, depth - 1][VALID].nan_to_num(), want[f"decider_logits_{depth}"][VALID])


@pytest.mark.parametrize("chunks", [[12] + [1] * 8, [5, 6, 9], [20]])
@torch.no_grad()
def test_cached_equals_uncached(load, chunks):
    want, model = T.tensors["cache"], load()
    ids, mask = want["input_ids"].long(), want["attention_mask"].long()
    cache, outs, start = DuoCache(), [], 0
    for size in chunks:
        end = start + size
        outs.append(model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True))
        start = end
    logits, valid = torch.cat([out.logits for out in outs], 1), mask.bool()
    close(logits[valid], want["full_logprobs"][valid])
    close(logits[:, 12:], want["incremental_logprobs"])
    counts = torch.cat([out.depth_count for out in outs], 1)
    assert torch.equal(counts[valid], want["full_iter_count"][valid].long())
    assert torch.equal(cache.depth_count.view[valid], want["full_iter_count"][valid].long())


@torch.no_grad()
def test_greedy_generation(load):
    want, facts, model = T.tensors["generate"], T.facts["generate"], load()
    ids, mask = T.inputs["left_input_ids"].long(), T.inputs["left_attention_mask"].long()
    prompt, valid = ids.shape[1], mask.bool()
    given = dict(attention_mask=mask, max_new_tokens=24, do_sample=False, return_dict_in_generate=True)
    out = model.generate(ids, **given, eos_token_id=None, output_logits=True)
    assert out.sequences[:, prompt:].tolist() == facts["tokens"]
    assert torch.equal(out.depth_count[:, :prompt][valid], want["prefill_iter_count"][valid].long())
    assert torch.equal(out.depth_count[:, prompt - 1 : -1], want["producing_iter_count"].long())
    assert torch.equal(out.depth_count[:, prompt:-1], want["decode_iter_count"].long())
    close(torch.stack(out.logits, dim=1), want["step_logprobs"])
    close(out.mixture_weights[:, prompt - 1 : -1].sum(-1), torch.ones(2, 24), 1e-6)

    eos, pad = facts["eos"], model.config.pad_token_id
    stopped = model.generate(ids, **given, eos_token_id=eos, pad_token_id=pad).sequences[:, prompt:].tolist()
    for row, expected in zip(stopped, facts["tokens_with_eos"], strict=True):
        assert row[: len(expected)] == expected
        assert row[len(expected) :] in ([], [eos], [eos, pad])  # ours keeps the EOS itself, as transformers does
    two = model.generate(ids, **given, eos_token_id=None, max_depth=2)
    assert two.sequences[:, prompt:].tolist() == facts["tokens_max_iter2"]


def run_training(model):
    out = model.train()(
        IDS, attention_mask=MASK, labels=LABELS, num_items_in_batch=24, training=TrainingPass(side_passes=True)
    )
    labels = gain_labels(out, SUPERVISED, [0.99])
    return out, labels, joint_decider_loss(out, labels, 24)


@pytest.mark.parametrize("depth", [4, 2])
@torch.no_grad()
def test_training(load, depth):
    want, facts = T.tensors[f"train_m{depth}"], T.facts["train"][f"m{depth}"]
    out, labels, decider_loss = run_training(load(max_depth=depth))
    assert torch.equal(out.depth_count[VALID], want["iter_count"][VALID].long())
    assert torch.equal(labels.depth_labels, want["iter_count_labels"].long())
    for d in range(1, depth + 1):
        known = SUPERVISED & (out.depth_count >= d - 1)
        close(out.pass_loss[:, :, d - 1][known], want[f"score_depth{d}"][known])
    recorded = {entry["depth"]: entry["boundary"] for entry in facts["boundaries"]}
    for d in range(1, depth):
        asked = SUPERVISED & (out.depth_count >= d)
        assert torch.equal(labels.asked[:, :, d - 1], asked)
        close(labels.cost[:, :, d - 1][asked], want[f"bce_cost_depth{d}"])
        close(out.continue_logits[:, :, d - 1][asked], want[f"bce_logits_depth{d}"])
        assert torch.equal((labels.depth_labels > d)[asked].float(), want[f"bce_targets_depth{d}"])
        assert labels.boundaries[d - 1].item() == pytest.approx(recorded[d], abs=1e-4)
    assert out.loss.item() == pytest.approx(facts["nll"], rel=LOSS)
    assert decider_loss.item() == pytest.approx(facts["decider_loss"], rel=LOSS)
    assert (out.loss + 0.05 * decider_loss).item() == pytest.approx(facts["loss"], rel=LOSS)


@pytest.mark.parametrize(
    ("run_name", "depth", "weights"),
    [
        ("m4", 4, (1.0, 0.05)),
        ("m2", 2, (1.0, 0.05)),
        ("m4_nll_only", 4, (1.0, 0.0)),
        ("m4_decider_only", 4, (0.0, 1.0)),
    ],
)
def test_gradients(load, run_name, depth, weights):
    model, facts = load(max_depth=depth), T.facts["train"][run_name]
    out, _, decider_loss = run_training(model)
    (weights[0] * out.loss + weights[1] * decider_loss).backward()
    parameters = dict(model.named_parameters())
    names = {our_name(name): name for name in facts["grad_norms"]}
    assert names.keys() == parameters.keys()
    for name, parameter in parameters.items():
        expected = facts["grad_norms"][names[name]]
        found = 0.0 if parameter.grad is None else parameter.grad.norm().item()
        assert found == pytest.approx(expected or 0.0, rel=GRAD_NORM, abs=1e-6), name
        full = T.tensors["train_m4_grads"].get(f"grad::{names[name]}") if run_name == "m4" else None
        if full is not None:
            assert (parameter.grad - full).norm() < GRAD_NORM * full.norm(), name
