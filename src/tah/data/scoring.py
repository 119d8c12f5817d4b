"""The model that labels: how hard each token is for it, and whether it reads the same tokens.

Shapes: B rows of a batch, T tokens, N predictions in question, D width, V vocabulary.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedModel

from ..core.families import UnsupportedBase, decoder_of, head_of
from ..core.head import Head
from ..load import first_line
from ..model import TaHForCausalLM

CHUNK = 256  # predictions whose logits [CHUNK, V] exist at the same time, in float32
PIECE = 64  # of them, worked on at a time
PROBE = 8  # tokens


@dataclass
class Measured:
    """What the reference makes of token t + 1 at position t of a row; -1, 0, 0 where that is not supervised.

    Args:
        rank: [T] int32, 0 for its first choice.
        prob: [T] float32.
        entropy: [T] float32 of its prediction, in nats.
    """

    rank: np.ndarray
    prob: np.ndarray
    entropy: np.ndarray


class Reference:
    """A causal language model of any family.

    Where it is a decoder and a head (checked by running 8 tokens), the head runs on supervised predictions only, a
    few at a time; else rows run one by one through the model's own forward.

    Raises:
        ValueError: it is not a causal language model.
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
        # Rounding of a deep bf16 model reaches a tenth of the norm; a look ahead or another head, its size.
        tolerance = (1e-3 if self.model.dtype == torch.float32 else 0.3) * want.norm()
        padded = torch.cat([ids, ids.flip(1)], dim=1)
        if getattr(self.model.config, "is_encoder_decoder", False) or not (
            (self.model(input_ids=padded).logits[0, :PROBE].float() - want).norm() <= tolerance
        ):
            raise ValueError(f"reference: {name} is not a causal language model: what follows changes its predictions")
        if isinstance(self.model, TaHForCausalLM):
            return  # its passes are not one decoder
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
        advance: Callable[[int, int], None] = lambda rows, tokens: None,
    ) -> list[Measured]:
        """What it makes of every supervised token.

        Args:
            ids: rows [T], of any lengths.
            supervised: rows [T] bool.
            tokens_per_batch: most tokens of a forward, padding included; a longer row runs alone.
            advance: told the rows and tokens of every batch that is done.

        Raises:
            ValueError: it computes NaN.
        """
        result: dict[int, Measured] = {}
        with evaluating(self.model):
            for batch in batches([len(row) for row in ids], tokens_per_batch):
                done = self._measure([ids[at] for at in batch], [supervised[at] for at in batch])
                result.update(zip(batch, done, strict=True))
                advance(len(batch), sum(len(ids[at]) for at in batch))
        return [result[at] for at in range(len(ids))]

    def _measure(self, ids: list[np.ndarray], supervised: list[np.ndarray]) -> list[Measured]:
        """One batch, padded on the right: a causal model does not see that, so it needs no mask and runs faster."""
        width = max(map(len, ids))
        tokens, predicts = np.zeros((len(ids), width), np.int64), np.zeros((len(ids), width), bool)
        for row, (its, wanted) in enumerate(zip(ids, supervised, strict=True)):
            tokens[row, : len(its)], predicts[row, : len(its) - 1] = its, wanted[1:]
        x = torch.from_numpy(tokens)
        where = torch.from_numpy(predicts.ravel().nonzero()[0])  # [N] flat indices
        target = x.flatten().roll(-1)[where]
        if self.decoder is not None and self.head is not None:
            hidden = self.decoder(input_ids=x.to(self.device), use_cache=False).last_hidden_state.flatten(0, 1)
            found = [
                statistics(self.head(hidden[at.to(hidden.device)]), its)
                for at, its in zip(where.split(CHUNK), target.split(CHUNK), strict=True)
            ]
        else:
            found = [
                statistics(logits, its)
                for row, its in enumerate(target.split(predicts.sum(1).tolist()))
                for logits, its in self._plain(x[row : row + 1, : len(ids[row])], predicts[row], its)
            ]
        sheet = np.zeros((3, predicts.size), np.float32)
        sheet[0] = -1
        sheet[:, where.numpy()] = torch.cat(found, dim=1).cpu().numpy()
        rank, prob, entropy = sheet.reshape(3, *predicts.shape)
        return [
            Measured(rank[row, : len(its)].astype(np.int32), prob[row, : len(its)], entropy[row, : len(its)])
            for row, its in enumerate(ids)
        ]

    def _plain(self, x: Tensor, predicts: np.ndarray, target: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Logits [n, V] and targets [n] of one row [1, T], in chunks."""
        logits = self.model(input_ids=x.to(self.device)).logits[0]
        where = torch.from_numpy(predicts.nonzero()[0]).to(logits.device)
        chunks = zip(where.split(CHUNK), target.split(CHUNK), strict=True)
        return [(logits[at], its) for at, its in chunks]


def statistics(logits: Tensor, target: Tensor) -> Tensor:
    """Rank, probability and entropy [3, n] float32 of `target` [n] under `logits` [n, V], which get overwritten.

    Of tokens with the same logit the lower id comes first, so rank 0 is argmax. In pieces that fit a cache, without
    new memory: written plainly, this would cost as much as the head.

    Raises:
        ValueError: the logits hold NaN or infinity.
    """
    target = target.to(logits.device)[:, None]
    found = torch.empty(3, len(logits), device=logits.device)
    buffer = torch.empty(min(PIECE, len(logits)), logits.shape[1], device=logits.device)
    for start in range(0, len(logits), PIECE):
        at = slice(start, start + PIECE)
        z, aim = logits[at].float(), target[at]
        p = buffer[: len(z)]
        own = z.gather(1, aim)
        rank = torch.gt(z, own, out=p).sum(1)  # as float32, exact below 2^24
        tied = (torch.eq(z, own, out=p).sum(1) > 1).nonzero().squeeze(1)
        if len(tied):
            lower = torch.arange(z.shape[1], device=z.device) < aim[tied]
            rank[tied] += ((z[tied] == own[tied]) & lower).sum(1)
        top = z.amax(1, keepdim=True)
        z.sub_(top).clamp_(min=-100)  # what is ruled out (-inf) adds nothing to the entropy
        mass = torch.exp(z, out=p).sum(1)
        norm = mass.log()
        found[0, at], found[1, at] = rank, (own - top).squeeze(1).sub(norm).exp()
        found[2, at] = norm - p.mul_(z).sum(1) / mass
    if not found.isfinite().all():
        raise ValueError("the reference computes NaN or infinity; load it in float32 or bfloat16")
    found[2].clamp_(min=0)
    return found


def batches(lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """Indices of rows by batch, longest rows first, rows * longest <= `tokens_per_batch` or a single row."""
    order = sorted(range(len(lengths)), key=lambda at: (-lengths[at], at))
    found, start = [], 0
    while start < len(order):
        stop = start + max(1, tokens_per_batch // max(1, lengths[order[start]]))
        found.append(order[start:stop])
        start = stop
    return found


class evaluating:
    """Run a model without dropout, and leave it as it was."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.training = model, model.training

    def __enter__(self) -> None:
        self.model.eval()

    def __exit__(self, *error: Any) -> None:
        self.model.train(self.training)


def check_reference(model: PreTrainedModel, tokenizer: Any, reference_tokenizer: Any, max_length: int) -> None:
    """Whether a reference reads what `tokenizer` writes.

    Args:
        reference_tokenizer: the reference's; None: the one at the place it was loaded from, if it was.

    Raises:
        ValueError: a token has another id there, an id has no embedding, or it knows too few positions.
    """
    name = model.name_or_path or type(model).__name__
    if reference_tokenizer is None and model.name_or_path:
        try:
            reference_tokenizer = AutoTokenizer.from_pretrained(model.name_or_path, trust_remote_code=False)
        except Exception as error:
            raise ValueError(f"reference {name} has no usable tokenizer to compare: {first_line(error)}") from error
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
    """Whether a reference can read rows of `max_length` tokens.

    Raises:
        ValueError: it has fewer positions.
    """
    name = model.name_or_path or type(model).__name__
    positions = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if positions is not None and positions < max_length:
        raise ValueError(f"reference {name} has {positions} positions; lower max_length={max_length} to that")


def weights_fingerprint(model: PreTrainedModel) -> str:
    """A hash of up to 1024 values of every weight: tells a model from itself before more training."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in model.named_parameters():
        values = parameter.detach().flatten()
        values = values[:: max(1, values.numel() // 1024)].float().cpu()
        digest.update(name.encode() + (b"" if parameter.is_meta else values.numpy().tobytes()))
    return digest.hexdigest()
