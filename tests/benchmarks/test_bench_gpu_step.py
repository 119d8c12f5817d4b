"""The steps that `benchmark/bench_gpu_step.py` times are the same computation in different batches."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[2] / "benchmark" / "bench_gpu_step.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("bench_gpu_step", SCRIPT)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tiny(script):
    return script.Shape(layers=2, D=32, H=2, G=2, K=16, inner=48, V=150, rank=4)


@torch.no_grad()
def test_a_mixed_step_is_both_passes_at_once(script, tiny):
    def fresh():
        return script.Decoder(tiny, 6, seen=20, deep=3, dtype=torch.float32, device="cpu")

    rows, others = torch.tensor([1, 4]), [0, 2, 3, 5]
    x = torch.randn(6, tiny.D, generator=torch.Generator().manual_seed(1))
    apart, together = fresh(), fresh()
    base = apart.base(x)
    deep = apart.again(base, rows)
    for own, cache in zip(together.cache, apart.cache, strict=True):
        own[:, rows, :, -1] = cache[:, rows, :, -1]  # of an earlier step: their keys of depth 1
    mixed, following = together.mixed(x.index_copy(0, rows, apart.next_input(base[rows])), rows)
    assert torch.allclose(mixed[others], base[others], atol=1e-4) and torch.allclose(mixed[rows], deep, atol=1e-4)
    assert torch.allclose(following, apart.next_input(deep), atol=1e-4)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(apart.cache, together.cache, strict=True))
    assert (deep - base[rows]).abs().max() > 0.1  # the control: depth matters


def test_table_and_choice(script, tiny):
    rows = script.measure(tiny, (1, 16), seen=20, device="cpu", dtype=torch.float32, repeats=2)
    assert [(row["batch"], row["iterating"]) for row in rows] == [(1, 1), (16, 1)]
    assert all(row[name] > 0 for row in rows for name in ("base", "deep", "mixed"))
    table = script.markdown(rows).splitlines()
    assert len(table) == 2 + 2 + 2 and table[-1].startswith("auto: ")


def test_costs(script):
    """At f = 7 %: a second pass as dear as a step costs 1 + p, and mixing costs nothing but the steps."""
    found = script.costs(32, base=10.0, deep=10.0, mixed=10.0)
    assert found == pytest.approx({"two_pass": 2 - 0.93**32, "mixed cost": 1.07})
    rows = [{"batch": batch, **script.costs(batch, 10.0, 10.0, 11.0)} for batch in (1, 8, 32)]
    assert script.choice(rows) == "auto: mixed at batches 8, 32; else two_pass"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    message = done.stderr.splitlines()[-1]  # torchao, which transformers imports, warns before
    assert (done.returncode, done.stdout, message) == (2, "", "bench_gpu_step: this machine has no CUDA GPU")
