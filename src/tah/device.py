"""Choose a device and a dtype: the meaning of `--device auto` and `--dtype auto`.

The choices depend only on the fields of `Machine`, so that tests cover machines of any kind.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import Any

import torch

from .errors import first_line
from .processes import local_rank
from .progress import SILENT, Reporter

HARDWARE = {"cuda": "this GPU", "mps": "this Mac's GPU", "cpu": "this CPU"}  # names in errors and notes


@dataclass(frozen=True)
class Machine:
    """Devices of a machine and their native formats.

    Args:
        cuda: Whether there is a GPU that torch's CUDA (or ROCm) build can use.
        mps: Whether there is an Apple GPU.
        bfloat16: Device types that multiply bfloat16 in hardware.
        other: Further device types that the installed torch supports.
        gpus: Number of GPUs.
        process: Number of this process among those that a launcher started on this machine; None if it is alone. Each
            of them has a GPU of its own.
    """

    cuda: bool = False
    mps: bool = False
    bfloat16: tuple[str, ...] = ()
    other: tuple[str, ...] = ()
    gpus: int = 1
    process: int | None = None

    @classmethod
    def here(cls) -> Machine:
        """Return the description of the current machine."""
        cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
        able = {
            "cuda": cuda and torch.cuda.is_bf16_supported(including_emulation=False),
            "mps": mps and torch.backends.mps.is_macos_or_newer(14, 0),
            "cpu": _cpu_has_bfloat16(),
        }
        current = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        other = () if current is None or current.type in HARDWARE else (current.type,)
        native = tuple(kind for kind, has in able.items() if has)
        return cls(cuda, mps, native, other, torch.cuda.device_count(), local_rank())

    def choose_device(self) -> str:
        """Return the device type for `auto`: the first available of CUDA, MPS and CPU."""
        return "cuda" if self.cuda else "mps" if self.mps else "cpu"

    def choose_dtype(self, kind: str, saved: torch.dtype) -> torch.dtype:
        """Return the dtype for `auto`: the saved dtype if the device computes in it natively, else float32.

        Args:
            kind: Device type.
            saved: Dtype of the checkpoint.
        """
        if saved == torch.float32 or kind in self.other:  # the native formats of other device types are unknown
            return saved
        native = {
            torch.bfloat16: kind in self.bfloat16,
            torch.float16: kind in ("cuda", "mps"),  # CPUs convert every number to float32 and back, or have no kernels
            torch.float64: kind in ("cuda", "cpu"),
        }
        return saved if native.get(saved, False) else torch.float32

    def check_device(self, name: str) -> torch.device:
        """Return the torch device with this name, or the chosen one for `auto`.

        Of several processes on this machine, each one gets the GPU with its own number, unless `name` has a number.

        Raises:
            ValueError: This machine has no such device, or fewer GPUs than processes.
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
        if device.type == "cuda" and device.index is None and self.process is not None:
            if self.process >= self.gpus:
                raise ValueError(
                    f"device {name!r}: process {self.process} of this machine has no GPU of its own, because there are "
                    f"{self.gpus}; start at most {self.gpus} processes, or give --device cpu or cuda:N"
                )
            return torch.device("cuda", self.process)
        return device


def _cpu_has_bfloat16() -> bool:
    """Return whether the processor multiplies bfloat16 in hardware.

    Elsewhere torch converts to float32 and back, which is slower than float32 and no more exact.
    """
    if platform.machine().lower() in ("arm64", "aarch64"):
        return _onednn_has_bfloat16()
    known = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(bool(getattr(torch.cpu, name, bool)()) for name in known)


def _onednn_has_bfloat16() -> bool:
    """Return whether oneDNN reports bfloat16 support; False if torch was built without oneDNN, as for macOS."""
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):  # torch raises either for a missing operation
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
    """Move a model to a device and return it.

    Args:
        model: Any module of transformers.
        name: Name of the model in notes.
        dtype: Dtype that the model was loaded with. `auto` may become float32; any other value changes nothing.
        device: `auto`, or torch's name of a device.
        progress: Reporter that receives a note if `auto` became float32.
        machine: Description of the machine; the current one by default.

    Raises:
        ValueError: The device does not exist or has too little memory.
    """
    machine = machine or Machine.here()
    where = machine.check_device(device)
    if where.type == "cuda" and machine.process is not None:
        torch.cuda.set_device(where)  # kernels start on the current device
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
