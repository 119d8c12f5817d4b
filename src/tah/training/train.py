"""Train one stage of a recipe, from labelled data to a checkpoint (method.md, sections 9 to 11).

`trainer.py` has the losses. The directory of a stage contains the checkpoint (safetensors, tokenizer), `run.json`
(recipe, data, versions), `metrics.jsonl`, `curves.png`, TensorBoard logs, and `checkpoints/` with the full state to
resume from.
"""

from __future__ import annotations

import importlib.util
import math
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase, PrinterCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback

from ..checkpoints.adapter import BASE
from ..checkpoints.card import fingerprint
from ..config import TaHConfig
from ..core.compat import restore
from ..core.quantised import is_packed, is_quantised
from ..data.data_files import COMPLETE
from ..data.rows import Collator, depth_labels, pack
from ..load import find, load_base, load_tah, load_tokenizer
from ..model import TaHForCausalLM
from ..names import Stage
from ..progress import SILENT, Reporter
from ..stats.threshold import quality
from .calibrate import choose_threshold, measure_decisions
from .recipe import Recipe
from .run_files import TrainingProgress, check_directory, draw_curves, is_last, run_facts, trim_metrics, write_json
from .trainer import CHECKPOINTS, Objective, TaHTrainer


class Stopped(Exception):
    """SIGTERM stopped a training after it saved a checkpoint."""


def train(
    recipe: Recipe,
    stage: Stage,
    output: Path,
    *,
    resume: bool = False,
    name: str | None = None,
    data: str = "labels",
    progress: Reporter = SILENT,
) -> Path:
    """Train one stage and return its directory.

    The function runs in one process, or in several that torchrun or `accelerate launch` started.

    Args:
        recipe: Recipe to train.
        stage: `backbone`, or `decider` after it.
        output: Directory of the run. Labels are in `output/labels`.
        resume: Whether to continue from the newest complete checkpoint, if there is one.
        name: Name of the stage's directory if it is not `stage`. Baselines beside the main run use it.
        data: Directory of the rows, relative to `output`.
        progress: Reporter of steps and losses.

    Returns:
        Directory of the stage, `output/<stage>` or `output/<name>`.

    Raises:
        ValueError: Labels or the stage before are missing, the run to resume differs, or the loss is not finite.
        Stopped: SIGTERM arrived. A call with `resume=True` continues.
    """
    directory, held_out = output / (name or stage), output / data / "validation"
    rows = Rows.load(output / data / "train", recipe)
    model, tokenizer = prepare_model(recipe, stage, output)
    dtype = model.dtype
    for parameter in model.parameters():
        if parameter.requires_grad:  # half precision rounds small updates to zero; `bf16: true` still computes in it
            parameter.data = parameter.data.float()
    facts = run_facts(recipe, stage, output / data, model)
    checkpoint = check_directory(directory, facts, resume)
    trainer = TaHTrainer(
        objective=objective_of(recipe, stage, model, rows),
        model=model,
        args=_arguments(recipe, stage, directory),
        train_dataset=rows,
        eval_dataset=Rows.load(held_out, recipe) if held_out.is_dir() else None,
        data_collator=Collator(tokenizer.pad_token_id, packed=rows.packed),
        processing_class=tokenizer,
    )
    if trainer.is_world_process_zero():
        facts |= {"world_size": trainer.args.world_size}
        write_json(directory / "run.json", facts)
        trim_metrics(directory / "metrics.jsonl", checkpoint)
    _fit(trainer, checkpoint, directory, progress, f"{recipe.name}: {stage}")
    for parameter in model.parameters():  # buffers stay: positions need their precision
        if not is_packed(parameter):
            parameter.data = parameter.data.to(dtype)
    if stage == "decider":
        _choose_threshold(recipe, model, trainer, directory)
    else:
        _choose_policy(recipe, model)
    if trainer.is_world_process_zero():  # the card has facts and quality of these weights only
        write_json(directory / "run.json", facts | {"weights": fingerprint(model)})
    trainer.save_model(str(directory))  # last: config.json marks a finished stage
    if trainer.is_world_process_zero():
        draw_curves(directory)
    return directory


def _fit(trainer: TaHTrainer, checkpoint: Path | None, directory: Path, progress: Reporter, title: str) -> None:
    """Train from step 0 or from a checkpoint to the last step. Raise Stopped after SIGTERM."""
    trainer.remove_callback(PrinterCallback)  # it prints dictionaries to standard output
    with ExitStack() as stack:
        if trainer.is_world_process_zero():
            iterates = trainer.objective.stage != "decider"
            trainer.add_callback(
                TrainingProgress(
                    lambda steps, done: stack.enter_context(progress.work(title, steps, "steps", done)), iterates
                )
            )
            if importlib.util.find_spec("tensorboard"):
                from torch.utils.tensorboard import SummaryWriter

                trainer.add_callback(TensorBoardCallback(SummaryWriter(str(directory / "tensorboard"))))
        if checkpoint is not None and is_last(checkpoint):
            restore(trainer, str(checkpoint))  # train() would take one step beyond the last
        else:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if trainer.stopped:
        raise Stopped(f"stopped at step {trainer.state.global_step}; run again to continue (tah train: with --resume)")


# -- data --------------------------------------------------------------------------------------------------------


@dataclass
class Rows(Dataset):
    """Labelled rows in the form of `data.Collator`: single, or packed to at most `max_length` tokens.

    Args:
        data: Rows that `tah label` made.
        rule: Rule of hard tokens (method.md (9)). None: the rows have no labels, or the method does not use them.
        max_depth: Largest depth of a token.
        seed: Seed of the depth labels.
        groups: Numbers of the rows that are packed together; None if rows are not packed.
    """

    data: datasets.Dataset
    rule: str | None
    max_depth: int
    seed: int
    groups: list[list[int]] | None

    @classmethod
    def load(cls, directory: Path, recipe: Recipe) -> Rows:
        """Return the rows in `directory`.

        Raises:
            ValueError: There are no rows, or they have no labels and the recipe's method needs them.
        """
        if not (directory / COMPLETE).is_file():
            raise ValueError(f"{directory} has no labelled data; run `tah label` with this recipe and --output first")
        data = datasets.load_dataset("parquet", data_files=str(directory / "data" / "*.parquet"), split="train")
        wants = recipe.uses_labels
        if wants and "ref_rank" not in data.column_names:
            raise ValueError(f"{directory} has no labels of a reference model; method paper needs a `label` section")
        groups = None
        if recipe.backbone.packed:
            lengths = [len(ids) for ids in data["input_ids"]]
            groups = pack(lengths, recipe.data.max_length)
        rule = recipe.label.rule if wants and recipe.label is not None else None
        return cls(data, rule, recipe.max_depth, recipe.seed, groups)

    @property
    def packed(self) -> bool:
        """Whether several rows are packed into one."""
        return self.groups is not None

    def __len__(self) -> int:
        return len(self.data) if self.groups is None else len(self.groups)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self.groups is None:
            return self._row(index)
        return {"documents": [self._row(member) for member in self.groups[index]]}

    def _row(self, index: int) -> dict[str, Any]:
        row = self.data[index]
        kept = {name: row[name] for name in ("input_ids", "supervised", "row")}
        if self.rule is not None:
            rank, prob, supervised = row["ref_rank"], row["ref_prob"], row["supervised"]
            labels = depth_labels(rank, prob, supervised, self.rule, self.max_depth, [self.seed, row["row"]])
            kept["depth_labels"] = labels.tolist()
        return kept

    def easy_per_hard(self) -> float:
        """Return the number of easy tokens per hard token, the default of beta in method.md (11).

        Raises:
            ValueError: No token is hard.
        """
        hard = easy = 0
        for index in range(len(self.data)):
            row = self._row(index)
            asked = np.asarray(row["supervised"][1:], dtype=bool)
            wanted = np.asarray(row["depth_labels"][:-1])[asked] > 1
            hard, easy = hard + int(wanted.sum()), easy + int((~wanted).sum())
        if hard == 0:
            raise ValueError("no token of the training data is hard, so a decider cannot be trained")
        return easy / hard


# -- model -------------------------------------------------------------------------------------------------------


def prepare_model(recipe: Recipe, stage: Stage, output: Path) -> tuple[TaHForCausalLM, PreTrainedTokenizerBase]:
    """Return the model and tokenizer that a stage starts from. `requires_grad` marks the parameters that it trains.

    Args:
        recipe: Recipe to train.
        stage: Stage to train.
        output: Directory of the run.

    Raises:
        ValueError: The stage before is missing, the checkpoint to start from does not match the recipe, or there is
            nothing to train.
    """
    backbone = recipe.backbone
    if stage == "decider":
        source = output / "backbone"
        if not (source / "config.json").is_file():
            raise ValueError(f"{source} does not exist: train --stage backbone before --stage decider")
        model = load_tah(str(source), recipe.base.dtype, _base_of(source, recipe, output))
        if model.decider is None:
            raise ValueError(f"{source} has no decider; set model.decider in the recipe and train the backbone again")
        model.requires_grad_(False)
        model.decider.requires_grad_(True)
        return model, load_tokenizer(str(source))
    path, kind = find(backbone.init or recipe.base_path(output))
    torch.manual_seed(recipe.seed)  # LoRA, decider and linear maps start with random values
    if kind == "tah":
        model = load_tah(path, recipe.base.dtype)
        if backbone.method == "tah2":
            model = _as_tah2(recipe, model)
        check_fields(recipe, model.config, path)
    else:
        model = TaHForCausalLM.from_base(load_base(path, recipe.base.dtype), **fields_of(recipe))
    if backbone.method == "tah2":
        model.config.threshold = TaHConfig.threshold  # of the decisions in training, whatever a checkpoint had
    everything = backbone.train == "all"
    if everything and is_quantised(model.base):
        raise ValueError(f"{path} is quantised, so its weights cannot be trained; set backbone.train: lora")
    for name, parameter in model.named_parameters():
        own = "lora_" in name or name.startswith(("next_input_map.", "next_input_mlp.", "output_map."))
        joint = recipe.joint
        parameter.requires_grad_(joint if name.startswith("decider.") else everything or own)
    if model.config.max_depth == 1 and not everything:
        raise ValueError("backbone.train: lora has nothing to train if no token runs a second pass; use all")
    return model, load_tokenizer(find(recipe.tokenizer_path(output))[0])


def _base_of(source: Path, recipe: Recipe, output: Path) -> str | None:
    """Return the base of a checkpoint without it, as the recipe names it; None if it is in the checkpoint."""
    if not (source / BASE).is_file():
        return None
    path, kind = find(recipe.backbone.init or recipe.base_path(output))
    return path if kind == "base" else None


def _as_tah2(recipe: Recipe, model: TaHForCausalLM) -> TaHForCausalLM:
    """Return a TaH model as a TaH2 model. Unless it is one already, only the weights of its depth 1 are kept."""
    fields = fields_of(recipe)
    config = TaHConfig(base_config=model.config.base_config, **fields)
    if all(getattr(model.config, name) == getattr(config, name) for name in fields if name != "policy"):
        return model
    base = type(model.base)(model.config.base_config).to(model.dtype)
    base.load_state_dict({name: x for name, x in model.base.state_dict().items() if ".lora_" not in name})
    return TaHForCausalLM.from_base(base, **fields)


def fields_of(recipe: Recipe) -> dict[str, Any]:
    """Return the fields of TaHConfig for the recipe's method. The policy is `never` until training has ended."""
    fields = dict(recipe.model)
    if recipe.backbone.method == "standard":
        fields |= {"max_depth": 1, "lora_rank": 0, "decider": None}
    elif recipe.backbone.method == "blind":
        fields["attention"] = "blind"
    return fields | {"policy": "never"}


def check_fields(recipe: Recipe, config: TaHConfig, path: str) -> None:
    """Check that a TaH checkpoint to continue from has the method fields of the recipe.

    Args:
        recipe: Recipe to train.
        config: Configuration of the checkpoint.
        path: Path of the checkpoint, for the message.

    Raises:
        ValueError: A field differs.
    """
    wanted = {name: value for name, value in fields_of(recipe).items() if name not in ("policy", "decider")}
    for name, value in wanted.items():
        if (is_ := getattr(config, name)) != value:
            raise ValueError(f"{path} has {name}={is_!r} but the recipe has {value!r}; change one of them")


def _choose_policy(recipe: Recipe, model: TaHForCausalLM) -> None:
    """Set the policy that a backbone's checkpoint uses until a decider is trained."""
    config, backbone = model.config, recipe.backbone
    config.policy = {
        "always": "always",
        "random": "random",
        "standard": "never",
        "paper": "never",
        "tah2": "decider",
    }.get(backbone.method, "confidence")
    if config.policy == "random":
        config.random_rate, config.random_seed = backbone.share, recipe.seed
    if config.policy == "confidence":  # 1 - exp(-entropy) exceeds this threshold if the entropy exceeds tau
        config.confidence_measure, config.threshold = "entropy", 1 - math.exp(-backbone.tau)


def objective_of(recipe: Recipe, stage: Stage, model: TaHForCausalLM, rows: Rows) -> Objective:
    """Return the objective of a stage, with the weight of hard tokens measured on `rows` if the recipe has none."""
    backbone, decider = recipe.backbone, recipe.decider
    pos_weight = None
    if stage == "decider" and backbone.method == "paper":
        pos_weight = decider.pos_weight if decider is not None else None
        pos_weight = rows.easy_per_hard() if pos_weight is None else pos_weight
    return Objective(
        stage=stage,
        method=backbone.method,
        max_depth=model.config.max_depth,
        loss_weights=backbone.loss_weights,
        share=backbone.share,
        tau=backbone.tau,
        uncertain=backbone.uncertain,
        joint=stage == "backbone" and decider is not None and decider.joint,
        gain=decider.gain if decider is not None else 0.05,
        pos_weight=pos_weight,
        depth_schedule=backbone.depth_schedule if stage == "backbone" else (),
        coverage=backbone.coverage,
        decider_weight=backbone.decider_weight,
        seed=recipe.seed,
    )


def _choose_threshold(recipe: Recipe, model: TaHForCausalLM, trainer: TaHTrainer, directory: Path) -> None:
    """Set policy and threshold from held-out tokens, and write `quality.json`.

    Raises:
        ValueError: There are no validation rows.
    """
    if trainer.eval_dataset is None:
        raise ValueError("a threshold is chosen on validation data; set data.validation_share in the recipe")
    assert recipe.decider is not None
    size = trainer.args.per_device_eval_batch_size
    batches = DataLoader(trainer.eval_dataset, size, collate_fn=trainer.data_collator)
    decisions = measure_decisions(model, batches, trainer.objective)
    threshold = choose_threshold(decisions, recipe.decider)
    model.config.policy, model.config.threshold = "decider", threshold
    if trainer.is_world_process_zero():
        write_json(directory / "quality.json", quality(decisions, threshold))


# -- the run -----------------------------------------------------------------------------------------------------


def _arguments(recipe: Recipe, stage: Stage, directory: Path) -> TrainingArguments:
    """Return the `TrainingArguments`: the recipe's `training` section with the values that every run needs.

    Raises:
        ValueError: The recipe has no section for the stage, or one process has several GPUs.
    """
    section = recipe.backbone if stage == "backbone" else recipe.decider
    if section is None:
        raise ValueError("the recipe has no decider section, so there is nothing to train in stage decider")
    fixed = {
        "output_dir": str(directory / CHECKPOINTS),
        "remove_unused_columns": False,
        "prediction_loss_only": True,
        "label_names": ["labels"],
        "disable_tqdm": True,
        "use_cpu": not torch.accelerator.is_available(),  # otherwise each of several CPU processes trains alone
        "ddp_find_unused_parameters": False,
    }
    defaults: dict[str, Any] = {
        "seed": recipe.seed,
        "logging_steps": 10,
        "per_device_eval_batch_size": section.training.get("per_device_train_batch_size", 8),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "report_to": [],  # `_fit` adds TensorBoard with the run's directory
    }
    arguments = TrainingArguments(**defaults | section.training | fixed)
    if arguments.n_gpu > 1:
        raise ValueError(
            f"{arguments.n_gpu} GPUs are visible to one process; start one per GPU (torchrun --nproc_per_node "
            f"{arguments.n_gpu} -m tah train ...), or select one with CUDA_VISIBLE_DEVICES"
        )
    return arguments
