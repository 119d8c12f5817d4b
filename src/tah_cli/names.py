"""The words that a user may write, without importing `tah`, which takes seconds.

This is the only module that reads a file of the package `tah` by its path.
"""

from __future__ import annotations

from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING

PACKAGE = Path(find_spec("tah").origin).parent  # type: ignore[union-attr, arg-type]

if TYPE_CHECKING:
    from tah import names as words
else:
    _spec = spec_from_file_location("tah_cli.words", PACKAGE / "names.py")
    words = module_from_spec(_spec)
    _spec.loader.exec_module(words)
