"""Train the models of `tah run tiny` other than the TaH model: base, reference, baselines and controls.

| directory | model |
| --- | --- |
| `base` | a Llama trained from random weights |
| `reference` | the one-pass baseline, the base after as many ordinary steps as the backbone; labels hard tokens |
| `standard_compute` | the baseline at equal compute: it costs as much as labels, backbone and decider |
| `blind` | TaH with deeper passes that read no text: its gain is not reasoning about the text |

The cost of the labels does not include the training of the reference.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ...core.families import decoder_layers
from ...data.data_files import COMPLETE
from ...data.rows import load_rows
from ...load import load_tah, load_tokenizer
from ...names import Stage
from ...progress import SILENT, Reporter
from ...training.label import label
from ...training.recipe import Backbone, Recipe
from ...training.run_files import read_metrics
from ...training.train import Rows, train
from .tiny import SPLITS, make_tokenizer, read_scratch, word_tokenizer

FORWARD, TRAINED = 1, 3  # cost of a pass without and with gradients (Kaplan et al. 2020, section 2.1)
EVERYWHERE = ("always", "random", "confidence")  # methods in which prompt tokens iterate too


def train_base(recipe: Recipe, run: Path, progress: Reporter = SILENT) -> None:
    """Make `run/base`: a tokenizer for the texts, and a Llama trained on them from random weights.

    Args:
        recipe: Recipe of the run, with section `base.scratch`.
        run: Directory of the run.
        progress: Reporter of the steps.

    Raises:
        ValueError: A setting is wrong.
    """
    scratch = read_scratch(recipe)
    words = scratch.tokenizer == "words"  # every word of every split, so that no word is unknown
    files = [run / "data" / f"{split}.jsonl" for split in (SPLITS if words else ("train",))]
    texts = (message["content"] for file in files for row in load_rows(str(file)) for message in row["messages"])
    if words:
        tokenizer = word_tokenizer(sorted({word for text in texts for word in text.split()}))
    else:
        tokenizer = make_tokenizer(texts, scratch.vocab_size)
    config = LlamaConfig(
        **scratch.model_dump(exclude={"training", "tokenizer", "vocab_size"}),
        vocab_size=len(tokenizer),
        num_key_value_heads=scratch.num_attention_heads,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(recipe.seed)
    start = run / "base" / "work" / "base"
    LlamaForCausalLM(config).save_pretrained(start)
    tokenizer.save_pretrained(start)
    _train_plain(recipe, run, "base", start, scratch.training, progress)


def train_reference(recipe: Recipe, run: Path, progress: Reporter = SILENT) -> None:
    """Make `run/reference`: the one-pass baseline at equal data and steps, which also labels hard tokens.

    Args:
        recipe: Recipe of the run.
        run: Directory of the run.
        progress: Reporter of the steps.
    """
    _train_plain(recipe, run, "reference", run / "base", recipe.backbone.training, progress)


def train_standard_compute(recipe: Recipe, run: Path, progress: Reporter = SILENT) -> None:
    """Make `run/standard_compute`: the one-pass baseline with `equal_steps` steps.

    Args:
        recipe: Recipe of the run.
        run: Directory of the run.
        progress: Reporter of the steps.
    """
    training = recipe.backbone.training | {"max_steps": equal_steps(recipe, run)}
    _train_plain(recipe, run, "standard_compute", run / "base", training, progress)


def train_blind(recipe: Recipe, run: Path, progress: Reporter = SILENT) -> None:
    """Make `run/blind`: backbone and decider of the recipe with `attention: blind` (method.md (7)).

    Args:
        recipe: Recipe of the run.
        run: Directory of the run.
        progress: Reporter of the steps.
    """
    changed = {"name": f"{recipe.name}-blind", "model": recipe.model | {"attention": "blind"}}
    control, directory = recipe.model_copy(update=changed), run / "blind"
    if not (directory / "backbone" / "config.json").is_file():
        train(control, "backbone", run, resume=True, name="blind/backbone", progress=progress)
    train(control, "decider", directory, resume=True, data="../labels", progress=progress)


def equal_steps(recipe: Recipe, run: Path) -> int:
    """Return the number of baseline steps that cost as much as labels, backbone and decider together.

    The unit of cost is a pass of one token through the base: 1 without gradients, 3 with gradients. The passes are
    measured (`metrics.jsonl`), and of the method `tah2` the decisions and the side passes, too, which have no
    gradients. The networks of `tah2` for decisions and next inputs count by their weights, relative to those of the
    base's layers. LoRA, the head, and decider and next input of other methods are not counted. The
    method `tah2` runs the head more often than the baseline; docs/how-to/train.md says how much that is.
    Args:
        recipe: Recipe of the run.
        run: Directory of the run, with labels and trained stages.
    """
    counts = [json.loads((run / "labels" / part / COMPLETE).read_text("utf-8")) for part in ("train", "validation")]
    tokens = counts[0]["tokens"] / len(Rows.load(run / "labels" / "train", recipe))  # mean per row, packed or not
    where = 1.0 if recipe.backbone.method in EVERYWHERE else counts[0]["supervised"] / counts[0]["tokens"]
    cost = FORWARD * sum(count["tokens"] for count in counts) if recipe.uses_labels else 0.0
    stages: tuple[tuple[Stage, int], ...] = (("backbone", TRAINED), ("decider", FORWARD))
    for stage, each in stages:
        if stage == "backbone" or recipe.decider is not None:
            cost += tokens * _cost_of_rows(recipe, stage, run / stage, each, where)
    return round(cost / (TRAINED * tokens * _rows_of_a_process(recipe, "backbone")))  # one process trains the baseline


def _cost_of_rows(recipe: Recipe, stage: Stage, directory: Path, each: int, where: float) -> float:
    """Return the cost of the training of a stage, for rows of one token.

    Args:
        recipe: Recipe of the run.
        stage: Trained stage.
        directory: Directory of the stage.
        each: Cost of a pass of one token.
        where: Share of the tokens that may iterate. Not read for `tah2`, which measures the passes of all tokens.

    Raises:
        ValueError: The training has not measured its passes.
    """
    lines = read_metrics(directory / "metrics.jsonl")
    measured = "decisions" if recipe.backbone.method == "tah2" else "iterated_share"
    logged = [line for line in lines if measured in line]
    if not logged:
        raise ValueError(f"{directory}/metrics.jsonl has no {measured}; remove {directory} to train that stage again")
    if measured == "decisions":
        decider, next_input = _networks(directory)
        costs = [
            each * (line["mean_depth"] + decider * line["decisions"] + next_input * (line["mean_depth"] - 1))
            + FORWARD * (1 + next_input) * line["side_passes"]
            for line in logged
        ]
    else:
        costs = [each * (1 + where * line["iterated_share"]) for line in logged]
    steps = max(line["step"] for line in lines)
    processes = json.loads((directory / "run.json").read_text("utf-8"))["world_size"]
    rows = steps * processes * _rows_of_a_process(recipe, stage)
    return rows * sum(costs) / len(costs)


def _networks(directory: Path) -> tuple[float, float]:
    """Return the weights of the decider and of the network of the next input, relative to the layers of the base.

    Args:
        directory: Directory of a TaH model. A network that it does not have is 0.
    """
    model = load_tah(str(directory))
    layers = decoder_layers(model.decoder, model.config.get_text_config(decoder=True).num_hidden_layers)
    base = sum(w.numel() for layer in layers for name, w in layer.named_parameters() if "lora_" not in name)
    parts = (model.decider, model.next_input_mlp)
    decider, next_input = (0 if part is None else sum(w.numel() for w in part.parameters()) for part in parts)
    return decider / base, next_input / base


def _rows_of_a_process(recipe: Recipe, stage: Stage) -> int:
    """Return the number of rows that one process reads per step of the optimizer."""
    section = recipe.backbone if stage == "backbone" or recipe.decider is None else recipe.decider
    batch = section.training.get("per_device_train_batch_size", 8)
    return batch * section.training.get("gradient_accumulation_steps", 1)


def _train_plain(
    recipe: Recipe, run: Path, name: str, start: Path, training: dict[str, Any], progress: Reporter
) -> None:
    """Make `run/name`: a one-pass model trained on the assistant's tokens, with the logs of its training.

    An unfinished training in `run/name/work` is continued.

    Args:
        recipe: Recipe of the run.
        run: Directory of the run.
        name: Name of the model's directory.
        start: Directory of the model to start from; its name is `base`.
        training: `TrainingArguments` as a dictionary.
        progress: Reporter of the steps.
    """
    tokenizer, work = load_tokenizer(str(start)), run / name / "work"
    for split in ("train", "validation"):
        rows = load_rows(str(run / "data" / f"{split}.jsonl"))
        label(rows, tokenizer, None, work / "tokens" / split, max_length=recipe.data.max_length)
    backbone = Backbone(method="standard", packed=recipe.backbone.packed, training=training)
    changed = {"name": f"{recipe.name}-{name}", "backbone": backbone, "label": None, "decider": None}
    output, inner = start.parent, os.path.relpath(work, start.parent)
    plain = recipe.model_copy(update=changed)
    places = {"name": f"{inner}/trained", "data": f"{inner}/tokens"}
    trained = train(plain, "backbone", output, resume=True, progress=progress, **places)
    load_tah(str(trained)).base.save_pretrained(run / name)
    tokenizer.save_pretrained(run / name)
    for log in ("run.json", "metrics.jsonl", "curves.png"):
        shutil.copyfile(trained / log, run / name / f"training-{log}")
    shutil.rmtree(work)
