"""Two processes train as one does, also where one of them has no hard token. Real processes, gloo on CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distributed import alone
from models import distance

HERE = Path(__file__).parent


def torchrun(*command: str, timeout: float = 180) -> subprocess.CompletedProcess:
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "0"]
    launch += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", *command]
    paths = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run(launch, capture_output=True, text=True, env=env, timeout=timeout)


@pytest.mark.parametrize("case", ["ddp", "fsdp2"])
def test_two_ranks_equal_one(case, tmp_path):
    """Loss and every gradient of 2 ranks x 1 row = 1 rank x 2 rows; nobody waits for a rank without hard tokens."""
    done = torchrun(str(HERE / "distributed.py"), case, str(tmp_path / "out.pt"))
    assert done.returncode == 0, done.stderr[-2000:]
    got, want = torch.load(tmp_path / "out.pt"), alone()
    assert got.keys() == want.keys() and len(want) > 20
    assert got["loss"].item() == pytest.approx(want["loss"].item(), rel=1e-5)
    for name in want:
        assert distance(got[name], want[name]) < 1e-4, name


def test_control_without_idle_passes(tmp_path):
    """Without idle passes the ranks' collectives no longer match, so the test above can fail."""
    done = torchrun(str(HERE / "distributed.py"), "starve", str(tmp_path / "out.pt"))
    assert done.returncode != 0
    assert "Signal" in done.stderr or "reduction" in done.stderr
