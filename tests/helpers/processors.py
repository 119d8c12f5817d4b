"""Which of vLLM's attention kernels a test runs with, whatever the processor is.

vLLM picks them by the processor: `vec`, or for bfloat16 `amx` where there is AMX. They differ in how the cache is laid
out. Writing AMX's layout moves memory and needs no AMX, so it is real everywhere; attending over it needs AMX.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.platforms import current_platform
from vllm.v1.attention.backends import cpu_attn

choose = cpu_attn._get_attn_isa  # vLLM's own choice


def write(kernels: str, keys: Tensor, values: Tensor, kv_cache: Tensor, slots: Tensor) -> None:
    """Keys and values [T, H, K] to slots [T] of a cache [B, H, S, 2 * K], by vLLM's kernel."""
    B, H, S, _ = kv_cache.shape
    of_keys, of_values = kv_cache.view(B, H, 2 * S, -1).chunk(2, dim=2)
    ops.cpu_attn_reshape_and_cache(keys, values, of_keys, of_values, slots, kernels)


@cache
def lacks(kernels: str) -> str | None:
    """Why this machine cannot write the layout of `kernels`; None where it can."""
    current_platform.import_kernels()
    some = torch.zeros(1, 1, 32, dtype=torch.bfloat16)
    try:
        write(kernels, some, some, torch.zeros(1, 1, 32, 64, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.long))
    except RuntimeError as error:
        if "Unsupported CPU attention configuration" not in str(error) and "Invalid CPU attention" not in str(error):
            raise
        return f"vLLM's build for this processor has no kernels {kernels!r}"
    return None


def skip_without(kernels: str) -> None:
    if reason := lacks(kernels):
        pytest.skip(reason)


@contextmanager
def processor(amx: bool) -> Iterator[None]:
    """vLLM chooses its attention as on a processor with or without AMX. Nothing else looks at AMX inside."""

    def chosen(*args: Any) -> str:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
            return choose(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_attn, "_get_attn_isa", chosen)
        yield


@contextmanager
def amx_cache() -> Iterator[None]:
    """vLLM chooses AMX, and its cache is laid out for that; its own attention reads a second cache, which is plain.

    So depth 2, which reads vLLM's cache, meets AMX's layout on any processor, while depth 1 computes as without AMX.
    """
    skip_without("amx")
    schedule, save, attend = (
        ops.cpu_attn_get_scheduler_metadata,
        ops.cpu_attn_reshape_and_cache,
        ops.cpu_attention_with_kv_cache,
    )
    plain: dict[int, tuple[Tensor, Tensor]] = {}

    def beside(keys: Tensor) -> tuple[Tensor, Tensor]:
        if keys.data_ptr() not in plain:
            B, H, S, K = keys.shape
            plain[keys.data_ptr()] = keys.new_zeros(B, H, 2 * S, K).chunk(2, dim=2)
        return plain[keys.data_ptr()]

    def save_both(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, slots: Tensor, isa: str, **kw: Any) -> None:
        assert isa == "amx"
        save(key, value, keys, values, slots, "amx", **kw)
        save(key, value, *beside(keys), slots, "vec", **kw)

    def attend_plain(*, key_cache: Tensor, value_cache: Tensor, **more: Any) -> None:
        keys, values = beside(key_cache)
        attend(key_cache=keys, value_cache=values, **more)

    with processor(amx=True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "cpu_attn_get_scheduler_metadata", lambda **more: schedule(**more | {"isa": "vec"}))
        patch.setattr(ops, "cpu_attn_reshape_and_cache", save_both)
        patch.setattr(ops, "cpu_attention_with_kv_cache", attend_plain)
        yield
