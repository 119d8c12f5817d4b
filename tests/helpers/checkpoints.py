"""Random TaH checkpoints that iterate on some tokens, small enough to be served in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from helpers.models import CHAT_TEMPLATE
from tah import TaHForCausalLM

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCAB = len(SPECIAL) + 256
HARD_SHARE = 0.15


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and a chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: at for at, token in enumerate(SPECIAL + alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


TAH2 = {"next_input": "mlp", "output": "mixture", "decider": {"kind": "tah2"}, "lora_rank": 0}  # the authors' choices


OF_FAMILY = {  # what a family has besides, with values that show whether it counts
    "granite": {
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.6,
        "attention_multiplier": 0.1,
        "logits_scaling": 2.0,
    },
    "phi3": {"partial_rotary_factor": 0.5},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "norm_topk_prob": True,
        "mlp_only_layers": [1],
    },
}


def tiny_base(family: str, key_heads: int = 2, **more: Any) -> torch.nn.Module:
    """A random base of three layers, whose head width vLLM's CPU kernels take; `more` for its configuration."""
    torch.manual_seed(0)
    fields: dict[str, Any] = dict(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=key_heads,
        head_dim=32,
        max_position_embeddings=2048,
        sliding_window=None,
        tie_word_embeddings=family == "llama",
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    config = AutoConfig.for_model(family, **fields | OF_FAMILY.get(family, {}) | more)
    base = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if (
                parameter.dim() > 1
            ):  # large enough for attention to look somewhere, and for answers that are not all alike
                parameter.normal_(0, 1.5 / parameter.shape[-1] ** 0.5)
            elif "bias" in name:
                parameter.normal_(0, 0.2)
        base.get_input_embeddings().weight.normal_(0, 0.3)
    return base


@torch.no_grad()
def shake(model: TaHForCausalLM, ids: torch.Tensor) -> TaHForCausalLM:
    """Move adapter, decider and maps off their start values; a threshold that `HARD_SHARE` of `ids` [B, T] exceed."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or name.startswith(("output_map", "next_input_map")):
            parameter.normal_(0, 0.1)
        if name == "decider.output.weight":
            parameter.normal_(0, 0.3)
        if name == "decider.output.bias":
            parameter.zero_()
        if name == "decider.score.weight":  # of TaH2, as are the norms
            parameter.normal_(0, 0.1)
        if name.startswith(("decider.norm", "next_input_mlp.norm")):
            parameter.normal_(1, 0.2)
    if model.decider is not None:
        probability = model(ids, use_cache=False).continue_prob.flatten().sort().values
        at = int(len(probability) * (1 - HARD_SHARE))
        model.config.threshold = float(probability[at : at + 2].mean())
    return model


def save(model: TaHForCausalLM, directory: Path) -> Path:
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def tiny(
    directory: Path, family: str = "llama", key_heads: int = 2, base: dict[str, Any] | None = None, **config
) -> Path:
    """Directory of a tiny TaH checkpoint; `base` is for the configuration of its base."""
    options = {"lora_rank": 4, "mix_topk": 16, "decider": {"kind": "lean", "width": 32}, **config}
    model = TaHForCausalLM.from_base(tiny_base(family, key_heads, **base or {}), **options)
    ids = torch.randint(3, VOCAB, (8, 64), generator=torch.Generator().manual_seed(2))
    return save(shake(model, ids), directory)
