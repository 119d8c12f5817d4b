"""Names and numbers that several modules of the plugin share. Needs no vLLM."""

from __future__ import annotations

ARCHITECTURE = "TaHForCausalLM"
DEEP_KV_SHARE = 0.1  # pool entries per depth-1 slot; the paper's models iterate 7 % of the tokens
TAH2_DEEP_KV_SHARE = 0.6  # the same with a decider of TaH2; the published models iterate 44 % of the tokens

FAMILIES = {  # class of vLLM by family of the base
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
