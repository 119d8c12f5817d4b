"""Atomic writes: a device is no file."""

import os
import stat

import pytest

from tah.files import write_atomically


def test_a_device_is_not_replaced(tmp_path):
    """A rename would turn /dev/null into a file; a named pipe stands for it here."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(OSError, match=r"pipe cannot be written: it is not a file"):
        write_atomically(pipe, "text")
    assert stat.S_ISFIFO(pipe.stat().st_mode) and list(tmp_path.iterdir()) == [pipe]
    write_atomically(tmp_path / "file", "one")
    write_atomically(tmp_path / "file", "two")
    assert (tmp_path / "file").read_text() == "two"
