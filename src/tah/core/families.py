"""Which bases can be wrapped: three requirements, checked by facts and by a probe.

A base must (a) take `inputs_embeds` and `position_ids`, (b) keep its past only in the given `Cache`, through `update`,
and (c) use a ready attention mask as it is. Any other base raises `UnsupportedBase` with the reason.

Shapes: T tokens, D width, V vocabulary.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .cache import DuoCache
from .compat import CACHE
from .depth import at_depth
from .head import Head
from .lora import DepthLoRA
from .masks import own_configs, take_ready_masks
from .packing import pack
from .quantised import is_quantised

LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention")
PROBE_TOKENS = 8
PROBE_LATE = 3  # last tokens of the probe, which run at depth 2


class UnsupportedBase(ValueError):
    """A base that cannot be wrapped. The message has the reason."""


def refuse_peft(base: nn.Module) -> None:
    """Refuse a base that contains PEFT adapters.

    Their layers would be active at every depth, and a saved checkpoint would have their names.

    Raises:
        UnsupportedBase: It contains one.
    """
    if any(type(module).__module__.startswith("peft.") for module in base.modules()):
        raise UnsupportedBase("the base contains PEFT layers; wrap the result of PeftModel.merge_and_unload()")


def head_of(base: PreTrainedModel) -> Head:
    """Return the base's output head, from its output embedding and its configuration.

    Raises:
        UnsupportedBase: The base has no output embedding.
    """
    config = base.config.get_text_config(decoder=True)
    linear = base.get_output_embeddings()
    if linear is None:
        raise UnsupportedBase(f"{type(base).__name__} has no output embedding, so it is not a language model")
    # The families use different names: Cohere has a factor, Granite a divisor, HyperCLOVA X a factor with the name of
    # Granite's divisor, Gemma and nanochat a soft-cap. The probe refuses a base that computes anything else.
    scale, divide = getattr(config, "logit_scale", None) or 1.0, getattr(config, "logits_scaling", None) or 1.0
    if config.model_type == "hyperclovax":
        scale, divide = divide, 1.0
    return Head(linear, scale, divide, softcap=getattr(config, "final_logit_softcapping", None))


def decoder_of(base: PreTrainedModel) -> PreTrainedModel:
    """Return the base without its output head: embeddings to final hidden states."""
    decoder = base.get_decoder()
    if decoder is base or not isinstance(decoder, PreTrainedModel):
        # Llama 4's text model returns itself, and some encoders return their head. The decoder is the model inside.
        inside = [child for child in base.children() if isinstance(child, PreTrainedModel)]
        decoder = inside[0] if inside else base
    return decoder


def stable_positions(config: PreTrainedConfig) -> int | None:
    """Return the number of positions at which deeper passes are exact, or None if there is no limit.

    `dynamic` and `longrope` rotary embeddings compute their frequencies from the longest position of a pass. Beyond the
    original length, a deeper pass over few tokens would have other frequencies than depth 1.
    """
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    limits = []
    if getattr(config, "attn_temperature_tuning", False):  # Llama 4 scales queries by slot, beyond a length
        limits.append(int(config.floor_scale) // 2)
    for entry in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        if entry.get("rope_type", entry.get("type")) in ("dynamic", "longrope"):
            original = entry.get("original_max_position_embeddings")
            original = original or getattr(config, "original_max_position_embeddings", None)
            limits.append(original or config.max_position_embeddings)
    return min(limits, default=None)


def decoder_layers(decoder: nn.Module, num_layers: int) -> nn.ModuleList:
    """Return the decoder's list of layers.

    Raises:
        UnsupportedBase: There is no module list of that length directly below the decoder.
    """
    for child in decoder.children():
        if isinstance(child, nn.ModuleList) and len(child) == num_layers:
            return child
    name = type(decoder).__name__
    raise UnsupportedBase(f"{name} has no list of its {num_layers} layers, so their hidden states cannot be read")


def check_facts(base: PreTrainedModel) -> None:
    """Check the facts that need no run of the base: signature, layer types, layers, head.

    Raises:
        UnsupportedBase: A requirement is not met. The message has the reason.
    """
    name, config = type(base).__name__, base.config.get_text_config(decoder=True)
    decoder = decoder_of(base)
    parameters = inspect.signature(decoder.forward).parameters
    for needed in ("inputs_embeds", "position_ids", CACHE):
        if needed not in parameters:
            raise UnsupportedBase(f"{name} cannot be wrapped: its forward takes no {needed}")
    if getattr(base.config, "is_encoder_decoder", False):
        raise UnsupportedBase(f"{name} cannot be wrapped: it is an encoder-decoder")
    strange = sorted(set(getattr(config, "layer_types", None) or ()) - set(LAYER_TYPES))
    if strange:
        raise UnsupportedBase(
            f"{name} cannot be wrapped: duo-causal attention is defined for {', '.join(LAYER_TYPES)} layers, "
            f"not for {', '.join(strange)}"
        )
    decoder_layers(decoder, config.num_hidden_layers)
    head_of(base)


@torch.no_grad()
def check_base(base: PreTrainedModel) -> None:
    """Check all requirements: the facts, and then a probe of 8 tokens.

    The probe compares two passes with the base's own forward on the same input embeddings, some of which are mixes.
    One is a pass at depth 1 through a `DuoCache` and the head. The other is a pass at depth 2 of the last three tokens,
    which did not run at depth 1. Without LoRA it must give the result of depth 1. During the probe, windows and chunks
    are shorter than the probe.

    Raises:
        UnsupportedBase: A requirement is not met. The message has the reason.
    """
    check_facts(base)
    name, training, quantised = type(base).__name__, base.training, is_quantised(base)
    if any(isinstance(module, DepthLoRA) for module in base.modules()):
        raise UnsupportedBase(f"this {name} is part of a TaH model already; load the base again")
    config = base.config.get_text_config(decoder=True)
    reach = {k: v for k in ("sliding_window", "attention_chunk_size") if (v := getattr(config, k, None)) is not None}
    base.eval()
    try:
        for key in reach:
            setattr(config, key, 3)
        with torch.set_grad_enabled(
            quantised
        ):  # without gradients, bitsandbytes would change weights to inference only
            reason = _probe(base, config, quantised)
    except Exception as error:
        line = str(error).strip().splitlines()
        reason = f"its forward fails with a DuoCache: {type(error).__name__}: {line[0][:120] if line else ''}"
    finally:
        for key, value in reach.items():
            setattr(config, key, value)
        own_configs(base)
        base.train(training)
    if reason:
        raise UnsupportedBase(f"{name} cannot be wrapped: {reason}")


def _probe(base: PreTrainedModel, config: PreTrainedConfig, quantised: bool) -> str | None:
    """Return the reason why the base gives other results with `DuoCache` and ready masks, or None."""
    decoder, head = decoder_of(base), head_of(base)
    embed = base.get_input_embeddings()
    device, late = embed.weight.device, PROBE_LATE
    ids = torch.arange(PROBE_TOKENS, device=device)[None] % config.vocab_size
    embeds = embed(ids)
    # Cloned before each use, because some families scale their input in place.
    embeds = torch.cat([embeds[:, :-late], (embeds[:, -late:] + embeds[:, :late]) / 2], dim=1)
    embeds = embeds.detach().requires_grad_(quantised)
    positions = torch.arange(PROBE_TOKENS, device=device)[None]
    want = base(inputs_embeds=embeds.clone(), position_ids=positions, use_cache=False).logits[0].float()
    # The rounding error of a deep bfloat16 model reaches a tenth of the norm, and so may that of quantised activations.
    # The error of a wrong mask reaches the norm.
    tolerance = 1e-3 if decoder.dtype == torch.float32 and not quantised else 0.3

    def differs(got: Tensor, want: Tensor) -> bool:
        return not (got.float() - want).norm() <= tolerance * want.norm()

    def depth_one(length: int) -> tuple[DuoCache, Any]:
        cache, where = DuoCache(), positions[:, :length]
        step = cache.open_pass(where, torch.ones_like(where, dtype=torch.bool), padded=False)
        given = {CACHE: step, "position_ids": where, "use_cache": False}
        return cache, decoder(inputs_embeds=embeds[:, :length].clone(), **given).last_hidden_state

    cache, hidden = depth_one(PROBE_TOKENS)
    if len(cache.layers) != config.num_hidden_layers:
        return f"{len(cache.layers)} of its {config.num_hidden_layers} layers keep their keys in the cache"
    if differs(head(hidden)[0], want):
        return "its logits are not the product of output embedding and final hidden state, scaled or soft-capped"

    cache, _ = depth_one(PROBE_TOKENS - late)
    last = torch.arange(PROBE_TOKENS - late, PROBE_TOKENS, device=device)
    take_ready_masks(decoder)
    deep = cache.open_deeper_pass(2, pack(last, PROBE_TOKENS), last)
    with at_depth(2):
        hidden = decoder(
            inputs_embeds=embeds[:, -late:],
            position_ids=last[None],
            **{CACHE: deep},
            attention_mask=deep.masks(config, last[None], "duo", decoder.dtype),
            use_cache=False,
        ).last_hidden_state
    if differs(head(hidden)[0], want[-late:]):
        return "its attention does not follow the given positions and mask"
    return None
