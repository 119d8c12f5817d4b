"""Working memory of the second pass, which vLLM's profile of depth 1 does not see.

Shapes: T tokens of a step, R requests, D width, V vocabulary, k = mix_topk.
"""

from __future__ import annotations

from typing import Any

from ..config import TaHConfig
from ..core.logits import CHUNK
from ..core.next_input import ROWS as MIXED
from ..names import MIXTURES
from .names import ROWS

FLOAT = 4  # bytes of float32


def second_pass_bytes(
    config: TaHConfig, tokens: int, requests: int, size: int, processes: int = 1, mixed: bool = False
) -> int:
    """Return an upper bound of the bytes that a step needs beside the pass at depth 1 and the sampler.

    The sampler's logits [R, V] are not counted, since vLLM has measured them. Attention is not counted either: the
    kernel of depth 2 gathers nothing.

    Args:
        config: Configuration of the checkpoint.
        tokens: Maximum tokens of a step, T.
        requests: Maximum number of requests, R.
        size: Bytes of a number in the model's type.
        processes: Number of processes that share weights (tensor parallelism).
        mixed: Whether tokens at depth 2 run in one pass with those of depth 1 (`batching="mixed"`).
    """
    base: Any = config.base_config
    D, V, heads = base.hidden_size, base.vocab_size, base.num_attention_heads
    K, described = getattr(base, "head_dim", None) or D // heads, config.decider or {}
    layers = len(described.get("layers") or [0])
    # These follow each other, so the largest counts: a chunk of logits and what a policy makes of it; embeddings of
    # the next input, gathered and in float32; its network; the widest layer with LoRA; the features of the decider.
    logits = CHUNK * V * (size + 4 * FLOAT)
    mix = min(MIXED, tokens) * min(config.mix_topk, V) * D * (size + FLOAT) if config.next_input == "topk" else 0
    network = tokens * (8 * D + 4 * (config.next_input_width or D)) * size if config.next_input == "mlp" else 0
    experts = getattr(base, "num_experts_per_tok", 0) * (getattr(base, "moe_intermediate_size", 0) + D)
    rows = min(ROWS, tokens)
    if mixed:  # with the tokens of the step, and the last tokens that wait for longer than a step
        rows += tokens + requests
    layer = rows * (6 * max(base.intermediate_size, heads * K, experts) // processes + 8 * D) * size
    inner = max(described.get("hidden_dims") or [D]) * described.get("expansion", 1)
    features = tokens * ((3 * layers + 3) * D + 4 * inner) * size
    # These last through the step: states that the policy reads, next inputs, states of depth 2, and their sums.
    lasting = tokens * D * size * (layers + 6)
    if config.output in MIXTURES:
        lasting += min(requests, tokens) * V * 3 * FLOAT  # log-probabilities for the sampler, and what they are made of
    return lasting + max(logits + mix, network, layer, features)
