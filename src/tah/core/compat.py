"""Every private name of transformers and accelerate that the model uses, and names that changed between versions.

`tests/core/test_compat.py` has a test for each, which fails if a new release changes the name. `tah/vllm/compat.py` has
the private names of vLLM.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel

from .depth import current_depth

# The name of the cache in arguments of `forward` and `generate` and in outputs. transformers 5.24 changed it.
_known = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE = "cache" if "cache" in _known else "past_key_values"

# Held while a model is built or loaded. transformers replaces `PreTrainedModel.tie_weights` and the default dtype of a
# whole process meanwhile. The second of two threads would put a replacement back, and later models were not tied.
LOADING = threading.RLock()

TAKE_MASKS = ("eager", "sdpa", "flex_attention")  # attention implementations that use a ready mask as it is


def given_cache(past_key_values: Any, cache: Any) -> Any:
    """Return the cache of a call that has it under one of its two names.

    Raises:
        ValueError: Both are given.
    """
    if past_key_values is not None and cache is not None:
        raise ValueError("past_key_values and cache are two names for one argument; give one of them")
    return past_key_values if cache is None else cache


def attention_of(config: PreTrainedConfig) -> str:
    """Return the attention implementation in a configuration: `eager`, `sdpa`, `flash_attention_2`, ..."""
    return config._attn_implementation


def kernels_of(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the kernels in a configuration, by their argument names."""
    return {name: getattr(config, f"_{name}", None) for name in ("attn_implementation", "experts_implementation")}


def set_attention(config: PreTrainedConfig, name: str) -> None:
    """Set the attention implementation of every model with this configuration object."""
    config._attn_implementation = name


class AttentionByDepth:
    """Configuration of an attention module whose kernel takes no ready masks, such as a flash kernel.

    Its attention implementation is SDPA at depth >= 2. Everything else is the model's own configuration. An attention
    module reads this entry in every call. So depth 1 keeps the stock kernel, and neither the model's configuration nor
    transformers' table of kernels changes.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        self.config = config

    @property
    def _attn_implementation(self) -> str:
        name = attention_of(self.config)  # read in every call, because the user may change it
        return name if current_depth() == 1 or name in TAKE_MASKS else "sdpa"

    def __getattr__(self, name: str) -> Any:
        if name == "config":  # during copying, before `config` is set
            raise AttributeError(name)
        return getattr(self.config, name)


def mark_initialized(module: nn.Module) -> None:
    """Prevent transformers from initialising a module a second time."""
    module._is_hf_initialized = True  # type: ignore[assignment]


def allow_replay_with_cache(layer: nn.Module) -> None:
    """Allow activation checkpointing to replay a layer that writes into a cache."""
    layer._can_checkpoint_with_cache = True  # type: ignore[assignment]


def is_offloaded(module: nn.Module) -> bool:
    """Return whether accelerate loads the module's weights only for its calls."""
    return "_hf_hook" in vars(module)  # hasattr is slower: it searches parameters and submodules first


def is_watched(module: nn.Module) -> bool:
    """Return whether the module has hooks (offloading, sharding), so that its weights may be used only by calling it.

    Global hooks of all modules, which counters of operations use, do not count.
    """
    return is_offloaded(module) or bool(module._forward_hooks or module._forward_pre_hooks)


def renew_hooked_forward(module: nn.Module) -> None:
    """Let accelerate's hook call the forward of the module's present class instead of that of its former class."""
    if "_old_forward" in vars(module):
        module._old_forward = MethodType(type(module).forward, module)  # type: ignore[assignment]


def drop_renaming(model: Any, former: Collection[str]) -> None:
    """Make a model that was read with a `key_mapping` save under its present names.

    transformers would restore the names of the file.

    Args:
        model: The model.
        former: Patterns of former names, as in `key_mapping`.
    """
    if used := getattr(model, "_weight_conversions", None):
        model._weight_conversions = [entry for entry in used if not set(former) & set(entry.source_patterns)]


def restore(trainer: Any, checkpoint: str) -> None:
    """Load the model of a `Trainer` from one of its checkpoints, without a training step."""
    trainer._load_from_checkpoint(checkpoint)


class TrainerHooks:
    """Mixin of a `Trainer` that calls public methods: `save_checkpoint` saves, and `targets` has the loss's tokens."""

    _staged: str | None = None

    def _get_output_dir(self, trial: Any) -> str:
        return self._staged or super()._get_output_dir(trial)  # type: ignore[misc]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        def save(directory: Path) -> None:
            """Write Trainer's checkpoint below another directory."""
            self._staged = str(directory)
            try:
                super(TrainerHooks, self)._save_checkpoint(model, trial)  # type: ignore[misc]
            finally:
                self._staged = None

        self.save_checkpoint(Path(self._get_output_dir(trial)), save)  # type: ignore[attr-defined]

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> Any:
        """Count the tokens that have a loss. Trainer counts all labels but those of the first column."""
        targets = [self.targets(batch) for batch in batch_samples if "labels" in batch]  # type: ignore[attr-defined]
        counted = [{"labels": nn.functional.pad(each, (1, 0), value=-100)} for each in targets]
        return super()._get_num_items_in_batch(counted, device)  # type: ignore[misc]


class ExpertsOfTheBase:
    """Whether a model can set the implementation of its experts, which depends on its base.

    transformers asks with a class method. The class has no base, so its answer is False. A model returns the answer of
    its base, or, while it has none yet, that of the class that its configuration stands for.
    """

    def __get__(self, model: PreTrainedModel | None, owner: type) -> Callable[[], bool]:
        if model is None:
            return lambda: False
        known = AutoModelForCausalLM._model_mapping
        base = getattr(model, "base", None) or known.get(type(model.config.base_config), None)
        return base._can_set_experts_implementation if base is not None else lambda: False


class PrivateHooks:
    """Mixin of a `PreTrainedModel` that maps private names of transformers to public ones of the model."""

    _supports_sdpa = _supports_flex_attn = _supports_flash_attn = _supports_attention_backend = True
    _skip_keys_device_placement = ["past_key_values", "cache"]

    _can_set_experts_implementation = ExpertsOfTheBase()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `generate` makes a DuoCache

    def set_experts_implementation(self, experts_implementation: str | dict[str, str]) -> None:
        """Set the implementation of the base's experts, as in any model of transformers.

        Raises:
            ValueError: The base has no experts. transformers would ignore some names in that case.
        """
        given = experts_implementation
        wanted = set(given.values() if isinstance(given, dict) else [given])
        now = self.config._experts_implementation  # type: ignore[attr-defined]
        if wanted - {now} and not self._can_set_experts_implementation():
            base = type(self.base).__name__  # type: ignore[attr-defined]
            raise ValueError(f"experts_implementation={given!r}: {base} has no experts that it could change; remove it")
        super().set_experts_implementation(given)  # type: ignore[misc]

    def _init_weights(self, module: nn.Module) -> None:
        """Do nothing: base, LoRA, decider and the maps U and Z are initialised before they are combined."""

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = None, **kwargs: Any
    ) -> None:
        if enable:
            if getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
                raise ValueError(
                    "use_reentrant=True is not supported: a replayed layer needs the depth of its first run; give "
                    "gradient_checkpointing_kwargs={'use_reentrant': False}"
                )
            contexts = self.replay_contexts  # type: ignore[attr-defined]
            kwargs["gradient_checkpointing_func"] = partial(gradient_checkpointing_func, context_fn=contexts)
        super()._set_gradient_checkpointing(enable, **kwargs)  # type: ignore[misc]

    def _get_candidate_generator(self, *args: Any, **kwargs: Any) -> Any:
        assistant, given = kwargs.get("assistant_model"), kwargs["model_kwargs"]
        kwargs["model_kwargs"] = self.arguments_of_assistant(assistant, given)  # type: ignore[attr-defined]
        return super()._get_candidate_generator(*args, **kwargs)  # type: ignore[misc]

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        self.prepare_cache(generation_config, model_kwargs)  # type: ignore[attr-defined]
