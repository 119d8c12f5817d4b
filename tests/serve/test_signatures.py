"""The record of what the plugin uses of vLLM, by release. Reads no vLLM, but that of `make serve-env` where it is."""

from __future__ import annotations

import ast
import importlib.util
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("vllm_signatures", ROOT / "scripts" / "vllm_signatures.py")
assert spec is not None and spec.loader is not None
script = importlib.util.module_from_spec(spec)
sys.modules["vllm_signatures"] = script
spec.loader.exec_module(script)

RELEASES = [file.stem for file in script.RECORDS.glob("*.json")]


def imported() -> set[str]:
    """Names of vLLM that src/tah imports, in functions too."""
    found = set()
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm" and not node.level:
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_every_import_is_recorded():
    """A module, such as `vllm.envs`, is recorded by its names."""
    used = set(script.USED) | {f"{path}.{name}" for path, names in script.USED.items() for name in names}
    assert len(found := imported()) > 20
    missing = {name for name in found if name not in used}
    assert not missing, f"add to USED in scripts/vllm_signatures.py, and record the releases again: {sorted(missing)}"


@pytest.mark.parametrize("release", sorted(RELEASES))
def test_records_are_complete(release):
    record, known = script.recorded(release), set()
    for path, names in script.USED.items():
        known |= {path} & record.keys() | {f"{path}.{name}" for name in names}
    assert record.keys() == known and None not in record.values()


def test_supported_releases_are_recorded():
    assert {"0.32.0", "0.33.0"} <= set(RELEASES)


@pytest.fixture
def package(tmp_path):
    """A package `vllm` with one of everything."""
    (tmp_path / "vllm" / "v1").mkdir(parents=True)
    (tmp_path / "vllm-1.2.0.dist-info").mkdir()
    (tmp_path / "vllm-1.2.0.dist-info" / "METADATA").write_text("Name: vllm\nVersion: 1.2.0+cpu\n")
    (tmp_path / "vllm" / "__init__.py").write_text("from .v1 import *\nfrom .v1.core import Core as Kernel\n")
    (tmp_path / "vllm" / "v1" / "__init__.py").write_text("def ask(a: int, *, b=2) -> str:\n    return str(a)\n")
    (tmp_path / "vllm" / "v1" / "base.py").write_text("class Base:\n    def run(self, x): ...\n    kind: str = 'a'\n")
    (tmp_path / "vllm" / "v1" / "core.py").write_text(
        "from .base import Base\nclass Core(Base):\n    def __init__(self):\n        self.free, n = [], 0\n"
    )
    return tmp_path


USED = {"vllm": ("ask",), "vllm.Kernel": ("run", "kind", "free", "gone")}


def test_reading_a_package(package, monkeypatch):
    monkeypatch.setattr(script, "USED", USED)
    source = script.Source(package)
    found = script.signatures(source)
    assert source.version() == "1.2.0+cpu"
    assert {name: entry and entry["is"] for name, entry in found.items()} == {
        "vllm.Kernel": "class(Base)",
        "vllm.Kernel.free": "assigned",
        "vllm.Kernel.gone": None,
        "vllm.Kernel.kind": "field: str = 'a'",
        "vllm.Kernel.run": "(self, x)",
        "vllm.ask": "(a: int, *, b=2) -> str",
    }


def test_a_release_that_moved_something(package, monkeypatch):
    """Gone, another signature, another body: each is said, and no more."""
    monkeypatch.setattr(script, "USED", {"vllm": ("ask",), "vllm.Kernel": ("run", "kind", "free")})
    old = script.signatures(script.Source(package))
    assert script.compare(old, script.signatures(script.Source(package))) == ([], [])
    (package / "vllm" / "v1" / "__init__.py").write_text("def ask(a: int, *, b=2) -> str:\n    return repr(a)\n")
    (package / "vllm" / "v1" / "base.py").write_text("class Base:\n    def run(self, x, y): ...\n")
    broken, bodies = script.compare(old, script.signatures(script.Source(package)))
    assert broken == [
        "vllm.Kernel.kind: missing, was field: str = 'a'",
        "vllm.Kernel.run:\n    was (self, x)\n    is  (self, x, y)",
    ]
    assert bodies == ["vllm.ask"]


@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed here")
def test_the_installed_release_is_the_recorded_one():
    """The build for CPUs has the source of the release."""
    source = script.Source(Path(find_spec("vllm").submodule_search_locations[0]).parent)
    assert script.compare(script.recorded(source.version().partition("+")[0]), script.signatures(source)) == ([], [])
