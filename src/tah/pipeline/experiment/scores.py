"""The scores of a model on held-out rows: along the given texts, and on answers it generates itself.

Shapes: B rows of a batch, T tokens, V vocabulary, R rows in all, n supervised predictions of all rows together.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...core.loss import IGNORE, shift
from ...data.rows import Collator
from ...data.scoring import batches, score_targets
from ...model import TaHForCausalLM
from ...policy import Rule

LOGITS = 2**27  # most entries of [B, T, V] at the same time
TOKENS = 8192  # most tokens of a batch
ROWS = 128  # that are answered at a time
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
ANSWER = re.compile(r"\\boxed\{([^{}]*)\}|(?:Answer:|####)[ \t]*([^\n]*)")


@dataclass
class TokenScores:
    """n predictions along the given texts, in the order of the rows (teacher-forced)."""

    right: np.ndarray  # [n] bool, the most probable token is the text's
    loss: np.ndarray  # [n] cross-entropy in nats
    passes: np.ndarray  # [n] int64
    probability: np.ndarray  # [n] of going on after depth 1, nan where the policy was not asked
    row: np.ndarray  # [n] int64 in 0..R-1
    share_of_all: float  # of all tokens, prompts included, that ran a second pass


@torch.no_grad()
def score_tokens(
    model: TaHForCausalLM, rows: Sequence[Mapping[str, Any]], pad_token_id: int, rule: Rule
) -> TokenScores:
    """Score the predictions of supervised tokens.

    Args:
        model: any; one that never iterates stands for its base.
        rows: as `data.Collator` takes them.
        pad_token_id: of the tokenizer.
        rule: who iterates.
    """
    model.eval()
    collate = Collator(pad_token_id)
    found: list[dict[str, Tensor]] = []
    iterated = tokens = 0
    lengths, vocabulary = [len(row["input_ids"]) for row in rows], model.config.get_text_config().vocab_size
    for places in batches(lengths, min(TOKENS, max(1, LOGITS // vocabulary))):
        batch = {name: value.to(model.device) for name, value in collate([rows[place] for place in places]).items()}
        given = {name: batch[name] for name in ("attention_mask", "depth_labels") if name in batch}
        out = model(batch["input_ids"], use_cache=False, **given, **rule.arguments())
        target = shift(batch["labels"])
        asked = target != IGNORE
        scores = score_targets(out.logits[asked], target[asked])
        valid = batch["attention_mask"].bool()
        iterated, tokens = iterated + int((out.depth_count[valid] > 1).sum()), tokens + int(valid.sum())
        probability = torch.full_like(target, math.nan, dtype=torch.float64)
        if out.continue_logits.shape[2]:
            probability = out.continue_logits[:, :, 0].double().sigmoid()
        numbers = torch.tensor(places, device=asked.device)[:, None].expand_as(asked)
        columns = {
            "right": scores.rank == 0,
            "loss": -scores.log_prob.double(),
            "passes": out.depth_count[asked],
            "probability": probability[asked],
            "row": numbers[asked],
        }
        found.append({name: column.cpu() for name, column in columns.items()})
    joined = {name: torch.cat([batch[name] for batch in found]).numpy() for name in found[0]}
    order = joined["row"].argsort(kind="stable")
    joined = {name: column[order] for name, column in joined.items()}
    return TokenScores(**joined, share_of_all=iterated / tokens)


@dataclass
class AnswerScores:
    """R questions answered by greedy generation."""

    right: np.ndarray  # [R] bool, the final answer is the row's
    texts: list[str]
    tokens: int  # that were generated
    iterated: int  # of those

    @property
    def iterated_share(self) -> float:
        return self.iterated / self.tokens


def answer_of(text: str) -> str | None:
    """The final answer in a text: in its last \\boxed{}, or after its last "Answer:" or "####"; None without any."""
    found = ANSWER.findall(text)
    return (found[-1][0] or found[-1][1]).strip() if found else None


def last_number(text: str) -> str | None:
    """The last number in a text, so that no answer is marked down for its form; None where there is none."""
    found = NUMBER.findall(text)
    if not found:
        return None
    value = float(found[-1].replace(",", ""))
    return str(int(value)) if value.is_integer() else str(value)


def score_answers(
    model: TaHForCausalLM,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    rule: Rule,
    *,
    read: Callable[[str], str | None] = answer_of,
    max_new_tokens: int | None = None,
) -> AnswerScores:
    """Answer the question of every row: all its `messages` but the last.

    Args:
        rows: with `messages`, the last by the assistant, and `answer`.
        rule: who iterates.
        read: finds the final answer in a text.
        max_new_tokens: of an answer; by default a few more than the longest of the rows' own, which is enough for a
            model that was trained on such.
    """
    model.eval()
    given = tokenizer([row["messages"][-1]["content"] for row in rows])["input_ids"]
    most = max_new_tokens or max(map(len, given)) + 8
    texts = [""] * len(rows)
    iterated = made = 0
    order = np.argsort([len(ids) for ids in given], kind="stable").tolist()  # rows of a batch end at like times
    for start in range(0, len(rows), ROWS):
        places = order[start : start + ROWS]
        prompts = [rows[place]["messages"][:-1] for place in places]
        prompts = tokenizer.apply_chat_template(prompts, add_generation_prompt=True, tokenize=False)
        inputs = tokenizer(
            prompts, add_special_tokens=False, padding=True, padding_side="left", return_tensors="pt"
        ).to(model.device)
        length = inputs["input_ids"].shape[1]
        out = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=most,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            return_dict_in_generate=True,
            **rule.arguments(),
        )
        new = out.sequences[:, length:]
        kept = (new == tokenizer.eos_token_id).cumsum(1) - (new == tokenizer.eos_token_id).long() == 0
        passes = out.depth_count[:, length - 1 : -1]  # the token before each new one is what it cost
        iterated, made = iterated + int((passes[kept] > 1).sum()), made + int(kept.sum())
        for place, text in zip(places, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
            texts[place] = text
    right = np.array([read(text) == row["answer"].strip() for text, row in zip(texts, rows, strict=True)])
    return AnswerScores(right, texts, made, iterated)


# -- uncertainty -------------------------------------------------------------------------------------------------------


def proportion(right: np.ndarray) -> dict[str, Any]:
    """Share of R right answers, with Wilson's 95 % interval."""
    n, share, z = len(right), float(right.mean()), 1.96
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return {"share": share, "interval": [max(0.0, middle - half), min(1.0, middle + half)], "questions": n}
