"""`TaHConfig`, the configuration of a TaH model, and its checks.

Sizes (hidden size, vocabulary, number of layers) are not fields here. They come from `base_config`.
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
from .names import ATTENTION, CONFIDENCE_MEASURES, DECISIONS, NEXT_INPUT, OUTPUT, POLICIES, unknown

# Former names of fields and of their tensors, in checkpoints and recipes of versions before 0.2.
FORMER_FIELDS = {"reembed": "next_input", "combine": "output"}
FORMER_TENSORS = {"reembed_map": "next_input_map", "combine_map": "output_map"}
KERNELS = ("attn_implementation", "experts_implementation")  # settings that may name code to download
OF_THE_BASE = (  # facts about the base that other libraries read from a model's configuration
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window", "layer_types"),
    *("final_logit_softcapping", "logit_scale", "logits_scaling"),
)
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
    "tah2": {"width": None},
}


class TaHConfig(PreTrainedConfig):
    """Configuration of [`TaHForCausalLM`]: a base decoder and the options of its passes.

    Numbers in parentheses are equations of docs/explanation/method.md.

    Args:
        base_config: Configuration of the base (a `PreTrainedConfig` or its dict).
        max_depth: Most passes that a token may take, >= 1. 1 is the base.
        mix_topk: Number k of tokens in the mix of the next input (4).
        next_input: Input at depth >= 2. `topk`: mix of token embeddings (4), the paper. `hidden`: token embedding plus
            the input map U of the last hidden state (5). `mlp`: a network of the token embedding and the last hidden
            state (13), the updater of TaH2.
        next_input_width: Inner width of the network of `next_input="mlp"`. None: the hidden size.
            Like `mix_topk` and the fields of LoRA, it has no effect if the model has no such part.
        next_input_norms: Whether the network of `next_input="mlp"` has a norm before its MLP, and one at its end.
        attention: Keys to which a query at depth >= 2 attends (7). `duo`: keys of all depths up to its own, the paper.
            `own`: keys of depth 1 and its own deeper keys. `blind`: its own deeper keys only, so it reads no text (a
            control: the gain of such a pass is not reasoning).
        output: Output after depth >= 2. `sum`: sum of the logits of all depths (2), the paper. `zero_init`: logits of
            h1 + Z h2, where the output map Z starts at zero (8). `mixture`: log-probabilities of the mixture of all
            passes, weighted by the continue probabilities (15), TaH2. `even`: the same with equal weights.
        lora_rank: Rank of the LoRA that is active at depth >= 2 (6). 0 means no LoRA.
        lora_alpha: Numerator of the scale lora_alpha / lora_rank of the LoRA.
        lora_dropout: Dropout on the input of the LoRA in training, in [0, 1).
        lora_targets: Linear layers with LoRA, each by its name in the base (`model.layers.3.mlp.up_proj`) or by the end
            of its name (`["q_proj", "v_proj"]`). None: every linear layer of the decoder (fused expert weights are not
            linear layers). The output head never has LoRA.
        policy: Policy: `decider`, `oracle`, `always`, `never`, `confidence` or `random`.
        threshold: Threshold in [0, 1]. A token takes another pass if its continue probability is larger (3).
        decision: `threshold`: a token continues if its continue probability is larger than the threshold (3).
            `sample`: with the policy `decider` it continues with its continue probability, drawn by a hash of
            `random_seed`, position, depth and token id. The hash is fixed: in training, the same token at the same
            position draws the same number in every epoch.
        decider: `{"kind": "lean", ...}` (reads hidden states only; ours), `{"kind": "mlp", ...}` (the authors'),
            `{"kind": "tah2", ...}` (of TaH2), or None. `kind` is required; other missing entries have their defaults.
        confidence_measure: Confidence of the policy `confidence`: `probability`, the largest probability, or `entropy`,
            exp(-entropy).
        random_rate: Share of tokens that take another pass with the policy `random`, in [0, 1].
        random_seed: Random seed of the policy `random` and of the decision `sample`.

    Raises:
        ValueError: A value is out of range. The message has the field, the value and the allowed values.
    """

    model_type = "tah"
    sub_configs = {"base_config": AutoConfig}
    keys_to_ignore_at_inference = [  # of the output, so that `Trainer.predict` returns the logits alone
        *("past_key_values", "cache", "depth_count", "continue_logits", "token_loss", "mixture_weights", "pass_loss"),
        "last_hidden_state",
    ]

    base_config: dict | PreTrainedConfig | None = None
    max_depth: int = 2
    mix_topk: int = 100
    next_input: str = "topk"
    next_input_width: int | None = None
    next_input_norms: list[bool] = dataclasses.field(default_factory=lambda: [True, True])
    attention: str = "duo"
    output: str = "sum"
    lora_rank: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    lora_targets: list[str] | None = None
    policy: str = "decider"
    threshold: float = 0.5
    decision: str = "threshold"
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
            raise ValueError(f"base_config={short(self.base_config)} is not a model configuration")
        if isinstance(self.base_config, PreTrainedConfig):
            text = self.base_config.get_text_config(decoder=True)
            kwargs.setdefault("tie_word_embeddings", getattr(text, "tie_word_embeddings", False))
            for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
                kwargs.setdefault(name, getattr(text, name, None))
            # transformers resets the kernels of a sub-configuration unless the outer configuration repeats them.
            for name, kernel in kernels_of(self.base_config).items():
                kwargs.setdefault(name, kernel)
            self.decider = _complete_decider(self.decider, text.num_hidden_layers)
        super().__post_init__(**kwargs)
        self._check()

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Return a configuration from a dict, as in transformers.

        Kernels among `kwargs` replace those of the dict at every level.

        Raises:
            ValueError: The configuration names a kernel to download, or a field is out of range.
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
        """Return the configuration as a dict, without the directory from which the base was loaded.

        A checkpoint must not contain paths of the machine on which it was saved.
        """
        full = super().to_dict()
        if isinstance(base := full.get("base_config"), dict) and os.path.isdir(base.get("_name_or_path") or ""):
            base["_name_or_path"] = ""
        return full

    def __getattr__(self, name: str) -> Any:
        """Return one of `OF_THE_BASE` from the base's configuration. Libraries look for them here; files have them
        in `base_config` only."""
        if name in OF_THE_BASE and isinstance(base := vars(self).get("base_config"), PreTrainedConfig):
            return getattr(base.get_text_config(decoder=True), name)
        if name == "auto_map":  # TRL reads it from every configuration whose class is not in transformers
            return {}
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        """Set a field; one of `OF_THE_BASE` is set in the base's configuration."""
        base = vars(self).get("base_config")
        if name in OF_THE_BASE and isinstance(base, PreTrainedConfig):
            setattr(base.get_text_config(decoder=True), name, value)
        else:
            super().__setattr__(name, value)

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoConfig") -> None:
        """Do nothing; see `SafeCheckpoint.register_for_auto_class`."""

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """Return the base's text configuration, from which transformers reads layers, vocabulary and window sizes."""
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
            ("decision", DECISIONS),
            ("confidence_measure", CONFIDENCE_MEASURES),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(unknown(name, getattr(self, name), allowed))
        width = [] if self.next_input_width is None else [("next_input_width", 1)]
        for name, low in [("mix_topk", 1), ("lora_rank", 0), *width]:
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(f"{name}={value!r} must be an integer >= {low}")
        for name, within in (("lora_dropout", "[0, 1)"), ("random_rate", "[0, 1]")):
            if not _is_share(getattr(self, name)) or (getattr(self, name) == 1 and within == "[0, 1)"):
                raise ValueError(f"{name}={short(getattr(self, name))} must be in {within}")
        if not _is_number(self.lora_alpha):
            raise ValueError(f"lora_alpha={short(self.lora_alpha)} must be a finite number")
        seed = self.random_seed
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise ValueError(f"random_seed={short(seed)} must be an integer from 0 to 2^63 - 1")
        self._check_lists()
        if self.policy == "decider" and self.decider is None and self.max_depth > 1:
            kind = "tah2" if self.output == "mixture" else "lean"
            raise ValueError(f"policy='decider' needs a decider; give decider={{'kind': '{kind}'}} or another policy")

    def _check_lists(self) -> None:
        norms, names = self.next_input_norms, self.lora_targets
        if not isinstance(norms, list | tuple) or [type(norm) for norm in norms] != [bool, bool]:
            raise ValueError(f"next_input_norms={short(norms)} must be two of true, false: before the MLP, at the end")
        if names is not None and not (isinstance(names, list | tuple) and all(isinstance(name, str) for name in names)):
            raise ValueError(f"lora_targets={short(names)} must be a list of layer names, or None")


def current_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a `TaHConfig` in a file, with former names replaced by present ones."""
    return {FORMER_FIELDS.get(name, name): value for name, value in fields.items()}


def current_tensor(name: str) -> str:
    """Return the present name of a tensor of a checkpoint."""
    first, dot, rest = name.partition(".")
    return FORMER_TENSORS.get(first, first) + dot + rest


def former_tensor(name: str) -> str:
    """Return the name that a tensor has in checkpoints of versions before 0.2."""
    first, dot, rest = name.partition(".")
    return next((old for old, new in FORMER_TENSORS.items() if new == first), first) + dot + rest


def parts(described: Any) -> Iterator[dict[str, Any]]:
    """Yield the objects of a configuration in JSON: itself, and those inside it at every level."""
    todo = [described]
    while todo:
        part = todo.pop()
        if isinstance(part, dict):
            yield part
            todo.extend(part.values())
        elif isinstance(part, list):
            todo.extend(item for item in part if isinstance(item, (dict, list)))


def refuse_kernels(described: dict[str, Any], where: str = "the configuration", given: Collection[str] = ()) -> None:
    """Raise if a configuration names a kernel to download, at any level. Such a kernel is code from another person.

    Args:
        described: Configuration in JSON.
        where: Name of the configuration, for the message.
        given: Names of `KERNELS` that the caller sets. transformers then ignores the top entry of that name, but may
            use entries at lower levels or with an underscore.

    Raises:
        ValueError: The configuration names a kernel to download.
    """
    for part in parts(described):
        for name, value in part.items():
            setting = str(name).lstrip("_")  # keys may be numbers before JSON is written
            replaced = part is described and name in given
            if setting.startswith(KERNELS) and not replaced and "/" in str(value):
                raise ValueError(
                    f"{where} names the kernel {short(value)}, which is code to download; remove that entry, or pass "
                    f"{setting} yourself if you trust it"
                )


def without_kernels(described: Any, given: Collection[str]) -> Any:
    """Return a copy of a configuration in JSON without the entries of `KERNELS` in `given`, at every level."""
    if isinstance(described, dict):
        return {
            name: without_kernels(value, given)
            for name, value in described.items()
            if not str(name).lstrip("_").startswith(tuple(given))
        }
    return [without_kernels(item, given) for item in described] if isinstance(described, list) else described


def check_max_depth(value: Any) -> None:
    """Raise `ValueError` unless `value` is an integer from 1 to 1000. More passes are a mistake."""
    if isinstance(value, bool) or not isinstance(value, Integral) or int(value) < 1:
        raise ValueError(f"max_depth={value!r} must be an integer >= 1 (depth 1 is the base model)")
    if int(value) > 1000:
        raise ValueError(f"max_depth={value!r} is more than 1000 passes per token")


def check_threshold(value: Any) -> None:
    """Raise `ValueError` unless `value` is a number in [0, 1]."""
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 <= float(value) <= 1:
        raise ValueError(f"threshold={value!r} must be a number in [0, 1]")


def check_family(model_type: Any) -> None:
    """Raise `ValueError` if the installed transformers has no such model family.

    The message of transformers would list all families.
    """
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise ValueError(f"model_type is {short(model_type)}, a family that transformers {__version__} does not have")


def _check_decider(full: dict[str, Any]) -> None:
    """Raise `ValueError` if a size or an option of a decider is invalid."""

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
    """Return a decider's description with defaults filled in and checked, for a base with `num_layers` layers."""
    if decider is None:
        return None
    if not isinstance(decider, dict):
        raise ValueError(f"decider={short(decider)} must be a dict that describes a decider, or None")
    kind = decider.get("kind")
    if not isinstance(kind, str) or kind not in DECIDER_DEFAULTS:
        raise ValueError(f"decider kind {short(kind)} is not one of {', '.join(DECIDER_DEFAULTS)}")
    unknown = set(decider) - {"kind"} - set(DECIDER_DEFAULTS[kind])
    if unknown:
        allowed = ", ".join(DECIDER_DEFAULTS[kind])
        raise ValueError(f"a {kind} decider has no option {', '.join(sorted(unknown))}; it takes {allowed}")
    full = {"kind": kind, **DECIDER_DEFAULTS[kind], **decider}
    if kind == "tah2":  # it reads the last hidden state only
        _check_decider({name: value for name, value in full.items() if value is not None})
        return full
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
