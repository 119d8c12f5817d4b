"""The tokens of one step, and the record of running requests from which it is made.

All of it is known on the host before the step runs: vLLM's scheduler tells the worker which tokens of which requests
run, and in which blocks their keys are. So the second pass waits for the device only to learn which tokens iterate.

Shapes: T tokens of the step, R requests, N blocks of a request, S slots per block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from ..config import TaHConfig
from .requests import RequestOptions

if TYPE_CHECKING:
    from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput


@dataclass
class Step:
    """The tokens of one step, ordered by request. Only `ids` and `positions` are on the device."""

    request_ids: list[str]  # [R]
    options: list[RequestOptions]  # [R]
    starts: np.ndarray  # [R + 1] index of the first token of each request
    first: np.ndarray  # [R] position of the first token of each request
    owners: np.ndarray  # [T] number of each token's request
    places: np.ndarray  # [T] positions
    slots: np.ndarray  # [T] physical slots of the depth-1 keys
    tables: np.ndarray  # [R, N] physical blocks of each request; arbitrary beyond those that it has
    emits: np.ndarray  # [R] bool: whether the request has no later token, so that its next token is sampled
    with_prompt: np.ndarray  # [R] bool: whether vLLM reads log-probabilities of the prompt in this step
    fresh: np.ndarray  # [R] bool: whether no token of the request ran before
    given_up: np.ndarray  # blocks whose pool entries are freed before this step
    ids: Tensor  # [T] token ids
    positions: Tensor  # [T]

    @property
    def tokens(self) -> int:
        """Number of tokens, T."""
        return len(self.owners)

    @property
    def last(self) -> np.ndarray:
        """Index of the last token of each request, [R]."""
        return self.starts[1:] - 1


@dataclass
class Running:
    """What the worker knows of one request."""

    options: RequestOptions
    row: int  # of `RunningRequests.tables`
    prompt: int  # number of tokens of the prompt
    reads_prompt: bool  # whether the response has log-probabilities of the prompt
    blocks: int = 0  # number of blocks
    computed: int = 0  # number of tokens that ran before this step, or whose keys are cached
    known: int = 0  # number of tokens, with those generated so far
    fresh: bool = True  # whether no token ran before


class RunningRequests:
    """What the worker knows of all requests.

    Args:
        config: Configuration of the checkpoint.
        block_size: Slots per block of vLLM's scheduler, S. Kernels may use smaller blocks.
        requests: Number of requests for which there is room at first.
        longest: Maximum tokens of a request.
    """

    def __init__(self, config: TaHConfig, block_size: int, requests: int, longest: int) -> None:
        self.config, self.block_size = config, block_size
        self.by_name: dict[str, Running] = {}
        self.tables = np.zeros((requests, -(-longest // block_size) + 1), np.int32)  # [rows, N] physical blocks
        self.unused = list(range(requests))  # rows of `tables`
        self.given_up: list[int] = []  # blocks whose pool entries the next step frees

    def update(self, scheduled: SchedulerOutput) -> list[str]:
        """Take over what the scheduler decided for a step.

        Returns:
            Requests that ended, were preempted or run again from an earlier token. Their order is the same in all
            processes.
        """
        for name in scheduled.finished_req_ids:
            if (ended := self.by_name.pop(name, None)) is not None:
                self.unused.append(ended.row)
        for new in scheduled.scheduled_new_reqs:
            self._add(new)
        cached = scheduled.scheduled_cached_reqs
        more = zip(cached.req_ids, cached.new_block_ids, cached.num_computed_tokens, strict=True)
        for (name, blocks, computed), answered in zip(more, cached.num_output_tokens, strict=True):
            one = self.by_name[name]
            one.computed, one.known = computed, one.prompt + answered
            if name in cached.resumed_req_ids:
                one.blocks = 0
            if blocks is not None:
                self._append(one, blocks[0])
        self.given_up += scheduled.given_up
        gone = scheduled.finished_req_ids | (scheduled.preempted_req_ids or set()) | cached.resumed_req_ids
        return sorted(gone)

    def _add(self, new: NewRequestData) -> None:
        """Add a request. One that is known already was preempted, or has a later part of its input."""
        assert new.sampling_params is not None and new.prompt_token_ids is not None
        one, prompt = self.by_name.get(new.req_id), len(new.prompt_token_ids)
        if one is None:
            if not self.unused:  # preempted requests keep their rows
                rows = len(self.tables)
                self.unused += range(rows, 2 * rows)
                self.tables = np.concatenate([self.tables, np.zeros_like(self.tables)])
            options = RequestOptions.of(self.config, new.sampling_params.extra_args)
            wanted = new.sampling_params.prompt_logprobs, new.sampling_params.prompt_logprob_token_ids
            reads_prompt = any(what is not None for what in wanted)  # runner V2 has the second one, too
            one = self.by_name[new.req_id] = Running(options, self.unused.pop(), prompt, reads_prompt)
        one.prompt, one.computed, one.blocks = prompt, new.num_computed_tokens, 0
        one.known = len(new.prefill_token_ids or new.prompt_token_ids)
        self._append(one, new.block_ids[0])

    def _append(self, one: Running, blocks: list[int]) -> None:
        self.tables[one.row, one.blocks : one.blocks + len(blocks)] = blocks
        one.blocks += len(blocks)

    def step(self, names: list[str], tokens: dict[str, int], ids: Tensor, positions: Tensor) -> Step:
        """Return the step of the requests `names`, in the order of vLLM's batch.

        Args:
            names: Requests, [R].
            tokens: Number of tokens of the step by request.
            ids: Token ids, [T] or padded.
            positions: Positions, [T] or padded.
        """
        found = [self.by_name[name] for name in names]
        counts = np.array([tokens[name] for name in names])
        starts = np.concatenate([[0], counts.cumsum()])
        T = int(starts[-1])
        first = np.array([one.computed for one in found])
        owners = np.repeat(np.arange(len(found)), counts)
        places = np.arange(T) + (first - starts[:-1])[owners]
        tables = self.tables[[one.row for one in found], : max((one.blocks for one in found), default=0)]
        slots = tables[owners, places // self.block_size].astype(np.int64) * self.block_size
        step = Step(
            request_ids=names,
            options=[one.options for one in found],
            starts=starts,
            first=first,
            owners=owners,
            places=places,
            slots=slots + places % self.block_size,
            tables=tables,
            emits=first + counts >= [one.known for one in found],
            with_prompt=np.array([one.reads_prompt and one.computed < one.prompt for one in found]),
            fresh=np.array([one.fresh for one in found]),
            given_up=np.array(self.given_up, np.int64),
            ids=ids[:T],
            positions=positions[:T],
        )
        self.given_up = []
        for one in found:
            one.fresh = False
        return step
