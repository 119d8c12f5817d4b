"""Get the tests of the installed transformers: `python peer_tests/fetch.py`, part of `make peer-test`.

The package index has them in the source distribution. They are unpacked into `.peers/`, which git ignores, and stay
there until another version of transformers is installed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import transformers

PEERS = Path(__file__).parent.parent / ".peers"
SDIST = PEERS / f"transformers-{transformers.__version__}"
PACKAGES = PEERS / "packages"  # what their tests import and our environment lacks


def pip(*arguments: str) -> None:
    """Run pip of this environment."""
    subprocess.run([sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", *arguments], check=True)


def fetch() -> None:
    """Download and unpack what `.peers/` lacks. A directory appears there complete or not at all.

    Raises:
        subprocess.CalledProcessError: pip failed; its output has the reason.
        ValueError: The source distribution has no common tests of models.
    """
    PEERS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=PEERS) as temporary:
        if not PACKAGES.is_dir():
            pip("install", "--no-deps", "--target", f"{temporary}/packages", "parameterized==0.9.0")
            os.replace(f"{temporary}/packages", PACKAGES)
        if not SDIST.is_dir() and not os.environ.get("PEER_TESTS"):
            version = f"transformers=={transformers.__version__}"
            pip("download", "--no-deps", "--no-binary", "transformers", "--dest", temporary, version)
            (archive,) = Path(temporary).glob("transformers-*.tar.gz")
            with tarfile.open(archive) as files:
                wanted = [entry for entry in files if entry.isfile() and Path(entry.name).parts[1:2] == ("tests",)]
                files.extractall(f"{temporary}/sdist", wanted, filter="data")
            unpacked = Path(temporary, "sdist", SDIST.name)
            if not (unpacked / "tests" / "test_modeling_common.py").is_file():
                raise ValueError(
                    f"{archive.name} has no tests/test_modeling_common.py; give a checkout: PEER_TESTS=dir"
                )
            os.replace(unpacked, SDIST)


if __name__ == "__main__":
    fetch()
