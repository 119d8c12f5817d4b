"""Score a model on held-out rows: on the tokens of the given texts, and on generated answers.

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

LOGITS = 2**27  # largest number of entries of the logits [B, T, V]
TOKENS = 8192  # largest number of tokens of a batch
ROWS = 128  # largest number of questions per batch of generation
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
ANSWER = re.compile(r"\\boxed\{([^{}]*)\}|(?:Answer:|####)[ \t]*([^\n]*)")


@dataclass
class TokenScores:
    """Teacher-forced predictions of the supervised tokens, in the order of the rows.

    Args:
        rank: Rank of the text's token, `[n]` int64; 0 is the most probable token.
        loss: Cross-entropy in nats, `[n]`.
        passes: Number of passes, `[n]` int64.
        probability: Continue probability after depth 1, `[n]`; NaN without a decision.
        row: Number of the row, `[n]` int64 from 0 to R-1.
        share_of_all: Iterated share of all tokens, prompts included.
    """

    rank: np.ndarray
    loss: np.ndarray
    passes: np.ndarray
    probability: np.ndarray
    row: np.ndarray
    share_of_all: float

    @property
    def right(self) -> np.ndarray:
        """Whether the most probable token is the text's, `[n]` bool."""
        return self.rank == 0


@torch.no_grad()
def score_tokens(
    model: TaHForCausalLM, rows: Sequence[Mapping[str, Any]], pad_token_id: int, rule: Rule
) -> TokenScores:
    """Score the predictions of supervised tokens.

    Args:
        model: Model to score. A model that never iterates scores its base.
        rows: Rows in the form of `data.Collator`.
        pad_token_id: Padding token of the tokenizer.
        rule: Policy, threshold and largest depth.
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
            "rank": scores.rank,
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
    """Greedy answers to R questions.

    Args:
        right: Whether the final answer is the row's, `[R]` bool.
        texts: Generated texts.
        tokens: Number of generated tokens.
        iterated: Number of these tokens that iterated.
    """

    right: np.ndarray
    texts: list[str]
    tokens: int
    iterated: int

    @property
    def iterated_share(self) -> float:
        """Share of the generated tokens that iterated."""
        return self.iterated / self.tokens


def answer_of(text: str) -> str | None:
    """Return the final answer in a text: in the last \\boxed{}, or after the last "Answer:" or "####"; else None."""
    found = ANSWER.findall(text)
    return (found[-1][0] or found[-1][1]).strip() if found else None


def last_number(text: str) -> str | None:
    """Return the last number in a text, for answers in any form; None if there is no number."""
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
    """Generate an answer to every row and compare it with the row's answer.

    Args:
        model: Model to score.
        tokenizer: Tokenizer with a chat template.
        rows: Rows with `messages`, the last by the assistant, and `answer`. The prompt is all messages but the last.
        rule: Policy, threshold and largest depth.
        read: Function that finds the final answer in a text.
        max_new_tokens: Largest number of generated tokens. The default is 8 more than the longest solution of the rows,
            which is enough for a model that was trained on such rows.
    """
    model.eval()
    given = tokenizer([row["messages"][-1]["content"] for row in rows])["input_ids"]
    most = max_new_tokens or max(map(len, given)) + 8
    texts = [""] * len(rows)
    iterated = made = 0
    order = np.argsort([len(ids) for ids in given], kind="stable").tolist()  # similar lengths end at similar times
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
        passes = out.depth_count[:, length - 1 : -1]  # a new token is predicted by the token before it
        iterated, made = iterated + int((passes[kept] > 1).sum()), made + int(kept.sum())
        for place, text in zip(places, tokenizer.batch_decode(new, skip_special_tokens=True), strict=True):
            texts[place] = text
    right = np.array([read(text) == row["answer"].strip() for text, row in zip(texts, rows, strict=True)])
    return AnswerScores(right, texts, made, iterated)


# -- uncertainty -------------------------------------------------------------------------------------------------------


def proportion(right: np.ndarray) -> dict[str, Any]:
    """Return the share of right answers `[R]` with its 95 % interval by Wilson."""
    n, share, z = len(right), float(right.mean()), 1.96
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return {"share": share, "interval": [max(0.0, middle - half), min(1.0, middle + half)], "questions": n}
