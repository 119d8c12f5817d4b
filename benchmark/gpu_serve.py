"""The first command for a machine with a GPU and vLLM: same answers, layouts of all backends, tokens per second.

    python benchmark/gpu_serve.py       # 10 minutes, in the environment of vLLM; out/gpu/gpu_serve.json and .md

| section | what it measures |
| --- | --- |
| answers | served tokens and depths of a tiny float32 model against those of `generate`, eager and with CUDA graphs |
| layouts | for each attention backend of vLLM, whether the engine starts, which checks the layout of its KV cache, and answers |
| speed | tokens per second of `never` and of `two_pass` at 7 % against the base on the same vLLM, at 1 to 256 requests (aim: 0.93 of the base) |

Engines run one after another, each in a new process. Exit code 1 if an answer differs or a layout is refused. The script
has run only at tiny sizes on CPUs (`--small`, tests/serve/test_gpu_serve.py), not on a GPU.
"""  # noqa: E501

from __future__ import annotations

import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpu_sections import Rows, Section, Skipped, main
from tah.benchmarks.measure import in_fresh_process
from tah.errors import first_line

SHARE, AIM = 0.07, 0.93
BACKENDS = ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN", "FLEX_ATTENTION")
ALIKE = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 64, "vocab_size": 300, "num_hidden_layers": 2}
ALIKE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}  # backends take width 64
ALIKE |= {"tie_word_embeddings": False}
Answers = list[tuple[list[int], list[int]]]  # tokens of the answer; depths of the tokens of prompt and answer


def on_gpu() -> bool:
    """Return whether vLLM will run on a GPU; skip the section without vLLM, else prepare the environment."""
    import torch

    if find_spec("vllm") is None:
        raise Skipped("vLLM is not installed")
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    if not torch.cuda.is_available():
        os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return torch.cuda.is_available()


def write(folder: Path, config: dict[str, Any], dtype: str, **tah: Any) -> tuple[str, str]:
    """Write a base with random weights and a TaH checkpoint of it; return their directories.

    Args:
        folder: Directory of both.
        config: Configuration of Qwen3.
        dtype: Data type of the weights.
        **tah: Arguments of `TaHForCausalLM.from_base`.
    """
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    from tah.model import TaHForCausalLM

    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        base = AutoModelForCausalLM.from_config(Qwen3Config(**config), dtype=getattr(torch, dtype))
    if not config["tie_word_embeddings"]:
        torch.nn.init.normal_(base.lm_head.weight, std=0.5)  # some tokens are certain, some are not, and none are tied
    base.save_pretrained(folder / "base")
    model = TaHForCausalLM.from_base(base, **tah)
    for name, weight in model.named_parameters():
        if "lora_B" in name:  # zero in a new adapter
            torch.nn.init.normal_(weight, std=0.02)
    model.save_pretrained(folder / "tah")
    return str(folder / "base"), str(folder / "tah")


def prompts(count: int, shortest: int, longest: int) -> list[list[int]]:
    """Return random token ids."""
    draw = random.Random(0)
    return [[draw.randrange(3, 300) for _ in range(draw.randint(shortest, longest))] for _ in range(count)]


def engine(model: str, longest: int, share_of_memory: float, **options: Any) -> Any:
    """Return an engine of vLLM in this process."""
    from vllm import LLM

    options = {"skip_tokenizer_init": True, "enable_prefix_caching": False, "max_model_len": longest} | options
    return LLM(model=model, gpu_memory_utilization=share_of_memory, **options)


def ask(llm: Any, asked: Sequence[list[int]], new: int, rule: dict[str, Any] | None = None) -> list[Any]:
    """Return vLLM's outputs, greedily, of exactly `new` tokens each."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, ignore_eos=True, max_tokens=new, detokenize=False, extra_args=rule)
    return llm.generate([{"prompt_token_ids": ids} for ids in asked], params, use_tqdm=False)


def served(model: str, asked: list[list[int]], new: int, options: dict[str, Any]) -> Answers:
    """Start an engine and return its answers."""
    outs = [out.outputs[0] for out in ask(engine(model, 512, 0.3, **options), asked, new)]
    return [(list(out.token_ids), [int(depth) for depth in out.routed_experts.reshape(-1)]) for out in outs]


def expected(model: str, asked: list[list[int]], new: int) -> Answers:
    """Return the answers of `generate` on the same device, one prompt at a time."""
    import torch

    from tah.model import TaHForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = TaHForCausalLM.from_pretrained(model, dtype=torch.float32).to(device).eval()
    options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = []
    for prompt in asked:
        ids = torch.tensor([prompt], device=device)
        out = loaded.generate(ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, **options)
        found.append((out.sequences[0, len(prompt) :].tolist(), out.depth_count[0, :-1].tolist()))
    return found


def answers(small: bool) -> Rows:
    """Compare served answers with those of `generate`."""
    from gpu_train import QWEN3

    gpu, new = on_gpu(), 8 if small else 24
    asked = prompts(6 if small else 32, 1, 100)
    with tempfile.TemporaryDirectory() as folder:
        rule = {"policy": "confidence", "threshold": 0.5, "lora_rank": 4}
        _, model = write(Path(folder), QWEN3 | ALIKE, "float32", **rule)
        want = in_fresh_process("generate", expected, model, asked, new)
        iterated = sum(depth > 1 for _, depths in want for depth in depths) / sum(len(depths) for _, depths in want)
        for eager in (True,) if small else (True, False):
            options: dict[str, Any] = {"enforce_eager": eager, "dtype": "float32", "max_num_seqs": 16}
            options |= {"additional_config": {"batching": "two_pass"}, "max_num_batched_tokens": 512}
            options |= {"attention_backend": "TRITON_ATTN"} if gpu else {"block_size": 32}
            got = in_fresh_process("vLLM", served, model, asked, new, options)
            same = sum(a == b for a, b in zip(got, want, strict=True))
            row = {"engine": "eager" if eager else "graphs", "iterated": iterated, "answers": len(want)}
            yield row | {"as generate": same, "ok": same == len(want) and 0 < iterated < 1}


def started(model: str, asked: list[list[int]], options: dict[str, Any]) -> tuple[str, str, int]:
    """Start an engine, which checks the layout; return shape and strides of a cache, and the tokens of the answers."""
    llm = engine(model, 512, 0.3, **options)
    caches = llm.llm_engine.model_executor.driver_worker.worker.model_runner.kv_caches
    tokens = sum(len(out.outputs[0].token_ids) for out in ask(llm, asked, 4))
    return str(tuple(caches[0].shape)), str(caches[0].stride()), tokens


def layouts(small: bool) -> Rows:
    """Start an engine with each attention backend."""
    from gpu_train import QWEN3

    gpu, asked = on_gpu(), prompts(4, 20, 40)
    with tempfile.TemporaryDirectory() as folder:
        _, model = write(Path(folder), QWEN3 | ALIKE, "bfloat16", policy="always", lora_rank=4)
        for backend in BACKENDS if gpu else ("CPU_ATTN",):
            options: dict[str, Any] = {"dtype": "bfloat16", "enforce_eager": True, "max_num_seqs": 16}
            options |= {"attention_backend": backend} if gpu else {"block_size": 32, "dtype": "float32"}
            row: dict[str, Any] = {"backend": backend}
            try:
                shape, strides, tokens = in_fresh_process(backend, started, model, asked, options)
                yield row | {"shape": shape, "strides": strides, "tokens": tokens, "ok": tokens == 4 * len(asked)}
            except RuntimeError as error:  # a backend may be missing; a layout that is refused is a failure
                message = first_line(error)
                yield row | {"error": message} | ({"ok": False} if "layout" in message else {})


def rates(
    model: str, counts: list[int], lengths: tuple[int, int], repeats: int, rules: dict[str, Any], options: Any
) -> dict[str, list[float]]:
    """Return tokens per second of answers, by variant, for each number of requests."""
    longest, new = sum(lengths), lengths[1]
    llm, found = engine(model, longest, 0.85, max_num_seqs=max(counts), **options), {name: [] for name in rules}
    for count in counts:
        asked = prompts(count, lengths[0], lengths[0])
        for name, rule in rules.items():
            took = []
            for turn in range(repeats + 1):
                start = time.perf_counter()
                ask(llm, asked, new, rule)
                took += [time.perf_counter() - start] if turn else []  # the first one warms up
            found[name].append(count * new / statistics.median(took))
    return found


def speed(small: bool) -> Rows:
    """Compare tokens per second with those of the base; Qwen3-1.7B where the GPU has 20 GiB, else 0.6B."""
    import torch

    from gpu_train import QWEN3, SMALLER

    gpu = on_gpu()
    counts, lengths, repeats = ([1, 3], (8, 6), 1) if small else ([1, 8, 32, 64, 128, 256], (64, 128), 3)
    large = gpu and torch.cuda.get_device_properties(0).total_memory > 20 * 2**30
    config, size = (QWEN3, "1.7B") if large else (QWEN3 | SMALLER, "0.6B")
    if small:
        config, size = QWEN3 | ALIKE, "tiny"
    options: dict[str, Any] = {"dtype": "bfloat16"} if gpu else {"dtype": "float32", "block_size": 32}
    if small:
        options["enforce_eager"] = True
    with tempfile.TemporaryDirectory() as folder:
        base, tah = write(Path(folder), config, options["dtype"])
        engines: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
            "base": (base, {"base": None}, {}),
            "tah": (
                tah,
                {"never": {"policy": "never"}, "two_pass": None},
                {
                    "hf_overrides": {"policy": "random", "random_rate": SHARE},
                    "additional_config": {"batching": "two_pass"},
                },
            ),
        }
        first: list[float] = []
        for kind, (model, rules, more) in engines.items():
            found = in_fresh_process(kind, rates, model, counts, lengths, repeats, rules, options | more)
            for name, speeds in found.items():
                first = first or speeds
                for count, rate, of_base in zip(counts, speeds, first, strict=True):
                    aim = ("met" if rate / of_base >= AIM else "not met") if name == "two_pass" else None
                    row = {"model": size, "requests": count, "variant": name, "tokens/s": rate}
                    yield row | {"relative to base": rate / of_base, f"aim {AIM}": aim}


SECTIONS = {"answers": Section(answers, 180), "layouts": Section(layouts, 240), "speed": Section(speed, 330)}

if __name__ == "__main__":
    sys.exit(main("gpu_serve", __doc__ or "", SECTIONS, __file__, minutes=10))
