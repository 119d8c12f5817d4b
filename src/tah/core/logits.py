"""What comes out of the passes: hidden states the policy reads, and the running sum that becomes logits.

Shapes: B batch, T tokens, N tokens in question, M tokens of a deeper pass, D width, V vocabulary.
A token is named by its flat index b * T + t.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from .families import Head

_recording: ContextVar[dict[int, Tensor] | None] = ContextVar("tah_recording", default=None)
CHUNK = 128  # tokens whose logits [CHUNK, V] exist at the same time
MEMO = 64  # tokens of a call whose logits are kept, at most
BLOCK = 16  # logits of which one maximum is taken


@dataclass
class TaHOutput(CausalLMOutputWithPast):
    """Output of `TaHForCausalLM`.

    Args:
        loss: next-token cross-entropy of the accumulated logits, where labels are given.
        logits: [B, K, V] accumulated logits of the K tokens asked for (`logits_to_keep`).
        past_key_values, since transformers 5.24 cache: the `DuoCache`, where a cache is used.
        depth_count: [B, T] int64, passes each token took (1 at padding).
        continue_logits: [B, T, max_depth - 1] float32, the policy's logit for going on after each depth; nan where it
            was not asked.
        token_loss: [B, T, max_depth] float32 where labels are given: the cross-entropy of each token's output after
            each depth, that of its last pass where it stopped earlier; nan where it was not supervised or not weighed.
    """

    depth_count: Tensor | None = None
    continue_logits: Tensor | None = None
    token_loss: Tensor | None = None

    @property
    def continue_prob(self) -> Tensor:
        """[B, T, max_depth - 1]: sigmoid of `continue_logits`, the policy's probability of going on."""
        assert self.continue_logits is not None
        return self.continue_logits.sigmoid()


class RunningOutput:
    """What the passes of each token add up to (spec A.1 step 5), carried as hidden states, never as [B, T, V].

    The head of a sum is the sum of heads where the head is linear, so one [B, T, D] holds the sum of logits. Under a
    soft-cap or a head bias that fails, and the passes' hidden states are kept apart until logits are asked for. With
    `zero_init` the output is the head of h1 + Z h2, which is a sum of hidden states for any head.

    Args:
        head: hidden states to logits.
        hidden: [B, T, D] final hidden states of depth 1.
        zero_init: the map Z for `output="zero_init"`, None for `output="sum"`.
        num_best: how many of the best tokens make the next input; 0 where it is not made of logits.
    """

    def __init__(self, head: Head, hidden: Tensor, zero_init: nn.Module | None, num_best: int = 0) -> None:
        self.head, self.zero_init, self.num_best = head, zero_init, num_best
        self.total = hidden.flatten(0, 1)  # [B*T, D]
        self.deeper: list[tuple[Tensor, Tensor]] = []  # (tokens [M], hidden [M, D]) where sums are not allowed
        self.memo: Tensor | None = None  # [B*T, V] while decoding, so that no token's head runs twice
        self.stale: list[Tensor] = []
        # Tokens [N] and their `best`, where a policy's look at the logits told them; till a pass adds to them.
        self.ahead: tuple[Tensor, Tensor, Tensor] | None = None

    def add(self, tokens: Tensor, hidden: Tensor) -> None:
        """Add a deeper pass of `tokens` [M] with final hidden states [M, D]."""
        if self.zero_init is not None:
            self.total = self.total.index_add(0, tokens, self.zero_init(hidden).to(self.total.dtype))
        elif self.head.is_linear:
            self.total = self.total.index_add(0, tokens, hidden.to(self.total.dtype))
        else:
            self.deeper.append((tokens, hidden))
        self.stale.append(tokens)
        self.ahead = None

    def so_far(self) -> RunningOutput:
        """A view that later passes do not change."""
        now = copy.copy(self)
        now.deeper, now.memo, now.stale, now.ahead = list(self.deeper), None, [], None
        return now

    def logits(self, tokens: Tensor, exact: bool = True) -> Tensor:
        """Accumulated logits [N, V] of `tokens` [N]; with `exact`, what the base's own head gives."""
        everyone = len(self.total)
        if torch.is_grad_enabled() or everyone > MEMO or (self.memo is None and len(tokens) < everyone):
            return self._logits(tokens, exact)
        if self.memo is None:
            self.memo = self._logits(torch.arange(everyone, device=tokens.device))
        else:
            for stale in self.stale:
                self.memo[stale] = self._logits(stale)
        self.stale = []
        return self.memo[tokens]

    def _logits(self, tokens: Tensor, exact: bool = True) -> Tensor:
        logits = self.head(self.total[tokens], exact)
        for ran, hidden in self.deeper:
            place = tokens.new_full((len(self.total),), -1)
            place[ran] = torch.arange(len(ran), device=ran.device)
            place = place[tokens]  # [N], -1 where the token did not run this pass
            hit = (place >= 0).nonzero().squeeze(1)
            logits = logits.index_add(0, hit, self.head(hidden[place[hit]], exact))
        return logits

    def map_logits(self, tokens: Tensor, f: Callable[[Tensor], Tensor], ahead: bool = False) -> Tensor:
        """f applied to the accumulated logits of `tokens`, `CHUNK` of them at a time: [n, V] -> [n, ...].

        With `ahead`, the same logits also tell the `best` of these tokens: where most of them run another pass, that
        saves the product with the head that `best` would need.
        """
        if not ahead or not self.num_best or torch.is_grad_enabled():
            return torch.cat([f(self.logits(chunk, exact=False)) for chunk in tokens.split(CHUNK)])
        mapped, found = [], []
        for chunk in tokens.split(CHUNK):
            logits = self.logits(chunk, exact=False)
            found.append(best_of(logits, self.num_best))
            mapped.append(f(logits))  # which may overwrite them
        self.ahead = (tokens, *_joined(found))
        return torch.cat(mapped)

    def best(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities among the `num_best` highest accumulated logits of `tokens` [N], and their ids: [N, k]."""
        if self.ahead is None or torch.is_grad_enabled():  # what was told ahead has no gradient
            return _joined([best_of(self.logits(chunk, exact=False), self.num_best) for chunk in tokens.split(CHUNK)])
        seen, weights, ids = self.ahead
        at = torch.searchsorted(seen, tokens).to(ids.device)  # of the tokens seen, in order, some go on
        return weights[at], ids[at]


def best_of(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """[n, V] -> probabilities [n, k] float32 and token ids [n, k]"""
    top, ids = highest(logits, min(k, logits.shape[-1]))
    return top.float().softmax(-1), ids


def highest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """`x.topk(k)` of x [n, V], for a large V at half the price on a CPU: values and ids [n, k], falling. Of equal
    values it may take others.

    They lie in the k blocks with the largest maxima. A block takes every (V // BLOCK)-th value, so that the maxima
    of all are taken side by side.
    """
    n, V = x.shape
    blocks = V // BLOCK
    if blocks <= k or x.device.type != "cpu":  # elsewhere it is not measured
        return x.topk(k)
    whole = blocks * BLOCK
    best = x[:, :whole].view(n, BLOCK, blocks).amax(1).topk(k, sorted=False).indices  # [n, k]
    starts = torch.arange(0, whole, blocks, device=x.device)
    places = (starts[:, None] + best[:, None]).flatten(1)  # [n, BLOCK * k]
    rest = torch.arange(whole, V, device=x.device).expand(n, -1)
    places = torch.cat([places, rest], dim=1)
    top, at = x.gather(1, places).topk(k)
    return top, places.gather(1, at)


def _joined(found: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    weights, ids = zip(*found, strict=True)
    return torch.cat(weights), torch.cat(ids)


@contextmanager
def record(layers: nn.ModuleList, wanted: tuple[int, ...]) -> Iterator[dict[int, Tensor]]:
    """Keep the hidden states `wanted` of the pass that runs inside: 0 is the input of the first layer, k the output of
    layer k. (transformers' own `output_hidden_states` keeps all of them alive.)"""
    seen: dict[int, Tensor] = {}

    def keep_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _recording.get() is seen:
            seen[0] = args[0] if args else kwargs["hidden_states"]

    def keep_output(k: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if _recording.get() is seen:
                seen[k] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [layers[k - 1].register_forward_hook(keep_output(k)) for k in wanted if 0 < k < len(layers)]
    if 0 in wanted:
        handles.append(layers[0].register_forward_pre_hook(keep_input, with_kwargs=True))
    token = _recording.set(seen)  # hooks sit on the modules; another thread's pass must not fill this dict
    try:
        yield seen
    finally:
        _recording.reset(token)
        for handle in handles:
            handle.remove()


def select(hidden: Tensor, features: dict[int, Tensor], valid: Tensor, every: bool) -> tuple[Tensor, dict[int, Tensor]]:
    """[X, Y, D] -> [N, D], the N entries where `valid` [X, Y], on its device; a view where that is all of them."""

    def pick(x: Tensor) -> Tensor:
        x = x.to(valid.device)  # a base spread over devices ends on another one than it begins
        return x.flatten(0, 1) if every else x[valid]

    return pick(hidden), {k: pick(x) for k, x in features.items()}
