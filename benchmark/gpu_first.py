"""The first command for a machine with a GPU, without vLLM: is the kernel right and fast, what do passes cost?

    pip install -e . triton             # with the torch that fits the machine
    python benchmark/gpu_first.py       # 6 minutes; out/gpu/gpu_first.json and .md

| section | what it measures |
| --- | --- |
| kernel | the Triton kernel of depth 2 against a gather of all keys; waits for the device; a captured call |
| speed | its time at 1, 8 and 32 tokens and contexts of 1k, 8k and 32k, with and without split keys, against the time to read the keys once; peak memory |
| generate 0.6B, generate 1.7B | `generate` of the shapes of Qwen3 with random weights: base, never, 7 % and always, batch 1 and 16 |
| train | a training step against a plain one, with model FLOPs utilisation |

Exit code 1 if a section failed or a result is wrong. The script has run only at tiny sizes on CPUs, with the kernel in
Triton's interpreter (`--small`, tests/benchmarks/test_gpu_first.py), not on a GPU.
"""  # noqa: E501

from __future__ import annotations

import statistics
import sys
from functools import partial
from typing import Any

from gpu_sections import Rows, Section, main


def kernel(small: bool) -> Rows:
    """Check the kernel."""
    from gpu_kernel import correct

    return correct(small)


def speed(small: bool) -> Rows:
    """Time the kernel."""
    from gpu_kernel import speed

    return speed(small)


def train(small: bool) -> Rows:
    """Time training steps."""
    from gpu_train import train

    return train(small)


def generate(size: str, small: bool) -> Rows:
    """Time `generate` of a model with random weights: 64 new tokens after prompts of 64.

    Args:
        size: `0.6B` or `1.7B`.
        small: Whether the model is tiny.
    """
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    from gpu_train import QWEN3, SMALLER, TINY
    from tah.benchmarks.bench import NEW, VARIANTS, decode, passes
    from tah.benchmarks.measure import alternate, median_ratio, timed
    from tah.model import TaHForCausalLM

    config: dict[str, Any] = QWEN3 | (SMALLER if size == "0.6B" else {}) | (TINY if small else {})
    device, new = "cuda" if torch.cuda.is_available() else "cpu", 4 if small else NEW
    torch.manual_seed(0)
    with torch.device(device):
        base = AutoModelForCausalLM.from_config(Qwen3Config(**config), dtype=torch.bfloat16)
    model = TaHForCausalLM.from_base(base.eval()).to(device).eval()
    for batch in (1, 2) if small else (1, 16):
        runs = {name: partial(decode(model, name, batch), max_new_tokens=new) for name in VARIANTS}
        took = alternate({name: timed(run, device) for name, run in runs.items()}, 1 if small else 2)
        same = torch.equal(runs["base"](), runs["never"]())
        for name, times in took.items():
            row = {
                "model": "tiny" if small else size,
                "batch": batch,
                "policy": "7 %" if name == "forced" else name,
                "ms per token": 1000 * statistics.median(times) / new,
                "tokens/s": batch * new / statistics.median(times),
                "cost relative to base": median_ratio(times, took["base"]),
                "iterated": (passes(runs[name], name, batch * new, decoding=True) > 1).float().mean().item(),
            }
            yield row | ({"tokens of base": same, "ok": same} if name == "never" else {})


SECTIONS = {
    "kernel": Section(kernel, 110),
    "speed": Section(speed, 80),
    "generate 0.6B": Section(partial(generate, "0.6B"), 80),
    "generate 1.7B": Section(partial(generate, "1.7B"), 90),
    "train": Section(train, 90),
}

if __name__ == "__main__":
    sys.exit(main("gpu_first", __doc__ or "", SECTIONS, __file__, minutes=6))
