"""A served model answers as `TaHForCausalLM.generate` does, token by token and depth by depth, whatever the load."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="serving is tested where vLLM is installed: make serve-test")

import torch
from torch.nn import functional
from transformers import AutoTokenizer
from vllm.model_executor.layers.quantization.online.base import OnlineQuantizationConfig

from helpers.checkpoints import tiny
from helpers.serving import agree, iterated, prompts, reference, serve
from tah import TaHForCausalLM
from tah.core import fast
from tah.core.lora import DepthLoRA
from tah.vllm.names import FAMILIES

NEW = 48
MIXED = prompts(22, seed=1)  # 1,056 tokens
FEW = {"max_num_seqs": 4}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("serve") / "llama", "llama")


@pytest.fixture(scope="module")
def expected(llama):
    answers = reference(llama, MIXED, NEW)
    assert 0.05 < iterated(answers) < 0.3
    assert len({tuple(one.tokens) for one in answers}) == len(answers)
    return answers


LOADS = {
    "one at a time": {"max_num_seqs": 1},
    "eight": {"max_num_seqs": 8},
    "thirty-two": {"max_num_seqs": 32},
    "chunks of 16": {"max_num_batched_tokens": 16},
    "chunks of 50": {"max_num_batched_tokens": 50},
    "no prefix cache": {"enable_prefix_caching": False},
}


@pytest.mark.parametrize("batching", ["two_pass", "mixed"])
@pytest.mark.parametrize("options", LOADS.values(), ids=LOADS.keys())
def test_any_load(llama, expected, options, batching):
    with serve(llama, additional_config={"batching": batching}, **options) as served:
        assert agree(llama, MIXED, served.ask(MIXED, NEW), expected)
        assert agree(llama, MIXED, served.ask(MIXED, NEW), expected)  # with whatever is cached by now


@pytest.mark.parametrize(("options", "mixed"), [({}, True), (FEW, False)])
def test_auto_goes_by_requests(llama, expected, options, mixed):
    """Whichever it takes, nobody sees it in the answers."""
    with serve(llama, **options) as served:
        assert served.model.mixed == mixed
        assert agree(llama, MIXED, served.ask(MIXED, NEW), expected)


@pytest.mark.timeout(900)  # compiling takes minutes on a busy machine
@pytest.mark.parametrize(("asked", "mixed"), [("auto", False), ("mixed", True)])
def test_compiled(llama, expected, asked, mixed):
    """Depth 1 compiled, by vLLM's defaults; a pass of mixed depths is not, which is why `auto` leaves it."""
    options = {"enforce_eager": False, "additional_config": {"batching": asked}}
    with serve(llama, **options) as served:
        assert served.model.mixed == mixed and served.model.decoder.do_not_compile is False
        assert agree(llama, MIXED, served.ask(MIXED, NEW), expected)


@pytest.mark.slow
def test_long_answers(llama):
    """Over many blocks, and up to the last token that fits."""
    asked = prompts(2, seed=9, longest=100)
    want = reference(llama, asked, 1100)
    for batching in ("two_pass", "mixed"):
        options = {"max_model_len": 1280, "additional_config": {"batching": batching}}
        with serve(llama, **options) as served:
            assert agree(llama, asked, served.ask(asked, 1100), want)
            full = asked[0] + want[0].tokens
            assert len(served.ask([full], 1280 - len(full))[0].depths) == 1279


@torch.no_grad()
def test_bfloat16_flips_close_calls(llama, expected):
    """Decisions and best tokens on given text, against float32. A flip is rounding where float32 was undecided.

    How many there are is the processor's doing: 104 to 126 of the best tokens, and 75 to 80 with `never`, by vLLM's
    kernels for AVX2, AVX512 and AVX512 with bfloat16; 294 where depth 2 read keys in the wrong order.
    """
    text = [prompt + one.tokens[:-1] for prompt, one in zip(MIXED, expected, strict=True)]
    model = TaHForCausalLM.from_pretrained(llama, dtype=torch.float32).eval()
    flips, worst, tokens = {"decisions": 0, "tokens": 0, "tokens of never": 0}, 0.0, 0
    with serve(llama, dtype="bfloat16") as served:
        for rule, name in (({}, "tokens"), ({"policy": "never"}, "tokens of never")):
            ask = [{"prompt_token_ids": ids} for ids in text]
            outs = served.llm.generate(ask, served.params(1, rule, prompt_logprobs=1), use_tqdm=False)
            for ids, out in zip(text, outs, strict=True):
                want = model(torch.tensor([ids]), **rule)
                best = [next(t for t, entry in found.items() if entry.rank == 1) for found in out.prompt_logprobs[1:]]
                flips[name] += int((want.logits[0, :-1].argmax(-1) != torch.tensor(best)).sum())
                if not rule:
                    tokens += len(ids)
                    other = torch.tensor(out.outputs[0].routed_experts) != want.depth_count[0]
                    flips["decisions"] += int(other.sum())
                    margin = (want.continue_prob[0, other, 0] - model.config.threshold).abs()
                    worst = max([worst, *margin.tolist()])
    print(f"of {tokens} tokens in bfloat16, flipped: {flips}; decisions up to {worst:.3f} from the threshold")
    assert worst < 0.05 and flips["decisions"] < 0.02 * tokens
    assert flips["tokens"] <= 2 * flips["tokens of never"] + 0.02 * tokens


def test_control_a_model_that_never_iterates_answers_otherwise(llama, expected):
    """What the comparison above would show if the second pass did nothing, or the decision were another."""
    with serve(llama) as served:
        never = served.ask(MIXED, NEW, [{"policy": "never"}] * len(MIXED))
        assert sum(a.tokens != b.tokens for a, b in zip(never, expected, strict=True)) > len(MIXED) // 2
        lower = served.ask(MIXED, NEW, [{"threshold": 0.5}] * len(MIXED))
        assert sum(a.depths != b.depths for a, b in zip(lower, expected, strict=True)) > len(MIXED) // 2


LIKE_LLAMA = {"mistral": ["mixed"], "qwen2": ["two_pass"], "qwen3": ["mixed"]}  # their layers are called alike
OTHERS = [(one, how) for one in FAMILIES if one != "llama" for how in LIKE_LLAMA.get(one, ["two_pass", "mixed"])]


@pytest.mark.parametrize(("family", "batching"), OTHERS)
def test_other_families(tmp_path, family, batching):
    """In chunks, in batches, alone, from the cache, and with depth 1 only. The decider reads inner hidden states.

    The check at the start also compares a plain evaluation of the family's layers.
    """
    model = tiny(tmp_path / family, family, decider={"kind": "mlp", "layers": [0, 2, 3], "hidden_dims": [32, 16]})
    asked, new, never = MIXED[:8], 16, {"policy": "never"}
    want = reference(model, asked, new)
    assert 0.05 < iterated(want) < 0.4
    options = {"batching": batching, "self_check": True}
    with serve(model, max_num_batched_tokens=64, additional_config=options) as served:
        base = served.ask(asked, new, [never] * len(asked))
        assert agree(model, asked, base, reference(model, asked, new, **never), **never)
        for _ in range(2):
            assert agree(model, asked, served.ask(asked, new), want)
        alone = [served.ask([prompt], new)[0] for prompt in asked[:3]]
        assert agree(model, asked[:3], alone, want[:3])
    assert sum(a.tokens != b.tokens for a, b in zip(base, want, strict=True)) >= len(asked) // 4


def fp8(x):
    """Rows [..., n] in 8 bits, and their scales [..., 1]."""
    scale = (x.abs().amax(-1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max).clamp(min=1e-5)
    return (x / scale).to(torch.float8_e4m3fn).float(), scale


def by_fp8(self, x):
    """In place of a linear layer of the base: a scale for each output and for each token, as vLLM's method has."""
    (weight, scale), (x, of_token) = fp8(self.weight), fp8(x)
    return functional.linear(x, weight) * of_token * scale[:, 0] + (0 if self.bias is None else self.bias)


@pytest.mark.parametrize("batching", ["two_pass", "mixed"])
def test_fp8_weights(llama, tmp_path, monkeypatch, batching):
    """Quantized on loading. LoRA, decider and head are not; the reference has the same quantized linear layers.

    Depth 1 is vLLM's base with the same flag.

    In float32, which vLLM leaves out for its kernels on GPUs. In 8 bits a rounding error can become a larger one, so an
    answer may differ.
    """
    monkeypatch.setattr(OnlineQuantizationConfig, "get_supported_act_dtypes", lambda self: [torch.float32])
    monkeypatch.setattr(DepthLoRA, "stock_forward", by_fp8)
    monkeypatch.setattr(fast, "adapted", lambda x, layer: None)  # it has no linear layer of other formats
    asked, new, never = MIXED[:8], 16, {"policy": "never"}
    options = {"batching": batching, "self_check": True}
    want = [reference(llama, asked, new), reference(llama, asked, new, **never)]
    assert iterated(want[0]) > 0.05
    with serve(llama, max_num_batched_tokens=64, additional_config=options, quantization="fp8_per_channel") as served:
        model = served.model
        types = {name: weight.dtype for name, weight in model.named_parameters()}
        eight = {name for name, dtype in types.items() if dtype == torch.float8_e4m3fn}
        wanted = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
        assert {name.split(".")[-2] for name in eight} == wanted and len(eight) == 4 * len(model.decoder.layers)
        own = [dtype for name, dtype in types.items() if name.startswith(("adapters.", "decider."))]
        assert own and {*own, model.base.lm_head.weight.dtype} == {torch.float32}
        linear = model.deep_layers[0].self_attn.qkv_proj.linear
        assert linear is model.decoder.layers[0].self_attn.qkv_proj  # both depths share the quantized weight
        got = served.ask(asked, new), served.ask(asked, new, [never] * 8)
        alone = [served.ask([prompt], new)[0] for prompt in asked]
    base = TaHForCausalLM.from_pretrained(llama).base
    of_the_base = {name: weight for name, weight in base.state_dict().items() if "lora_" not in name}
    base.save_pretrained(tmp_path / "base", state_dict=of_the_base)
    AutoTokenizer.from_pretrained(llama).save_pretrained(tmp_path / "base")
    with serve(tmp_path / "base", max_num_batched_tokens=64, quantization="fp8_per_channel") as stock:
        given = [{"prompt_token_ids": ids} for ids in asked]
        outs = stock.llm.generate(given, stock.params(new), use_tqdm=False)
        assert [list(out.outputs[0].token_ids) for out in outs] == [one.tokens for one in got[1]]
    for a, b in (*zip(got, want, strict=True), (alone, got[0])):
        assert sum(one == other for one, other in zip(a, b, strict=True)) >= len(asked) - 1


SEAMS = {
    "own": {"attention": "own"},
    "hidden": {"next_input": "hidden"},
    "zero_init": {"output": "zero_init"},
    "authors' decider": {"decider": {"kind": "mlp", "layers": [0, 2, 3], "hidden_dims": [32, 16], "topk": 20}},
    "some adapters": {"lora_targets": ["q_proj", "v_proj", "down_proj"]},
    "no adapter": {"lora_rank": 0},
    "always": {"policy": "always"},
    "entropy": {"policy": "confidence", "confidence_measure": "entropy", "threshold": 0.9},
}


@pytest.mark.parametrize("config", SEAMS.values(), ids=SEAMS.keys())
def test_what_a_checkpoint_may_be(tmp_path, config):
    model = tiny(tmp_path / "model", "llama", **config)
    want = reference(model, MIXED, NEW)
    assert iterated(want) > 0.05
    for batching in ("two_pass", "mixed"):
        with serve(model, max_num_batched_tokens=64, additional_config={"batching": batching}) as served:
            assert agree(model, MIXED, served.ask(MIXED, NEW), want)
