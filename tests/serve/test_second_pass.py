"""The second pass on any device, with either of vLLM's model runners: one wait for the device, and vLLM's own slots."""

from __future__ import annotations

from collections import Counter
from functools import partial
from itertools import accumulate
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="serving is tested where vLLM is installed: make serve-test")

import torch
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend
from vllm.v1.worker.cpu_worker import CPUWorker

from helpers.checkpoints import TAH2, tiny
from helpers.interpreter import IS_V2
from helpers.serving import agree, iterated, prompts, reference, serve
from helpers.waits import watch_steps, watched
from tah.vllm import model as serving
from tah.vllm import worker as depth_worker
from tah.vllm.attention import DuoAttention
from tah.vllm.deep_layers import Adapter, Share
from tah.vllm.memory import second_pass_bytes

NEW = 12
ASKED = prompts(6, seed=1)
MLP = {"kind": "mlp", "layers": [0, 2, 3], "hidden_dims": [32, 16], "topk": 20}
RULES = [
    {},
    {"policy": "never"},
    {"policy": "always"},
    {"policy": "confidence", "threshold": 0.4},
    {"policy": "random"},
]
NEVER = {"policy": "never"}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("serve") / "llama", "llama", decider=MLP)


@pytest.fixture(params=["two_pass", "mixed"])
def batching(request):
    return {"batching": request.param}


def test_one_wait_per_step(llama, batching, monkeypatch):
    """And none where no request of the step iterates; every tensor has a device."""
    with serve(llama, additional_config=batching, max_num_batched_tokens=64) as served:
        steps = watch_steps(monkeypatch, served.model)
        served.ask(ASKED[: len(RULES)], NEW, RULES)
        served.ask(ASKED[:2], NEW, [NEVER] * 2)
    assert sum(step.taken > 0 for step in steps) >= NEW
    assert {(step.iterates, step.copies) for step in steps} == {(True, 1), (False, 0)}
    assert [step for step in steps if step.waits or step.bare] == []


def test_control_of_the_watch():
    """What the test above finds if the code is as it was."""

    def old(namespace):
        code = compile(
            "x = torch.ones(3, dtype=torch.bool)\ny = x.nonzero()\nz = y.tolist()\nw = y[:, 0][x]",
            "/src/tah/old.py",
            "exec",
        )
        exec(code, namespace)

    with watched() as (bare, waits):
        old({"torch": torch})
    assert list(bare) == ["old.py:1"] and list(waits) == ["old.py:2", "old.py:3", "old.py:4"]


def test_slots_are_those_of_vllm(llama, batching, monkeypatch):
    """Through chunks, preemption and cached prefixes, the host knows where vLLM writes keys."""
    seen = Counter()
    asked, new = ASKED[:3], 40
    options = {"num_gpu_blocks_override": 7, "max_model_len": 128, "max_num_batched_tokens": 64}
    with serve(llama, additional_config=batching, **options) as served:
        run_step, layer = served.model.run_step, served.model.deep_attention[0].stock.layer_name
        runner = served.engine.model_executor.driver_worker.worker.model_runner

        def run(step, depth_one):
            after = get_forward_context().attn_metadata is None  # the runner's call of the model
            by_layer = (
                runner.execute_model_state.slot_mappings_by_layer if after else get_forward_context().slot_mapping
            )
            assert step.slots.tolist() == by_layer[layer][: step.tokens].tolist()
            assert step.places.tolist() == step.positions.tolist()
            seen["steps"] += 1
            return run_step(step, depth_one)

        monkeypatch.setattr(served.model, "run_step", run)
        served.ask(asked, new)
        assert served.preempted > 0
        served.ask(asked, 2)
    assert seen["steps"] > new


@pytest.mark.skipif(not IS_V2, reason="test_same_answers.py has all families with model runner V1")
@pytest.mark.parametrize("family", ["granite", "qwen3_moe"])
def test_families_with_the_second_runner(tmp_path, family):
    """Layers without a residual, inputs with a factor, and experts, which need vLLM's context of a step."""
    model = tiny(tmp_path / family, family, decider=MLP)
    want = reference(model, ASKED, NEW)
    with serve(model, max_num_batched_tokens=64) as served:
        assert agree(model, ASKED, served.ask(ASKED, NEW), want)


def test_fused_layers_are_divided():
    """A layer that is fused in the checkpoint, too: each process has its part of each piece of the outputs."""
    torch.manual_seed(0)
    A, B, x = torch.randn(4, 16), torch.randn(8 + 4 + 4, 4), torch.randn(3, 16)
    found = []
    for number in range(2):
        mine = Share(number, 2)
        adapter = Adapter({"qkv_proj": [(4, mine), (2, mine), (2, mine)]}, 16, Share(0, 1), 4, 0.5)
        adapter.load("qkv_proj", "lora_A", A)
        adapter.load("qkv_proj", "lora_B", B)
        found.append(adapter(x).split([4, 2, 2], dim=1))
    whole = torch.cat([part for pair in zip(*found, strict=True) for part in pair], dim=1)
    torch.testing.assert_close(whole, x @ A.t() @ B.t() * 0.5)


def test_pages_smaller_than_blocks(llama, batching, monkeypatch):
    """The kernels of a GPU may use smaller blocks than the scheduler. Given-up blocks free the right entries."""
    monkeypatch.setattr(CPUAttentionBackend, "get_supported_kernel_block_sizes", staticmethod(lambda *_: [32]))
    rule = {"threshold": 0.5}
    want = reference(llama, ASKED, NEW, **rule)
    assert iterated(want) > 0.3
    few = {"max_model_len": 128, "num_gpu_blocks_override": 100}
    with serve(llama, block_size=64, additional_config=batching | {"deep_kv_share": 0.01}, **few) as served:
        assert (served.model.pages.block, served.model.pages.page) == (64, 32)
        for _ in range(2):
            assert agree(llama, ASKED, served.ask(ASKED, NEW, [rule] * len(ASKED)), want, **rule)


def test_passes_of_few_rows(llama, batching, monkeypatch):
    """Many hard tokens run in several passes, of requests that begin alike and read each other's keys."""
    monkeypatch.setattr(serving, "ROWS", 7)
    asked, rule = prompts(6, seed=3, longest=20, shared=70), {"policy": "always"}
    want = reference(llama, asked, 4, **rule)
    with serve(llama, additional_config=batching) as served:
        run, ran, every, waited = served.model._run_rows, [], served.model.waiting.all, []
        monkeypatch.setattr(served.model, "_run_rows", lambda tokens, x: ran.append(len(x)) or run(tokens, x))
        monkeypatch.setattr(served.model.waiting, "all", lambda: waited.append(len(every()[1])) or every())
        assert agree(llama, asked, served.ask(asked, 4, [rule] * len(asked)), want, **rule)
        assert len(ran) > 20 and max(ran) == 7
        assert bool(waited) == (batching["batching"] == "mixed") and max(waited, default=0) <= 7


def test_norms_that_write_in_place(llama, batching, monkeypatch):
    """As those of GPUs do. vLLM's first layer writes into the embeddings, which the decider reads."""
    stock, wrote = RMSNorm.forward_native, []

    def forward(self, x, residual=None):
        if residual is None:
            return stock(self, x)
        out, total = stock(self, x.clone(), residual.clone())
        wrote.append(1)
        return x.copy_(out), residual.copy_(total)

    monkeypatch.setattr(RMSNorm, "forward_native", forward)
    want = reference(llama, ASKED, NEW)
    assert iterated(want) > 0.05
    with serve(llama, additional_config=batching) as served:
        assert agree(llama, ASKED, served.ask(ASKED, NEW), want)
    assert wrote


def peak(run):
    """Return what `run` returns, and the most bytes that it had allocated at a time."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        out = run()
    events = [one for one in profile.profiler.kineto_results.events() if one.name() == "[memory]"]
    changes = [one.nbytes() for one in sorted(events, key=lambda one: one.start_ns())]
    return out, max(accumulate(changes, initial=0))


@pytest.mark.skipif(IS_V2, reason="the same code with both model runners")
@pytest.mark.parametrize("fields", [{"decider": MLP}, {}, TAH2], ids=["mlp", "lean", "tah2"])
def test_its_working_memory_is_bounded(tmp_path, monkeypatch, fields, batching):
    """Without attention, which gathers keys on a CPU only. A pass of mixed depths has depth 1 in it."""
    model, seen, mixed = tiny(tmp_path / "model", "llama", **fields), [], batching["batching"] == "mixed"
    monkeypatch.setattr(DuoAttention, "_duo", lambda self, query, key, value, deep: query.clone())
    options = {"max_num_batched_tokens": 256, "additional_config": batching}
    with serve(model, **options) as served:
        run_step = served.model.run_step

        def run(step, depth_one):
            if mixed:
                counted = bool(served.model.waiting)
                hidden, most = peak(lambda: run_step(step, depth_one))
            else:
                made, counted = depth_one(), True
                hidden, most = peak(lambda: run_step(step, lambda: made))
            if counted:
                seen.append((step.tokens, most))
            return hidden

        monkeypatch.setattr(served.model, "run_step", run)
        rules = [{"policy": policy, "threshold": 0.0} for policy in ("decider", "confidence")]
        for rule in rules:
            served.ask(prompts(8 if mixed else 4, seed=2), 2, [rule] * (8 if mixed else 4))
        config = served.model.config
    tokens, most = max(seen, key=lambda one: one[1])
    assert tokens > 64
    bound = second_pass_bytes(config, options["max_num_batched_tokens"], 8, 4, mixed=mixed)
    print(f"{tokens} tokens needed {most} bytes, of {bound}")
    assert bound / 5 < most < bound


def test_a_gpu_keeps_room_for_it(llama, batching, monkeypatch):
    """Beside the pool, unless the bytes of the cache are given."""
    monkeypatch.setattr(CPUWorker, "determine_available_memory", lambda self: 1 << 30)
    with serve(llama, additional_config=batching) as served:
        worker = served.engine.model_executor.driver_worker.worker
        worker.cache_config.kv_cache_memory_bytes = None  # what a GPU's default is
        on_cpu = worker.determine_available_memory()
        monkeypatch.setattr(depth_worker, "current_platform", SimpleNamespace(is_cpu=lambda: False))
        kept = (on_cpu - worker.determine_available_memory()) * (1 + worker.share)
        needs = partial(second_pass_bytes, served.model.config, worker.scheduler_config.max_num_batched_tokens, 8, 4, 1)
        expected = needs(batching["batching"] == "mixed")
        assert abs(kept - expected) < 4 and expected > 10**6
        assert needs(True) > needs(False)

        def planned(worker):  # as vLLM does if it has kept the plan of an earlier start
            worker.cache_config.kv_cache_memory_bytes = 1 << 30
            return 1 << 30

        monkeypatch.setattr(CPUWorker, "determine_available_memory", planned)
        assert (on_cpu - worker.determine_available_memory()) * (1 + worker.share) == pytest.approx(kept)
        assert worker.determine_available_memory() == on_cpu  # the bytes are given from here on


def test_a_wrapped_model(llama, batching):
    """On a GPU, the runner's model is inside a wrapper that passes on what is read, and not what is written."""

    class Wrapper:
        def __init__(self, inner):
            self.__dict__["inner"] = inner

        def __getattr__(self, name):
            return getattr(self.inner, name)

        def __call__(self, *args, **options):
            return self.inner(*args, **options)

    want = reference(llama, ASKED, NEW)
    with serve(llama, additional_config=batching) as served:
        runner = served.engine.model_executor.driver_worker.worker.model_runner
        inner = runner.model
        runner.get_model = lambda: inner
        runner.model = Wrapper(inner)
        assert agree(llama, ASKED, served.ask(ASKED, NEW), want)
        served.check_pool()


def test_a_step_of_vllms_own(llama, batching, monkeypatch):
    """Steps that vLLM makes up, as one process of several does while another has requests, have no second pass."""
    want = reference(llama, ASKED, NEW)
    with serve(llama, additional_config=batching) as served, monkeypatch.context() as patch:
        worker, step, ran = served.engine.model_executor.driver_worker.worker, served.engine.step, []

        def and_one_of_its_own():
            ran.append(worker.execute_dummy_batch())
            return step()

        patch.setattr(served.engine, "step", and_one_of_its_own)
        assert agree(llama, ASKED, served.ask(ASKED, NEW), want)
        assert len(ran) >= NEW
