"""Define the sizes and variants of the experiments, with their models and objectives."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

from transformers import Qwen3Config, Qwen3ForCausalLM, set_seed

from tah import TaHForCausalLM
from tah.training.trainer import Objective

LOOKAHEAD = {"next_input": "hidden", "attention": "own", "output": "zero_init", "lora_rank": 0}
# The paper's next input and output; the decider has the only new weights.
MIX = LOOKAHEAD | {"next_input": "topk", "output": "sum"}
PAPER = {"next_input": "topk", "attention": "duo", "output": "sum", "lora_rank": 4, "lora_alpha": 8}
TAH2 = {"next_input": "mlp", "attention": "duo", "output": "mixture", "lora_rank": 0, "decider": {"kind": "tah2"}}
LORA = {"lora_rank": 8, "lora_alpha": 16}
TAU = 0.3  # nats; a variant with `uncertain` iterates on tokens of higher entropy


@dataclass(frozen=True)
class Size:
    """Describe a Qwen3 from scratch, and its training.

    Args:
        layers: Number of layers.
        hidden: Width.
        operations: Possible numbers of operations of a problem; some should be too many for one pass.
        steps: Number of optimiser steps.
        batch: Problems per step.
        rate: Peak learning rate of AdamW (embeddings, norms, decider); that of Muon (matrices) is `MUON`.
        schedule: Schedule of both rates: constant for half of the training, then linear to 0; or `cosine`.
        heads: Number of attention heads.
        test: Number of problems to score per set.
        validation: Number of problems that determine the thresholds.
    """

    layers: int
    hidden: int
    operations: tuple[int, ...]
    steps: int
    batch: int
    rate: float = 3e-3
    schedule: str = "warmup_stable_decay"
    heads: int = 4
    test: int = 2000
    validation: int = 1000


SIZES = {
    "test": Size(2, 32, (1, 2), steps=6, batch=16, test=20, validation=10),
    "small": Size(1, 64, (1, 2, 3), steps=1000, batch=128, test=500, validation=250),
    "choice": Size(1, 64, (1, 1, 2, 3), steps=2000, batch=128, test=1000, validation=500),
    "nine": Size(1, 152, (1, 1, 2, 3), steps=1350, batch=144, test=1800, validation=450),
    "medium": Size(2, 128, (1, 2, 3, 4), steps=3000, batch=256),
    "large": Size(4, 256, (1, 2, 3, 4, 5), steps=10_000, batch=512),
}


@dataclass(frozen=True)
class Variant:
    """Describe a variant: its model and its training.

    Args:
        method: Method of `Objective`.
        model: Fields of `TaHConfig`; for `standard`, of the model whose number of parameters it has at least.
        share: Share of the supervised tokens with look-ahead.
        uncertain: Whether only tokens with an entropy above `TAU` have look-ahead.
        noise: Share of the supervised tokens whose labels are shuffled, for method `paper`. Labels then contain less
            information about the first choice.
        loss_weights: Weight of the loss at each depth. None: equal weights for `lookahead` and `blind`, otherwise the
            loss of the final output only.
        steps: Training steps, as a multiple of `Size.steps`.
        layers: Layers, as a multiple of `Size.layers`. The MLPs are narrower then, so that parameters stay the same.
        first: Steps of an earlier complete training as `standard`, as a multiple of `Size.steps`.
        early: Fields of `Objective` that have other values until the share `until` of the training.
        until: Share of the training with the values of `early`.
        decider_after: Whether a decider is trained after the model, with all other weights frozen.
        larger_teacher: Whether the labels of method `paper` come from a larger model, and not from a one-pass model of
            the same size.
        with_decider: For `standard`: whether the model whose number of parameters it has at least has a decider.
    """

    method: str
    model: dict[str, Any] = field(default_factory=dict)
    share: float = 1.0
    uncertain: bool = False
    noise: float = 0.0
    loss_weights: tuple[float, ...] | None = None
    steps: float = 1.0
    layers: int = 1
    first: float = 0.0
    early: dict[str, Any] = field(default_factory=dict)
    until: float = 0.0
    decider_after: bool = False
    larger_teacher: bool = True
    with_decider: bool = True

    @property
    def depth(self) -> int:
        return 1 if self.method == "standard" else self.model.get("max_depth", 2)

    @property
    def joint(self) -> bool:
        """Return whether a decider is trained together with the model."""
        return self.method in ("lookahead", "blind") and self.loss_weights is None and not self.uncertain

    @property
    def last(self) -> bool:
        """Return whether a decider is trained after the model."""
        return self.decider_after or self.method == "paper"


UNCERTAIN = Variant("lookahead", MIX, uncertain=True, decider_after=True)
LATE = replace(UNCERTAIN, loss_weights=(0.2, 0.8))
CHOICE = {  # the recipes that choose.py compares
    "all": Variant("lookahead", MIX),
    "uncertain": UNCERTAIN,
    "late": LATE,
    "formed": replace(UNCERTAIN, early={"uncertain": False}, until=0.4),
    "relaxed": replace(UNCERTAIN, early={"loss_weights": (0.2, 0.8)}, until=0.6),
    "continued-all": Variant("lookahead", MIX, steps=0.4, first=0.6),
    "continued-late": replace(LATE, steps=0.4, first=0.6),
    "hidden": Variant("lookahead", LOOKAHEAD | {"output": "sum"}),
}
CHOICE |= {f"{name}-lora": replace(its, model=its.model | LORA) for name, its in CHOICE.items()}
BLIND = {
    f"{name}-blind": replace(its, method="blind", model=its.model | {"attention": "blind"})
    for name, its in CHOICE.items()
}

VARIANTS = {
    "standard": Variant("standard"),
    "standard-x1.75": Variant("standard", steps=1.75),
    "standard-deep": Variant("standard", layers=2),
    "standard-wide": Variant("standard", LOOKAHEAD | LORA),
    "standard-wide-deep": Variant("standard", LOOKAHEAD | LORA, layers=2),
    "lookahead": Variant("lookahead", LOOKAHEAD),
    "lookahead-duo": Variant("lookahead", LOOKAHEAD | {"attention": "duo"}),
    "lookahead-topk": Variant("lookahead", LOOKAHEAD | {"next_input": "topk"}),
    "lookahead-sum": Variant("lookahead", LOOKAHEAD | {"output": "sum"}),
    "lookahead-mix": Variant("lookahead", MIX),
    "lookahead-mix-duo": Variant("lookahead", MIX | {"attention": "duo"}),
    "lookahead-mix-quarter": Variant("lookahead", MIX, share=0.25),
    "lookahead-mix-entropy": Variant("lookahead", MIX, uncertain=True),
    "lookahead-mix-entropy-late": Variant("lookahead", MIX, uncertain=True, loss_weights=(0.2, 0.8)),
    "lookahead-mix-entropy-late-3": Variant(
        "lookahead", MIX | {"max_depth": 3}, uncertain=True, loss_weights=(0.1, 0.2, 0.7)
    ),
    "lookahead-mix-3": Variant("lookahead", MIX | {"max_depth": 3}),
    "continued-mix": Variant("lookahead", MIX, steps=0.4, first=1.0),
    "continued-standard": Variant("standard", steps=0.4, first=1.0),
    "always-mix": Variant("lookahead", MIX, loss_weights=(0.0, 1.0)),
    "blind-mix-late": Variant("blind", MIX | {"attention": "blind"}, uncertain=True, loss_weights=(0.2, 0.8)),
    "blind-mix": Variant("blind", MIX | {"attention": "blind"}),
    "lookahead-quarter": Variant("lookahead", LOOKAHEAD, share=0.25),
    "lookahead-entropy": Variant("lookahead", LOOKAHEAD, uncertain=True),
    "always": Variant("lookahead", LOOKAHEAD, loss_weights=(0.0, 1.0)),
    "blind": Variant("blind", LOOKAHEAD | {"attention": "blind"}),
    "paper": Variant("paper", PAPER),
    "paper-noisy": Variant("paper", PAPER, noise=0.5),
    "paper-own": Variant("paper", PAPER, larger_teacher=False),
    "tah2": Variant("tah2", TAH2),
    "standard-tah2": Variant("standard", TAH2),
    "standard-tah2-x1.5": Variant("standard", TAH2, steps=1.5),
    **CHOICE,
    **BLIND,
}


def one_pass_of(recipe: Variant) -> Variant:
    """Return a one-pass variant with at least as many parameters as a recipe has when it is trained, and no more width.

    Its FLOPs can then match those of the recipe by more steps.
    """
    return Variant("standard", recipe.model, with_decider=recipe.joint or recipe.last)


def always_of(recipe: Variant) -> Variant:
    """Return a variant with the model of a recipe, without decider, that is trained to iterate on every token."""
    return Variant("lookahead", recipe.model, loss_weights=(0.0, 1.0))


@dataclass
class InTwoParts(Objective):
    """An objective that follows `first` until step `until`."""

    first: Objective | None = None
    until: int = 0

    def arguments(self, batch: dict[str, Any], step: int, depth: int, shared: bool = False) -> dict[str, Any]:
        if self.first is not None and step < self.until:
            return self.first.arguments(batch, step, depth, shared)
        return super().arguments(batch, step, depth, shared)


def objective_of(variant: Variant, seed: int, stage: Any = "backbone", steps: int = 0, tau: float = TAU) -> Objective:
    """Return the objective of a stage.

    Args:
        variant: Variant to train.
        seed: Random seed.
        stage: Stage of `Objective`.
        steps: Steps of the stage, for a variant with `early`.
        tau: Entropy in nats above which a token iterates, for a variant with `uncertain`.
    """
    objective = Objective(
        stage=stage,
        method=variant.method,
        max_depth=variant.depth,
        loss_weights=variant.loss_weights,
        share=variant.share,
        tau=tau,
        uncertain=variant.uncertain,
        joint=variant.joint,
        seed=seed,
    )
    if stage == "decider" or not variant.early:
        return objective
    first = replace(objective, **variant.early)
    return InTwoParts(**vars(objective), first=first, until=round(variant.until * steps))


# -- models ----------------------------------------------------------------------------------------------------------


def build(size: Size, variant: Variant, tokenizer: Any, seed: int, positions: int = 128) -> TaHForCausalLM:
    """Return the model of a variant.

    The MLPs of a `standard` are so wide that it has at least as many parameters as a model with the fields `model` of
    the variant, by default those of `lookahead` with linear maps, and with a decider if `with_decider` says so.

    Args:
        size: Size of the model.
        variant: Variant of the model.
        tokenizer: Tokenizer.
        seed: Random seed of the weights.
        positions: Largest number of positions.
    """
    inner, its = 3 * size.hidden, (tokenizer, seed, positions)
    if variant.method != "standard":
        return new_model(size, inner, variant.model, *its, decides=variant.joint or variant.last)
    wanted = parameters(new_model(size, inner, variant.model or LOOKAHEAD, *its, decides=variant.with_decider))
    size = replace(size, layers=size.layers * variant.layers)
    missing = wanted - parameters(new_model(size, 1, None, *its))
    return new_model(size, 1 + math.ceil(missing / (3 * size.hidden * size.layers)), None, *its)


def new_model(
    size: Size,
    inner: int,
    fields: dict[str, Any] | None,
    tokenizer: Any,
    seed: int,
    positions: int = 128,
    decides: bool = False,
) -> TaHForCausalLM:
    set_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        intermediate_size=inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        head_dim=size.hidden // size.heads,
        max_position_embeddings=positions,
        initializer_range=0.06,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    plain = {"max_depth": 1, "lora_rank": 0}
    options = {"decider": {"kind": "lean", "width": size.hidden} if decides else None}
    options |= plain if fields is None else {"max_depth": 2} | fields
    return TaHForCausalLM.from_base(Qwen3ForCausalLM(config), policy="never", **options)


def parameters(model: TaHForCausalLM) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@dataclass(frozen=True)
class Weights:
    """Numbers of weights that a token is multiplied with.

    Args:
        body: In the layers.
        head: In the head, which is also the table of embeddings.
        added: In LoRA, linear maps and decider.
        decider: In the decider alone.
    """

    body: int
    head: int
    added: int
    decider: int


def weights_of(model: TaHForCausalLM) -> Weights:
    """Return the numbers of weights of a model."""
    named = dict(model.base.named_parameters())
    lora = sum(p.numel() for n, p in named.items() if "lora" in n)
    head = next(p.numel() for n, p in named.items() if "embed_tokens" in n)
    body = sum(p.numel() for n, p in named.items() if "embed" not in n and "lm_head" not in n) - lora
    decider = 0 if model.decider is None else sum(p.numel() for p in model.decider.parameters())
    return Weights(body, head, parameters(model) - parameters(model.base) + lora, decider)
