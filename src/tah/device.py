"""Where a model computes, and in which precision: what `--device auto` and `--dtype auto` mean.

The decisions are functions of plain facts about the machine, so that tests can make them for machines of any kind.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import Any

import torch

from .errors import first_line
from .progress import SILENT, Reporter

HARDWARE = {"cuda": "this GPU", "mps": "this Mac's GPU", "cpu": "this CPU"}  # what errors and notes call it


@dataclass(frozen=True)
class Machine:
    """What a machine can do.

    Args:
        cuda: it has a GPU that torch's CUDA (or ROCm) build can use.
        mps: it has a GPU of Apple's.
        bfloat16: kinds of devices that multiply bfloat16 in hardware.
        other: further kinds of devices that this torch computes on.
    """

    cuda: bool = False
    mps: bool = False
    bfloat16: tuple[str, ...] = ()
    other: tuple[str, ...] = ()

    @classmethod
    def here(cls) -> Machine:
        """This one."""
        cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
        able = {
            "cuda": cuda and torch.cuda.is_bf16_supported(including_emulation=False),
            "mps": mps and torch.backends.mps.is_macos_or_newer(14, 0),
            "cpu": _cpu_has_bfloat16(),
        }
        current = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        other = () if current is None or current.type in HARDWARE else (current.type,)
        return cls(cuda, mps, tuple(kind for kind, has in able.items() if has), other)

    def choose_device(self) -> str:
        """What `auto` means: CUDA, then MPS, then the CPU."""
        return "cuda" if self.cuda else "mps" if self.mps else "cpu"

    def choose_dtype(self, kind: str, saved: torch.dtype) -> torch.dtype:
        """What `auto` means for a checkpoint that was saved in `saved`: that where a device of this kind computes in it
        natively, else float32."""
        if saved == torch.float32 or kind in self.other:  # other kinds may have any formats, so nothing changes
            return saved
        native = {
            torch.bfloat16: kind in self.bfloat16,
            torch.float16: kind in ("cuda", "mps"),  # CPUs convert every number back and forth, or have no kernels
            torch.float64: kind in ("cuda", "cpu"),
        }
        return saved if native.get(saved, False) else torch.float32

    def check_device(self, name: str) -> torch.device:
        """The device of this name.

        Raises:
            ValueError: there is no such device here.
        """
        kinds = [kind for kind, there in (("cuda", self.cuda), ("mps", self.mps)) if there]
        known = ", ".join(["auto", "cpu", *kinds, *self.other])
        try:
            device = torch.device(self.choose_device() if name == "auto" else name)
        except RuntimeError as error:
            raise ValueError(f"device {name!r} is unknown; choose from {known}") from error
        if device.type not in ("cpu", *kinds, *self.other):
            raise ValueError(
                f"device {name!r} cannot be used: this machine or this torch has none; choose from {known}"
            )
        return device


def _cpu_has_bfloat16() -> bool:
    """Whether the processor itself multiplies bfloat16. torch computes in it on any, but then by way of float32, which
    is slower than float32 and no more exact."""
    if platform.machine().lower() in ("arm64", "aarch64"):
        return _onednn_has_bfloat16()
    known = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, name, bool)()) for name in known)


def _onednn_has_bfloat16() -> bool:
    """False also where torch was built without oneDNN, as for macOS: the question itself is missing there."""
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):  # torch raises the one or the other for a missing operation
        return False


def put(
    model: Any,
    name: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    progress: Reporter = SILENT,
    machine: Machine | None = None,
) -> Any:
    """Move a model that was loaded with `dtype` to where it shall compute.

    Args:
        model: any module of transformers.
        name: what the user calls it.
        dtype: `auto` may become float32; a name leaves the model as it was loaded.
        device: `auto` or torch's name for one.
        progress: gets a note where `auto` became float32.
        machine: this one by default.

    Raises:
        ValueError: the device does not exist, or has no room.
    """
    machine = machine or Machine.here()
    where = machine.check_device(device)
    saved = model.dtype
    chosen = machine.choose_dtype(where.type, saved) if dtype == "auto" else saved
    try:
        model = model.to(where) if chosen == saved else model.to(where, chosen)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device!r} cannot be used: {first_line(error)}") from error
    if chosen != saved:
        was = str(saved).removeprefix("torch.")
        progress.note(
            f"{name} is saved in {was}, which {HARDWARE.get(where.type, device)} does not compute in natively: float32 "
            f"instead (--dtype {was} keeps it)"
        )
    return model
