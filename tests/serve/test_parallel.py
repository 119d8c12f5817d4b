"""Processes that split the weights between them (`--tensor-parallel-size 2`) answer as one does."""

from __future__ import annotations

import gc
import json

import pytest

pytest.importorskip("vllm", reason="serving is tested where vLLM is installed: make serve-test")

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

from helpers.checkpoints import TAH2, tiny
from helpers.serving import agree, answer, iterated, prompts, reference

NEW = 48
MIXED = prompts(22, seed=1)  # 1,056 tokens
MLP = {"kind": "mlp", "layers": [0, 2, 3], "hidden_dims": [32, 16], "topk": 20}


@pytest.mark.timeout(900)  # three processes start, on a busy machine
@pytest.mark.parametrize(
    ("family", "batching", "heads", "config", "rules"),
    [
        pytest.param("llama", "mixed", 2, {}, [{}], marks=pytest.mark.slow),
        ("qwen3", "mixed", 2, TAH2, [{}]),
        ("qwen3", "two_pass", 1, {"decider": MLP}, [{}, {"policy": "confidence", "threshold": 0.94}]),
        pytest.param("phi3", "mixed", 2, {}, [{}], marks=pytest.mark.slow),
        pytest.param("qwen3_moe", "two_pass", 2, {}, [{}], marks=pytest.mark.slow),
    ],
    ids=[
        "a key head each",
        "TaH2",
        "one key head in both, policies that look at logits",
        "layers fused twice",
        "experts",
    ],
)
def test_two_processes(tmp_path, monkeypatch, family, batching, heads, config, rules):
    """The check at the start, chunked prompts, then requests that are preempted for want of blocks."""
    monkeypatch.setenv("TAH_CACHE", str(tmp_path / "cache"))
    model = tiny(tmp_path / "model", family, key_heads=heads, **config)
    parts = [MIXED[at :: len(rules)] for at in range(len(rules))]
    want = [reference(model, part, NEW, **rule) for part, rule in zip(parts, rules, strict=True)]
    assert all(0.05 < iterated(answers) < 0.5 for answers in want)
    llm = LLM(
        str(model), dtype="float32", max_model_len=256, max_num_seqs=8, block_size=32, enforce_eager=True,
        gpu_memory_utilization=0.05, num_gpu_blocks_override=16, max_num_batched_tokens=48, tensor_parallel_size=2,
        additional_config={"batching": batching},
    )  # fmt: skip
    try:
        (checked,) = (json.loads(path.read_text()) for path in (tmp_path / "cache" / "self-check").iterdir())
        assert checked["passed"] and checked["identity"]["processes"] == 2
        params = [
            SamplingParams(temperature=0, ignore_eos=True, max_tokens=NEW, extra_args=rules[at % len(rules)])
            for at in range(len(MIXED))
        ]
        outs = llm.generate([{"prompt_token_ids": prompt} for prompt in MIXED], params, use_tqdm=False)
        for at, (part, rule) in enumerate(zip(parts, rules, strict=True)):
            got = [answer(out) for out in outs[at :: len(rules)]]
            assert agree(model, part, got, want[at], **rule)
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        assert scheduler.deep_free + sum(scheduler.deep_in_block.values()) == scheduler.deep_capacity
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()
        gc.collect()
