"""What vLLM's kernels for one processor or another write is found again, and served the same."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="serving is tested where vLLM is installed: make serve-test")

import openai
import torch
from vllm import LLM
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.v1.attention.backends import cpu_attn
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend, CPUAttentionBackendImpl

from helpers.checkpoints import save, tiny
from helpers.processors import amx_cache, processor, skip_without, write
from helpers.servers import running
from helpers.serving import Answer, iterated, prompts, serve, served_by
from tah import TaHForCausalLM
from tah.vllm import attention, compat

NEW = 24
ASKED = prompts(22, seed=1)
HEADS = CPUAttentionBackend.get_supported_head_sizes()
READ = {"vec", "vec16", "amx"}


def layer_of(kernels: str, dtype: torch.dtype, B: int, H: int, S: int, K: int) -> SimpleNamespace:
    """What `compat` needs to know of a layer."""
    noise = torch.randn(B, H, S, 2 * K, generator=torch.Generator().manual_seed(0)).to(dtype)
    return SimpleNamespace(isa=kernels, kv_cache=noise)


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a, b)


LAYOUTS = [
    *product(["amx"], [torch.bfloat16], [32, 64, 96, 128], [32, 64, 128]),
    *product(["vec"], [torch.bfloat16, torch.float32, torch.float16], [32, 128], [32, 64]),
    *product(["vec16"], [torch.bfloat16, torch.float32], [32, 96], [80, 112]),
]


@pytest.mark.parametrize(("kernels", "dtype", "S", "K"), LAYOUTS)
def test_what_is_written_is_read(kernels, dtype, S, K):
    """Tokens in slots of no order, some of which are not to be written; blocks read in another order, and twice."""
    skip_without(kernels)
    B, H, draw = 5, 3, torch.Generator().manual_seed(1)
    layer = layer_of(kernels, dtype, B, H, S, K)
    before = [part.clone() for part in compat.read_blocks(layer, torch.arange(B))]
    T = 2 * S + 7
    slots = torch.randperm(B * S, generator=draw)[:T]
    keys, values = (torch.randn(T, H, K, generator=draw).to(dtype) for _ in range(2))
    left = torch.rand(T, generator=draw) < 0.2
    write(kernels, keys, values, layer.kv_cache, slots.masked_fill(left, -1))

    want_keys, want_values = before
    for slot, key, value in zip(slots[~left].tolist(), keys[~left], values[~left], strict=True):
        want_keys[slot // S, :, :, slot % S] = key
        want_values[slot // S, :, slot % S] = value
    blocks = torch.tensor([[3, 0], [1, 3], [4, 2]])
    got_keys, got_values = compat.read_blocks(layer, blocks)
    assert same(got_keys, want_keys[blocks]) and same(got_values, want_values[blocks])


@pytest.mark.parametrize("amx", [True, False])
@pytest.mark.parametrize("K", HEADS)
def test_the_check_at_the_start_lets_every_head_width_pass(K, amx):
    """With the kernels that vLLM takes for that width, on a processor with AMX and one without."""
    with processor(amx):
        kernels = cpu_attn._get_attn_isa(torch.bfloat16, 128, K)
    skip_without(kernels)
    check(layer_of(kernels, torch.bfloat16, 2, 2, 128, K))


def check(layer: SimpleNamespace, written_by: str | None = None) -> None:
    """`compat.check_layout`, with vLLM's code around the kernel; of another kernel's numbers if asked for."""
    with set_current_vllm_config(VllmConfig()):
        impl = CPUAttentionBackendImpl.__new__(CPUAttentionBackendImpl)
    impl.attn_type, impl.kv_cache_dtype = "decoder", "auto"
    by = SimpleNamespace(isa=written_by or layer.isa, _k_scale_float=1.0, _v_scale_float=1.0)
    layer.impl = SimpleNamespace(do_kv_cache_update=lambda _, *given: impl.do_kv_cache_update(by, *given))
    compat.check_layout(layer)


@pytest.mark.parametrize(("said", "written"), [("amx", "vec"), ("vec", "amx"), ("vec16", "amx"), ("neon", "amx")])
def test_control_another_layout_is_noticed(said, written):
    skip_without(written)
    with pytest.raises(ValueError, match=f"for its kernels '{said}' in a layout that is not supported") as refused:
        check(layer_of(said, torch.bfloat16, 2, 2, 64, 64), written)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("amx", [True, False])
def test_whatever_vllm_chooses_is_read(amx):
    """For all head widths and types that it knows, at its own block size and at those that may be asked for."""
    with processor(amx):
        chosen = {
            (dtype, S, K): cpu_attn._get_attn_isa(dtype, S, K)
            for dtype, S, K in product([torch.bfloat16, torch.float16, torch.float32], [32, 64, 96, 128, 256], HEADS)
        }
    assert set(chosen.values()) <= READ
    assert ("amx" in chosen.values()) == amx
    assert {kernels for (dtype, _, K), kernels in chosen.items() if dtype == torch.bfloat16 and K % 32 == 0} == {
        "amx" if amx else "vec"
    }


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("serve") / "llama", "llama")


@contextmanager
def copied_blocks() -> Iterator[None]:
    read = attention.read_blocks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "read_blocks", lambda *given: tuple(part.contiguous() for part in read(*given)))
        yield


LOADS = {
    "blocks of 128, vLLM's own": {"block_size": None},
    "blocks of 64": {"block_size": 64},
    "preempted": {"num_gpu_blocks_override": 14, "max_num_batched_tokens": 48},
}


@pytest.mark.parametrize("batching", ["two_pass", "mixed"])
@pytest.mark.parametrize("options", LOADS.values(), ids=LOADS.keys())
def test_answers_over_the_cache_of_amx(llama, options, batching):
    """Those over the plain cache, twice, the second time from cached prefixes; all numbers are the same, bit for bit.

    For that the plain cache is read as a copy too: how a product rounds may depend on where its factors lie.
    """
    skip_without("amx")
    options = {"dtype": "bfloat16", "additional_config": {"batching": batching}, **options}
    with processor(amx=False), copied_blocks(), serve(llama, **options) as served:
        assert served.model.deep_attention[0].stock.isa == "vec"
        want = [served.ask(ASKED, NEW) for _ in range(2)]
        preempted = served.preempted
    assert 0.05 < iterated(want[0]) < 0.3 and bool(preempted) == ("num_gpu_blocks_override" in options)
    with amx_cache(), serve(llama, **options) as served:
        assert served.model.deep_attention[0].stock.isa == "amx"
        assert served.model.pages.page == (options.get("block_size", 32) or 128)
        assert [served.ask(ASKED, NEW) for _ in range(2)] == want


@pytest.fixture(scope="module")
def in_bfloat16(llama, tmp_path_factory):
    """The same checkpoint as most people have theirs."""
    model = TaHForCausalLM.from_pretrained(llama, dtype=torch.bfloat16)
    return save(model, tmp_path_factory.mktemp("serve") / "bfloat16")


@torch.no_grad()
def mostly_decided_so(model: Path, answers: Sequence[Answer]) -> bool:
    """Whether the depths of each prompt are those that our own model has in float32, up to rounding."""
    own = TaHForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    tokens = other = 0
    for prompt, answer in zip(ASKED, answers, strict=True):
        want = own(torch.tensor([prompt])).depth_count[0].tolist()
        tokens += len(prompt)
        other += sum(a != b for a, b in zip(answer.depths, want, strict=False))
    return other < 0.02 * tokens


@pytest.mark.timeout(900)  # compiled, as without flags; that takes minutes on a busy machine
@pytest.mark.parametrize("around", [nullcontext, amx_cache], ids=["as this processor is", "over the cache of AMX"])
def test_no_flags_in_python(in_bfloat16, around):
    """As documented: `vllm.LLM(MODEL)`."""
    with around(), served_by(LLM(str(in_bfloat16))) as served:
        layer = served.model.deep_attention[0].stock
        assert layer.kv_cache.dtype == torch.bfloat16 and served.model.pages.page == 128
        assert layer.isa in (READ if around is nullcontext else {"amx"})
        answers = served.ask(ASKED, NEW)
        assert mostly_decided_so(in_bfloat16, answers) and 0.05 < iterated(answers) < 0.3


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_no_flags_at_the_command(in_bfloat16, tmp_path):
    """`tah serve MODEL`, with nothing but where it listens and what the model is called."""
    none = {"dtype": None, "gpu_memory_utilization": None, "enforce_eager": None}
    with running(in_bfloat16, tmp_path / "log.txt", **none) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        options = {"max_tokens": NEW, "temperature": 0, "extra_body": {"vllm_xargs": {"depths": True}}}
        outs = [client.completions.create(model="tiny", prompt=prompt, **options) for prompt in ASKED]
        answers = [Answer([], out.choices[0].tah["depths"]) for out in outs]
    assert mostly_decided_so(in_bfloat16, answers) and 0.05 < iterated(answers) < 0.3


def test_control_the_plain_reading_of_that_cache_answers_otherwise(llama, monkeypatch):
    """What the comparison above would show if the second pass read other keys than the first wrote."""
    skip_without("amx")
    options = {"dtype": "bfloat16", "max_num_seqs": 1}
    with processor(amx=False), copied_blocks(), serve(llama, **options) as served:
        want = served.ask(ASKED, NEW)
    monkeypatch.setattr(
        compat, "_from_tiles", lambda tiles, rows, columns: tiles.view(*tiles.shape[:-1], rows, columns)
    )
    monkeypatch.setattr("tah.vllm.model.check_layout", lambda layer: None)
    with amx_cache(), serve(llama, **options) as served:
        assert sum(a.tokens != b.tokens for a, b in zip(served.ask(ASKED, NEW), want, strict=True)) > len(ASKED) // 2
