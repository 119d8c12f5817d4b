"""vLLM's scheduler, which also reserves pool entries for depth 2 and returns the depths of every request's tokens."""

from __future__ import annotations

import json
import time
from collections import Counter, OrderedDict
from itertools import islice
from typing import Any

from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.request_queue import SchedulingPolicy
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request

from .pool import capacity
from .report import StepNumbers, StepReport
from .requests import DepthLog, RequestOptions


class DepthScheduler(Scheduler):
    """Scheduler that never schedules more tokens than there are free pool entries, so all of them may iterate.

    If this limit would delay requests, the scheduler first frees entries of unused cached prefixes, and then preempts
    a request: the one that vLLM preempts when its KV cache is full. No decision to iterate depends on free entries.
    """

    max_num_scheduled_tokens: int

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        model = self.vllm_config.model_config
        slots = self.kv_cache_config.num_blocks * self.block_size
        share = self.vllm_config.additional_config["deep_kv_share"]
        self.deep_free = self.deep_capacity = capacity(slots, share, model.max_model_len)
        self.deep_in_block: Counter[int] = Counter()  # number of entries by physical block
        self.left: OrderedDict[int, None] = OrderedDict()  # blocks that a request has left; the first give up first
        self.config = model.hf_config
        self.usual = RequestOptions.of(self.config, None).key
        self.logs: dict[str, DepthLog] = {}  # by request
        self.ended: dict[str, DepthLog] = {}  # by request that ended in the running step
        self.numbers: StepNumbers | None = None  # numbers of the latest step, for the metrics

    def add_request(self, request: Request) -> None:
        """Add a request, which shares cached prefixes only with requests of the same rule (as depth-2 keys do)."""
        if request.request_id not in self.requests:  # else this is a later part of the input of a known request
            options = RequestOptions.of(self.config, request.sampling_params.extra_args)
            self.logs[request.request_id] = DepthLog()
            if request.cache_salt is not None or options.key != self.usual:
                # Both, so that no salt of a client equals the one of another rule.
                request.cache_salt = json.dumps([request.cache_salt, str(options.key)])
                request.block_hashes = []
                request.update_block_hashes()
        super().add_request(request)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """Schedule a step with at most as many tokens as there are free pool entries."""
        given_up = self._make_room()
        limit: int = self.max_num_scheduled_tokens
        self.max_num_scheduled_tokens = min(limit, self.deep_free)
        try:
            output = super().schedule(*args, **kwargs)
        finally:
            self.max_num_scheduled_tokens = limit
        output.given_up = given_up  # the worker reads it
        return output

    def _make_room(self) -> list[int]:
        """Free pool entries, so that all tokens of this step may iterate; return the physical blocks of freed ones."""
        seats = self.max_num_running_reqs - len(self.running)
        wanted = sum(request.num_tokens - request.num_computed_tokens for request in self.running)
        wanted += sum(request.num_tokens for request in islice(self.waiting, seats))
        wanted = min(wanted, self.max_num_scheduled_tokens)
        given_up = self._give_up(wanted)
        while self.deep_free < len(self.running) and len(self.running) > 1:
            last = self.running[-1]
            if self.policy == SchedulingPolicy.PRIORITY:
                last = max(self.running, key=lambda request: (request.priority, request.arrival_time))
            self.running.remove(last)
            self._preempt_request(last, time.monotonic())
            self.prev_step_scheduled_req_ids.discard(last.request_id)
            given_up += self._give_up(wanted)
        return given_up

    def _give_up(self, wanted: int) -> list[int]:
        """Drop blocks that no request uses, the longest unused first, until `wanted` entries are free.

        A block is looked at once after each request that leaves it, so the cost does not depend on the number of blocks
        that are free. Most of these have no entries: vLLM's queue of free blocks begins with those never used.
        """
        blocks: list[int] = []
        pool = self.kv_cache_manager.block_pool
        while self.deep_free < wanted and self.left:
            number, _ = self.left.popitem(last=False)
            if self.deep_in_block[number] and pool.blocks[number].ref_cnt == 0:
                blocks.append(number)
                self.deep_free += self.deep_in_block.pop(number)
        pool.evict_blocks(set(blocks))
        return blocks

    def _free_request_blocks(self, request: Request) -> None:
        """Note the blocks that the request leaves, then free them.

        As in vLLM, the end of a request gives up before its beginning, and blocks that no other request can find in the
        prefix cache give up before all others.
        """
        pool = self.kv_cache_manager.block_pool
        for number in reversed(self.kv_cache_manager.get_block_ids(request.request_id)[0]):
            self.left[number] = None
            self.left.move_to_end(number, last=pool.blocks[number].block_hash is not None)
        super()._free_request_blocks(request)

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput) -> Any:
        """Update the state after a step, and add the new depths to each request's output."""
        report: StepReport | None = getattr(model_runner_output, "report", None)
        if report is not None:
            self.deep_free = report.free
            self.deep_in_block.update(slot // self.block_size for slot in report.taken)
            self.deep_in_block.subtract(slot // self.block_size for slot in report.released)
            for request, (start, depths) in report.depths.items():
                if request in self.logs:  # a request may have been aborted during the step
                    self.logs[request].depths[start:] = depths
            deferred = set(report.deferred) & set(scheduler_output.num_scheduled_tokens)
            for request in deferred & set(self.requests):
                self.requests[request].num_computed_tokens -= 1  # so that vLLM schedules its newest token again
            shallow = scheduler_output.total_num_scheduled_tokens - report.repeated - len(report.taken)
            used = self.deep_capacity - report.free
            self.numbers = StepNumbers(shallow, len(report.taken), used, self.deep_capacity)
        found = super().update_from_output(scheduler_output, model_runner_output)
        for output in (output for part in found.values() for output in part.outputs):
            log = self.logs.get(output.request_id) or self.ended[output.request_id]
            output.routed_experts = log.news()  # vLLM's array per token; vLLM concatenates the parts of an answer
        self.ended.clear()
        return found

    def make_stats(self, *args: Any, **kwargs: Any) -> SchedulerStats | None:
        """Return vLLM's statistics, with the numbers of the latest step."""
        stats = super().make_stats(*args, **kwargs)
        if stats is not None and self.numbers is not None:
            self.numbers.put(stats)
            self.numbers = None
        return stats

    def _free_request(self, request: Request, *args: Any, **kwargs: Any) -> Any:
        self.ended[request.request_id] = self.logs.pop(request.request_id)
        return super()._free_request(request, *args, **kwargs)
