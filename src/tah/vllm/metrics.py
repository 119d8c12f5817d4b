"""Prometheus metrics of TaH models beside those of vLLM: the depth of tokens, the pool and the threshold.

vLLM has an entry point for loggers (`vllm.stat_logger_plugins`). It is not used: a logger of that group is created for
every model of the environment, and turns statistics on in spite of `--disable-log-stats`. Instead, `add_metrics` adds a
logger to vLLM's list, which exists only where statistics are on.

The scheduler, in another process, sends the numbers of a step in vLLM's `SchedulerStats`. No field of it is for
plugins. So the numbers use the field of vLLM's LoRA adapters, which are not supported with TaH models.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

from vllm.v1.metrics.loggers import AggregateStatLoggerBase, PrometheusStatLogger, StatLoggerManager
from vllm.v1.metrics.stats import SchedulerStats
from vllm.v1.metrics.utils import create_metric_per_engine

from ..config import TaHConfig
from .report import StepNumbers

stock_init = StatLoggerManager.__init__


@wraps(stock_init)
def init(self: StatLoggerManager, *args: Any, **kwargs: Any) -> None:
    """Create vLLM's loggers and, beside that for Prometheus, one for the metrics of a TaH model."""
    stock_init(self, *args, **kwargs)
    for logger in [one for one in self.stat_loggers if isinstance(one, PrometheusStatLogger)]:
        if isinstance(logger.vllm_config.model_config.hf_config, TaHConfig):
            self.stat_loggers.append(DepthMetrics(logger))


def add_metrics() -> None:
    """Make engines of this process log the metrics of TaH models; other models and vLLM's metrics stay as they are."""
    StatLoggerManager.__init__ = init


class DepthMetrics(AggregateStatLoggerBase):
    """Logger of the metrics of a TaH model.

    Args:
        stock: vLLM's logger for Prometheus, whose labels and kinds of metrics this one uses.
    """

    def __init__(self, stock: PrometheusStatLogger) -> None:
        self.stock = stock
        labels = ["model_name", "engine"]
        self.tokens = stock._counter_cls(
            name="vllm:tah_tokens",
            documentation="Tokens that ran, including prompts, by depth.",
            labelnames=[*labels, "depth"],
        )
        self.iterating = self._gauge("vllm:tah_iterating_tokens", "Tokens of the latest step that take a second pass.")
        self.usage = self._gauge("vllm:tah_deep_kv_usage_perc", "Depth-2 KV entries in use. 1 means 100 percent usage.")
        threshold = self._gauge("vllm:tah_threshold", "Threshold of the checkpoint.")
        for engine in threshold.values():
            engine.set(stock.vllm_config.model_config.hf_config.threshold)

    def _gauge(self, name: str, documentation: str) -> dict[int, Any]:
        """Return a gauge by engine."""
        gauge = self.stock._gauge_cls(
            name=name, documentation=documentation, multiprocess_mode="mostrecent", labelnames=["model_name", "engine"]
        )
        return create_metric_per_engine(gauge, self.stock.per_engine_labelvalues)

    def record(
        self,
        scheduler_stats: SchedulerStats | None,
        iteration_stats: Any,
        mm_cache_stats: Any = None,
        engine_idx: int = 0,
    ) -> None:
        """Record the statistics of a step."""
        step = StepNumbers.take(scheduler_stats)
        if step is None:
            return
        for depth, count in (("1", step.shallow), ("2", step.deep)):
            self.tokens.labels(*self.stock.per_engine_labelvalues[engine_idx], depth).inc(count)
        self.iterating[engine_idx].set(step.deep)
        self.usage[engine_idx].set(step.entries / step.capacity)

    def log_engine_initialized(self) -> None:
        """Do nothing: vLLM's own logger reports the start."""
