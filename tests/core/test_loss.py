"""Losses against plain references, without [B, T, V], and what training relies on."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from helpers.families import tiny
from helpers.models import distance, labels, pad, shake, tah, token_ids
from tah import TaHForCausalLM
from tah.core.compat import CACHE
from tah.core.loss import IGNORE, DepthLoss, cross_entropy, decider_loss, shift
from tah.model import TrainingPass

HEADS = ["llama", "gemma2", "cohere", "granite", "phi", "gpt2"]  # plain, soft-cap, scale, divisor, bias, tied


def supervised(ids, share=0.6, seed=5):
    keep = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < share
    keep[:, 0] = False
    return torch.where(keep, ids, IGNORE)


def grads(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def plain_loss(logits, targets, reduction="mean"):
    return F.cross_entropy(logits.float().flatten(0, 1), shift(targets).flatten(), reduction=reduction)


@pytest.mark.parametrize("family", HEADS)
@pytest.mark.parametrize("output", ["sum", "zero_init"])
def test_loss_equals_plain_cross_entropy(family, output, monkeypatch):
    """Value and every gradient; chunks smaller than the batch."""
    monkeypatch.setattr("tah.core.loss.CHUNK", 7)
    model, ids, depth_labels = tah(family, "eager", output=output, max_depth=3), token_ids(3), labels(3, depth=3)
    targets = supervised(ids)
    out = model(ids, labels=targets, depth_labels=depth_labels)
    want = plain_loss(out.logits, targets)
    want.backward(retain_graph=True)
    expected = grads(model)
    model.zero_grad()
    out.loss.backward()
    assert out.loss.item() == pytest.approx(want.item(), rel=1e-5)
    assert expected.keys() == grads(model).keys()
    for name, grad in grads(model).items():
        assert distance(grad, expected[name]) < 1e-4, name


def test_loss_equals_torchs_own_chunked_loss():
    function = getattr(F, "linear_cross_entropy", None)
    if function is None:
        pytest.skip("torch has no linear_cross_entropy before 2.13")
    base, hidden = tiny("llama"), torch.randn(300, 32, requires_grad=True)
    target, weight = torch.randint(0, base.config.vocab_size, (300,)), torch.ones(300)
    model = TaHForCausalLM.from_base(base, lora_rank=0)
    want = function(hidden, base.lm_head.weight, target, reduction="sum")
    want.backward()
    expected, hidden.grad = hidden.grad, None
    total, each = cross_entropy(model.head, hidden, target, weight)
    total.backward()
    assert total.item() == pytest.approx(want.item(), rel=1e-5)
    assert each.sum().item() == pytest.approx(want.item(), rel=1e-5)
    assert distance(hidden.grad, expected) < 1e-5


def test_bfloat16_loss_is_summed_in_float32():
    """torch's own gives a bfloat16 value here: off by up to a per cent."""
    torch.manual_seed(0)
    model = TaHForCausalLM.from_base(tiny("llama").bfloat16(), lora_rank=0)
    hidden = torch.randn(2000, 32, dtype=torch.bfloat16) * 3
    target = torch.randint(0, model.config.get_text_config().vocab_size, (2000,))
    logits = (hidden @ model.base.lm_head.weight.T).float()
    want = F.cross_entropy(logits, target, reduction="sum").item()
    total, _ = cross_entropy(model.head, hidden, target, torch.ones(2000))
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(want, rel=1e-5)
    assert torch.tensor(want).bfloat16().item() != pytest.approx(want, rel=1e-4)  # control: bfloat16 would show


class Largest(TorchDispatchMode):
    """The most elements that a tensor made inside had."""

    def __init__(self):
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(x.numel() for x in tree_flatten(out)[0] if isinstance(x, torch.Tensor))])
        return out


def test_training_makes_no_full_logits(monkeypatch):
    monkeypatch.setattr("tah.core.loss.CHUNK", 16)
    monkeypatch.setattr("tah.core.logits.CHUNK", 16)
    vocab, base = 5000, tiny("llama", "sdpa", vocab_size=5000)
    model, ids = TaHForCausalLM.from_base(base, policy="oracle", mix_topk=16, lora_rank=4).train(), token_ids(2, 200)
    with Largest() as seen:
        out = model(ids, labels=ids, depth_labels=labels(2, 200))
        out.loss.backward()
    assert out.logits is None
    assert seen.numel < 2 * 200 * vocab / 4
    with Largest() as seen:  # control: asked for, they are made
        out = model(ids, labels=ids, depth_labels=labels(2, 200), logits_to_keep=0)
    assert out.logits.shape == (2, 200, vocab)
    assert seen.numel >= 2 * 200 * vocab


def test_items_in_the_batch():
    model, ids = tah().train(), token_ids()
    targets = supervised(ids)
    mean = model(ids, labels=targets, policy="never").loss
    count = (shift(targets) != IGNORE).sum()
    assert model(ids, labels=targets, policy="never", num_items_in_batch=count).loss.item() == pytest.approx(
        mean.item()
    )
    halved = model(ids, labels=targets, policy="never", num_items_in_batch=2 * count)
    assert halved.loss.item() == pytest.approx(mean.item() / 2)
    nothing = model(ids, labels=torch.full_like(ids, IGNORE), policy="never").loss
    assert nothing.item() == 0


@pytest.mark.parametrize("weights", [(0.0, 0.0, 1.0), (0.5, 0.25, 0.25), (1.0, 0.0, 0.0)])
def test_loss_of_every_depth(weights):
    """sum_d w_d CE_min(d, c): a token that stops keeps its output at deeper depths."""
    model, ids, depth_labels = tah(max_depth=3), token_ids(), labels(depth=3)
    out = model(ids, labels=ids, depth_labels=depth_labels, training=TrainingPass(loss_weights=weights))
    by_depth = [model(ids, depth_labels=depth_labels, max_depth=d).logits for d in (1, 2, 3)]
    each = torch.stack([plain_loss(logits, ids, "none").view_as(ids) for logits in by_depth], dim=-1)
    want = (each[:, :-1] * torch.tensor(weights)).sum() / (ids.numel() - len(ids))
    assert out.loss.item() == pytest.approx(want.item(), rel=1e-4)
    known = ~out.token_loss.isnan()
    assert known[:, :-1].any() and not known[:, -1].any()
    assert distance(out.token_loss[known], each[known]) < 1e-4


@pytest.mark.parametrize("next_input", ["topk", "hidden"])
def test_own_attention_training_equals_every_policy(next_input):
    """With `own`, a token's second pass does not depend on who else iterates, so look-ahead training on all tokens is
    what any policy does at test. (With `duo` it is not: the control.)"""
    for attention in ("own", "duo"):
        model = tah(next_input=next_input, attention=attention, output="zero_init").train()
        ids, everyone = token_ids(), torch.full((2, 12), 2)
        given = dict(labels=ids, training=TrainingPass(loss_weights=(0.5, 0.5)))
        trained = model(ids, **given, depth_labels=everyone).token_loss
        differs = 0.0
        for seed in range(4):
            chosen = labels(seed=seed)
            one = model(ids, **given, depth_labels=chosen).token_loss
            iterated = (chosen > 1) & ~one[:, :, 1].isnan()
            assert torch.equal(one[:, :, 0].nan_to_num(), trained[:, :, 0].nan_to_num())
            differs = max(differs, distance(one[:, :, 1][iterated], trained[:, :, 1][iterated]))
        assert differs < 1e-5 if attention == "own" else differs > 1e-3


@pytest.mark.parametrize("output", ["sum", "zero_init"])
@pytest.mark.parametrize("next_input", ["topk", "hidden"])
def test_depths_never_empty_in_training(next_input, output):
    """Without a hard token, every trained parameter still gets a gradient (zero where only deeper passes use it)."""
    model, ids = tah(next_input=next_input, output=output, max_depth=3).train(), token_ids()
    nobody = torch.ones_like(ids)
    out = model(ids, labels=ids, depth_labels=nobody)
    assert out.depth_count.max() == 1
    assert out.loss.item() == pytest.approx(plain_loss(model.base(input_ids=ids).logits, ids).item(), rel=1e-5)
    out.loss.backward()
    got = grads(model)
    assert {name for name, _ in model.named_parameters() if not name.startswith("decider.")} == got.keys()
    assert all(not grad.any() for name, grad in got.items() if "lora_" in name or "_map" in name)
    model.zero_grad()
    model.base(input_ids=ids, labels=ids).loss.backward()
    for name, grad in grads(model).items():
        if name in got and "lora_" not in name and "_map" not in name:
            assert distance(got[name], grad) < 1e-4, name


def test_idle_only_while_training():
    model, ids = tah(), token_ids()
    out = model(ids, labels=ids, depth_labels=torch.ones_like(ids))
    out.loss.backward()
    assert not any("lora_" in name for name in grads(model))


def test_no_gradient_flows_from_the_decider_into_the_model():
    for kind in ({"kind": "lean"}, {"kind": "mlp", "topk": 16, "hidden_dims": [16]}):
        model = shake(TaHForCausalLM.from_base(tiny("llama"), decider=kind, mix_topk=16, lora_rank=4)).train()
        ids = token_ids()
        out = model(ids, policy="decider", training=TrainingPass(follow_labels=True), depth_labels=torch.ones_like(ids))
        out.continue_logits.nansum().backward()
        got = grads(model)
        assert got and all(name.startswith("decider.") for name in got)


def test_follow_labels():
    """The labels decide, the policy is asked: its logits are those of the tokens that ran."""
    model, ids, depth_labels = tah(max_depth=3), token_ids(), labels(depth=3)
    out = model(
        ids, policy="decider", training=TrainingPass(follow_labels=True), depth_labels=depth_labels, threshold=1.0
    )
    assert torch.equal(out.depth_count, depth_labels)
    assert not out.continue_logits[:, :, 0].isnan().any()
    assert torch.equal(~out.continue_logits[:, :, 1].isnan(), depth_labels > 1)
    assert (model(ids, policy="decider", threshold=1.0).depth_count == 1).all()  # control: followed, nobody goes


def test_decider_loss_counts_supervised_decisions_once():
    logits = torch.tensor([[[0.5], [-1.0], [2.0], [float("nan")]]])
    target = torch.tensor([[[True], [False], [True], [True]]])
    asked = torch.tensor([[[True], [True], [False], [True]]])  # the third is a prompt token, the fourth never ran
    bce = lambda z, y, w: w * F.binary_cross_entropy_with_logits(torch.tensor(z), torch.tensor(y))  # noqa: E731
    want = (bce(0.5, 1.0, 3.0) + bce(-1.0, 0.0, 1.0)) / 2
    assert decider_loss(logits, target, asked, pos_weight=3.0).item() == pytest.approx(want.item())
    assert decider_loss(logits, target, asked, pos_weight=3.0, num_items_in_batch=8).item() == pytest.approx(
        want.item() / 4
    )
    weight = torch.tensor([[[2.0], [0.0], [9.0], [9.0]]])
    assert decider_loss(logits, target, asked, weight).item() == pytest.approx(bce(0.5, 1.0, 2.0).item() / 2)


def test_packed_training_equals_unpacked():
    """Loss and gradients of documents in one row are those of the documents as rows."""
    model = tah().train()
    lengths = (5, 1, 8, 4)
    documents = [token_ids(1, n, seed=n) for n in lengths]
    wanted = [labels(1, n, seed=n) for n in lengths]
    targets = [supervised(d, 0.9) for d in documents]
    width = max(lengths)
    rows = torch.cat([pad(d, right=width - d.shape[1]) for d in documents])
    mask = torch.cat([pad(torch.ones_like(d), right=width - d.shape[1]) for d in documents])
    given = dict(
        labels=torch.cat([pad(t, right=width - t.shape[1], value=IGNORE) for t in targets]),
        depth_labels=torch.cat([pad(w, right=width - w.shape[1], value=1) for w in wanted]),
    )
    unpacked = model(rows, attention_mask=mask, **given).loss
    unpacked.backward()
    expected = grads(model)
    model.zero_grad()
    packed = model(
        torch.cat(documents, dim=1),
        position_ids=torch.cat([torch.arange(n) for n in lengths])[None],
        labels=torch.cat(targets, dim=1),
        depth_labels=torch.cat(wanted, dim=1),
    ).loss
    packed.backward()
    assert packed.item() == pytest.approx(unpacked.item(), rel=1e-5)
    for name, grad in grads(model).items():
        assert distance(grad, expected[name]) < 1e-4, name


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("output", ["sum", "mixture"])
def test_padding_is_not_counted_in_the_mean(side, output):
    """Every real token but the first is predicted; the padding before it predicts nothing."""
    model, ids, counts = tah(output=output), token_ids(), labels()
    want = model(ids, labels=ids, depth_labels=counts)
    out = model(
        pad(ids, **{side: 3}),
        attention_mask=pad(torch.ones_like(ids), **{side: 3}),
        labels=pad(ids, **{side: 3}, value=IGNORE),
        depth_labels=pad(counts, **{side: 3}, value=1),
    )
    assert out.loss.item() == pytest.approx(want.loss.item(), rel=1e-5)
    assert (~out.token_loss.isnan()).sum() == (~want.token_loss.isnan()).sum()


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("output", ["sum", "mixture"])
def test_padding_predicts_nothing_also_with_a_label_behind_it(output, shifted):
    """The first real token has a label here, which the last token of the padding would predict."""
    model, ids, counts = tah(output=output), token_ids(), labels()
    want = model(ids, labels=ids, depth_labels=counts)
    targets = pad(ids, left=3, value=IGNORE)
    assert targets[0, 3] != IGNORE
    given = {"shift_labels": shift(targets)} if shifted else {"labels": targets}
    mask = pad(torch.ones_like(ids), left=3)
    out = model(pad(ids, left=3), attention_mask=mask, depth_labels=pad(counts, left=3, value=1), **given)
    assert out.loss.item() == pytest.approx(want.loss.item(), rel=1e-5)
    assert torch.equal(out.token_loss[:, :3].isnan(), torch.ones(2, 3, 2, dtype=torch.bool))


@pytest.mark.parametrize("shifted", [False, True])
def test_padding_between_packed_documents_predicts_nothing(shifted):
    """A packed row with a mask: two documents, each behind padding, and every token with a label."""
    model = tah()
    documents = [token_ids(1, 5, seed=1), token_ids(1, 6, seed=2)]
    padded = [pad(document, left=2) for document in documents]
    each = [model(document, labels=document, policy="always") for document in documents]
    want = sum(out.loss * (len(document[0]) - 1) for out, document in zip(each, documents, strict=True)) / 9
    targets = torch.cat([pad(document, left=2, value=IGNORE) for document in documents], 1)
    out = model(
        torch.cat(padded, 1),
        attention_mask=torch.cat([pad(torch.ones_like(document), left=2) for document in documents], 1),
        position_ids=torch.cat([torch.tensor([0, 0, *range(len(document[0]))]) for document in documents])[None],
        policy="always",
        **{"shift_labels": shift(targets)} if shifted else {"labels": targets},
    )
    assert out.loss.item() == pytest.approx(want.item(), rel=1e-5)
    assert (~out.token_loss[..., 1].isnan()).sum() == 9


def test_depth_loss_of_a_shorter_call():
    with pytest.raises(ValueError, match="3 loss_weights for a max_depth of 2"):
        DepthLoss(token_ids(), 2, (1.0, 1.0, 1.0))


def test_an_idle_pass_leaves_no_keys_in_the_cache():
    """Else a token of depth 1 would have deeper keys for those that follow."""
    model, ids, found = tah(max_depth=3), token_ids(), []
    with torch.no_grad():
        for training in (None, TrainingPass(idle=True)):
            cache = getattr(model(ids[:, :6], policy="always"), CACHE)
            middle = model(ids[:, 6:8], policy="decider", threshold=1.0, training=training, **{CACHE: cache})
            assert (middle.depth_count == 1).all()
            found.append(model(ids[:, 8:], policy="always", **{CACHE: cache}).logits)
    assert distance(*found) < 1e-6


class Searches(TorchDispatchMode):
    """The number of `nonzero`, for each of which the host waits for the device."""

    def __init__(self):
        super().__init__()
        self.made = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.made += func is torch.ops.aten.nonzero.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_chunks_of_passes_that_are_kept_apart_are_searched_once(monkeypatch, family):
    """With as few waits for the device in many chunks as in one, none in the backward, and the same gradients."""
    found = []
    for size in (512, 7):
        monkeypatch.setattr("tah.core.loss.CHUNK", size)
        monkeypatch.setattr("tah.core.logits.CHUNK", size)
        output = {"llama": "mixture", "gemma2": "sum"}[family]
        model = tah(family, "eager", output=output, next_input="topk", max_depth=3).train()
        with Searches() as forward:
            out = model(token_ids(2, 40), labels=token_ids(2, 40), depth_labels=labels(2, 40, depth=3))
        with Searches() as backward:
            out.loss.backward()
        assert backward.made == 0
        found.append((forward.made, out.loss.detach(), [p.grad for p in model.parameters() if p.grad is not None]))
    (once, want, want_grads), (often, loss, grads) = found
    assert often == once > 0
    assert distance(loss, want) < 1e-5 and len(grads) == len(want_grads) > 10
    assert max(map(distance, grads, want_grads)) < 1e-4
