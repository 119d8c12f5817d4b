"""Data and tokenizer of `tah run tiny`, and the sections `data.generate` and `base.scratch`. Nothing is downloaded.

The tasks are in `arrows.py` and `sums.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from transformers import PreTrainedTokenizerFast

from ...files import write_atomically
from ...progress import SILENT, Reporter
from ...training.recipe import Part, Positive, Recipe, Training
from ...training.recipe_file import validated
from .arrows import Arrows, arrows
from .sums import Sums, sums

SPLITS = ("train", "validation", "test")
SPECIAL = ("<|pad|>", "<|user|>", "<|assistant|>", "<|end|>")
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|>"
    "{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}"
    "{% else %}<|user|>{{ message['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
AGAIN = 20  # questions drawn per question needed, before an error reports too few different questions


class Scratch(Part):
    """Section `base.scratch` of a recipe: a Llama that is trained from random weights.

    Args:
        hidden_size: Width of the hidden states.
        intermediate_size: Width of the feed-forward layers.
        num_hidden_layers: Number of layers.
        num_attention_heads: Number of attention heads.
        max_position_embeddings: Largest number of positions.
        initializer_range: Standard deviation of the initial weights.
        tokenizer: `bytes` for a byte-level BPE tokenizer that is trained on the texts, `words` for one token per word.
        vocab_size: Largest number of tokens of `bytes`; bytes and special tokens need 260.
        training: `TrainingArguments` as a dictionary.
    """

    hidden_size: Positive
    intermediate_size: Positive
    num_hidden_layers: Positive
    num_attention_heads: Positive
    max_position_embeddings: Positive
    initializer_range: Annotated[float, Field(gt=0)]
    tokenizer: Literal["bytes", "words"] = "bytes"
    vocab_size: Annotated[int, Field(ge=260)] = 320
    training: Training = {}

    @model_validator(mode="after")
    def _check(self) -> Scratch:
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                f"hidden_size={self.hidden_size} must be an even multiple of "
                f"num_attention_heads={self.num_attention_heads}"
            )
        return self


# -- data ------------------------------------------------------------------------------------------------------------


def write_data(recipe: Recipe, run: Path, progress: Reporter = SILENT) -> None:
    """Make `run/data` with train.jsonl, validation.jsonl and test.jsonl. No question occurs twice.

    Args:
        recipe: Recipe of the run.
        run: Directory of the run.
        progress: Not used.

    Raises:
        ValueError: A setting is wrong, or there are too few different questions.
    """
    check_sections(recipe)  # reports a mistake in base.scratch before any work
    settings = read_generate(recipe)
    sizes = {name: getattr(settings, name) for name in reversed(SPLITS)}
    drawn = distinct_rows(settings, recipe.seed, sum(sizes.values()))
    splits = {name: [next(drawn) for _ in range(size)] for name, size in sizes.items()}
    check_disjoint({name: splits[name] for name in SPLITS})
    for name, rows in splits.items():
        write_atomically(run / "data" / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def distinct_rows(settings: Arrows | Sums, seed: int, count: int) -> Iterator[dict[str, Any]]:
    """Yield `count` rows with different questions.

    Args:
        settings: Section `data.generate`.
        seed: Random seed.
        count: Number of rows.

    Raises:
        ValueError: A package is not installed, or there are too few different questions.
    """
    # reasoning-gym's question i of seed s + 1 is its question i + 1 of seed s. The hash keeps seeds 1 and 2 apart.
    start = int(digest(str(seed))[:12], 16)
    if isinstance(settings, Arrows):
        drawn, more = arrows(settings, start, AGAIN * count), "places"
    else:
        drawn, more = sums(settings, start, AGAIN * count), "digits or terms"
    seen: set[str] = set()
    for row in drawn:
        question = digest(row["messages"][0]["content"])
        if question in seen:
            continue
        seen.add(question)
        yield row
        if len(seen) == count:
            return
    raise ValueError(f"data.generate allows only {len(seen)} different questions, not {count}; allow more {more}")


def check_disjoint(splits: Mapping[str, Iterable[dict[str, Any]]]) -> None:
    """Raise ValueError if two rows, of one split or of two, have the same question. Hashes are compared."""
    owner: dict[str, str] = {}
    for name, rows in splits.items():
        for row in rows:
            question = row["messages"][0]["content"]
            if before := owner.get(digest(question)):
                raise ValueError(f"the question {question!r} is in {before} and in {name}; splits must be disjoint")
            owner[digest(question)] = name


def digest(question: str) -> str:
    """Return a hash of a question that does not depend on its spacing."""
    return hashlib.sha256(" ".join(question.split()).encode()).hexdigest()


# -- tokenizer, sections -----------------------------------------------------------------------------------------------


def make_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer with one token per digit. Its chat template marks the assistant's tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    digits = pre_tokenizers.Digits(individual_digits=True)
    rest = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # " + " as one token
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, rest])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return as_fast(tokenizer)


def word_tokenizer(words: Iterable[str]) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per word: `SPECIAL`, then `words` in their order."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: at for at, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(SPECIAL))
    return as_fast(tokenizer)


def as_fast(tokenizer: Any) -> PreTrainedTokenizerFast:
    """Return a tokenizer of `tokenizers` that has the tokens `SPECIAL` as one of transformers, with chat template."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[0],
        eos_token=SPECIAL[-1],
        chat_template=TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def check_sections(recipe: Recipe) -> None:
    """Raise ValueError for a mistake in `data.generate` or `base.scratch`, which the recipe itself does not check."""
    if recipe.data.generate is not None:
        read_generate(recipe)
    if recipe.base.scratch is not None:
        read_scratch(recipe)


def read_generate(recipe: Recipe) -> Arrows | Sums:
    """Return the checked section `data.generate`."""
    settings = recipe.data.generate
    if settings is not None and settings.get("task") == "arrows":
        return validated(Arrows, settings, "data.generate")
    return validated(Sums, settings, "data.generate")


def read_scratch(recipe: Recipe) -> Scratch:
    """Return the checked section `base.scratch`."""
    return validated(Scratch, recipe.base.scratch, "base.scratch")
