"""Time training steps with hard tokens on a GPU: shape of Qwen3-1.7B, random bfloat16 weights, 4096 tokens.

    python benchmark/bench_gpu_train.py --output runs/bench-gpu

The variants are those of `tah bench train` (src/tah/benchmarks/bench_train.py), with and without activation
checkpointing. The results are seconds, tokens per second, peak memory and model FLOPs utilisation:

    MFU = FLOPs of the step (`step_flops`) / seconds / peak of the GPU

The peak is that of a dense bfloat16 product without sparsity. FLOPs do not include recomputed activations.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from transformers import Qwen3Config

from tah.benchmarks.bench_train import HARD, Setup, bench_train
from tah.benchmarks.measure import save
from tah.core.lora import Factor
from tah.markdown import table
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
}


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


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the result as a Markdown table."""
    lines = []
    for row in rows:
        step = row["mfu"] is not None
        value = f"{row['median'] * 1000:.1f} ms" if step else f"{row['median'] / 1024:.1f} GiB"
        rate, mfu = (f"{row['tokens_per_second']:.0f}", f"{row['mfu']:.1%}") if step else ("", "")
        on = "on" if row["checkpointing"] else "off"
        lines.append((on, row["task"], row["variant"], value, f"{row['ratio']:.2f}", rate, mfu))
    return table(("checkpointing", "task", "variant", "median", "ratio", "tokens/s", "MFU"), lines)


def main() -> int:
    """Measure and print the table; return the exit code."""
    parser = argparse.ArgumentParser(description="Time training steps with hard tokens on a GPU.")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a row [%(default)s]")
    parser.add_argument("--repeats", type=int, default=10, help="number of rounds; times are medians [%(default)s]")
    parser.add_argument("--peak", type=float, help="peak TFLOP/s of dense bfloat16 products, for an unlisted GPU")
    parser.add_argument("--output", type=Path, help="directory for bench_gpu_train.json and .md")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_gpu_train: this machine has no CUDA GPU", file=sys.stderr)
        return 2
    name = torch.cuda.get_device_name()
    peak = options.peak or next((peak for known, peak in PEAKS.items() if known in name), None)
    if peak is None:
        print(f"bench_gpu_train: the peak of {name} is not listed; give --peak TFLOP/s", file=sys.stderr)
        return 2
    rows = measure(QWEN3, options.length, options.repeats, "cuda", peak * 1e12)
    if options.output is not None:
        save(rows, markdown(rows), options.output, "bench_gpu_train")
    print(markdown(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
