"""Tiny random TaH models whose every part matters: adapter, decider and maps are random, not at their start values."""

from __future__ import annotations

import torch
from torch import Tensor

from helpers.families import VOCAB, tiny
from tah import TaHForCausalLM

LENGTH = 12


CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tah(family: str = "llama", attn_implementation: str = "sdpa", **config) -> TaHForCausalLM:
    """A TaH model around a tiny base; `policy="oracle"` and a mix of 16 unless told otherwise."""
    base = tiny(family, attn_implementation=attn_implementation)
    model = TaHForCausalLM.from_base(base, **{"policy": "oracle", "mix_topk": 16, "lora_rank": 4, **config})
    return shake(model)


@torch.no_grad()
def shake(model: TaHForCausalLM) -> TaHForCausalLM:
    """Move everything off its start value, where many mistakes are invisible."""
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name or name.startswith(("output_map", "next_input_map")):
            parameter.normal_(0, 0.15)
        if name == "decider.output.weight":
            parameter.normal_(0, 0.3)
        if name == "decider.output.bias":
            parameter.zero_()
    return model


def token_ids(rows: int = 2, length: int = LENGTH, seed: int = 0) -> Tensor:
    """[B, T]"""
    return torch.randint(3, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def labels(rows: int = 2, length: int = LENGTH, depth: int = 2, seed: int = 1) -> Tensor:
    """Depth labels [B, T] in 1..depth; different rows iterate at different places."""
    return torch.randint(1, depth + 1, (rows, length), generator=torch.Generator().manual_seed(seed))


def pad(x: Tensor, left: int = 0, right: int = 0, value: int = 0) -> Tensor:
    return torch.nn.functional.pad(x, (left, right), value=value)


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to the scale of `b`."""
    return ((a - b).abs().max() / b.abs().max().clamp(min=1e-9)).item()


def middle(probabilities: Tensor) -> float:
    """A threshold with half of the probabilities above it, as far from both neighbours as possible."""
    ordered = probabilities.flatten().sort().values
    half = len(ordered) // 2
    return float(ordered[half - 1 : half + 1].mean())


def packed_row(documents):
    """Documents in one row [1, T] and their restarting positions [1, T]."""
    return torch.cat(documents)[None], torch.cat([torch.arange(len(d)) for d in documents])[None]
