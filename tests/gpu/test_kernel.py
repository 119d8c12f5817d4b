"""The Triton kernel of depth 2 on a real GPU: equal to a plain loop, without waits, and in CUDA graphs.

pytest -m gpu tests/gpu
"""

from __future__ import annotations

import random
from dataclasses import fields

import pytest
import torch
from torch import Tensor

from helpers.duo import Case, draw, plain, same
from tah.vllm.kernel import duo_attention

pytest.importorskip("triton", reason="Triton is not installed")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA GPU"),
]


@pytest.mark.parametrize("own", [False, True], ids=["duo", "own"])
@pytest.mark.parametrize("layout", ["NHD", "HND"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("K", [64, 128, 256])
def test_it_equals_a_plain_loop(K, dtype, layout, own):
    rng = random.Random(K)
    for S in (16, 32, 64, 128):
        G = rng.choice([1, 2, 3, 4, 5, 6, 7, 8])
        case = draw(
            M=rng.choice([1, 3, 20]), G=G, K=K, S=S, N=rng.choice([1, 6]), own=own, layout=layout, dtype=dtype, seed=S
        )
        want, there = plain(case), case.to("cuda")
        for splits in (None, 1, 3, 8):
            same(case, duo_attention(*there.arguments, splits=splits), want)


def test_no_wait_for_the_device():
    case = draw(M=8, dtype=torch.bfloat16, K=64).to("cuda")
    for splits in (1, 4):
        duo_attention(*case.arguments, splits=splits)  # the first call compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = [duo_attention(*case.arguments, splits=splits) for splits in (None, 1, 4)]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for out in found:
        same(case.to("cpu"), out)


@pytest.mark.parametrize("splits", [1, 4])
def test_a_graph_follows_changed_tables_and_entries(splits):
    """Two cases of one shape: replayed with the second's numbers, the graph of the first has the second's result."""
    first, second = (draw(M=6, K=128, N=6, dtype=torch.bfloat16, share=1.0, seed=seed) for seed in (1, 2))
    entries = max(len(case.deep_keys) for case in (first, second))
    static = with_entries(first, entries).to("cuda")
    duo_attention(*static.arguments, splits=splits)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = duo_attention(*static.arguments, splits=splits)
    for case in (first, second, first):
        for field in fields(Case):
            value = getattr(with_entries(case, entries), field.name)
            if isinstance(value, Tensor):
                getattr(static, field.name).copy_(value)
        graph.replay()
        same(case, out)
        torch.testing.assert_close(out, duo_attention(*static.arguments, splits=splits), rtol=0, atol=0)


def with_entries(case: Case, entries: int) -> Case:
    """Return the case with a pool of that many entries."""
    more = {"deep_keys": case.deep_keys, "deep_values": case.deep_values}
    for name, x in more.items():
        more[name] = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, entries - len(x)))
    return Case(**vars(case) | more)
