"""vLLM's model runner V2 on a CPU: its kernels run in Triton's interpreter, in a process of their own."""

from __future__ import annotations

import os
from types import SimpleNamespace

IS_V2 = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"  # `make serve-test-v2`


class _Driver:
    """What vLLM asks of Triton's CPU backend, which no released Triton has."""

    @staticmethod
    def is_active() -> bool:
        return True


def have_backend() -> None:
    """Let Triton have a backend for CPUs, as vLLM's CPU build wants; to be called before anything imports vLLM."""
    assert os.environ.get("TRITON_INTERPRET") == "1", "set before Python starts: triton is imported early"
    import triton.backends

    triton.backends.backends["cpu"] = SimpleNamespace(driver=_Driver, compiler=None)
