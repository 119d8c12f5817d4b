"""Read the updater and the decider of an original TaH2 checkpoint, as plain data.

As with TaH, an entry that a TaH model does not support raises `ValueError` with the file and the entry.

Shapes: D width of the base, I inner width of an MLP.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..config import check_threshold
from ..errors import some
from .original import (
    ALWAYS,
    CONFIG,
    DECIDER,
    MLP_DECIDER,
    MLP_UPDATER,
    NEVER,
    NO_UPDATER,
    UPDATER,
    arguments_of,
    decider_file,
    read_pickle,
)

if TYPE_CHECKING:
    from ..model import TaHForCausalLM

# Arguments of each class with their defaults. The sizes come from the tensors, so 0 stands for any.
NETWORK: dict[str, Any] = {"hidden_size": 0, "intermediate_size": 0, "hidden_act": "silu", "rms_norm_eps": 1e-6}
DECIDER_ARGUMENTS: dict[str, Any] = {
    **NETWORK,
    "topk": 0,
    "max_iter": 0,
    "threshold": 0.5,
    "dtype": torch.bfloat16,
    "stochastic_sampling": False,
    "base_warmup_steps": 0,  # of training
    "uniform_init": False,  # of training
    "memory_lean_fp32_reductions": False,  # another order of the same operations
}
DECIDERS = dict.fromkeys((MLP_DECIDER, ALWAYS, NEVER), DECIDER_ARGUMENTS)
UPDATERS: dict[str, dict[str, Any]] = {
    MLP_UPDATER: {**NETWORK, "enable_norm_pre_mlp": True, "enable_norm_out": True},
    NO_UPDATER: {"hidden_size": 0},
}
# Arguments of which a TaH model supports one value. The original's samples are not reproducible: they have no seed.
FIXED = {"hidden_act": "silu", "rms_norm_eps": 1e-6, "stochastic_sampling": False}

# Tensors by the authors' names: our names, and the shapes in D and I.
MLP = {
    "mlp.gate_proj": ("mlp.gate_proj", "ID"),
    "mlp.up_proj": ("mlp.up_proj", "ID"),
    "mlp.down_proj": ("mlp.down_proj", "DI"),
}
TENSORS = {
    UPDATER: {
        "norm_prev": ("norm_embed", "D"),
        "norm_last": ("norm_hidden", "D"),
        "projection": ("proj", "D2"),
        "norm_pre_mlp": ("norm_pre", "D"),
        "norm_out": ("norm_out", "D"),
        **MLP,
    },
    DECIDER: {
        "norm_first": ("norm_embed", "D"),
        "norm_last": ("norm_hidden", "D"),
        "norm_l": ("norm_probs", "D"),
        "input_proj": ("proj", "D3"),
        "norm_out": ("norm_out", "D"),
        "score": ("score", "1D"),
        **MLP,
    },
}
OUR_MODULES = {UPDATER: "next_input_mlp", DECIDER: "decider"}
ENTRIES = {UPDATER: "input_updater", DECIDER: "iter_decider"}  # of tah_config.json


@dataclass
class Network:
    """Arguments and tensors of an updater or a decider.

    Attributes:
        name: Name of its file.
        arguments: All its arguments.
        state: Its tensors by the authors' names, without `.weight`.
    """

    name: str
    arguments: dict[str, Any]
    state: dict[str, Tensor]

    @property
    def width(self) -> int:
        """Return I."""
        return len(self.state["mlp.gate_proj"])

    def check(self, width: int) -> None:
        """Check shapes and arguments for a base of `width` D.

        Raises:
            ValueError: A shape or an argument does not fit.
        """
        sizes, wrong = {"D": width, "I": self.width, "1": 1, "2": 2 * width, "3": 3 * width}, []
        for name, tensor in self.state.items():
            needed = [sizes[letter] for letter in TENSORS[self.name][name][1]]
            if list(tensor.shape) != needed:
                wrong.append(f"{name}.weight is {list(tensor.shape)}, not {needed}")
        if wrong:
            raise ValueError(f"{self.name} does not fit the base: {some(wrong)}")
        if damaged := [f"{name}.weight" for name, tensor in self.state.items() if not tensor.isfinite().all()]:
            raise ValueError(f"{self.name} has numbers that are not finite in {some(damaged)}; its weights are damaged")
        for argument, size in (("hidden_size", width), ("topk", width), ("intermediate_size", self.width)):
            if self.arguments.get(argument, 0) not in (0, size):
                given = f"{ENTRIES[self.name]}_kwargs.{argument} is {self.arguments[argument]}"
                raise ValueError(f"{CONFIG}: {given}, but {self.name} is for {size}")

    def rounded(self, tensor: Tensor) -> Tensor:
        """Return a tensor in the dtype in which the original builds the network."""
        return tensor.to(self.arguments.get("dtype", tensor.dtype))

    def is_rounded(self, dtype: torch.dtype) -> bool:
        """Return whether tensors lose precision in a model of `dtype`."""
        return any(not torch.equal(self.rounded(t).to(dtype).double(), t.double()) for t in self.state.values())


@dataclass
class OriginalTaH2:
    """What a TaH model needs of a TaH2 checkpoint, besides the base.

    Attributes:
        fields: Fields of its `TaHConfig`, without the base and the threshold.
        threshold: Threshold before rounding.
        networks: Updater and decider, as far as there are any.
    """

    fields: dict[str, Any]
    threshold: float
    networks: list[Network] = field(default_factory=list)

    def check(self, width: int) -> None:
        """Check the networks for a base of `width` D, before any is allocated."""
        for network in self.networks:
            network.check(width)

    def rounding(self, dtype: torch.dtype) -> list[str]:
        """Return notes on the rounding of the networks next to a base of `dtype`."""
        notes = []
        for network in self.networks:
            if network.name == UPDATER and network.is_rounded(dtype):
                notes.append(f"the updater is rounded to the base's {dtype}; the original computes it in float32")
            if network.name == DECIDER and network.is_rounded(dtype):
                through = network.arguments["dtype"]
                notes.append(f"the decider is rounded to {through} and to the base's {dtype}, as in the original")
        return notes

    @torch.no_grad()
    def copy_to(self, model: TaHForCausalLM) -> None:
        """Copy the tensors into the model, in its dtype."""
        own = model.state_dict()
        for network in self.networks:
            for name, tensor in network.state.items():
                ours = TENSORS[network.name][name][0]
                own[f"{OUR_MODULES[network.name]}.{ours}.weight"].copy_(network.rounded(tensor))


def read_tah2(source: Path, config: dict[str, Any], notes: list[str]) -> OriginalTaH2:
    """Return the parts of a TaH2 checkpoint.

    Args:
        source: Directory of the checkpoint.
        config: Result of `read_config`.
        notes: List to which the function appends notes about unexpected properties.

    Raises:
        ValueError: A part is missing or damaged, is not plain data, or is not supported.
    """
    policy, decider, stop, threshold = _decider(source, config, notes)
    depth = min(stop, config["max_iter"])
    if stop < config["max_iter"]:
        notes.append(f"max_iter is {config['max_iter']}, but the decider stops at its own {stop}: max_depth is {depth}")
    if "iter_attention_mode" not in config:
        notes.append(f"{CONFIG} has no iter_attention_mode: it is causal, the original's default")
    duo = config.get("iter_attention_mode", "causal") == "duo"
    even = config.get("weighted_hidden_method", "stop_prob_mix") == "even_mix"
    if policy == "decider" and not even and stop > config["max_iter"]:
        lost = "the original loses the rest of the mixture at depth max_iter, and a TaH model does not"
        notes.append(f"the decider's max_iter is {stop}, but the model's is {depth}: {lost}")
    fields = {
        "max_depth": depth,
        "policy": policy,
        "attention": "duo" if duo else "own",
        "output": "even" if even else "mixture",
        "decider": None if decider is None else {"kind": "tah2", "width": decider.width},
        "lora_rank": 0,
    }
    updater = _updater(source, config, depth)
    if updater is not None:
        norms = [updater.arguments["enable_norm_pre_mlp"], updater.arguments["enable_norm_out"]]
        fields |= {"next_input": "mlp", "next_input_width": updater.width, "next_input_norms": norms}
    networks = [network for network in (updater, decider) if network is not None]
    return OriginalTaH2(fields, threshold, networks)


def _updater(source: Path, config: dict[str, Any], depth: int) -> Network | None:
    """Return the updater; None if there is only one pass and the configuration has no network."""
    path, name = source / UPDATER, config.get("input_updater")
    saved = read_pickle(path) if path.is_file() and name != NO_UPDATER else None
    name = name or (saved["class"] if saved else NO_UPDATER)
    given = config.get("input_updater_kwargs") or (saved["init_args"] if saved else {})
    arguments = arguments_of(name, given, "input_updater", UPDATERS)
    _check_fixed(arguments, "input_updater")
    if name == NO_UPDATER:
        if depth > 1:
            raise ValueError(f"{CONFIG}: input_updater is {config.get('input_updater')!r}, which needs max_iter 1")
        return None
    if saved is None:
        raise ValueError(f"{CONFIG} requires a trained {name}, but {UPDATER} is missing")
    return _network(UPDATER, arguments, saved["state_dict"])


def _decider(source: Path, config: dict[str, Any], notes: list[str]) -> tuple[str, Network | None, int, float]:
    """Return policy, trained decider, own maximum depth and threshold at inference."""
    given, entry = dict(config.get("iter_decider_kwargs") or {}), f"{CONFIG}: iter_decider_kwargs"
    path = decider_file(source, given.pop("load_path", None))
    trained = config.get("iter_decider")
    saved = read_pickle(path) if path.is_file() and trained not in (ALWAYS, NEVER) else None
    trained = trained or (saved["class"] if saved else None)
    if saved is not None and not given and saved["class"] == trained:
        given, entry = saved["init_args"], f"{DECIDER}: init_args"
        notes.append(f"{CONFIG} has no iter_decider_kwargs; the arguments saved in {DECIDER} are used")
    arguments = arguments_of(trained, given, "iter_decider", DECIDERS)
    deciding, stop = config.get("eval_iter_decider") or "iter_decider", given.get("max_iter", config["max_iter"])
    if deciding == "iter_decider":
        deciding = trained
    else:
        fresh = config.get("eval_iter_decider_kwargs") or {}
        changed = arguments_of(deciding, fresh, "eval_iter_decider", DECIDERS)
        stop = fresh.get("max_iter", config["max_iter"])
        if deciding == trained == MLP_DECIDER:
            given, arguments = given | fresh, arguments | fresh
            entry = f"{CONFIG}: eval_iter_decider_kwargs" if "threshold" in fresh else entry
            notes.append("eval_iter_decider names a class, which the original would build untrained; this is trained")
        elif deciding == MLP_DECIDER:
            raise ValueError(f"{CONFIG} requires a trained {MLP_DECIDER}, but iter_decider is {trained}")
        _check_fixed(changed, "eval_iter_decider")
    if deciding == MLP_DECIDER:
        _check_fixed(arguments, "iter_decider")
    if type(stop) is not int or stop < 1:
        raise ValueError(f"{CONFIG}: iter_decider_kwargs.max_iter is {stop!r}, not an integer >= 1")
    policy = {MLP_DECIDER: "decider", ALWAYS: "always", NEVER: "never"}[deciding]
    if trained != MLP_DECIDER:
        return policy, None, stop, 0.5
    if saved is None:
        raise ValueError(f"{CONFIG} requires a trained {MLP_DECIDER}, but {path.name} is missing")
    return policy, _network(DECIDER, arguments, saved["state_dict"]), stop, _threshold(saved, given, entry, notes)


def _threshold(saved: dict[str, Any], given: dict[str, Any], entry: str, notes: list[str]) -> float:
    """Return the threshold: that of the arguments `given` in `entry`, else the one among the weights."""
    buffer = saved["state_dict"].get("threshold")
    stored = buffer.item() if buffer is not None and buffer.numel() == 1 else None
    used = given.get("threshold", 0.5 if stored is None else stored)
    try:
        check_threshold(used)
    except ValueError as error:
        where = f"{entry}.threshold" if "threshold" in given else f"{DECIDER}: the threshold among the weights"
        raise ValueError(f"{where} is {used!r}, not a number in [0, 1]") from error
    others = {"among the weights": stored, "among the arguments in the file": saved["init_args"].get("threshold")}
    for where, value in others.items():
        # The weights are rounded to bfloat16. The authors' server reads the arguments in the file.
        if isinstance(value, float) and abs(value - used) > 4e-3:
            notes.append(f"the threshold {where}, {value:.6g}, is not used: {used:.6g} is")
    return used


def _check_fixed(arguments: dict[str, Any], entry: str) -> None:
    for name, only in FIXED.items():
        if name in arguments and arguments[name] != only:
            fix = "; set it to false, then set decision to 'sample' in the converted config.json"
            raise ValueError(
                f"{CONFIG}: {entry}_kwargs.{name} is {arguments[name]!r}, which a TaH model cannot represent; "
                f"only {only!r}{fix if name == 'stochastic_sampling' else ''}"
            )


def _network(name: str, arguments: dict[str, Any], state: dict[str, Tensor]) -> Network:
    """Return a network; raise `ValueError` if the names of its tensors are not those that its arguments describe."""
    needed = dict(TENSORS[name])
    for argument, norm in (("enable_norm_pre_mlp", "norm_pre_mlp"), ("enable_norm_out", "norm_out")):
        if not arguments.get(argument, True):
            del needed[norm]
    found = {key.removesuffix(".weight"): tensor for key, tensor in state.items() if key not in arguments}
    wrong = [f"{key}.weight is missing" for key in needed.keys() - found.keys()]
    wrong += [f"{key}.weight is not a parameter of it" for key in found.keys() - needed.keys()]
    wrong += [f"{key}.weight is a number" for key in found.keys() & needed.keys() if found[key].dim() == 0]
    if wrong:
        raise ValueError(f"{name} does not fit its arguments: {some(wrong)}")
    return Network(name, arguments, found)
