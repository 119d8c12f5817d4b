"""The paths of `tah/core/fast.py` compute what the plain paths compute."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from helpers.families import VOCAB
from helpers.models import distance, labels, middle, packed_row, shake, tah, token_ids
from tah import DuoCache
from tah.core import fast
from test_tah2 import tah2

LENGTHS = [9, 5, 7]


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "cohere", "granite"])
@pytest.mark.parametrize("policy", ["always", "confidence", "decider"])
@pytest.mark.parametrize("rows", [1, 2, 20])
def test_fast_equals_plain(monkeypatch: pytest.MonkeyPatch, family: str, policy: str, rows: int) -> None:
    """A prompt, then three tokens a row: linear layers on a few rows, logits kept, sums of embeddings."""
    model = shake(tah(family, "eager", max_depth=3))
    prompt, found = token_ids(rows, 8), []
    for enabled in (True, False):
        monkeypatch.setattr(fast, "ENABLED", enabled)
        out = model(prompt, policy=policy, threshold=0.3)
        made = [out]
        for step in range(3):
            new = token_ids(rows, 1, seed=step)
            made.append(out := model(new, policy=policy, threshold=0.3, past_key_values=out.past_key_values))
        found.append(made)
    for one, other in zip(*found, strict=True):
        assert torch.equal(one.depth_count, other.depth_count)
        assert distance(one.logits, other.logits) < 5e-5  # rounding in float32; some CPUs differ by 2e-5
    assert max(int(out.depth_count.max()) for out in found[0]) > 1


def test_the_fast_paths_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the comparison above compares two things."""
    model, called = tah(), []
    for name in ("product", "sum_of_rows", "topk"):
        plain = getattr(fast, name)
        monkeypatch.setattr(fast, name, lambda *args, plain=plain, name=name: (called.append(name), plain(*args))[1])
    monkeypatch.setattr(fast, "DENSE", 0)
    model(token_ids(2, 3), policy="always")
    assert {"product", "sum_of_rows", "topk"} <= set(called)
    called.clear()
    monkeypatch.setattr(fast, "ENABLED", False)
    model(token_ids(2, 3), policy="always")
    assert not called


@pytest.mark.parametrize("family", ["llama", "olmo3", "deepseek_v3"])
@pytest.mark.parametrize("attention", ["duo", "own", "blind"])
def test_attention_in_blocks_equals_attention_at_once(
    monkeypatch: pytest.MonkeyPatch, family: str, attention: str
) -> None:
    """Padded, continued, packed, with gradients, and replayed; by block with fewer keys than there are."""
    model = tah(family, "sdpa", attention=attention, max_depth=3, policy="oracle")
    ids, depth_labels = token_ids(2, 23), labels(2, 23, depth=3)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    targets = ids.masked_fill(mask == 0, -100)
    packed, positions = packed_row([token_ids(1, n, seed=n)[0] for n in LENGTHS])
    keys: list[int] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is fast.SDPA:
                keys.append(args[1].shape[2])
            return func(*args, **(kwargs or {}))

    found = []
    for queries in (2, 10**9):
        monkeypatch.setattr(fast, "QUERIES", queries)
        keys.clear()
        results = []
        for replayed in (False, True):
            if replayed:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.train(replayed).zero_grad()
            with Watch(), torch.enable_grad():
                out = model(ids, attention_mask=mask, depth_labels=depth_labels, labels=targets)
                out.loss.backward()
            results += [out.loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]
            model.gradient_checkpointing_disable()
        model.eval()
        calls = list(keys)
        start = model(ids[:, :12], depth_labels=depth_labels[:, :12])
        rest = model(ids[:, 12:], depth_labels=depth_labels[:, 12:], past_key_values=start.past_key_values)
        several = model(packed, position_ids=positions, depth_labels=labels(1, sum(LENGTHS)))
        found.append(([start.logits, rest.logits, several.logits, *results], calls))
    (by_block, block_calls), (at_once, whole_calls) = found
    assert len(block_calls) > len(whole_calls) and min(block_calls) < min(whole_calls)
    assert len(by_block) == len(at_once) > 10
    assert max(map(distance, by_block, at_once)) < 1e-4


def test_depth_one_of_packed_rows_is_computed_as_the_base_computes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit, however long and although deeper passes follow: blocks are for these."""
    model = tah("llama", "sdpa")
    ids, positions = packed_row([token_ids(1, n, seed=n)[0] for n in LENGTHS])
    found = []
    for queries in (2, 10**9):
        monkeypatch.setattr(fast, "QUERIES", queries)
        kept: list[torch.Tensor] = []
        handle = model.base.model.norm.register_forward_hook(lambda module, args, out, kept=kept: kept.append(out))
        model(ids, position_ids=positions, policy="always")
        handle.remove()
        found.append(kept)
    assert torch.equal(found[0][0], found[1][0]) and len(found[0]) == 2


def test_other_calls_of_attention_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask of another length than the queries and keys goes to the kernel, which refuses it."""
    monkeypatch.setattr(fast, "QUERIES", 2)
    mask = torch.ones(1, 1, 9, 18, dtype=torch.bool).tril(9)
    query, key = torch.randn(1, 4, 9, 8), torch.randn(1, 4, 18, 8)
    want = F.scaled_dot_product_attention(query, key, key, attn_mask=mask)
    with fast.attention_in_blocks(mask, torch.float32)():
        assert distance(F.scaled_dot_product_attention(query, key, key, attn_mask=mask), want) < 1e-6
        assert torch.equal(F.scaled_dot_product_attention(query, key, key, attn_mask=mask.clone()), want)
        assert torch.equal(F.scaled_dot_product_attention(query, key=key, value=key, attn_mask=mask), want)
        with pytest.raises(RuntimeError):
            F.scaled_dot_product_attention(query, torch.randn(1, 4, 19, 8), torch.randn(1, 4, 19, 8), attn_mask=mask)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_fast_equals_plain_with_gradients(monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    found, ids = [], token_ids(2, 20)
    for enabled in (True, False):
        monkeypatch.setattr(fast, "ENABLED", enabled)
        model = shake(tah(family, "sdpa", policy="oracle")).train()
        with torch.enable_grad():
            out = model(ids, labels=ids, depth_labels=labels(2, 20))
            out.loss.backward()
        found.append([out.loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 10
    assert max(map(distance, *found)) < 1e-4


def rows_of_the_head(model: Any, rows: int, **given: Any) -> tuple[Any, int]:
    """The output of one decoded token a row, and for how many rows the head ran."""
    ids, cache, made = token_ids(rows, 6), DuoCache(), []
    model(ids, past_key_values=cache, logits_to_keep=1)
    handle = model.get_output_embeddings().register_forward_hook(
        lambda module, args, out: made.append(out.numel() // out.shape[-1])
    )
    out = model(ids[:, :1], past_key_values=cache, logits_to_keep=1, **given)
    handle.remove()
    return out, sum(made)


@pytest.mark.parametrize("rows", [64, 65, 200])
@pytest.mark.parametrize(
    ("policy", "output", "next_input"),
    [("decider", "mixture", "mlp"), ("confidence", "mixture", "mlp"), ("confidence", "sum", "mlp")]
    + [("decider", "mixture", "topk")],
)
def test_the_head_runs_once_for_each_pass_of_a_decoded_token(
    monkeypatch: pytest.MonkeyPatch, policy: str, output: str, next_input: str, rows: int
) -> None:
    """Although the policy reads the logits before the output does. Beyond the bound in bytes it runs again."""
    model = tah2(max_depth=2, output=output, next_input=next_input, mix_topk=16)
    threshold = middle(model(token_ids(rows, 6), policy=policy).continue_prob[:, :, 0])
    out, made = rows_of_the_head(model, rows, policy=policy, threshold=threshold)
    deep = int((out.depth_count > 1).sum())
    assert 0 < deep < rows and made == rows + deep
    monkeypatch.setattr(fast, "MEMO", rows * VOCAB * 4 - 1)
    again, made = rows_of_the_head(model, rows, policy=policy, threshold=threshold)
    apart = {"sum": 0, "mixture": deep}[output]  # a sum has one row a token
    assert made == 2 * rows + apart + (deep if next_input == "topk" else 0)
    assert torch.equal(again.depth_count, out.depth_count) and distance(again.logits, out.logits) < 1e-5


@pytest.mark.parametrize(
    ("policy", "output"), [("decider", "mixture"), ("confidence", "mixture"), ("confidence", "sum")]
)
def test_no_logits_are_kept_of_tokens_whose_logits_nobody_asks_for(
    monkeypatch: pytest.MonkeyPatch, policy: str, output: str
) -> None:
    """A policy reads them, `CHUNK` tokens at a time."""
    model, made, make = tah2(max_depth=2, output=output), [], fast.running_output
    monkeypatch.setattr(fast, "running_output", lambda *given: made.append(make(*given)) or made[-1])
    for keep, kept in ((1, False), (0, True)):
        model(token_ids(2, 20), policy=policy, logits_to_keep=keep)
        (running,) = made
        assert bool(running.known if output == "mixture" else running.memo is not None) is kept
        made.clear()
