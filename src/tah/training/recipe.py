"""A recipe: one YAML file that describes one experiment, checked before anything runs.

`TaHConfig` describes the model and is saved with the weights; a recipe describes how the model is made. Keys below
`training` go to transformers' `TrainingArguments` unchanged.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_type_hints

import numpy as np
from transformers import TrainingArguments
from typing_extensions import TypedDict

try:
    import yaml
    from pydantic import (
        AfterValidator,
        BaseModel,
        ConfigDict,
        Field,
        PlainSerializer,
        WrapValidator,
        model_serializer,
        model_validator,
    )
except ImportError as error:
    raise ImportError("recipes need pydantic and pyyaml: pip install 'tah[train]'") from error

from ..config import TaHConfig, current_fields
from ..data.rows import check_rule, load_rows
from ..files import write_atomically
from ..names import BY_GAIN, BY_SHARE, DTYPES, METHODS, MIXTURES, suggest

if TYPE_CHECKING:
    from datasets import Dataset

CHOSEN = ("policy", "threshold")  # TaHConfig fields that a stage sets when it ends
OWNED = {  # TrainingArguments that another place decides
    "output_dir": "it is the run's directory; use output",
    "seed": "it is the recipe's seed",
    "resume_from_checkpoint": "it is the command's --resume",
}
POSITIVE = (
    "max_steps",
    "num_train_epochs",
    "learning_rate",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
)
STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)

# -- types of values -------------------------------------------------------------------------------------------------


def one_of(words: Sequence[str]) -> AfterValidator:
    """Return a validator that accepts only `words`."""

    def check(value: str) -> str:
        if value not in words:
            raise ValueError(f"is unknown; {suggest(value, words)}")
        return value

    return AfterValidator(check)


def _refuse(reason: str) -> AfterValidator:
    def check(value: Any) -> None:
        raise ValueError(f"is decided elsewhere: {reason}")

    return AfterValidator(check)


def _training_fields() -> dict[str, Any]:
    """Return the type of each field of `TrainingArguments`, as pydantic checks it."""
    hints = get_type_hints(TrainingArguments)
    found: dict[str, Any] = {}
    for name in (field.name for field in dataclasses.fields(TrainingArguments) if field.init):
        options = [kind for kind in get_args(hints[name]) if isinstance(kind, type) and issubclass(kind, enum.Enum)]
        found[name] = Annotated[str, one_of([str(word.value) for word in options[0]])] if options else hints[name]
        if name in POSITIVE:
            found[name] = Annotated[hints[name], Field(gt=0)]
        if name in OWNED:
            found[name] = Annotated[Any, _refuse(OWNED[name])]
    return found


if TYPE_CHECKING:
    Training = dict[str, Any]
else:  # the values that are given, checked and unchanged: no default is filled in, and 1 stays 1 where 1.0 is meant
    Fields = TypedDict("Fields", _training_fields(), total=False)
    Fields.__pydantic_config__ = STRICT
    Training = Annotated[Fields, WrapValidator(lambda value, check: check(value) and value), PlainSerializer(dict)]

# -- sections ---------------------------------------------------------------------------------------------------------

Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, lt=1)]


class Part(BaseModel):
    """A section. Unknown keys and values of another type are errors; no value is converted."""

    model_config = STRICT


class Base(Part):
    """The model that is made to iterate.

    Args:
        model: Directory or Hub id of the base, or `smollm2`. None if the recipe trains its base itself (`scratch`).
        tokenizer: Directory or Hub id of the tokenizer and its chat template. None takes that of `model`.
        prune_layers: Number of layers to drop before training; 0 drops none.
        prune_texts: Number of held-out texts that decide which layers are dropped.
        scratch: Sizes and training of a base that the recipe makes.
        dtype: Precision of the weights; `auto` is that of the saved base.
    """

    model: str | None = None
    tokenizer: str | None = None
    prune_layers: Count = 0
    prune_texts: Positive = 64
    scratch: dict[str, Any] | None = None
    dtype: Annotated[str, one_of(DTYPES)] = "auto"


class Data(Part):
    """The texts.

    Args:
        source: Hub id (`owner/name` or `owner/name:config`), directory or file, or `tiny` for generated texts.
        split: Split of the source.
        validation: Source of the held-out texts. None takes `validation_split` of `source`, or a share of `split`.
        validation_split: Split of the held-out texts.
        validation_share: Share of `split` that is held out if nothing else is given, drawn with the recipe's seed.
        columns: Names of the source's columns by role (`messages`, `prompt`, ...).
        max_length: Largest number of tokens of a text; longer texts are dropped and counted.
        limit: Number of texts to use from the start of the source; None uses all.
        generate: Settings of generated data.
    """

    source: str
    split: str = "train"
    validation: str | None = None
    validation_split: str | None = None
    validation_share: Share = 0.01
    columns: dict[str, str] = {}
    max_length: Annotated[int, Field(ge=2)] = 2048
    limit: Positive | None = None
    generate: dict[str, Any] | None = None


class Label(Part):
    """The labels of hard tokens, method.md (9).

    Args:
        reference: Reference model: directory, Hub id, `smollm2`, or `trained` for one that the recipe trains on
            generated data.
        rule: Rule for a hard token: `top1` (the reference's most probable token is another one), `prob<p` or
            `rank>k`. A changed rule needs no new pass of the reference.
        tokens_per_batch: Number of tokens that the reference reads at a time.
        rows_per_shard: Number of texts per file; a killed run loses at most one file of work.
    """

    reference: str
    rule: Annotated[str, AfterValidator(lambda rule: check_rule(rule) and rule)] = "top1"
    tokens_per_batch: Positive = 16384
    rows_per_shard: Positive = 1024


class Backbone(Part):
    """Stage 1 trains the base, LoRA and the maps U and Z, method.md (10) and (12).

    Args:
        method: Method or baseline, which decides who iterates in training.
        train: `all` trains all weights; `lora` trains everything but the base, which needs little memory.
        packed: Whether several texts share a row.
        loss_weights: Weight of the output after each depth, one number per depth. None counts only the final output
            (`paper` and baselines), or all outputs alike (`lookahead`, `blind`).
        share: Share of tokens that iterate: of the supervised ones for `lookahead` and `blind`, of all for `random`.
        tau: Entropy in nats above which `confidence` iterates.
        uncertain: Whether, for `lookahead` and `blind`, only tokens with an entropy above `tau` iterate. This costs
            about as much as `standard`. It is not allowed with `decider.joint`, which learns from all tokens.
        depth_schedule: Pairs (share of training done, most passes from then on), both rising. The first pair has share
            0 and depth 2, because with one pass LoRA, maps and a joint decider would not be trained.
        coverage: Share of the total gain that hard tokens have, one number per depth, for `tah2`, method.md (16). The
            last number holds for deeper depths too.
        decider_weight: Weight of the decider's loss, for `tah2`, method.md (17).
        init: TaH or base checkpoint to start from, instead of `base.model`.
        training: Arguments of `TrainingArguments`.
    """

    method: Annotated[str, one_of(METHODS)] = "paper"
    train: Literal["all", "lora"] = "all"
    packed: bool = False
    loss_weights: list[Annotated[float, Field(ge=0)]] | None = None
    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    tau: Annotated[float, Field(ge=0)] = 0.3
    uncertain: bool = False
    depth_schedule: list[Annotated[tuple[Annotated[float, Field(ge=0, lt=1)], Positive], Field(strict=False)]] = []
    coverage: list[Annotated[float, Field(gt=0, le=1)]] = [0.99]
    decider_weight: Annotated[float, Field(ge=0)] = 0.05
    init: str | None = None
    training: Training = {}

    @model_serializer(mode="wrap")
    def _leave_out(self, write: Any) -> dict[str, Any]:
        """Return the fields without those of `tah2` for other methods, so that recipes of older runs stay equal."""
        fields: dict[str, Any] = write(self)
        if self.method != "tah2":
            del fields["coverage"], fields["decider_weight"]
        return fields


class Decider(Part):
    """Stage 2 trains the decider with all other weights frozen, method.md (11). `model.decider` has its kind.

    Args:
        joint: Whether the decider is trained together with the backbone (`lookahead`, `blind`).
        gain: Smallest decrease of a token's cross-entropy, in nats, for which a pass counts as useful (`lookahead`,
            `blind`).
        pos_weight: Weight of hard tokens in the loss. None measures it on the labels.
        target: The threshold is chosen on held-out texts, for an iterated `share` or for the lowest `loss`. After
            `paper`, `loss` can choose a threshold at which nearly all tokens iterate, which stage 1 did not train.
        target_share: Iterated share that the threshold should give.
        training: Arguments of `TrainingArguments`.
    """

    joint: bool = False
    gain: Annotated[float, Field(ge=0)] = 0.05
    pos_weight: Annotated[float, Field(gt=0)] | None = None
    target: Literal["share", "loss"] = "share"
    target_share: Share | None = 0.07
    training: Training = {}


class Controls(Part):
    """Further models for the report, trained after the run's own model (`base.scratch` only).

    Args:
        equal_compute: Whether to train a baseline with as many steps as cost what labels, backbone and decider did.
        blind: Whether to train both stages again with deeper passes that read no text, a control: what they gain is
            not reasoning.
    """

    equal_compute: bool = False
    blind: bool = False


class Recipe(Part):
    """One experiment: data, labels, base and both stages.

    Args:
        name: Name of the recipe. In a file it may be missing; then it is the name of the file.
        seed: Random seed of everything that is drawn.
        output: Directory of the run. None stands for `runs/<name>`.
        base: The model that is made to iterate.
        model: Fields of `TaHConfig`.
        data: The texts.
        label: The labels. null: no labels, which only `paper` needs.
        backbone: Stage 1.
        decider: Stage 2. null: no second stage.
        controls: Further models for the report.
    """

    name: Annotated[str, Field(pattern=r"^\w[\w.+-]*$")]
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    output: Annotated[str, Field(min_length=1)] | None = None
    base: Base
    model: dict[str, Any] = {}
    data: Data
    label: Label | None = None
    backbone: Backbone = Backbone()
    decider: Decider | None = None
    controls: Controls = Controls()

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        """Check the rules between fields."""
        if self.backbone.method == "blind":
            if self.model.get("attention", "blind") != "blind":
                raise ValueError(f"model.attention={self.model['attention']!r}, but backbone.method=blind needs blind")
            self.model["attention"] = "blind"
        self.model = current_fields(self.model)
        _check_model(self.model)
        self._check_base()
        self._check_labels()
        self._check_depths()
        self._check_tah2()
        self._check_decider()
        self._check_shares()
        self._check_controls()
        return self

    def _check_base(self) -> None:
        base = self.base
        if (base.model is None) == (base.scratch is None):
            raise ValueError("base.model is required: a directory, a hub id, or smollm2 (or else base.scratch)")
        if base.scratch is not None and self.data.generate is None:
            raise ValueError("base.scratch is trained on generated data; give data.source=tiny, or name a base.model")
        if base.prune_layers and base.scratch is not None:
            raise ValueError("base.prune_layers has no place beside base.scratch; make the base smaller instead")
        if base.prune_layers and self.backbone.init is not None:
            raise ValueError("backbone.init replaces the base, so base.prune_layers has no effect; set it to 0")
        if self.data.validation is None and self.data.validation_split == self.data.split:
            raise ValueError(f"data.validation_split={self.data.split} is what is trained on; name another split")
        if (self.data.source == "tiny") != (self.data.generate is not None):
            raise ValueError("data.generate belongs to data.source=tiny, and data.source=tiny needs it")

    def _check_labels(self) -> None:
        label = self.label
        if label is None:
            if self.uses_labels:
                raise ValueError(
                    "label is required for backbone.method=paper: set label.reference to a model, or use "
                    "backbone.method=lookahead, which needs no labels"
                )
            return
        if label.reference == "trained" and self.base.scratch is None:
            raise ValueError("label.reference=trained needs base.scratch; name a model instead")

    def _check_depths(self) -> None:
        backbone, most = self.backbone, self.max_depth
        if most == 1 and backbone.method != "standard":
            raise ValueError(f"model.max_depth=1 leaves nothing to iterate for backbone.method={backbone.method}")
        weights = backbone.loss_weights
        if weights is not None and (len(weights) != most or sum(weights) <= 0):
            raise ValueError(f"backbone.loss_weights={weights} must be {most} numbers, one per depth, not all 0")
        starts, depths = [s for s, _ in backbone.depth_schedule], [d for _, d in backbone.depth_schedule]
        rising = all(a < b for values in (starts, depths) for a, b in zip(values, values[1:], strict=False))
        if starts and (starts[0] != 0 or not rising or depths[0] < 2 or depths[-1] > most):
            pairs = [list(pair) for pair in backbone.depth_schedule]
            raise ValueError(
                f"backbone.depth_schedule={pairs} must be [share done, depth] pairs that rise, "
                f"from share 0 and depth 2, to depth {most} (model.max_depth) at most"
            )
        if weights is not None and depths and sum(weights[: depths[0]]) == 0:
            raise ValueError(f"backbone.loss_weights={weights} leave no loss at depth {depths[0]} of depth_schedule")

    def _check_tah2(self) -> None:
        backbone = self.backbone
        if backbone.method != "tah2":
            if given := sorted({"coverage", "decider_weight"} & backbone.model_fields_set):
                raise ValueError(f"backbone.{given[0]} is for method tah2, not {backbone.method}; drop it")
            return
        if self.decider is not None:
            raise ValueError("backbone.method=tah2 trains the decider together with the backbone; set decider=null")
        if (self.model.get("decider") or {}).get("kind") != "tah2":
            raise ValueError("backbone.method=tah2 trains a decider of kind tah2; set model.decider={kind: tah2}")
        if self.model.get("output", "sum") not in MIXTURES:
            raise ValueError(f"backbone.method=tah2 needs model.output={' or '.join(MIXTURES)}")
        if self.model.get("attention") == "blind":
            raise ValueError("backbone.method=tah2 has no blind control; set model.attention to duo or own")
        if backbone.loss_weights is not None:
            raise ValueError("backbone.loss_weights has no place in method tah2, whose loss is that of the mixture")
        if not 1 <= len(backbone.coverage) < self.max_depth:
            raise ValueError(f"backbone.coverage={backbone.coverage} must be one number, or one per depth but the last")

    def _check_decider(self) -> None:
        decider, method = self.decider, self.backbone.method
        if decider is None:
            return
        if self.model.get("decision", "threshold") == "sample":
            raise ValueError(
                "the decider stage chooses a threshold, and model.decision=sample has none; drop one of them"
            )
        if self.model.get("decider", {}) is None:
            raise ValueError("the decider stage has nothing to train: model.decider is null; set decider=null too")
        if not self.uses_labels and not self.by_gain:
            raise ValueError(
                f"a decider learns from labels (method paper) or gains ({', '.join(BY_GAIN)}), and "
                f"backbone.method={method} has neither; set decider=null"
            )
        if decider.joint and not self.by_gain:
            raise ValueError(f"decider.joint works with backbone.method={' or '.join(BY_GAIN)}, not {method}")
        if decider.joint and self.backbone.uncertain:
            raise ValueError("decider.joint learns from all tokens and backbone.uncertain trains few; drop one of them")
        if decider.joint and 0 in (self.backbone.loss_weights or ()):
            raise ValueError("decider.joint needs every depth's loss, so no 0 in backbone.loss_weights")
        if decider.target == "share" and decider.target_share is None:
            raise ValueError("decider.target=share needs decider.target_share; or use decider.target=loss")

    def _check_shares(self) -> None:
        backbone = self.backbone
        if backbone.share < 1 and backbone.method not in BY_SHARE:
            raise ValueError(f"backbone.share={backbone.share} is for {', '.join(BY_SHARE)}, not {backbone.method}")
        if backbone.uncertain and not self.by_gain:
            raise ValueError(f"backbone.uncertain=true is for {', '.join(BY_GAIN)}, not {backbone.method}")
        if backbone.share == 1 and backbone.method == "random":
            raise ValueError("backbone.method=random needs backbone.share below 1; iterating all tokens is `always`")
        if backbone.train == "lora" and self.model.get("lora_rank") == 0 and backbone.method != "tah2":
            raise ValueError("backbone.train=lora with model.lora_rank=0 leaves nothing to train")
        if backbone.train == "lora" and backbone.method == "standard":
            raise ValueError("backbone.train=lora with method=standard trains nothing: the adapter is off at depth 1")

    def _check_controls(self) -> None:
        controls = self.controls
        if (controls.equal_compute or controls.blind) and self.base.scratch is None:
            raise ValueError("controls are trained from base.scratch, as in the recipe tiny; drop the section")
        if controls.equal_compute and self.max_depth > 2 and self.backbone.method != "tah2":
            raise ValueError(
                "controls.equal_compute counts tokens that iterate, not passes: it needs model.max_depth=2"
            )
        if controls.blind and self.decider is None:
            raise ValueError("controls.blind needs a decider section, to choose as many tokens as the run's own model")
        if controls.blind and self.model.get("attention") == "blind":
            raise ValueError("controls.blind has nothing to control: model.attention is blind already")

    @property
    def max_depth(self) -> int:
        """Largest number of passes in stage 1."""
        return 1 if self.backbone.method == "standard" else int(self.model.get("max_depth", 2))

    @property
    def by_gain(self) -> bool:
        """Whether the decider learns from the gain of a pass, and not from labels."""
        return self.backbone.method in BY_GAIN

    @property
    def joint(self) -> bool:
        """Whether stage 1 trains the decider too."""
        return self.backbone.method == "tah2" or (self.decider is not None and self.decider.joint)

    @property
    def uses_labels(self) -> bool:
        return self.backbone.method == "paper"

    @property
    def makes_base(self) -> bool:
        """Whether the run has a `base` directory of its own."""
        return self.base.prune_layers > 0 or self.base.scratch is not None

    def directory(self) -> Path:
        """Return the directory of the run."""
        return Path(self.output) if self.output is not None else Path("runs") / self.name

    def base_path(self, run: Path) -> str:
        """Return the path of the model to train, in the run or as in the recipe (for `load.find`)."""
        return str(run / "base") if self.makes_base else str(self.base.model)

    def tokenizer_path(self, run: Path) -> str:
        """Return the path of the tokenizer (for `load.find`). Pruning a base does not change it."""
        return self.base.tokenizer or self.base.model or str(run / "base")

    def rows(self, run: Path) -> tuple[Dataset, Dataset]:
        """Return the texts to train on and the held-out texts.

        Raises:
            ValueError: The data cannot be read, or there are too few rows to hold any out.
        """
        data = self.data
        if data.generate is not None:
            return load_rows(str(run / "data" / "train.jsonl")), load_rows(str(run / "data" / "validation.jsonl"))
        rows = load_rows(data.source, data.split, data.columns, data.limit)
        if data.validation is not None or data.validation_split is not None:
            split = data.validation_split or data.split
            return rows, load_rows(data.validation or data.source, split, data.columns)
        count = max(1, round(data.validation_share * len(rows)))
        if len(rows) < 2:
            raise ValueError(f"{data.source} has one row, so none can be held out; give data.validation")
        held_out = np.zeros(len(rows), bool)
        held_out[np.random.default_rng(self.seed).permutation(len(rows))[:count]] = True
        return rows.select(np.flatnonzero(~held_out)), rows.select(np.flatnonzero(held_out))

    def resolved(self) -> dict[str, Any]:
        """Return every field, with defaults, as plain values."""
        return self.model_dump(mode="json")

    def save(self, path: str | Path) -> None:
        """Write the recipe atomically, as YAML that `load_recipe` reads."""
        write_atomically(path, "# Every field as it was used.\n" + yaml.safe_dump(self.resolved(), sort_keys=False))


def _check_model(fields: dict[str, Any]) -> None:
    """Raise `ValueError` with the field if `model` makes no valid `TaHConfig`, as far as is known without the base."""
    own = [name for name in TaHConfig.__annotations__ if name not in ("base_config", *CHOSEN)]
    for name in fields:
        if name in CHOSEN:
            raise ValueError(f"model.{name} is chosen by training, from backbone.method and the decider stage; drop it")
        if name not in own:
            raise ValueError(f"model.{name} is unknown; {suggest(name, own)}")
    if isinstance(fields.get("decider"), dict) and "kind" not in fields["decider"]:
        raise ValueError("model.decider.kind is required: lean (hidden states only), mlp or tah2 (the authors')")
    some_base = {"model_type": "llama", "num_hidden_layers": 10**6}  # layers are checked when the base is known
    try:
        TaHConfig(base_config=some_base, policy="never", **copy.deepcopy(fields))
    except (TypeError, ValueError) as error:
        line = " ".join(str(error).split())
        raise ValueError(f"model.{line}" if line.partition("=")[0] in own else f"model: {line}") from error
