"""A base of Qwen3-1.7B's shape with random weights, made smaller by fewer layers and a smaller vocabulary.

    python scripts/random_model.py out/random --layers 14 --vocab 32000 --seed 0       # 0.77 B parameters, 3.1 GB
    tah bench serve out/random

A step costs the same whatever the weights are. It has no tokenizer: `tah bench serve` makes token ids itself.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmark"))

from bench_gpu_train import QWEN3  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="directory to make")
    parser.add_argument("--layers", type=int, default=14, help="[%(default)s]")
    parser.add_argument("--vocab", type=int, default=32000, help="at least 200 [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="[%(default)s]")
    given = parser.parse_args()
    if given.layers < 1:
        parser.error(f"--layers {given.layers}: at least 1")
    if given.vocab < 200:
        parser.error(f"--vocab {given.vocab}: the benchmark's prompts need at least 200")
    torch.manual_seed(given.seed)
    sizes = {"num_hidden_layers": given.layers, "vocab_size": given.vocab}
    model = Qwen3ForCausalLM(Qwen3Config(**QWEN3 | sizes))
    model.save_pretrained(given.output)
    print(f"{given.output}: {model.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
