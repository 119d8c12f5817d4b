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
    """Return arrays of integers as int64 tensors on `device`, all of them in one copy."""
    if device.type == "cpu":
        return [torch.from_numpy(array.astype(np.int64)) for array in arrays]
    packed = to_device(np.concatenate([array.ravel() for array in arrays]).astype(np.int64), device)
    parts = packed.split([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]
