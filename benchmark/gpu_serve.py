"""The first command for a machine with a GPU and vLLM: same answers, layouts, waits of the host, tokens per second.

    python benchmark/gpu_serve.py       # 15 minutes, in the environment of vLLM; out/gpu/gpu_serve.json and .md

| section | what it measures |
| --- | --- |
| answers | served tokens and depths of a tiny float32 model against those of `generate`, eager and with CUDA graphs, `two_pass` and `mixed`; where an answer differs, how near the tie was |
| layouts | for each attention backend of vLLM, whether the engine starts, which checks the layout of its KV cache, and whether its answers are those of TRITON_ATTN, except at ties |
| waits | where the host waits for the GPU in the second pass, for steps of prompts and of decoding: once per step, to learn which tokens iterate |
| speed | tokens per second of `never`, `two_pass` and `mixed` (the last two at 7 %) against the base on the same vLLM, at 1 to 256 requests (aim: 0.93 of the base) |

Engines run one after another, each in a new process. Exit code 1 if an answer differs without a tie, if an engine fails
with a backend that vLLM offers, or if the host waits twice. The script has run only at tiny sizes on CPUs (`--small`,
tests/serve/test_gpu_serve.py), not on a GPU.
"""  # noqa: E501

from __future__ import annotations

import itertools
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpu_answers import Answer, compare
from gpu_sections import Rows, Section, Skipped, main
from tah.benchmarks.measure import in_fresh_process
from tah.errors import first_line

SHARE, AIM = 0.07, 0.93
BATCHING = "two_pass", "mixed"
BACKENDS = ("TRITON_ATTN", "FLASH_ATTN", "FLASHINFER", "FLEX_ATTENTION")  # the others are compared with the first
MISSING = "is not valid for this configuration"  # what vLLM says of a backend that it does not have here
ALIKE = {"hidden_size": 128, "intermediate_size": 192, "head_dim": 64, "vocab_size": 300, "num_hidden_layers": 2}
ALIKE |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512}  # backends take width 64
ALIKE |= {"tie_word_embeddings": False}
TIE_OF_TOKENS, TIE_OF_DECISIONS = 1e-3, 1e-4  # in float32: logits, and continue probability
TIE_IN_HALF = 1.0  # in bfloat16: log-probabilities. A CPU's differ by up to 0.7 from float32 with these weights
DECIDER = {"kind": "mlp", "layers": [0, 1, 2], "hidden_dims": [32], "topk": 8}


def on_gpu() -> bool:
    """Return whether vLLM will run on a GPU; skip the section without vLLM, else prepare the environment."""
    import torch

    if find_spec("vllm") is None:
        raise Skipped("vLLM is not installed")
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    os.environ["TRITON_F32_DEFAULT"] = "ieee"  # else products of float32 in TRITON_ATTN have 10 bits, TF32
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


def ask(
    llm: Any, asked: Sequence[list[int]], new: int, rule: dict[str, Any] | None = None, best: int | None = None
) -> list[Any]:
    """Return vLLM's outputs, greedily, of exactly `new` tokens each, with log-probabilities of the `best` tokens."""
    from vllm import SamplingParams

    options: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "detokenize": False, "logprobs": best}
    params = SamplingParams(max_tokens=new, extra_args=rule, **options)
    return llm.generate([{"prompt_token_ids": ids} for ids in asked], params, use_tqdm=False)


def answered(outs: Sequence[Any]) -> list[Answer]:
    """Return vLLM's answers, with the gaps between the best two tokens if log-probabilities were requested."""
    found = []
    for out in (out.outputs[0] for out in outs):
        best = [sorted((x.logprob for x in each.values()), reverse=True) for each in out.logprobs or ()]
        depths = [int(depth) for depth in out.routed_experts.reshape(-1)]
        found.append(Answer(list(out.token_ids), depths, [x[0] - x[1] for x in best]))
    return found


def served(model: str, asked: list[list[int]], new: int, options: dict[str, Any]) -> list[Answer]:
    """Start an engine and return its answers."""
    return answered(ask(engine(model, 512, 0.3, **options), asked, new))


def expected(model: str, asked: list[list[int]], new: int) -> list[Answer]:
    """Return the answers of `generate` on the same device, one prompt at a time, and how near to ties float64 is."""
    import torch

    from tah.model import TaHForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = TaHForCausalLM.from_pretrained(model, dtype=torch.float32).to(device).eval()
    exact = TaHForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
    options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    found = []
    for prompt in asked:
        ids = torch.tensor([prompt], device=device)
        out = loaded.generate(ids, attention_mask=torch.ones_like(ids), return_dict_in_generate=True, **options)
        with torch.no_grad():
            again = exact(out.sequences[:, :-1].cpu())
        gaps = again.logits[0, len(prompt) - 1 :].topk(2).values.diff().abs().squeeze(1)
        margins = (again.continue_prob[0, :, 0] - exact.config.threshold).abs()
        tokens, depths = out.sequences[0, len(prompt) :].tolist(), out.depth_count[0, :-1].tolist()
        found.append(Answer(tokens, depths, gaps.tolist(), margins.tolist()))
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
        iterated = sum(depth > 1 for one in want for depth in one.depths) / sum(len(one.depths) for one in want)
        for batching, eager in itertools.product(BATCHING, (True,) if small else (True, False)):
            options: dict[str, Any] = {"enforce_eager": eager, "dtype": "float32", "max_num_seqs": 16}
            options |= {"additional_config": {"batching": batching}, "max_num_batched_tokens": 512}
            options |= {"attention_backend": "TRITON_ATTN"} if gpu else {"block_size": 32}
            got = in_fresh_process("vLLM", served, model, asked, new, options)
            found = compare(got, want, TIE_OF_TOKENS, TIE_OF_DECISIONS)
            engine = "eager" if eager else "graphs"
            row = {"batching": batching, "engine": engine, "iterated": iterated, "answers": len(want)}
            yield row | found | {"ok": found["ok"] and 0 < iterated < 1}


def started(model: str, asked: list[list[int]], options: dict[str, Any]) -> tuple[str, str, list[Answer]]:
    """Start an engine, which checks the layout; return shape and strides of a cache, and the answers."""
    llm = engine(model, 512, 0.3, **options)
    caches = llm.llm_engine.model_executor.driver_worker.worker.model_runner.kv_caches
    return str(tuple(caches[0].shape)), str(caches[0].stride()), answered(ask(llm, asked, 4, best=2))


def layouts(small: bool) -> Rows:
    """Start an engine with each attention backend, and compare its answers with those of the first that starts."""
    from gpu_train import QWEN3

    gpu, asked = on_gpu(), prompts(4 if small else 16, 20, 40)
    with tempfile.TemporaryDirectory() as folder:
        _, model = write(Path(folder), QWEN3 | ALIKE, "bfloat16", policy="always", lora_rank=4)
        options: dict[str, Any] = {"dtype": "bfloat16", "enforce_eager": True, "max_num_seqs": 16}
        options |= {} if gpu else {"block_size": 32, "dtype": "float32"}

        def start(backend: str) -> tuple[str, str, list[Answer]]:
            more = {"attention_backend": backend} if gpu else {}
            return in_fresh_process(backend, started, model, asked, options | more)

        yield from by_backend(BACKENDS if gpu else ("CPU_ATTN",), start)


def by_backend(backends: Sequence[str], start: Callable[[str], tuple[str, str, list[Answer]]]) -> Rows:
    """Yield a row per backend.

    Args:
        backends: Names of backends.
        start: Function that returns shape, strides and answers with a backend. An error of it is a failure, unless vLLM
            says that it does not have this backend here.

    Raises:
        RuntimeError: No backend passed.
    """
    first: tuple[str, list[Answer]] | None = None
    passed = 0
    for backend in backends:
        try:
            shape, strides, got = start(backend)
        except RuntimeError as error:
            message = first_line(error)
            yield {"backend": backend, "error": message} | ({} if MISSING in str(error) else {"ok": False})
            continue
        first = first or (backend, [one._replace(margins=[float("inf")] * len(one.depths)) for one in got])
        found = compare(got, first[1], TIE_IN_HALF, 0)
        full = all(len(one.tokens) == 4 and set(one.depths) == {2} for one in got)
        row = {"backend": backend, "shape": shape, "strides": strides, "compared with": first[0], "answers": len(got)}
        yield row | found | {"ok": found["ok"] and full}
        passed += found["ok"] and full
    if not passed:
        raise RuntimeError(f"none of the attention backends {', '.join(backends)} passed")


def waited(model: str, asked: list[list[int]], new: int, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Start an engine and return where the host waits, by kind of step."""
    from gpu_waits import WatchedSteps, control

    llm = engine(model, 512, 0.3, **options)
    ask(llm, asked, new)  # compiles kernels
    with WatchedSteps(llm.llm_engine.model_executor.driver_worker.worker.model) as steps:
        ask(llm, asked, new)
    rows = list(steps.rows())
    return [row | {"ok": row["ok"] and control()} for row in rows]


def waits(small: bool) -> Rows:
    """Count the waits of the second pass: with a policy that reads logits, and with a decider that reads all layers."""
    from gpu_train import QWEN3

    gpu, asked = on_gpu(), prompts(4 if small else 16, 20, 100)
    options: dict[str, Any] = {"dtype": "bfloat16", "max_num_seqs": 16, "max_num_batched_tokens": 512}
    options |= {"additional_config": {"batching": "two_pass"}, "enforce_eager": small}
    options |= {} if gpu else {"block_size": 32, "dtype": "float32"}
    rules: dict[str, dict[str, Any]] = {
        "confidence": {"policy": "confidence", "threshold": 0.5},
        "decider": {"policy": "decider", "decider": DECIDER, "threshold": 0.5},
    }
    for name, rule in rules.items():
        with tempfile.TemporaryDirectory() as folder:
            _, model = write(Path(folder), QWEN3 | ALIKE, options["dtype"], lora_rank=4, **rule)
            for row in in_fresh_process(name, waited, model, asked, 6, options):
                yield {"policy": name} | row


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
        engines: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {"base": (base, {"base": None}, {})}
        for batching in BATCHING:
            rules: dict[str, Any] = {batching: None}
            if batching == BATCHING[0]:
                rules = {"never": {"policy": "never"}} | rules
            more = {"hf_overrides": {"policy": "random", "random_rate": SHARE}}
            engines[batching] = tah, rules, more | {"additional_config": {"batching": batching}}
        first: list[float] = []
        for kind, (model, rules, more) in engines.items():
            found = in_fresh_process(kind, rates, model, counts, lengths, repeats, rules, options | more)
            for name, speeds in found.items():
                first = first or speeds
                for count, rate, of_base in zip(counts, speeds, first, strict=True):
                    aim = ("met" if rate / of_base >= AIM else "not met") if name in BATCHING else None
                    row = {"model": size, "requests": count, "variant": name, "tokens/s": rate}
                    yield row | {"relative to base": rate / of_base, f"aim {AIM}": aim}


SECTIONS = {
    "answers": Section(answers, 240),
    "layouts": Section(layouts, 240),
    "waits": Section(waits, 120),
    "speed": Section(speed, 420),
}

if __name__ == "__main__":
    sys.exit(main("gpu_serve", __doc__ or "", SECTIONS, __file__, minutes=15))
