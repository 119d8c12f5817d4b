"""Write a base with random weights and the shape of Qwen3-1.7B, with fewer layers and a smaller vocabulary.

    python scripts/random_model.py out/random --layers 14 --vocab 32000 --seed 0       # 0.77 B parameters, 3.1 GB
    tah bench serve out/random

The cost of a step does not depend on the weights. The model has no tokenizer; `tah bench serve` samples token ids.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmark"))

from gpu_train import QWEN3  # noqa: E402


def main() -> None:
    """Write the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="directory of the model")
    parser.add_argument("--layers", type=int, default=14, help="number of layers [%(default)s]")
    parser.add_argument("--vocab", type=int, default=32000, help="size of the vocabulary, at least 200 [%(default)s]")
    parser.add_argument("--seed", type=int, default=0, help="random seed [%(default)s]")
    given = parser.parse_args()
    if given.layers < 1:
        parser.error(f"--layers {given.layers} must be at least 1")
    if given.vocab < 200:
        parser.error(f"--vocab {given.vocab} must be at least 200, which the prompts of the benchmark need")
    torch.manual_seed(given.seed)
    sizes = {"num_hidden_layers": given.layers, "vocab_size": given.vocab}
    model = Qwen3ForCausalLM(Qwen3Config(**QWEN3 | sizes))
    model.save_pretrained(given.output)
    print(f"{given.output}: {model.num_parameters():,} parameters")


if __name__ == "__main__":
    main()
