"""`tah bench`: the cost of iterating on hard tokens, as a ratio to the base model of the same run."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..load import find, load_base, load_tah
from ..markdown import table
from ..model import TaHForCausalLM
from ..names import MIXTURES
from ..policy import DepthState, Policy
from ..progress import SILENT, Reporter
from . import measure
from .measure import SEED, Row, alternate, prompts, rows_of, timed

VARIANTS = ("base", "never", "forced", "always")
RATE = 0.07  # iterated share of the paper's models
PROMPT, NEW = 64, 64  # tokens of prompt and answer in decoding


class Forced(Policy):
    """A policy that runs the model's decider on every token, then ignores it and iterates a fixed share of the tokens.

    In each row, the iterated tokens are that share of the first `prompt` positions and of the later positions, sampled
    with a fixed seed. They take all passes.

    Args:
        model: Model whose decider runs.
        batch: Number of rows of the input, which has no padding.
        prompt: Number of positions of the prompt.
        new: Number of positions after the prompt.
        rate: Iterated share.
    """

    def __init__(self, model: TaHForCausalLM, batch: int, prompt: int, new: int, rate: float = RATE) -> None:
        self.decider = model.decider
        self.layers = model.decider.layers if model.decider is not None else ()
        generator = torch.Generator().manual_seed(SEED)
        chosen = torch.zeros(batch, prompt + new, dtype=torch.bool)
        for row in range(batch):
            for start, length in ((0, prompt), (prompt, new)):
                share = round(rate * length, 6)
                count = math.ceil(share) if row % 2 == 0 else math.floor(share)  # 5 and 4 of 64 are 7.0 % of two rows
                chosen[row, start + torch.randperm(length, generator=generator)[:count]] = True
        self.chosen = chosen.to(model.device)

    def __call__(self, state: DepthState) -> Tensor:
        if self.decider is not None:
            self.decider(state)
        if state.depth > 1:  # only chosen tokens got here
            return torch.ones_like(state.positions, dtype=torch.bool)
        batch, length = self.chosen.shape
        row = torch.arange(len(state.positions), device=self.chosen.device) // (len(state.positions) // batch)
        return self.chosen[row, state.positions.clamp(max=length - 1)]


def load(model: str, dtype: str) -> TaHForCausalLM:
    """Load a TaH checkpoint, or wrap a base model.

    Args:
        model: TaH checkpoint, base model, or `smollm2`.
        dtype: Data type of the weights.
    """
    path, kind = find(model)
    return load_tah(path, dtype).eval() if kind == "tah" else TaHForCausalLM.from_base(load_base(path, dtype))


def _variant(
    model: PreTrainedModel, variant: str, batch: int, prompt: int, new: int, rate: float
) -> tuple[Any, dict[str, Any]]:
    """Return the model that runs a variant, and the arguments of its call."""
    if not isinstance(model, TaHForCausalLM):  # a base that is not wrapped
        return model, {}
    if variant == "base":
        return model.base, {}
    return model, {"policy": Forced(model, batch, prompt, new, rate) if variant == "forced" else variant}


def decode(model: PreTrainedModel, variant: str, batch: int, rate: float = RATE) -> Callable[..., Any]:
    """Return a function that calls `generate`: greedy, with prompts of 64 tokens and 64 new tokens.

    Args:
        model: TaH model or base.
        variant: One of `VARIANTS`.
        batch: Number of prompts.
        rate: Iterated share of the variant `forced`.

    Returns:
        A function that accepts more options of `generate`.
    """
    runner, given = _variant(model, variant, batch, PROMPT, NEW, rate)
    ids = prompts(model, batch, PROMPT)
    given |= {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "do_sample": False}
    return partial(runner.generate, ids, eos_token_id=None, pad_token_id=0, **given)


def prefill(model: PreTrainedModel, variant: str, length: int, rate: float = RATE) -> Callable[[], Any]:
    """Return a function that runs one forward over a prompt, with a KV cache and the last token's logits.

    `generate` begins with the same forward.
    """
    runner, given = _variant(model, variant, 1, length, 0, rate)
    ids = prompts(model, 1, length)

    @torch.no_grad()
    def run() -> Any:
        return runner(ids, use_cache=True, logits_to_keep=1, **given)

    return run


def passes(run: Callable[..., Any], variant: str, size: int, decoding: bool) -> Tensor:
    """Return the passes of the tokens of a run, [B, T]; for the base and `never`, of a row of `size` tokens [1, size].

    Args:
        run: A run of `decode` or `prefill`.
        variant: One of `VARIANTS`.
        size: Number of tokens.
        decoding: Whether the run is one of `decode`.
    """
    if variant in ("base", "never"):
        return torch.ones(1, size, dtype=torch.int64)
    return run(return_dict_in_generate=True).depth_count[:, :-1] if decoding else run().depth_count


def kept_states(model: TaHForCausalLM, variant: str, depth_count: Tensor) -> float:
    """Return the MiB of the states of passes that a forward keeps until the head has run. They are counted.

    These are the last hidden states of depth 1; where passes are kept apart, method.md (15), also those of deeper
    passes with their indices; and the weights of a mixture. Keys and values are not among them.

    Args:
        model: TaH model.
        variant: One of `VARIANTS`.
        depth_count: Passes of each token [B, T].
    """
    state = model.config.get_text_config().hidden_size * model.dtype.itemsize
    size = depth_count.numel() * state
    if variant != "base":
        size += int((depth_count - 1).sum()) * (state + torch.int64.itemsize)
        if model.config.output in MIXTURES:
            columns = 1 if model.config.output == "even" else int(depth_count.max())
            size += columns * depth_count.numel() * torch.float32.itemsize
    return size / 2**20


def peak_memory(model: str, dtype: str, variant: str, length: int, rate: float = RATE) -> float:
    """Return the MiB of weights and one prefill, measured in a new process.

    The result is the peak resident memory (on a GPU: allocated memory) in the prefill, minus the resident memory before
    the model is loaded.
    """
    return measure.in_fresh_process(variant, peak, model, dtype, variant, length, rate)


def peak(model: str, dtype: str, variant: str, length: int, rate: float) -> float:
    """Measure `peak_memory` in this process."""
    before, (path, kind) = measure.resident(), find(model)
    loaded: PreTrainedModel
    if variant != "base":
        loaded = load(model, dtype)
    else:
        loaded = load_tah(path, dtype).base if kind == "tah" else load_base(path, dtype)
    return measure.peak_during(prefill(loaded, variant, length, rate), loaded.device, before)


def bench(
    model: str = "smollm2",
    *,
    dtypes: tuple[str, ...] = ("float32", "bfloat16"),
    batches: tuple[int, ...] = (1, 4, 16),
    lengths: tuple[int, ...] = (512, 2048),
    rate: float = RATE,
    repeats: int = 5,
    progress: Reporter = SILENT,
) -> dict[str, Any]:
    """Measure all variants.

    If the model keeps passes apart until its head runs (a mixture, a soft-capped head), there are rows with the memory
    of these states, too.

    Args:
        model: TaH checkpoint, base model, or `smollm2`.
        dtypes: Data types of the weights.
        batches: Batch sizes of decoding.
        lengths: Tokens of the prefill; memory is measured with the last one.
        rate: Iterated share of the variant `forced`.
        repeats: Number of rounds.
        progress: Reporter, which gets a line for each row.

    Returns:
        `{"machine", "settings", "rows"}`.
    """
    rows: list[Row] = []
    for dtype in dtypes:
        loaded = load(model, dtype)
        tasks: list[tuple[str, Callable[..., Any], int, int]]
        tasks = [(f"decode, batch {batch}", decode, batch, batch * NEW) for batch in batches]
        tasks += [(f"prefill, {length} tokens", prefill, length, length) for length in lengths]
        for task, make, size, tokens in tasks:
            runs = {name: make(loaded, name, size, rate) for name in VARIANTS}
            seconds = alternate({name: timed(run, loaded.device) for name, run in runs.items()}, repeats)
            counts = {name: passes(run, name, tokens, make is decode) for name, run in runs.items()}
            shares = {name: (count > 1).float().mean().item() for name, count in counts.items()}
            rows += rows_of(dtype, task, seconds, shares, tokens, progress)
            if make is prefill and not loaded.sums_states:
                kept = {name: [kept_states(loaded, name, count)] for name, count in counts.items()}
                rows += rows_of(dtype, f"memory of kept states, {size} tokens", kept, shares, 0, progress)
        del loaded, runs
        for length in lengths[-1:]:
            peaks = {name: [peak_memory(model, dtype, name, length, rate)] for name in VARIANTS}
            rows += rows_of(dtype, f"memory, {length} tokens", peaks, {}, 0, progress)
    settings = {"model": model, "prompt": PROMPT, "new": NEW, "rate": rate, "repeats": repeats}
    return measure.result_of(settings, rows)


def markdown(result: dict[str, Any]) -> str:
    """Return the result as a Markdown table."""
    rows = [Row(**row) for row in result["rows"]]
    shares = ["" if row.task.startswith("memory,") else f"{row.iterated:.1%}" for row in rows]
    return table(
        ("dtype", "task", "variant", "median", "ratio to base", "iterated"),
        [
            (row.dtype, row.task, row.variant, row.value, f"{row.ratio:.2f}", share)
            for row, share in zip(rows, shares, strict=True)
        ],
    )
