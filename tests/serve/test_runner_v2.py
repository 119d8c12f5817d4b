"""vLLM's model runner V2, which GPUs have: the answers of `generate`, whatever a step is. `make serve-test-v2`."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from functools import partial

import pytest

pytest.importorskip("vllm", reason="serving is tested where vLLM is installed: make serve-test")

import torch
from vllm.exceptions import VLLMValidationError
from vllm.forward_context import set_forward_context
from vllm.v1.worker.gpu import model_runner
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager
from vllm.v1.worker.gpu.warmup import run_mixed_prefill_decode_warmup as warm_up_steps

from helpers.checkpoints import tiny
from helpers.interpreter import IS_V2
from helpers.serving import Answer, agree, answer, iterated, prompts, reference, serve
from tah import TaHForCausalLM
from tah.vllm import graphs
from tah.vllm import model as serving
from tah.vllm.graphs import PassGraph, PassGraphs

pytestmark = pytest.mark.skipif(not IS_V2, reason="model runner V2 needs a process of its own: make serve-test-v2")

NEW = 12
ASKED = prompts(6, seed=1)
MLP = {"kind": "mlp", "layers": [0, 2, 3], "hidden_dims": [32, 16], "topk": 20}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("serve") / "llama", "llama")


@pytest.fixture(params=["two_pass", "mixed"])
def batching(request):
    return {"batching": request.param}


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


def test_tokens_that_wait(llama, expected, monkeypatch):
    """Chunks of prompts and then cached blocks; a step has one pass."""
    passes = Counter()
    with serve(llama, max_num_batched_tokens=16, additional_config={"batching": "mixed"}) as served:
        model = served.model
        run_step, mixed, alone, decoder = model.run_step, model._run_mixed, model._run_rows, model.decoder.forward
        monkeypatch.setattr(model, "run_step", lambda *given: passes.update(["steps"]) or run_step(*given))
        monkeypatch.setattr(model, "_run_mixed", lambda *given: passes.update(["mixed"]) or mixed(*given))
        monkeypatch.setattr(model, "_run_rows", lambda *given: passes.update(["alone"]) or alone(*given))
        monkeypatch.setattr(model.decoder, "forward", lambda *given: passes.update(["depth 1"]) or decoder(*given))
        for _ in range(2):
            assert agree(llama, ASKED, served.ask(ASKED, NEW), expected)
    assert passes["steps"] == passes["mixed"] + passes["depth 1"]
    assert passes["mixed"] > 2 * NEW and passes["depth 1"] > 10 and not passes["alone"]


@pytest.mark.parametrize("rule", [{}, {"policy": "always"}], ids=["decider", "always"])
def test_answers_of_a_token_or_two(llama, rule):
    """Requests that end while tokens wait, or as soon as their last token has run a second time."""
    want = reference(llama, ASKED, 2, **rule)
    with serve(llama, max_num_batched_tokens=48, additional_config={"batching": "mixed"}) as served:
        for new in (1, 2):
            short = [Answer(one.tokens[:new], one.depths[: len(one.depths) + new - 2]) for one in want]
            assert agree(llama, ASKED, served.ask(ASKED, new, [rule] * len(ASKED)), short, **rule)


PENALTIES = {"presence_penalty": 0.7, "frequency_penalty": 0.6, "repetition_penalty": 1.3}


@torch.no_grad()
def test_sampled_answers(llama):
    """A seed draws the same tokens either way: by the position, and with penalties for each token once.

    Depths and log-probabilities are the model's.
    """
    model, prompt, said = TaHForCausalLM.from_pretrained(llama, dtype=torch.float32).eval(), ASKED[2], []
    for batching in ("two_pass", "mixed"):
        with serve(llama, max_num_batched_tokens=32, additional_config={"batching": batching}) as served:
            options = {"temperature": 1.0, "seed": 5, "logprobs": 0}
            params = [
                served.params(NEW, n=3, **options),
                served.params(NEW, {"threshold": 0.5}, **options, **PENALTIES),
                served.params(NEW, {"policy": "always"}, prompt_logprobs=0, **options),
            ]
            outs = served.llm.generate([{"prompt_token_ids": prompt}] * len(params), params, use_tqdm=False)
            served.check_pool()
        said.append([[(list(one.token_ids), one.routed_experts.tolist()) for one in out.outputs] for out in outs])
        assert len({tuple(one.token_ids) for one in outs[0].outputs}) == 3
        for out, asked in zip(outs, params, strict=True):
            for one in out.outputs:
                text = torch.tensor([prompt + list(one.token_ids)])
                again = model(text[:, :-1], **asked.extra_args or {})
                want = again.logits[0].log_softmax(-1).gather(1, text[0, 1:, None]).squeeze(1)
                got = [entry[token].logprob for token, entry in zip(one.token_ids, one.logprobs, strict=True)]
                assert torch.allclose(torch.tensor(got), want[len(prompt) - 1 :], atol=1e-3)
                assert one.routed_experts.tolist() == again.depth_count[0].tolist()
        got = [entry[token].logprob for token, entry in zip(prompt[1:], outs[2].prompt_logprobs[1:], strict=True)]
        assert torch.allclose(torch.tensor(got), want[: len(prompt) - 1], atol=1e-3)
    assert said[0] == said[1] and said[0][1] != said[0][2]


def test_few_blocks(llama, batching):
    """Requests are preempted, and the runner gets them back as new ones."""
    asked, new = ASKED[:3], 40
    want = reference(llama, asked, new)
    options = {"num_gpu_blocks_override": 7, "max_model_len": 128, "max_num_batched_tokens": 64}
    with serve(llama, additional_config=batching, **options) as served:
        assert agree(llama, asked, served.ask(asked, new), want)
        assert served.preempted > 0


def test_few_deep_entries(llama, batching):
    rule = {"threshold": 0.5}
    want = reference(llama, ASKED, NEW, **rule)
    assert iterated(want) > 0.4
    options = {"max_model_len": 128, "num_gpu_blocks_override": 100}
    with serve(llama, additional_config=batching | {"deep_kv_share": 0.01}, **options) as served:
        assert served.model.pool.capacity == 128  # the longest request alone
        assert agree(llama, ASKED, served.ask(ASKED, NEW, [rule] * len(ASKED)), want, **rule)
        assert served.preempted > 0


def test_steps_padded_as_for_graphs(tmp_path, monkeypatch, batching):
    """Only the real rows count, with a decider that reads inner layers and logits. Mixed depths have no graph."""
    model, padded, mixed = tiny(tmp_path / "model", "llama", decider=MLP), [], batching["batching"] == "mixed"
    want, stock = reference(model, ASKED, NEW), CudaGraphManager.dispatch
    assert iterated(want) > 0.05

    def dispatch(manager, num_reqs, num_toks, *args, **options):
        how = stock(manager, num_reqs, num_toks, *args, **options)
        more = {"num_reqs": 8} if num_toks == num_reqs else {}
        padded.append(num_toks % 16 > 0)
        return replace(how, num_tokens=-(-num_toks // 16) * 16, **more)

    monkeypatch.setattr(CudaGraphManager, "dispatch", dispatch)
    with serve(model, max_num_batched_tokens=64, block_size=64, additional_config=batching) as served:
        assert served.model.pages.page == 64
        forward, shapes = served.model.forward, []

        def watched(input_ids, positions, **more):
            shapes.append((bool(served.model.waiting), len(input_ids) % 16 == 0))
            return forward(input_ids=input_ids, positions=positions, **more)

        monkeypatch.setattr(served.model, "forward", watched)
        padded.clear()
        assert agree(model, ASKED, served.ask(ASKED, NEW), want)
    assert sum(padded) >= (5 if mixed else NEW)
    assert {is_padded for waits, is_padded in shapes if not waits} == {True}
    assert (False in {is_padded for waits, is_padded in shapes if waits}) == mixed


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


@pytest.mark.parametrize(
    ("attention", "shared", "how"), [("duo", False, "two_pass"), ("own", True, "two_pass"), ("duo", False, "mixed")]
)
def test_the_kernel_attends(tmp_path, monkeypatch, attention, shared, how):
    """As on a GPU, over a row-major copy of the CPU's cache: chunks of prompts, and decoding.

    A GPU has a table of the entries of its own, which the host brings up to date.
    """
    monkeypatch.setattr(serving, "DeepPool", partial(serving.DeepPool, shared=shared))
    model, rule = tiny(tmp_path / "model", "llama", attention=attention), {"threshold": 0.5}
    asked = prompts(2, seed=4, longest=12) if how == "mixed" else [ASKED[2], ASKED[5]]
    want = reference(model, asked, 4, **rule)
    assert iterated(want) > 0.3
    with serve(model, max_num_batched_tokens=32, additional_config={"batching": how}) as served:
        served.model.by_kernel = True
        assert served.model.pool.shared == shared
        assert agree(model, asked, served.ask(asked, 4, [rule] * 2), want, **rule)


def computed_again(compute):
    """What stands for a recorded graph on a CPU."""
    out = compute()
    return lambda: out.copy_(compute()), out


@pytest.mark.parametrize("attention", ["duo", "own"])
def test_second_passes_of_a_fixed_number_of_rows(tmp_path, monkeypatch, attention):
    """As with the graphs of a GPU: a pass has the rows of its graph, and one with too many tokens has no graph."""
    model, rule, ran = tiny(tmp_path / "model", "llama", attention=attention), {"threshold": 0.5}, []
    asked = prompts(3, seed=4, longest=12)
    want = reference(model, asked, 4, **rule)
    assert iterated(want) > 0.3
    monkeypatch.setattr(graphs, "SIZES", (1, 4, 16))
    stock = PassGraph.run
    monkeypatch.setattr(
        PassGraph, "run", lambda graph, deep, x: ran.append((len(x), len(graph.x))) or stock(graph, deep, x)
    )
    with serve(model, max_num_batched_tokens=32) as served:
        served.model.by_kernel = True
        config = served.engine.vllm_config
        with torch.inference_mode(), set_forward_context(None, config, num_tokens=4):
            served.model.graphs = PassGraphs(served.model, config.model_config.max_model_len, 3, computed_again)
        alone, run_pass = [], served.model.run_pass
        monkeypatch.setattr(served.model, "run_pass", lambda deep, x: alone.append(len(x)) or run_pass(deep, x))
        assert sorted(served.model.graphs.by_size) == [1, 4]
        assert agree(model, asked, served.ask(asked, 4, [rule] * 3), want, **rule)
        served.check_pool()
    assert {(1, 1), (2, 4)} <= set(ran) and all(size == (1 if rows == 1 else 4) for rows, size in ran)
    assert max(alone) > 4


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
