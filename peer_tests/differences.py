"""Where the tests of transformers and a TaH model differ by design: tests that do not apply, and leniencies.

Both hold for the bases' own columns of the table too, as far as a base differs. `tests/test_peer_differences.py` checks
that every test named here exists.
"""

from __future__ import annotations

import functools
import unittest.mock
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Patch = Any  # what unittest.mock.patch returns; the standard library gives it no public name


@dataclass(frozen=True)
class NotApplicable:
    """A test of transformers that cannot hold for a TaH model.

    Args:
        reason: The design decision that the test contradicts.
        ours: The test of this project that covers the intent, `path::function`.
    """

    reason: str
    ours: str


_NO_STATES = (
    "passes at different depths cover different tokens, so there is no [B, T, D] per layer and no attention map"
)

NOT_APPLICABLE = {
    "test_attention_outputs": NotApplicable(_NO_STATES, "tests/test_bad_input.py::test_forward"),
    "test_hidden_states_output": NotApplicable(_NO_STATES, "tests/test_bad_input.py::test_forward"),
    "test_retain_grad_hidden_states_attentions": NotApplicable(_NO_STATES, "tests/test_bad_input.py::test_forward"),
    "test_capture_outputs_decorator": NotApplicable(
        _NO_STATES, "tests/test_bad_input.py::test_forward_refuses_what_it_would_ignore"
    ),
    "test_can_capture_specific_layers_hidden_states": NotApplicable(
        _NO_STATES, "tests/test_bad_input.py::test_forward_refuses_what_it_would_ignore"
    ),
    "test_correct_missing_keys": NotApplicable(
        "a directory of the base alone is no TaH checkpoint: adapter and decider would be random; from_base makes one",
        "tests/test_contracts.py::test_a_directory_of_the_base_alone_is_no_checkpoint",
    ),
    "test_model_weights_reload_no_missing_tied_weights": NotApplicable(
        "a checkpoint without weights is refused before a model of the configuration's size is made",
        "tests/test_contracts.py::test_tied_weights_are_saved_once_and_are_not_missing",
    ),
    "test_training_gradient_checkpointing_use_reentrant_true": NotApplicable(
        "a replayed layer needs the depth of its first run, for which reentrant checkpointing has no hook",
        "tests/test_contracts.py::test_reentrant_checkpointing_is_refused",
    ),
}


def last_state(model_class: type) -> Patch:
    """Make the last hidden state, for a TaH model the summed one, the only one of the output."""
    plain = model_class.forward  # type: ignore[attr-defined]
    ours = "training" in plain.__wrapped__.__code__.co_varnames

    @functools.wraps(plain)
    def forward(self: Any, *args: Any, output_hidden_states: bool = False, output_attentions: bool = False, **kwargs):
        wanted = {"output_last_hidden_state" if ours else "output_hidden_states": output_hidden_states}
        out = plain(self, *args, **wanted, **kwargs)
        if output_hidden_states:
            out["hidden_states"] = (out.last_hidden_state if ours else out.hidden_states[-1],)
        return out

    return unittest.mock.patch.object(model_class, "forward", forward)


def no_states(model_class: type) -> Patch:
    """Ignore that a call asks for hidden states and attention maps."""
    plain = model_class.forward  # type: ignore[attr-defined]

    @functools.wraps(plain)
    def forward(self: Any, *args: Any, output_hidden_states: bool = False, output_attentions: bool = False, **kwargs):
        return plain(self, *args, **kwargs)

    return unittest.mock.patch.object(model_class, "forward", forward)


def finite_decisions(model_class: type) -> Patch:
    """Replace infinite continue logits, and NaN where there was no decision, by numbers."""
    plain = model_class.forward  # type: ignore[attr-defined]

    @functools.wraps(plain)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = plain(self, *args, **kwargs)
        if getattr(out, "continue_logits", None) is not None:
            out.continue_logits = out.continue_logits.nan_to_num(nan=-1e4, posinf=1e4, neginf=-1e4)
        return out

    return unittest.mock.patch.object(model_class, "forward", forward)


def own_replay(model_class: type) -> Patch:
    """Let a checkpointed call of a layer replay itself.

    The test counts the runs with one mock that replays the last call of a layer. A TaH model calls it once per depth.
    """
    from transformers import modeling_utils

    plain = modeling_utils.checkpoint

    def checkpoint(function: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(function, unittest.mock.Mock):
            return plain(function, *args, **kwargs)
        own = function.side_effect

        def forward(*inputs: Any, **named: Any) -> Any:
            function.side_effect = own
            return function(*inputs, **named)

        return plain(forward, *args, **kwargs)

    return unittest.mock.patch.object(modeling_utils, "checkpoint", checkpoint)


WITHOUT_ALL_GRADIENTS = ("never",)  # policies under which LoRA does not run, so that it has no gradient

# Beginning of the names of tests -> what they run under. The bases run under the same.
LENIENCIES: dict[str, Callable[[type], Patch]] = {
    "test_eager_matches_sdpa_inference": last_state,
    "test_model_outputs_equivalence": no_states,
    "test_batching_equivalence": finite_decisions,
    "test_training_gradient_checkpointing": own_replay,
}
