"""Copies between host and device. `to_host` is the only place of the plugin where the host waits. Needs no vLLM."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def to_host(x: Tensor) -> np.ndarray:
    """Return the values of `x` on the host, which waits for the device to compute them."""
    return x.cpu().numpy()


def to_device(array: np.ndarray, device: torch.device) -> Tensor:
    """Return a copy of `array` on `device`, for which the host does not wait; on a CPU the array itself."""
    found = torch.from_numpy(array)
    return found if device.type == "cpu" else found.pin_memory().to(device, non_blocking=True)


def indices(device: torch.device, *arrays: np.ndarray) -> list[Tensor]:
    """Return copies of arrays of integers as int64 tensors on `device`, all of them in one copy.

    Each tensor begins at a multiple of 16 bytes: Triton compiles another kernel for a tensor that does not.
    """
    sizes = [array.size + array.size % 2 for array in arrays]
    packed = np.zeros(sum(sizes), np.int64)
    for array, end, size in zip(arrays, np.cumsum(sizes), sizes, strict=True):
        packed[end - size : end - size + array.size] = array.ravel()
    parts = to_device(packed, device).split(sizes)
    return [part[: array.size].view(array.shape) for part, array in zip(parts, arrays, strict=True)]
