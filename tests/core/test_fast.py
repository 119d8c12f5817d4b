"""The paths of `tah/core/fast.py` compute what the plain paths compute."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional as F

from helpers.models import distance, labels, packed_row, shake, tah, token_ids
from tah.core import fast

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
        assert distance(one.logits, other.logits) < 1e-5
    assert max(int(out.depth_count.max()) for out in found[0]) > 1


def test_the_fast_paths_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the comparison above compares two things."""
    model, called = tah(), []
    for name in ("product", "sum_of_rows", "topk", "spread"):
        plain = getattr(fast, name)
        monkeypatch.setattr(fast, name, lambda *args, plain=plain, name=name: (called.append(name), plain(*args))[1])
    monkeypatch.setattr(fast, "DENSE", 0)
    model(token_ids(2, 3), policy="always")
    assert {"product", "sum_of_rows", "topk"} <= set(called)
    called.clear()
    monkeypatch.setattr(fast, "ENABLED", False)
    model(token_ids(2, 3), policy="always")
    assert not set(called) - {"topk"}  # which then is torch's own


@pytest.mark.parametrize("family", ["llama", "olmo3", "deepseek_v3"])
@pytest.mark.parametrize("attention", ["duo", "own", "blind"])
def test_a_pass_in_chunks_equals_the_pass_at_once(monkeypatch: pytest.MonkeyPatch, family: str, attention: str) -> None:
    """Padded, continued, packed; in chunks with fewer keys than there are."""
    model = tah(family, "sdpa", attention=attention, max_depth=3)
    ids, depth_labels = token_ids(2, 23), labels(2, 23, depth=3)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    packed, positions = packed_row([token_ids(1, n, seed=n)[0] for n in LENGTHS])
    keys, plain = [], F.scaled_dot_product_attention

    def watched(query: torch.Tensor, key: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        keys.append(key.shape[2])
        return plain(query, key, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    found = []
    for queries in (2, 10**9):
        monkeypatch.setattr(fast, "QUERIES", queries)
        monkeypatch.setattr("tah.core.cache.WIDE", 1 if queries == 2 else 10**9)
        keys.clear()
        out = model(ids, attention_mask=mask, depth_labels=depth_labels, policy="oracle")
        calls = list(keys)
        start = model(ids[:, :12], depth_labels=depth_labels[:, :12], policy="oracle")
        rest = model(ids[:, 12:], depth_labels=depth_labels[:, 12:], past_key_values=start.past_key_values)
        several = model(packed, position_ids=positions, depth_labels=labels(1, sum(LENGTHS)), policy="oracle")
        found.append(([out.logits[mask > 0], start.logits, rest.logits, several.logits], calls))
    (in_chunks, chunk_calls), (at_once, whole_calls) = found
    assert len(chunk_calls) > len(whole_calls) and min(chunk_calls) < min(whole_calls)
    assert max(map(distance, in_chunks, at_once)) < 1e-4


def test_chunks_cover_every_token_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "QUERIES", 3)
    tokens = torch.tensor([0, 2, 3, 4, 5, 7, 9, 11, 20, 25, 26])  # of rows of 10
    chunks = fast.chunks(tokens, 10)
    assert len(chunks) > 1
    assert torch.equal(torch.cat(chunks).sort().values, torch.arange(len(tokens)))
    for row in range(3):  # a row's tokens run in their order
        order = [int(at) for chunk in chunks for at in chunk if tokens[at] // 10 == row]
        assert order == sorted(order)
    assert len(fast.chunks(tokens[:2], 10)) == 1
    with torch.enable_grad():
        assert len(fast.chunks(tokens, 10)) == 1


def test_depth_one_of_packed_rows_is_computed_as_the_base_computes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the last bit, however long: chunks are for deeper passes."""
    model = tah()
    ids, positions = packed_row([token_ids(1, n, seed=n)[0] for n in LENGTHS])
    found = []
    for queries in (2, 10**9):
        monkeypatch.setattr(fast, "QUERIES", queries)
        found.append(model(ids, position_ids=positions, policy="never").logits)
    assert torch.equal(*found)
