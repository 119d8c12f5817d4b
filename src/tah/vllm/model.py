"""`TaHForCausalLM` in vLLM: the stock model of the base's family, and a second pass over hard tokens.

Shapes: T tokens of a step, M of them that iterate, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
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
from ..core.next_input import ROWS as MIXED
from ..core.next_input import NextInputMLP, weighted
from ..decider import build_decider
from ..names import MIXTURES
from ..policy import DepthState, build_policy, continues, draw
from .attention import Current, DeepPass, DeepTokens, DuoAttention, Pages, plan
from .compat import check_layout, slots_per_block, without_writing
from .deep_layers import Adapter, adapters_of, run_layers, twin
from .graphs import PassGraphs
from .logits import StepLogits
from .mixture import StepMixture, log_probabilities
from .names import FAMILIES, ROWS, inner_layers
from .pool import DeepPool, capacity
from .report import StepReport
from .step import Step
from .transfer import indices, to_device, to_host
from .waiting import Waiting, WaitingTokens

GOES_ON, NOT_FINITE = 1, 2  # what the device tells the host of each token's decision


class TaHForCausalLM(nn.Module):
    """A vLLM model: all tokens run the stock model at depth 1, then the hard tokens run its layers at depth 2.

    Depth 1 does not depend on depth 2. So a step has one pass of all its tokens at depth 1 and one pass of its hard
    tokens at depth 2. The sampler gets the sum of both hidden states; the head is linear, so this sums the logits
    (method.md (2)). In a mixture (15) it gets log-probabilities instead of logits.

    With `batching="mixed"`, hard tokens are deferred to the next step, where they run at depth 2 in the same pass as
    that step's tokens at depth 1. A request whose last token is deferred emits its next token one step later.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: TaHConfig = vllm_config.model_config.hf_config
        base: Any = config.base_config
        self.config = config
        self.family = FAMILIES[base.model_type]
        self.base: Any = init_vllm_registered_model(
            vllm_config, prefix="base", hf_config=base, architectures=[self.family.architecture]
        )
        self.input_scale = float(getattr(base, self.family.input_scale)) if self.family.input_scale else 1.0
        self.decider = build_decider(config.decider, base) if config.decider else None
        self.decoder.aux_hidden_state_layers = inner_layers(config)
        # vLLM would return its input of the first layer itself, into which norms of GPUs write in place.
        self.reads_embeds = self.decider is not None and 0 in self.decider.layers
        width = base.hidden_size
        self.next_input_map = nn.Linear(width, width, bias=False) if config.next_input == "hidden" else None
        self.next_input_mlp: NextInputMLP | None = None
        if config.next_input == "mlp":
            self.next_input_mlp = NextInputMLP(width, config.next_input_width or width, config.next_input_norms)
        self.mixes = config.output in MIXTURES
        self.output_map = nn.Linear(width, width, bias=False) if config.output == "zero_init" else None
        self.adapters = nn.ModuleList()
        self.adapted: list[dict[str, Adapter]] = [{} for _ in self.decoder.layers]  # by layer, and by name in the layer
        self.parts: dict[str, tuple[Adapter, str]] = {}  # by name in the checkpoint: adapter, and name of the part
        if config.lora_rank:
            self._add_adapters(config)
        self.report: StepReport | None = None  # report of the latest step to the scheduler
        self.pool: DeepPool
        self.pages: Pages
        self.by_kernel = False  # whether the kernel attends at depth 2
        self.graphs: PassGraphs | None = None  # of passes at depth 2, on GPUs
        self.mixed = vllm_config.additional_config["batching"] == "mixed"
        self.waiting = WaitingTokens()
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

    def first_input(self, embeds: Tensor) -> Tensor:
        """Return the input [.., D] of the first layer for embeddings, or next inputs, [.., D]."""
        return embeds if self.input_scale == 1 else embeds * self.input_scale

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Return logits [n, V] of hidden states [n, D], or of rows of a mixture their log-probabilities, float32.

        In each step vLLM calls this first for the sampler, with the last token of each request. `StepLogits` may have
        computed these logits already. Later calls, such as those for log-probabilities of a prompt, run the head.
        """
        made, self.sampler_logits = self.sampler_logits, None
        if made is None:
            if self.mixes:
                return log_probabilities(self.base.compute_logits, hidden_states, self.config.hidden_size)
            return self.base.compute_logits(hidden_states)
        if len(made) != len(hidden_states):
            raise RuntimeError(f"logits of {len(made)} tokens are computed, but vLLM requests {len(hidden_states)}")
        return made

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        intermediate_tensors: None = None,
        inputs_embeds: None = None,
        step: Step | None = None,
    ) -> Any:
        """Run depth 1, the stock model: it may run in CUDA graphs, and on padded tokens.

        Args:
            input_ids: Token ids, [T] or padded.
            positions: Positions, [T] or padded.
            intermediate_tensors: Argument of vLLM's pipeline parallelism, which is not supported.
            inputs_embeds: Argument of vLLM's prompt embeddings, which are not supported.
            step: Step to run at both depths, if its deferred tokens run beside depth 1 (runner V2).

        Returns:
            Final hidden states, as many as tokens; with a decider that reads inner layers, also a list of theirs (with
            `step`, an empty one).
        """
        inputs = input_ids, positions, intermediate_tensors, inputs_embeds
        if step is None:
            return self.decoder(*inputs)
        hidden = self.run_step(step, partial(self.decoder, *inputs))
        return (hidden, []) if self.decoder.aux_hidden_state_layers else hidden

    def run_step(self, step: Step, depth_one: Callable[[], Any]) -> Tensor:
        """Run a step: return the final hidden states of its tokens, summed over their passes, [T, D].

        Of a mixture, these are the hidden states of depth 1. If vLLM requests logits of prompts, they have more columns
        (`StepMixture.output`).

        The host waits for the device once, to learn which tokens iterate, and not at all if no request iterates.

        Args:
            step: Tokens of the step.
            depth_one: Function that returns what `forward` returns for the tokens of the step. A step with deferred
                tokens does not call it.
        """
        T, pool = step.tokens, self.pool
        if self.waiting.left:  # run all deferred tokens: requests with a shared prefix may attend to each other's keys
            self._run_deep(*self.waiting.all())
            self.waiting.ran()
        pool.release(self.pages.slots(step.given_up))
        due = self._due(step)
        fresh = np.ones(T, bool)
        fresh[list(due.values())] = False
        released = pool.release(step.slots[fresh])
        ended = None  # second pass of deferred tokens of `due`
        if self.waiting.by_request:
            hidden, features, ended = self._run_mixed(step, due)
        else:
            out = depth_one()
            hidden, aux = out if isinstance(out, tuple) else (out, ())
            features = dict(zip(self.decoder.aux_hidden_state_layers, (x[:T] for x in aux), strict=True))
        features[len(self.deep_layers)] = hidden[:T]
        if self.reads_embeds:
            features[0] = self.first_input(self.embed_input_ids(step.ids))
        logits = self._logits(hidden[:T], step.last)
        if ended is not None:
            logits.add(*ended)
        goes_on, probability = self._decide(step, logits, features)
        index = (goes_on & fresh).nonzero()[0]
        pool.take(step.slots[index])
        if len(index):
            embeds = self._next_input(step, index, logits)
            if self._may_wait(step, index):
                self._set_aside(step, index, embeds, logits, probability)
            else:
                self._run_again(step, index, embeds, logits, probability)
        self.sampler_logits = logits.of_last()
        rest = self._depths(step), len(due), self.waiting.deferred()
        self.report = StepReport(pool.free, step.slots[index].tolist(), released.tolist(), *rest)
        return logits.output(for_prompts=bool(step.with_prompt.any()))

    def _logits(self, hidden: Tensor, last: np.ndarray) -> StepLogits:
        head = self.base.compute_logits
        if self.mixes:
            return StepMixture(head, hidden, last, even=self.config.output == "even")
        return StepLogits(head, hidden, last)

    def _decide(self, step: Step, logits: StepLogits, features: dict[int, Tensor]) -> tuple[np.ndarray, Tensor]:
        """Decide which tokens iterate, by the policy and threshold of their request (method.md (3)).

        Returns:
            Which tokens iterate, [T] bool, and the continue probabilities [T] float32 of those that do.

        Raises:
            ValueError: A policy returned NaN.
        """
        T, device = step.tokens, step.positions.device
        # The order is the same in all processes, since a policy that reads logits gathers them from all processes.
        names = sorted({str(one.rule.policy) for one in step.options if one.iterates})
        probability = torch.zeros(T, device=device, dtype=torch.float32)
        if not names:
            return np.zeros(T, bool), probability
        found = torch.zeros(T, dtype=torch.uint8, device=device)
        threshold = np.array([one.rule.threshold for one in step.options], np.float32)
        for name in names:
            asked = np.array([one.iterates and one.rule.policy == name for one in step.options])
            index = asked[step.owners].nonzero()[0]
            at = slice(None) if len(index) == T else indices(device, index)[0]
            state = DepthState(
                depth=1,
                input_ids=step.ids[at],
                positions=step.positions[at],
                hidden={k: x[at] for k, x in features.items()},
                depth_labels=None,
                map_logits=partial(logits.map, index),
                map_pass_logits=partial(logits.map_pass, index),
                embeds=partial(self.embed_input_ids, step.ids[at]),
            )
            policy: Any = self.decider if name == "decider" else build_policy(name, self.config)
            go = policy(state)
            if name == "decider" and self.config.decision == "sample":
                bound = draw(state, self.config.random_seed)
            else:
                bound = to_device(threshold[step.owners[index]], device)
            goes_on = continues(go, bound)
            found[at] = goes_on.byte() + NOT_FINITE * go.isnan().byte()
            probability[at] = go.float().sigmoid()
        # Rounding may differ between processes; decisions and the weights of a mixture must not.
        told = to_host(get_tp_group().broadcast(found))
        if (told == NOT_FINITE).any():
            raise ValueError("a policy returned NaN after depth 1: hidden states or logits are not finite")
        goes = told == GOES_ON
        if self.mixes and goes.any():
            probability = get_tp_group().broadcast(probability)
        return goes, probability

    def _run_again(
        self, step: Step, index: np.ndarray, embeds: Tensor, logits: StepLogits, probability: Tensor
    ) -> None:
        """Run the tokens `index` [M] at depth 2, and add the pass to `logits`. `probability` is [T]."""
        tokens = DeepTokens(step.owners[index], step.places[index], step.slots[index], step.tables)
        second = self._run_deep(tokens, embeds)
        (at,) = indices(second.device, index)
        logits.add(index, second, probability[at])

    def _run_deep(self, tokens: DeepTokens, x: Tensor) -> Tensor:
        """Run the layers at depth 2 only, and return their contribution to the final hidden states, [M, D].

        More than `ROWS` tokens run in several passes, by rising positions: a token attends to no later position, and
        requests that share a prefix may attend to each other's keys.

        Args:
            tokens: Tokens, M.
            x: Their inputs [M, D].
        """
        if len(tokens.places) <= ROWS:
            return self._run_rows(tokens, x)
        order, out = tokens.places.argsort(kind="stable"), torch.empty_like(x)
        for start in range(0, len(order), ROWS):
            part = order[start : start + ROWS]
            (at,) = indices(x.device, part)
            out[at] = self._run_rows(tokens.part(part), x[at])
        return out

    def _run_rows(self, tokens: DeepTokens, x: Tensor, splits: int | None = None) -> Tensor:
        """Run one pass of `_run_deep`, in which the kernel has `splits` programs per token and head."""
        deep = replace(self._plan(tokens), splits=splits)
        graph = self.graphs.fitting(len(x)) if self.graphs is not None else None
        return self.run_pass(deep, x) if graph is None else graph.run(deep, x)

    def run_pass(self, deep: DeepPass, x: Tensor) -> Tensor:
        """Run a planned pass at depth 2 of inputs `x` [M, D], into which layers may write; return its output [M, D]."""
        self.current.deep = deep
        return self._finish(self._run_layers(deep.positions, x)[0])

    def _run_layers(
        self, positions: Tensor, x: Tensor, wanted: tuple[int, ...] = ()
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Return what `run_layers` does, of the layers at depth 2 for embeddings, or next inputs, [.., D]."""
        return run_layers(self.deep_layers, self.decoder.norm, self.family, positions, self.first_input(x), wanted)

    def _plan(self, tokens: DeepTokens) -> DeepPass:
        return plan(tokens, self.pool, self.pages, own=self.config.attention == "own", kernel=self.by_kernel)

    def _finish(self, second: Tensor) -> Tensor:
        """Return the contribution of normed hidden states of depth 2 to the output (method.md (8))."""
        return second if self.output_map is None else self.output_map(second)

    # -- depths mixed in one pass ----------------------------------------------------------------------------------

    def _due(self, step: Step) -> dict[str, int]:
        """Return, by request, the row of this step of the deferred last tokens, which are scheduled a second time."""
        waiting, starts = set(self.waiting.deferred()), step.starts.tolist()
        return {request: starts[row] for row, request in enumerate(step.request_ids) if request in waiting}

    def _may_wait(self, step: Step, index: np.ndarray) -> bool:
        """Return whether the hard tokens `index` may be deferred; if not, they run at depth 2 in this step.

        vLLM reads the log-probabilities of a prompt's tokens in the step of these tokens, so they cannot be deferred.
        Nor are more than `ROWS` tokens, which bounds the memory of a pass of mixed depths.
        """
        return self.mixed and len(index) <= ROWS and not step.with_prompt[step.owners[index]].any()

    def _set_aside(
        self, step: Step, index: np.ndarray, embeds: Tensor, logits: StepLogits, probability: Tensor
    ) -> None:
        """Defer the tokens `index` [M], with next inputs `embeds` [M, D], to the next step. `probability` is [T]."""
        size, owners = self.pages.block, step.owners[index]
        for number in np.unique(owners).tolist():
            first, after = np.searchsorted(owners, [number, number + 1]).tolist()
            mine, last = index[first:after], int(step.last[number])
            stop = int(step.places[last]) + 1
            predicts = mine[-1] == last and bool(step.emits[number])
            self.waiting.by_request[step.request_ids[number]] = Waiting(
                step.places[mine],
                step.slots[mine],
                embeds[first:after],
                step.tables[number, : -(-stop // size)],
                stop // size * size if self.shares_prefixes else 0,
                logits.hidden[last].clone() if predicts else None,
                probability[last].clone() if predicts else None,
            )

    def _run_mixed(
        self, step: Step, due: dict[str, int]
    ) -> tuple[Tensor, dict[int, Tensor], tuple[np.ndarray, Tensor, Tensor] | None]:
        """Run one pass: the step's tokens at depth 1, except those in `due`, and all deferred tokens at depth 2.

        Returns:
            Final hidden states [T, D] of depth 1; the hidden states [T, D] by layer that the decider reads; the
            arguments of `StepLogits.add` for the tokens in `due`, if there are any.
        """
        T, (tokens, embeds) = step.tokens, self.waiting.all()
        found, device = self.waiting.rows(due, T), step.positions.device
        more = len(found) - len(due)
        again = list(due.values())
        newest = [int(self.waiting.by_request[request].places[-1]) for request in due]
        assert step.places[again].tolist() == newest, "vLLM scheduled another token for a deferred one"
        rows, held = indices(device, found, np.array(again, np.int64))
        deep = self.current.deep = replace(self._plan(tokens), rows=rows, step=T)
        x = functional.pad(self.embed_input_ids(step.ids), (0, 0, 0, more)).index_copy_(0, rows, embeds)
        positions = functional.pad(step.positions, (0, more)).index_copy_(0, rows, deep.positions)
        with without_writing(self.deep_attention[0].stock, held):
            hidden, seen = self._run_layers(positions, x, self.decoder.aux_hidden_state_layers)
        features, ended = {number: states[:T] for number, states in seen.items()}, None
        if due:
            known, probability = self.waiting.hidden(), self.waiting.probability(due)
            first = torch.stack([known[request] for request in due])
            ended = np.array(again), self._finish(hidden[held]), probability
            hidden = hidden[:T].index_copy(0, held, first)
        self.waiting.ran(emitted=due)
        return hidden[:T], features, ended

    def _next_input(self, step: Step, index: np.ndarray, logits: StepLogits) -> Tensor:
        """Return the next inputs [M, D] of the tokens `index` for depth 2 (method.md (4), (5), (13))."""
        if self.config.next_input != "topk":
            (at,) = indices(logits.hidden.device, index)
            own, hidden = self.embed_input_ids(step.ids[at]), logits.hidden[at]
            if self.next_input_mlp is not None:
                return self.next_input_mlp(own, hidden)
            assert self.next_input_map is not None
            return own + self.next_input_map(hidden)

        def mix(logits: Tensor) -> Tensor:  # [n, V] -> [n, D]
            weights, tokens = best_of(logits, self.config.mix_topk, topk)
            parts = zip(weights.split(MIXED), tokens.split(MIXED), strict=True)  # bounds embeddings [MIXED, k, D]
            return torch.cat([weighted(w, self.embed_input_ids(ids)) for w, ids in parts])

        return logits.map(index, mix)

    # -- preparation and report ------------------------------------------------------------------------------------

    def prepare(self, share: float, longest: int, block_size: int) -> None:
        """Allocate the pool; called after vLLM has allocated its KV cache.

        Args:
            share: Number of pool entries per depth-1 slot.
            longest: Maximum tokens of a request.
            block_size: Slots per block of vLLM's scheduler.

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
        cache, self.pages = stock[0].kv_cache, Pages(block_size, slots_per_block(stock[0]))
        slots = cache.shape[0] * self.pages.page
        entries, heads = capacity(slots, share, longest), stock[0].num_kv_heads
        self.pool = DeepPool(len(stock), entries, heads, stock[0].head_size, slots, cache.dtype, cache.device)
        self.by_kernel = not cache.is_cpu

    def _depths(self, step: Step) -> dict[str, tuple[int, list[int]]]:
        """Return, by request, the first position in this step and the depths of its tokens from there.

        For a new request with a cached prefix, the first position is 0 and the depths include the prefix.
        """
        found, starts = {}, step.starts.tolist()
        depths = self._depths_at(step.slots)
        for number, (request, first) in enumerate(zip(step.request_ids, step.first.tolist(), strict=True)):
            took = depths[starts[number] : starts[number + 1]]
            if step.fresh[number] and first:
                prefix = self.pages.slots(step.tables[number, : -(-first // self.pages.block)])[:first]
                first, took = 0, self._depths_at(prefix) + took
            found[request] = (first, took)
        return found

    def _depths_at(self, slots: np.ndarray) -> list[int]:
        """Return the depths of the tokens whose depth-1 keys are in `slots`."""
        depths: list[int] = (1 + (self.pool.entries[slots] >= 0)).tolist()
        return depths
