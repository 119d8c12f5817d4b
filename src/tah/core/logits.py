"""What comes out of the passes: hidden states that the policy reads, and the running sum that becomes logits.

Shapes: B batch, T tokens, N tokens in question, M tokens of a deeper pass, D width, V vocabulary, k best tokens.
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

from .head import Head

CHUNK = 128  # tokens whose logits [CHUNK, V] exist at the same time


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
    """What the passes of each token add up to, carried as hidden states, never as [B, T, V].

    The paper adds the logits of all passes. The head of a sum is the sum of heads where the head is linear, so one
    [B, T, D] holds the sum. Under a soft-cap or a head bias that fails, and the passes' hidden states are kept apart
    until logits are asked for. With `output="zero_init"` the output is the head of h1 + Z h2, a sum of hidden states
    for any head.

    Args:
        head: hidden states to logits.
        hidden: [B, T, D] final hidden states of depth 1.
        output_map: the map Z of `output="zero_init"`, None for `output="sum"`.
        num_best: k, of how many best tokens the next input is mixed.
    """

    def __init__(self, head: Head, hidden: Tensor, output_map: nn.Module | None, num_best: int) -> None:
        self.head, self.output_map, self.num_best = head, output_map, num_best
        self.total = hidden.flatten(0, 1)  # [B*T, D]
        self.deeper: list[tuple[Tensor, Tensor]] = []  # (tokens [M], hidden [M, D]) where sums are not allowed

    def add(self, tokens: Tensor, hidden: Tensor) -> None:
        """Add a deeper pass of `tokens` [M] with final hidden states [M, D]."""
        if self.output_map is not None:
            self.total = self.total.index_add(0, tokens, self.output_map(hidden).to(self.total.dtype))
        elif self.head.is_linear:
            self.total = self.total.index_add(0, tokens, hidden.to(self.total.dtype))
        else:
            self.deeper.append((tokens, hidden))

    def so_far(self) -> RunningOutput:
        """A view that later passes do not change."""
        now = copy.copy(self)
        now.deeper = list(self.deeper)
        return now

    def logits(self, tokens: Tensor) -> Tensor:
        """Accumulated logits [N, V] of `tokens` [N], by the base's own head."""
        return self.through(self.head, tokens)

    def through(self, head: Callable[[Tensor], Tensor], tokens: Tensor) -> Tensor:
        """Accumulated logits [N, V] of `tokens` [N] by a `head` [n, D] -> [n, V] that equals the base's."""
        logits = head(self.total[tokens])
        for ran, hidden in self.deeper:
            at = tokens.new_full((len(self.total),), -1)
            at[ran] = torch.arange(len(ran), device=ran.device)
            at = at[tokens]  # [N], -1 where the token did not run this pass
            hit = (at >= 0).nonzero().squeeze(1)
            logits = logits.index_add(0, hit, head(hidden[at[hit]]))
        return logits

    def map_logits(self, tokens: Tensor, f: Callable[[Tensor], Tensor], ahead: bool = False) -> Tensor:
        """f applied to the accumulated logits of `tokens`, `CHUNK` of them at a time: [n, V] -> [n, ...].

        Args:
            ahead: most of these tokens run another pass, so their `best` may be prepared from the same logits
                (`fast.py` does; here it changes nothing).
        """
        return torch.cat([f(self.logits(chunk)) for chunk in tokens.split(CHUNK)])

    def best(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities [N, k] float32 among the k highest accumulated logits of `tokens` [N], and their ids [N, k]."""
        return joined([best_of(self.logits(chunk), self.num_best) for chunk in tokens.split(CHUNK)])


def best_of(logits: Tensor, k: int, topk: Callable[[Tensor, int], Any] = torch.topk) -> tuple[Tensor, Tensor]:
    """[n, V] -> probabilities [n, k] float32 and token ids [n, k]"""
    top, ids = topk(logits, min(k, logits.shape[-1]))
    return top.float().softmax(-1), ids


def joined(found: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Chunks of `best_of` as one."""
    weights, ids = zip(*found, strict=True)
    return torch.cat(weights), torch.cat(ids)


_captured: ContextVar[dict[int, Tensor] | None] = ContextVar("tah_captured", default=None)


@contextmanager
def capture_hidden(layers: nn.ModuleList, wanted: tuple[int, ...]) -> Iterator[dict[int, Tensor]]:
    """Keep the hidden states `wanted` of the pass that runs inside: 0 is the input of the first layer, k the output of
    layer k. (transformers' own `output_hidden_states` keeps all of them alive.)"""
    seen: dict[int, Tensor] = {}

    def keep_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _captured.get() is seen:
            seen[0] = args[0] if args else kwargs["hidden_states"]

    def keep_output(k: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if _captured.get() is seen:
                seen[k] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [layers[k - 1].register_forward_hook(keep_output(k)) for k in wanted if 0 < k < len(layers)]
    if 0 in wanted:
        handles.append(layers[0].register_forward_pre_hook(keep_input, with_kwargs=True))
    token = _captured.set(seen)  # hooks sit on the modules; another thread's pass must not fill this dict
    try:
        yield seen
    finally:
        _captured.reset(token)
        for handle in handles:
            handle.remove()


def select(hidden: Tensor, features: dict[int, Tensor], valid: Tensor, every: bool) -> tuple[Tensor, dict[int, Tensor]]:
    """[X, Y, D] -> [N, D], the N entries where `valid` [X, Y], on its device; a view where that is all of them."""

    def pick(x: Tensor) -> Tensor:
        x = x.to(valid.device)  # a base spread over devices ends on another one than it begins
        return x.flatten(0, 1) if every else x[valid]

    return pick(hidden), {k: pick(x) for k, x in features.items()}
