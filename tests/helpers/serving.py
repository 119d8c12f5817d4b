"""Ask a served model and the reference, `TaHForCausalLM.generate`, the same."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

from helpers.checkpoints import VOCAB
from tah import TaHForCausalLM

Ids = list[int]


@dataclass
class Answer:
    """Tokens produced, and the passes that each token of prompt and answer took."""

    tokens: Ids
    depths: Ids


def prompts(count: int, seed: int = 0, longest: int = 100, shared: int = 0) -> list[Ids]:
    """Random prompts of 1 to `longest` tokens after `shared` common ones."""
    draw = torch.Generator().manual_seed(seed)
    start = torch.randint(3, VOCAB, (shared,), generator=draw).tolist()
    lengths = torch.randint(1, longest + 1, (count,), generator=draw).tolist()
    return [start + torch.randint(3, VOCAB, (length,), generator=draw).tolist() for length in lengths]


@torch.no_grad()
def reference(directory: Path, asked: Sequence[Ids], new_tokens: int, **rule: Any) -> list[Answer]:
    """What `generate` answers, greedily, in one padded batch."""
    model = TaHForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    longest = max(map(len, asked))
    ids = torch.tensor([[2] * (longest - len(prompt)) + prompt for prompt in asked])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in asked])
    out = model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=2,
        return_dict_in_generate=True,
        **rule,
    )
    rows = zip(out.sequences, out.depth_count, asked, strict=True)
    return [
        Answer(tokens[longest:].tolist(), depths[longest - len(prompt) : -1].tolist())
        for tokens, depths, prompt in rows
    ]


@torch.no_grad()
def agree(directory: Path, asked: Sequence[Ids], got: Sequence[Answer], want: Sequence[Answer], **rule: Any) -> bool:
    """Whether answers are the same; one of them may leave the reference where that, in float64, is undecided.

    Float rounding depends on shapes, so a tie of two tokens or of a decision falls differently in another batch.
    """
    different = [at for at, (a, b) in enumerate(zip(got, want, strict=True)) if a != b]
    if not different:
        return True
    model = TaHForCausalLM.from_pretrained(directory, dtype=torch.float64).eval()
    for at in different:
        prompt = asked[at]
        out = model(torch.tensor([prompt + want[at].tokens[:-1]]), **rule)
        gap = out.logits[0].topk(2).values.diff().abs().squeeze(1)[len(prompt) - 1 :]
        margin = (out.continue_prob[0, :, 0] - rule.get("threshold", model.config.threshold)).abs()
        token = first_difference(got[at].tokens, want[at].tokens)
        depth = first_difference(got[at].depths, want[at].depths)
        tie = depth is not None and (token is None or depth < len(prompt) + token) and margin[depth] < 1e-4
        if not tie and (token is None or gap[token] > 1e-3):
            return False
    return len(different) <= 1


def first_difference(a: Ids, b: Ids) -> int | None:
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), None)


class Served:
    """An engine in this process."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.engine = llm.llm_engine
        self.scheduler = self.engine.engine_core.engine_core.scheduler
        self.model = self.engine.model_executor.driver_worker.worker.model_runner.model
        self.preempted = 0
        preempt = self.scheduler._preempt_request

        def count(*args: Any, **kwargs: Any) -> None:
            self.preempted += 1
            preempt(*args, **kwargs)

        self.scheduler._preempt_request = count

    def params(self, new_tokens: int, rule: dict[str, Any] | None = None, **options: Any) -> SamplingParams:
        options = {"temperature": 0, "ignore_eos": True, "max_tokens": new_tokens, **options}
        return SamplingParams(extra_args=rule, **options)

    def ask(self, asked: Sequence[Ids], new_tokens: int, rules: Sequence[dict[str, Any]] = ()) -> list[Answer]:
        params = [self.params(new_tokens, rule) for rule in rules or [{}] * len(asked)]
        outs = self.llm.generate([{"prompt_token_ids": prompt} for prompt in asked], params, use_tqdm=False)
        self.check_pool()
        return [answer(out) for out in outs]

    def check_pool(self) -> None:
        """Nothing is lost: every entry is free or belongs to one slot, and the scheduler knows how many are free."""
        pool = self.model.pool
        live = pool.entries[pool.entries >= 0].tolist()
        free = pool.unused[: pool.free].tolist()
        assert sorted(live + free) == list(range(pool.capacity))
        stale = (pool.entry_of_slot.cpu().numpy() != pool.entries).nonzero()[0]
        assert set(stale.tolist()) <= {slot for slots in pool.changed for slot in slots.tolist()}
        assert self.scheduler.deep_free == pool.free and sum(self.scheduler.deep_in_block.values()) == len(live)


def answer(out: Any) -> Answer:
    """Of vLLM's output for one request."""
    return Answer(list(out.outputs[0].token_ids), out.outputs[0].routed_experts.tolist())


@contextmanager
def serve(directory: Path, **options: Any) -> Iterator[Served]:
    """The model at `directory`, in float32, with little memory, without the check at the start."""
    additional = {"self_check": False, **options.pop("additional_config", {})}
    options = {
        "additional_config": additional,
        "dtype": "float32",
        "max_model_len": 256,
        "max_num_seqs": 8,
        "block_size": 32,
        "enforce_eager": True,
        "gpu_memory_utilization": 0.05,
        **options,
    }
    with served_by(LLM(str(directory), **options)) as served:
        yield served


@contextmanager
def served_by(llm: LLM) -> Iterator[Served]:
    """An engine that ends with the context."""
    served = Served(llm)
    try:
        yield served
    finally:
        del llm, served.llm, served.engine, served.scheduler, served.model
        cleanup_dist_env_and_memory()
        gc.collect()


def iterated(answers: Sequence[Answer]) -> float:
    """Share of tokens that iterated."""
    depths = [depth for one in answers for depth in one.depths]
    return sum(depth > 1 for depth in depths) / len(depths)
