"""The embedded experiment's own data and tokenizer: chain sums with every total written out, nothing downloaded.

Questions come from reasoning-gym's `chain_sum` ("8 + 7 - 9 ="); the working-out is ours:

    8 + 7 = 15
    15 - 9 = 6
    Answer: 6

The first digit of a total needs the sum of the last, and every wrong total spoils those after it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator
from transformers import PreTrainedTokenizerFast

from ...files import write_atomically
from ...progress import SILENT, Reporter
from ...training.recipe import Part, Positive, Recipe, Training
from ...training.recipe_file import validated

SPLITS = ("train", "validation", "test")
SPECIAL = ("<|pad|>", "<|user|>", "<|assistant|>", "<|end|>")
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|>"
    "{% generation %}{{ message['content'] }}<|end|>{% endgeneration %}"
    "{% else %}<|user|>{{ message['content'] }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
AGAIN = 20  # questions drawn per question wanted before we conclude that there are not so many different ones


class Generate(Part):
    """`data.generate`: how many rows of each split, how many terms of how many digits a sum has, and whether totals may
    be negative."""

    train: Positive
    validation: Positive
    test: Positive
    min_terms: Annotated[int, Field(ge=2)]
    max_terms: Annotated[int, Field(ge=2)]
    min_digits: Positive
    max_digits: Positive
    negative: bool

    @model_validator(mode="after")
    def _check(self) -> Generate:
        for name in ("terms", "digits"):
            low, high = getattr(self, f"min_{name}"), getattr(self, f"max_{name}")
            if low > high:
                raise ValueError(f"min_{name}={low} is more than max_{name}={high}")
        return self


class Scratch(Part):
    """`base.scratch`: sizes of the Llama, and the `TrainingArguments` it is trained with from nothing."""

    hidden_size: Positive
    intermediate_size: Positive
    num_hidden_layers: Positive
    num_attention_heads: Positive
    max_position_embeddings: Positive
    initializer_range: Annotated[float, Field(gt=0)]
    vocab_size: Annotated[int, Field(ge=260)] = 320  # at most; bytes and special tokens at least
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
    """`run/data`: train.jsonl, validation.jsonl and test.jsonl, all of different questions.

    Raises:
        ValueError: the settings are wrong or allow too few different questions.
    """
    check_sections(recipe)  # a mistake in base.scratch should not wait for the next step
    settings = read_generate(recipe)
    sizes = {name: getattr(settings, name) for name in reversed(SPLITS)}
    drawn = distinct_rows(settings, recipe.seed, sum(sizes.values()))
    splits = {name: [next(drawn) for _ in range(size)] for name, size in sizes.items()}
    check_disjoint({name: splits[name] for name in SPLITS})
    for name, rows in splits.items():
        write_atomically(run / "data" / f"{name}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def distinct_rows(settings: Generate, seed: int, count: int) -> Iterator[dict[str, Any]]:
    """`count` rows with different questions.

    Raises:
        ValueError: reasoning-gym is not installed, or there are not so many questions.
    """
    try:
        import reasoning_gym
    except ImportError as error:
        raise ValueError("data.source=tiny needs reasoning-gym: pip install 'tah[train,tiny]'") from error
    names = ("min_terms", "max_terms", "min_digits", "max_digits")
    options = {name: getattr(settings, name) for name in names}
    # Its question i of seed s + 1 is its question i + 1 of seed s, so that seeds 1 and 2 would give the same data.
    start = int(digest(str(seed))[:12], 16)
    source = reasoning_gym.create_dataset("chain_sum", seed=start, size=AGAIN * count, **options)
    seen: set[str] = set()
    for entry in source:
        question = entry["metadata"]["expression"] + " ="
        if digest(question) in seen:
            continue
        working, totals = working_out(question)
        if min(totals) < 0 and not settings.negative:
            continue
        seen.add(digest(question))
        assert str(totals[-1]) == entry["answer"]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": working}]
        yield {"messages": messages, "answer": entry["answer"]}
        if len(seen) == count:
            return
    raise ValueError(
        f"data.generate allows only {len(seen)} different questions, not {count}; give more digits or terms"
    )


def working_out(question: str) -> tuple[str, list[int]]:
    """The text that works a question out, and its totals, the last of which is the answer."""
    first, *rest = question.removesuffix(" =").split(" ")
    totals, lines = [int(first)], []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        before = totals[-1]
        totals.append(before + int(term) if sign == "+" else before - int(term))
        lines.append(f"{before} {sign} {term} = {totals[-1]}")
    return "\n".join([*lines, f"Answer: {totals[-1]}"]), totals


def check_disjoint(splits: Mapping[str, Iterable[dict[str, Any]]]) -> None:
    """Raises `ValueError` where two rows, of one split or of two, ask the same (by hash of the question)."""
    owner: dict[str, str] = {}
    for name, rows in splits.items():
        for row in rows:
            question = row["messages"][0]["content"]
            if before := owner.get(digest(question)):
                raise ValueError(f"the question {question!r} is in {before} and in {name}; splits must be disjoint")
            owner[digest(question)] = name


def digest(question: str) -> str:
    """Hash of a question, whatever its spacing."""
    return hashlib.sha256(" ".join(question.split()).encode()).hexdigest()


# -- tokenizer, sections -----------------------------------------------------------------------------------------------


def make_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of the texts in which every digit is a token; its chat template marks the assistant's tokens."""
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


def as_fast(tokenizer: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of `tokenizers` with the tokens `SPECIAL`, with the chat template, as transformers takes it."""
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=SPECIAL[0],
        eos_token=SPECIAL[-1],
        chat_template=TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def check_sections(recipe: Recipe) -> None:
    """Raises `ValueError` for a mistake in `data.generate` or `base.scratch`, which the recipe itself does not read."""
    if recipe.data.generate is not None:
        read_generate(recipe)
    if recipe.base.scratch is not None:
        read_scratch(recipe)


def read_generate(recipe: Recipe) -> Generate:
    return validated(Generate, recipe.data.generate, "data.generate")


def read_scratch(recipe: Recipe) -> Scratch:
    return validated(Scratch, recipe.base.scratch, "base.scratch")
