"""Logits that several ask for are made once, and are those of the plain product. Needs no vLLM."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tah.core.logits import CHUNK
from tah.vllm.logits import StepLogits

T, WIDTH, VOCAB = 200, 8, 50
LAST = np.array([0, 5, 6, 150, 199])  # of five requests
ASKED = {
    "all": np.arange(T),
    "last ones": np.array([5, 199]),
    "both kinds": np.array([3, 4, 5, 100, 199]),
    "another": np.array([7]),
}


@pytest.mark.parametrize("index", ASKED.values(), ids=ASKED.keys())
def test_whoever_asks_gets_the_plain_product(index):
    torch.manual_seed(0)
    weight, hidden, made = torch.randn(VOCAB, WIDTH), torch.randn(T, WIDTH), []

    def head(rows):
        made.append(len(rows))
        return rows @ weight.t()

    logits = StepLogits(head, hidden, LAST)
    for _ in range(2):
        got = logits.map(index, lambda found: found.topk(3).values)
        assert torch.allclose(got, (hidden[index] @ weight.t()).topk(3).values, atol=1e-5)
    asked_of_last = bool(np.isin(index, LAST).any())
    assert made.count(len(LAST)) == asked_of_last and max(made) <= CHUNK  # the sampler's once, the others as asked
    new = torch.randn(3, WIDTH)
    logits.add(np.array([4, 5, 150]), new, torch.ones(3))
    hidden[[4, 5, 150]] += new
    want = hidden[LAST] @ weight.t()
    assert torch.allclose(logits.of_last(), want, atol=1e-5) if asked_of_last else logits.of_last() is None
    assert torch.equal(logits.output(for_prompts=True), hidden)
