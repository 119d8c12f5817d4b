"""The module `tah.names` (lists of policies, tasks, models, ...), loaded from its file.

An import of the package `tah` would import torch, which takes seconds. No other module reads a file of `tah` by path.
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
