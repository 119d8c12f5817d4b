"""The speed of a model in `tah doctor`: tokens per second of the base, `never`, 7 % and `always`, in alternation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from ..benchmarks.bench import RATE, Forced
from ..benchmarks.measure import Row, alternate, prompts, rows_of, timed
from ..model import TaHForCausalLM
from ..progress import SILENT
from .lines import Found, Line, line_of

PROMPT, FEWEST, MOST = 32, 8, 64  # tokens of the prompt; fewest and most new tokens
ROUNDS = 3
SECONDS = 6.0  # of all rounds together, about
VARIANTS: dict[str, Any] = {"base": None, "never": "never", "7 %": RATE, "always": "always"}


def speed_lines(model: TaHForCausalLM) -> Iterator[Line]:
    """Yield a line for each variant: the median of its rounds of greedy generation with one prompt."""
    runs: dict[str, Callable[..., Any]] = {}
    shares: dict[str, float] = {}
    failed: dict[str, Exception] = {}
    new = min(FEWEST, room(model))
    for name, policy in VARIANTS.items():  # a variant that fails is not part of the rounds
        try:
            runs[name] = generation(model, policy)
            if not shares:
                new = length(model, runs[name])
            shares[name] = iterated(runs[name], new)
        except Exception as error:
            failed[name] = error
    timers = {name: timed(partial(runs[name], max_new_tokens=new), model.device) for name in shares}
    rounds = {name: partial(_round, name, timer, failed) for name, timer in timers.items()}
    found = alternate(rounds, ROUNDS) if rounds else {}
    found = {name: seconds for name, seconds in found.items() if name not in failed}
    dtype = str(model.dtype).removeprefix("torch.")
    rows = rows_of(dtype, "decode, batch 1", found, shares, new, SILENT) if found else []
    by_name = {row.variant: row for row in rows}
    for name in VARIANTS:
        yield line_of("speed", name, partial(_speed, by_name.get(name), failed.get(name), new, "base" in by_name))


def _round(name: str, timer: Callable[[], float], failed: dict[str, Exception]) -> float:
    """Return the seconds of a round. A variant that fails in one, such as for lack of memory, runs in no later one."""
    if name in failed:
        return math.nan
    try:
        return timer()
    except Exception as error:
        failed[name] = error
        return math.nan


def _speed(row: Row | None, error: Exception | None, new: int, has_base: bool) -> Found:
    if row is None:
        assert error is not None
        raise error
    ratio = f"{row.ratio:.2f} of the time of the base, " if has_base else ""
    text = f"{row.tokens_per_second:.1f} tokens/s, {ratio}{row.iterated:.1%} iterated"
    numbers = {"tokens_per_second": row.tokens_per_second, "ratio": row.ratio if has_base else None}
    return Found(text, None, numbers | {"iterated": row.iterated, "new_tokens": new, "rounds": ROUNDS})


def room(model: TaHForCausalLM) -> int:
    """Return how many tokens fit behind the prompt."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or PROMPT + MOST
    return limit - min(PROMPT, limit // 2)


def generation(model: TaHForCausalLM, policy: Any) -> Callable[..., Any]:
    """Return a function that generates greedily, without an end token.

    Args:
        model: TaH model.
        policy: Policy of at least two passes, or the share of the tokens that iterate; None for the base alone.
    """
    runner: Any = model.base if policy is None else model
    given: dict[str, Any] = {} if policy is None else {"policy": policy, "max_depth": max(2, model.config.max_depth)}
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or PROMPT + MOST
    ids = prompts(model, 1, min(PROMPT, limit // 2))
    given |= {"attention_mask": torch.ones_like(ids), "do_sample": False}
    if not isinstance(policy, float):
        return partial(runner.generate, ids, eos_token_id=None, pad_token_id=0, **given)

    def generate(max_new_tokens: int, **more: Any) -> Any:
        given["policy"] = Forced(model, 1, ids.shape[1], max_new_tokens, policy)
        return model.generate(ids, eos_token_id=None, pad_token_id=0, max_new_tokens=max_new_tokens, **given, **more)

    return generate


def length(model: TaHForCausalLM, run: Callable[..., Any]) -> int:
    """Return the number of new tokens with which all rounds take about `SECONDS`, from the time of a short run."""
    few, most = min(FEWEST, room(model)), min(MOST, room(model))
    run(max_new_tokens=few)  # a warm-up
    seconds = timed(partial(run, max_new_tokens=few), model.device)() / few
    runs = (ROUNDS + 2) * len(VARIANTS)  # with a warm-up round, and the run that counts iterated tokens
    return max(few, min(most, round(SECONDS / runs / max(seconds, 1e-9))))


def iterated(run: Callable[..., Any], new: int) -> float:
    """Return the iterated share of the tokens of a run; 0 for the base, which has one pass only."""
    out = run(max_new_tokens=new, return_dict_in_generate=True)
    counts = getattr(out, "depth_count", None)
    return 0.0 if counts is None else (counts[:, :-1] > 1).float().mean().item()
