"""Section of `gpu_first.py`: training steps with hard tokens, shape of Qwen3, random bfloat16 weights.

The variants are those of `tah bench train` (src/tah/benchmarks/bench_train.py), with and without activation
checkpointing. The results are seconds, tokens per second and model FLOPs utilisation:

    MFU = FLOPs of the step (`step_flops`) / seconds / peak of the GPU

The peak is that of a dense bfloat16 product without sparsity. FLOPs do not include recomputed activations.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from rich.console import Console
from torch import nn
from transformers import Qwen3Config

from gpu_sections import Rows
from tah.benchmarks.bench_train import HARD, Setup, bench_train
from tah.core.lora import Factor
from tah.model import TaHForCausalLM
from tah.progress import Reporter

VARIANTS = ("plain", "standard", "stage 1")
PEAKS = {
    "H200": 989,
    "H100": 989,
    "A100": 312,
    "L40S": 362,
    "4090": 165,
}  # TFLOP/s of dense bfloat16 products, from data sheets
QWEN3 = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "tie_word_embeddings": True,
}  # 1.7B
SMALLER = {"hidden_size": 1024, "intermediate_size": 3072}  # 0.6B
TINY = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256}


def step_flops(model: TaHForCausalLM, tokens: int, length: int, hard: int = 0) -> float:
    """Return the floating-point operations of a training step of a dense base.

    A token costs per forward 2 operations per weight of the decoder's linear layers and of the head. Attention costs
    2 * length * heads * head width per layer: queries times keys and weights times values, with half of the keys on
    average. A backward costs two forwards. A second pass adds its layers, LoRA, and the head's forward for the next
    input; in the backward of that head, only the few largest logits count, so it is left out.

    Args:
        model: TaH model; its weights are not needed.
        tokens: Number of tokens.
        length: Tokens per row.
        hard: Number of tokens that take two passes.
    """
    config = model.config.get_text_config(decoder=True)
    weights = {True: 0, False: 0}  # number of LoRA weights, of base weights
    for name, module in model.decoder.named_modules():
        if isinstance(module, nn.Linear | Factor):
            weights["lora_" in name] += module.weight.numel()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    attention = 2 * length * config.num_attention_heads * width * config.num_hidden_layers
    head = 2 * config.hidden_size * config.vocab_size
    once = 3 * (2 * weights[False] + attention + head)
    again = 3 * (2 * sum(weights.values()) + attention) + head
    return float(tokens * once + hard * again)


def measure(
    config: dict[str, Any], length: int, repeats: int, device: str, peak: float, memory: bool = True
) -> list[dict[str, Any]]:
    """Return the rows of `bench_train`, with the additional columns `checkpointing` and `mfu`.

    Args:
        config: Configuration of the Qwen3 model.
        length: Tokens of the single row of a batch.
        repeats: Number of rounds; times are medians.
        device: Device of the training.
        peak: Peak FLOP/s of the device.
        memory: Whether to measure peak memory, in a new process per variant.
    """
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        Qwen3Config(**config).save_pretrained(directory)
        with torch.device("meta"):
            shape = TaHForCausalLM(
                TaHForCausalLM.config_class(base_config=Qwen3Config(**config), decider=None, policy="never")
            )
        for checkpointing in (False, True):
            setup = Setup(directory, "bfloat16", random=True, checkpointing=checkpointing, device=device)
            found = bench_train(
                setup,
                variants=VARIANTS,
                shapes=((1, length),),
                repeats=repeats,
                memory=memory,
                labels=None,
                progress=Reporter(Console(stderr=True)),
            )
            for row in found["rows"]:
                hard = round(HARD * (length - 1)) if row["variant"] == "stage 1" else 0
                needed = step_flops(shape, length, length, hard)
                mfu = needed / row["median"] / peak if row["task"].startswith("step") else None
                rows.append({**row, "checkpointing": checkpointing, "mfu": mfu})
            machine = found["machine"]
    return [row | {"machine": machine} for row in rows]


def train(small: bool) -> Rows:
    """Time training steps on one row of 4096 tokens; 1.7B where the GPU has 70 GiB, else 0.6B."""
    on_gpu = torch.cuda.is_available()
    large = on_gpu and torch.cuda.get_device_properties(0).total_memory > 70 * 2**30
    config, size = (QWEN3, "1.7B") if large else (QWEN3 | SMALLER, "0.6B")
    if small:
        config, size = QWEN3 | TINY, "tiny"
    name = torch.cuda.get_device_name() if on_gpu else "CPU"
    peak = next((1e12 * peak for known, peak in PEAKS.items() if known in name), None)
    length = 60 if small else 4096
    for row in measure(config, length, 1 if small else 3, "cuda" if on_gpu else "cpu", peak or 1e12, memory=False):
        yield {
            "model": size,
            "checkpointing": "on" if row["checkpointing"] else "off",
            "variant": row["variant"],
            "ms": 1000 * row["median"],
            "cost relative to plain": row["ratio"],
            "tokens/s": row["tokens_per_second"],
            "MFU": row["mfu"] if peak else None,
        }
