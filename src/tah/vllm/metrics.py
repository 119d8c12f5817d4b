"""Prometheus metrics: those of vLLM, and for TaH models the depth of tokens, the pool and the threshold.

This module is an entry point of vLLM (`vllm.stat_logger_plugins`). The scheduler, in another process, sends the numbers
of a step in vLLM's `SchedulerStats`. No field of it is for plugins. So the numbers use the field of vLLM's LoRA
adapters, which are not supported with TaH models.
"""

from __future__ import annotations

from typing import Any

from vllm.config import VllmConfig
from vllm.v1.metrics.loggers import PrometheusStatLogger
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.metrics.utils import create_metric_per_engine

from ..config import TaHConfig
from .report import StepNumbers


class DepthStatLogger(PrometheusStatLogger):
    """vLLM's logger for Prometheus, with more metrics if the model is a TaH model."""

    def __init__(self, vllm_config: VllmConfig, engine_indexes: list[int] | None = None) -> None:
        super().__init__(vllm_config, engine_indexes)
        self.ours = isinstance(vllm_config.model_config.hf_config, TaHConfig)
        if not self.ours:
            return
        labels = ["model_name", "engine"]
        self.tokens = self._counter_cls(
            name="vllm:tah_tokens",
            documentation="Tokens that ran, including prompts, by depth.",
            labelnames=[*labels, "depth"],
        )
        self.iterating = self._gauge("vllm:tah_iterating_tokens", "Tokens of the latest step that take a second pass.")
        self.usage = self._gauge("vllm:tah_deep_kv_usage_perc", "Depth-2 KV entries in use. 1 means 100 percent usage.")
        threshold = self._gauge("vllm:tah_threshold", "Threshold of the checkpoint.")
        for engine in threshold.values():
            engine.set(vllm_config.model_config.hf_config.threshold)

    def _gauge(self, name: str, documentation: str) -> dict[int, Any]:
        """Return a gauge by engine."""
        gauge = self._gauge_cls(
            name=name, documentation=documentation, multiprocess_mode="mostrecent", labelnames=["model_name", "engine"]
        )
        return create_metric_per_engine(gauge, self.per_engine_labelvalues)

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: Any,
        *args: Any,
        engine_idx: int = 0,
        **kwargs: Any,
    ) -> None:
        """Record the statistics of a step."""
        super().record(scheduler_stats, iteration_stats, *args, engine_idx=engine_idx, **kwargs)
        step = StepNumbers.take(scheduler_stats) if self.ours else None
        if step is None:
            return
        for depth, count in (("1", step.shallow), ("2", step.deep)):
            self.tokens.labels(*self.per_engine_labelvalues[engine_idx], depth).inc(count)
        self.iterating[engine_idx].set(step.deep)
        self.usage[engine_idx].set(step.entries / step.capacity)
