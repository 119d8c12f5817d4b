"""Model directories that are made once, in the user's cache: by one process at a time, and whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock
from rich.console import Console
from transformers.utils import logging

from ..progress import Reporter


def cache_dir() -> Path:
    """TAH_CACHE if set, else `tah` below the user's cache directory."""
    if os.environ.get("TAH_CACHE"):
        return Path(os.environ["TAH_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tah"


def make_once(target: Path, is_whole: Callable[[Path], bool], make: Callable[[Path], object], line: str) -> Path:
    """`target`, made where it is not whole yet.

    Args:
        is_whole: whether a directory has all its files. Directories get their names when they are whole, but files may
            have been deleted since.
        make: writes the directory with `files.new_directory`.
        line: for the user, on stderr: `from_pretrained`, which may lead here, has no place for a reporter.
    """
    if is_whole(target):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{target.name}.lock")):
        if not is_whole(target):  # another process may have made it while this one waited for the lock
            for leftover in target.parent.glob(f".{target.name}.*.tmp"):  # of killed runs: the lock is ours
                shutil.rmtree(leftover, ignore_errors=True)
            shutil.rmtree(target, ignore_errors=True)
            with _no_bars(), Reporter(Console(stderr=True)).work(line, None, ""):
                make(target)
    return target


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without transformers' own."""
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            logging.enable_progress_bar()
