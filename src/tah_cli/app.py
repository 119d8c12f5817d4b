"""The `tah` command. Commands import torch and the models only when they run, so that `--help` answers at once."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import Annotated, Any

import typer

from . import bench, evaluate, serve, train, understand, use
from .groups import DefaultGroup, Group
from .options import note

USER_ERRORS = (ValueError, OSError, ImportError)
LONGEST_LINE = 600  # characters of an error; more hides what matters, and --debug shows all of it
UsageError: Any = typer.BadParameter.__mro__[2]  # click's ClickException; newer versions of typer bring their own click

app = typer.Typer(
    name="tah",
    cls=Group,
    help="Think-at-Hard: a language model that runs again on the tokens that are hard.",
    epilog="MODEL: a TaH checkpoint, any Hugging Face decoder (wrapped on the fly), smollm2, smollm2-tah, follow-tah.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
eval_app = typer.Typer(cls=DefaultGroup, rich_markup_mode=None)
bench_app = typer.Typer(cls=DefaultGroup, rich_markup_mode=None)

COMMANDS: dict[str, tuple[Callable[..., None], ...]] = {
    "Use": (use.generate, use.chat, use.demo, use.inspect, use.convert),
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
        bool, typer.Option("--debug", help="Print the traceback of an error; accepted anywhere (also TAH_DEBUG=1).")
    ] = False,
) -> None:
    """Think-at-Hard: a language model that runs again on the tokens that are hard."""
    if version:
        from importlib.metadata import version as installed

        typer.echo(f"tah {installed('tah')}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def run(arguments: list[str]) -> int:
    """Run the command and return its exit code.

    0: done. 1: a fault of ours. 2: something that the user can put right. 130: interrupted. 141: nobody reads what we
    print. An error of either kind is one line, after the traceback if --debug or TAH_DEBUG asks for it.
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
        sys.stdout, sys.stderr = streams  # typer makes this of a broken pipe, and puts others in their place
        if isinstance(error.__context__, BrokenPipeError):
            return _quietly(141)
        raise
    except Exception as error:
        try:
            if debug:
                typer.echo(traceback.format_exc().encode("utf-8", "backslashreplace").decode(), err=True, nl=False)
            code, line = _explained(error)
            note(line)
        except BrokenPipeError:  # nobody reads stderr either
            return _quietly(141)
        return code


def _explained(error: Exception) -> tuple[int, str]:
    """The exit code for an error, and its message in one line."""
    if isinstance(error, UsageError):
        code, line = 2, error.format_message()
    elif type(error).__name__ == "OutOfMemoryError" or isinstance(error, MemoryError):
        code, line = 2, f"out of memory: {error}; ask for fewer tokens or a smaller batch, or give another --device"
    elif isinstance(error, USER_ERRORS) or type(error).__name__ == "SafetensorError":
        code, line = 2, str(error)
    else:
        code, line = 1, f"unexpected {type(error).__name__}: {error}"
    line = " ".join(line.split()) or type(error).__name__
    hint = " (--debug shows where)" if code == 1 else ""
    if len(line) + len(hint) > LONGEST_LINE:
        hint = hint or " (--debug shows all of it)"
        line = f"{line[: LONGEST_LINE - len(hint) - 3]}..."
    return code, _printable(line) + hint


def _printable(line: str) -> str:
    """Without control characters, and with what is no UTF-8 escaped: a file's name must not steer the terminal."""
    shown = "".join(c if c.isprintable() else repr(c)[1:-1] for c in line)
    return shown.encode("utf-8", "backslashreplace").decode()


def _quietly(code: int) -> int:
    """The exit code, after what is still to be printed at exit has been sent nowhere, if nobody reads it."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            with suppress(OSError):  # a stream of a caller's may have no file
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return code


def main() -> None:
    """Entry point of `tah` and `python -m tah`."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # before anything imports tqdm; the commands show progress themselves
    try:
        code = run(sys.argv[1:])
    except KeyboardInterrupt:  # a second one, while the first was being dealt with
        code = 130
    sys.exit(code)
