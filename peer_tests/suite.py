"""Import the common tests of transformers, from `.peers/` or from the checkout that `PEER_TESTS` names."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from types import ModuleType

from fetch import PACKAGES, SDIST

CHECKOUT = os.environ.get("PEER_TESTS")
ROOT = Path(CHECKOUT).resolve() if CHECKOUT else SDIST
NAME = "transformers_tests"  # their package `tests`, under a name of its own


def _package(name: str, directory: Path) -> ModuleType:
    """Return a package without code of its own."""
    package = ModuleType(name)
    package.__path__ = [str(directory)]
    sys.modules[name] = package
    return package


def _import() -> ModuleType:
    """Return their module `tests/test_modeling_common.py`.

    The source distribution lacks the folders that this module takes two further mixins from. Empty ones replace them.

    Raises:
        FileNotFoundError: The tests are not there.
    """
    if not (ROOT / "tests" / "test_modeling_common.py").is_file():
        fix = "PEER_TESTS must name a checkout of transformers" if CHECKOUT else "run `make peer-test`"
        raise FileNotFoundError(f"{ROOT} has no tests/test_modeling_common.py; {fix}")
    if PACKAGES.is_dir():
        sys.path.append(str(PACKAGES))
    _package(NAME, ROOT / "tests")
    for module, mixin in (("exporters.test_export", "ExportTesterMixin"), ("generation.test_utils", MIXIN)):
        if not (ROOT / "tests" / module.replace(".", "/")).with_suffix(".py").is_file():
            folder = module.partition(".")[0]
            _package(f"{NAME}.{folder}", ROOT / "tests" / folder)
            empty = ModuleType(f"{NAME}.{module}")
            setattr(empty, mixin, type(mixin, (), {}))
            sys.modules[empty.__name__] = empty
    return importlib.import_module(f"{NAME}.test_modeling_common")


MIXIN = "GenerationTesterMixin"
common = _import()
HAS_GENERATION = any(name.startswith("test_") for name in dir(common.GenerationTesterMixin))
