"""Deciders: small networks that are policies, docs/explanation/method.md section 3.

Shapes: N tokens, n tokens of a chunk, D width of the base, k largest logits.

Called with a [`DepthState`], a decider returns continue logits [N]. It reads hidden states of the pass that just ran
and has no input for the depth. No gradient flows from it into the model, except from the decider of TaH2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .core import fast
from .core.next_input import GatedMLP, Norm, reset_parts
from .policy import DepthState

CHUNK = 512  # tokens per chunk, so that the features of a long prompt are not all copied at once
PRIOR_LOGIT = -2.5866893  # logit of 0.07, the paper's share of hard tokens


class LeanDecider(nn.Module):
    """The default decider: an MLP of two layers on normalised hidden states. It needs no logits.

    The output layer starts with zero weights and the bias logit(0.07). So at the default threshold nothing iterates
    before training, and the output is that of the base.

    Args:
        hidden_size: Width D of the base.
        layers: Indices of the hidden states that it reads.
        width: Width of the hidden layer.
    """

    def __init__(self, hidden_size: int, layers: list[int], width: int) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.input = nn.Linear(hidden_size * len(layers), width)
        self.output = nn.Linear(width, 1)
        self.reset_parameters()

    def forward(self, state: DepthState) -> Tensor:
        """Return continue logits [N]."""
        device, dtype = self.input.weight.device, self.input.weight.dtype
        chunks = zip(*(state.hidden[k].split(CHUNK) for k in self.layers), strict=True)
        return torch.cat([self._logits([part.detach().to(device, dtype) for part in parts]) for parts in chunks])

    def _logits(self, parts: list[Tensor]) -> Tensor:
        """Return continue logits [n] from the hidden states [n, D] of each layer."""
        x = torch.cat([F.layer_norm(part, part.shape[-1:]) for part in parts], dim=-1)
        return self.output(F.silu(self.input(x))).squeeze(-1).float()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the weights."""
        nn.init.kaiming_normal_(self.input.weight)
        nn.init.zeros_(self.input.bias)
        nn.init.zeros_(self.output.weight)
        nn.init.constant_(self.output.bias, PRIOR_LOGIT)


class _Block(nn.Module):
    """Residual MLP block with a norm before it: skip(x) + W2 GELU(W1 LN(x))."""

    def __init__(self, width: int, out_width: int, expansion: int, dropout: float) -> None:
        super().__init__()
        self.layer_norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, width * expansion),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(width * expansion, out_width),
            nn.Dropout(dropout),
        )
        self.dim_change = nn.Linear(width, out_width) if width != out_width else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.dim_change(x) + self.mlp(self.layer_norm(x))


class _Backbone(nn.Module):
    def __init__(self, widths: list[int], expansion: int, dropout: float) -> None:
        super().__init__()
        self.input_projection = nn.Linear(widths[0], widths[0])
        outs = widths[1:] + widths[-1:]
        self.blocks = nn.ModuleList(_Block(a, b, expansion, dropout) for a, b in zip(widths, outs, strict=True))
        self.output_layer = nn.Sequential(nn.LayerNorm(widths[-1]), nn.Linear(widths[-1], 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.input_projection(x)
        for block in self.blocks:
            x = block(x)
        return self.output_layer(x)


class MLPDecider(nn.Module):
    """The authors' decider: raw hidden states of several layers and the largest accumulated logits.

    The parameter names are those of the released `iter_decider.bin`, without `threshold`.

    Args:
        hidden_size: Width D of the base.
        layers: Indices of the hidden states that it reads.
        hidden_dims: Width of each residual block.
        expansion: Inner width of a block, as a multiple of its width.
        topk: Number k of the largest accumulated logits that it reads.
        normalize_input: Whether to apply a layer norm to the hidden states and a softmax to the logits.
        dropout: Dropout inside blocks, in training only.
    """

    def __init__(
        self,
        hidden_size: int,
        layers: list[int],
        hidden_dims: list[int],
        expansion: int,
        topk: int,
        normalize_input: bool,
        dropout: float,
    ) -> None:
        super().__init__()
        self.layers = tuple(layers)
        self.topk, self.normalize_input = topk, normalize_input
        features = hidden_size * len(layers)
        if normalize_input:
            self.layer_norm_hidden_states = nn.LayerNorm(features)
        self.logits_projection = nn.Linear(topk, hidden_size)
        self.combined_projection = nn.Linear(features + hidden_size, hidden_dims[0])
        self.backbone = _Backbone(hidden_dims, expansion, dropout)
        self.reset_parameters()

    def forward(self, state: DepthState) -> Tensor:
        """Return continue logits [N]."""
        device, dtype = self.logits_projection.weight.device, self.logits_projection.weight.dtype
        hidden = torch.cat([state.hidden[k].detach().to(device, dtype) for k in self.layers], dim=-1)
        with torch.no_grad():
            top = state.map_logits(lambda logits: logits.topk(self.topk, dim=-1).values).to(device, dtype)
        if self.normalize_input:
            hidden, top = self.layer_norm_hidden_states(hidden), top.softmax(-1)
        x = self.combined_projection(torch.cat([hidden, self.logits_projection(top)], dim=-1))
        return self.backbone(x).squeeze(-1)  # not cast: the authors' code compares a bfloat16 sigmoid

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the weights as the authors' code does."""
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.LayerNorm)):
                module.reset_parameters()
            if isinstance(module, nn.Linear) and name.startswith("backbone."):
                nn.init.kaiming_normal_(module.weight)
                nn.init.zeros_(module.bias)


class TaH2Decider(nn.Module):
    """The decider of TaH2, method.md (14), on token embedding, last hidden state and probabilities of this pass alone.

    It reads as many of the largest probabilities as the base is wide. With gradients, its loss reaches the whole model.

    Args:
        hidden_size: Width D of the base.
        width: Inner width of its MLP. None: D.
        num_layers: Number of layers of the base.
    """

    def __init__(self, hidden_size: int, width: int | None, num_layers: int) -> None:
        super().__init__()
        self.layers = (num_layers,)
        self.norm_embed = Norm(hidden_size)
        self.norm_hidden = Norm(hidden_size)
        self.norm_probs = Norm(hidden_size)
        self.proj = nn.Linear(3 * hidden_size, hidden_size, bias=False)
        self.mlp = GatedMLP(hidden_size, width or hidden_size)
        self.norm_out = Norm(hidden_size)
        self.score = nn.Linear(hidden_size, 1, bias=False)
        self.reset_parameters()

    def forward(self, state: DepthState) -> Tensor:
        """Return continue logits [N]."""
        device, dtype = self.score.weight.device, self.score.weight.dtype
        (hidden,) = (state.hidden[k] for k in self.layers)
        parts = (state.embeds(), hidden, state.map_pass_logits(self._largest))
        chunks = zip(*(part.split(CHUNK) for part in parts), strict=True)
        return torch.cat([self._logits([part.to(device, dtype) for part in chunk]) for chunk in chunks])

    def _logits(self, parts: list[Tensor]) -> Tensor:
        """Return continue logits [n] from embeddings, last hidden states and probabilities, [n, D] each."""
        norms = [self.norm_embed, self.norm_hidden, self.norm_probs]
        x = torch.cat([norm(part) for norm, part in zip(norms, parts, strict=True)], dim=-1)
        return self.score(self.norm_out(self.mlp(self.proj(x)))).squeeze(-1).float()

    def _largest(self, logits: Tensor) -> Tensor:
        """Return the D largest probabilities [n, D] of logits [n, V], largest first, 0 beyond the vocabulary."""
        width = self.score.in_features
        largest, _ = fast.topk(logits.float().softmax(-1), min(width, logits.shape[-1]))
        return F.pad(largest, (0, width - largest.shape[-1]))

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialise the weights as the authors' code does."""
        reset_parts(self)
        nn.init.normal_(self.score.weight, std=0.01)


Decider = LeanDecider | MLPDecider | TaH2Decider


def build_decider(described: dict[str, Any], text: Any) -> Decider:
    """Return a new decider.

    Args:
        described: The entry `decider` of a `TaHConfig`.
        text: Text configuration of the base, from which the sizes are read.

    Raises:
        ValueError: `topk` is larger than the vocabulary.
    """
    options = {key: value for key, value in described.items() if key != "kind"}
    if described["kind"] == "lean":
        return LeanDecider(text.hidden_size, **options)
    if described["kind"] == "tah2":
        return TaH2Decider(text.hidden_size, num_layers=text.num_hidden_layers, **options)
    if options["topk"] > text.vocab_size:
        raise ValueError(f"decider topk={options['topk']} is more than the vocabulary of {text.vocab_size} tokens")
    return MLPDecider(text.hidden_size, **options)
