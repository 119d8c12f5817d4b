"""`TaHForCausalLM` in vLLM: the stock model of the base's family, and a second pass over the tokens that are hard.

Shapes: T tokens of a step, M of them that iterate, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import VllmConfig
from vllm.distributed import get_tp_group
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import init_vllm_registered_model

from ..config import TaHConfig
from ..decider import build_decider
from ..mixing import weighted
from ..outputs import best_of
from ..policy import DepthState, Rule, build_policy
from .attention import Current, DuoAttention, plan
from .compat import Batch, check_layout, current_batch, slots_per_block, without_writing
from .deep_layers import Adapter, adapters_of, twin
from .logits import StepLogits
from .pool import DeepPool, capacity
from .requests import Choice

FAMILIES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


@dataclass
class StepReport:
    """What the scheduler is told about one step."""

    free: int  # deep entries
    taken: list[int]  # slots that have an entry since this step
    released: list[int]  # slots whose entry is gone since this step
    depths: dict[str, tuple[int, list[int]]]  # by request: its first position in this step, the depths from there
    deferred: list[str]  # requests whose newest token runs again in the next step


@dataclass
class Deferred:
    """A token between its two passes (`mixed`)."""

    position: int
    hidden: Tensor  # [D] what depth 1 ended in
    embeds: Tensor  # [D] its input at depth 2


class TaHForCausalLM(nn.Module):
    """A vLLM model: depth 1 is the stock model, untouched; then the hard tokens run its layers again.

    Nothing of depth 2 reaches depth 1, so a step needs no more than one pass of each: all of its tokens at depth 1, the
    hard ones at depth 2. The sum of both hidden states goes to the sampler, whose head is linear (spec A.1 step 5).
    With `batching="mixed"` a hard token of a decoding request waits for the next step instead, and runs at depth 2 in
    the same pass as the others' depth 1; its request says nothing in the first of the two steps.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: TaHConfig = vllm_config.model_config.hf_config
        base: Any = config.base_config
        self.config = config
        self.base: Any = init_vllm_registered_model(
            vllm_config, prefix="base", hf_config=base, architectures=[FAMILIES[base.model_type]]
        )
        self.decider = build_decider(config.decider, base.hidden_size, base.vocab_size) if config.decider else None
        wanted = self.decider.layers if self.decider is not None else ()
        self.decoder.aux_hidden_state_layers = tuple(sorted({k for k in wanted if k < base.num_hidden_layers}))
        width = base.hidden_size
        self.reembed_map = nn.Linear(width, width, bias=False) if config.reembed == "hidden" else None
        self.combine_map = nn.Linear(width, width, bias=False) if config.combine == "zero_init" else None
        self.adapters = nn.ModuleList()
        self.adapted: list[dict[str, Adapter]] = [{} for _ in self.decoder.layers]  # by layer and name in it
        self.parts: dict[str, tuple[Adapter, str]] = {}  # by name in the checkpoint: the adapter that has it as a part
        if config.lora_rank:
            self._add_adapters(config)
        self.choices: dict[str, Choice] = {}  # by request; kept by the worker
        self.fresh: set[str] = set()  # requests of which no token has run yet; added to by the worker
        self.request_ids: Callable[[], list[str]]  # of the running step; given by the worker
        self.prompt_lengths: Callable[[], Tensor]  # of the same, [requests or more]
        self.report: StepReport | None = None  # of the latest step; for the scheduler
        self.pool: DeepPool | None = None
        self.mixed = vllm_config.additional_config["batching"] == "mixed"
        self.deferred: dict[str, Deferred] = {}  # by request
        self.sampler_logits: Tensor | None = None  # [requests, V], where the running step has made them already
        self.current = Current()
        self.deep_layers: list[nn.Module] = []
        self.deep_attention: list[DuoAttention] = []

    def _add_adapters(self, config: TaHConfig) -> None:
        fused, scale = self.base.packed_modules_mapping, config.lora_alpha / config.lora_rank
        for number, layer in enumerate(self.decoder.layers):
            for name, adapter in adapters_of(layer, fused, config.lora_rank, scale, config.lora_targets):
                self.adapters.append(adapter)
                self.adapted[number][name] = adapter
                parent = f"base.model.layers.{number}.{name.rpartition('.')[0]}"
                self.parts |= {f"{parent}.{part}": (adapter, part) for part in adapter.places}

    @property
    def decoder(self) -> Any:
        """The stock model without its head."""
        return self.base.model

    # -- weights ---------------------------------------------------------------------------------------------------

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load one of our checkpoints as it is; tensors of the base go to the stock model.

        Raises:
            ValueError: a tensor of ours is missing, unexpected or of another shape.
        """
        own = dict(self.named_parameters())
        targets = self.config.lora_targets
        adapted = [name for name in self.parts if targets is None or name.rpartition(".")[2] in targets]
        missing = {f"{name}.lora_{matrix}.weight" for name in adapted for matrix in "AB"}
        missing |= {name for name in own if not name.startswith(("base.", "adapters."))}

        def of_the_base() -> Iterable[tuple[str, Tensor]]:
            for name, weight in weights:
                if name.startswith("base.") and ".lora_" not in name:
                    yield name.removeprefix("base."), weight
                    continue
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
        return self.base.embed_input_ids(input_ids)

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """The sampler asks first after a pass, for the last token of each request; others may ask after it."""
        made, self.sampler_logits = self.sampler_logits, None
        if made is None:
            return self.base.compute_logits(hidden_states)
        if len(made) != len(hidden_states):
            raise RuntimeError(f"logits of {len(made)} tokens are ready, but {len(hidden_states)} are asked for")
        return made

    def forward(
        self, input_ids: Tensor, positions: Tensor, intermediate_tensors: None = None, inputs_embeds: None = None
    ) -> Tensor:
        """Summed final hidden states [T, D] of the step's tokens."""
        batch = None if self.pool is None else current_batch(self.deep_attention[0].stock)
        if batch is None:
            out = self.decoder(input_ids, positions, intermediate_tensors, inputs_embeds)
            return out[0] if isinstance(out, tuple) else out
        T, pool = batch.tokens, self.pool
        assert pool is not None
        input_ids, positions = input_ids[:T], positions[:T]
        again = self._due(batch)
        fresh = torch.ones(T, dtype=torch.bool).index_fill_(0, again, False)
        released = pool.release(batch.slots[fresh])
        if len(again):
            hidden, features = self._run_mixed(batch, again, input_ids, positions)
        else:
            out = self.decoder(input_ids, positions, intermediate_tensors, inputs_embeds)
            hidden, aux = out if isinstance(out, tuple) else (out, [])
            features = dict(zip(self.decoder.aux_hidden_state_layers, (x[:T] for x in aux), strict=True))
        features[len(self.deep_layers)] = hidden[:T]
        logits = StepLogits(self.base.compute_logits, hidden[:T], last=batch.starts[1:] - 1)
        go = self._judge(batch, input_ids, positions, logits, features) & fresh
        index = self._defer(batch, go, input_ids, positions, logits) if self.mixed else go.nonzero().squeeze(1)
        if len(index):
            hidden = self._run_again(batch, index, input_ids, positions, logits)
        self.sampler_logits = logits.kept
        taken = torch.cat([batch.slots[again], batch.slots[index]]).tolist()
        depths = self._depths(batch, positions)
        self.report = StepReport(pool.free, taken, released.tolist(), depths, list(self.deferred))
        return hidden

    def _judge(
        self, batch: Batch, ids: Tensor, positions: Tensor, logits: StepLogits, features: dict[int, Tensor]
    ) -> Tensor:
        """Which tokens iterate, [T] bool; each request by its own policy and threshold (spec A.2)."""
        choices = [self.choices[request] for request in self.request_ids()]
        row = batch.rows(torch.arange(len(ids)))
        threshold = torch.tensor([choice.threshold for choice in choices])
        go = torch.zeros(len(ids), dtype=torch.bool)
        # In one order in all processes: a policy that looks at logits has them gathered from all.
        for name in sorted({choice.policy for choice in choices if choice.iterates}):
            asked = torch.tensor([choice.iterates and choice.policy == name for choice in choices])
            index = asked[row].nonzero().squeeze(1)
            state = DepthState(
                depth=1,
                input_ids=ids[index],
                positions=positions[index],
                hidden={k: x[index] for k, x in features.items()},
                depth_labels=None,
                map_logits=partial(logits.map, index),
            )
            policy: Any = self.decider if name == "decider" else build_policy(name, self.config)
            _, go[index] = Rule(policy, threshold, max_depth=2, row_depth=None).judge(state, row[index])
        return get_tp_group().broadcast(go.byte()).bool()  # processes must not differ by a rounding

    def _run_again(self, batch: Batch, index: Tensor, ids: Tensor, positions: Tensor, logits: StepLogits) -> Tensor:
        """The pass at depth 2 of the tokens `index` [M]; hidden states [T, D] with theirs added."""
        self._open(batch, index, positions)
        x, residual, places = self._reembed(ids, index, logits), None, positions[index]
        for layer in self.deep_layers:
            x, residual = layer(places, x, residual)
        hidden = logits.hidden.index_add(0, index, self._finish(x, residual))
        logits.update(index, hidden[index])
        return hidden

    def _open(self, batch: Batch, index: Tensor, positions: Tensor, rows: Tensor | None = None) -> None:
        """Begin a pass in which the tokens `index` [M] run at depth 2."""
        assert self.pool is not None
        entries = self.pool.take(batch.slots[index])
        block_size = slots_per_block(self.deep_attention[0].stock)
        own = self.config.attention == "own"
        deep = plan(batch, self.pool, index, positions[index], entries, block_size, own)
        self.current.deep = replace(deep, rows=rows)

    def _finish(self, x: Tensor, residual: Tensor | None) -> Tensor:
        """What a pass at depth 2 adds to the final hidden states."""
        second, _ = self.decoder.norm(x, residual)
        return second if self.combine_map is None else self.combine_map(second)

    # -- depths mixed in one pass ----------------------------------------------------------------------------------

    def _due(self, batch: Batch) -> Tensor:
        """[M] tokens of this step that were deferred in an earlier one."""
        rows = [row for row, request in enumerate(self.request_ids()) if request in self.deferred]
        return batch.starts[torch.tensor(rows, dtype=torch.long)]

    def _defer(self, batch: Batch, go: Tensor, ids: Tensor, positions: Tensor, logits: StepLogits) -> Tensor:
        """Set aside the hard tokens of decoding requests; the others [M] run again in this step.

        The last token of a block does not wait: once a block is full, others may find it in the prefix cache. Nor does
        the prompt's last token, alone in its step: vLLM tells the prompt's log-probabilities in that step, or never.
        """
        counts = batch.starts[1:] - batch.starts[:-1]
        requests = self.request_ids()
        row = batch.rows(torch.arange(len(go)))
        block_size = slots_per_block(self.deep_attention[0].stock)
        decodes = (counts[row] == 1) & (positions >= self.prompt_lengths()[row])
        waits = go & decodes & ((positions + 1) % block_size != 0)
        later = waits.nonzero().squeeze(1)
        if len(later):
            embeds = self._reembed(ids, later, logits)
            for at, (token, number) in enumerate(zip(later.tolist(), row[later].tolist(), strict=True)):
                first = logits.hidden[token].clone()
                self.deferred[requests[number]] = Deferred(int(positions[token]), first, embeds[at])
        return (go & ~waits).nonzero().squeeze(1)

    def _run_mixed(
        self, batch: Batch, again: Tensor, ids: Tensor, positions: Tensor
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """One pass in which the tokens `again` [M] run at depth 2 and all others at depth 1."""
        requests = self.request_ids()
        waited = [self.deferred.pop(requests[row]) for row in batch.rows(again).tolist()]
        assert [one.position for one in waited] == positions[again].tolist()
        self._open(batch, again, positions, rows=again)
        x, residual = self.embed_input_ids(ids).index_copy(0, again, torch.stack([one.embeds for one in waited])), None
        wanted, features = self.decoder.aux_hidden_state_layers, {}
        with without_writing(self.deep_attention[0].stock, again):
            for number, layer in enumerate(self.deep_layers):
                if number in wanted:
                    features[number] = x if residual is None else x + residual
                x, residual = layer(positions, x, residual)
        hidden, _ = self.decoder.norm(x, residual)
        second = hidden[again] if self.combine_map is None else self.combine_map(hidden[again])
        return hidden.index_copy(0, again, torch.stack([one.hidden for one in waited]) + second), features

    def _reembed(self, ids: Tensor, index: Tensor, logits: StepLogits) -> Tensor:
        """Inputs [M, D] at depth 2 of the tokens `index`, from what depth 1 ended in (spec A.3)."""
        if self.reembed_map is not None:
            return self.embed_input_ids(ids[index]) + self.reembed_map(logits.hidden[index])

        def mix(logits: Tensor) -> Tensor:  # [n, V] -> [n, D]
            weights, tokens = best_of(logits, self.config.mix_topk)
            return weighted(weights, self.embed_input_ids(tokens))

        return logits.map(index, mix)

    # -- around it -------------------------------------------------------------------------------------------------

    def prepare(self, share: float, longest: int) -> None:
        """Allocate the pool beside vLLM's cache, once that exists.

        Args:
            share: deep entries per depth-1 slot.
            longest: tokens of one request.
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

    def give_up(self, blocks: list[int]) -> None:
        """Free the deep entries of physical blocks that hold nothing anybody will read."""
        if blocks and self.pool is not None:
            size = slots_per_block(self.deep_attention[0].stock)
            self.pool.release((torch.tensor(blocks)[:, None] * size + torch.arange(size)).flatten())

    def _depths(self, batch: Batch, positions: Tensor) -> dict[str, tuple[int, list[int]]]:
        """Depths of the tokens of this step, by request, and of those that a cached prefix spared it."""
        assert self.pool is not None
        size, found = slots_per_block(self.deep_attention[0].stock), {}
        starts, depths = batch.starts.tolist(), (1 + (self.pool.entry_of_slot[batch.slots] >= 0).long()).tolist()
        for number, request in enumerate(self.request_ids()):
            start, end = starts[number : number + 2]
            first, took = int(positions[start]), depths[start:end]
            if request in self.fresh and first:
                blocks = batch.block_table[number, : -(-first // size)].long()
                slots = (blocks[:, None] * size + torch.arange(size)).flatten()[:first]
                first, took = 0, (1 + (self.pool.entry_of_slot[slots] >= 0).long()).tolist() + took
            found[request] = (first, took)
        self.fresh.clear()
        return found
