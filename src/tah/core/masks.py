"""Duo-causal masks: who sees which key at depth >= 2.

Shapes: R rows of a pass, N queries, W deeper slots, n depth-1 slots, S = W + n keys.

Depth 1 needs nothing from here: it is the base's own causal attention over depth-1 keys. A deeper query sees a key
iff

    key position <= query position  and  key depth <= query depth          (`duo`, the paper)
    ... where keys of depth >= 2 must also have the query's own position   (`own`)
    ... and there are no others                                            (`blind`: a control that reads no text)

and a sliding window or chunk of the base applies to positions, as it does at depth 1.

Positions alone do not order the keys of a row into which several documents are packed, since each document counts its
positions from 0. So tokens carry an *order key*: position + `DOCUMENT` * number of the document in the row. Comparing
order keys gives causality, and the quotient by `DOCUMENT` is the document. With one document per row, which is the
usual case, order keys are the positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from .compat import TAKE_MASKS, AttentionByDepth, attention_of

DOCUMENT = 2**32
NEVER = 2**62  # order key of a slot that nobody may see: no query reaches it; exact as a float, as padding needs


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
        query: [R, N] order keys.
        deep: [R, W] order keys of the deeper slots, `NEVER` where empty.
        deep_depths: [R, W] depths of the deeper slots.
        base: [R, n] order keys of the depth-1 slots, `NEVER` at padding.
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
    return ready_masks(config, q, torch.cat([deep, base], dim=1)[:, None], visible, dtype, documents)


def document_masks(config: PreTrainedConfig, order_keys: Tensor, valid: Tensor, dtype: torch.dtype) -> Any:
    """Ready masks of depth 1 for rows that hold several documents: order_keys [B, T], valid [B, T] bool."""
    q, key = order_keys[:, :, None], torch.where(valid, order_keys, NEVER)[:, None]
    return ready_masks(config, q, key, key <= q, dtype, documents=True)


def ready_masks(
    config: PreTrainedConfig,
    q: Tensor,
    key: Tensor,
    visible: Tensor,
    dtype: torch.dtype,
    documents: bool,
) -> Any:
    """Restrict `visible` [R, N, S] to the document and to what each layer type reaches, from the order keys of queries
    [R, N, 1] and keys [R, 1, S], and put it into the form the base takes."""
    if documents:
        visible = visible & (q // DOCUMENT == key // DOCUMENT)
        q, key = q % DOCUMENT, key % DOCUMENT

    def build(layer_type: str) -> Any:
        return encode_mask(visible & within_reach(config, layer_type, q, key), config, dtype)

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


def encode_mask(visible: Tensor, config: PreTrainedConfig, dtype: torch.dtype) -> Any:
    """visible [R, N, S] bool in the form that the base's attention implementation takes."""
    implementation = attention_of(config)
    if implementation == "flex_attention":
        from torch.nn.attention.flex_attention import create_block_mask

        rows, queries, keys = visible.shape
        return create_block_mask(
            lambda b, h, q, k: visible[b, q, k], rows, None, queries, keys, device=str(visible.device)
        )
    if implementation == "eager":
        return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)[:, None]
    return visible[:, None]


def take_ready_masks(decoder: PreTrainedModel) -> None:
    """Let a base with a kernel that knows causal attention only, as flash kernels, take ready masks at depth >= 2: its
    attention modules use SDPA there. Depth 1 stays on the stock kernel, and nobody else's model changes."""
    if attention_of(decoder.config) in TAKE_MASKS:
        return
    if any(getattr(module, "sinks", None) is not None for module in decoder.modules()):
        raise ValueError(f"attention sinks at depth >= 2 need eager attention, not {attention_of(decoder.config)}")
    for module in decoder.modules():
        config = vars(module).get("config")
        if isinstance(config, PreTrainedConfig) and not isinstance(module, PreTrainedModel):
            module.config = AttentionByDepth(config)


def own_configs(model: PreTrainedModel) -> None:
    """Undo `take_ready_masks`."""
    for module in model.modules():
        if isinstance(config := vars(module).get("config"), AttentionByDepth):
            module.config = config.config
