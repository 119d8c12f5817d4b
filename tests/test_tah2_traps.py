"""Where a TaH2 that looks right is wrong: the traps of the authors' code that other tests do not separate.

| trap | test |
| --- | --- |
| 1 a changed field resets others | `test_a_field_changed_at_loading_leaves_the_others` |
| 2 a cut depth loses weight | `test_a_cut_depth_is_a_model_of_that_depth`, `test_tah2.py::test_limits_of_each_row` |
| 3 parts of several precisions | `test_every_part_has_the_precision_asked_for` |
| 4 order of the inputs, and the embedding at every depth | `core/test_golden_tah2.py::test_passes_and_mixture` |
| 5 state after the final norm, and the epsilon | `test_epsilon_is_not_that_of_the_base` |
| 6 the decider reads this pass alone | `core/test_golden_tah2.py::test_passes_and_mixture` |
| 7 log-probabilities, also with labels and at padding | `test_logits_with_labels_and_padding_are_log_probabilities` |
| 8 as many probabilities as the base is wide | `test_tah2.py::test_vocabulary_smaller_than_the_width` |
| 9 weight decay of the norms | `test_weight_decay_of_the_norms` |
| 10 labels are those of a micro-batch | `test_packed_and_accumulated_equal_plain`, `training/test_distributed.py` |
| 11 negatives of no cost count in the weight of positives | `test_negatives_without_cost_count_in_the_weight` |
| 12 a side pass attends as if its token alone had continued | `test_a_side_pass_is_that_of_its_token_alone` |
| 13 forced tokens keep the decider's probabilities | `test_tah2.py::test_forced_counts` |
| 14 precision of the mixture | `test_a_mixture_in_half_precision_adds_up` |
| 15 the prompt iterates | `test_the_prompt_iterates_and_with_own_attention_changes_nothing` |
| 16 a rounded threshold | `checkpoints/test_original_tah2.py::test_half_precision_base_rounds_the_rest` |
| 17 sampling without a seed | `checkpoints/test_original_tah2.py`, `test_tah2.py::test_sampled_decisions` |
| 18 two thresholds | `checkpoints/test_original_tah2.py::test_threshold_is_the_configs_else_the_weights` |
| 19 the padding token of the embedding | `test_the_padding_token_has_no_gradient_as_in_the_base` |
"""

import math

import pytest
import torch
from torch.nn import functional as F
from transformers import TrainingArguments

from helpers.families import tiny
from helpers.models import LENGTH, distance, pad, token_ids
from tah import DuoCache, TaHConfig, TaHForCausalLM, TrainingPass
from tah.core.logits import TaHOutput
from tah.core.mixture import mixture_weights
from tah.training.joint import GainLabels, gain_labels, joint_decider_loss
from test_tah2 import EXACT, FORCED, assert_equal, rows_of, tah2

SIDE = TrainingPass(side_passes=True)


@pytest.fixture(autouse=True)
def no_grad(request):
    with torch.set_grad_enabled(request.node.get_closest_marker("grad") is not None):
        yield


def supervised_of(targets):
    return F.pad(targets[:, 1:], (0, 1), value=-100) != -100


def test_a_field_changed_at_loading_leaves_the_others(tmp_path):
    model = tah2(attention="own", output="even", next_input_norms=[False, True])
    model.save_pretrained(tmp_path)
    config = TaHForCausalLM.from_pretrained(tmp_path, max_depth=2).config
    fields = set(TaHConfig.__annotations__) - {"base_config"}
    assert {name for name in fields if getattr(config, name) != getattr(model.config, name)} == {"max_depth"}


@pytest.mark.grad
@pytest.mark.parametrize("attention", ["duo", "own"])
def test_a_cut_depth_is_a_model_of_that_depth(attention):
    """In a curriculum the last allowed pass has the whole rest, and nothing is asked after it."""
    model = tah2(max_depth=4, attention=attention).train()
    ids = token_ids()
    given = {"labels": ids, "num_items_in_batch": 7, "training": SIDE}
    cut, found = model(ids, max_depth=2, **given), []
    assert (cut.continue_logits[:, :, 0].sigmoid() > model.config.threshold).float().mean() > 0.3
    model.config.max_depth = 2
    for out in (cut, model(ids, **given)):
        labels = gain_labels(out, supervised_of(ids), [0.99])
        loss = out.loss + joint_decider_loss(out, labels, 7)
        model.zero_grad(set_to_none=True)
        loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((loss, labels.depth_labels, labels.asked, grads))
    (loss, depths, asked, grads), (want, want_depths, want_asked, want_grads) = found
    assert torch.equal(loss, want) and torch.equal(depths, want_depths) and torch.equal(asked, want_asked)
    assert asked.shape[2] == 1 and grads.keys() == want_grads.keys()
    assert all(torch.equal(grads[name], want_grads[name]) for name in grads)
    weights = cut.mixture_weights.sum(-1)
    assert torch.allclose(weights, torch.ones_like(weights))
    lost = cut.mixture_weights[..., 0] + cut.continue_prob[..., 0] * (1 - cut.continue_prob[..., 0])
    assert lost[cut.depth_count == 2].min() < 0.9  # control: what a mixture without the rest would add up to


@pytest.mark.parametrize(("saved", "wanted"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_every_part_has_the_precision_asked_for(saved, wanted, tmp_path):
    tah2().to(getattr(torch, saved)).save_pretrained(tmp_path)
    model = TaHForCausalLM.from_pretrained(tmp_path, dtype=wanted)
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, wanted)}
    out = model(token_ids(), policy="decider")  # runs decider, next input and mixture
    assert out.logits.dtype == torch.float32 and out.logits.isfinite().all()
    assert 1 < out.depth_count.float().mean() < 3 and out.continue_logits[:, :, 0].isfinite().all()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_epsilon_is_not_that_of_the_base(family):
    """Their networks have 1e-6, also on a base whose norms have another one."""
    model, ids = tah2(family), token_ids()
    settings = {"next_input": "mlp", "output": "mixture", "decider": {"kind": "tah2"}, "lora_rank": 0, "max_depth": 3}
    other = TaHForCausalLM.from_base(tiny(family, rms_norm_eps=0.01), **settings)
    other.load_state_dict(model.state_dict())
    other.config.threshold = float(other(ids).continue_prob[..., 0].median()) + 1e-4
    out = other(ids)
    assert_equal(out, rows_of(other, ids))
    for norm in (module for module in other.modules() if isinstance(module, torch.nn.RMSNorm)):
        norm.eps = 0.01  # control
    given = {"depth_labels": out.depth_count, "training": FORCED}
    assert distance(other(ids, **given).logits, out.logits) > 100 * EXACT


def test_logits_with_labels_and_padding_are_log_probabilities():
    """They have all columns when labels are given, too, and are finite at padding. The loss is theirs."""
    model, ids = tah2(), token_ids()
    mask = pad(torch.ones_like(ids), left=3)
    targets = pad(ids, left=3, value=-100)
    out = model(pad(ids, left=3), attention_mask=mask, labels=targets)
    assert out.logits.shape == (2, LENGTH + 3, model.config.vocab_size)
    assert torch.allclose(out.logits.exp().sum(-1), torch.ones(2, LENGTH + 3), atol=1e-5)
    assert (out.depth_count[:, :3] == 1).all()
    want = F.nll_loss(out.logits[:, 3:-1].flatten(0, 1), targets[:, 4:].flatten())  # padding predicts nothing
    assert out.loss.item() == pytest.approx(want.item(), rel=1e-5)


def test_weight_decay_of_the_norms(tmp_path):
    """transformers names the norms without weight decay; those of the two networks are not among them."""
    pytest.importorskip("accelerate")
    from tah.training.trainer import Objective, TaHTrainer

    model = tah2("qwen3", lora_rank=4)
    trainer = TaHTrainer(
        objective=Objective("backbone", "tah2", 3),
        model=model,
        args=TrainingArguments(tmp_path / "run", use_cpu=True, report_to=[]),
    )
    decayed = set(trainer.get_decay_parameter_names(model))
    norms = {name for name, _ in model.named_parameters() if "norm" in name}
    assert norms & decayed == {name for name in norms if name.startswith(("decider.", "next_input_mlp."))}
    assert not any(name.startswith("base.") for name in norms & decayed) and norms - decayed
    assert "decider.score.weight" in decayed


def test_negatives_without_cost_count_in_the_weight():
    """A token that ran depth 2 although its label is 1 is a negative of next to no cost there, and counts."""
    logits = torch.tensor([[[0.3, -0.2], [0.1, 0.4], [0.2, 0.7]]])
    out = TaHOutput(
        continue_logits=logits,
        depth_count=torch.tensor([[3, 3, 3]]),
        pass_loss=torch.tensor([[[5.0, 3.0, 1.0], [5.0, 5.5, 5.0], [5.0, 3.0, 4.0]]]),
    )
    found = gain_labels(out, torch.ones(1, 3, dtype=torch.bool), [1.0])
    assert found.depth_labels.tolist() == [[3, 1, 2]] and found.asked.all()
    assert found.cost[0, 1, 1] == pytest.approx(1e-6)  # the second token is no candidate after depth 2
    for counted, weight in ((found, 2.0), (GainLabels(*_without_token(found, 1)), 1.0)):
        at_two = counted.asked[0, :, 1]
        target = (counted.depth_labels[0] > 2).float()
        each = F.binary_cross_entropy_with_logits(
            logits[0, :, 1], target, pos_weight=torch.tensor(weight), reduction="none"
        )
        second = (each * counted.cost[0, :, 1])[at_two].sum()
        target = (counted.depth_labels[0] > 1).float()
        each = F.binary_cross_entropy_with_logits(
            logits[0, :, 0], target, pos_weight=torch.tensor(0.5), reduction="none"
        )
        first = (each * counted.cost[0, :, 0]).sum()
        assert joint_decider_loss(out, counted, 1).item() == pytest.approx((first + second).item(), rel=1e-6)


def _without_token(labels, token):
    asked = labels.asked.clone()
    asked[0, token, 1] = False
    return labels.depth_labels, labels.cost, asked, labels.boundaries


def test_a_side_pass_is_that_of_its_token_alone():
    """Each loss of one more pass is that of a call in which this token, and no other stopped one, goes on."""
    model, ids = tah2(), token_ids(rows=1)
    out = model(ids, labels=ids, training=SIDE)
    counts, target = out.depth_count[0], ids[0, 1:]
    stopped = [at for at in range(LENGTH - 1) if counts[at] < 3]
    assert len(stopped) > 2 and (counts > 1).any()
    together = counts.clamp(max=2) + (counts < 3)
    joined = model(ids, labels=ids, depth_labels=together[None], training=TrainingPass(True, side_passes=True))
    for at in stopped:
        forced = counts.clone()
        forced[at] += 1
        alone = model(ids, labels=ids, depth_labels=forced[None], training=TrainingPass(True, side_passes=True))
        assert out.pass_loss[0, at, counts[at]].item() == pytest.approx(
            alone.pass_loss[0, at, counts[at]].item(), abs=1e-5
        )
    last = stopped[-1]  # control: it attends to the others if they go on
    gap = joined.pass_loss[0, last, counts[last]] - out.pass_loss[0, last, counts[last]]
    assert gap.abs() > 1e-3 and len(target) == LENGTH - 1


@pytest.mark.grad
def test_side_passes_leave_the_cache_and_its_gradients_as_they_are():
    """A later call on the cache has the gradients that it has without side passes, into the first call."""
    with torch.no_grad():
        model = tah2(max_depth=2).train()
    ids, found = token_ids(), []
    for training in (TrainingPass(), SIDE):
        cache = DuoCache()
        first = model(ids[:, :7], labels=ids[:, :7], past_key_values=cache, use_cache=True, training=training)
        assert (first.depth_count == 1).any()  # so there are side passes
        slots = [cache.deep_order_keys, cache.deep_depths, cache.deep_length, torch.tensor(cache.deep_width)]
        layers = [(layer.keys, layer.values, torch.tensor(layer.middle)) for layer in cache.layers]
        rest = model(ids[:, 7:], labels=ids[:, 7:], past_key_values=cache, num_items_in_batch=1)
        model.zero_grad(set_to_none=True)
        rest.loss.backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((slots, layers, grads))
    (slots, layers, grads), (its_slots, its_layers, its_grads) = found
    assert all(torch.equal(*pair) for pair in zip(slots, its_slots, strict=True))
    for wanted, got in zip(layers, its_layers, strict=True):
        assert all(torch.equal(*pair) for pair in zip(wanted, got, strict=True))
        assert wanted[0].requires_grad and got[0].requires_grad
    assert grads.keys() == its_grads.keys() and len(grads) > 20
    assert all(distance(its_grads[name], grads[name]) < 1e-5 for name in grads)


@pytest.mark.parametrize("gradients", [False, pytest.param(True, marks=pytest.mark.grad)])
def test_side_passes_keep_no_copy_of_the_keys(gradients, monkeypatch):
    with torch.no_grad():
        model, cache = tah2(max_depth=2).train(gradients), DuoCache()
    opened = []

    def open_deeper_pass(*args):
        if args[-1]:  # a side pass
            opened.append([(layer.keys, layer.values) for layer in cache.layers])
        return DuoCache.open_deeper_pass(cache, *args)

    monkeypatch.setattr(cache, "open_deeper_pass", open_deeper_pass)
    model(token_ids(), labels=token_ids(), past_key_values=cache, training=SIDE)
    (before,) = opened
    for (keys, values), layer in zip(before, cache.layers, strict=True):
        assert layer.keys is keys and layer.values is values


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_mixture_in_half_precision_adds_up(dtype):
    model, ids = tah2(max_depth=4).to(dtype), token_ids()
    out = model(ids, policy="decider", threshold=0.3)
    assert out.logits.dtype == torch.float32 and out.depth_count.max() > 2
    assert (out.logits.exp().sum(-1) - 1).abs().max() < 1e-5
    rounded = out.logits.to(dtype).float().exp().sum(-1)
    assert (rounded - 1).abs().max() > 1e-4  # control: so far off are log-probabilities of that precision


@pytest.mark.grad
def test_the_prompt_iterates_and_with_own_attention_changes_nothing():
    """What nothing supervises runs deeper passes; only with `duo` do these reach losses and labels."""
    ids = token_ids()
    targets = torch.where(torch.arange(LENGTH) > 5, ids, -100)
    supervised = supervised_of(targets)
    for attention in ("own", "duo"):
        model, found = tah2(attention=attention).train(), []
        for stop in (False, True):
            given = {"depth_labels": (~supervised).long()} if stop else {}
            training = TrainingPass(follow_labels=stop, side_passes=True)
            out = model(ids, labels=targets, num_items_in_batch=9, training=training, **given)
            labels = gain_labels(out, supervised, [0.99])
            loss = out.loss + joint_decider_loss(out, labels, 9)
            model.zero_grad(set_to_none=True)
            loss.backward()
            found.append((out, labels, loss, model.next_input_mlp.proj.weight.grad.clone()))
        (free, its, loss, grad), (held, held_its, held_loss, held_grad) = found
        assert (free.depth_count[~supervised] > 1).any() and (held.depth_count[~supervised] == 1).all()
        if attention == "own":
            assert torch.equal(its.depth_labels, held_its.depth_labels)
            assert loss.item() == pytest.approx(held_loss.item(), rel=1e-5) and distance(grad, held_grad) < 1e-4
        else:
            assert (free.pass_loss - held.pass_loss)[supervised].nan_to_num().abs().max() > 1e-3


@pytest.mark.grad
def test_the_padding_token_has_no_gradient_as_in_the_base():
    """A Qwen3 with a `pad_token_id` does not train that row of its embedding, at no depth."""
    settings = {"next_input": "mlp", "output": "mixture", "decider": {"kind": "tah2"}, "lora_rank": 0, "max_depth": 3}
    model = TaHForCausalLM.from_base(tiny("qwen3", pad_token_id=5), **settings).train()
    assert model.get_input_embeddings().padding_idx == 5
    ids = token_ids()
    ids[:, ::3] = 5
    model(ids, labels=ids, policy="always", training=SIDE).loss.backward()
    grad = model.get_input_embeddings().weight.grad
    read = ids[:, :-1].unique()  # the last token of a row predicts nothing
    assert not grad[5].any() and all(grad[token].any() for token in read if token != 5)
    plain = tiny("qwen3", pad_token_id=5).train()
    plain(input_ids=ids, labels=ids).loss.backward()
    assert not plain.get_input_embeddings().weight.grad[5].any()


def test_weights_of_the_formula():
    """rho and its rest, by hand: 0.4 * 0.5 of two passes that go on."""
    logits = torch.logit(torch.tensor([[[0.4, 0.5]] * 3]))
    found = mixture_weights(torch.tensor([[1, 2, 3]]), logits, even=False)
    want = [[1.0, 0, 0], [0.6, 0.4, 0], [0.6, 0.2, 0.2]]
    assert torch.allclose(found[0], torch.tensor(want)) and not math.isnan(float(found.sum()))


@pytest.mark.parametrize("output", ["mixture", "even"])
def test_the_head_of_a_sum_is_refused(output):
    """TRL applies the head to one state per token, which is not the output of a mixture."""
    model = tah2(output=output)
    assert not model.sums_states
    with pytest.raises(ValueError, match="the output is a mixture"):
        model.base_model(input_ids=token_ids())
