"""A server that would compute something else does not start, says what differs, and writes what it saw."""

from __future__ import annotations

import copy
import json
import os

import pytest

pytest.importorskip("vllm", reason="serving is tested where vLLM is installed: make serve-test")

from vllm.v1.worker.cpu_worker import CPUWorker

from helpers.checkpoints import TAH2, tiny
from helpers.interpreter import IS_V2
from helpers.servers import START, TAH, free_port, started
from helpers.serving import agree, prompts, reference, serve
from tah.vllm import compat, self_check
from tah.vllm.mixture import StepMixture
from tah.vllm.model import TaHForCausalLM
from tah.vllm.self_check import Comparison, SelfCheckError, check

NEW = 12
ASKED = prompts(4, seed=1)
ON = {"self_check": True}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("serve") / "llama", "llama")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TAH_CACHE", str(tmp_path))
    return tmp_path / "self-check"


@pytest.fixture(scope="module", params=["two_pass", "mixed"])
def served(llama, request):
    """An engine that has not checked itself."""
    with serve(llama, additional_config={"batching": request.param}) as served:
        yield served


@pytest.fixture
def few(llama):
    """An engine whose cache is small: on a CPU, each call of the kernel copies it."""
    with serve(llama, num_gpu_blocks_override=12) as served:
        yield served


@pytest.fixture
def worker(served, cache):
    return served.engine.model_executor.driver_worker.worker


@pytest.fixture
def runs(monkeypatch):
    """Counts how often the check runs."""
    run, seen = Comparison.run, []

    def counted(self):
        seen.append(self)
        return run(self)

    monkeypatch.setattr(Comparison, "run", counted)
    return seen


def saw(cache):
    """What the one file says."""
    (path,) = cache.iterdir()
    return json.loads(path.read_text())


def as_before(served):
    """Whether cache and pool are as if nothing had run."""
    served.check_pool()
    pool = served.model.pool
    caches = [layer.stock.kv_cache for layer in served.model.deep_attention]
    clean = not any(x.any() for x in (pool.keys, pool.values, *caches))
    return clean and pool.free == pool.capacity and not served.model.waiting.left and served.model.report is None


def test_a_healthy_start_is_remembered(llama, cache, runs, monkeypatch):
    want = reference(llama, ASKED, NEW)
    with serve(llama, additional_config=ON) as served:
        assert as_before(served)
        assert agree(llama, ASKED, served.ask(ASKED, NEW), want)
    found = saw(cache)
    assert len(runs) == 1 and found["passed"] and found["differences"] == []
    assert sum(len(one["ids"]) for one in found["answers"]) == 64
    half, usual = found["answers"]
    assert 10 < half["depths"].count(2) < 30 and half["rule"]["policy"] == "decider" and usual["rule"] == {}
    assert max(half["difference of log-probabilities"]) < 1e-3
    with serve(llama, additional_config=ON, hf_overrides={"policy": "confidence", "threshold": 0.9}) as served:
        assert len(runs) == 1  # requests may choose these, too
        worker = served.engine.model_executor.driver_worker.worker
        for name in ("VLLM_VERSION", "_sources"):  # another version of vLLM, or of this plugin
            monkeypatch.setattr(self_check, name, "other" if name.isupper() else lambda: "other")
            check(worker)
            check(worker)
        assert len(runs) == 3 and len(list(cache.iterdir())) == 3
        other = copy.deepcopy(served.model.config)
        other.mix_topk -= 1
        assert self_check._configuration(other) != self_check._configuration(served.model.config)


def test_a_bad_start_is_refused(llama, cache, runs, monkeypatch):
    """And tried again at the next start."""
    options = {"additional_config": ON | {"batching": "two_pass"}}
    with monkeypatch.context() as patch:
        patch.setattr(self_check, "_allowed", lambda measured, least: 0 * measured - 1)  # no rounding
        with (
            pytest.raises(SelfCheckError, match="best next token after token 0 of self-check-half") as error,
            serve(llama, **options),
        ):
            pass
    found = saw(cache)
    assert "\n" not in str(error.value) and str(next(cache.iterdir())) in str(error.value)
    assert not found["passed"] and len(found["differences"]) == 64 and ", and 61 more." in str(error.value)
    with serve(llama, **options):
        assert saw(cache)["passed"] and len(runs) == 2


BREAK = """
import importlib.abc, importlib.util, sys

class Broken(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "tah.vllm.self_check":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        run = spec.loader.exec_module
        spec.loader.exec_module = lambda module: (run(module), setattr(module, "_allowed", lambda x, least: 0 * x - 1))
        return spec

sys.meta_path.insert(0, Broken())
"""


@pytest.mark.timeout(900)  # a server with its engine in another process, minutes on a busy machine
@pytest.mark.skipif(IS_V2, reason="a server with Triton's interpreter takes too long")
def test_a_server_ends_in_one_line(llama, cache, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BREAK)  # in each process, the check allows no rounding
    environment, log = {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}, tmp_path / "log.txt"
    options = {"max_model_len": 256, "host": "127.0.0.1", "port": free_port()}
    with started([*TAH, "serve", str(llama)], log, environment, **options) as process:
        assert process.wait(START) == 1
    (line,) = (line for line in log.read_text().splitlines() if line.startswith("tah: "))
    assert line == f"tah: {saw(cache)['message']}" and str(next(cache.iterdir())) in line


def test_left_out(llama, cache, runs):
    with serve(llama, additional_config={"self_check": False}):
        assert not runs and not cache.exists()
    with (
        pytest.raises(ValueError, match="self_check=0 in --additional-config must be true or false"),
        serve(llama, additional_config={"self_check": 0}),
    ):
        pass


def test_what_is_broken_is_named(worker, served, cache, monkeypatch):
    """The control is the last one, of the same engine."""

    def broken(says):
        with pytest.raises(SelfCheckError, match=says):
            check(worker)
        assert not saw(cache)["passed"] and as_before(served)

    with monkeypatch.context() as patch:  # values where keys should be
        read = compat.read_blocks
        patch.setattr(compat, "read_blocks", lambda *given: [x.transpose(-1, -2) for x in read(*given)][::-1])
        broken("the layout of the KV cache in layer 0")
    with monkeypatch.context() as patch:  # one weight of an adapter
        linear = served.model.deep_layers[1].self_attn.qkv_proj
        other = copy.deepcopy(linear.adapter)
        other.B.data[0, -1] += 1
        patch.setitem(linear._modules, "adapter", other)
        broken(r"(log-probabilities|best next token) after token \d+ of self-check-half \(depth 2\)")
    with monkeypatch.context() as patch:  # one decision of each step
        decide = served.model._decide

        def flipped(*given):
            go, probability = decide(*given)
            go[0] = not go[0]
            return go, probability

        patch.setitem(served.model.__dict__, "_decide", flipped)
        broken(r"the decision of token \d+ of self-check-(half|usual): depth")
    with monkeypatch.context() as patch:  # depth 2 one position too late
        layer = served.model.deep_layers[0].self_attn
        forward = type(layer).forward
        late = lambda positions, hidden_states: forward(layer, positions + 1, hidden_states)  # noqa: E731
        patch.setitem(layer.__dict__, "forward", late)
        broken("self-check-half")
    check(worker)
    assert saw(cache)["passed"]


@pytest.mark.skipif(not IS_V2, reason="the kernel needs Triton's interpreter from the start: make serve-test-v2")
def test_the_kernel_over_real_blocks(few, cache, monkeypatch):
    from tah.vllm import kernel

    served, worker = few, few.engine.model_executor.driver_worker.worker
    stock = kernel.duo_attention
    monkeypatch.setattr(served.model, "by_kernel", True)
    check(worker)
    (found,), long = saw(cache)["kernel"], saw(cache)["kernel, long"]
    assert found["tokens"] > 10 and max(found["largest by layer"]) < 1e-5
    assert long["slots"] > 4 * 64 and long["positions"][-1] > 192 and long["entries"] > 100
    assert list(long["largest by splits"]) == ["1", "2", "8"] and max(long["largest by splits"].values()) < 1e-5

    def refused(name, broken, says):
        monkeypatch.setattr(self_check, "VLLM_VERSION", name)
        monkeypatch.setattr(kernel, "duo_attention", broken)
        with pytest.raises(SelfCheckError, match=says):
            check(worker)
        assert as_before(served)

    refused(
        "other", lambda *given: stock(*given) * 1.001, "the kernel of depth 2 in layer 0: its output is off by 0.001 "
    )

    def split(*given):  # a fault of split keys only, which the short requests have not
        return stock(*given) * (1.1 if given[-1] not in (None, 1) else 1)

    refused(
        "third", split, "^this server .*: the kernel of depth 2 in layer 2 with 2 programs for each head: its output"
    )


@pytest.mark.skipif(not IS_V2, reason="the kernel needs Triton's interpreter from the start: make serve-test-v2")
def test_the_kernel_is_warmed_up(llama, monkeypatch):
    """In all variants that requests and the check use, before vLLM begins to report compilations."""
    from tah.vllm import kernel

    stock, prepare, seen, before = kernel.duo_attention, TaHForCausalLM.prepare, [], []
    vllms = CPUWorker.compile_or_warm_up_model

    def attend(*given):
        seen.append((len(given[0]), given[-1]))
        return stock(*given)

    def prepared(model, *given):
        prepare(model, *given)
        model.by_kernel = True

    monkeypatch.setattr(kernel, "duo_attention", attend)
    monkeypatch.setattr(TaHForCausalLM, "prepare", prepared)
    monkeypatch.setattr(CPUWorker, "compile_or_warm_up_model", lambda self: before.append(len(seen)) or vllms(self))
    with serve(llama, num_gpu_blocks_override=12) as served:
        every = {1, 2, 4, 8, 16, 32, 64}
        assert {splits for _, splits in seen} == every >= set(self_check.LONG_SPLITS) and (2, 1) in seen
        assert before == [len(seen)]
        assert as_before(served)


@pytest.mark.parametrize(("dtype", "family"), [("bfloat16", "qwen3"), ("float16", "llama")])
def test_half_precision_passes(tmp_path, cache, dtype, family):
    """With a decider that reads inner layers, little room and one request at a time."""
    config = {"decider": {"kind": "mlp", "layers": [0, 2, 3], "hidden_dims": [32, 16], "topk": 20}}
    model = tiny(tmp_path / family, family, **config)
    few = {"max_num_seqs": 1, "max_num_batched_tokens": 16, "max_model_len": 128, "num_gpu_blocks_override": 5}
    with serve(model, dtype=dtype, additional_config=ON, **few) as served:
        assert as_before(served)
    assert saw(cache)["passed"]


@pytest.mark.parametrize("fields", [{}, {"output": "even"}, {"decision": "sample", "random_seed": 3}], ids=str)
def test_tah2_checks_itself(tmp_path, cache, monkeypatch, fields):
    """With the weights of its mixture, and with decisions that are drawn."""
    model = tiny(tmp_path / "model", "llama", **TAH2 | fields)
    batching = "mixed" if fields else "two_pass"
    options = {"additional_config": ON | {"batching": batching}}
    with monkeypatch.context() as patch:
        add = StepMixture.add
        patch.setattr(StepMixture, "add", lambda self, index, second, p: add(self, index, -second, p))
        with (
            pytest.raises(SelfCheckError, match=r"after token \d+ of self-check-half \(depth 2\)"),
            serve(model, **options),
        ):
            pass
    with serve(model, **options) as served:
        assert as_before(served)
    found = saw(cache)
    assert found["passed"] and all(0 < one["depths"].count(2) < len(one["ids"]) for one in found["answers"][:1])
