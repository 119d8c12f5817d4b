"""Sections of `gpu_first.py`: the kernel of duo-causal attention is right, waits for nothing, can be captured, is fast.

Shapes are those of `tah.vllm.kernel`; L is the number of keys of depth 1 of a token.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
from torch import Tensor

from gpu_sections import Rows, Skipped
from tah.vllm import kernel
from tah.vllm.kernel import choose_splits, duo_attention, processors

SHARE = 0.07  # iterated share of the tokens
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}
SHORT = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def device() -> str:
    """Return the device of the sections; skip them where the kernel cannot run."""
    if kernel.triton is None:
        raise Skipped("Triton is not installed")
    if torch.cuda.is_available():
        return "cuda"
    if not kernel.INTERPRETED:
        raise Skipped("the kernel needs a GPU")
    return "cpu"


def inputs(
    M: int, L: int, dtype: torch.dtype, place: str, H: int = 8, G: int = 2, K: int = 128, S: int = 16, hnd: bool = False
) -> dict[str, Any]:
    """Return arguments of the kernel: each token is the last of a request of L tokens, a share of which is hard."""
    generator = torch.Generator(place).manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=place, dtype=dtype)

    N = math.ceil(L / S)
    B, position = M * N + 1, torch.full((M,), L - 1, device=place)
    tables = (torch.randperm(B - 1, generator=generator, device=place) + 1).view(M, N)
    hard = torch.rand(B * S, generator=generator, device=place) < SHARE
    hard[tables[:, -1] * S + (L - 1) % S] = True
    entries = torch.where(hard, hard.cumsum(0) - 1, -1)
    E = int(hard.sum())
    return {
        "query": randn(M, H * G, K),
        "kv_cache": randn(B, H, S, 2 * K) if hnd else randn(B, S, H, 2 * K).transpose(1, 2),
        "deep_keys": randn(E, H, K),
        "deep_values": randn(E, H, K),
        "entry_of_slot": entries,
        "tables": tables.int(),
        "owners": torch.arange(M, device=place),
        "positions": position,
        "scale": K**-0.5,
    }


def plain(given: dict[str, Any], own: bool) -> Tensor:
    """Return the output [M, H * G, K] in float64 by a gather of all keys; all tokens have one position."""
    query, cache, tables = given["query"].double(), given["kv_cache"], given["tables"].long()
    (M, _, K), (_, H, S, _), L = query.shape, cache.shape, int(given["positions"][0]) + 1
    place = torch.arange(L, device=query.device)
    blocks = tables[:, place // S]  # [M, L]
    keys, values = cache[blocks, :, place % S].double().split(K, -1)  # [M, L, H, K]
    entry = given["entry_of_slot"][blocks * S + place % S]
    seen = (entry >= 0) & ((place == L - 1) if own else True)
    deep = [given[name][entry.clamp(min=0)].double() for name in ("deep_keys", "deep_values")]
    keys, values = torch.cat([keys, deep[0]], 1), torch.cat([values, deep[1]], 1)
    scores = torch.einsum("mhgk,mlhk->mhgl", query.view(M, H, -1, K), keys) * given["scale"]
    seen = torch.cat([torch.ones_like(seen), seen], 1)[:, None, None]
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
    return torch.einsum("mhgl,mlhk->mhgk", weights, values).reshape(query.shape)


def correct(small: bool) -> Rows:
    """Compare the kernel with a gather of all keys; count waits; capture it and replay it with other inputs."""
    place = device()
    M, L, H = (1, 40, 1) if small else (8, 500, 4)
    widths, groups, sizes = (16, 32, 20) if small else (64, 128, 256), (1, 2, 4, 8), (16, 32, 64, 128)
    variants = product((torch.bfloat16, torch.float16, torch.float32), (False, True), (False, True))
    for number, (dtype, hnd, own) in enumerate(variants):
        K, G, S, splits = widths[number % 3], groups[number % 4], sizes[number // 2 % 4], 1 + 3 * (number % 2)
        given = inputs(M, L, dtype, place, H=H, G=G, K=K, S=S, hnd=hnd)
        found = duo_attention(**given, own=own, splits=splits).double()
        gap = (found - plain(given, own)).abs().max().item()
        row = {"type": SHORT[dtype], "layout": "HND" if hnd else "NHD", "attention": "own" if own else "duo"}
        yield row | {"K": K, "G": G, "S": S, "splits": splits, "largest difference": gap, "ok": gap < TOLERANCE[dtype]}
    yield from _waits_and_capture(M, L, H, place)


def _waits_and_capture(M: int, L: int, H: int, place: str) -> Rows:
    """Check that no call waits for the device, and that a captured call follows changed inputs."""
    given = inputs(M, L, torch.bfloat16, place, H=H, K=128 if place == "cuda" else 16)
    before = [duo_attention(**given, own=False, splits=splits) for splits in (1, 4)]
    if place == "cpu":
        return
    for splits in (1, 4):
        row: dict[str, Any] = {"type": "bf16", "layout": "NHD", "attention": "duo", "splits": splits}
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            duo_attention(**given, own=False, splits=splits)
            waits = "none"
        except RuntimeError as error:
            waits = str(error).splitlines()[0]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        yield row | {"host waits": waits, "ok": waits == "none"}
    for splits, first in zip((1, 4), before, strict=True):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = duo_attention(**given, own=False, splits=splits)
        given["tables"].copy_(given["tables"].flip(0))
        given["entry_of_slot"].copy_(given["entry_of_slot"].roll(5))
        graph.replay()
        eager = duo_attention(**given, own=False, splits=splits)
        same, changed = torch.equal(out, eager), not torch.equal(out, first)
        row = {"type": "bf16", "layout": "NHD", "attention": "duo", "splits": splits}
        yield row | {"captured": "as eager" if same else "differs", "ok": same and changed}


def captured(step: Callable[[], Any], place: str) -> Callable[[], Any]:
    """Return the replay of a step as a CUDA graph; on a CPU, the step itself."""
    step()  # compiles
    if place == "cpu":
        return step
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def seconds(run: Callable[[], Any], place: str, repeats: int) -> float:
    """Return the median seconds of a run, which finds nothing in the cache of the GPU."""
    took = []
    spoil = torch.empty(64 * 2**20 if place == "cuda" else 1, device=place)  # 256 MiB
    for _ in range(repeats):
        spoil.zero_()
        if place == "cpu":
            start = time.perf_counter()
            run()
            took.append(time.perf_counter() - start)
            continue
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        took.append(start.elapsed_time(end) / 1000)
    return statistics.median(took)


def bandwidth(place: str) -> float:
    """Return the bytes per second that a copy reads and writes."""
    source = torch.ones((2**30 if place == "cuda" else 2**20) // 4, device=place)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source), place, 10)


def speed(small: bool) -> Rows:
    """Time one call of one layer of Qwen3-1.7B (0.6B has the same heads) against the time to read its keys once.

    `limit ms` is that time at the bandwidth of a copy. `gather MiB` is what a copy of all keys would take (arithmetic).
    """
    place = device()
    full = bandwidth(place)
    sizes = ((1, 2), (40,)) if small else ((1, 8, 32), (1024, 8192, 32768))
    heads = {"H": 2, "K": 16} if small else {}
    for M, L in product(*sizes):
        given = inputs(M, L, torch.bfloat16, place, **heads)
        H, K = given["kv_cache"].shape[1], given["query"].shape[2]
        keys = M * L + len(given["deep_keys"])
        moved = keys * H * 2 * K * 2
        chosen = choose_splits(M, H, given["tables"].shape[1] * 16, processors(torch.device(place)))
        for splits in dict.fromkeys((1, 2 if small else chosen)):
            before = _allocated(place)
            duo_attention(**given, own=False, splits=splits)
            peak = (_allocated(place, peak=True) - before) / 2**20
            run = captured(lambda given=given, splits=splits: duo_attention(**given, own=False, splits=splits), place)
            took = seconds(run, place, 2 if small else 20)
            yield {
                "tokens": M,
                "context": L,
                "splits": splits,
                "ms": 1000 * took,
                "limit ms": 1000 * moved / full,
                "share of the bandwidth": moved / full / took,
                "peak MiB": peak,
                "gather MiB": moved / 2**20,
            }
        del given


def _allocated(place: str, peak: bool = False) -> float:
    """Return allocated bytes of the GPU, or their maximum since the last call without `peak`."""
    if place == "cpu":
        return 0.0
    if peak:
        return float(torch.cuda.max_memory_allocated())
    torch.cuda.reset_peak_memory_stats()
    return float(torch.cuda.memory_allocated())
