"""Train the one-pass control of the bundled checkpoint: the same base, data, steps and learning rate.

    python experiments/plain_lora.py out/smollm2 --output out/plain-lora

The script trains a PEFT LoRA at depth 1. Its rank gives at least as many parameters as the LoRA, linear maps and
decider of the run. It then merges the LoRA into the base and saves an ordinary model. The gain of a second pass is its
difference from this model.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import peft
from transformers import AutoTokenizer, Trainer, TrainingArguments

from tah.data.rows import Collator
from tah.load import find, load_base, load_tah, parameter_counts
from tah.training.recipe_file import load_recipe
from tah.training.train import Rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="directory of a finished `tah run smollm2-word-problems`")
    parser.add_argument("--output", type=Path, required=True, help="directory for the merged model")
    given = parser.parse_args()
    recipe = load_recipe(str(given.run / "recipe.yaml"))
    path, _ = find(str(recipe.base.model))
    base, tokenizer = load_base(path), AutoTokenizer.from_pretrained(path)
    linear = [m for name, m in base.named_modules() if name.endswith("_proj")]
    per_rank = sum(module.in_features + module.out_features for module in linear)
    sizes = parameter_counts(load_tah(str(given.run / "decider")))
    rank = math.ceil((sum(sizes.values()) - sizes["base"]) / per_rank)
    settings = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, settings)
    model.print_trainable_parameters()
    rows = Rows.load(given.run / "labels" / "train", recipe)
    trainer = Trainer(
        model,
        TrainingArguments(
            str(given.output / "checkpoints"),
            **recipe.backbone.training | {"save_strategy": "no"},
            seed=recipe.seed,
            use_cpu=True,
            report_to=[],
            remove_unused_columns=False,
        ),
        train_dataset=rows,
        data_collator=_Plain(tokenizer.pad_token_id, packed=rows.packed),
    )
    trainer.train()
    model.merge_and_unload().save_pretrained(given.output)
    tokenizer.save_pretrained(given.output)


class _Plain(Collator):
    """Make batches for a stock transformers model, which separates packed documents by their positions."""

    def __call__(self, rows: object) -> dict:
        return {name: value for name, value in super().__call__(rows).items() if name != "row"}


if __name__ == "__main__":
    main()
