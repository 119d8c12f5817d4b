"""The list of tests of transformers that do not apply to a TaH model is short, and the tests it names exist."""

import ast
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DIFFERENCES = runpy.run_path(str(ROOT / "peer_tests" / "differences.py"))


def functions(path: str) -> set[str]:
    tree = ast.parse((ROOT / path).read_text("utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("name", DIFFERENCES["NOT_APPLICABLE"])
def test_the_intent_of_a_test_that_does_not_apply_has_a_test_here(name: str) -> None:
    path, _, function = DIFFERENCES["NOT_APPLICABLE"][name].ours.partition("::")
    assert function in functions(path)
    assert f"no_{function}" not in functions(path)  # control


def test_few_tests_do_not_apply() -> None:
    assert len(DIFFERENCES["NOT_APPLICABLE"]) <= 12
