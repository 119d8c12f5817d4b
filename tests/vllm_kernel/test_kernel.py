"""The Triton kernel of depth 2 on a machine without a GPU: interpreted, compiled, and where it cannot run.

Triton decides at its first import whether it interprets kernels. So all that needs Triton runs in processes of their
own, and no other test notices.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from tah.vllm.kernel import choose_splits, duo_attention, tile

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="Triton is not installed; `make serve-env` installs it"
)


def python(*arguments: str, **env: str) -> subprocess.CompletedProcess:
    path = os.pathsep.join([str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | {"PYTHONPATH": path} | env
    return subprocess.run([sys.executable, *arguments], env=env, capture_output=True, text=True)


@needs_triton
@pytest.mark.timeout(900)
def test_in_the_interpreter():
    """Every test of `interpreted.py`."""
    name, options = str(HERE / "interpreted.py"), ("-q", "-p", "no:cacheprovider", "--tb=short", "-rs")
    done = python("-m", "pytest", *options, name, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    if "1 skipped" in done.stdout:
        pytest.skip(done.stdout.strip().splitlines()[-2])
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout


@needs_triton
@pytest.mark.skipif(sys.platform != "linux", reason="Triton's assembler is for Linux")
@pytest.mark.parametrize("capability", [80, 90])
def test_it_compiles_for_gpus(capability, tmp_path):
    """With products on matrix units and in shared memory that every GPU since 2020 has; no GPU is needed for that."""
    variants = [(capability, "bf16", K, G, own, not own) for K, G, own in ((64, 8, False), (128, 2, True))]
    variants += [(capability, "fp16", 256, 1, False, False), (capability, "fp32", 128, 2, False, True)]
    env = {"TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    done = python(str(HERE / "compiled.py"), json.dumps(variants), **env)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(row["shared"] <= 99 * 1024 and row["copies"] for row in rows)
    assert [row["matrix units"] for row in rows] == [True, True, True, False]


WITHOUT = """
import sys
for name in ("triton", "vllm"):
    sys.modules[name] = None  # its import fails
import torch
from tah.vllm.kernel import duo_attention
try:
    duo_attention(*[torch.zeros(1)] * 8, 1.0, own=False)
except RuntimeError as error:
    print(error)
"""


def test_it_imports_without_triton_and_vllm():
    done = python("-c", WITHOUT)
    want = "attention of depth 2 on a GPU needs Triton, which is not installed: pip install triton\n"
    assert done.stdout == want, done.stderr


@needs_triton
def test_on_a_cpu_it_says_what_it_needs():
    code = WITHOUT.replace('("triton", "vllm")', '("vllm",)')
    done = python("-c", code, TRITON_INTERPRET="0")
    want = "the Triton kernel of depth 2 needs a GPU, or TRITON_INTERPRET=1 from the start for tests\n"
    assert done.stdout == want, done.stderr


@pytest.mark.skipif(find_spec("triton") is not None, reason="Triton is installed")
def test_a_call_without_triton_is_one_clear_line():
    with pytest.raises(RuntimeError, match="needs Triton, which is not installed: pip install triton"):
        duo_attention(*[torch.zeros(1)] * 8, 1.0, own=False)


def test_splits_fill_a_gpu_and_no_more():
    H200, heads = 132, 8
    assert choose_splits(1, heads, 32768, H200) == 32  # of 264 programs, 33 would be possible
    assert choose_splits(1, heads, 1024, H200) == 4  # at least 256 slots for each
    assert choose_splits(8, heads, 32768, H200) == 4
    assert choose_splits(64, heads, 32768, H200) == choose_splits(1, heads, 100, H200) == 1
    assert choose_splits(1, 1, 131072, H200) == 64
    assert choose_splits(1, heads, 32768, 1) == 1  # a CPU
    found = {choose_splits(M, H, keys, H200) for M in range(1, 70) for H in (1, 3, 8) for keys in range(1, 40000, 77)}
    assert found == {1, 2, 4, 8, 16, 32, 64}


def test_tiles_fit_shared_memory():
    """Keys and values of both depths, twice, since the next tile is read ahead."""
    for width in (16, 32, 64, 128, 256):
        for size in (2, 4):
            assert 16 <= tile(width, size) <= 64 and 4 * tile(width, size) * width * size <= 2**16
