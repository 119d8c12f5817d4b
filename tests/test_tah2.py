"""The invariants of TaH2 models on every kind of base, each against the slow reference, each with a control."""

import itertools
import math
import warnings

import pytest
import torch
from torch.nn import functional as F

from helpers.families import tiny
from helpers.models import LENGTH, distance, labels, middle, packed_row, pad, token_ids
from helpers.reference_tah2 import Tah2, run, train
from tah import DuoCache, Policy, TaHConfig, TaHForCausalLM, TrainingPass
from tah.policy import DepthState, draw
from tah.training.joint import gain_labels, joint_decider_loss

EXACT = 2e-5  # float32 rounding of a different order of the same sums, relative
BASES = ("llama", "qwen3", "gemma2", "tied")
FORCED = TrainingPass(follow_labels=True)


@pytest.fixture(autouse=True)
def no_grad(request):
    with torch.set_grad_enabled(request.node.get_closest_marker("grad") is not None):
        yield


def tah2(family="llama", **config):
    """A TaH2 model around a tiny base (`tied`: a Qwen3 with a tied head) whose decider has a share of 1/2."""
    base = tiny("qwen3", tie_word_embeddings=True) if family == "tied" else tiny(family)
    settings = {"next_input": "mlp", "output": "mixture", "decider": {"kind": "tah2"}, "lora_rank": 0, "max_depth": 3}
    model = TaHForCausalLM.from_base(base, **settings | config)
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.startswith(("decider.", "next_input_mlp.")):
            if "norm" in name:
                parameter.data.uniform_(0.5, 1.5)  # norms that are off show only where they are not 1
            if name == "decider.score.weight":
                parameter.data.normal_(0, 0.3)
        if "lora_B" in name:
            parameter.data.normal_(0, 0.15)
    if model.decider is not None and "threshold" not in config:
        model.config.threshold = middle(model(token_ids()).continue_logits[:, :, 0].sigmoid())
    return model


def rows_of(model, ids, forced=None, **given):
    counts = [None] * len(ids) if forced is None else forced
    return [run(Tah2.of(model), row, forced=count, **given) for row, count in zip(ids, counts, strict=True)]


def assert_equal(out, rows):
    """Log-probabilities, depths, weights and continue logits of a batch without padding are those of its rows."""
    assert torch.equal(out.depth_count, torch.stack([row.depth_count for row in rows]))
    assert distance(out.logits, torch.stack([row.log_probs for row in rows])) < EXACT
    assert out.logits.dtype == torch.float32
    columns = out.mixture_weights.shape[-1]
    assert distance(out.mixture_weights, torch.stack([row.mixture_weights(columns) for row in rows])) < EXACT
    assert torch.allclose(out.mixture_weights.sum(-1), torch.ones(out.depth_count.shape), atol=1e-6)
    for depth in range(1, columns):
        want = [z for row in rows for token in row.tokens for z in token.continue_logits[depth - 1 : depth]]
        got = out.continue_logits[:, :, depth - 1]
        assert (~got.isnan()).sum() == len(want)
        assert not want or distance(got[~got.isnan()], torch.stack(want)) < 10 * EXACT


@pytest.mark.parametrize(
    ("family", "attention", "output", "max_depth"),
    [*itertools.product(BASES, ("duo", "own"), ("mixture", "even"), (3,)), ("llama", "duo", "mixture", 4)]
    + [("tied", "duo", "mixture", 2), ("gemma2", "own", "mixture", 4), ("qwen3", "own", "even", 2)],
)
def test_forward_equals_reference(family, attention, output, max_depth):
    model = tah2(family, attention=attention, output=output, max_depth=max_depth)
    ids = token_ids()
    out, rows = model(ids), rows_of(model, ids)
    assert_equal(out, rows)
    assert 1.2 < out.depth_count.float().mean() < max_depth  # the decider decides both ways
    counts = out.depth_count
    for name, value in (
        ("attention", {"duo": "own", "own": "duo"}),
        ("output", {"mixture": "even", "even": "mixture"}),
    ):
        other = Tah2.of(model)
        setattr(other, name, value[getattr(other, name)])
        changed = [run(other, row, forced=count) for row, count in zip(ids, counts, strict=True)]
        assert distance(out.logits, torch.stack([row.log_probs for row in changed])) > 100 * EXACT, name


@pytest.mark.parametrize(
    ("next_input", "output", "policy"),
    [("topk", "mixture", "decider"), ("hidden", "even", "decider"), ("mlp", "sum", "decider")]
    + [("topk", "even", "confidence"), ("mlp", "mixture", "confidence"), ("mlp", "sum", "confidence")],
)
@pytest.mark.parametrize("family", ["tied", "gemma2"])
def test_each_part_beside_those_of_tah(family, next_input, output, policy):
    model = tah2(family, next_input=next_input, output=output, policy=policy, mix_topk=16, lora_rank=4)
    ids = token_ids()
    if policy == "confidence":
        model.config.threshold = middle(model(ids).continue_logits[:, :, 0].sigmoid())
    out, rows = model(ids), rows_of(model, ids)
    assert torch.equal(out.depth_count, torch.stack([row.depth_count for row in rows]))
    assert distance(out.logits, torch.stack([row.log_probs for row in rows])) < EXACT
    assert 1.2 < out.depth_count.float().mean() < 3
    assert (out.mixture_weights is None) is (output == "sum")
    cached = DuoCache()
    parts = [model(part, past_key_values=cached, use_cache=True) for part in ids.split([7, 5], dim=1)]
    assert distance(torch.cat([part.logits for part in parts], 1), out.logits) < EXACT


@pytest.mark.parametrize("norms", [[False, True], [True, False], [False, False]])
def test_optional_norms_and_widths(norms):
    model = tah2(next_input_norms=norms, next_input_width=20, decider={"kind": "tah2", "width": 12})
    assert model.next_input_mlp.mlp.gate_proj.weight.shape == (20, 32)
    assert model.decider.mlp.gate_proj.weight.shape == (12, 32)
    assert_equal(model(token_ids()), rows_of(model, token_ids()))


def test_vocabulary_smaller_than_the_width():
    """The decider reads as many probabilities as there are, and zeros."""
    base = tiny("llama", vocab_size=20)
    settings = {"next_input": "mlp", "output": "mixture", "decider": {"kind": "tah2"}, "lora_rank": 0, "max_depth": 3}
    model = TaHForCausalLM.from_base(base, **settings)
    model.decider.score.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
    ids = token_ids() % 17 + 3
    model.config.threshold = middle(model(ids).continue_logits[:, :, 0].sigmoid())
    assert_equal(model(ids), rows_of(model, ids))


@pytest.mark.parametrize("family", BASES)
def test_with_lora(family):
    """LoRA at the deeper depths changes them, and nothing else does."""
    model, ids = tah2(family, lora_rank=4), token_ids()
    out = model(ids)
    assert_equal(out, rows_of(model, ids))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.zero_()
    forced = {"depth_labels": out.depth_count, "training": FORCED}
    assert distance(model(ids, **forced).logits, out.logits) > 100 * EXACT


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gpt2"])
def test_never_equals_the_log_softmax_of_the_base_bit_for_bit(family):
    model, ids = tah2(family), token_ids()
    for keep in (0, 1, 3):
        want = model.base(input_ids=ids, logits_to_keep=keep).logits.float().log_softmax(-1)
        for given in ({"policy": "never"}, {"max_depth": 1}):
            assert torch.equal(model(ids, logits_to_keep=keep, **given).logits, want)
    assert not torch.equal(model(ids).logits[:, -3:], want)


@pytest.mark.parametrize(("left", "right"), [(3, 0), (0, 4), (2, 5)])
@pytest.mark.parametrize("attention", ["duo", "own"])
def test_padding_is_invisible(attention, left, right):
    model, ids = tah2(attention=attention), token_ids()
    want = model(ids)
    mask = pad(torch.ones_like(ids), left, right)
    out = model(pad(ids, left, right), attention_mask=mask)
    inside = slice(left, left + LENGTH)
    assert torch.equal(out.depth_count[:, inside], want.depth_count)
    assert distance(out.logits[:, inside], want.logits) < EXACT
    assert distance(out.mixture_weights[:, inside], want.mixture_weights) < EXACT
    seen = model(pad(ids, left, right))  # control: without the mask the padding is text
    if left:  # padding on the right is seen by no real token, with or without a mask
        assert distance(seen.logits[:, inside], want.logits) > 100 * EXACT


@pytest.mark.parametrize("family", BASES)
def test_a_row_of_a_batch_equals_that_row_alone(family):
    model, ids = tah2(family), token_ids(rows=3)
    lengths = (12, 7, 9)
    mask = torch.stack([torch.arange(LENGTH) < length for length in lengths]).long()
    out = model(ids, attention_mask=mask)
    for row, length in enumerate(lengths):
        (want,) = rows_of(model, ids[row : row + 1, :length])
        alone = model(ids[row : row + 1, :length])
        assert torch.equal(out.depth_count[row, :length], want.depth_count)
        assert torch.equal(alone.depth_count[0], want.depth_count)
        assert distance(out.logits[row, :length], want.log_probs) < EXACT
        assert distance(alone.logits[0], want.log_probs) < EXACT


@pytest.mark.parametrize("chunks", [[5, 1, 6], [1] * 12])
@pytest.mark.parametrize(("family", "attention"), [("llama", "duo"), ("gemma2", "duo"), ("tied", "own")])
def test_cached_equals_uncached(family, attention, chunks):
    model, ids = tah2(family, attention=attention), token_ids()
    cache, outs, start = DuoCache(), [], 0
    for size in chunks:
        outs.append(model(ids[:, start : start + size], past_key_values=cache, use_cache=True))
        start += size
    want = model(ids)
    assert torch.equal(torch.cat([out.depth_count for out in outs], 1), want.depth_count)
    assert distance(torch.cat([out.logits for out in outs], 1), want.logits) < EXACT
    assert distance(torch.cat([out.mixture_weights for out in outs], 1), want.mixture_weights) < EXACT


@pytest.mark.parametrize("output", ["mixture", "even"])
def test_limits_of_each_row(output):
    """A row at its own maximum depth gives its last pass the whole rest."""
    model, ids = tah2(output=output, max_depth=4), token_ids(rows=3)
    first = model(ids).continue_logits[:, :, 0].sigmoid()
    depths, thresholds = torch.tensor([1, 2, 4]), torch.tensor([0.5, 0.2, middle(first[2])])
    out = model(ids, max_depth=depths, threshold=thresholds)
    rows = [
        run(Tah2.of(model), row, max_depth=int(depth), threshold=float(threshold))
        for row, depth, threshold in zip(ids, depths, thresholds, strict=True)
    ]
    assert_equal(out, rows)
    assert out.depth_count.amax(1).tolist()[:2] == [1, 2]
    assert torch.allclose(out.logits.exp().sum(-1), torch.ones(3, LENGTH), atol=1e-5)


@pytest.mark.parametrize("attention", ["duo", "own"])
@pytest.mark.parametrize("family", BASES)
def test_forced_counts(family, attention):
    """A forced token keeps the decider's probabilities as weights; 0 leaves a token to the decider."""
    model, ids = tah2(family, attention=attention), token_ids()
    forced = labels(depth=5, seed=3) - 1  # 0..4, of which 4 is above the maximum
    out = model(ids, depth_labels=forced, training=FORCED)
    assert_equal(out, rows_of(model, ids, forced))
    chosen = (forced > 0) & (forced < 4)
    assert torch.equal(out.depth_count[chosen], forced[chosen]) and (out.depth_count[forced == 4] == 3).all()
    free = forced == 0
    assert torch.equal(out.depth_count[free] > 1, out.continue_logits[free][:, 0].sigmoid() > model.config.threshold)


class Fixed(Policy):
    """The same continue logit everywhere."""

    def __init__(self, logit):
        self.logit = logit

    def __call__(self, state):
        return torch.full(state.positions.shape, self.logit)


def test_weights_follow_the_policy():
    """Any policy's continue probabilities are weights, by the formula."""
    model, ids = tah2(), token_ids()
    out = model(ids, policy=Fixed(math.log(3)), threshold=0.7)  # p = 3/4
    assert torch.allclose(out.mixture_weights, torch.tensor([1 / 4, 3 / 16, 9 / 16]).expand(2, LENGTH, 3))
    out = model(ids, policy=Fixed(math.log(3)), threshold=0.8)
    assert torch.equal(out.mixture_weights, torch.tensor([1.0, 0, 0]).expand(2, LENGTH, 3))
    even = model(ids, policy="always", max_depth=2)
    model.config.output = "even"
    assert torch.equal(
        model(ids, policy="always", max_depth=2).mixture_weights[..., :2], torch.full((2, LENGTH, 2), 0.5)
    )
    assert even.mixture_weights[..., 1].min() > 0.999


def test_sampled_decisions():
    """They follow the continue probability, not the threshold, and do not depend on the batch or the cache."""
    model, ids = tah2(decision="sample", max_depth=2), token_ids(rows=8, length=60, seed=5)
    out = model(ids)
    p = out.continue_logits[:, :, 0].sigmoid()
    went = out.depth_count > 1
    assert abs(went.float().mean() - p.mean()) < 3 * (p * (1 - p)).mean().sqrt() / math.sqrt(p.numel())
    with pytest.raises(ValueError, match="threshold has no effect with decision='sample'"):
        model(ids, threshold=0.0)
    assert not torch.equal(went, p > middle(p))
    assert torch.equal(model(ids[3:4]).depth_count[0], out.depth_count[3])
    want = [run(Tah2.of(model), row, forced=count) for row, count in zip(ids[:2, :9], out.depth_count[:2], strict=True)]
    assert_equal(model(ids[:2, :9]), want)
    cache = DuoCache()
    parts = [model(part, past_key_values=cache, use_cache=True) for part in ids.split([20, 1, 39], dim=1)]
    assert torch.equal(torch.cat([part.depth_count for part in parts], 1), out.depth_count)
    assert torch.equal(model(ids, policy=model.decider).depth_count, out.depth_count)  # the decider as an object
    with pytest.raises(ValueError, match="threshold has no effect with decision='sample'"):
        model(ids, policy=model.decider, threshold=0.0)
    model.config.random_seed = 1
    assert not torch.equal(model(ids).depth_count, out.depth_count)


@torch.no_grad()
def test_draws_of_different_seeds_are_not_shifts_of_each_other():
    same = torch.full((200,), 7)
    state = DepthState(1, same, torch.arange(200), {}, None, None, None, None)
    zero, one = draw(state, 0), draw(state, 1)
    assert (zero[1:] == one[:-1]).sum() == 0 and abs(torch.corrcoef(torch.stack([zero, one]))[0, 1]) < 0.2
    # At seed 0 they are those of earlier versions.
    assert (zero[:3] * 2**31).tolist() == [2105749798, 1099988066, 799730810]


def test_settings_of_a_mixture_are_checked():
    for seed in (-1, 2**63, 1.0, True):
        with pytest.raises(ValueError, match="random_seed=.* must be an integer from 0 to 2\\^63 - 1"):
            TaHConfig(random_seed=seed)
    TaHConfig(random_seed=2**63 - 1)
    for output, kind in (("mixture", "tah2"), ("sum", "lean")):
        with pytest.raises(ValueError, match=f"give decider=.'kind': '{kind}'."):
            TaHConfig(output=output, decider=None)


def test_generation_with_sampled_decisions():
    """In a padded batch, with beams and by prompt lookup, tokens decide as in whole forwards and in the reference."""
    model, ids = tah2(decision="sample", max_depth=2), token_ids(length=6)
    given = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    out = model.generate(ids, attention_mask=mask, pad_token_id=0, **given)
    for row, start in ((0, 0), (1, 2)):
        alone = model.generate(ids[row : row + 1, start:], **given)
        assert torch.equal(out.sequences[row, start:], alone.sequences[0])
        assert torch.equal(out.depth_count[row, start:-1], alone.depth_count[0, :-1])
        want = run(Tah2.of(model), alone.sequences[0, :-1], forced=alone.depth_count[0, :-1])
        assert torch.equal(want.log_probs[5 - start :].argmax(-1), alone.sequences[0, 6 - start :])
        assert torch.equal(model(alone.sequences[:, :-1]).depth_count, alone.depth_count[:, :-1])
        assert set(alone.depth_count[0, :-1].tolist()) == {1, 2}
        found = model.generate(ids[row : row + 1, start:], **given, prompt_lookup_num_tokens=3)
        assert torch.equal(found.sequences, alone.sequences)
        assert torch.equal(found.depth_count[:, :-1], alone.depth_count[:, :-1])
    beams = model.generate(ids, **given, num_beams=3).sequences
    assert torch.equal(beams, model.generate(ids, **given, num_beams=3, use_cache=False).sequences)


def test_packed_documents_equal_rows():
    model = tah2()
    documents = [token_ids(1, length, seed)[0] for seed, length in enumerate((7, 4, 9))]
    ids, positions = packed_row(documents)
    out = model(ids, position_ids=positions)
    rows = [run(Tah2.of(model), document) for document in documents]
    assert torch.equal(out.depth_count[0], torch.cat([row.depth_count for row in rows]))
    assert distance(out.logits[0], torch.cat([row.log_probs for row in rows])) < EXACT


@pytest.mark.parametrize("family", ["llama", "gemma2", "tied"])
def test_generation_equals_whole_forwards(family):
    """Greedy tokens and beams from the cache are those of uncached forwards."""
    model, ids = tah2(family), token_ids(length=5)
    given = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "return_dict_in_generate": True}
    out = model.generate(ids, **given)
    for row in out.sequences:
        want = run(Tah2.of(model), row[:-1])
        assert torch.equal(want.log_probs[4:].argmax(-1), row[5:])
    full = model(out.sequences[:, :-1])
    assert torch.equal(out.depth_count[:, :-1], full.depth_count)
    assert distance(out.mixture_weights[:, :-1], full.mixture_weights) < EXACT
    cached = model.generate(ids, **given, num_beams=3).sequences
    assert torch.equal(cached, model.generate(ids, **given, num_beams=3, use_cache=False).sequences)


# -- training ----------------------------------------------------------------------------------------------------------


def training_of(model, ids, targets, items, mask=None):
    given = {}
    if model.config.attention == "own":  # what nothing supervises takes one pass
        given["depth_labels"] = (F.pad(targets[:, 1:], (0, 1), value=-100) == -100).long()
    side = TrainingPass(side_passes=True, follow_labels=bool(given))
    out = model(ids, attention_mask=mask, labels=targets, num_items_in_batch=items, training=side, **given)
    found = gain_labels(out, F.pad(targets[:, 1:], (0, 1), value=-100) != -100, [0.99])
    return out, found, joint_decider_loss(out, found, items)


@pytest.mark.grad
@pytest.mark.parametrize(
    ("family", "attention", "output", "max_depth"),
    [("llama", "duo", "mixture", 3), ("qwen3", "duo", "mixture", 4), ("tied", "own", "mixture", 3)]
    + [("gemma2", "duo", "mixture", 2), ("gemma2", "own", "even", 3)],
)
def test_training_equals_reference(family, attention, output, max_depth):
    with torch.no_grad():
        model = tah2(family, attention=attention, output=output, max_depth=max_depth).train()
    ids, lengths = token_ids(rows=3), (12, 8, 10)
    mask = torch.stack([torch.arange(LENGTH) < length for length in lengths]).long()
    targets = torch.where(mask.bool() & (torch.arange(LENGTH) > 2), ids, -100)
    items = int((targets != -100).sum())
    out, found, decider_loss = training_of(model, ids, targets, items, mask)
    (out.loss + 0.5 * decider_loss).backward()
    ours = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    rows = [[x[row, :length] for row, length in enumerate(lengths)] for x in (ids, targets)]
    want = train(Tah2.of(model), *rows, num_items=items)
    want.loss(1.0, 0.5).backward()

    supervised = F.pad(targets[:, 1:], (0, 1), value=-100) != -100
    assert torch.equal(out.depth_count[supervised], want.depth_count)
    assert torch.equal(found.depth_labels[supervised], want.depth_labels)
    assert sum(want.hard) > 2 and want.depth_count.float().mean() > 1.2  # there is something to compare
    for depth in range(1, max_depth + 1):
        known = want.depth_count >= depth - 1
        assert distance(out.pass_loss[:, :, depth - 1][supervised][known], want.losses[depth - 1][known]) < EXACT
    for depth in range(1, max_depth):
        ran = want.depth_count >= depth
        assert distance(found.cost[:, :, depth - 1][supervised][ran], want.costs[depth - 1][ran]) < 1e-4
        assert found.boundaries[depth - 1].item() == pytest.approx(want.boundaries[depth - 1], abs=1e-5)
    assert out.loss.item() == pytest.approx(want.nll.item(), rel=EXACT)
    assert decider_loss.item() == pytest.approx(want.decider_loss.item(), rel=1e-4)
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            assert ours[name] is None or not ours[name].any(), name
        else:
            assert (ours[name] - parameter.grad).norm() <= 1e-3 * parameter.grad.norm() + 1e-7, name


@pytest.mark.grad
@pytest.mark.parametrize(
    ("next_input", "output"), [("topk", "mixture"), ("hidden", "even"), ("mlp", "sum"), ("mlp", "mixture")]
)
@pytest.mark.parametrize("family", ["tied", "gemma2"])
def test_gradients_beside_parts_of_tah(family, next_input, output):
    """All gradients of the loss, with forced depths, LoRA and checkpointing."""
    with torch.no_grad():
        model = tah2(family, next_input=next_input, output=output, mix_topk=16, lora_rank=4).train()
    ids, forced = token_ids(), labels(depth=3)
    rows = rows_of(model, ids, forced)
    logp = torch.stack([row.log_probs for row in rows]).log_softmax(-1)
    F.nll_loss(logp[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    want = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    parts = {"mlp": "next_input_mlp.proj.weight", "hidden": "next_input_map.weight"}
    assert parts.get(next_input, "base.model.embed_tokens.weight") in want
    assert ("decider.score.weight" in want) is (output == "mixture")
    for replayed in (False, True):
        if replayed:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        model.zero_grad(set_to_none=True)
        out = model(ids, labels=ids, depth_labels=forced, training=FORCED)
        out.loss.backward()
        got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        assert got.keys() == want.keys()
        for name, grad in got.items():
            assert (grad - want[name]).norm() < 1e-3 * want[name].norm() + 1e-7, name


def test_saving_and_loading_is_exact(tmp_path):
    model, ids = tah2("tied", decision="sample", next_input_norms=[False, True], next_input_width=20), token_ids()
    model.save_pretrained(tmp_path)
    again = TaHForCausalLM.from_pretrained(tmp_path, attn_implementation="eager")
    for name in ("next_input", "next_input_width", "next_input_norms", "output", "decision", "decider", "threshold"):
        assert getattr(again.config, name) == getattr(model.config, name), name
    out, other = model(ids), again(ids)
    assert torch.equal(out.logits, other.logits) and torch.equal(out.depth_count, other.depth_count)


@pytest.mark.grad
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_autocast_trains(family, request):
    """In bfloat16 autocast, deeper passes have the precision of depth 1, and gradients are near those of float32.

    No norm falls back to a kernel that is not fused, of which torch warns once in a process.
    """
    always = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    request.addfinalizer(lambda: torch.set_warn_always(always))
    model, ids = tah2(family), token_ids()
    counts = model(ids).depth_count
    given = {"labels": ids, "depth_labels": counts, "training": TrainingPass(follow_labels=True, side_passes=True)}
    grads = {}
    for enabled in (False, True):
        seen = []
        hook = model.decoder.layers[0].register_forward_pre_hook(
            lambda module, args, kwargs, seen=seen: seen.append((args[0] if args else kwargs["hidden_states"]).dtype),
            with_kwargs=True,
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled), warnings.catch_warnings():
            warnings.filterwarnings("error", message="Mismatch dtype between input and weight")
            model(ids, **given).loss.backward()
        hook.remove()
        assert set(seen) == {torch.float32}
        grads[enabled] = model.next_input_mlp.proj.weight.grad.clone()
        model.zero_grad()
    cosine = torch.nn.functional.cosine_similarity(grads[False].flatten(), grads[True].flatten(), dim=0)
    assert cosine > 0.98 and not torch.equal(grads[False], grads[True])


def test_many_logits_are_made_in_parts():
    """The output of many tokens is that of each part, and of the plain path."""
    model, ids = tah2(max_depth=2), token_ids(rows=5, length=60, seed=3)
    out, parts = model(ids), [model(ids, logits_to_keep=torch.arange(at, at + 10)).logits for at in range(0, 60, 10)]
    assert torch.equal(out.logits, torch.cat(parts, dim=1))
    with torch.enable_grad():
        assert distance(model(ids).logits.detach(), out.logits) < EXACT


def test_weights_of_the_last_token_of_generate():
    """It ran no pass, so no pass has a weight."""
    model = tah2()
    out = model.generate(token_ids(length=5), max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
    assert (out.mixture_weights[:, -1] == 0).all()
    assert torch.allclose(out.mixture_weights[:, :-1].sum(-1), torch.ones(out.depth_count[:, :-1].shape))


@pytest.mark.grad
def test_limits_of_rows_in_training():
    """In a row at its largest depth there is no decision, so the loss is that of the rows, each with its limit."""
    model, ids = tah2(), token_ids(rows=2)
    targets = F.pad(ids[:, 1:], (0, 1), value=-100) != -100

    def of(rows, limit):
        training = TrainingPass(side_passes=True)
        out = model(ids[rows], labels=ids[rows], max_depth=limit, num_items_in_batch=1, training=training)
        return out, gain_labels(out, targets[rows], [0.99])

    both, made = of(slice(0, 2), torch.tensor([2, 3]))
    _, alone = of(slice(0, 1), 2)
    assert torch.isfinite(joint_decider_loss(both, made, 1))
    assert not made.asked[0, :, 1].any() and torch.equal(made.asked[0, :, 0], alone.asked[0, :, 0])


def test_decisions_of_a_policy_are_checked():
    class Pair(Policy):
        def __init__(self, decisions):
            self.decisions = decisions

        def __call__(self, state):
            return torch.zeros(len(state.positions)), self.decisions(state)

    model, ids = tah2(max_depth=2), token_ids()
    out = model(ids, policy=Pair(lambda state: state.positions % 2 == 0))
    assert torch.equal(out.depth_count[0], 2 - torch.arange(LENGTH) % 2)
    assert torch.allclose(out.mixture_weights[0, 0], torch.tensor([0.5, 0.5, 0.0])[: out.mixture_weights.shape[-1]])
    for wrong in (lambda state: (state.positions % 2).long(), lambda state: torch.ones(3, dtype=torch.bool)):
        with pytest.raises(ValueError, match="decisions that are not a bool tensor"):
            model(ids, policy=Pair(wrong))


def test_labels_decide_over_decisions_of_a_policy():
    """A label of 0 leaves the decision to the policy."""

    class EveryOther(Policy):
        def __call__(self, state):
            return torch.zeros(len(state.positions)), state.positions % 2 == 0

    model, ids = tah2(max_depth=2), token_ids()
    forced = torch.arange(LENGTH).expand(2, -1) % 3
    out = model(ids, policy=EveryOther(), depth_labels=forced, training=FORCED)
    assert torch.equal(out.depth_count, torch.where(forced == 0, 2 - torch.arange(LENGTH) % 2, forced))
