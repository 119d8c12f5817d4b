"""Tiny random models of every text-decoder family that is tested: which are exact, which are refused and why.

`docs/reference/families.md` is generated from these tables by `scripts/families.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

VOCAB = 97
WINDOW = 4  # tokens a sliding layer sees, or a chunk holds: less than the tests' sequences

TINY = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
HEAD = {"head_dim": 8}
SLIDING = {"sliding_window": WINDOW}
ALTERNATING = {**SLIDING, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}
ALL_HEADS = {"num_key_value_heads": 4}
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
MLA = {**ALL_HEADS, **LATENT}
GPT2 = {k: v for k, v in TINY.items() if k not in ("intermediate_size", "num_key_value_heads")}

# Family -> what its configuration needs besides TINY. Values that families multiply or cap logits with are set, so
# that the output head is tested; windows are shorter than the sequences.
FAMILIES: dict[str, dict[str, Any]] = {
    "afmoe": {**HEAD, **EXPERTS, **ALTERNATING},
    "apertus": {},
    "arcee": {},
    "aria_text": {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
    "beam": {**HEAD, **EXPERTS, **ALTERNATING, "final_logit_softcapping": 3.0},
    "bitnet": {},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {**ALTERNATING, "logit_scale": 0.25},
    "cohere2_moe": {**HEAD, **EXPERTS, **ALTERNATING, "logit_scale": 0.25},
    "cwm": {**HEAD, **ALTERNATING},
    "deepseek_v2": {**MLA, **ROUTED, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "deepseek_v3": {**MLA, **ROUTED, "first_k_dense_replace": 1},
    "diffllama": {},
    "dots1": {**HEAD, **ROUTED, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "ernie4_5": {**HEAD},
    "ernie4_5_moe": {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 16},
    "exaone4": {**ALTERNATING},
    "exaone_moe": {**HEAD, **EXPERTS, **ALTERNATING},
    "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2},
    "flint": {**HEAD, **EXPERTS, **ALTERNATING, "shared_expert_intermediate_size": 16},
    "gemma": {**HEAD},
    "gemma2": {**HEAD, **ALTERNATING, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "gemma3_text": {**HEAD, **ALTERNATING, "query_pre_attn_scalar": 8},
    "glm": {**HEAD},
    "glm4": {**HEAD},
    "glm4_moe": {**HEAD, **ROUTED, "first_k_dense_replace": 1},
    "glm4_moe_lite": {**MLA, **ROUTED},
    "gpt2": {**GPT2},
    "gpt_bigcode": {**GPT2},
    "gpt_neox": {},
    "gpt_neox_japanese": {},
    "gpt_oss": {**HEAD, **LOCAL_EXPERTS, **ALTERNATING},
    "granite": {"logits_scaling": 4.0, "residual_multiplier": 0.5},
    "granite_swa": {**ALTERNATING, "logits_scaling": 4.0},
    "granitemoe": {**LOCAL_EXPERTS, "logits_scaling": 4.0},
    "granitemoe_swa": {**LOCAL_EXPERTS, **ALTERNATING, "logits_scaling": 4.0},
    "granitemoeshared": {**LOCAL_EXPERTS, "logits_scaling": 4.0, "shared_intermediate_size": 16},
    "helium": {**HEAD},
    "hunyuan_v1_dense": {**HEAD},
    "hunyuan_v1_moe": {**HEAD, "num_experts": 4, "moe_topk": 2},
    "hy_v3": {**HEAD, **EXPERTS},
    "hyperclovax": {"logits_scaling": 0.25},
    "jais2": {**HEAD},
    "jetmoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "kv_channels": 8},
    "kolibri1": {**HEAD, **EXPERTS, **ALTERNATING, "shared_expert_intermediate_size": 16},
    "laguna": {**HEAD, **EXPERTS, **ALTERNATING},
    "llama": {},
    "llama4_text": {
        **HEAD,
        **LOCAL_EXPERTS,
        "intermediate_size_mlp": 48,
        "attention_chunk_size": WINDOW,
        "layer_types": ["chunked_attention", "full_attention"],
    },
    "mellum": {**HEAD, **EXPERTS, **ALTERNATING},
    "mimo_v2_flash": {**HEAD, **ROUTED, **ALTERNATING},
    "minicpm3": {**MLA},
    "minimax_m2": {**HEAD, **LOCAL_EXPERTS, "rotary_dim": 4},
    "ministral": {**HEAD, **ALTERNATING},
    "ministral3": {**HEAD, **SLIDING},
    "mistral": {**SLIDING},
    "mixtral": {**LOCAL_EXPERTS, **SLIDING},
    "nanochat": {"final_logit_softcapping": 3.0},
    "nemotron": {},
    "olmo": {"clip_qkv": 2.0},
    "olmo2": {},
    "olmo3": {**ALTERNATING},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "persimmon": {},
    "phi": {},
    "phi3": {**SLIDING},
    "phimoe": {**LOCAL_EXPERTS, **SLIDING},
    "qwen2": {**ALTERNATING, "use_sliding_window": True},
    "qwen2_moe": {
        **EXPERTS,
        **ALTERNATING,
        "use_sliding_window": True,
        "shared_expert_intermediate_size": 16,
    },
    "qwen3": {**HEAD, **ALTERNATING, "use_sliding_window": True},
    "qwen3_moe": {**HEAD, **EXPERTS, **SLIDING, "use_sliding_window": True},
    "seed_oss": {**HEAD},
    "smollm3": {"no_rope_layers": [1, 0]},
    "solar_open": {**HEAD, **ROUTED},
    "stablelm": {},
    "starcoder2": {**SLIDING},
    "vaultgemma": {**HEAD, **ALTERNATING, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8},
    "youtu": {**MLA, "initializer_range": 0.02, "embedding_initializer_range": 0.04},
    "xglm": {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4},
    "biogpt": {},
    "gptj": {**GPT2, "rotary_dim": 4},
    "codegen": {**GPT2, "rotary_dim": 4},
    "granitemoehybrid": {**LOCAL_EXPERTS, "layer_types": ["attention"] * 2, "mamba_n_heads": 8, "logits_scaling": 4.0},
    "ctrl": {**GPT2, "dff": 48},
    "axk1": {**MLA, **ROUTED},
}


@dataclass(frozen=True)
class Reason:
    """Why a family is refused: a pattern of the error's message, and a sentence for the documentation."""

    pattern: str
    text: str


LINEAR = Reason(
    "not for linear_attention", "linear-attention or state-space layers keep one state, not a key per token"
)
HYBRID = Reason("not for hybrid", "its layers have a state-space part, which keeps one state, not a key per token")
CONVOLUTION = Reason("not for conv", "convolution layers mix neighbouring slots, not neighbouring positions")
INDEXED = Reason("not for (indexed|deepseek_sparse)_attention", "an indexer with a separate cache chooses the keys")
COMPRESSED = Reason("not for heavily_compressed_attention", "keys of several tokens are compressed into one")
NO_POSITIONS = Reason(
    "takes no position_ids", "its forward takes no `position_ids`, so a token cannot run again at its position"
)
NO_EMBEDS = Reason("takes no inputs_embeds", "its forward takes no `inputs_embeds`, so it cannot run on a mix")
NO_CACHE = Reason(
    "takes no (past_key_values|cache)|fails with a DuoCache", "its forward takes no cache"
)  # as transformers has it
ENCODER = Reason("has no list of its", "it is an encoder: it adds position offsets or looks ahead")
LOOPED = Reason("has no list of its", "it runs its layers several times per pass, with another cache layout")
SHARED = Reason("of its 4 layers keep their keys in the cache", "later layers share the keys of earlier ones")
LOOKUP = Reason("inputs_embeds", "it finds the token id again from its embedding, which fails for a mix of embeddings")
HEAD_NET = Reason("are not the product of output embedding", "its output head has hidden layers")
SLOTS = Reason("does not follow the given positions", "its attention hides keys by their slot, not by the mask")
UNUSED = Reason(
    "does not follow the given positions", "its configuration has a sliding window that its layers do not apply"
)

# Family -> (what its configuration needs besides TINY, why it is refused).
REFUSED: dict[str, tuple[dict[str, Any], Reason]] = {
    "axk2": ({**LATENT, **ROUTED, **ALL_HEADS}, INDEXED),
    "bailing_hybrid": ({**HEAD, **EXPERTS}, LINEAR),
    "bamba": ({"mamba_n_heads": 8, "attn_layer_indices": [1]}, LINEAR),
    "bart": ({"d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 48}, NO_POSITIONS),
    "bert": ({}, ENCODER),
    "bloom": ({}, NO_POSITIONS),
    "cpmant": ({}, NO_EMBEDS),
    "deepseek_v32": ({**MLA, **ROUTED}, INDEXED),
    "deepseek_v4": ({**HEAD, **ROUTED, **SLIDING}, COMPRESSED),
    "falcon_h1": ({"mamba_n_heads": 8}, HYBRID),
    "falcon_mamba": ({}, NO_POSITIONS),
    "gemma3n_text": (
        {
            **HEAD,
            "num_hidden_layers": 4,
            "intermediate_size": [48] * 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": WINDOW,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB,
            "num_kv_shared_layers": 2,
            "laurel_rank": 4,
            "activation_sparsity_pattern": [0.0] * 4,
        },
        SHARED,
    ),
    "gemma4_text": (
        {
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "sliding_window": WINDOW,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB,
            "num_kv_shared_layers": 0,
        },
        LOOKUP,
    ),
    "glm_moe_dsa": ({**MLA, **ROUTED}, INDEXED),
    "gpt_neo": ({**GPT2, "attention_types": [[["global", "local"], 1]]}, SLOTS),
    "hrm_text": ({**HEAD}, LOOPED),
    "jamba": ({}, LINEAR),
    "lfm2": ({"layer_types": ["conv", "full_attention"]}, CONVOLUTION),
    "mamba": ({}, NO_POSITIONS),
    "mamba2": ({"num_heads": 8, "head_dim": 8}, NO_POSITIONS),
    "minimax": ({**HEAD, **LOCAL_EXPERTS}, LINEAR),
    "modernbert-decoder": ({}, HEAD_NET),
    "moshi": ({**HEAD}, UNUSED),
    "mpt": ({}, NO_POSITIONS),
    "nemotron_h": ({}, LINEAR),
    "olmo_hybrid": ({}, LINEAR),
    "openai-gpt": ({**GPT2}, NO_CACHE),
    "qwen3_5_text": ({**HEAD}, LINEAR),
    "qwen3_next": ({**HEAD, **EXPERTS}, LINEAR),
    "roberta": ({}, ENCODER),
    "roformer": ({}, NO_POSITIONS),
    "rwkv": ({}, NO_POSITIONS),
    "xlm": ({}, NO_CACHE),
}


def tiny(family: str, attn_implementation: str = "eager", seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A random model of a family, in eval mode, with weights large enough that a wrong mask shows in the logits.

    Raises:
        ValueError: the family is unknown to the installed transformers.
    """
    config = config_of(family, **overrides)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attn_implementation).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
    return model


def config_of(family: str, **overrides: Any) -> PreTrainedConfig:
    """The configuration of `tiny`."""
    own = FAMILIES[family] if family in FAMILIES else REFUSED[family][0]
    return AutoConfig.for_model(family, **{**TINY, **own, **overrides})
