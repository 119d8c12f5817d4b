"""Think-at-Hard, slowly: one token, one depth, one row at a time. The ground truth of the tests.

It runs the stock base on hand-made caches that hold exactly the keys a query may see (spec A.4), under a mask that
hides nothing. No cache, packing or mask of `tah` is used, only `model.base`, the depth switch of the adapters, the two
optional linear maps and the configuration.

Shapes: T tokens, D width, V vocabulary, L layers, H key/value heads, K head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig

from tah.core.depth import at_depth
from tah.policy import DepthState


@dataclass
class Features:
    """What is known about one token that just ran pass `depth`."""

    position: int
    depth: int
    token: int
    logits: Tensor  # [V], accumulated over its passes so far
    hidden: list[Tensor]  # L + 1 hidden states [D] of this pass: 0 = its input, L = after the final norm


@dataclass
class ReferenceOutput:
    logits: Tensor  # [T, V] accumulated logits of each token's last pass
    depth_count: Tensor  # [T]
    depth_logits: list[dict[int, Tensor]]  # entry d - 1: position -> accumulated logits [V] after pass d


@dataclass
class Key:
    """The key and value one token left in one layer at one depth."""

    position: int
    depth: int
    key: Tensor  # [1, H, 1, K]
    value: Tensor


Decide = Callable[[int, int, Features], bool]


@torch.no_grad()
def reference(
    model: Any,
    input_ids: Tensor,
    decide: Decide,
    max_depth: int | None = None,
    attention: str | None = None,
) -> ReferenceOutput:
    """Run one unpadded row.

    Args:
        model: a `TaHForCausalLM` in eval mode.
        input_ids: [T].
        decide: `decide(position, depth, features)` says whether a token that has just run pass `depth` goes on.
        max_depth: most passes; the model's by default.
        attention: `duo`, `own` or `blind`; the model's by default.
    """
    config, text = model.config, model.config.get_text_config(decoder=True)
    max_depth, attention = max_depth or config.max_depth, attention or config.attention
    embed = model.get_input_embeddings()
    stores: list[list[Key]] = [[] for _ in range(text.num_hidden_layers)]
    depth_logits: list[dict[int, Tensor]] = [{} for _ in range(max_depth)]
    final, counts = [], []
    for p, token in enumerate(input_ids):
        x, depth, passes = embed(token), 1, []
        while True:
            raw, hidden, keys = one_pass(model.base, text, x, p, depth, stores, attention)
            for store, key in zip(stores, keys, strict=True):
                store.append(key)
            passes.append((raw, hidden[-1]))
            logits = _combine(model, passes)
            depth_logits[depth - 1][p] = logits
            features = Features(p, depth, int(token), logits, hidden)
            if depth == max_depth or not decide(p, depth, features):
                break
            x, depth = _next_input(model, embed, token, features), depth + 1
        final.append(logits)
        counts.append(depth)
    return ReferenceOutput(torch.stack(final), torch.tensor(counts), depth_logits)


def one_pass(
    base: Any, text: PreTrainedConfig, x: Tensor, position: int, depth: int, stores: list[list[Key]], attention: str
) -> tuple[Tensor, list[Tensor], list[Key]]:
    """Run input embedding x [D] of one token; return its logits [V], L + 1 hidden states [D] and its key per layer."""
    cache, masks = DynamicCache(), {}
    for layer, store in enumerate(stores):
        kind = _layer_type(text, layer)
        seen = [k for k in store if _sees(text, kind, attention, position, depth, k)]
        if seen:
            cache.update(torch.cat([k.key for k in seen], 2), torch.cat([k.value for k in seen], 2), layer)
        masks[kind] = x.new_zeros(1, 1, 1, len(seen) + 1)  # added to attention scores: 0 hides nothing
    with at_depth(depth):
        out = base(
            inputs_embeds=x[None, None],
            position_ids=torch.tensor([[position]]),
            attention_mask=masks if getattr(text, "layer_types", None) is not None else masks.popitem()[1],
            past_key_values=cache,
            use_cache=True,
            output_hidden_states=True,
        )
    held = cache.layers
    keys = [Key(position, depth, kv.keys[:, :, -1:].clone(), kv.values[:, :, -1:].clone()) for kv in held]
    return out.logits[0, 0], [h[0, 0] for h in out.hidden_states], keys


def _layer_type(text: PreTrainedConfig, layer: int) -> str:
    if getattr(text, "layer_types", None) is not None:
        return text.layer_types[layer]
    return "sliding_attention" if getattr(text, "sliding_window", None) is not None else "full_attention"


def _sees(text: PreTrainedConfig, kind: str, attention: str, position: int, depth: int, key: Key) -> bool:
    """Whether a query at (position, depth) sees `key`, of an earlier token or of an earlier pass of its own."""
    if key.position > position or key.depth > depth:
        return False
    if attention != "duo" and key.depth > 1 and key.position != position:
        return False
    if attention == "blind" and depth > 1 and key.depth == 1:
        return False
    if kind == "sliding_attention":
        return position - key.position < text.sliding_window
    if kind == "chunked_attention":
        return position // text.attention_chunk_size == key.position // text.attention_chunk_size
    return True


def _combine(model: Any, passes: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Accumulated logits [V] of the (logits [V], final hidden state [D]) of each pass so far."""
    if model.config.output == "sum":
        return torch.stack([logits for logits, _ in passes]).sum(0)
    first, *rest = [hidden for _, hidden in passes]
    return model.head(first + sum(model.output_map(h) for h in rest)) if rest else model.head(first)


def _next_input(model: Any, embed: Any, token: Tensor, features: Features) -> Tensor:
    """Input embedding [D] of the next pass (spec A.3)."""
    if model.config.next_input == "hidden":
        return embed(token) + model.next_input_map(features.hidden[-1])
    top, ids = features.logits.topk(min(model.config.mix_topk, len(features.logits)))
    return top.softmax(0) @ embed(ids)


def unused(*args: Any) -> Any:
    """Stand for what only the decider of TaH2 reads (`reference_tah2.py`)."""
    raise AssertionError


def by_labels(depth_labels: Tensor) -> Decide:
    """The oracle's decisions: as many passes as `depth_labels` [T] say."""
    return lambda position, depth, features: int(depth_labels[position]) > depth


def by_policy(policy: Any, threshold: float = 0.5, depth_labels: Tensor | None = None) -> Decide:
    """The decisions of a `tah` policy (or of `model.decider`), asked about one token at a time."""

    def decide(position: int, depth: int, features: Features) -> bool:
        state = DepthState(
            depth=depth,
            input_ids=torch.tensor([features.token]),
            positions=torch.tensor([position]),
            hidden={k: h[None] for k, h in enumerate(features.hidden)},
            depth_labels=None if depth_labels is None else depth_labels[position : position + 1],
            map_logits=lambda f: f(features.logits[None]),
            map_pass_logits=unused,
            embeds=unused,
        )
        go = policy(state).float()
        return bool(go == math.inf or go.sigmoid() > threshold)

    return decide
