"""The check at the start of a server: what vLLM and this device compute is what the method defines.

It runs once per device, versions and configuration, before the server accepts requests. It compares

* the layout of vLLM's KV cache with what `compat.read_blocks` expects;
* 64 given tokens through the runner, in several steps of two requests, with a plain evaluation of the same weights
  (`plain.py`): decisions, best tokens and log-probabilities;
* where a kernel attends at depth 2, its output over the blocks of these tokens with plain attention, and over long
  tables of random keys with several numbers of programs.

What it saw is a file in the user's cache. If all is equal, the file spares the next start the check. Else the server
does not start.

Shapes: N tokens of a request, M of them that iterate, V vocabulary, H key/value heads, K head width.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import replace
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from vllm import __version__ as VLLM_VERSION
from vllm.distributed import get_tp_group
from vllm.logger import init_logger

from ..checkpoints.user_cache import cache_dir
from ..files import write_atomically
from .attention import DeepTokens
from .compat import check_layout, read_blocks
from .mixture import log_probabilities
from .own_steps import Given, OwnSteps
from .plain import Plain, attend, duo_visible
from .requests import RequestOptions
from .transfer import indices

if TYPE_CHECKING:
    from ..config import TaHConfig
    from .worker import DepthWorker

TOKENS = 64
RUNS = 4  # plain runs with other rounding, by which the check knows what rounding does to this model
FACTOR = 8  # allowed difference, as a multiple of theirs; without a fault, 2.4 was the most in tiny models
CLOSE = {torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.05}  # at least allowed, of probabilities
ROUNDING = {torch.float32: 1e-3, torch.float16: 0.01, torch.bfloat16: 0.05}  # at least allowed, of log-probabilities
KERNEL_ROUNDING = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # relative to the largest value
TILES, MOST_PER_TILE = 4, 64  # the kernel is checked over more slots than these
LONG_SPLITS = (1, 2, 8)  # powers of two: no other number is compiled, or chosen
ENVIRONMENT = ("TRITON_F32_DEFAULT", "VLLM_MOE_SKIP_PADDING")  # variables that change kernels
LIKELY = 20  # tokens of which log-probabilities are compared
SHOWN = 3  # differences that the error names
OFF = """--additional-config '{"self_check": false}'"""

logger = init_logger("vllm.tah")  # below vLLM's own logger, which has the handler


class SelfCheckError(RuntimeError):
    """The check at the start saw a difference; the message is one line."""


def check(worker: DepthWorker) -> None:
    """Run the check, unless a check of the same device, versions and configuration has passed before.

    With tensor parallelism, all processes call it.

    Args:
        worker: Worker whose cache and pool are allocated, and whose warm-up is over.

    Raises:
        SelfCheckError: Something differs. The message names it, and the file with what the check saw.
    """
    group, known = get_tp_group(), identity(worker)
    path = path_of(known)
    if group.broadcast_object(_passed_before(path, known)):
        return
    began = time.perf_counter()
    seen, differences = Comparison(worker).run()
    if group.world_size > 1:
        every: list[Any] = [None] * group.world_size
        torch.distributed.all_gather_object(every, differences, group=group.cpu_group)
        differences = [f"process {rank}: {one}" for rank, found in enumerate(every) for one in found]
    took, message = time.perf_counter() - began, None
    if differences:
        more = f", and {len(differences) - SHOWN} more" if len(differences) > SHOWN else ""
        message = (
            f"this server would not compute what the method defines: {'; '.join(differences[:SHOWN])}{more}. "
            f"What the check saw is in {path}; please report it with this file. {OFF} leaves the check out"
        )
    if group.rank_in_group == 0:
        when = datetime.now(timezone.utc).isoformat(timespec="seconds")
        report: dict[str, Any] = {"passed": not differences, "message": message, "differences": differences}
        report |= {"time": when, "seconds": round(took, 2), "identity": known}
        write_atomically(path, json.dumps(report | seen, indent=1) + "\n")
    if message is not None:
        raise SelfCheckError(message)
    logger.info("TaH: the self-check passed in %.1f s; what it saw is in %s", took, path)


def refusal(since: float) -> str | None:
    """Return the message of a check that failed after `since`, in any process, or None; `since` is in seconds."""
    for path in (cache_dir() / "self-check").glob("*.json"):
        if path.stat().st_mtime >= since and (message := json.loads(path.read_text())["message"]) is not None:
            return str(message)
    return None


def identity(worker: DepthWorker) -> dict[str, Any]:
    """Return all on which the result of the check depends, besides the values of the weights."""
    config, model = worker.vllm_config, worker.model
    stock = model.deep_attention[0].stock
    device: torch.device = model.pool.keys.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {stock.isa}"
    return {
        "device": name,
        "vllm": VLLM_VERSION,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "tah": f"{_version('tah')} {_sources()}",
        "runner": "V2" if worker.use_v2_model_runner else "V1",
        "attention backend": stock.get_attn_backend().get_name(),
        "kernel": model.by_kernel,
        "dtype": str(config.model_config.dtype),
        "KV cache": [str(stock.kv_cache.dtype), *stock.kv_cache.shape[1:], *stock.kv_cache.stride()],
        "block size": model.pages.block,
        "quantization": config.model_config.quantization,
        "batching": config.additional_config["batching"],
        "graphs of the second pass": model.graphs is not None,
        "processes": config.parallel_config.tensor_parallel_size,
        "eager": config.model_config.enforce_eager,
        "compilation": [str(config.compilation_config.mode), str(config.compilation_config.cudagraph_mode)],
        "tokens per step": config.scheduler_config.max_num_batched_tokens,
        "requests": min(2, config.scheduler_config.max_num_seqs),
        "checkpoint": _configuration(model.config),
        "kernels of vLLM": [part.compute_hash() for part in (config.kernel_config, config.attention_config)],
        "environment": {name: os.environ.get(name) for name in ENVIRONMENT},
    }


def path_of(known: dict[str, Any]) -> Path:
    """Return the file of a check in the user's cache."""
    return cache_dir() / "self-check" / f"{_digest(json.dumps(known, sort_keys=True).encode())}.json"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _sources() -> str:
    """Return a digest of the plugin's code: an installation from a checkout may change without its version."""
    return _digest(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))))


def _configuration(config: TaHConfig) -> str:
    """Return a digest of a checkpoint's configuration, without what each request may choose: the check has its own."""
    fields = json.loads(config.to_json_string(use_diff=False))
    for name in ("policy", "threshold"):
        del fields[name]
    return _digest(json.dumps(fields, sort_keys=True).encode())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _passed_before(path: Path, known: dict[str, Any]) -> bool:
    """Return whether `path` says that the check has passed. A file that cannot be read does not."""
    try:
        report = json.loads(path.read_text())
        return bool(report["passed"]) and report["identity"] == json.loads(json.dumps(known))
    except (OSError, ValueError, KeyError, TypeError):
        return False


class Comparison:
    """One run of the check. After it, cache, pool, runner and model are as before.

    Args:
        worker: The worker.
    """

    def __init__(self, worker: DepthWorker) -> None:
        self.worker, self.model = worker, worker.model
        self.width: int = worker.model.config.hidden_size
        self.dtype: torch.dtype = worker.vllm_config.model_config.dtype
        self.device = self.model.pool.keys.device
        self.kernel_rounding = KERNEL_ROUNDING[self.dtype]
        self.differences: list[str] = []
        self.plain = Plain(self.model, worker.vllm_config)

    @torch.inference_mode()
    def run(self) -> tuple[dict[str, Any], list[str]]:
        """Return what the check saw, by part, and the differences in words."""
        seen: dict[str, Any] = {"layout": self._layout()}
        requests = self._requests()
        for group in [requests] if self._assign_blocks(requests) else [[one] for one in requests]:
            steps = OwnSteps(self.worker, group)
            steps.run()
            if self.model.by_kernel:
                seen.setdefault("kernel", []).append(self._kernel(group))
            steps.end()
            self._restore([block for one in group for block in one.blocks])
        if self.model.by_kernel:
            seen["kernel, long"] = self._long_kernel()
        seen["answers"] = [self._answer(one) for one in requests]
        return seen, self.differences

    # -- layout ----------------------------------------------------------------------------------------------------

    def _layout(self) -> dict[str, Any]:
        """Check the layout of the cache of all layers."""
        found: dict[str, Any] = {"layers": len(self.model.deep_attention), "error": None}
        for number, layer in enumerate(self.model.deep_attention):
            try:
                check_layout(layer.stock)
            except ValueError as error:
                found["error"] = f"layer {number}: {error}"
                self.differences.append(f"the layout of the KV cache in layer {number}: {error}")
                break
        return found

    # -- the tokens ------------------------------------------------------------------------------------------------

    def _requests(self) -> list[Given]:
        """Return two requests of 64 tokens in total: one with a threshold that half of them exceed, one as usual."""
        total = min(TOKENS, self.worker.model_config.max_model_len)
        draw = torch.Generator().manual_seed(0)
        base: Any = self.model.config.base_config
        ids = torch.randint(base.vocab_size, (total,), generator=draw).tolist()
        longer = total - total * 3 // 8
        half, usual = ids[:longer], ids[longer:]
        policy = "decider" if self.model.decider is not None else "confidence"
        self.plain.first(torch.tensor(half, device=self.device))
        rule: dict[str, Any] = {"policy": policy}
        if policy != "decider" or self.model.config.decision != "sample":  # drawn decisions have no threshold
            rule["threshold"] = _middle(self.plain.continue_prob(policy))
        rule = get_tp_group().broadcast_object(rule)
        return [Given("self-check-half", half, rule, [17, 9]), Given("self-check-usual", usual, {}, [11])]

    def _assign_blocks(self, requests: list[Given]) -> bool:
        """Give the requests blocks from all over the cache, in falling order; return whether they can run together."""
        counts = [-(-len(one.ids) // self.model.pages.block) for one in requests]
        together = sum(counts) <= self._blocks() and self.worker.vllm_config.scheduler_config.max_num_seqs > 1
        spread = self._spread(sum(counts) if together else max(counts))
        for one, count in zip(requests, counts, strict=True):
            one.blocks, spread = spread[:count], spread[count:] if together else spread
        return together

    def _blocks(self) -> int:
        """Return the number of blocks, without block 0, which belongs to no request."""
        cache, pages = self.model.deep_attention[0].stock.kv_cache, self.model.pages
        return cache.shape[0] * pages.page // pages.block - 1

    def _spread(self, count: int) -> list[int]:
        """Return `count` blocks from all over the cache, in falling order, or all if there are fewer."""
        most = self._blocks()
        return np.linspace(most, 1, min(count, most)).astype(int).tolist() if count > 1 else [most]

    def _restore(self, blocks: list[int]) -> None:
        """Free the pool entries of `blocks`, and zero their keys of both depths."""
        model, pages = self.model, self.model.pages
        mine = np.unique(blocks)
        slots = pages.slots(mine)
        entries = model.pool.entries[slots]
        held, used = indices(self.device, pages.of(mine[None])[0], entries[entries >= 0])
        model.pool.release(slots)
        model.pool.flush()
        model.pool.keys[:, used], model.pool.values[:, used] = 0, 0
        for layer in model.deep_attention:
            layer.stock.kv_cache[held] = 0
        model.report, model.sampler_logits, model.current.deep = None, None, None

    # -- the kernel ------------------------------------------------------------------------------------------------

    def _kernel(self, requests: list[Given]) -> dict[str, Any]:
        """Compare the kernel with plain attention, for random queries over the keys that the requests have left."""
        size = self.model.pages.block
        tables = np.zeros((len(requests), max(len(one.blocks) for one in requests)), np.int32)
        for table, one in zip(tables, requests, strict=True):
            table[: len(one.blocks)] = one.blocks
        places = [np.flatnonzero(np.array(one.depths) > 1) for one in requests]
        owners, at = np.repeat(np.arange(len(requests)), [len(found) for found in places]), np.concatenate(places)
        found: dict[str, Any] = {"tokens": len(at), "allowed": self.kernel_rounding, "largest by layer": []}
        if not len(at):
            return found
        slots = tables[owners, at // size].astype(np.int64) * size + at % size
        tokens = DeepTokens(owners, at, slots, tables)
        for layer in range(len(self.model.deep_attention)):
            found["largest by layer"].append(self._attended(layer, tokens, None))
        return found

    def _long_kernel(self) -> dict[str, Any]:
        """Compare the kernel with plain attention over random keys of several tiles, which splits share evenly or not.

        The tokens above are few and near the start of short requests.
        """
        model, size = self.model, self.model.pages.block
        blocks = self._spread(-(-(TILES * MOST_PER_TILE + 1) // size))
        slots = model.pages.slots(np.array(blocks))
        draw = np.random.default_rng(0)
        several = min(len(slots) // 2, model.pool.free)
        at = np.sort(draw.choice(len(slots), several, replace=False))  # positions of depth 2
        (entries,) = indices(self.device, model.pool.take(slots[at]))
        (pages,) = indices(self.device, model.pages.of(np.array([blocks]))[0])
        last = len(model.deep_attention) - 1
        cache = model.deep_attention[last].stock.kv_cache
        for number, (tensor, rows) in enumerate([(cache, pages), (model.pool.keys[last], entries)]):
            tensor[rows] = self._random(number, len(rows), *tensor.shape[1:])
        model.pool.values[last, entries] = self._random(2, len(entries), *cache.shape[1:2], model.pool.values.shape[-1])
        places = np.unique(at[[0, several // 2, several - 1]])
        tables = np.array([blocks], np.int32)
        tokens = DeepTokens(np.zeros(len(places), np.int64), places, slots[places], tables)
        off = {str(splits): self._attended(last, tokens, splits) for splits in LONG_SPLITS}
        self._restore(blocks)
        return {"slots": len(slots), "entries": several, "positions": places.tolist(), "largest by splits": off}

    def _random(self, seed: int, *shape: int) -> Tensor:
        draw = torch.Generator().manual_seed(seed)
        return torch.randn(*shape, generator=draw).to(self.device, self.dtype)

    def _attended(self, number: int, tokens: DeepTokens, splits: int | None) -> float:
        """Compare the kernel with plain attention in layer `number`, for random queries of `tokens`.

        Args:
            number: Number of the layer.
            tokens: Tokens; for every slot of their tables that has an entry, the pool has keys.
            splits: Programs per token and head.

        Returns:
            The largest difference, as a share of the largest number.
        """
        layer, pool = self.model.deep_attention[number], self.model.pool
        deep = self.model.current.deep = replace(self.model._plan(tokens), splits=splits)
        keys, values = pool.keys[number, deep.entries], pool.values[number, deep.entries]
        query = self._random(number, len(tokens.places), layer.stock.num_heads, keys.shape[-1])
        got = layer(query.flatten(1), keys.flatten(1), values.flatten(1)).view_as(query).float()
        want = torch.empty_like(got)
        for row, table in enumerate(tokens.tables):
            (mine,) = indices(self.device, np.flatnonzero(tokens.owners == row))
            k, v = self._cached(layer.stock, table)
            held = pool.entries[self.model.pages.slots(table)]
            entries, places = indices(self.device, held[held >= 0], np.flatnonzero(held >= 0))
            all_places = torch.arange(len(k), device=self.device)
            visible = duo_visible(deep.positions[mine], all_places, places, deep.own)
            k, v = torch.cat([k, pool.keys[number, entries]]), torch.cat([v, pool.values[number, entries]])
            want[mine] = attend(query[mine].float(), k, v, visible, layer.stock.impl.scale)
        off = ((got - want).abs().max() / want.abs().max()).item()
        if not off <= self.kernel_rounding:
            told = f"its output is off by {off:.2g} of the largest number, more than {self.kernel_rounding:g}"
            shared = "" if splits is None else f" with {splits} programs for each head"
            self.differences.append(f"the kernel of depth 2 in layer {number}{shared}: {told}")
        return off

    def _cached(self, layer: Any, table: np.ndarray) -> tuple[Tensor, Tensor]:
        """Return the depth-1 keys and values [slots, H, K] of the blocks `table`, those of a request."""
        (pages,) = indices(self.device, self.model.pages.of(table[None])[0])
        keys, values = read_blocks(layer, pages)  # [N, H, K, S], [N, H, S, K]
        return keys.permute(0, 3, 1, 2).flatten(0, 1), values.permute(0, 2, 1, 3).flatten(0, 1)

    # -- answers ---------------------------------------------------------------------------------------------------

    def _answer(self, one: Given) -> dict[str, Any]:
        """Compare decisions, best tokens and log-probabilities of a request with the plain model."""
        options, got = RequestOptions.of(self.model.config, one.rule), np.array(one.depths)
        threshold = float(options.rule.threshold)  # type: ignore[arg-type]
        policy = str(options.rule.policy) if options.iterates else "never"
        places = sorted(one.hidden)
        prob, plain = self._evaluate(one, policy)
        served = self._served([one.hidden[k] for k in places])
        likely = plain[places].topk(min(LIKELY, plain.shape[-1])).indices
        off = _largest(plain[places], served, likely)
        other_prob, other = torch.zeros_like(prob), torch.zeros_like(off)
        for seed in range(RUNS):
            self.plain.noise = torch.Generator().manual_seed(seed)
            changed_prob, changed = self._evaluate(one, policy)
            other_prob = torch.maximum(other_prob, (changed_prob - prob).abs())
            other = torch.maximum(other, _largest(plain[places], changed[places], likely))
        self.plain.noise = None
        close, bound = _allowed(other_prob, CLOSE[self.dtype]), self.plain.bound(policy, threshold)
        wanted = 1 + (prob > bound).int()
        undecided = (prob - bound).abs() <= close
        for place in np.flatnonzero(got != wanted.cpu().numpy()).tolist():
            if not undecided[place]:
                told = f"depth {got[place]} instead of {wanted[place]}"
                near = f"continue probability {prob[place]:.4f}, threshold {bound[place]:.4f}"
                self.differences.append(f"the decision of token {place} of {one.name}: {told}; {near}")
        allowed = _allowed(other, ROUNDING[self.dtype])
        self._compare(one, places, plain[places], served, off, allowed)
        rows = {
            "ids": one.ids,
            "depths": one.depths,
            "depths, plain": wanted.tolist(),
            "continue probabilities, plain": _rounded(prob),
            "allowed distance from the threshold": _rounded(close),
            "compared": places,
            "best tokens": served.argmax(-1).tolist(),
            "best tokens, plain": plain[places].argmax(-1).tolist(),
            "lead of the best token, plain": _rounded(-plain[places].topk(2).values.diff()[:, 0]),
            "difference of log-probabilities": _rounded(off),
            "allowed difference": _rounded(allowed),
        }
        return {"request": one.name, "rule": one.rule, "threshold": threshold, **rows}

    def _evaluate(self, one: Given, policy: str) -> tuple[Tensor, Tensor]:
        """Return the plain model's continue probabilities [N], and its log-probabilities [N, V].

        The served model's decisions hold: one that falls otherwise would change all later tokens.
        """
        self.plain.first(torch.tensor(one.ids, device=self.device))
        (chosen,) = indices(self.device, np.flatnonzero(np.array(one.depths) > 1))
        prob = self.plain.continue_prob(policy)
        return prob, self.plain.second(chosen, prob)

    def _served(self, rows: list[Tensor]) -> Tensor:
        """Return log-probabilities [n, V] float32 of n rows of hidden states of the served model."""
        if self.model.mixes:  # rows of steps without a second pass are shorter than others
            return torch.cat([log_probabilities(self.model.base.compute_logits, row[None], self.width) for row in rows])
        return self.model.base.compute_logits(torch.stack(rows)).float().log_softmax(-1)

    def _compare(
        self, one: Given, places: list[int], plain: Tensor, served: Tensor, off: Tensor, allowed: Tensor
    ) -> None:
        """Compare the best tokens after the tokens at `places` [n], and their log-probabilities [n, V]."""
        behind = plain.amax(1) - plain.gather(1, served.argmax(-1, keepdim=True))[:, 0]
        columns = (places, behind.tolist(), off.tolist(), allowed.tolist())
        for place, lead, difference, most in zip(*columns, strict=True):
            where = f"token {place} of {one.name} (depth {one.depths[place]})"
            if not lead <= most:
                told = f"in the plain model it is {lead:.3g} behind, more than {most:.2g}"
                self.differences.append(f"the best next token after {where}: {told}")
            elif not difference <= most:
                told = f"off by {difference:.3g}, more than {most:.2g}"
                self.differences.append(f"the log-probabilities after {where}: {told}")


def _largest(plain: Tensor, other: Tensor, likely: Tensor) -> Tensor:
    """Return the largest difference [n] of log-probabilities [n, V] among the tokens `likely` [n, k]."""
    return (plain.gather(1, likely) - other.gather(1, likely)).abs().amax(1)


def _allowed(measured: Tensor, least: float) -> Tensor:
    """Return the allowed differences [n], given those by rounding, [n]; a token may have had luck with its own."""
    return (FACTOR * measured.clamp(min=measured.median())).clamp(min=least)


def _middle(prob: Tensor) -> float:
    """Return a threshold that about half of the probabilities [N] exceed, in the widest gap around their middle."""
    values = prob.clamp(0, 1).sort().values.tolist()
    N = len(values)
    at = max(range(3 * N // 8, max(3 * N // 8 + 1, 5 * N // 8)), key=lambda k: values[min(k + 1, N - 1)] - values[k])
    return (values[at] + values[min(at + 1, N - 1)]) / 2


def _rounded(x: Tensor) -> list[float]:
    return [round(value, 6) for value in x.tolist()]
