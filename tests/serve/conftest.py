"""Tests of the vLLM plugin, in an environment of their own (`make serve-test`): vLLM pins other versions than ours."""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest

from helpers.interpreter import IS_V2, have_backend

SETTINGS = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process, where tests can look at it
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}

if find_spec("vllm"):  # elsewhere these tests are skipped, and no other test should notice them
    os.environ |= SETTINGS
    if IS_V2:  # make serve-test-v2
        have_backend()


@pytest.fixture(scope="session", autouse=True)
def cache_of_their_own(tmp_path_factory):
    """What the check at the start of a server remembers does not go to the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TAH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
