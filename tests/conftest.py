"""Fixtures that more than one test module uses."""

from __future__ import annotations

from pathlib import Path

import pytest

from tah.smollm2 import converted_dir, is_complete, smollm2_base


@pytest.fixture(scope="session")
def smollm2(pytestconfig: pytest.Config) -> Path:
    """Directory of SmolLM2-135M-Instruct, really converted: by the user before, or else once for this checkout.

    Several xdist workers may ask at the same time; the lock inside `smollm2_base` lets one of them convert.
    """
    kept = pytestconfig.cache.mkdir("tah")
    with pytest.MonkeyPatch.context() as patch:
        if not is_complete(converted_dir("float32")):
            patch.setenv("TAH_CACHE", str(kept))
        return smollm2_base()
