"""A plain evaluation of a served model: the same weights, without vLLM's cache, pool, steps and kernels.

It runs one short sequence at a time, whole, with all keys in ordinary tensors and attention in float32. The check at
the start of a server compares the served model with it. The stock layers' own modules do all the rest, so no weight is
in memory twice.

Shapes: N tokens of the sequence, M of them that iterate, S keys, H key/value heads, G query heads per key/value head,
K head width, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention

from ..core.next_input import weighted
from ..policy import DepthState, build_policy, draw
from .attention import Current
from .deep_layers import run_layers, twin
from .mixture import mixed

if TYPE_CHECKING:
    from .model import TaHForCausalLM


def attend(query: Tensor, keys: Tensor, values: Tensor, visible: Tensor, scale: float) -> Tensor:
    """Return the attention output [M, H * G, K], computed in float32.

    Args:
        query: Queries [M, H * G, K].
        keys: Keys [S, H, K].
        values: Values [S, H, K].
        visible: Whether a query attends to a key, [M, S] bool.
        scale: Factor of the scores.
    """
    groups = query.shape[1] // keys.shape[1]
    keys, values = (x.float().repeat_interleave(groups, 1) for x in (keys, values))
    scores = torch.einsum("mhk,shk->hms", query.float(), keys) * scale
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return torch.einsum("hms,shk->mhk", weights, values).to(query.dtype)


def duo_visible(places: Tensor, shallow: Tensor, deep: Tensor, own: bool) -> Tensor:
    """Return which keys a query of depth 2 attends to (method.md (7)), [M, S] bool: those of depth 1, then of depth 2.

    Args:
        places: Positions of the queries, [M].
        shallow: Positions of the keys of depth 1.
        deep: Positions of the keys of depth 2.
        own: Whether a query attends to no key of depth 2 except its own.
    """
    before, at = shallow <= places[:, None], places[:, None]
    return torch.cat([before, deep == at if own else deep <= at], dim=1)


class PlainAttention(nn.Module):
    """Attention layer of a plain pass, at depth 1 and then at depth 2, in place of a stock attention layer.

    Args:
        stock: Stock layer.
        plain: Plain model, which knows the running pass.
    """

    plain: Plain

    def __init__(self, stock: Attention, plain: Plain) -> None:
        super().__init__()
        self.heads, self.width, self.scale = stock.num_kv_heads, stock.head_size, stock.impl.scale
        self.__dict__["plain"] = plain  # not a submodule
        self.keys: list[Tensor] = []  # by depth: [tokens of the pass, H, K]
        self.values: list[Tensor] = []

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Return the attention output [M, G * H * K] of queries [M, G * H * K] and keys and values [M, H * K]."""
        places = self.plain.places
        del self.keys[len(places) - 1 :], self.values[len(places) - 1 :]
        self.keys.append(key.view(len(key), self.heads, self.width).clone())
        self.values.append(value.view(len(value), self.heads, self.width).clone())
        at = places[-1]
        visible = at <= at[:, None] if len(places) == 1 else duo_visible(at, places[0], places[1], self.plain.own)
        query = query.view(len(query), -1, self.width)
        out = attend(query, torch.cat(self.keys), torch.cat(self.values), visible, self.scale).flatten(1)
        return self.plain.rounded(out)


class Plain:
    """The model `model` of a worker, evaluated plainly.

    Args:
        model: Model.
        vllm_config: Configuration of vLLM, in whose context layers of experts run.

    Attributes:
        hidden: Final hidden states of depth 1 of the running sequence, [N, D].
        logits: Their logits, [N, V].
    """

    def __init__(self, model: TaHForCausalLM, vllm_config: Any) -> None:
        self.vllm_config = vllm_config
        self.model, self.own = model, model.config.attention == "own"
        self.places: list[Tensor] = []  # positions of the tokens, by depth
        layers = enumerate(model.decoder.layers)
        made: dict[int, PlainAttention] = {}  # both depths of a layer have the same attention

        def attention(stock: Attention, layer: int, current: Current) -> nn.Module:
            return made.setdefault(layer, PlainAttention(stock, self))

        build = partial(twin, current=Current(), attention=attention)
        pairs = [(build(one, {}, k), build(one, model.adapted[k], k)) for k, one in layers]
        self.layers = [[pair[depth] for pair in pairs] for depth in (0, 1)]
        self.hidden: Tensor
        self.logits: Tensor
        self.features: dict[int, Tensor] = {}
        self.noise: torch.Generator | None = None

    def first(self, ids: Tensor) -> None:
        """Run depth 1 on a sequence of tokens, [N]."""
        self.ids, self.places = ids, [torch.arange(len(ids), device=ids.device)]
        x = self.model.embed_input_ids(ids)
        self.features = {0: self.model.first_input(x).clone()}  # layers write in place
        self.hidden = self._run(0, x)
        self.features[len(self.layers[0])] = self.hidden
        self.logits = self.model.base.compute_logits(self.hidden)

    def _state(self) -> DepthState:
        """Return what a policy may read after depth 1."""

        def map_logits(f: Callable[[Tensor], Tensor], /, ahead: bool = False) -> Tensor:
            return f(self.logits)

        embeds = partial(self.model.embed_input_ids, self.ids)
        return DepthState(1, self.ids, self.places[0], self.features, None, map_logits, map_logits, embeds)

    def continue_prob(self, name: str) -> Tensor:
        """Return the continue probabilities [N] float32 by the policy `name`, after depth 1 (method.md (3))."""
        policy: Any = self.model.decider if name == "decider" else build_policy(name, self.model.config)
        return policy(self._state()).float().sigmoid()

    def bound(self, name: str, threshold: float) -> Tensor:
        """Return the numbers [N] float32 above which a continue probability by the policy `name` means to iterate."""
        if name == "decider" and self.model.config.decision == "sample":
            return draw(self._state(), self.model.config.random_seed).float()
        return torch.full((len(self.ids),), threshold, device=self.ids.device)

    def second(self, chosen: Tensor, prob: Tensor) -> Tensor:
        """Run depth 2 on the tokens `chosen` [M], distinct and rising.

        Args:
            chosen: Tokens, [M].
            prob: Continue probabilities after depth 1, [N] float32, which weigh the passes of a mixture.

        Returns:
            Log-probabilities [N, V] float32 of all tokens, over all of their passes.
        """
        if not len(chosen):
            return self.logits.float().log_softmax(-1)
        self.places = [self.places[0], chosen]
        deep = self.model._finish(self._run(1, self._next_input(chosen)))
        head = self.model.base.compute_logits
        if self.model.mixes:
            weight = torch.full_like(prob, 0.5) if self.model.config.output == "even" else prob
            found = self.logits.float().log_softmax(-1)
            found[chosen] = mixed(found[chosen], head(deep), weight[chosen])
            return found
        hidden = self.hidden.clone()
        hidden[chosen] += deep
        return head(hidden).float().log_softmax(-1)

    def rounded(self, x: Tensor) -> Tensor:
        """Return the output of an attention layer; with `noise` set, changed by up to one unit in the last place.

        What that does to the results tells how far two correct evaluations may be apart, whatever the model.
        """
        if self.noise is None:
            return x
        change = (2 * torch.rand(x.shape, generator=self.noise) - 1).to(x.device)
        return (x.float() * (1 + torch.finfo(x.dtype).eps * change)).to(x.dtype)

    def _run(self, depth: int, x: Tensor) -> Tensor:
        """Return the normed hidden states [M, D] of a pass over inputs [M, D]; depth 1 keeps what the decider reads."""
        model = self.model
        wanted = model.decoder.aux_hidden_state_layers if depth == 0 else ()
        where, x = self.places[depth], model.first_input(x)
        with set_forward_context(None, self.vllm_config, num_tokens=len(x)):
            hidden, seen = run_layers(self.layers[depth], model.decoder.norm, model.family, where, x, wanted)
        self.features |= seen
        return hidden

    def _next_input(self, chosen: Tensor) -> Tensor:
        """Return the next inputs [M, D] of the tokens `chosen` (method.md (4), (5), (13))."""
        if self.model.next_input_mlp is not None:
            return self.model.next_input_mlp(self.model.embed_input_ids(self.ids[chosen]), self.hidden[chosen])
        if self.model.next_input_map is not None:
            return self.model.embed_input_ids(self.ids[chosen]) + self.model.next_input_map(self.hidden[chosen])
        best = self.logits[chosen].float().topk(min(self.model.config.mix_topk, self.logits.shape[-1]))
        return weighted(best.values.softmax(-1), self.model.embed_input_ids(best.indices))
