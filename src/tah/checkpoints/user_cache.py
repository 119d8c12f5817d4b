"""Create model directories once in the user's cache, by one process at a time, and atomically."""

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
    """Return the directory in TAH_CACHE if it is set, else `tah` below the user's cache directory."""
    if os.environ.get("TAH_CACHE"):
        return Path(os.environ["TAH_CACHE"]).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "tah"


def make_once(target: Path, is_whole: Callable[[Path], bool], make: Callable[[Path], object], line: str) -> Path:
    """Return `target`, after creating it if it is incomplete.

    Args:
        target: Path of the directory.
        is_whole: Function that returns whether a directory has all its files. A directory is complete when it gets its
            name, but files may have been deleted since.
        make: Function that writes the directory with `files.new_directory`.
        line: Note for the user on stderr, since `from_pretrained` may call this function and has no reporter.
    """
    if is_whole(target):
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(target.with_name(f".{target.name}.lock")):
        if not is_whole(target):  # another process may have made it while this one waited for the lock
            for leftover in target.parent.glob(
                f".{target.name}.*.tmp"
            ):  # left by killed runs, since this process holds the lock
                shutil.rmtree(leftover, ignore_errors=True)
            shutil.rmtree(target, ignore_errors=True)
            with _no_bars(), Reporter(Console(stderr=True)).work(line, None, ""):
                make(target)
    return target


@contextmanager
def _no_bars() -> Iterator[None]:
    """Switch off the progress bars of transformers within the block."""
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            logging.enable_progress_bar()
