"""Time one decoding step on a GPU in three variants, to choose the `auto` batching of GPUs.

    python benchmark/bench_gpu_step.py --output runs/bench-gpu-step

The steps are plain PyTorch with CUDA graphs. The model has the shape of Qwen3-1.7B, random bfloat16 weights and LoRA of
rank 16. Each request has 1,024 tokens in its KV cache; batches are 1 to 256.

| time (ms) | what runs |
| --- | --- |
| base | a step of the base |
| deep | a second pass over the iterated rows: next input from the top 100 logits, LoRA, keys of both depths |
| mixed | a step in which the iterated rows run at depth 2 beside the other rows at depth 1 |

The cost per token relative to the base, at an iterated share f, is:

    two_pass = (base + p * deep) / base
    mixed    = (1 + f) * (q * mixed + (1 - q) * base) / base

p = 1 - (1 - f)^batch is the share of steps with an iterated row. q is the same share for steps with 1 + f rows per
token.

A graph has the expected number of iterated rows. No scheduler and no sampler runs, and copies gather the keys of the
deep rows. So the results are times of kernels, not of a server. The script has run only at a tiny size on CPUs
(tests/benchmarks/test_bench_gpu_step.py), not on a GPU.

Shapes: B rows, M of them at depth 2, D width, H key/value heads, G query heads per key/value head, K head width,
S keys of depth 1 and E of depth 2 per row, V vocabulary.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tah.benchmarks.measure import alternate, save, timed
from tah.markdown import table

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SHARE = 0.07  # iterated share of the tokens


@dataclass(frozen=True)
class Shape:
    """Sizes of a model, named as in the module's docstring."""

    layers: int
    D: int
    H: int
    G: int
    K: int
    inner: int
    V: int
    rank: int = 16
    topk: int = 100


QWEN3 = Shape(layers=28, D=2048, H=8, G=2, K=128, inner=6144, V=151936)


class Decoder:
    """Weights, KV cache and the three steps.

    Args:
        shape: Sizes of the model.
        batch: Maximum number of rows, B.
        seen: Keys of depth 1 per row, S.
        deep: Keys of depth 2 per row, E.
        dtype: Data type of weights and keys.
        device: Device of weights and keys.
    """

    def __init__(self, shape: Shape, batch: int, seen: int, deep: int, dtype: torch.dtype, device: str) -> None:
        self.shape, self.deep = shape, deep
        generator = torch.Generator(device).manual_seed(0)

        def draw(*size: int) -> Tensor:
            drawn = torch.randn(size, generator=generator, device=device, dtype=torch.float32)
            return (drawn / math.sqrt(size[-1])).to(dtype)

        D, heads, inner = shape.D, shape.H * shape.K, shape.inner
        sizes = {"qkv": (heads * (shape.G + 2), D), "o": (D, heads * shape.G), "up": (2 * inner, D), "down": (D, inner)}
        self.weights = [{name: draw(*size) for name, size in sizes.items()} for _ in range(shape.layers)]
        self.A = [{name: draw(shape.rank, size[1]) for name, size in sizes.items()} for _ in range(shape.layers)]
        self.B = [{name: draw(size[0], shape.rank) for name, size in sizes.items()} for _ in range(shape.layers)]
        self.embedding = draw(shape.V, D)  # tied to the head
        # Keys of depth 2 are left of those of depth 1, so that one view has both. The last of each belong to the step.
        self.cache = [draw(2, batch, shape.H, deep + seen, shape.K) for _ in range(shape.layers)]
        angle = (seen - 1) / 1e6 ** (torch.arange(0, shape.K, 2, device=device) / shape.K)
        self.cos, self.sin = angle.cos().to(dtype), angle.sin().to(dtype)

    def base(self, x: Tensor) -> Tensor:
        """Return logits [B, V] of inputs [B, D] at depth 1."""
        return self._head(self._layers(x, torch.arange(len(x), device=x.device), None))

    def again(self, logits: Tensor, rows: Tensor) -> Tensor:
        """Return logits [M, V] of depth 2, given the logits [B, V] of depth 1 and the iterated rows [M]."""
        own = torch.arange(len(rows), device=rows.device)
        return self._head(self._layers(self.next_input(logits[rows]), rows, own))

    def mixed(self, x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Run inputs [B, D], at depth 2 for `rows` [M] and at depth 1 for the others.

        Returns:
            Logits [B, V], and next inputs [M, D] of as many rows.
        """
        logits = self._head(self._layers(x, torch.arange(len(x), device=x.device), rows))
        return logits, self.next_input(logits[rows])

    def next_input(self, logits: Tensor) -> Tensor:
        """Return next inputs [M, D] of logits [M, V] (method.md (4))."""
        top, tokens = logits.topk(self.shape.topk)
        return torch.einsum("mk,mkd->md", top.float().softmax(-1), self.embedding[tokens].float()).to(logits.dtype)

    def _head(self, x: Tensor) -> Tensor:
        return F.linear(self._norm(x), self.embedding)

    def _norm(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:])

    def _layers(self, x: Tensor, rows: Tensor, deep: Tensor | None) -> Tensor:
        """Return outputs [n, D] of inputs x [n, D] of the requests `rows` [n]; the rows `deep` [M] run at depth 2."""
        for layer in range(self.shape.layers):
            y = self._linear(layer, "qkv", self._norm(x), deep)
            x = x + self._linear(layer, "o", self._attend(layer, y, rows, deep), deep)
            gate, up = self._linear(layer, "up", self._norm(x), deep).chunk(2, dim=-1)
            x = x + self._linear(layer, "down", F.silu(gate) * up, deep)
        return x

    def _linear(self, layer: int, name: str, x: Tensor, deep: Tensor | None) -> Tensor:
        out = F.linear(x, self.weights[layer][name])
        if deep is None:
            return out
        return out.index_add_(0, deep, F.linear(F.linear(x[deep], self.A[layer][name]), self.B[layer][name]))

    def _attend(self, layer: int, y: Tensor, rows: Tensor, deep: Tensor | None) -> Tensor:
        """Return the attention output [n, G * H * K] of projections [n, (G + 2) * H * K]."""
        shape, (keys, values) = self.shape, self.cache[layer]
        parts = y.view(len(y), shape.H, shape.G + 2, shape.K)
        query, key, value = self._rotate(parts[:, :, : shape.G]), self._rotate(parts[:, :, -2]), parts[:, :, -1]
        out = torch.empty_like(query)
        if deep is None or len(deep) < len(rows):
            shallow = torch.ones(len(rows), 1, 1, dtype=torch.bool, device=y.device)
            if deep is not None:
                shallow = shallow.index_fill(0, deep, False)
            for cache, new in ((keys, key), (values, value)):
                cache[: len(rows), :, -1] = torch.where(shallow, new, cache[: len(rows), :, -1])
            n = len(rows)
            out = self._sdpa(query, keys[:n, :, self.deep :], values[:n, :, self.deep :])
        if deep is not None:
            at = rows[deep]
            keys[at, :, self.deep - 1], values[at, :, self.deep - 1] = key[deep], value[deep]
            out[deep] = self._sdpa(query[deep], keys[at], values[at])
        return out.reshape(len(y), -1)

    def _sdpa(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Return the attention output [n, H, G, K] of queries [n, H, G, K] and keys and values [n, H, S, K]."""
        return F.scaled_dot_product_attention(query, keys, values)

    def _rotate(self, x: Tensor) -> Tensor:
        left, right = self._norm(x).chunk(2, dim=-1)
        return torch.cat([left * self.cos - right * self.sin, right * self.cos + left * self.sin], dim=-1)


def captured(step: Callable[[], Any], device: str) -> Callable[[], Any]:
    """Return the replay of a step as a CUDA graph; on a CPU, the step itself."""
    if device == "cpu":
        return step
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


@torch.no_grad()
def measure(
    shape: Shape, batches: tuple[int, ...], seen: int, device: str, dtype: torch.dtype, repeats: int
) -> list[dict[str, Any]]:
    """Measure all steps; return a row of the table per batch."""
    deep = max(1, round(SHARE * seen))
    decoder, rows = Decoder(shape, max(batches), seen, deep, dtype, device), []
    for batch in batches:
        x = torch.randn(batch, shape.D, device=device).to(dtype)
        at = torch.arange(max(1, round(SHARE * batch)), device=device)
        logits = decoder.base(x)
        steps: dict[str, Callable[[], Any]] = {
            "base": lambda x=x: decoder.base(x),
            "deep": lambda logits=logits, at=at: decoder.again(logits, at),
            "mixed": lambda x=x, at=at: decoder.mixed(x, at),
        }
        runs = {name: timed(captured(step, device), device) for name, step in steps.items()}
        took = {name: 1000 * statistics.median(seconds) for name, seconds in alternate(runs, repeats).items()}
        rows.append({"batch": batch, "iterating": len(at), **took, **costs(batch, **took)})
    return rows


def costs(batch: int, base: float, deep: float, mixed: float) -> dict[str, float]:
    """Return the cost per token relative to the base of `two_pass` and `mixed`, given times of the three steps."""
    any_iterates = 1 - (1 - SHARE) ** batch
    any_is_deep = 1 - (1 - SHARE / (1 + SHARE)) ** batch
    together = (1 + SHARE) * (any_is_deep * mixed + (1 - any_is_deep) * base)
    return {"two_pass": (base + any_iterates * deep) / base, "mixed cost": together / base}


def choice(rows: list[dict[str, Any]]) -> str:
    """Return the best choice of `auto` as text."""
    ahead = [row["batch"] for row in rows if row["mixed cost"] < row["two_pass"]]
    return f"auto: mixed at batches {', '.join(map(str, ahead))}; else two_pass" if ahead else "auto: two_pass"


def markdown(rows: list[dict[str, Any]]) -> str:
    """Return the result as a Markdown table, with the best choice of `auto`."""
    lines = []
    for row in rows:
        deep = f"{row['deep']:.2f} ({row['iterating']})"
        times = (f"{row['base']:.2f}", deep, f"{row['mixed']:.2f}")
        lines.append((row["batch"], *times, f"{row['two_pass']:.2f}", f"{row['mixed cost']:.2f}"))
    columns = ("batch", "base ms", "deep pass ms (rows)", "mixed ms", "two_pass, cost", "mixed, cost")
    return f"{table(columns, lines)}\n\n{choice(rows)}"


def main() -> int:
    """Measure and print the table; return the exit code."""
    parser = argparse.ArgumentParser(description="Time a decoding step on a GPU: base, second pass, mixed.")
    parser.add_argument("--seen", type=int, default=1024, help="tokens in the KV cache per request [%(default)s]")
    parser.add_argument("--repeats", type=int, default=50, help="number of rounds; times are medians [%(default)s]")
    parser.add_argument("--output", type=Path, help="directory for bench_gpu_step.json and .md")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("bench_gpu_step: this machine has no CUDA GPU", file=sys.stderr)
        return 2
    rows = measure(QWEN3, BATCHES, options.seen, "cuda", torch.bfloat16, options.repeats)
    if options.output is not None:
        result = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "share": SHARE, "rows": rows}
        result |= {"shape": asdict(QWEN3), "seen": options.seen}
        save(result, markdown(rows), options.output, "bench_gpu_step")
    print(markdown(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
