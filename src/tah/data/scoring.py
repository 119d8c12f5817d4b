"""Score tokens with the reference model, and check that its tokenizer is the base's.

Shapes: B rows of a batch, T tokens, N supervised predictions, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..core.families import UnsupportedBase, decoder_of, head_of
from ..core.fast import topk
from ..core.head import Head
from ..load import load_tokenizer
from ..model import TaHForCausalLM
from ..progress import Work

CHUNK = 256  # predictions whose logits [CHUNK, V] exist at the same time, in float32
PIECE, PIECE_CPU = 64, 8  # predictions scored at a time; on a CPU they fit its cache
PROBE = 8  # tokens


@dataclass
class Measured:
    """Scores of token t + 1 under the reference model, at position t of a row.

    Where token t + 1 is not supervised, the rank is -1 and the other scores are 0.

    Args:
        rank: Rank of the token, `[T]` int32, 0 for the most probable one.
        prob: Probability of the token, `[T]` float32.
        entropy: Entropy of the prediction in nats, `[T]` float32.
    """

    rank: np.ndarray
    prob: np.ndarray
    entropy: np.ndarray


class Reference:
    """A reference model: a causal language model of any family.

    If the model consists of a decoder and a head, the head runs only on supervised predictions, a few at a time. A run
    on 8 tokens checks this. Otherwise rows run one by one through the model's own forward.

    Args:
        model: Model of transformers.

    Raises:
        ValueError: The model is not a causal language model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.device: torch.device = model.get_input_embeddings().weight.device
        self.decoder: PreTrainedModel | None = None
        self.head: Head | None = None
        with torch.no_grad(), evaluating(model):
            self._probe()

    def _probe(self) -> None:
        name, size = type(self.model).__name__, self.model.get_input_embeddings().weight.shape[0]
        ids = torch.arange(PROBE, device=self.device)[None] % size
        want = self.model(input_ids=ids).logits[0].float()
        # Rounding in a deep bf16 model reaches a tenth of the norm. A non-causal model or a wrong head differs more.
        tolerance = (1e-3 if self.model.dtype == torch.float32 else 0.3) * want.norm()
        padded = torch.cat([ids, ids.flip(1)], dim=1)
        if getattr(self.model.config, "is_encoder_decoder", False) or not (
            (self.model(input_ids=padded).logits[0, :PROBE].float() - want).norm() <= tolerance
        ):
            raise ValueError(f"reference: {name} is not a causal language model: what follows changes its predictions")
        if isinstance(self.model, TaHForCausalLM):
            return  # it runs several passes, not one decoder
        try:
            decoder, head = decoder_of(self.model), head_of(self.model)
            got = head(decoder(input_ids=ids, use_cache=False).last_hidden_state)[0].float()
        except (UnsupportedBase, AttributeError, TypeError, RuntimeError, NotImplementedError):
            return
        if got.shape == want.shape and (got.to(want.device) - want).norm() <= tolerance:
            self.decoder, self.head = decoder, head

    @torch.no_grad()
    def measure(
        self,
        ids: Sequence[np.ndarray],
        supervised: Sequence[np.ndarray],
        tokens_per_batch: int,
        work: Work | None = None,
    ) -> list[Measured]:
        """Score every supervised token.

        Args:
            ids: Token ids of the rows, each `[T]`, of any lengths.
            supervised: Supervised tokens of the rows, each `[T]` bool.
            tokens_per_batch: Maximum number of tokens of a forward with padding; a longer row runs alone.
            work: Progress that counts rows and tokens after each batch.

        Raises:
            ValueError: The model computes NaN.
        """
        result: dict[int, Measured] = {}
        with evaluating(self.model):
            for batch in batches([len(row) for row in ids], tokens_per_batch):
                measured = self._measure([ids[at] for at in batch], [supervised[at] for at in batch])
                result.update(zip(batch, measured, strict=True))
                if work is not None:
                    work.advance(len(batch), sum(len(ids[at]) for at in batch))
        return [result[at] for at in range(len(ids))]

    def _measure(self, ids: list[np.ndarray], supervised: list[np.ndarray]) -> list[Measured]:
        """Score one batch. Its padding is on the right, so a causal model needs no mask."""
        lengths = [len(row) for row in ids]
        tokens, predicts = np.zeros((len(ids), max(lengths)), np.int64), np.zeros((len(ids), max(lengths)), bool)
        for row, (its, wanted) in enumerate(zip(ids, supervised, strict=True)):
            tokens[row, : len(its)], predicts[row, : len(its) - 1] = its, wanted[1:]
        target = torch.from_numpy(np.roll(tokens, -1)[predicts])  # [N]
        found, done = np.zeros((3, *predicts.shape), np.float32), 0
        found[0] = -1
        scored = []
        for logits in self._logits(torch.from_numpy(tokens), predicts, lengths):
            scores = score_targets(logits, target[done : done + len(logits)], name="the reference")
            scored.append(torch.stack([scores.rank.float(), scores.prob, scores.entropy]).cpu())
            done += len(logits)
        found[:, predicts] = torch.cat(scored, dim=1).numpy()
        rank, prob, entropy = found
        rows = [(row, slice(length)) for row, length in enumerate(lengths)]
        return [Measured(rank[at].astype(np.int32), prob[at], entropy[at]) for at in rows]

    def _logits(self, x: Tensor, predicts: np.ndarray, lengths: list[int]) -> Iterator[Tensor]:
        """Yield logits `[n <= CHUNK, V]` of the positions `predicts` `[B, T]` of x `[B, T]`, in their order."""
        if self.decoder is not None and self.head is not None:
            hidden = self.decoder(input_ids=x.to(self.device), use_cache=False).last_hidden_state.flatten(0, 1)
            for at in torch.from_numpy(predicts.ravel().nonzero()[0]).to(hidden.device).split(CHUNK):
                yield self.head(hidden[at])
            return
        for row, length in enumerate(lengths):
            logits = self.model(input_ids=x[row : row + 1, :length].to(self.device)).logits[0]
            for at in torch.from_numpy(predicts[row].nonzero()[0]).to(logits.device).split(CHUNK):
                yield logits[at]


@dataclass
class TargetScores:
    """Scores of n target tokens.

    Args:
        rank: Rank of the target, `[n]` int64, 0 for the most probable token. The lower id ranks first among equal
            logits.
        log_prob: Log-probability of the target in nats, `[n]` float32.
        entropy: Entropy of the distribution in nats, `[n]` float32.
        top_ids: Ids of the k most probable tokens, most probable first, `[n, k]` int64.
        top_prob: Probabilities of these tokens, `[n, k]` float32.
    """

    rank: Tensor
    log_prob: Tensor
    entropy: Tensor
    top_ids: Tensor
    top_prob: Tensor

    @property
    def prob(self) -> Tensor:
        """Probability of the target, `[n]` float32."""
        return self.log_prob.exp()


def score_targets(logits: Tensor, target: Tensor, top_k: int = 0, name: str = "the model") -> TargetScores:
    """Return rank, log-probability and entropy of the targets, and the most probable tokens.

    The function reads the logits in pieces that fit a CPU's cache, and reuses its buffers. Without this it costs as
    much as the head itself.

    Args:
        logits: Logits, `[n, V]`.
        target: Ids of the target tokens, `[n]` int64.
        top_k: Number of most probable tokens to return.
        name: Name of the model in messages.

    Raises:
        ValueError: The logits contain NaN or positive infinity.
    """
    (n, V), device = logits.shape, logits.device
    target = target.to(device)[:, None]
    rank = torch.empty(n, dtype=torch.int64, device=device)
    log_prob, entropy = torch.empty(2, n, device=device)
    top_ids, top_prob = rank.new_empty(n, top_k), log_prob.new_empty(n, top_k)
    size = PIECE_CPU if device.type == "cpu" else PIECE
    ids = torch.arange(V, dtype=torch.int32, device=device)
    buffers = torch.empty(2, min(size, n), V, device=device)
    for start in range(0, n, size):
        at = slice(start, start + size)
        z, aim = logits[at], target[at]
        shifted, p = buffers[:, : len(z)]
        z = z if z.dtype == torch.float32 else shifted.copy_(z)
        own = z.gather(1, aim)
        if top_k:
            top, best = _most_probable(z, top_k)
            peak = top[:, :1]
            rank[at] = ((top > own) | ((top == own) & (best < aim))).sum(1)
            rest = (
                (own <= top[:, -1:]).squeeze(1).nonzero().squeeze(1)
            )  # tokens outside the top k may rank before the target
            if len(rest):
                rank[start + rest] = _rank(z[rest], own[rest], aim[rest], ids, p[: len(rest)])
        else:
            peak = z.amax(1, keepdim=True)
            rank[at] = _rank(z, own, aim, ids, p)
        torch.sub(z, peak, out=shifted).clamp_(min=-100)  # a logit of -inf must add 0 to the entropy, not NaN
        mass = torch.exp(shifted, out=p).sum(1, keepdim=True)
        norm = mass.log()
        log_prob[at] = (own - peak - norm).squeeze(1)
        entropy[at] = (norm - p.mul_(shifted).sum(1, keepdim=True) / mass).squeeze(1)
        if top_k:
            top_ids[at], top_prob[at] = best, (top - peak - norm).exp()
    if not entropy.isfinite().all():
        raise ValueError(f"{name} computes NaN or infinity; load it in float32 or bfloat16")
    return TargetScores(rank, log_prob, entropy.clamp_(min=0), top_ids, top_prob)


def _rank(z: Tensor, own: Tensor, target: Tensor, ids: Tensor, buffer: Tensor) -> Tensor:
    """Return the rank `[n]` of `target` `[n, 1]`, whose logit is `own` `[n, 1]`, under z `[n, V]`.

    The buffer `[n, V]` holds comparisons as float32. Their sum is faster, and exact below 2^24.
    """
    rank = torch.gt(z, own, out=buffer).sum(1)
    tied = (torch.eq(z, own, out=buffer).sum(1) > 1).nonzero().squeeze(1)
    if len(tied):
        rank[tied] += (buffer[tied] * (ids < target[tied].int())).sum(1)
    return rank.long()


def _most_probable(z: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Return the k largest entries of z `[n, V]` and their ids, both `[n, k]`, in falling order.

    The lower id comes first among equal entries.
    """
    top, ids = topk(z, k)
    ids, order = ids.sort()
    top, order = top.gather(1, order).sort(descending=True, stable=True)
    return top, ids.gather(1, order)


def batches(lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """Return the indices of the rows of each batch, longest rows first.

    A batch has at most `tokens_per_batch` tokens with padding, or a single row.
    """
    order = sorted(range(len(lengths)), key=lambda at: (-lengths[at], at))
    found, start = [], 0
    while start < len(order):
        stop = start + max(1, tokens_per_batch // max(1, lengths[order[start]]))
        found.append(order[start:stop])
        start = stop
    return found


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Set a model to evaluation mode, and restore its mode at the end of the block."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def check_reference(model: PreTrainedModel, tokenizer: Any, reference_tokenizer: Any, max_length: int) -> None:
    """Check that a reference model fits the base's tokenizer and the length of the rows.

    Args:
        model: Reference model.
        tokenizer: Tokenizer of the base.
        reference_tokenizer: Tokenizer of the reference model. None loads it from the model's own source, if known.
        max_length: Maximum length of the rows.

    Raises:
        ValueError: A token has another id in the reference model, an id has no embedding, or the model has too few
            positions.
    """
    name = model.name_or_path or type(model).__name__
    if reference_tokenizer is None and model.name_or_path:
        reference_tokenizer = load_tokenizer(model.name_or_path, f"reference {name}", readable=False)
    ours = tokenizer.get_vocab()
    if reference_tokenizer is not None:
        theirs = reference_tokenizer.get_vocab()
        taken, padding = set(theirs.values()), tokenizer.pad_token
        for token, at in sorted(ours.items(), key=lambda item: item[1]):
            if theirs.get(token) != at and (token != padding or at in taken or token in theirs):
                there = f"is {theirs[token]}" if token in theirs else "is not in its vocabulary"
                raise ValueError(
                    f"reference {name} has another tokenizer: {token!r} is {at} for the base, there it {there}; "
                    "choose a reference with the base's tokenizer"
                )
    size = model.get_input_embeddings().weight.shape[0]
    if size <= (most := max(ours.values())):
        raise ValueError(f"reference {name} has {size} embeddings; the tokenizer's ids go to {most}")
    check_positions(model, max_length)


def check_positions(model: PreTrainedModel, max_length: int) -> None:
    """Check that a reference model has at least `max_length` positions.

    Raises:
        ValueError: The model has fewer positions.
    """
    name = model.name_or_path or type(model).__name__
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if positions is not None and positions < max_length:
        raise ValueError(f"reference {name} has {positions} positions; lower max_length={max_length} to that")
