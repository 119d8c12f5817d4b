"""vLLM's model runner V2, which GPUs have: the answers of `generate`, whatever a step is. `make serve-test-v2`."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest

pytest.importorskip("vllm", reason="serving is tested where vLLM is installed: make serve-test")

from vllm.exceptions import VLLMValidationError
from vllm.v1.worker.gpu import model_runner
from vllm.v1.worker.gpu.warmup import run_mixed_prefill_decode_warmup as warm_up_steps

from helpers.checkpoints import tiny
from helpers.interpreter import IS_V2
from helpers.serving import agree, answer, iterated, prompts, reference, serve
from tah.vllm import model as serving

pytestmark = pytest.mark.skipif(not IS_V2, reason="model runner V2 needs a process of its own: make serve-test-v2")

NEW = 12
ASKED = prompts(6, seed=1)
MLP = {"kind": "mlp", "layers": [0, 2, 3], "hidden_dims": [32, 16], "topk": 20}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("serve") / "llama", "llama")


@pytest.fixture(scope="module")
def expected(llama):
    answers = reference(llama, ASKED, NEW)
    assert 0.05 < iterated(answers) < 0.3 and len({tuple(one.tokens) for one in answers}) == len(answers)
    return answers


def test_auto_is_two_pass_on_the_other_runner(llama, expected):
    """Chunks of prompts; then the same again, from cached blocks."""
    with serve(llama, max_num_batched_tokens=16) as served:
        runner = served.engine.model_executor.driver_worker.worker.model_runner
        assert type(runner).__mro__[1] is model_runner.GPUModelRunner and not served.model.mixed
        assert agree(llama, ASKED, served.ask(ASKED, NEW), expected)
        outs = served.llm.generate([{"prompt_token_ids": ids} for ids in ASKED], served.params(NEW), use_tqdm=False)
        assert agree(llama, ASKED, [answer(out) for out in outs], expected)
        assert sum(out.num_cached_tokens for out in outs) > 100


def test_few_blocks(llama):
    """Requests are preempted, and the runner gets them back as new ones."""
    asked, new = ASKED[:3], 40
    want = reference(llama, asked, new)
    with serve(llama, num_gpu_blocks_override=7, max_model_len=128, max_num_batched_tokens=64) as served:
        assert agree(llama, asked, served.ask(asked, new), want)
        assert served.preempted > 0


def test_few_deep_entries(llama):
    rule = {"threshold": 0.5}
    want = reference(llama, ASKED, NEW, **rule)
    assert iterated(want) > 0.4
    options = {"max_model_len": 128, "num_gpu_blocks_override": 100, "additional_config": {"deep_kv_share": 0.01}}
    with serve(llama, **options) as served:
        assert served.model.pool.capacity == 128  # the longest request alone
        assert agree(llama, ASKED, served.ask(ASKED, NEW, [rule] * len(ASKED)), want, **rule)
        assert served.preempted > 0


def test_steps_padded_as_for_graphs(tmp_path, monkeypatch):
    """Only the real rows count, with a decider that reads inner layers and logits."""
    model, padded = tiny(tmp_path / "model", "llama", decider=MLP), []
    want, stock = reference(model, ASKED, NEW), model_runner.dispatch_cg_and_sync_dp
    assert iterated(want) > 0.05

    def dispatch(manager, num_reqs, num_toks, *args, **options):
        how, synced = stock(manager, num_reqs, num_toks, *args, **options)
        more = {"num_reqs": 8} if num_toks == num_reqs else {}
        padded.append(num_toks % 16 > 0)
        return replace(how, num_tokens=-(-num_toks // 16) * 16, **more), synced

    monkeypatch.setattr(model_runner, "dispatch_cg_and_sync_dp", dispatch)
    with serve(model, max_num_batched_tokens=64, block_size=64) as served:
        assert served.model.pages.page == 64
        assert agree(model, ASKED, served.ask(ASKED, NEW), want)
    assert sum(padded) >= NEW


def test_rules_side_by_side(llama):
    """Each request has a rule of its own, one of them none that iterates."""
    rules = [
        {},
        {"policy": "never"},
        {"policy": "always"},
        {"policy": "confidence", "threshold": 0.4},
        {"max_depth": 1},
    ]
    asked = ASKED[: len(rules)]
    want = [reference(llama, [prompt], NEW, **rule)[0] for prompt, rule in zip(asked, rules, strict=True)]
    with serve(llama) as served:
        got = served.ask(asked, NEW, rules)
        for at, rule in enumerate(rules):
            assert agree(llama, [asked[at]], [got[at]], [want[at]], **rule)


@pytest.mark.parametrize(("attention", "shared"), [("duo", False), ("own", True)])
def test_the_kernel_attends(tmp_path, monkeypatch, attention, shared):
    """As on a GPU, over a row-major copy of the CPU's cache: chunks of prompts, and decoding.

    A GPU has a table of the entries of its own, which the host brings up to date.
    """
    monkeypatch.setattr(serving, "DeepPool", partial(serving.DeepPool, shared=shared))
    model, asked, rule = (
        tiny(tmp_path / "model", "llama", attention=attention),
        [ASKED[2], ASKED[5]],
        {"threshold": 0.5},
    )
    want = reference(model, asked, 4, **rule)
    assert iterated(want) > 0.3
    with serve(model, max_num_batched_tokens=32) as served:
        served.model.by_kernel = True
        assert served.model.pool.shared == shared
        assert agree(model, asked, served.ask(asked, 4, [rule] * 2), want, **rule)


def test_warm_up_takes_no_entries(llama, expected, monkeypatch):
    """On a GPU, vLLM warms up with steps that its scheduler does not know."""
    from vllm.v1.worker.cpu_worker import CPUWorker

    stock, ran = CPUWorker.compile_or_warm_up_model, []

    def warm_up(worker):
        ran.append(warm_up_steps(worker.model_runner, worker.execute_model, worker.sample_tokens, num_tokens=20))
        return stock(worker)

    monkeypatch.setattr(CPUWorker, "compile_or_warm_up_model", warm_up)
    with serve(llama, hf_overrides={"policy": "always"}) as served:
        served.check_pool()
        assert ran == [True] and served.model.pool.free == served.model.pool.capacity
        rule = {"policy": "decider"}
        assert agree(llama, ASKED[:2], served.ask(ASKED[:2], NEW, [rule] * 2), expected[:2])


def test_errors_name_the_field(llama):
    """Also where vLLM drops the parameter of its error."""
    with serve(llama) as served:
        for rule, says in (({"polcy": "never"}, "polcy is not a field"), ({"threshold": 2}, "threshold=2")):
            with pytest.raises(VLLMValidationError, match=says):
                served.ask(ASKED[:1], 1, [rule])


def test_mixed_is_refused(llama):
    with (
        pytest.raises(ValueError, match="batching='mixed'.*two_pass"),
        serve(llama, additional_config={"batching": "mixed"}),
    ):
        pass
