"""vLLM's worker, which also sizes the pool and passes data between scheduler and model."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

from .requests import RequestOptions


class DepthCPUWorker(CPUWorker):
    """vLLM's CPU worker around a TaH model."""

    @property
    def share(self) -> float:
        """Pool entries per depth-1 slot."""
        return self.vllm_config.additional_config["deep_kv_share"]

    def determine_available_memory(self) -> int:
        """Return the bytes of vLLM's KV cache: all available bytes except those of the pool.

        `pool.capacity` sizes the pool by the share or by the longest request. If the longest request needs more than
        half of the bytes, cache and pool get a half each.
        """
        whole = super().determine_available_memory()
        slot = sum(spec.page_size_bytes / spec.block_size for spec in self.get_kv_cache_spec().values())
        longest = self.model_config.max_model_len * slot
        return int(min(whole / (1 + self.share), max(whole - longest, whole / 2)))

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """Allocate vLLM's KV cache, then the pool, and connect the model to the state of the runner."""
        super().initialize_from_config(kv_cache_config)
        model = self.model_runner.model
        model.prepare(self.share, self.model_config.max_model_len)
        model.request_ids = lambda: self.model_runner.input_batch.req_ids
        model.unsampled = lambda: self.model_runner.discard_request_mask.np
        model.prompt_logprobs = lambda: self.model_runner.num_prompt_logprobs

    def execute_model(self, scheduler_output: Any) -> Any:
        """Run a step, after the model has got its new, ended and preempted requests."""
        model = self.model_runner.model
        for request in scheduler_output.scheduled_new_reqs:
            model.options[request.req_id] = RequestOptions.of(model.config, request.sampling_params.extra_args)
            model.fresh.add(request.req_id)
        gone = scheduler_output.finished_req_ids | (scheduler_output.preempted_req_ids or set())
        # The order must be the same in all processes, since they add up their parts of each row.
        for request in sorted(gone | scheduler_output.scheduled_cached_reqs.resumed_req_ids):
            model.waiting.leave(request)
        model.given_up += scheduler_output.given_up
        model.report = None
        out = super().execute_model(scheduler_output)
        for request in scheduler_output.finished_req_ids:
            model.options.pop(request, None)
        return out

    def sample_tokens(self, grammar_output: Any) -> Any:
        """Sample the next tokens, except for requests whose last token is deferred.

        vLLM has a mask of requests without a sampled token, those in the middle of their prompt. For these it also
        rewinds the random generator of the seed by a step, which CPU generators do not support; so this method hides
        their generators from vLLM.
        """
        model, batch = self.model_runner.model, self.model_runner.input_batch
        unsampled = self.model_runner.discard_request_mask.np
        for request in model.report.deferred if model.report is not None else ():
            if request in batch.req_id_to_index:
                unsampled[batch.req_id_to_index[request]] = True
        kept = {row: batch.generators.pop(row) for row in list(batch.generators) if unsampled[row]}
        try:
            out = super().sample_tokens(grammar_output)
        finally:
            batch.generators.update(kept)
        out.report = model.report  # the scheduler reads it
        return out
