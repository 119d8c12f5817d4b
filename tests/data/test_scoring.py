"""How hard each token is for a model: the scores of single predictions, and reference models of any family."""

import math

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertLMHeadModel, MambaConfig, MambaForCausalLM

from helpers.models import tah
from helpers.scores import plain_row_scores, plain_scores
from tah.data.scoring import Reference, batches, score_targets


@pytest.mark.parametrize("coarse", [False, True], ids=["all differ", "with ties"])
@pytest.mark.parametrize(("size", "k"), [(97, 0), (97, 5), (1000, 5), (1000, 1), (640, 12)])
def test_scores_are_those_of_a_sort_and_a_softmax(size, k, coarse):
    """With targets among the best tokens and elsewhere; more than a piece of rows; float32 and bfloat16."""
    generator = torch.Generator().manual_seed(size + k)
    logits = torch.randn(200, size, generator=generator) * 4
    logits[:, 7] = -torch.inf
    logits = logits.round().to(torch.bfloat16) if coarse else logits
    target = torch.randint(0, size, (200,), generator=generator)
    target[:100] = logits[:100].float().topk(3).indices[:, 2]
    given = logits.clone()
    found = score_targets(given, target, k)
    assert torch.equal(given, logits)  # they are only read
    assert ((found.rank == 0) == (logits.float().numpy().argmax(1) == target.numpy())).all()
    for at in range(200):
        rank, prob, entropy, best, probs = plain_scores(logits[at], target[at], k)
        assert found.rank[at] == rank
        assert found.prob[at].item() == pytest.approx(prob, rel=1e-4, abs=1e-7)
        assert found.entropy[at].item() == pytest.approx(entropy, rel=1e-4, abs=1e-5)
        assert logits[at, found.top_ids[at]].tolist() == logits[at, best].tolist()
        if not coarse:
            assert found.top_ids[at].tolist() == best
        assert found.top_prob[at].tolist() == pytest.approx(probs, rel=1e-4)


def test_scores_of_few_tokens():
    found = score_targets(torch.tensor([[1.0, 3, 3, -math.inf]]).repeat(2, 1), torch.tensor([2, 3]), 2)
    assert found.rank.tolist() == [1, 3] and found.log_prob[1] == -math.inf and found.prob[1] == 0
    assert found.top_ids.tolist() == [[1, 2], [1, 2]]
    nothing = score_targets(torch.empty(0, 4), torch.empty(0, dtype=torch.int64), 2)
    assert len(nothing.rank) == 0 and nothing.top_ids.shape == nothing.top_prob.shape == (0, 2)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_refused(value):
    with pytest.raises(ValueError, match="the model computes NaN or infinity"):
        score_targets(torch.tensor([[0.0, value]]), torch.tensor([0]))
    with pytest.raises(ValueError, match="the reference computes NaN or infinity"):
        score_targets(torch.tensor([[0.0, 1.0, 2.0], [0.0, value, 1.0]]), torch.tensor([0, 2]), 1, "the reference")


def test_batches_keep_to_their_budget_and_lose_nothing():
    lengths = [5, 9, 1, 9, 30, 4, 7]
    found = batches(lengths, 20)
    assert sorted(at for batch in found for at in batch) == list(range(7)) and found[0] == [4]
    assert all(len(batch) * lengths[batch[0]] <= 20 for batch in found[1:])
    assert batches([], 20) == []


def test_references_of_other_families():
    """A scaled, soft-capped head; one that cannot be taken apart; a TaH model; dropout that is switched on."""
    from helpers.families import tiny

    ids = [np.array([3, 9, 4, 12, 7, 7], np.int32), np.array([5, 6, 4], np.int32)]
    supervised = [np.array([0, 0, 1, 1, 0, 1], bool), np.array([0, 1, 1], bool)]
    odd = tiny("llama")
    odd.lm_head.register_forward_hook(lambda module, given, out: out + 0.3 * out.sin())
    whole = {"llama": True, "gpt2": True, "gemma2": True, "cohere": True, "granite": True}
    models = {name: tiny(name) for name in whole}
    scaled = tiny("llama")
    plain_forward = scaled.forward
    scaled.forward = lambda *args, **kwargs: _times(plain_forward(*args, **kwargs), 1.5)
    models |= {"hooked": odd, "scaled": scaled, "tah": tah(policy="always"), "mamba": MambaForCausalLM(MAMBA).eval()}
    whole |= {"hooked": True, "scaled": False, "tah": False, "mamba": True}
    for name, model in models.items():
        model.train(name == "gpt2")
        judge = Reference(model)
        assert (judge.decoder is not None) == whole[name], name
        found = judge.measure(ids, supervised, 100)
        assert model.training == (name == "gpt2")
        model.eval()
        for its, wanted, row in zip(ids, supervised, found, strict=True):
            rank, prob, entropy = plain_row_scores(model, its.tolist(), wanted)
            assert row.rank.tolist() == rank, name
            assert np.allclose(row.prob, prob, atol=1e-5) and np.allclose(row.entropy, entropy, atol=1e-4), name


MAMBA = MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4)


def _times(out, factor):
    out.logits = out.logits * factor
    return out


def test_a_reference_that_looks_ahead_is_refused():
    sizes = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(**sizes, intermediate_size=16, initializer_range=0.5)
    with pytest.raises(ValueError, match="BertLMHeadModel is not a causal language model"):
        Reference(BertLMHeadModel(config))
