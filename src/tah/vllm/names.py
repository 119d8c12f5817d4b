"""Names and numbers that several modules of the plugin share. Needs no vLLM."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from ..config import TaHConfig

ARCHITECTURE = "TaHForCausalLM"
ROWS = 1024  # maximum rows of a pass at depth 2 alone, which bounds its memory
DEEP_KV_SHARE = 0.1  # pool entries per depth-1 slot; the paper's models iterate 7 % of the tokens
TAH2_DEEP_KV_SHARE = 0.6  # the same with a decider of TaH2; the published models iterate 44 % of the tokens


class Family(NamedTuple):
    """How vLLM computes a family of bases."""

    architecture: str  # class of vLLM
    residual: bool = True  # whether layers take and return a residual beside hidden states
    input_scale: str = ""  # field of the base's configuration that multiplies the input of the first layer
    experts: bool = False  # whether layers have experts


FAMILIES = {  # by `model_type` of the base
    "granite": Family("GraniteForCausalLM", residual=False, input_scale="embedding_multiplier"),
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family("MistralForCausalLM"),
    "phi3": Family("Phi3ForCausalLM"),
    "qwen2": Family("Qwen2ForCausalLM"),
    "qwen3": Family("Qwen3ForCausalLM"),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", experts=True),
}


def inner_layers(config: TaHConfig) -> tuple[int, ...]:
    """Return the layers whose outputs vLLM's stock model has to return for the decider, rising.

    Layer 0, the embeddings, and the last one are not among them: the second pass has both without vLLM's help.
    """
    layers = (config.decider or {}).get("layers", ())  # a decider of TaH2 reads the last one only
    last: int = config.base_config.num_hidden_layers  # type: ignore[union-attr]
    return tuple(sorted({k for k in layers if 0 < k < last}))
