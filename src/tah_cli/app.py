"""The `tah` command. A command imports torch and the models only when it runs, so that `--help` takes no seconds."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any

import typer

from . import bench, doctor, evaluate, serve, train, understand, use
from .checks import check_processes, process
from .groups import DefaultGroup, Group

USER_ERRORS = (ValueError, OSError, ImportError)
LONGEST_LINE = 600  # maximum characters of an error message; --debug prints the whole message
UsageError: Any = typer.BadParameter.__mro__[2]  # click's ClickException; newer versions of typer contain click

app = typer.Typer(
    name="tah",
    cls=Group,
    help="Think-at-Hard (TaH): a language model that takes a second pass over hard tokens.",
    epilog="MODEL: a TaH checkpoint, a Hugging Face decoder (wrapped on the fly), smollm2, smollm2-tah, or follow-tah.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
eval_app = typer.Typer(cls=DefaultGroup, rich_markup_mode=None)
bench_app = typer.Typer(cls=DefaultGroup, rich_markup_mode=None)

COMMANDS: dict[str, tuple[Callable[..., None], ...]] = {
    "Use": (use.generate, use.chat, use.demo, use.inspect, use.convert, use.card, doctor.doctor),
    "Train": (train.run, train.label, train.train, train.prune),
    "Understand": (understand.trace, understand.report, understand.tune),
}
FORMER: dict[str, Callable[..., None]] = {  # hidden, for one release
    "eval-compare": evaluate.compare,
    "eval-regrade": evaluate.regrade,
    "bench-train": bench.bench_train,
    "bench-trace": bench.bench_trace,
    "bench-serve": bench.bench_serve,
}

for panel, functions in COMMANDS.items():
    for function in functions:
        app.command(rich_help_panel=panel)(function)
app.add_typer(eval_app, name="eval", rich_help_panel="Evaluate")
eval_app.command("eval", hidden=True)(evaluate.evaluate)
eval_app.command()(evaluate.compare)
eval_app.command()(evaluate.regrade)
app.add_typer(bench_app, name="bench", rich_help_panel="Evaluate")
bench_app.command("bench", hidden=True)(bench.bench)
bench_app.command("train")(bench.bench_train)
bench_app.command("trace")(bench.bench_trace)
bench_app.command("serve")(bench.bench_serve)
app.command(rich_help_panel="Serve", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(
    serve.serve
)
for spelling, function in FORMER.items():
    app.command(spelling, hidden=True)(function)


@app.callback(invoke_without_command=True)
def top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[
        bool,
        typer.Option("--debug", help="Print the traceback of an error. Accepted anywhere (also TAH_DEBUG=1)."),
    ] = False,
) -> None:
    """Think-at-Hard (TaH): a language model that takes a second pass over hard tokens."""
    if version:
        from importlib.metadata import version as installed

        typer.echo(f"tah {installed('tah')}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())
    else:
        check_processes(context.invoked_subcommand)


def run(arguments: list[str]) -> int:
    """Run a command and return its exit code.

    | code | meaning |
    | --- | --- |
    | 0 | The command succeeded. |
    | 1 | The program has a fault, or a check of `tah doctor` failed. |
    | 2 | The user can correct the error. |
    | 130 | The user interrupted the command. |
    | 141 | The reader of stdout or stderr closed its pipe. |

    An error is one line on stderr. With `--debug` or TAH_DEBUG the traceback precedes it. Of several processes, the one
    that fails first prints its line.

    Args:
        arguments: Words after `tah`.
    """
    end = arguments.index("--") if "--" in arguments else len(arguments)
    debug = "--debug" in arguments[:end] or os.environ.get("TAH_DEBUG", "") not in ("", "0")
    arguments = [word for at, word in enumerate(arguments) if word != "--debug" or at > end]
    streams = sys.stdout, sys.stderr
    try:
        status = app(arguments, prog_name="tah", standalone_mode=False)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return _quietly(130)
    except BrokenPipeError:
        return _quietly(141)
    except SystemExit as error:
        sys.stdout, sys.stderr = streams  # typer turns a broken pipe into SystemExit and replaces both streams
        if isinstance(error.__context__, BrokenPipeError):
            return _quietly(141)
        raise
    except Exception as error:
        try:
            if debug:
                typer.echo(traceback.format_exc().encode("utf-8", "backslashreplace").decode(), err=True, nl=False)
            code, line = _explained(error)
            if _reports():
                typer.echo(f"tah: {line}", err=True)
        except BrokenPipeError:  # stderr is closed, too
            return _quietly(141)
        return code


def _reports() -> bool:
    """Return whether this process reports its error: it is alone, or the first of several processes to fail."""
    if int(os.environ.get("WORLD_SIZE") or 1) < 2:
        return True
    from tah.processes import first_to_fail

    return first_to_fail()


def _explained(error: Exception) -> tuple[int, str]:
    """Return the exit code of an error, and its message in one line."""
    if isinstance(error, UsageError):
        code, line = 2, error.format_message()
    elif type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        code, line = 2, f"out of memory: {error}; use fewer tokens, a smaller batch, or another --device"
    elif isinstance(error, USER_ERRORS) or type(error).__name__ == "SafetensorError":
        code, line = 2, str(error)
    else:
        code, line = 1, f"unexpected {type(error).__name__}: {error}"
    line = " ".join(line.split()) or type(error).__name__
    if number := process():
        line = f"process {number}: {line}"
    hint = " (--debug prints the traceback)" if code == 1 else ""
    if len(line) + len(hint) > LONGEST_LINE:
        hint = hint or " (--debug prints the whole message)"
        line = f"{line[: LONGEST_LINE - len(hint) - 3]}..."
    return code, _printable(line) + hint


def _printable(line: str) -> str:
    """Return `line` with control characters and invalid UTF-8 escaped: a file name must not control the terminal."""
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
    return shown.encode("utf-8", "backslashreplace").decode()


def _quietly(code: int) -> int:
    """Return `code`, after buffered output of a closed stream is discarded, so that Python prints no error at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with suppress(OSError):  # a stream that the caller replaced may have no file descriptor
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return code


def main() -> None:
    """Run the `tah` command; the entry point of `tah` and `python -m tah`."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # tqdm reads it on import; the commands have their own progress lines
    for name in ("torchao", "torch.utils._pytree"):  # transformers imports torchao, which warns of kernels for GPUs
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        code = run(sys.argv[1:])
    except KeyboardInterrupt:  # a second Ctrl-C during the handling of the first
        code = 130
    sys.exit(code)
