"""The kernel in Triton's interpreter equals a plain loop. `test_kernel.py` runs this file in a process of its own:

TRITON_INTERPRET=1 pytest tests/vllm_kernel/interpreted.py
"""

from __future__ import annotations

import os
import random
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch

from helpers.duo import draw, plain, same

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before Triton is imported", allow_module_level=True)

import triton  # noqa: E402

from tah.doctor import kernel as doctor  # noqa: E402
from tah.vllm.kernel import duo_attention  # noqa: E402

if triton.__version__ < "3.7" and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4):
    pytest.skip("the interpreter of Triton 3.6 needs numpy below 2.4", allow_module_level=True)


def any_case(seed: int) -> dict:
    rng = random.Random(seed)
    return {
        "M": rng.choice([1, 2, 5, 9]),
        "R": rng.choice([1, 2, 4]),
        "H": rng.choice([1, 2, 3]),
        "G": rng.choice([1, 2, 3, 7, 8, 20]),
        "K": rng.choice([8, 16, 20, 32, 64, 80]),
        "S": rng.choice([16, 32, 48, 64, 128]),
        "N": rng.choice([1, 2, 3]),
        "share": rng.choice([0.0, 0.05, 0.5, 1.0]),
        "own": rng.random() < 0.4,
        "layout": rng.choice(["NHD", "HND"]),
        "dtype": rng.choice([torch.float32, torch.bfloat16, torch.float16]),
        "numbers": rng.choice([torch.int32, torch.int64]),
        "holes": rng.random() < 0.3,
        "seed": seed,
    }


@pytest.mark.parametrize("seed", range(24))
def test_any_case(seed):
    case = draw(**any_case(seed))
    same(case, duo_attention(*case.arguments, splits=random.Random(seed).choice([None, 1, 2, 3, 5])))


@pytest.mark.parametrize("own", [False, True], ids=["duo", "own"])
def test_any_number_of_splits(own):
    """More splits than tiles too; a split without keys has no weight."""
    case = draw(M=2, H=1, S=16, N=6, own=own, seed=3)
    want = plain(case)
    for splits in range(1, 9):
        same(case, duo_attention(*case.arguments, splits=splits), want)


def test_many_tokens_of_few_requests():
    case = draw(M=40, R=3, H=1, S=16, N=4, seed=4)
    same(case, duo_attention(*case.arguments))
    assert len(set(case.positions.tolist())) > 20


def test_without_entries_it_is_causal_attention():
    case = draw(M=2, R=1, share=0.0, seed=5)
    assert case.deep_keys.shape[0] == 0
    length = int(case.positions[1]) + 1
    K, slots = case.query.shape[2], torch.arange(length)
    pages = case.kv_cache[case.tables[0, slots // 16].long(), :, slots % 16].transpose(0, 1)  # [H, n, 2 K]
    keys, values = pages.split(K, -1)
    query = case.query[1].view(2, -1, K)
    want = torch.nn.functional.scaled_dot_product_attention(query, keys, values).reshape(-1, K)
    for own in (False, True):
        found = duo_attention(*replace(case, own=own).arguments)
        torch.testing.assert_close(found[1], want)


def test_own_is_duo_with_the_own_entry_alone():
    case = draw(M=1, R=1, share=0.5, seed=6)
    own = duo_attention(*replace(case, own=True).arguments)
    slot = int(case.tables[0, case.positions[0] // 16]) * 16 + int(case.positions[0]) % 16
    alone = torch.full_like(case.entry_of_slot, -1)
    alone[slot] = case.entry_of_slot[slot]
    torch.testing.assert_close(own, duo_attention(*replace(case, entry_of_slot=alone).arguments))
    assert (own - duo_attention(*case.arguments)).abs().max() > 1e-3  # the control: other entries matter in duo


def test_views_with_any_strides():
    """Queries that are a part of a wider tensor, tables with further columns, pages with padding, transposed pools."""
    case = draw(M=4, G=3, K=20, seed=7)
    M, heads, K = case.query.shape
    wide = torch.full((M, heads + 2, K + 3), torch.nan)
    wide[:, 1:-1, :K] = case.query
    tables = torch.full((len(case.tables), 9), 10**6, dtype=torch.int32)
    tables[:, 2 : 2 + case.tables.shape[1]] = case.tables
    B, H, S, both = case.kv_cache.shape
    pages = torch.full((S, B + 1, both + 5, H), torch.nan).permute(1, 3, 0, 2)[1:, :, :, 2:-3]
    pages.copy_(case.kv_cache)
    keys, values = (x.permute(1, 2, 0).contiguous().permute(2, 0, 1) for x in (case.deep_keys, case.deep_values))
    odd = replace(
        case,
        query=wide[:, 1:-1, :K],
        tables=tables[:, 2 : 2 + case.tables.shape[1]],
        kv_cache=pages,
        deep_keys=keys,
        deep_values=values,
        owners=torch.stack([case.owners] * 2, 1)[:, 0],
    )
    assert not any(x.is_contiguous() for x in (odd.query, odd.kv_cache, odd.deep_keys, odd.owners, odd.tables))
    want = plain(case)
    for splits in (1, 3):
        same(odd, duo_attention(*odd.arguments, splits=splits), want)


def test_pages_beyond_32_bits():
    """The last block lies more than 2^31 numbers behind the first; the memory between them is never touched."""
    small = draw(M=1, R=1, H=2, K=32, N=1, dtype=torch.float16, numbers=torch.int32, seed=8)
    blocks = 2**31 // small.kv_cache[0].numel() + 3
    cache = torch.empty(blocks, *small.kv_cache.shape[1:], dtype=torch.float16)
    cache[-1] = small.kv_cache[small.tables[0, 0].long()]
    entry_of_slot = torch.full((blocks * 16,), -1, dtype=torch.int32)
    first = int(small.tables[0, 0]) * 16
    entry_of_slot[-16:] = small.entry_of_slot[first : first + 16]
    tables = torch.full_like(small.tables, blocks - 1)
    large = replace(small, kv_cache=cache, entry_of_slot=entry_of_slot, tables=tables)
    same(large, duo_attention(*large.arguments), plain(small))


def test_padded_rows_and_no_rows():
    case = draw(M=3, seed=9)
    positions = case.positions.clone()
    positions[1] = -1
    want = plain(case)
    want[1] = 0
    for own in (False, True):
        padded = replace(case, positions=positions, own=own)
        want = plain(padded)
        assert (want[1] == 0).all()
        for splits in (1, 4):
            same(padded, duo_attention(*padded.arguments, splits=splits), want)
    none = replace(case, query=case.query[:0], owners=case.owners[:0], positions=case.positions[:0])
    assert duo_attention(*none.arguments).shape == (0, *case.query.shape[1:])


def test_the_check_of_tah_doctor(monkeypatch):
    """It is right for the kernel, and wrong for the other kind of attention."""
    line = doctor.kernel_line(torch.device("cpu"))
    assert line.status == "ok" and len(line.values["difference"]) == 3, line
    monkeypatch.setattr("tah.vllm.kernel.duo_attention", lambda *a, own, **rest: duo_attention(*a, own=not own, **rest))
    assert doctor.kernel_line(torch.device("cpu")).status == "failed"


def test_large_scores():
    """Scores of a few thousand: the largest is subtracted before exponentials are taken."""
    case = draw(M=2, seed=10)
    case = replace(case, query=case.query * 1000)
    same(case, duo_attention(*case.arguments, splits=2))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"splits": 0}, "splits is 0"),
        ({"query": torch.zeros(2, 4, 33)}, r"queries \(2, 4, 33\) do not fit a cache"),
        ({"query": torch.zeros(2, 5, 32)}, r"queries \(2, 5, 32\) do not fit a cache"),
        ({"query": torch.zeros(2, 4, 32).half()}, "queries and keys are torch.float16, torch.float32"),
        ({"query": torch.zeros(2, 4, 32).double()}, "all must be of one float type"),
        ({"deep_keys": torch.zeros(5, 1, 32)}, "do not fit 2 heads of width 32"),
        ({"deep_values": torch.zeros(1, 2, 32)}, "do not fit 2 heads of width 32"),
        ({"entry_of_slot": torch.zeros(7, dtype=torch.long)}, "7 entries of slots do not fit 15 blocks of 16 slots"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    case = draw(M=2)
    with pytest.raises(ValueError, match=message):
        duo_attention(**vars(case) | change)


@pytest.fixture
def sections(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmark"))
    import gpu_kernel

    return gpu_kernel


def test_the_benchmark_checks_the_kernel(sections, monkeypatch):
    rows = list(sections.correct(True))
    kinds = {(row["type"], row["layout"], row["attention"]) for row in rows}
    assert len(rows) == len(kinds) == 12 and all(row["ok"] for row in rows)
    right = sections.duo_attention
    monkeypatch.setattr(sections, "duo_attention", lambda own, **given: right(own=not own, **given))
    assert not any(row["ok"] for row in sections.correct(True))  # the control: a wrong kernel is found


def test_the_benchmark_times_the_kernel(sections):
    rows = list(sections.speed(True))
    assert [(row["tokens"], row["splits"]) for row in rows] == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert all(row["ms"] > row["limit ms"] > 0 for row in rows)
