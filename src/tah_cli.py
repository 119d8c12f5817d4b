"""Entry point of the `tah` command, outside the package: importing `tah` imports torch, which takes seconds.

It loads `tah/cli.py` without its package; the verbs import the package when they run.
"""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path


def main() -> None:
    """Run the command line."""
    spec = spec_from_file_location("tah.cli", Path(__file__).with_name("tah") / "cli.py")
    assert spec is not None and spec.loader is not None
    cli = sys.modules["tah.cli"] = module_from_spec(spec)
    try:
        spec.loader.exec_module(cli)
    except KeyboardInterrupt:
        sys.exit(130)
    cli.main()


if __name__ == "__main__":
    main()
