"""Every family in `families.FAMILIES` is exact, every one in `families.REFUSED` is refused with the reason.

Exact means: equal to `reference`, which runs the stock model token by token, in a left-padded batch, in one forward
and in several, for layers of every kind the family has.
"""

from __future__ import annotations

import runpy
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING

from helpers.families import FAMILIES, REFUSED, VOCAB, tiny
from helpers.reference import ReferenceOutput, by_labels, reference
from tah import TaHForCausalLM

T, PAD, MAX_DEPTH = 9, 3, 3
ROWS = ((0, 0), (1, PAD))  # (row, its first real token)
CHUNKS = ((0, 4), (4, 5), (5, 8), (8, T))
TOLERANCE = 1e-4  # of the largest logit


@dataclass
class Case:
    """A wrapped tiny model and a batch: row 0 has T tokens, row 1 has PAD tokens of padding and then T - PAD."""

    model: TaHForCausalLM
    stock: Tensor  # [2, T, V] logits of the base, unpadded, before it was wrapped
    ids: Tensor  # [2, T]
    mask: Tensor  # [2, T]
    labels: Tensor  # [2, T]

    @cached_property
    def want(self) -> list[ReferenceOutput]:
        """What each row should give, without its padding."""
        return [
            reference(self.model, self.ids[row, start:], by_labels(self.labels[row, start:])) for row, start in ROWS
        ]


def make_case(family: str, attn_implementation: str = "eager") -> Case:
    if family not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    base = tiny(family, attn_implementation)
    torch.manual_seed(1)
    ids, labels = torch.randint(3, VOCAB, (2, T)), torch.randint(1, MAX_DEPTH + 1, (2, T))
    labels[:, [4, T - 1]] = MAX_DEPTH
    mask = torch.ones_like(ids)
    mask[1, :PAD] = 0
    with torch.no_grad():
        stock = base(ids, use_cache=False).logits
    # All tokens are mixed: a near tie for the last place of a top-k says nothing about a family.
    model = TaHForCausalLM.from_base(
        base, max_depth=MAX_DEPTH, policy="oracle", decider=None, lora_rank=2, mix_topk=VOCAB
    ).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return Case(model, stock, ids, mask, labels)


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def case(request: pytest.FixtureRequest) -> Case:
    return make_case(request.param)


@torch.no_grad()
def one_forward(case: Case) -> Tensor:
    out = case.model(case.ids, attention_mask=case.mask, depth_labels=case.labels)
    assert torch.equal(out.depth_count, torch.where(case.mask == 1, case.labels, 1))
    return out.logits


@torch.no_grad()
def several_forwards(case: Case) -> Tensor:
    cache, logits = None, []
    for start, end in CHUNKS:
        out = case.model(
            case.ids[:, start:end],
            attention_mask=case.mask[:, :end],
            depth_labels=case.labels[:, start:end],
            past_key_values=cache,
            use_cache=True,
        )
        cache = out.past_key_values
        logits.append(out.logits)
    return torch.cat(logits, 1)


def assert_close(got: Tensor, want: Tensor) -> None:
    error, scale = (got - want).abs().max().item(), want.abs().max().item()
    assert error < TOLERANCE * scale, f"off by {error:.1e} where the largest logit is {scale:.1e}"


def check_exact(case: Case) -> None:
    full, chunked = one_forward(case), several_forwards(case)
    for (row, start), want in zip(ROWS, case.want, strict=True):
        assert torch.equal(want.depth_count, case.labels[row, start:])
        assert_close(full[row, start:], want.logits)
        assert_close(chunked[row, start:], want.logits)


def test_exact(case: Case) -> None:
    check_exact(case)


@pytest.mark.parametrize("family", ["cohere2", "deepseek_v3", "gemma3_text", "gpt2", "llama", "mixtral", "qwen3"])
def test_exact_with_sdpa(family: str) -> None:
    check_exact(make_case(family, "sdpa"))


@torch.no_grad()
def test_never_is_bit_equal_to_the_base(case: Case) -> None:
    assert torch.equal(case.model(case.ids, policy="never").logits, case.stock)
    one_pass = reference(case.model, case.ids[0], lambda *_: False)
    assert_close(one_pass.logits, case.stock[0])  # the reference itself is right about windows and positions


def test_a_wrong_mask_would_show(case: Case) -> None:
    """Negative control: without the deeper keys of earlier tokens the logits are elsewhere."""
    duo = case.want[1].logits
    own = reference(case.model, case.ids[1, PAD:], by_labels(case.labels[1, PAD:]), attention="own").logits
    assert (duo - own).abs().max() > 100 * TOLERANCE * duo.abs().max()


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_refused(family: str) -> None:
    if family not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    base = tiny(family)
    with pytest.raises(ValueError, match=REFUSED[family][1].pattern):
        TaHForCausalLM.from_base(base, policy="oracle", decider=None, lora_rank=2)


def test_tables() -> None:
    assert len(FAMILIES) >= 40
    assert not set(FAMILIES) & set(REFUSED)


@pytest.mark.skipif(
    any(family not in CONFIG_MAPPING for family in (*FAMILIES, *REFUSED)), reason="an older transformers lacks families"
)
def test_docs_are_current(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Path(__file__).parents[2] / "scripts" / "families.py"
    monkeypatch.setattr(sys, "argv", [str(script), "--check"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(script), run_name="__main__")
    assert end.value.code == 0
