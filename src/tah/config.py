"""`TaHConfig`: every fact about a Think-at-Hard model, written once and checked once.

Widths (hidden size, vocabulary, number of layers) are never repeated here: they come from `base_config`.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Collection, Iterator
from numbers import Integral, Real
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, __version__

from .core.compat import kernels_of
from .errors import short
from .names import ATTENTION, CONFIDENCE_MEASURES, NEXT_INPUT, OUTPUT, POLICIES, unknown

# Former names of fields and of the tensors they bring, in checkpoints and recipes from before 0.2.
FORMER_FIELDS = {"reembed": "next_input", "combine": "output"}
FORMER_TENSORS = {"reembed_map": "next_input_map", "combine_map": "output_map"}
KERNELS = ("attn_implementation", "experts_implementation")  # settings that may name code to download
DECIDER_DEFAULTS: dict[str, dict[str, Any]] = {
    "lean": {"layers": None, "width": 256},
    "mlp": {
        "layers": None,
        "hidden_dims": [256, 256, 256, 256, 256, 256],
        "expansion": 4,
        "topk": 100,
        "normalize_input": False,
        "dropout": 0.1,
    },
}


class TaHConfig(PreTrainedConfig):
    """Configuration of [`TaHForCausalLM`]: a base decoder plus what makes it iterate on hard tokens.

    Args:
        base_config: configuration of the wrapped Hugging Face decoder (a `PreTrainedConfig` or its dict).
        max_depth: most passes a token may take, >= 1; 1 is the plain base model.
        mix_topk: how many of the largest accumulated logits are mixed into the next input embedding.
        next_input: input of depth >= 2. `topk`: probability-weighted token embeddings (the paper).
            `hidden`: token embedding plus a learned linear map of the last hidden state.
        attention: reach of a query at depth >= 2. `duo`: keys of all depths up to its own (the paper).
            `own`: depth-1 keys and only its own deeper keys. `blind`: only its own deeper keys, so it reads no text (a
            control: what such a pass gains is not reasoning).
        output: output after depth >= 2. `sum`: logits of all depths added (the paper).
            `zero_init`: logits of h1 + Z h2, with Z a learned linear map that starts at zero.
        lora_rank: rank of the adapter that is active at depth >= 2; 0 means no adapter.
        lora_alpha: the adapter's update is scaled by lora_alpha / lora_rank.
        lora_dropout: dropout on the adapter's input during training, in [0, 1).
        lora_targets: the adapted linear layers, each by its name in the base (`model.layers.3.mlp.up_proj`) or by what
            the name ends in (`["q_proj", "v_proj"]`); None adapts every linear layer of the decoder (fused expert
            weights are not linear layers). The output head is never adapted.
        policy: who iterates: `decider`, `oracle`, `always`, `never`, `confidence` or `random`.
        threshold: in [0, 1]; a token iterates when its policy's probability exceeds it (strictly).
        decider: `{"kind": "lean", ...}` (hidden states only, ours), `{"kind": "mlp", ...}` (the authors')
            or None for no decider. Missing entries get their defaults.
        confidence_measure: what the `confidence` policy calls confident: the top-1 `probability`, or exp(-`entropy`).
        random_rate: share of tokens the `random` policy iterates, in [0, 1].
        random_seed: seed of the `random` policy.

    Raises:
        ValueError: for a value outside its range, naming the field, the value and what is allowed.
    """

    model_type = "tah"
    sub_configs = {"base_config": AutoConfig}

    base_config: dict | PreTrainedConfig | None = None
    max_depth: int = 2
    mix_topk: int = 100
    next_input: str = "topk"
    attention: str = "duo"
    output: str = "sum"
    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    lora_targets: list[str] | None = None
    policy: str = "decider"
    threshold: float = 0.5
    decider: dict | None = dataclasses.field(default_factory=lambda: {"kind": "lean"})
    confidence_measure: str = "probability"
    random_rate: float = 0.07
    random_seed: int = 0

    def __post_init__(self, **kwargs: Any) -> None:
        for name in FORMER_FIELDS.keys() & kwargs.keys():
            setattr(self, FORMER_FIELDS[name], kwargs.pop(name))
        if isinstance(self.base_config, dict):
            refuse_kernels(self.base_config)
            if "model_type" not in self.base_config:
                raise ValueError("base_config has no model_type, so the base family is unknown")
            check_family(self.base_config["model_type"])
            self.base_config = AutoConfig.for_model(**self.base_config)
        elif not isinstance(self.base_config, PreTrainedConfig | None):
            raise ValueError(f"base_config={short(self.base_config)} is not the configuration of a model")
        if isinstance(self.base_config, PreTrainedConfig):
            text = self.base_config.get_text_config(decoder=True)
            kwargs.setdefault("tie_word_embeddings", getattr(text, "tie_word_embeddings", False))
            for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
                kwargs.setdefault(name, getattr(text, name, None))
            # transformers resets the sub-configuration's choice of kernels unless it is repeated.
            for name, kernel in kernels_of(self.base_config).items():
                kwargs.setdefault(name, kernel)
            self.decider = _complete_decider(self.decider, text.num_hidden_layers)
        super().__post_init__(**kwargs)
        self._check()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As in transformers. Kernels that the caller names replace the configuration's, wherever they stand in it.

        Raises:
            ValueError: the configuration names a kernel to download, or a field is out of its range.
        """
        for former, name in FORMER_FIELDS.items():
            if former in config_dict and name in config_dict:
                raise ValueError(f"the configuration has {name} and its former name {former}; remove {former}")
        given = [name for name in KERNELS if kwargs.get(name) is not None]
        if given:
            config_dict = without_kernels(config_dict, given)
        refuse_kernels(config_dict)
        return super().from_dict(config_dict, **kwargs)

    def to_dict(self) -> dict[str, Any]:
        """Without the directory the base was loaded from: a checkpoint must not tell about its maker's machine."""
        full = super().to_dict()
        if isinstance(base := full.get("base_config"), dict) and os.path.isdir(base.get("_name_or_path") or ""):
            base["_name_or_path"] = ""
        return full

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """The base's configuration: transformers asks it for layer counts, vocabulary and window sizes."""
        base = self.base_config
        return base.get_text_config(*args, **kwargs) if isinstance(base, PreTrainedConfig) else self

    def _check(self) -> None:
        check_max_depth(self.max_depth)
        check_threshold(self.threshold)
        for name, allowed in (
            ("next_input", NEXT_INPUT),
            ("attention", ATTENTION),
            ("output", OUTPUT),
            ("policy", POLICIES),
            ("confidence_measure", CONFIDENCE_MEASURES),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(unknown(name, getattr(self, name), allowed))
        for name, low in (("mix_topk", 1), ("lora_rank", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(f"{name}={value!r} must be an integer >= {low}")
        for name, within in (("lora_dropout", "[0, 1)"), ("random_rate", "[0, 1]")):
            if not _is_share(getattr(self, name)) or (getattr(self, name) == 1 and within == "[0, 1)"):
                raise ValueError(f"{name}={short(getattr(self, name))} must be in {within}")
        if not _is_number(self.lora_alpha):
            raise ValueError(f"lora_alpha={short(self.lora_alpha)} must be a finite number")
        if isinstance(self.random_seed, bool) or not isinstance(self.random_seed, int):
            raise ValueError(f"random_seed={short(self.random_seed)} must be an integer")
        names = self.lora_targets
        if names is not None and not (isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)):
            raise ValueError(f"lora_targets={short(names)} must be a list of names of layers, or None")
        if self.policy == "decider" and self.decider is None and self.max_depth > 1:
            raise ValueError("policy='decider' needs a decider; give decider={'kind': 'lean'} or another policy")


def current_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Fields of a `TaHConfig` from an older file, by the names they have now."""
    return {FORMER_FIELDS.get(name, name): value for name, value in fields.items()}


def current_tensor(name: str) -> str:
    """The name that a tensor of an older checkpoint has now."""
    first, dot, rest = name.partition(".")
    return FORMER_TENSORS.get(first, first) + dot + rest


def former_tensor(name: str) -> str:
    """The name that a tensor had in checkpoints from before 0.2."""
    first, dot, rest = name.partition(".")
    return next((old for old, new in FORMER_TENSORS.items() if new == first), first) + dot + rest


def parts(described: Any) -> Iterator[dict[str, Any]]:
    """The objects of a configuration in JSON: itself, and those that stand in it, however deep."""
    todo = [described]
    while todo:
        part = todo.pop()
        if isinstance(part, dict):
            yield part
            todo.extend(part.values())
        elif isinstance(part, list):
            todo.extend(item for item in part if isinstance(item, (dict, list)))


def refuse_kernels(described: dict[str, Any], where: str = "the configuration", given: Collection[str] = ()) -> None:
    """Refuse a configuration that names a kernel to download, however deep: that would be code from a stranger.

    Args:
        described: the configuration in JSON.
        where: what the message calls it.
        given: those of `KERNELS` that the caller set. transformers then does not use the entry of that name at the
            top, but those deeper or with an underscore it may.

    Raises:
        ValueError: it names one.
    """
    for part in parts(described):
        for name, value in part.items():
            its = str(name).lstrip("_")  # keys of a configuration in memory may be numbers
            replaced = part is described and name in given
            if its.startswith(KERNELS) and not replaced and "/" in str(value):
                raise ValueError(
                    f"{where} asks for the kernel {short(value)}, code to download; remove that entry, or pass {its} "
                    "yourself if meant"
                )


def without_kernels(described: Any, given: Collection[str]) -> Any:
    """A copy of a configuration in JSON without those of `KERNELS` that the caller sets, however deep they stand."""
    if isinstance(described, dict):
        return {
            name: without_kernels(value, given)
            for name, value in described.items()
            if not str(name).lstrip("_").startswith(tuple(given))
        }
    return [without_kernels(item, given) for item in described] if isinstance(described, list) else described


def check_max_depth(value: Any) -> None:
    """Raise `ValueError` unless `value` is an integer from 1 to 1000 (more passes than anybody found useful)."""
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < 1:
        raise ValueError(f"max_depth={value!r} must be an integer >= 1 (depth 1 is the plain base model)")
    if int(value) > 1000:
        raise ValueError(f"max_depth={value!r} is more than 1000 passes per token")


def check_threshold(value: Any) -> None:
    """Raise `ValueError` unless `value` is a number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) <= 1:
        raise ValueError(f"threshold={value!r} must be a number in [0, 1]")


def check_family(model_type: Any) -> None:
    """Raise `ValueError` for a family of models that this transformers does not know; its own message lists all."""
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise ValueError(f"model_type is {short(model_type)}, a family that transformers {__version__} does not know")


def _check_decider(full: dict[str, Any]) -> None:
    """Raise `ValueError` for sizes of a decider that are no sizes."""

    def is_size(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and value >= 1

    for name in ("width", "expansion", "topk"):
        if name in full and not is_size(full[name]):
            raise ValueError(f"decider {name}={short(full[name])} must be an integer >= 1")
    widths, share = full.get("hidden_dims", [1]), full.get("dropout", 0)
    if not isinstance(widths, list | tuple) or not widths or not all(map(is_size, widths)):
        raise ValueError(f"decider hidden_dims={short(widths)} must be a list of integers >= 1")
    if not _is_share(share) or share == 1:
        raise ValueError(f"decider dropout={short(share)} must be in [0, 1)")
    if not isinstance(full.get("normalize_input", False), bool):
        raise ValueError(f"decider normalize_input={short(full['normalize_input'])} must be true or false")


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(float(value))


def _is_share(value: Any) -> bool:
    return _is_number(value) and 0 <= value <= 1


def _complete_decider(decider: dict | None, num_layers: int) -> dict | None:
    """Fill in the defaults of a decider's kind and check them, its layers against the base's depth in layers."""
    if decider is None:
        return None
    if not isinstance(decider, dict):
        raise ValueError(f"decider={short(decider)} is neither a description of a decider nor None")
    kind = decider.get("kind")
    if not isinstance(kind, str) or kind not in DECIDER_DEFAULTS:
        raise ValueError(f"decider kind {short(kind)} is not one of {', '.join(DECIDER_DEFAULTS)}")
    unknown = set(decider) - {"kind"} - set(DECIDER_DEFAULTS[kind])
    if unknown:
        allowed = ", ".join(DECIDER_DEFAULTS[kind])
        raise ValueError(f"a {kind} decider has no option {', '.join(sorted(unknown))}; it takes {allowed}")
    full = {"kind": kind, **DECIDER_DEFAULTS[kind], **decider}
    if full["layers"] is None:
        full["layers"] = sorted({max(1, num_layers * quarter // 4) for quarter in (1, 2, 3, 4)})
    if not isinstance(full["layers"], list | tuple):
        raise ValueError(f"decider layers {short(full['layers'])} must be a list of hidden-state indices")
    full["layers"] = list(full["layers"])
    _check_decider(full)
    wrong = [k for k in full["layers"] if isinstance(k, bool) or not isinstance(k, int) or not 0 <= k <= num_layers]
    if wrong or not full["layers"]:
        raise ValueError(
            f"decider layers {full['layers']} must be hidden-state indices in 0..{num_layers} "
            f"(0 = input embedding, {num_layers} = after the final norm)"
        )
    return full
