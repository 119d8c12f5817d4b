"""Every private name of transformers and accelerate that the model relies on, and what they renamed between versions.

`tests/core/test_compat.py` has a test for each, so that a new release shows at once what it moved. (vLLM's are in
`tah/vllm/compat.py`.)
"""

from __future__ import annotations

import inspect
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers import GenerationMixin, PreTrainedConfig

from .depth import current_depth

# What a cache is called in arguments of `forward` and `generate` and in outputs: transformers 5.24 gave it a new name.
_known = inspect.signature(GenerationMixin.prepare_inputs_for_generation).parameters
CACHE = "cache" if "cache" in _known else "past_key_values"


TAKE_MASKS = ("eager", "sdpa", "flex_attention")  # attention implementations that take a ready mask as it is


def given_cache(past_key_values: Any, cache: Any) -> Any:
    """The one that a call was given under either name.

    Raises:
        ValueError: both are given.
    """
    if past_key_values is not None and cache is not None:
        raise ValueError("past_key_values and cache are two names for one argument; give one of them")
    return past_key_values if cache is None else cache


def attention_of(config: PreTrainedConfig) -> str:
    """The attention implementation of a model with this configuration: `eager`, `sdpa`, `flash_attention_2`, ..."""
    return config._attn_implementation


def kernels_of(config: PreTrainedConfig) -> dict[str, Any]:
    """The choices of kernels in a configuration, by the names they have as arguments."""
    return {name: getattr(config, f"_{name}", None) for name in ("attn_implementation", "experts_implementation")}


def set_attention(config: PreTrainedConfig, name: str) -> None:
    """Choose the attention implementation of every model that holds this configuration."""
    config._attn_implementation = name


class AttentionByDepth:
    """The configuration of an attention module whose kernel takes no ready masks, as flash kernels: at depth >= 2 it
    asks for SDPA, and otherwise it is the model's own configuration.

    An attention module looks up its kernel by this entry in every call, so depth 1 stays on the stock kernel, and
    neither the model's configuration nor transformers' table of kernels changes.
    """

    def __init__(self, config: PreTrainedConfig) -> None:
        self.config = config

    @property
    def _attn_implementation(self) -> str:
        name = attention_of(self.config)  # which the user may have changed since
        return name if current_depth() == 1 or name in TAKE_MASKS else "sdpa"

    def __getattr__(self, name: str) -> Any:
        if name == "config":  # while a copy is being made
            raise AttributeError(name)
        return getattr(self.config, name)


def mark_initialized(module: nn.Module) -> None:
    """Keep transformers from initialising a module again."""
    module._is_hf_initialized = True  # type: ignore[assignment]


def allow_replay_with_cache(layer: nn.Module) -> None:
    """Let activation checkpointing replay a layer that writes into a cache."""
    layer._can_checkpoint_with_cache = True  # type: ignore[assignment]


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate keeps the module's weights elsewhere until it is called."""
    return "_hf_hook" in vars(module)  # hasattr would search parameters and modules first, in every layer of a pass


def is_watched(module: nn.Module) -> bool:
    """Whether hooks of the module must see a call (offloading, sharding), so that its weights may not be used without
    one. Hooks of all modules, as counters of operations have them, are not asked for."""
    return is_offloaded(module) or bool(module._forward_hooks or module._forward_pre_hooks)


def drop_renaming(model: Any, former: Collection[str]) -> None:
    """Save a model that was read with a `key_mapping` under its present names; transformers would restore the names of
    the file.

    Args:
        former: patterns of the names to forget, as they stood in `key_mapping`.
    """
    if used := getattr(model, "_weight_conversions", None):
        model._weight_conversions = [entry for entry in used if not set(former) & set(entry.source_patterns)]


def restore(trainer: Any, checkpoint: str) -> None:
    """Load a `Trainer`'s model from one of its checkpoints, without taking a step."""
    trainer._load_from_checkpoint(checkpoint)


class TrainerHooks:
    """Mixin of a `Trainer`: how it saves a checkpoint, led to a public method."""

    _staged: str | None = None

    def _get_output_dir(self, trial: Any) -> str:
        return self._staged or super()._get_output_dir(trial)  # type: ignore[misc]

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        def save(directory: Path) -> None:
            """Trainer's own checkpoint, in another directory than usual."""
            self._staged = str(directory)
            try:
                super(TrainerHooks, self)._save_checkpoint(model, trial)  # type: ignore[misc]
            finally:
                self._staged = None

        self.save_checkpoint(Path(self._get_output_dir(trial)), save)  # type: ignore[attr-defined]


class PrivateHooks:
    """Mixin of a `PreTrainedModel`: what transformers calls by a private name, led to a public one of the model."""

    _supports_sdpa = _supports_flex_attn = _supports_flash_attn = _supports_attention_backend = True
    _skip_keys_device_placement = ["past_key_values", "cache"]

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # the base's business

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: base, adapters, decider and maps have initialised themselves by the time they are put together."""

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Any = None, **kwargs: Any
    ) -> None:
        if enable:
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
