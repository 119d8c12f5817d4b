"""Parameters of one request: `policy`, `threshold`, `max_depth`, and `depths` (return the depth of every token).

vLLM has such fields in `SamplingParams.extra_args`; over HTTP the name is `vllm_xargs`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from torch import Tensor
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.v1.sample.logits_processor import LogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor as LogitsProcessorV2

from ..config import TaHConfig, check_max_depth, check_threshold
from ..names import LABEL_FREE, suggest
from ..policy import Rule

FIELDS = ("policy", "threshold", "max_depth", "depths")
STOCK_FIELDS = ("kv_transfer_params", "ec_transfer_params", "kv_cache_report_mode")  # fields of vLLM
DEPTHS_SERVED = 2


@dataclass(frozen=True)
class RequestOptions:
    """The options of one request, checked and completed."""

    rule: Rule  # complete: no field is None
    report_depths: bool = False  # whether the response has the depth of every token

    @classmethod
    def of(cls, config: TaHConfig, extra_args: dict[str, Any] | None) -> RequestOptions:
        """Return the options of a request; missing values are those of the checkpoint.

        Args:
            config: Configuration of the checkpoint.
            extra_args: Fields of the request.

        Raises:
            ValueError: A field is unknown, or a value is out of range; the message begins with the field's name.
        """
        given = {name: value for name, value in (extra_args or {}).items() if name not in STOCK_FIELDS}
        for name in set(given) - set(FIELDS):
            raise ValueError(f"{name} is not a field of vllm_xargs; {suggest(str(name), FIELDS)}")
        depths = given.pop("depths", False)
        policy, threshold, max_depth = Rule(**given).completed(config).arguments().values()
        if policy not in LABEL_FREE:
            raise ValueError(f"policy={policy!r} is not supported in vLLM; {suggest(str(policy), LABEL_FREE)}")
        if policy == "decider" and config.decider is None:
            raise ValueError("policy='decider': this model has no decider; use another policy, such as 'confidence'")
        check_threshold(threshold)
        if policy == "decider" and config.decision == "sample" and threshold != config.threshold:
            raise ValueError(f"threshold={threshold!r} has no effect with decision='sample', which draws the decisions")
        check_max_depth(max_depth)
        if max_depth > DEPTHS_SERVED:
            raise ValueError(f"max_depth={max_depth} is not supported in vLLM; use at most {DEPTHS_SERVED}")
        if depths not in (True, False):
            raise ValueError(f"depths={depths!r} must be true or false")
        return cls(Rule(policy, float(threshold), int(max_depth)), bool(depths))

    @property
    def iterates(self) -> bool:
        """Whether any token may take a second pass."""
        return self.rule.policy != "never" and bool(self.rule.max_depth != 1)

    @property
    def key(self) -> tuple[Any, ...]:
        """The values on which depths depend; requests share cached prefixes if and only if their keys are equal."""
        if not self.iterates:
            return ("never",)
        if self.rule.policy in ("always", "random"):  # these do not depend on the threshold
            return (self.rule.policy,)
        return (self.rule.policy, self.rule.threshold)


@dataclass
class DepthLog:
    """The depths of the tokens of one request, and how many of these numbers its outputs contain already."""

    depths: list[int] = field(default_factory=list)  # by position; the newest token has not run, so it has no depth
    sent: int = 0

    def news(self) -> np.ndarray:
        """Return the depths that no output contains, [tokens] int8, and count them as sent."""
        new = np.array(self.depths[self.sent :], dtype=np.int8)
        self.sent = len(self.depths)
        return new


class DepthParameters(LogitsProcessor, LogitsProcessorV2):
    """Validation of a request's fields; it changes no logits. It serves both of vLLM's model runners.

    vLLM calls `validate_params` of its logits processors for each request, and answers an error with HTTP 400.
    """

    config: ClassVar[TaHConfig]  # configuration of the one model of this process; the plugin sets it

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Check the fields of a request.

        Raises:
            VLLMValidationError: A field is unknown or out of range. The message begins with its name; so does
                `parameter`, which model runner V2 drops.
        """
        try:
            RequestOptions.of(cls.config, sampling_params.extra_args)
        except ValueError as error:
            field = str(error).split("=")[0].split(" ")[0]
            raise VLLMValidationError(str(error), parameter=f"vllm_xargs.{field}") from error

    def is_argmax_invariant(self) -> bool:
        """Return True: logits do not change."""
        return True

    def update_state(self, batch_update: Any) -> None:
        """Do nothing: there is no state."""

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Return False: no logits of the request change."""
        return False

    def apply(self, logits: Tensor, ctx: Any = None) -> Tensor:
        """Return `logits` unchanged."""
        return logits
