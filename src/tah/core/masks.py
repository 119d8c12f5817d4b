"""Duo-causal masks: who sees which key at depth >= 2 (spec A.4).

Shapes: R rows of a pass, N queries, W deeper slots, n depth-1 slots, S = W + n keys.

Depth 1 needs nothing from here: it is the base's own causal attention over depth-1 keys. A deeper query sees a key
iff

    key position <= query position  and  key depth <= query depth          (`duo`, the paper)
    ... where keys of depth >= 2 must also have the query's own position   (`own`)
    ... and there are no others                                            (`blind`: a control that reads no text)

and a sliding window or chunk of the base applies to positions, as it does at depth 1.

Several documents packed into one row are told apart by their places: a token's place is its position plus
`DOCUMENT` times the number of its document in the row. Of one document, places are positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, PreTrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

DOCUMENT = 2**32
QUERIES, BLOCKS = 128, 8  # of a block of attention, at least; of one call, at most
NEVER = 2**62  # place of a slot that nobody may see: no query reaches it; exact as a float, as padding needs


def depth_masks(
    config: PreTrainedConfig,
    depth: int,
    query: Tensor,
    deep: Tensor,
    deep_depths: Tensor,
    base: Tensor,
    attention: str,
    dtype: torch.dtype,
    documents: bool = False,
) -> Any:
    """Ready masks over the keys [deeper slots | depth-1 slots].

    Args:
        config: text configuration of the base.
        depth: of the queries, >= 2.
        query: [R, N] places.
        deep: [R, W] places of the deeper slots, `NEVER` where empty.
        deep_depths: [R, W] depths of the deeper slots.
        base: [R, n] places of the depth-1 slots, `NEVER` at padding.
        attention: `duo`, `own` or `blind`.
        dtype: of the activations, for float masks.
        documents: rows may hold several documents.

    Returns:
        [R, 1, N, S] (or a `BlockMask`), or a dict of them by layer type where the base's layers differ.
    """
    q = query[:, :, None]  # [R, N, 1]
    visible_deep = deep[:, None] <= q if attention == "duo" else deep[:, None] == q
    visible_deep = visible_deep & (deep_depths <= depth)[:, None]
    visible_base = base[:, None] <= (q if attention != "blind" else -1)
    visible = torch.cat([visible_deep, visible_base.expand(*query.shape, -1)], dim=2)  # [R, N, S]
    return ready_masks(config, q, torch.cat([deep, base], dim=1)[:, None], visible, dtype, documents, deeper=True)


def document_masks(config: PreTrainedConfig, places: Tensor, valid: Tensor, dtype: torch.dtype) -> Any:
    """Ready masks of depth 1 for rows that hold several documents: places [B, T], valid [B, T] bool."""
    q, key = places[:, :, None], torch.where(valid, places, NEVER)[:, None]
    return ready_masks(config, q, key, key <= q, dtype, documents=True)


def ready_masks(
    config: PreTrainedConfig,
    q: Tensor,
    key: Tensor,
    visible: Tensor,
    dtype: torch.dtype,
    documents: bool,
    deeper: bool = False,
) -> Any:
    """Restrict `visible` [R, N, S] to the document and to what each layer type reaches, from the places of queries
    [R, N, 1] and keys [R, 1, S], and put it into the form the base takes."""
    if documents:
        visible = visible & (q // DOCUMENT == key // DOCUMENT)
        q, key = q % DOCUMENT, key % DOCUMENT

    def build(layer_type: str) -> Any:
        return encode_mask(visible & within_reach(config, layer_type, q, key), config, dtype, deeper)

    types = getattr(config, "layer_types", None)
    if types is None:
        return build(uniform_layer_type(config))
    return {layer_type: build(layer_type) for layer_type in dict.fromkeys(types)}


def uniform_layer_type(config: PreTrainedConfig) -> str:
    """The attention pattern of a base whose layers are all alike (it has no `layer_types`)."""
    if getattr(config, "sliding_window", None) is not None:
        return "sliding_attention"
    if getattr(config, "attention_chunk_size", None) is not None:
        return "chunked_attention"
    return "full_attention"


def within_reach(config: PreTrainedConfig, layer_type: str, query: Tensor, key: Tensor) -> Tensor | bool:
    """Which key positions a layer of this type reaches from which query positions, apart from causality."""
    if layer_type == "sliding_attention":
        return query - key < config.sliding_window
    if layer_type == "chunked_attention":
        return query // config.attention_chunk_size == key // config.attention_chunk_size
    return True


def encode_mask(visible: Tensor, config: PreTrainedConfig, dtype: torch.dtype, deeper: bool) -> Any:
    """visible [R, N, S] bool in the form of the configured attention implementation; depth 1 is computed as the base
    computes it, to the last bit."""
    implementation = config._attn_implementation
    if implementation == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        rows, queries, keys = visible.shape
        return create_block_mask(
            lambda b, h, q, k: visible[b, q, k], rows, None, queries, keys, device=str(visible.device)
        )
    if implementation == "eager":
        return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)[:, None]
    if implementation != "sdpa":
        _send_ready_masks_to_sdpa(implementation)
    mask = visible[:, None]
    if deeper and implementation == "sdpa" and visible.device.type == "cpu" and visible.shape[1] >= 2 * QUERIES:
        _attend_by_block()
        mask.blocks = _blocks(visible, dtype)  # type: ignore[attr-defined]  # a base that copies the mask loses them
    return mask


def _blocks(visible: Tensor, dtype: torch.dtype) -> list[tuple[slice, slice, Tensor]]:
    """Queries, the range from their first key to their last, and its float mask [R, 1, n, s], block by block.

    All masks together are as large as the one that SDPA would make of `visible` in every layer, or smaller.
    """
    found, N = [], visible.shape[1]
    size = max(QUERIES, -(-N // BLOCKS))
    for start in range(0, N, size):
        queries = slice(start, min(start + size, N))
        part = visible[:, queries]
        seen = part.any(dim=1).any(dim=0).nonzero().squeeze(1).tolist() or [0]
        keys = slice(seen[0], seen[-1] + 1)
        part = part[:, None, :, keys]
        found.append((queries, keys, torch.zeros_like(part, dtype=dtype).masked_fill_(~part, -torch.inf)))
    return found


def _attend_by_block() -> None:
    """A CPU's SDPA skips what is masked only where the mask is the plain triangle. A deeper pass has two, side by side
    with their early keys in the middle (`cache.py`): block by block, with the range of keys that a block of queries
    sees, it takes a quarter less time.

    Goes around whatever "sdpa" is in this process; only calls with a mask of a deeper pass change.
    """
    if "sdpa" in _sent:
        return
    kernel = ALL_ATTENTION_FUNCTIONS["sdpa"]

    def dispatch(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
    ) -> Any:
        blocks = getattr(attention_mask, "blocks", None)
        if blocks is None or kwargs.get("position_bias") is not None:
            return kernel(module, query, key, value, attention_mask, *args, **kwargs)
        if attention_mask.shape[-2:] != (query.shape[2], key.shape[2]):
            given = query.shape[2], key.shape[2]
            raise ValueError(f"a mask for {tuple(attention_mask.shape[-2:])} queries and keys, but there are {given}")
        out = [
            kernel(module, query[:, :, rows], key[:, :, its], value[:, :, its], mask.to(query.dtype), *args, **kwargs)
            for rows, its, mask in blocks
        ]
        return torch.cat([part for part, _ in out], dim=1), None

    AttentionInterface.register("sdpa", dispatch)
    _sent.add("sdpa")


_sent: set[str] = set()


def _send_ready_masks_to_sdpa(implementation: str) -> None:
    """Flash kernels know causal attention only: depth 1 stays on them, calls with a ready 4-D mask go to SDPA.

    They would refuse or misread such a mask, so nobody else's calls change.
    """
    if implementation in _sent:
        return
    kernel, sdpa = ALL_ATTENTION_FUNCTIONS[implementation], ALL_ATTENTION_FUNCTIONS["sdpa"]

    def dispatch(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
        ready = isinstance(attention_mask, Tensor) and attention_mask.dim() == 4
        if ready and kwargs.get("s_aux") is not None:
            raise ValueError(f"attention sinks at depth >= 2 need eager attention, not {implementation}")
        return (sdpa if ready else kernel)(module, query, key, value, attention_mask, **kwargs)

    AttentionInterface.register(implementation, dispatch)
    _sent.add(implementation)
