"""vLLM's worker, which also sizes the pool and passes data between scheduler and model.

`DepthCPUWorker` and `DepthGPUWorker` are vLLM's workers for the two kinds of devices with `DepthWorker` before them.
vLLM's worker has one of two runners. With runner V1, the second pass runs inside the runner's call of the model. With
V2, it runs after the runner's step, so that depth 1 may be a CUDA graph; but a step that runs deferred tokens beside
depth 1 (`batching="mixed"`) has no graph, and runs inside the call of the model as with V1.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from vllm.config import CUDAGraphMode
from vllm.forward_context import set_forward_context
from vllm.platforms import current_platform

from .graphs import record_graphs
from .memory import second_pass_bytes
from .self_check import check
from .step import RunningRequests, Step
from .transfer import indices
from .warm_up import warm_up

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_worker import Worker

    from .model import TaHForCausalLM
else:
    Worker = object


class DepthWorker(Worker):
    """What a worker of vLLM needs for a TaH model."""

    requests: RunningRequests
    serving = False  # whether start-up is over; before, vLLM runs steps that its scheduler does not know
    scheduled: Any = None  # output of the scheduler for the running step; None in a step of vLLM's own

    @property
    def model(self) -> TaHForCausalLM:
        """The model itself. On a GPU, the runner's `model` may be a wrapper, which loses what is written to it."""
        model: Any = self.model_runner.get_model()
        return model

    @property
    def share(self) -> float:
        """Pool entries per depth-1 slot."""
        return self.vllm_config.additional_config["deep_kv_share"]

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model, and let the runner expect the hidden states that the decider reads."""
        super().load_model(*args, **kwargs)
        self.model_runner.use_aux_hidden_state_outputs = bool(self.model.decoder.aux_hidden_state_layers)

    def determine_available_memory(self) -> int:
        """Return the bytes of vLLM's KV cache: all available bytes except those of the second pass and of the pool.

        On a CPU, a setting of vLLM names the bytes of both caches, as `--kv-cache-memory-bytes` does on a GPU. Else
        vLLM has measured the working memory of depth 1 only.

        `pool.capacity` sizes the pool by the share or by the longest request. If the longest request needs more than
        half of the bytes, cache and pool get a half each.
        """
        given = self.cache_config.kv_cache_memory_bytes  # vLLM's plan of an earlier start may set it below
        whole = super().determine_available_memory()
        if not (current_platform.is_cpu() or given):
            whole -= self._second_pass_bytes()
        slot = sum(spec.page_size_bytes / spec.block_size for spec in self.get_kv_cache_spec().values())
        longest = self.model_config.max_model_len * slot
        return int(min(whole / (1 + self.share), max(whole - longest, whole / 2)))

    def _second_pass_bytes(self) -> int:
        scheduler, size = self.vllm_config.scheduler_config, self.model_config.dtype.itemsize
        most = scheduler.max_num_batched_tokens, scheduler.max_num_seqs, size
        processes = self.parallel_config.tensor_parallel_size
        return second_pass_bytes(self.model.config, *most, processes, mixed=self.model.mixed)

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """Allocate vLLM's KV cache, then the pool."""
        super().initialize_from_config(kv_cache_config)
        longest, (group,) = self.model_config.max_model_len, kv_cache_config.kv_cache_groups
        size = group.kv_cache_spec.block_size
        self.model.prepare(self.share, longest, size)
        seats = self.vllm_config.scheduler_config.max_num_seqs
        self.requests = RunningRequests(self.model.config, size, seats, longest)
        runner: Any = self.model_runner
        if not self.use_v2_model_runner:
            runner._model_forward = partial(self._forward, runner._model_forward)
            return
        graphs, state = runner.cudagraph_manager, runner.model_state
        graphs.dispatch = partial(self._dispatch, graphs.dispatch)
        state.prepare_inputs = partial(self._prepare_inputs, state.prepare_inputs)
        runner.sample = partial(self._sample, runner.sample)

    def compile_or_warm_up_model(self) -> Any:
        """Compile and warm up both depths, and check the model; from then on steps come from the scheduler."""
        # Before vLLM's warm-up, at whose end it begins to report compilations.
        warm_up(self.model, self.vllm_config)
        if self._has_graphs:
            self.model.graphs = record_graphs(self.model, self.vllm_config)
        found = super().compile_or_warm_up_model()
        self.serving = True
        if self.vllm_config.additional_config["self_check"]:
            check(self)
        return found

    @property
    def _has_graphs(self) -> bool:
        """Whether passes at depth 2 run as CUDA graphs: where depth 1 may have some, unless a setting says no."""
        graphs = self.vllm_config.compilation_config.cudagraph_mode != CUDAGraphMode.NONE
        return self.model.by_kernel and graphs and self.vllm_config.additional_config["second_pass_graphs"]

    def execute_model(self, scheduler_output: Any) -> Any:
        """Run a step. One that vLLM makes up to warm up has depth 1 only."""
        if not self.serving:
            return super().execute_model(scheduler_output)
        for request in self.requests.update(scheduler_output):
            self.model.waiting.leave(request)
        self.model.report = None
        self.scheduled = scheduler_output
        try:
            out = super().execute_model(scheduler_output)
            if self.use_v2_model_runner and self.model.report is None:
                self._second_pass()
            return out
        finally:
            self.scheduled = None

    def _forward(self, depth_one: Any, **inputs: Any) -> Any:
        """Run the model in a step of runner V1, in place of `depth_one`, the runner's own call."""
        if self.scheduled is None:
            return depth_one(**inputs)
        names = self.model_runner.input_batch.req_ids
        step = self._step(names, inputs["input_ids"], inputs["positions"])
        hidden = self.model.run_step(step, partial(depth_one, **inputs))
        return (hidden, []) if self.model_runner.use_aux_hidden_state_outputs else hidden

    @property
    def _in_one(self) -> bool:
        """Whether the running step runs both depths inside runner V2's call of the model, for tokens that wait."""
        return self.scheduled is not None and bool(self.model.waiting)

    def _dispatch(self, stock: Any, num_reqs: int, num_tokens: int, *others: Any, **more: Any) -> Any:
        """Select runner V2's CUDA graph, as `stock` does; graphs have depth 1, so a step of mixed depths has none."""
        if not self._in_one:
            return stock(num_reqs, num_tokens, *others, **more)
        from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor  # has kernels of Triton

        return BatchExecutionDescriptor(CUDAGraphMode.NONE, num_tokens, num_reqs)

    def _prepare_inputs(self, stock: Any, batch: Any, states: Any) -> dict[str, Any]:
        """Return what runner V2 gives to the model beside its usual inputs; in a step of mixed depths, the step."""
        inputs: dict[str, Any] = stock(batch, states)
        if self._in_one:
            inputs["step"] = self._step(batch.req_ids, batch.input_ids, batch.positions)
        return inputs

    def _sample(self, stock: Any, hidden: Any, batch: Any, grammar: Any) -> tuple[Any, Any, Any]:
        """Sample with runner V2, but no token for a request whose last token is deferred.

        As after a rejected draft of speculative decoding, the runner counts no sampled token and one token less as
        computed: that token is the next one to run. The draw of a seed depends on the position, so it is repeated.
        """
        out, sampled, rejected = stock(hidden, batch, grammar)
        deferred = set(self.model.report.deferred) if self.model.report is not None else set()
        if rows := [row for row, request in enumerate(batch.req_ids) if request in deferred]:
            (at,) = indices(sampled.device, np.array(rows))
            sampled.index_fill_(0, at, 0)
            rejected.index_fill_(0, at, 1)
        return out, sampled, rejected

    @torch.inference_mode()
    def _second_pass(self) -> None:
        """Run the second pass after a step of runner V2, which keeps what it has computed for its sampler."""
        runner: Any = self.model_runner
        state = runner.execute_model_state
        if state is None:  # the step had no tokens
            return
        batch = state.input_batch
        step = self._step(batch.req_ids, batch.input_ids, batch.positions)
        out = state.hidden_states
        if runner.use_aux_hidden_state_outputs:
            out = out, state.aux_hidden_states
        with set_forward_context(None, self.vllm_config, num_tokens=step.tokens):
            hidden = self.model.run_step(step, lambda: out)
        runner.execute_model_state = state._replace(hidden_states=hidden, aux_hidden_states=None)

    def _step(self, names: list[str], ids: Any, positions: Any) -> Step:
        return self.requests.step(names, self.scheduled.num_scheduled_tokens, ids, positions)

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Sample the next tokens, and add the model's report to the output, where the scheduler reads it."""
        if self.use_v2_model_runner:
            out = super().sample_tokens(grammar_output)
            if out is not None:
                out.model_runner_output.report = self.model.report
            return out
        with self._held_back():
            out = super().sample_tokens(grammar_output)
        out.report = self.model.report
        return out

    @contextmanager
    def _held_back(self) -> Iterator[None]:
        """Keep runner V1 from sampling for requests whose last token is deferred.

        vLLM has a mask of requests without a sampled token, those in the middle of their prompt. For these it also
        rewinds the random generator of the seed by a step, which CPU generators do not support; so this method hides
        their generators from vLLM.
        """
        report, runner = self.model.report, self.model_runner
        batch, unsampled = runner.input_batch, runner.discard_request_mask.np
        for request in report.deferred if report is not None else ():
            if request in batch.req_id_to_index:
                unsampled[batch.req_id_to_index[request]] = True
        kept = {row: batch.generators.pop(row) for row in list(batch.generators) if unsampled[row]}
        try:
            yield
        finally:
            batch.generators.update(kept)


@cache
def _worker(name: str) -> type:
    """Return the class of this name. The CPU worker of vLLM is imported where it is used only."""
    if name == "DepthCPUWorker":
        from vllm.v1.worker.cpu_worker import CPUWorker

        return type(name, (DepthWorker, CPUWorker), {"__doc__": "vLLM's CPU worker around a TaH model."})
    from vllm.v1.worker.gpu_worker import Worker

    return type(name, (DepthWorker, Worker), {"__doc__": "vLLM's GPU worker around a TaH model."})


def __getattr__(name: str) -> type:
    if name not in ("DepthCPUWorker", "DepthGPUWorker"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _worker(name)
