"""The README and docs are true: links lead somewhere, snippets run, tests they name exist, files stay readable."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers.console import wrong_outputs
from tah.load import load_tokenizer

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "AGENTS.md", "SECURITY.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
BUNDLED = "HuggingFaceTB/SmolLM2-135M-Instruct"  # in examples; the tests take the bundled copy
SITE = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
TOP = ("src", "tests", "docs", "examples", "scripts", "benchmark", "experiments", "peer_tests")


def page_id(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links(page):
    text = page.read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text) if "://" not in link]
    assert all((page.parent / link).exists() for link in links), links
    assert not (missing := unknown_places(text)), missing


def unknown_places(text: str) -> list[str]:
    """The files and functions (`path::name`) between backticks that are not there."""
    missing = []
    for path, function in re.findall(r"`([\w.-]+(?:/[\w.-]+)*/?)(?:::(\w+))?`", text):
        if path.partition("/")[0] in TOP and "/" in path:
            places = [ROOT / path]
        elif re.fullmatch(r"test_\w+\.py", path):
            places = list((ROOT / "tests").rglob(path))
        elif "/" in path and path.endswith(".py"):
            places = [ROOT / "src" / path, ROOT / "src" / "tah" / path]
        else:
            continue
        there = [place for place in places if place.exists()]
        if not there or (function and not any(f"def {function}(" in place.read_text() for place in there)):
            missing.append(f"{path}::{function}" if function else path)
    return missing


def test_links_knows_what_is_not_there():
    """Control."""
    good = ["core/fast.py", "tah/vllm/waiting.py", "evaluation/grading/choice.py", "test_loss.py", "docs/", "top_k/2"]
    good += ["tests/test_docs.py", "test_docs.py::test_links", "tests/test_docs.py::test_links"]
    assert unknown_places(" ".join(f"`{name}`" for name in good)) == []
    bad = ["core/cpu.py", "tah/vllm/no.py", "tests/test_no.py", "test_no.py", "test_docs.py::test_no", "scripts/no.py"]
    assert unknown_places(" ".join(f"`{name}`" for name in bad)) == bad


def test_python_of_the_readme_runs(tmp_path, tiny_base):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    code = "\n".join(blocks).replace(f'"{BUNDLED}"', repr(str(tiny_base)))
    scope: dict = {}
    here = Path.cwd()
    os.chdir(tmp_path)
    try:
        exec(code, scope)
    finally:
        os.chdir(here)
    prompt = scope["inputs"]["input_ids"].shape[1]
    assert scope["out"].sequences.shape == scope["out"].depth_count.shape == (1, prompt + 8)
    assert (tmp_path / "my-tah" / "config.json").exists()
    load_tokenizer(str(tmp_path / "my-tah"))  # the commands of the next section need it


@pytest.fixture
def bundled(smollm2, monkeypatch, tmp_path):
    """A directory of its own, the bundled checkpoints, this checkout's `tah`, and no network or colours."""
    monkeypatch.chdir(tmp_path)
    python = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    for name, value in {
        "TAH_CACHE": str(smollm2.parent),
        "HF_HUB_OFFLINE": "1",
        "NO_COLOR": "1",
        "COLUMNS": "100",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": python,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }.items():
        monkeypatch.setenv(name, value)


SHOWS = re.compile(r"^```python\n(?:(?!```).*\n)*?.*#> ", re.M)  # a block that shows what it prints


def python_of(page: Path) -> list[Any]:
    """The blocks of a page that show what they print."""
    examples = pytest.importorskip("pytest_examples")
    return [each for each in examples.find_examples(str(page)) if each.prefix == "python" and "#> " in each.source]


@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", [page for page in SITE if SHOWS.search(page.read_text())], ids=page_id)
def test_printed_output_of_python(page, bundled, smollm2, eval_example):
    """Later blocks of a page use the names of earlier ones."""
    scope: dict = {}
    eval_example.set_config(line_length=120)
    examples = python_of(page)
    assert examples
    for example in examples:
        example.source = example.source.replace(f'"{BUNDLED}"', repr(str(smollm2)))
        scope |= eval_example.run_print_check(example, module_globals=scope)


@pytest.mark.parametrize("printed", ["2", "3"])
def test_a_wrong_printed_output_is_found(printed, tmp_path, eval_example):
    """Control."""
    (tmp_path / "page.md").write_text(f"```python\nprint(1 + 1)\n#> {printed}\n```\n")
    (example,) = python_of(tmp_path / "page.md")
    if printed == "2":
        eval_example.run_print_check(example)
    else:
        with pytest.raises(pytest.fail.Exception):
            eval_example.run_print_check(example)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", [page for page in SITE if "```console" in page.read_text()], ids=page_id)
def test_output_of_commands(page, bundled):
    """The commands of a page run in order in one directory."""
    assert not (wrong := wrong_outputs(page.read_text())), "\n".join(wrong)


def test_a_wrong_output_is_found(tmp_path, monkeypatch):
    """Control."""
    monkeypatch.chdir(tmp_path)
    good = "```console\n$ echo one > file\n$ cat file  \none\n\n$ echo \\\n>   two\ntwo\n```\n"
    good += "\n```bash\n$ no-command\n```\n"
    assert wrong_outputs(good) == []
    assert len(wrong_outputs(good + "```console\n$ cat file\ntwo\n```\n")) == 1
    assert len(wrong_outputs("```console\n$ true\nmore\n```\n")) == 1
    assert len(wrong_outputs("```console\n$ exit 3\n```\n")) == 1


def test_the_design_names_tests_that_exist():
    tests = "".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    page = (ROOT / "docs" / "explanation" / "invariants.md").read_text()
    named = re.findall(r"`(?:test_\w+\.py::)?(test_\w+)\*?`", page)
    assert len(named) > 10 and all(f"def {name}" in tests for name in named), named


def test_examples_run(smollm2):
    """On the real model; the fixture converted it, so the example finds it in the same cache."""
    environment = os.environ | {"TAH_CACHE": str(smollm2.parent)}
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "custom_policy.py")], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    digits = [line for line in lines if re.fullmatch(r"\d  '\s*\d'", line)]
    assert digits and all(line.startswith("2") for line in digits[:-1])
    assert all(line.startswith("1") for line in lines[:-1] if line not in digits)


def test_files_stay_readable():
    for path in (ROOT / "src").rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 500, f"{path} is longer than a reader's patience"
        assert path.stem not in ("utils", "helpers", "common", "misc")
