"""Runs the ```console blocks of a page."""

from __future__ import annotations

import re
import subprocess

BLOCK = re.compile(r"^```console\n(.*?)^```$", re.M | re.S)


def wrong_outputs(page: str) -> list[str]:
    """One message per command whose output is not what the page shows, or that fails without showing an error.

    A command is a line after `$ `, with its continuation lines after `> `; the lines up to the next command are its
    output, stdout and stderr together. Spaces at the end of a line do not count, nor empty lines at the end.
    """
    wrong = []
    for block in BLOCK.findall(page):
        for part in re.split(r"^\$ ", block, flags=re.M)[1:]:
            lines = part.splitlines()
            end = 1
            while lines[end - 1].rstrip().endswith("\\") and end < len(lines):
                end += 1
            command = "\n".join([lines[0], *(line.removeprefix("> ") for line in lines[1:end])]).rstrip()
            done = subprocess.run(
                ["bash", "-c", command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300
            )
            shown, got = stripped("\n".join(lines[end:])), stripped(done.stdout)
            if shown != got or (done.returncode and not shown):
                wrong.append(f"$ {command}\nexit code {done.returncode}\nshown:\n{shown}\ngot:\n{got}")
    return wrong


def stripped(text: str) -> str:
    return "\n".join(line.rstrip() for line in text.splitlines()).strip("\n")
