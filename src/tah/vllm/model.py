"""`TaHForCausalLM` in vLLM: the stock model of the base's family, and a second pass over hard tokens.

Shapes: T tokens of a step, M of them that iterate, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import init_vllm_registered_model

from ..config import TaHConfig, current_tensor
from ..core.fast import topk
from ..core.logits import best_of
from ..core.lora import is_target
from ..core.next_input import weighted
from ..decider import build_decider
from ..policy import BoundRule, DepthState, build_policy
from .attention import Current, DeepTokens, DuoAttention, plan
from .compat import Batch, check_layout, current_batch, slots_per_block, without_writing
from .deep_layers import Adapter, adapters_of, twin
from .logits import StepLogits
from .names import FAMILIES
from .pool import DeepPool, capacity
from .report import StepReport
from .requests import RequestOptions
from .waiting import Waiting, WaitingTokens


class TaHForCausalLM(nn.Module):
    """A vLLM model: all tokens run the stock model at depth 1, then the hard tokens run its layers at depth 2.

    Depth 1 does not depend on depth 2. So a step has one pass of all its tokens at depth 1 and one pass of its hard
    tokens at depth 2. The sampler gets the sum of both hidden states; the head is linear, so this sums the logits
    (method.md (2)).

    With `batching="mixed"`, hard tokens are deferred to the next step, where they run at depth 2 in the same pass as
    that step's tokens at depth 1. A request whose last token is deferred emits its next token one step later.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: TaHConfig = vllm_config.model_config.hf_config
        base: Any = config.base_config
        self.config = config
        self.base: Any = init_vllm_registered_model(
            vllm_config, prefix="base", hf_config=base, architectures=[FAMILIES[base.model_type]]
        )
        self.decider = build_decider(config.decider, base) if config.decider else None
        wanted = self.decider.layers if self.decider is not None else ()
        self.decoder.aux_hidden_state_layers = tuple(sorted({k for k in wanted if k < base.num_hidden_layers}))
        width = base.hidden_size
        self.next_input_map = nn.Linear(width, width, bias=False) if config.next_input == "hidden" else None
        self.output_map = nn.Linear(width, width, bias=False) if config.output == "zero_init" else None
        self.adapters = nn.ModuleList()
        self.adapted: list[dict[str, Adapter]] = [{} for _ in self.decoder.layers]  # by layer, and by name in the layer
        self.parts: dict[str, tuple[Adapter, str]] = {}  # by name in the checkpoint: adapter, and name of the part
        if config.lora_rank:
            self._add_adapters(config)
        # The worker maintains the first two and sets the three functions.
        self.options: dict[str, RequestOptions] = {}  # by request
        self.fresh: set[str] = set()  # requests of which no token has run
        self.request_ids: Callable[[], list[str]]  # returns the requests of the running step
        self.unsampled: Callable[[], Sequence[bool]]  # whether each request samples no token in this step, or longer
        self.prompt_logprobs: Callable[[], Container[str]]  # returns the requests with prompt log-probabilities
        self.report: StepReport | None = None  # report of the latest step to the scheduler
        self.pool: DeepPool | None = None
        self.mixed = vllm_config.additional_config["batching"] == "mixed"
        self.waiting = WaitingTokens()
        self.given_up: list[int] = []  # physical blocks whose pool entries are freed before the next pass
        self.shares_prefixes = vllm_config.cache_config.enable_prefix_caching
        self.sampler_logits: Tensor | None = None  # [requests, V], if the running step has computed them
        self.current = Current()
        self.deep_layers: list[nn.Module] = []
        self.deep_attention: list[DuoAttention] = []

    def _add_adapters(self, config: TaHConfig) -> None:
        fused, scale = self.base.packed_modules_mapping, config.lora_alpha / config.lora_rank
        for number, layer in enumerate(self.decoder.layers):
            prefix = f"model.layers.{number}."
            for name, adapter in adapters_of(layer, fused, config.lora_rank, scale, config.lora_targets, prefix):
                self.adapters.append(adapter)
                self.adapted[number][name] = adapter
                parent = f"base.model.layers.{number}.{name.rpartition('.')[0]}"
                self.parts |= {f"{parent}.{part}": (adapter, part) for part in adapter.ranges}

    @property
    def decoder(self) -> Any:
        """The stock model without its head."""
        return self.base.model

    @property
    def block_size(self) -> int:
        """Slots per block of vLLM's KV cache."""
        return slots_per_block(self.deep_attention[0].stock)

    # -- weights ---------------------------------------------------------------------------------------------------

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load a TaH checkpoint; the stock model loads the tensors of the base.

        Args:
            weights: Names and tensors.

        Returns:
            Names of the loaded parameters.

        Raises:
            ValueError: A tensor of the adapter is missing or unexpected.
        """
        own = dict(self.named_parameters())
        targets = self.config.lora_targets
        adapted = [name for name in self.parts if is_target(name.removeprefix("base."), targets)]
        missing = {f"{name}.lora_{matrix}.weight" for name in adapted for matrix in "AB"}
        missing |= {name for name in own if not name.startswith(("base.", "adapters."))}

        def of_the_base() -> Iterable[tuple[str, Tensor]]:
            for name, weight in weights:
                if name.startswith("base.") and ".lora_" not in name:
                    yield name.removeprefix("base."), weight
                    continue
                name = current_tensor(name)
                if name not in missing:
                    raise ValueError(f"unexpected tensor {name}: not a checkpoint of this configuration")
                missing.remove(name)
                if name in own:
                    own[name].data.copy_(weight)
                else:
                    path, matrix, _ = name.rsplit(".", 2)
                    adapter, part = self.parts[path]
                    adapter.load(part, matrix, weight)

        loaded = {f"base.{name}" for name in self.base.load_weights(of_the_base())}
        if missing:
            raise ValueError(f"not a complete TaH checkpoint: missing tensors {', '.join(sorted(missing)[:3])}")
        return loaded | {name for name in own if not name.startswith("base.")}

    # -- the method ------------------------------------------------------------------------------------------------

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        """Return the embeddings of token ids."""
        return self.base.embed_input_ids(input_ids)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Return logits [n, V] of hidden states [n, D].

        In each step vLLM calls this first for the sampler, with the last token of each request. `StepLogits` may have
        computed these logits already. Later calls, such as those for log-probabilities of a prompt, run the head.
        """
        made, self.sampler_logits = self.sampler_logits, None
        if made is None:
            return self.base.compute_logits(hidden_states)
        if len(made) != len(hidden_states):
            raise RuntimeError(f"logits of {len(made)} tokens are computed, but vLLM requests {len(hidden_states)}")
        return made

    def forward(
        self, input_ids: Tensor, positions: Tensor, intermediate_tensors: None = None, inputs_embeds: None = None
    ) -> Tensor:
        """Run a step: return the final hidden states [T, D] of its tokens, summed over their passes.

        Args:
            input_ids: Token ids, [T] or padded.
            positions: Positions, [T] or padded.
            intermediate_tensors: Argument of vLLM's pipeline parallelism, which is not supported.
            inputs_embeds: Argument of vLLM's prompt embeddings, which are not supported.
        """
        batch = None if self.pool is None else current_batch(self.deep_attention[0].stock)
        if batch is None:
            out = self.decoder(input_ids, positions, intermediate_tensors, inputs_embeds)
            return out[0] if isinstance(out, tuple) else out
        T, pool = batch.tokens, self.pool
        assert pool is not None
        input_ids, positions = input_ids[:T], positions[:T]
        if self.waiting.left:  # run all deferred tokens: requests with a shared prefix may attend to each other's keys
            self._run_deep(*self.waiting.all())
            self.waiting.ran()
        pool.release(self._slots(self.given_up))
        self.given_up.clear()
        due = self._due(batch)
        again = torch.tensor(list(due.values()), dtype=torch.long)
        fresh = torch.ones(T, dtype=torch.bool).index_fill_(0, again, False)
        released = pool.release(batch.slots[fresh])
        if self.waiting.by_request:
            hidden, features = self._run_mixed(batch, due, input_ids, positions)
        else:
            out = self.decoder(input_ids, positions, intermediate_tensors, inputs_embeds)
            hidden, aux = out if isinstance(out, tuple) else (out, [])
            features = dict(zip(self.decoder.aux_hidden_state_layers, (x[:T] for x in aux), strict=True))
        features[len(self.deep_layers)] = hidden[:T]
        logits = StepLogits(self.base.compute_logits, hidden[:T], last=batch.starts[1:] - 1)
        index = (self._decide(batch, input_ids, positions, logits, features) & fresh).nonzero().squeeze(1)
        pool.take(batch.slots[index])
        if len(index):
            embeds = self._next_input(input_ids, index, logits)
            if self._may_wait(batch, index):
                self._set_aside(batch, index, positions, embeds, logits)
            else:
                hidden = self._run_again(batch, index, positions, embeds, logits)
        self.sampler_logits = logits.kept
        rest = self._depths(batch, positions), len(due), self.waiting.deferred()
        self.report = StepReport(pool.free, batch.slots[index].tolist(), released.tolist(), *rest)
        return hidden

    def _decide(
        self, batch: Batch, ids: Tensor, positions: Tensor, logits: StepLogits, features: dict[int, Tensor]
    ) -> Tensor:
        """Return which tokens iterate, [T] bool, by the policy and threshold of their request (method.md (3))."""
        options = [self.options[request] for request in self.request_ids()]
        row = batch.rows(torch.arange(len(ids)))
        threshold = torch.tensor([one.rule.threshold for one in options])
        go = torch.zeros(len(ids), dtype=torch.bool)
        # The order is the same in all processes, since a policy that reads logits gathers them from all processes.
        for name in sorted({str(one.rule.policy) for one in options if one.iterates}):
            asked = torch.tensor([one.iterates and one.rule.policy == name for one in options])
            index = asked[row].nonzero().squeeze(1)
            state = DepthState(
                depth=1,
                input_ids=ids[index],
                positions=positions[index],
                hidden={k: x[index] for k, x in features.items()},
                depth_labels=None,
                map_logits=partial(logits.map, index),
                map_pass_logits=partial(logits.map, index),
                embeds=partial(self.embed_input_ids, ids[index]),
            )
            policy: Any = self.decider if name == "decider" else build_policy(name, self.config)
            _, go[index] = BoundRule(policy, threshold, max_depth=2).decide(state, row[index])
        return get_tp_group().broadcast(go.byte()).bool()  # rounding may differ between processes; decisions must not

    def _run_again(self, batch: Batch, index: Tensor, positions: Tensor, embeds: Tensor, logits: StepLogits) -> Tensor:
        """Run the tokens `index` [M] at depth 2, and return the hidden states [T, D] of the step with theirs added."""
        owners = batch.rows(index).tolist()
        second = self._run_deep(DeepTokens(owners, positions[index], batch.slots[index], batch.block_table), embeds)
        hidden = logits.hidden.index_add(0, index, second)
        logits.update(index, hidden[index])
        return hidden

    def _run_deep(self, tokens: DeepTokens, x: Tensor) -> Tensor:
        """Run a pass at depth 2 only, and return its contribution to the final hidden states, [M, D]."""
        self._open(tokens)
        residual = None
        for layer in self.deep_layers:
            x, residual = layer(tokens.positions, x, residual)
        return self._finish(self.decoder.norm(x, residual)[0])

    def _open(self, tokens: DeepTokens, rows: Tensor | None = None, step: int = 0) -> None:
        """Begin a pass in which `tokens` run at depth 2; `rows` and `step` as in `DeepPass`."""
        assert self.pool is not None
        deep = plan(tokens, self.pool, self.block_size, own=self.config.attention == "own")
        self.current.deep = replace(deep, rows=rows, step=step)

    def _finish(self, second: Tensor) -> Tensor:
        """Return the contribution of normed hidden states of depth 2 to the output (method.md (8))."""
        return second if self.output_map is None else self.output_map(second)

    # -- depths mixed in one pass ----------------------------------------------------------------------------------

    def _due(self, batch: Batch) -> dict[str, int]:
        """Return, by request, the row of this step of the deferred last tokens, which are scheduled a second time."""
        waiting, starts = set(self.waiting.deferred()), batch.starts.tolist()
        return {request: starts[row] for row, request in enumerate(self.request_ids()) if request in waiting}

    def _may_wait(self, batch: Batch, index: Tensor) -> bool:
        """Return whether the hard tokens `index` may be deferred; if not, one pass runs all of them in this step.

        vLLM reads the log-probabilities of a prompt's tokens in the step of these tokens, so they cannot be deferred.
        """
        requests, with_prompt = self.request_ids(), self.prompt_logprobs()
        return self.mixed and not any(requests[row] in with_prompt for row in batch.rows(index).unique().tolist())

    def _set_aside(self, batch: Batch, index: Tensor, positions: Tensor, embeds: Tensor, logits: StepLogits) -> None:
        """Defer the tokens `index` [M], with next inputs `embeds` [M, D], to the next step."""
        requests, unsampled, size = self.request_ids(), self.unsampled(), self.block_size
        row = batch.rows(index)
        for number in row.unique().tolist():
            mine = index[row == number]
            last = int(batch.starts[number + 1]) - 1
            stop = int(positions[last]) + 1
            self.waiting.by_request[requests[number]] = Waiting(
                positions[mine],
                batch.slots[mine],
                embeds[row == number],
                batch.block_table[number, : -(-stop // size)].clone(),
                stop // size * size if self.shares_prefixes else 0,
                logits.hidden[last].clone() if int(mine[-1]) == last and not unsampled[number] else None,
            )

    def _run_mixed(
        self, batch: Batch, due: dict[str, int], ids: Tensor, positions: Tensor
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Run one pass: the step's tokens at depth 1, except those in `due`, and all deferred tokens at depth 2.

        Returns:
            Final hidden states [T, D], and the hidden states [T, D] by layer that the decider reads.
        """
        T, (tokens, embeds) = batch.tokens, self.waiting.all()
        rows = torch.tensor(self.waiting.rows(due, T))
        more = len(rows) - len(due)
        self._open(tokens, rows=rows, step=T)
        x = functional.pad(self.embed_input_ids(ids), (0, 0, 0, more)).index_copy_(0, rows, embeds)
        all_positions = functional.pad(positions, (0, more)).index_copy_(0, rows, tokens.positions)
        wanted, features, residual = self.decoder.aux_hidden_state_layers, {}, None
        again = torch.tensor(list(due.values()), dtype=torch.long)
        newest = [int(self.waiting.by_request[request].positions[-1]) for request in due]
        assert positions[again].tolist() == newest, "vLLM scheduled another token for a deferred one"
        with without_writing(self.deep_attention[0].stock, again):
            for number, layer in enumerate(self.deep_layers):
                if number in wanted:
                    features[number] = (x if residual is None else x + residual)[:T]
                x, residual = layer(all_positions, x, residual)
        hidden = self.decoder.norm(x, residual)[0][:T]
        if due:
            known = self.waiting.hidden()
            first = torch.stack([known[request] for request in due])
            hidden = hidden.index_copy(0, again, first + self._finish(hidden[again]))
        self.waiting.ran(emitted=due)
        return hidden, features

    def _next_input(self, ids: Tensor, index: Tensor, logits: StepLogits) -> Tensor:
        """Return the next inputs [M, D] of the tokens `index` for depth 2 (method.md (4), (5))."""
        if self.next_input_map is not None:
            return self.embed_input_ids(ids[index]) + self.next_input_map(logits.hidden[index])

        def mix(logits: Tensor) -> Tensor:  # [n, V] -> [n, D]
            weights, tokens = best_of(logits, self.config.mix_topk, topk)
            return weighted(weights, self.embed_input_ids(tokens))

        return logits.map(index, mix)

    # -- preparation and report ------------------------------------------------------------------------------------

    def prepare(self, share: float, longest: int) -> None:
        """Allocate the pool; called after vLLM has allocated its KV cache.

        Args:
            share: Number of pool entries per depth-1 slot.
            longest: Maximum tokens of a request.

        Raises:
            ValueError: The layout of vLLM's KV cache is not supported.
        """
        stock = [m for layer in self.decoder.layers for m in layer.modules() if isinstance(m, Attention)]
        check_layout(stock[0])
        self.deep_layers = [
            twin(layer, self.adapted[k], k, self.current) for k, layer in enumerate(self.decoder.layers)
        ]
        found = (m for layer in self.deep_layers for m in layer.modules())
        self.deep_attention = [m for m in found if isinstance(m, DuoAttention)]
        cache = stock[0].kv_cache
        slots = cache.shape[0] * slots_per_block(stock[0])
        entries, heads = capacity(slots, share, longest), stock[0].num_kv_heads
        self.pool = DeepPool(len(stock), entries, heads, stock[0].head_size, slots, cache.dtype, cache.device)

    def _depths(self, batch: Batch, positions: Tensor) -> dict[str, tuple[int, list[int]]]:
        """Return, by request, the first position in this step and the depths of its tokens from there.

        For a new request with a cached prefix, the first position is 0 and the depths include the prefix.
        """
        assert self.pool is not None
        size, found = self.block_size, {}
        starts, depths = batch.starts.tolist(), (1 + (self.pool.entry_of_slot[batch.slots] >= 0).long()).tolist()
        for number, request in enumerate(self.request_ids()):
            start, end = starts[number : number + 2]
            first, took = int(positions[start]), depths[start:end]
            if request in self.fresh and first:
                slots = self._slots(batch.block_table[number, : -(-first // size)].tolist())[:first]
                first, took = 0, (1 + (self.pool.entry_of_slot[slots] >= 0).long()).tolist() + took
            found[request] = (first, took)
        self.fresh.clear()
        return found

    def _slots(self, blocks: list[int]) -> Tensor:
        """Return the physical slots of physical blocks."""
        offsets = torch.arange(self.block_size)
        return (torch.tensor(blocks, dtype=torch.long)[:, None] * self.block_size + offsets).flatten()
