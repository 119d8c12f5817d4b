"""Duo-causal masks, method.md (7): which keys a query attends to at depth >= 2.

Shapes: R rows of a pass, N queries, W deeper slots, n depth-1 slots, S = W + n keys.

At depth 1 the base runs its own causal attention over the depth-1 keys. At depth >= 2 a query attends to a key if

    key position <= query position  and  key depth <= query depth          (`duo`, the paper)
    ... and a key of depth >= 2 also has the query's position              (`own`)
    ... and the key has depth >= 2                                         (`blind`: a control that reads no text)

A sliding window or chunk of the base applies to the positions, as at depth 1.

Several documents packed into one row each count positions from 0, so positions do not order the keys of the row. The
*order key* of a token does: position + `DOCUMENT` * number of the document in the row. Comparing order keys with `<=`
gives causality, and the quotient by `DOCUMENT` is the document. With one document per row, the usual case, order keys
are the positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from .compat import TAKE_MASKS, AttentionByDepth, attention_of

DOCUMENT = 2**32
NEVER = 2**62  # order key of an invisible slot, larger than that of every query; exact as a float, for padding


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
    alone: bool = False,
) -> Any:
    """Return ready masks over the keys [deeper slots | depth-1 slots].

    Args:
        config: Text configuration of the base.
        depth: Depth of the queries, >= 2.
        query: Order keys [R, N] of the queries.
        deep: Order keys [R, W] of the deeper slots, `NEVER` where empty.
        deep_depths: Depths [R, W] of the deeper slots. Negative for keys that only their own token sees.
        base: Order keys [R, n] of the depth-1 slots, `NEVER` at padding.
        attention: `duo`, `own` or `blind`.
        dtype: Type of the activations, for float masks.
        documents: Whether rows may hold several documents.
        alone: Whether some of `deep_depths` are negative.

    Returns:
        A mask [R, 1, N, S] (or a `BlockMask`), or a dict of masks by layer type where the base's layers differ.
    """
    q = query[:, :, None]  # [R, N, 1]
    visible_deep = deep[:, None] <= q if attention == "duo" else deep[:, None] == q
    visible_deep = visible_deep & (deep_depths <= depth)[:, None]
    if alone:
        visible_deep = visible_deep & ((deep_depths > 0)[:, None] | (deep[:, None] == q))
    visible_base = base[:, None] <= (q if attention != "blind" else -1)
    visible = torch.cat([visible_deep, visible_base.expand(*query.shape, -1)], dim=2)  # [R, N, S]
    return ready_masks(config, q, torch.cat([deep, base], dim=1)[:, None], visible, dtype, documents)


def document_masks(config: PreTrainedConfig, order_keys: Tensor, valid: Tensor, dtype: torch.dtype) -> Any:
    """Return ready masks of depth 1 for rows with several documents, from order_keys [B, T] and valid [B, T] bool."""
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
    """Return ready masks: `visible` restricted to the document and to the reach of each layer type.

    Args:
        config: Text configuration of the base.
        q: Order keys [R, N, 1] of the queries.
        key: Order keys [R, 1, S] of the keys.
        visible: Mask [R, N, S] bool.
        dtype: Type of the activations, for float masks.
        documents: Whether rows may hold several documents.
    """
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
    """Return the attention pattern of a base without `layer_types`, whose layers are all alike."""
    if getattr(config, "sliding_window", None) is not None:
        return "sliding_attention"
    if getattr(config, "attention_chunk_size", None) is not None:
        return "chunked_attention"
    return "full_attention"


def within_reach(config: PreTrainedConfig, layer_type: str, query: Tensor, key: Tensor) -> Tensor | bool:
    """Return which key positions are in the window or chunk of which query positions, apart from causality."""
    if layer_type == "sliding_attention":
        return query - key < config.sliding_window
    if layer_type == "chunked_attention":
        return query // config.attention_chunk_size == key // config.attention_chunk_size
    return True


def encode_mask(visible: Tensor, config: PreTrainedConfig, dtype: torch.dtype) -> Any:
    """Return `visible` [R, N, S] bool in the form of the base's attention implementation."""
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
    """Make a base whose kernel applies causal attention only (flash kernels) take ready masks at depth >= 2.

    Its attention modules use SDPA there, and the stock kernel at depth 1. No other model changes.

    Raises:
        ValueError: The base has attention sinks, which SDPA does not have.
    """
    if attention_of(decoder.config) in TAKE_MASKS:
        return
    if any(getattr(module, "sinks", None) is not None for module in decoder.modules()):
        raise ValueError(
            f"attention sinks need attn_implementation='eager' at depth >= 2, not {attention_of(decoder.config)!r}"
        )
    for module in decoder.modules():
        config = vars(module).get("config")
        if isinstance(config, PreTrainedConfig) and not isinstance(module, PreTrainedModel):
            module.config = AttentionByDepth(config)


def own_configs(model: PreTrainedModel) -> None:
    """Undo `take_ready_masks`."""
    for module in model.modules():
        if isinstance(config := vars(module).get("config"), AttentionByDepth):
            module.config = config.config
