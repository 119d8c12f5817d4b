"""The next input and its gradient: ours touches only the rows of the best tokens, autograd's all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from helpers.families import tiny
from helpers.models import labels, shake, token_ids
from tah import TaHForCausalLM
from tah.core import fast
from tah.core import next_input as mixing
from tah.core.depth import at_depth
from tah.core.fast import topk
from tah.core.head import Head
from tah.core.logits import CHUNK, RunningOutput
from tah.core.lora import add_lora
from tah.core.next_input import mixed_embedding

V, D = 50, 12


def parts(tied: bool, padding: int | None, dtype: torch.dtype, k: int) -> tuple[RunningOutput, nn.Embedding, Tensor]:
    """An output head with a scale, an embedding, and hidden states of more tokens than a chunk."""
    torch.manual_seed(0)
    embed = nn.Embedding(V, D, padding_idx=padding, dtype=dtype)
    linear = nn.Linear(D, V, bias=False, dtype=dtype)
    if tied:
        linear.weight = embed.weight
    hidden = torch.randn(1, CHUNK + 9, D, dtype=dtype, requires_grad=True)
    return RunningOutput(Head(linear, scale=0.7, divide=1.3), hidden, None, num_best=k), embed, hidden


@pytest.mark.parametrize("k", [7, V + 1])
@pytest.mark.parametrize("padding", [None, 3])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dense", [0, fast.DENSE])
def test_gradient_equals_autograds(
    monkeypatch: pytest.MonkeyPatch, tied: bool, padding: int | None, k: int, dtype: torch.dtype, dense: int
) -> None:
    found = []
    monkeypatch.setattr(fast, "DENSE", dense)  # rows are picked, or the whole matrix is multiplied
    for plain in (True, False):
        total, embed, hidden = parts(tied, padding, dtype, k)
        monkeypatch.setattr(mixing, "is_plain", lambda embed, plain=plain: plain)
        tokens = torch.randperm(CHUNK + 9, generator=torch.Generator().manual_seed(1))[: CHUNK + 5]
        out = mixed_embedding(total, tokens, embed)
        seen = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
        (out * seen).sum().backward()
        found.append((out.detach(), hidden.grad, total.head.linear.weight.grad, embed.weight.grad))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    for name, ours, autograds in zip(("output", "hidden", "matrix", "table"), *found, strict=True):
        error = (ours - autograds).float().norm() / autograds.float().norm()
        assert error < tolerance, f"{name}: {error}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_gradients_the_next_input_is_the_same(dtype: torch.dtype) -> None:
    total, embed, _ = parts(True, None, dtype, 7)
    tokens = torch.arange(CHUNK + 9)
    with torch.no_grad():
        found = mixed_embedding(total, tokens, embed)
        weights, ids = total.best(tokens)
        want = (weights[:, :, None] * embed.weight[ids].float()).sum(1)
    assert found.dtype == dtype
    assert (found - want).float().norm() <= (1e-6 if dtype == torch.float32 else 1e-2) * want.norm()


def test_hooks_of_the_embedding_see_the_next_input() -> None:
    total, embed, _ = parts(True, None, torch.float32, 7)
    tokens = torch.arange(9)
    with torch.no_grad():
        want = 2 * mixed_embedding(total, tokens, embed)
        embed.register_forward_hook(lambda module, args, out: 2 * out)
        assert torch.allclose(mixed_embedding(total, tokens, embed), want)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
@pytest.mark.parametrize("types", ["float32", "bfloat16", "mixed"])
def test_adapters_add_the_same_with_and_without_gradients(
    monkeypatch: pytest.MonkeyPatch, kind: type, bias: bool, types: str
) -> None:
    """On more rows than the product for few rows takes, on one, and where a hook must see the call."""
    torch.manual_seed(0)
    layer = nn.Linear(12, 20, bias=bias) if kind is nn.Linear else Conv1D(20, 12)
    add_lora(holder := nn.ModuleList([layer]), rank=4, alpha=6)
    nn.init.normal_(layer.lora_B.weight)
    holder.to(torch.float32 if types == "float32" else torch.bfloat16)
    if types == "mixed":
        layer.lora_A.float(), layer.lora_B.float()
    layer.eval()  # while training there is no fast path
    taken: list[bool] = []
    adapted = fast.adapted

    def watched(*given: Any) -> Any:
        taken.append((y := adapted(*given)) is not None)
        return y

    monkeypatch.setattr(fast, "adapted", watched)
    for shape in ((12,), (1, 12), (3, 30, 12)):
        x = torch.randn(shape, dtype=layer.weight.dtype)
        plain = layer(x).detach().float()
        update = 1.5 * layer.lora_B(layer.lora_A(x.to(layer.lora_A.weight.dtype))).detach().float()
        with at_depth(2):
            want = layer(x).detach()
            with torch.no_grad():
                found = [layer(x)]
                handle = layer.lora_B.register_forward_hook(lambda module, args, out: 0 * out)
                silent = layer(x)
                handle.remove()
        assert torch.equal(silent.float(), plain)
        for out in (want, *found):
            assert out.dtype == x.dtype and out.shape == plain.shape
            error = (out.float() - plain - update).norm() / update.norm()
            assert error < (1e-6 if types == "float32" else 2e-2)
    assert taken == [False, types != "mixed", False] * 3  # with gradients, without, and where a hook must see the call


def test_fast_topk_equals_topk() -> None:
    generator = torch.Generator().manual_seed(0)
    for size, k in ((97, 5), (1000, 5), (1000, 61), (1000, 62), (1003, 1), (163, 10)):
        x = torch.randn(9, size, generator=generator)
        x[3, 5:] = -torch.inf
        for its in (x, x.bfloat16()):  # which has ties
            top, ids = topk(its, k)
            assert torch.equal(top, its.topk(k).values) and torch.equal(its.gather(1, ids), top)
            assert all(len(set(row)) == k for row in ids.tolist())


@pytest.mark.parametrize("frozen", ["matrix", "table", "hidden"])
def test_what_is_frozen_gets_no_gradient(frozen: str) -> None:
    total, embed, hidden = parts(False, None, torch.float32, 4)
    leaves = {"matrix": total.head.linear.weight, "table": embed.weight, "hidden": hidden}
    leaves[frozen].requires_grad_(False)
    total.total = hidden.flatten(0, 1)
    mixed_embedding(total, torch.arange(5), embed).square().sum().backward()
    assert {name for name, leaf in leaves.items() if leaf.grad is None} == {frozen}


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "gpt2", "granite"])
def test_training_sees_the_same_gradients_through_either(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """Also where ours does not apply: scaled embeddings, soft-capped heads."""
    grads = []
    for every in (True, False):
        torch.manual_seed(0)
        model = shake(
            TaHForCausalLM.from_base(tiny(family, "eager"), policy="oracle", mix_topk=16, lora_rank=4)
        ).train()
        if not every:
            monkeypatch.setattr(mixing, "is_plain", lambda embed: False)
        ids = token_ids(2, 20)
        model(ids, labels=ids, depth_labels=labels(2, 20)).loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and len(grads[0]) > 10
    for name, grad in grads[0].items():
        assert (grad - grads[1][name]).norm() <= 1e-4 * grads[1][name].norm() + 1e-7, name
