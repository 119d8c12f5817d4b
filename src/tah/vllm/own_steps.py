"""Steps that the worker makes itself, without vLLM's scheduler, to run given tokens through its runner.

They take the whole path of a served step: the runner's inputs, block tables and forward, then the second pass. All
tokens are those of a prompt, so that the runner takes given tokens and not sampled ones. After the first steps, a
request runs one token a step, as an answer does.

Shapes: N tokens of a request, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from vllm import SamplingParams
from vllm.v1.core.sched.output import CachedRequestData, NewRequestData, SchedulerOutput

from .waiting import WaitingTokens


@dataclass
class Given:
    """A request of given tokens, and what the model made of it."""

    name: str
    ids: list[int]  # [N]
    rule: dict[str, Any]  # fields of the request, as in `vllm_xargs`
    chunks: list[int]  # numbers of tokens of the first steps; later steps have one token
    blocks: list[int] = field(default_factory=list)  # physical blocks of its keys
    computed: int = 0
    steps: int = 0
    depths: list[int] = field(default_factory=list)  # [N]
    hidden: dict[int, Tensor] = field(
        default_factory=dict
    )  # by position: final hidden state [D], or a row of a mixture

    @property
    def waits(self) -> bool:
        """Whether tokens have not run."""
        return self.computed < len(self.ids)

    def take(self, most: int) -> int:
        """Return the number of tokens of its next step, at most `most`."""
        wanted = self.chunks[self.steps] if self.steps < len(self.chunks) else 1
        return min(wanted, most, len(self.ids) - self.computed)


class OwnSteps:
    """Runs requests of given tokens to their end, all of them side by side.

    Args:
        worker: Worker whose warm-up is over, and whose scheduler has not begun.
        requests: Requests, with blocks.
    """

    def __init__(self, worker: Any, requests: list[Given]) -> None:
        self.worker, self.requests = worker, requests

    def run(self) -> None:
        """Run all tokens."""
        with self._noted():
            while running := [one for one in self.requests if one.waits]:
                most = self.worker.vllm_config.scheduler_config.max_num_batched_tokens // len(running)
                self._step([(one, one.take(most)) for one in running])

    def end(self) -> None:
        """Let runner and model forget the requests; their keys stay where they are."""
        out = SchedulerOutput.make_empty()
        out.finished_req_ids = {one.name for one in self.requests}
        out.given_up = []
        self.worker.execute_model(out)
        self.worker.model.waiting = WaitingTokens()  # deferred tokens of an ended request would run in the next step

    def _step(self, counts: list[tuple[Given, int]]) -> None:
        """Run one step with a number of tokens of each request."""
        out = SchedulerOutput.make_empty()
        out.given_up = []
        out.num_scheduled_tokens = {one.name: count for one, count in counts}
        out.total_num_scheduled_tokens = sum(out.num_scheduled_tokens.values())
        out.scheduled_new_reqs = [self._new(one, count) for one, count in counts if not one.steps]
        later = [(one, count) for one, count in counts if one.steps]
        cached = out.scheduled_cached_reqs = CachedRequestData.make_empty()
        cached.req_ids = [one.name for one, _ in later]
        cached.new_block_ids = [None] * len(later)
        cached.num_computed_tokens = [one.computed for one, _ in later]
        cached.num_output_tokens = [0] * len(later)
        for one, count in later:  # as if it had no later tokens, so that `mixed` defers its last one
            self.worker.requests.by_name[one.name].prompt = one.computed + count
        self.worker.execute_model(out)
        report = self.worker.model.report
        self.worker.sample_tokens(None)
        for one, count in counts:
            start, depths = report.depths[one.name]
            one.depths[start:] = depths
            one.steps += 1
            one.computed += count - (one.name in report.deferred)

    def _new(self, one: Given, count: int) -> NewRequestData:
        """Return what vLLM's scheduler tells of a new request."""
        v2 = self.worker.use_v2_model_runner
        return NewRequestData(
            req_id=one.name,
            prompt_token_ids=one.ids,
            mm_features=[],
            sampling_params=SamplingParams(temperature=0, max_tokens=1, extra_args=one.rule),
            pooling_params=None,
            block_ids=(one.blocks,),
            num_computed_tokens=0,
            lora_request=None,
            prefill_token_ids=one.ids if v2 else one.ids[:count],  # only V2 reads it; for `mixed`, see `_step`
        )

    @contextmanager
    def _noted(self) -> Iterator[None]:
        """Keep the hidden states of the steps inside, except those of tokens whose second pass is deferred."""
        model, by_name = self.worker.model, {one.name: one for one in self.requests}
        stock, stock_logits = model.run_step, model._logits
        made: list[Any] = []

        def logits(hidden: Tensor, last: Any) -> Any:
            made[:] = [stock_logits(hidden, last)]
            return made[0]

        def run_step(step: Any, depth_one: Any) -> Tensor:
            out: Tensor = stock(step, depth_one)
            # Of a mixture, the runner gets the states of depth 1 only, unless it reads log-probabilities of a prompt.
            hidden = made[0].output(for_prompts=True) if model.mixes else out
            deferred = set(model.report.taken) if model.waiting.by_request else set()
            for row, (owner, place) in enumerate(zip(step.owners.tolist(), step.places.tolist(), strict=True)):
                if step.slots[row] not in deferred:
                    by_name[step.request_ids[owner]].hidden[place] = hidden[row].clone()
            return out

        model.run_step, model._logits = run_step, logits
        try:
            yield
        finally:
            del model.run_step, model._logits
