"""Log-probabilities of a step's mixtures, against the mixture of `forward`. Needs no vLLM."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tah.core.logits import CHUNK
from tah.core.mixture import Mixture
from tah.vllm.mixture import StepMixture, log_probabilities

T, WIDTH, VOCAB = 200, 8, 50
LAST = np.array([0, 5, 6, 150, 199])  # of five requests
HARD = [np.array([3, 5, 150]), np.array([0, 7, *range(20, 149), 198])]  # two passes; the second is more than a chunk


class Head(torch.nn.Linear):
    """A head that counts its rows."""

    def __init__(self, dtype):
        super().__init__(WIDTH, VOCAB, bias=False, dtype=dtype)
        self.made = []

    def forward(self, x):
        assert x.is_contiguous()  # which vLLM's kernels for CPUs want
        self.made.append(len(x))
        return super().forward(x)


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=str)
def head(request):
    torch.manual_seed(0)
    return Head(request.param)


@torch.inference_mode()
@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("asked", [True, False], ids=["the policy read logits", "it did not"])
def test_equals_the_mixture_of_forward(head, even, asked):
    """For the sampler and for prompts; with weights near 0 and 1, and a policy that is certain."""
    dtype = head.weight.dtype
    hidden = torch.randn(T, WIDTH, dtype=dtype)
    step, plain = StepMixture(head, hidden, LAST, even), Mixture(head, hidden[None], even, 1)
    if asked:
        step.map(np.arange(T), lambda logp: logp.amax(-1))
    parts = []
    for index in HARD:
        second, logits = torch.randn(len(index), WIDTH, dtype=dtype), 6 * torch.randn(len(index))
        logits[:2] = torch.tensor([torch.inf, -80])
        step.add(index, second, logits.sigmoid())
        parts.append((torch.from_numpy(index), second, logits))
    tokens, second, logits = map(torch.cat, zip(*parts, strict=True))
    order = tokens.argsort()  # a pass of `forward` has its tokens in order
    plain.add(tokens[order], second[order], logits[order])
    want = plain.logits(torch.arange(T))
    head.made.clear()
    got = step.of_last()
    assert got.dtype == torch.float32 and torch.allclose(got, want[LAST], atol=1e-5)
    hard = sum(np.isin(LAST, index).sum() for index in HARD)
    assert sum(head.made) == hard + (0 if asked else len(LAST))  # one product for those that stopped
    head.made.clear()
    rows = step.output(for_prompts=True)
    got = log_probabilities(head, rows[3:], WIDTH)  # any rows of it
    assert got.dtype == torch.float32 and torch.allclose(got, want[3:], atol=1e-5)
    assert torch.allclose(got.exp().sum(-1), torch.ones(T - 3), atol=1e-5)
    assert sum(head.made) == T - 3 + len(tokens) - 1 and max(head.made) <= CHUNK


@torch.inference_mode()
def test_without_a_second_pass_it_is_the_base(head):
    """Bit for bit, and its rows are no longer than hidden states."""
    hidden = torch.randn(T, WIDTH, dtype=head.weight.dtype)
    step = StepMixture(head, hidden, LAST, even=False)
    want = torch.nn.functional.linear(hidden[LAST], head.weight)  # the same rows: rounding depends on their number
    rows = step.output(for_prompts=True)
    assert rows is hidden
    assert torch.equal(step.of_last(), want.float().log_softmax(-1))
    parts = [log_probabilities(head, part, WIDTH) for part in rows.split(CHUNK)]
    assert torch.equal(torch.cat(parts), torch.cat([head(part).float().log_softmax(-1) for part in rows.split(CHUNK)]))


@torch.inference_mode()
def test_policies_read_log_probabilities_or_logits(head):
    """The accumulated logits of a mixture are log-probabilities, those of one pass are not."""
    hidden, index = torch.randn(T, WIDTH, dtype=head.weight.dtype), np.arange(0, T, 3)
    step = StepMixture(head, hidden, LAST, even=False)
    want = torch.nn.functional.linear(hidden, head.weight)[index].float()
    close = {"atol": 1e-5 if head.weight.dtype == torch.float32 else 0.02}
    assert torch.allclose(step.map_pass(index, lambda logits: logits).float(), want, **close)
    assert torch.allclose(step.map(index, lambda logits: logits), want.log_softmax(-1), **close)
