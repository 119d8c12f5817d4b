"""The checks of `tah doctor` that run a model: the invariants of AGENTS.md that depend on the machine, and kernels.

Each check compares two computations of the same tokens. The decisions are those of two rules: `random`, whose
decisions are certain, and a policy that decides by a threshold, which is set so that about half of the tokens iterate.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..benchmarks.measure import prompts
from ..core.compat import CACHE, attention_of
from ..core.quantised import is_quantised
from ..errors import first_line
from ..load import load_tah
from ..model import TaHForCausalLM
from ..names import MIXTURES
from ..policy import Random, Rule
from .compare import Comparison, Tokens, Tolerance, tolerance_of
from .lines import Found, Line, Skip, line_of

ROWS, LENGTH, STEPS, PADDING = 3, 40, 16, 4  # rows; tokens of a row, and those of them that are generated; padding
FEWEST = 8  # positions that a model needs for these checks
RATE = 0.3  # iterated share of the rule `random`
BY_THRESHOLD = ("decider", "confidence")
COMPILERS = ("gcc", "clang")  # which Triton calls, unless CC names another one
SPACE = 1.2  # room for a checkpoint, relative to the bytes of the model


@dataclass(frozen=True)
class Subject:
    """A model and the tokens on which it is checked.

    Args:
        model: Model in eval mode.
        ids: Token ids [B, T].
        rules: Rules under which it is checked, by name.
        tolerance: How far apart two computations may be.
    """

    model: TaHForCausalLM
    ids: Tensor
    rules: dict[str, Rule]
    tolerance: Tolerance

    @classmethod
    @torch.no_grad()
    def of(cls, model: TaHForCausalLM) -> Subject:
        """Return the subject of a model.

        Raises:
            ValueError: The model has too few positions.
        """
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or LENGTH
        if limit < FEWEST:
            raise ValueError(f"{model.name_or_path} has {limit} positions; the checks need at least {FEWEST}")
        ids = prompts(model, ROWS, min(LENGTH, limit))
        return cls(model, ids, rules_of(model, ids), tolerance_of(model))

    @property
    def steps(self) -> int:
        """The number of tokens of a row that are generated one at a time."""
        return min(STEPS, self.ids.shape[1] // 2)

    def run(self, rule: Rule, ids: Tensor, **given: Any) -> Any:
        """Return the output of the model for tokens [B, T]."""
        return self.model(ids, **given, **rule.arguments())

    def compare(self, both: Callable[[Rule], tuple[Tokens, Tokens]]) -> Found:
        """Compare two computations under every rule.

        Args:
            both: Function of a rule that returns the two computations.
        """
        found = Comparison()
        for rule in self.rules.values():
            threshold = rule.threshold if isinstance(rule.threshold, float) else None
            found.add(*both(rule), self.tolerance, threshold)
        values = found.values(self.tolerance) | {"rules": list(self.rules)}
        return Found(found.text(self.tolerance), found.right(self.tolerance), values)


def rules_of(model: TaHForCausalLM, ids: Tensor) -> dict[str, Rule]:
    """Return the rules under which a model is checked.

    The policy that decides by a threshold is the model's own, or `confidence` if its own does not.
    """
    depth = max(2, model.config.max_depth)
    name = model.config.policy if model.config.policy in BY_THRESHOLD else "confidence"
    threshold = None
    if name != "decider" or model.config.decision != "sample":
        threshold = _middle(model, ids, name)
    return {name: Rule(name, threshold, depth), "random": Rule(Random(RATE), None, depth)}


def _middle(model: TaHForCausalLM, ids: Tensor, policy: str) -> float:
    """Return the middle of the widest gap in the middle half of the continue probabilities.

    About half of the tokens iterate there, and rounding changes the fewest decisions.
    """
    logits = torch.cat([model(row[None], policy=policy, max_depth=2).continue_logits[..., 0] for row in ids])
    ordered = logits.float().sigmoid().flatten().sort().values
    quarter = len(ordered) // 4
    half = ordered[quarter : len(ordered) - quarter]
    at = int((half[1:] - half[:-1]).argmax())
    return float((half[at] + half[at + 1]) / 2)


# -- invariants --------------------------------------------------------------------------------------------------------


def method_lines(subject: Subject) -> Iterator[Line]:
    """Yield a line for each invariant."""
    checks = {
        "never = base": never_equals_base,
        "batch = single": batch_equals_single,
        "cached = uncached": cached_equals_uncached,
        "padded left = right": left_equals_right,
        "saved = loaded": saved_equals_loaded,
    }
    for name, check in checks.items():
        yield line_of("method", name, partial(_without_gradients, check, subject))


@torch.no_grad()
def _without_gradients(check: Callable[[Subject], Found], subject: Subject) -> Found:
    return check(subject)


def never_equals_base(subject: Subject) -> Found:
    """Compare the policy `never` with the base, bit for bit: a batch, a batch with padding, and a cached answer."""
    model: Any = subject.model  # mypy takes a module of transformers for no function
    ids = subject.ids
    start = ids.shape[1] - subject.steps
    padded, mask = pad(ids, left=PADDING)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    never = partial(model, policy="never")
    pairs = {
        "a batch": (never(ids).logits, model.base(ids).logits),
        "padding": (
            never(padded, attention_mask=mask).logits[:, PADDING:],
            model.base(padded, attention_mask=mask, position_ids=positions).logits[:, PADDING:],
        ),
        "generation": (
            generated(never, ids[:1, :start], subject.steps)[1],
            generated(model.base, ids[:1, :start], subject.steps)[1],
        ),
    }
    if model.config.output in MIXTURES:  # whose logits are log-probabilities, method.md (15)
        pairs = {name: (a, b.float().log_softmax(-1)) for name, (a, b) in pairs.items()}
    differ = {name: float((a - b).abs().max()) for name, (a, b) in pairs.items() if not torch.equal(a, b)}
    count = sum(a.shape[0] * a.shape[1] for a, _ in pairs.values())
    text = f"{count} tokens equal bit for bit: {', '.join(pairs)}"
    if differ:
        text = f"not equal bit for bit: {', '.join(f'{name} by {apart:.1e}' for name, apart in differ.items())}"
    return Found(text, not differ, {"tokens": count, "different": differ})


def batch_equals_single(subject: Subject) -> Found:
    """Compare the rows of a batch with each row alone."""

    def both(rule: Rule) -> tuple[Tokens, Tokens]:
        alone = [Tokens.of(subject.run(rule, row[None])) for row in subject.ids]
        return Tokens.of(subject.run(rule, subject.ids)), Tokens.joined(alone, 0)

    return subject.compare(both)


def cached_equals_uncached(subject: Subject) -> Found:
    """Compare generation with a cache, token by token, with one forward over the prompt and the generated tokens."""

    def both(rule: Rule) -> tuple[Tokens, Tokens]:
        start = subject.ids.shape[1] - subject.steps
        parts: list[Tokens] = []

        def step(ids: Tensor, **given: Any) -> Any:
            out = subject.run(rule, ids, **given)
            parts.append(Tokens.of(out))
            return out

        sequence, _ = generated(step, subject.ids[:1, :start], subject.steps)
        return Tokens.joined(parts, 1), Tokens.of(subject.run(rule, sequence, use_cache=False))

    return subject.compare(both)


def left_equals_right(subject: Subject) -> Found:
    """Compare a row with padding on the left, and without padding, with the row with padding on the right."""
    row = subject.ids[:1]
    T = row.shape[1]

    def both(rule: Rule) -> tuple[Tokens, Tokens]:
        left, left_mask = pad(row, left=PADDING)
        right, right_mask = pad(row, right=PADDING)
        on_left = Tokens.of(subject.run(rule, left, attention_mask=left_mask), slice(PADDING, None))
        on_right = Tokens.of(subject.run(rule, right, attention_mask=right_mask), slice(0, T))
        bare = Tokens.of(subject.run(rule, row))
        return Tokens.joined([on_left, bare], 0), Tokens.joined([on_right, on_right], 0)

    return subject.compare(both)


def saved_equals_loaded(subject: Subject) -> Found:
    """Save the model, load it again, and compare every tensor bit for bit, and what the two models compute.

    The logits are compared within the tolerance, because a loaded tensor may begin at another address, for which the
    processor's kernels round in another order.
    """
    model = subject.model
    if is_quantised(model.base):
        raise Skip("the base is quantised, so a checkpoint has the adapter alone")
    before = model.state_dict()
    size = sum(tensor.numel() * tensor.element_size() for tensor in before.values())
    with tempfile.TemporaryDirectory(prefix="tah-doctor-") as directory:
        _check_room(size, directory, model.device)
        model.save_pretrained(directory)
        again = load_tah(directory).eval()
        after = again.state_dict()
        wrong = sorted(name for name in {*before, *after} if not _same(before.get(name), after.get(name)))
        again = again.to(model.device)
        loaded = dataclasses.replace(subject, model=again)
        row = subject.ids[:1]
        found = subject.compare(lambda rule: (Tokens.of(loaded.run(rule, row)), Tokens.of(subject.run(rule, row))))
    text = f"{len(before)} tensors equal bit for bit"
    if wrong:
        text = f"{len(wrong)} of {len(before)} tensors differ: {', '.join(wrong[:2])}"
    values = {"tensors": len(before), "bytes": size, "different": wrong[:10], **found.values}
    return Found(f"{text}; {found.text}", not wrong and bool(found.right), values)


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and a.dtype == b.dtype and torch.equal(a.cpu(), b.cpu())


def _check_room(size: int, directory: str, device: torch.device) -> None:
    """Skip the check if the disk, the memory or the GPU has no room for the model once more."""
    free = {"the directory for temporary files": shutil.disk_usage(directory).free}
    memory = Path("/proc/meminfo")
    if memory.exists():
        lines = dict(line.split(":", 1) for line in memory.read_text().splitlines())
        free["memory"] = int(lines["MemAvailable"].split()[0]) * 1024
    if device.type == "cuda":
        free[str(device)] = torch.cuda.mem_get_info(device)[0]
    for place, room in free.items():
        if room < SPACE * size:
            raise Skip(f"{place} has {room / 2**30:.1f} GiB free; a copy of the model takes {size / 2**30:.1f} GiB")


def pad(ids: Tensor, left: int = 0, right: int = 0) -> tuple[Tensor, Tensor]:
    """Return token ids with padding, and their mask."""
    return F.pad(ids, (left, right)), F.pad(torch.ones_like(ids), (left, right))


def generated(model: Callable[..., Any], prompt: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Generate greedily with a cache.

    The loop is here and not in `generate`, whose settings (a repetition penalty) come from files of the model.

    Args:
        model: Function of token ids, a cache and `use_cache`.
        prompt: Token ids [1, T].
        steps: Number of tokens that run one at a time.

    Returns:
        Token ids [1, T + steps], and the logits [1, T + steps, V] of every token.
    """
    out = model(prompt, use_cache=True)
    ids, logits = [prompt], [out.logits]
    for _ in range(steps):
        ids.append(logits[-1][:, -1:].argmax(-1))
        out = model(ids[-1], use_cache=True, **{CACHE: getattr(out, CACHE)})
        logits.append(out.logits)
    return torch.cat(ids, 1), torch.cat(logits, 1)


# -- kernels of attention ----------------------------------------------------------------------------------------------


def attention_lines(subject: Subject) -> Iterator[Line]:
    """Yield a line for each implementation of attention of transformers: it gives the results of `eager`."""
    for name in ("sdpa", "flex_attention"):
        check = partial(attention_equals_eager, subject, name)
        yield line_of("kernels", f"eager = {name.removesuffix('_attention')}", check)


@torch.no_grad()
def attention_equals_eager(subject: Subject, name: str) -> Found:
    """Compare an implementation of attention with `eager`."""
    text = subject.model.config.get_text_config(decoder=True)
    if getattr(text, "attn_logit_softcapping", None):
        raise Skip("the base caps its scores of attention, which eager attention alone computes")
    if name == "flex_attention":
        _check_flex(subject.model.device)

    def both(rule: Rule) -> tuple[Tokens, Tokens]:
        found = []
        for implementation in (name, "eager"):
            with attention(subject.model, implementation):
                found.append(Tokens.of(subject.run(rule, subject.ids)))
        return found[0], found[1]

    return subject.compare(both)


def _check_flex(device: torch.device) -> None:
    """Skip flex attention where it cannot be compiled."""
    if device.type != "cuda":
        raise Skip("flex attention needs a GPU")
    if find_spec("triton") is None:
        raise Skip("flex attention is compiled by Triton, which is not installed")
    named = os.environ.get("CC")
    if not any(map(shutil.which, [named] if named else COMPILERS)):
        wanted = f"CC={named} is not found" if named else f"none of {', '.join(COMPILERS)} is found"
        raise Skip(f"flex attention is compiled by Triton, which needs a C compiler: {wanted}")


@contextmanager
def attention(model: TaHForCausalLM, name: str) -> Iterator[None]:
    """Use another implementation of attention inside the block. A model that does not have it raises `Skip`."""
    before = attention_of(model.base.config)
    try:
        model.set_attn_implementation(name)
    except (ValueError, ImportError) as error:
        raise Skip(f"the model has no {name}: {first_line(error)}") from error
    try:
        yield
    finally:
        model.set_attn_implementation(before)
