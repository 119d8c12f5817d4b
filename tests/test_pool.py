"""The pool of depth 2 and the copies between host and device: on a GPU, and with the two tables of a GPU on a CPU.

pytest -m gpu tests/test_pool.py
"""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import pytest
import torch

from tah.vllm.pool import DeepPool
from tah.vllm.transfer import indices, to_device, to_host

SLOTS = 64
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA GPU"),
        ],
    ),
]


@pytest.fixture(params=DEVICES)
def device(request):
    return torch.device(request.param)


@contextmanager
def no_waits(device):
    """An error where the host waits for a GPU; nothing on a CPU."""
    if device.type == "cpu":
        yield
        return
    to_host(to_device(np.zeros(1), device))  # the first copy allocates
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_indices_of_several_shapes_and_types(device):
    arrays = [
        np.arange(3),
        np.array([[1, -1], [5, 6], [7, 8]], np.int32),
        np.zeros((2, 0), np.int64),
        np.array([True, False, True]),
        np.arange(24).reshape(2, 3, 4).transpose(2, 0, 1)[:, ::-1],  # not contiguous
        np.array([2**40]),
    ]
    before = [array.copy() for array in arrays]
    with no_waits(device):
        found = indices(device, *arrays)
    assert all(x.dtype == torch.int64 and x.device.type == device.type and x.is_contiguous() for x in found)
    assert all(x.data_ptr() % 16 == found[0].data_ptr() % 16 for x in found if x.numel())
    for x, array in zip(found, arrays, strict=True):
        np.testing.assert_array_equal(to_host(x), array)
        x.add_(1)
    assert all(map(np.array_equal, arrays, before))  # they are copies


def test_the_table_of_the_device_follows_the_table_of_the_host(device):
    """Slots that are released and taken several times between two copies, some of them in the same step."""
    draw = np.random.default_rng(0)
    pool = DeepPool(1, 40, 1, 4, SLOTS, torch.float32, device, shared=False)
    assert DeepPool(1, 40, 1, 4, SLOTS, torch.float32, device).shared == (device.type == "cpu")
    assert pool.entry_of_slot.data_ptr() != torch.from_numpy(pool.entries).data_ptr()
    seen = []
    with no_waits(device):
        for _ in range(20):
            for _ in range(draw.integers(1, 4)):
                slots = draw.choice(SLOTS, 10, replace=False)
                held = slots[pool.entries[slots] >= 0]
                assert set(pool.release(slots).tolist()) == set(held.tolist())
                pool.take(slots[: min(len(slots), pool.free)])
            pool.flush()
            seen.append((pool.entry_of_slot.clone(), pool.entries.copy()))
            assert not pool.changed
    for on_device, on_host in seen:
        np.testing.assert_array_equal(to_host(on_device), on_host)
        entries = on_host[on_host >= 0]
        assert len(set(entries.tolist())) == len(entries) > 10


def test_a_shared_table_needs_no_copy():
    pool = DeepPool(1, 4, 1, 4, SLOTS, torch.float32, torch.device("cpu"))
    entries = pool.take(np.array([3, 9]))
    assert pool.entry_of_slot[[3, 9]].tolist() == entries.tolist() and not pool.changed
