"""Code that depends on internals of one version of vLLM: the check of the version, and the layout of the KV cache.

Shapes: B physical blocks, S slots per block, H key/value heads, K head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from vllm import __version__ as VLLM_VERSION
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.platforms import current_platform

from .installed import advice, is_supported, supported


def check_version() -> None:
    """Check the version of vLLM.

    Raises:
        ValueError: The version is not supported; the message names the supported versions.
    """
    on_cpu = current_platform.is_cpu()
    if not is_supported(VLLM_VERSION, on_cpu):
        raise ValueError(f"vLLM {VLLM_VERSION} is not supported; TaH models need vLLM {supported(on_cpu)}: {advice()}")


@contextmanager
def without_writing(layer: Attention, index: Tensor) -> Iterator[None]:
    """Keep vLLM from writing keys of the tokens `index` of the step; their slots hold the keys of an earlier step.

    All layers share one tensor of slots and one block table.
    """
    slots = get_forward_context().slot_mapping[layer.layer_name]
    kept = slots[index]
    slots[index] = -1
    try:
        yield
    finally:
        slots[index] = kept


def read_blocks(layer: Attention, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys [..., H, K, S] and values [..., H, S, K] of physical blocks [...].

    GPU backends have one logical shape, [B, H, S, 2 K] with the keys first, whatever the strides. The CPU backend
    stores, for each block and head, the transposed keys and then the values. AMX kernels store both matrices as tiles;
    in that case the result is a copy in row-major order.
    """
    B, H, S, both = layer.kv_cache.shape
    K = both // 2
    if not layer.kv_cache.is_cpu:
        keys, values = layer.kv_cache[blocks].split(K, dim=-1)
        return keys.transpose(-1, -2), values
    found = layer.kv_cache.view(B, H, 2, S * K)[blocks]
    keys, values = found.unbind(-2)
    if layer.isa == "amx":
        return _from_tiles(keys, K, S), _from_tiles(values, S, K)
    lead = blocks.shape
    return keys.view(*lead, H, K, S), values.view(*lead, H, S, K)


def by_rows(layer: Attention) -> Tensor:
    """Return the KV cache [B, H, S, 2 K], keys first; on a CPU, where the kernel runs in tests only, as a copy."""
    if not layer.kv_cache.is_cpu:
        return layer.kv_cache
    keys, values = read_blocks(layer, torch.arange(len(layer.kv_cache), device=layer.kv_cache.device))
    return torch.cat([keys.transpose(-1, -2), values], dim=-1)


def _from_tiles(tiles: Tensor, rows: int, columns: int) -> Tensor:
    """Return matrices [..., rows, columns] that are stored as tiles [..., rows * columns].

    A tile has all rows of 16 columns. In a tile, the number of an even row and the number of the next row in the same
    column are adjacent: AMX registers need this order in the right factor of a bfloat16 product.
    """
    lead, width, pair = tiles.shape[:-1], 16, 2
    tiles = tiles.view(*lead, columns // width, rows // pair, width, pair)
    return tiles.movedim((-3, -1, -4, -2), (-4, -3, -2, -1)).reshape(*lead, rows, columns)


def slots_per_block(layer: Attention) -> int:
    """Return the number of slots per physical block."""
    return layer.kv_cache.shape[2]


@torch.no_grad()
def check_layout(layer: Attention) -> None:
    """Write known numbers with vLLM's kernel and check that `read_blocks` returns them.

    The numbers go to block 0, which vLLM assigns to no request.

    Raises:
        ValueError: The kernels of this machine have another layout of the KV cache.
    """
    _, H, S, both = layer.kv_cache.shape
    block = torch.arange(S * H * both, device=layer.kv_cache.device).remainder(251).view(S, H, both)
    block = block.to(layer.kv_cache.dtype)
    keys, values = block[..., : both // 2].contiguous(), block[..., both // 2 :].contiguous()
    slots = torch.arange(S, dtype=torch.int64, device=block.device)
    layer.impl.do_kv_cache_update(layer, keys, values, layer.kv_cache, slots)
    got_keys, got_values = read_blocks(layer, torch.zeros(1, dtype=torch.long, device=block.device))
    layer.kv_cache[0].zero_()
    if not (torch.equal(got_keys[0], keys.permute(1, 2, 0)) and torch.equal(got_values[0], values.permute(1, 0, 2))):
        stored = f"vLLM {VLLM_VERSION} stores {layer.kv_cache.dtype} keys for"
        if not block.is_cpu:
            name = layer.get_attn_backend().get_name()
            raise ValueError(
                f"{stored} its backend {name} in a layout that is not supported; "
                "use another one, such as --attention-backend TRITON_ATTN"
            )
        raise ValueError(
            f"{stored} its kernels {layer.isa!r} in a layout that is not supported; "
            "use an x86 processor, on which vLLM uses 'vec', 'vec16' or 'amx'"
        )
