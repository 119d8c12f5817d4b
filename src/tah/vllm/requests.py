"""What one request may choose: `policy`, `threshold`, `max_depth`, and whether it wants the depth of every token.

vLLM takes such fields in `SamplingParams.extra_args`; over HTTP they are called `vllm_xargs`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
from torch import Tensor
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError
from vllm.v1.sample.logits_processor import LogitsProcessor

from ..config import TaHConfig, check_max_depth, check_threshold
from ..names import LABEL_FREE, suggest
from ..policy import Rule

FIELDS = ("policy", "threshold", "max_depth", "depths")
STOCK_FIELDS = ("kv_transfer_params", "ec_transfer_params", "kv_cache_report_mode")  # vLLM's own
DEPTHS_SERVED = 2


@dataclass(frozen=True)
class RequestOptions:
    """The options of one request, checked and completed."""

    rule: Rule  # without None
    report_depths: bool = False  # the response has the depth of every token

    @classmethod
    def of(cls, config: TaHConfig, extra_args: dict[str, Any] | None) -> RequestOptions:
        """The request's own values, and the checkpoint's for the rest.

        Raises:
            ValueError: an unknown field, or a value out of range; the message starts with the field's name.
        """
        given = {name: value for name, value in (extra_args or {}).items() if name not in STOCK_FIELDS}
        for name in set(given) - set(FIELDS):
            raise ValueError(f"{name} is not a field of vllm_xargs; {suggest(str(name), FIELDS)}")
        depths = given.pop("depths", False)
        policy, threshold, max_depth = Rule(**given).completed(config).arguments().values()
        if policy not in LABEL_FREE:
            raise ValueError(f"policy={policy!r} cannot be served; {suggest(str(policy), LABEL_FREE)}")
        if policy == "decider" and config.decider is None:
            raise ValueError("policy='decider': this model has no decider; give another, such as 'confidence'")
        check_threshold(threshold)
        check_max_depth(max_depth)
        if max_depth > DEPTHS_SERVED:
            raise ValueError(f"max_depth={max_depth} cannot be served; at most {DEPTHS_SERVED}")
        if depths not in (True, False):
            raise ValueError(f"depths={depths!r} must be true or false")
        return cls(Rule(policy, float(threshold), int(max_depth)), bool(depths))

    @property
    def iterates(self) -> bool:
        """Whether any token may run a second pass."""
        return self.rule.policy != "never" and bool(self.rule.max_depth != 1)

    @property
    def key(self) -> tuple[Any, ...]:
        """What the depths depend on: requests share cached prefixes if and only if their keys are equal."""
        if not self.iterates:
            return ("never",)
        if self.rule.policy in ("always", "random"):  # they do not look at the threshold
            return (self.rule.policy,)
        return (self.rule.policy, self.rule.threshold)


@dataclass
class DepthLog:
    """The passes that the tokens of one request took, and how many of those numbers its answer has brought already."""

    depths: list[int] = field(default_factory=list)  # by position, of the tokens that ran; the newest one did not
    sent: int = 0

    def news(self) -> np.ndarray:
        """What the answer lacks, [tokens] int8."""
        new = np.array(self.depths[self.sent :], dtype=np.int8)
        self.sent = len(self.depths)
        return new


class DepthParameters(LogitsProcessor):
    """No logits are processed: vLLM asks its logits processors to validate what a request brings, and answers 400."""

    config: ClassVar[TaHConfig]  # of the one model of this process; set by the plugin

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        try:
            RequestOptions.of(cls.config, sampling_params.extra_args)
        except ValueError as error:
            field = str(error).split("=")[0].split(" ")[0]
            raise VLLMValidationError(str(error), parameter=f"vllm_xargs.{field}") from error

    def is_argmax_invariant(self) -> bool:
        return True

    def update_state(self, batch_update: Any) -> None:
        pass

    def apply(self, logits: Tensor) -> Tensor:
        return logits
