"""What a step tells: the model's report to the scheduler, and the numbers of a step for the metrics. Needs no vLLM."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class StepReport:
    """The model's report of one step to the scheduler."""

    free: int  # free pool entries
    taken: list[int]  # slots that got an entry in this step
    released: list[int]  # slots that lost their entry in this step
    depths: dict[str, tuple[int, list[int]]]  # by request: first position in this step, depths from that position on
    repeated: int  # tokens of this step that an earlier step has counted
    deferred: list[str]  # requests whose last token is deferred: they emit their next token in the next step


@dataclass
class StepNumbers:
    """Numbers of one step for the metrics."""

    shallow: int  # tokens of depth 1
    deep: int  # tokens of depth 2
    entries: int  # pool entries in use
    capacity: int  # pool entries in total

    def put(self, stats: Any) -> None:
        """Write the numbers into vLLM's `SchedulerStats`."""
        stats.running_lora_adapters = asdict(self)

    @classmethod
    def take(cls, stats: Any) -> StepNumbers | None:
        """Read the numbers from vLLM's `SchedulerStats`; None if there are none or the step had no tokens."""
        return cls(**stats.running_lora_adapters) if stats is not None and stats.running_lora_adapters else None
