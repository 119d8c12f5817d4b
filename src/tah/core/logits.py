"""The results of the passes: hidden states that the policy reads, and the running output, method.md (2) and (8).

Shapes: B batch, T tokens, N chosen tokens, M tokens of a deeper pass, n tokens of a chunk, k best tokens, D width,
V vocabulary. A token is named by its flat index b * T + t.
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
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import CausalLMOutputWithPast

from .head import Head

CHUNK = 128  # tokens whose logits [CHUNK, V] are in memory at the same time
# For each pass that is kept apart, which of some tokens ran it: indices [n] into these tokens, and into the pass's.
Found = list[tuple[Tensor, Tensor]]


@dataclass
class TaHOutput(CausalLMOutputWithPast):
    """Output of `TaHForCausalLM`.

    Args:
        loss: Loss of the accumulated logits, method.md (10) or (12), if labels are given.
        logits: Accumulated logits [B, K, V] of the K tokens of `logits_to_keep`.
        past_key_values: The `DuoCache`, if a cache is used. Since transformers 5.24 its name is `cache`.
        depth_count: Passes [B, T] int64 that each token took, 1 at padding.
        continue_logits: Continue logits [B, T, max_depth - 1] float32 of the policy after each depth; nan where the
            policy did not decide.
        token_loss: Cross-entropy [B, T, max_depth] float32 of each token's output after each depth, if labels are
            given. After a token's last pass the value stays. nan where a token is not supervised or has weight 0.
        mixture_weights: Weight [B, T, max_depth] float32 of each pass in the output of its token, method.md (15), where
            the output is a mixture. 0 for a pass that did not run.
        pass_loss: Cross-entropy [B, T, max_depth] float32 of each pass alone, with `TrainingPass(side_passes=True)`.
            The entry after a token's last pass is that of one more pass, as if this token alone had continued. nan
            where a token is not supervised, and beyond.
        last_hidden_state: Hidden states [B, T, D], summed over the passes of each token, method.md (2), if the call
            has `output_last_hidden_state`; in a mixture with the weights of the passes. Their head is the logits, if
            the head is linear and the output is a sum.
    """

    depth_count: Tensor | None = None
    continue_logits: Tensor | None = None
    token_loss: Tensor | None = None
    mixture_weights: Tensor | None = None
    pass_loss: Tensor | None = None
    last_hidden_state: Tensor | None = None

    @property
    def continue_prob(self) -> Tensor:
        """Return the continue probabilities [B, T, max_depth - 1], the sigmoid of `continue_logits`."""
        assert self.continue_logits is not None
        return self.continue_logits.sigmoid()


class RunningOutput:
    """The sum of the passes of each token, held as hidden states and never as logits [B, T, V].

    Method.md (2) sums the logits of all passes. If the head is linear, the head of a sum is the sum of heads, so one
    tensor [B*T, D] holds the sum. With a soft-cap or a head bias this fails; then the hidden states of the passes are
    kept apart until logits are needed. With `output="zero_init"`, method.md (8), one tensor holds the sum for any head.

    Args:
        head: Hidden states to logits.
        hidden: Final hidden states [B, T, D] of depth 1.
        output_map: Output map Z of `output="zero_init"`; None for `output="sum"`.
        num_best: Number k of tokens in the mix of the next input.
    """

    def __init__(self, head: Head, hidden: Tensor, output_map: nn.Module | None, num_best: int) -> None:
        self.head, self.output_map, self.num_best = head, output_map, num_best
        self.total = hidden.flatten(0, 1)  # [B*T, D]
        self.deeper: list[tuple[Tensor, Tensor]] = []  # (tokens [M], hidden [M, D]) where sums are not allowed

    def add(self, tokens: Tensor, hidden: Tensor, continue_logits: Tensor) -> None:
        """Add a deeper pass.

        Args:
            tokens: Flat indices [M] of the tokens that ran it, in order.
            hidden: Their final hidden states [M, D].
            continue_logits: The continue logits [M] after which they took this pass. A mixture weighs by them.
        """
        if self.output_map is not None:
            self.total = self.total.index_add(0, tokens, self.output_map(hidden).to(self.total.dtype))
        elif self.head.is_linear:
            self.total = self.total.index_add(0, tokens, hidden.to(self.total.dtype))
        else:
            self.deeper.append((tokens, hidden))

    def so_far(self) -> RunningOutput:
        """Return a view that later passes do not change."""
        now = copy.copy(self)
        now.deeper = list(self.deeper)
        return now

    def logits(self, tokens: Tensor, found: Found | None = None) -> Tensor:
        """Return accumulated logits [N, V] of `tokens` [N], computed by the base's own head.

        Args:
            tokens: Flat indices [N].
            found: What `found` returns for them, if it is known.
        """
        return self.through(self.head, tokens, found)

    def through(self, head: Callable[[Tensor], Tensor], tokens: Tensor, found: Found | None = None) -> Tensor:
        """Return accumulated logits [N, V] of `tokens` [N] by a `head` [n, D] -> [n, V] that equals the base's."""
        logits, found = head(self.total[tokens]), self.found(tokens) if found is None else found
        for (_, hidden), (hit, at) in zip(self.deeper, found, strict=True):
            logits = logits.index_add(0, hit.to(logits.device), head(hidden[at]))  # the head may be on another device
        return logits

    def found(self, tokens: Tensor) -> Found:
        """Return which of `tokens` [N] ran each pass that is kept apart."""
        result = []
        for ran, _ in self.deeper:
            at = torch.searchsorted(ran, tokens).clamp(max=len(ran) - 1)  # the tokens of a pass are sorted
            hit = (ran[at] == tokens).nonzero().squeeze(1)
            result.append((hit, at[hit]))
        return result

    def chunks(self, tokens: Tensor, size: int) -> list[tuple[Tensor, Found]]:
        """Split `tokens` [N] into chunks of `size`, each with what `found` returns for it.

        A search waits for the device. So there is one for all chunks, and none in a backward that runs a chunk again.
        """
        chunks = tokens.split(size)
        parts: list[Found] = [[] for _ in chunks]
        for hit, at in self.found(tokens):
            chunk = hit // size
            counts = torch.bincount(chunk, minlength=len(chunks)).tolist() if len(chunks) > 1 else [len(hit)]
            split = zip((hit - size * chunk).split(counts), at.split(counts), strict=True)
            for part, pair in zip(parts, split, strict=True):
                part.append(pair)
        return list(zip(chunks, parts, strict=True))

    def summed(self, B: int, T: int) -> Tensor:
        """Return the final hidden states [B, T, D] of each token, summed over its passes."""
        total = self.total
        for tokens, hidden in self.deeper:
            total = total.index_add(0, tokens, hidden.to(total.dtype))
        return total.view(B, T, -1)

    @property
    def is_single_matrix(self) -> bool:
        """Return whether the output is one matrix times one hidden state per token."""
        return self.head.is_single_matrix

    def map_logits(self, tokens: Tensor, f: Callable[[Tensor], Tensor], ahead: bool = False) -> Tensor:
        """Apply f: [n, V] -> [n, ...] to the accumulated logits of `tokens` [N], `CHUNK` of them at a time.

        Args:
            tokens: Flat indices [N].
            f: Function of logits.
            ahead: Whether most of these tokens take another pass, so that `best` can be prepared from the same logits.
                `fast.py` does so; here it has no effect.

        Returns:
            The results [N, ...].
        """
        return torch.cat([f(self.logits(chunk, found)) for chunk, found in self.chunks(tokens, CHUNK)])

    def map_pass_logits(self, hidden: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
        """Apply f: [n, V] -> [n, ...] to the logits of one pass alone, `CHUNK` tokens at a time.

        The backward computes the logits again, so that no [N, V] is kept.

        Args:
            hidden: Final hidden states [N, D] of the pass.
            f: Function of logits.

        Returns:
            The results [N, ...].
        """
        return torch.cat([replayed(lambda part: f(self.head(part)), chunk) for chunk in hidden.split(CHUNK)])

    def best(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weights [N, k] float32 of method.md (4) for `tokens` [N], and the ids [N, k] of their tokens."""
        now = self.so_far()  # the backward must not include later passes
        return joined(
            [
                replayed(lambda *part: best_of(now.logits(*part), self.num_best), *chunk)
                for chunk in now.chunks(tokens, CHUNK)
            ]
        )


def replayed(f: Callable[..., Any], *inputs: Any) -> Any:
    """Return f(*inputs); with gradients, the backward computes it again instead of keeping what is inside."""
    return checkpoint(f, *inputs, use_reentrant=False) if torch.is_grad_enabled() else f(*inputs)


def best_of(logits: Tensor, k: int, topk: Callable[[Tensor, int], Any] = torch.topk) -> tuple[Tensor, Tensor]:
    """Return the softmax [n, k] float32 over the k largest of `logits` [n, V], and their token ids [n, k]."""
    top, ids = topk(logits, min(k, logits.shape[-1]))
    return top.float().softmax(-1), ids


def joined(found: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return chunks of `best_of` as one."""
    weights, ids = zip(*found, strict=True)
    return torch.cat(weights), torch.cat(ids)


_captured: ContextVar[dict[int, Tensor] | None] = ContextVar("tah_captured", default=None)


@contextmanager
def capture_hidden(layers: nn.ModuleList, wanted: tuple[int, ...]) -> Iterator[dict[int, Tensor]]:
    """Collect the hidden states `wanted` of the pass that runs inside.

    transformers' `output_hidden_states` would keep all hidden states in memory.

    Args:
        layers: Layers of the decoder.
        wanted: Indices: 0 is the input of the first layer, k the output of layer k. The caller adds the state after the
            final norm.

    Yields:
        Hidden states by index, filled while the pass runs.
    """
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
    token = _captured.set(seen)  # hooks are on the modules; a pass of another thread must not fill this dict
    try:
        yield seen
    finally:
        _captured.reset(token)
        for handle in handles:
            handle.remove()


def select(hidden: Tensor, features: dict[int, Tensor], valid: Tensor, every: bool) -> tuple[Tensor, dict[int, Tensor]]:
    """Return the N entries where `valid` [X, Y] is True, [X, Y, D] -> [N, D], on the device of `valid`.

    Args:
        hidden: Hidden states [X, Y, D].
        features: Hidden states [X, Y, D] by index.
        valid: Mask [X, Y] bool.
        every: Whether all entries are valid; the result is then a view.
    """

    def pick(x: Tensor) -> Tensor:
        x = x.to(valid.device)  # a base on several devices ends on another device than it begins
        return x.flatten(0, 1) if every else x[valid]

    return pick(hidden), {k: pick(x) for k, x in features.items()}
