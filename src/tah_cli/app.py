"""The `tah` command. Verbs import torch and the models only when they run, so that `--help` answers at once."""

from __future__ import annotations

import difflib
import json
import os
import sys
import traceback
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from tah.session import Session

POLICIES = ("decider", "confidence", "always", "never", "random")  # `oracle` needs labels, which a prompt has none of
PACKAGE = Path(find_spec("tah").origin).parent  # type: ignore[union-attr, arg-type]  # not imported: that takes seconds
USER_ERRORS = (ValueError, OSError, ImportError)
LONGEST_LINE = 600  # characters of an error; more hides what matters, and --debug shows all of it
UsageError: Any = typer.BadParameter.__mro__[2]  # click's ClickException; newer versions of typer bring their own click

app = typer.Typer(
    name="tah",
    help="Think-at-Hard: a language model that runs again on the tokens that are hard.",
    epilog="MODEL: a TaH checkpoint, any Hugging Face decoder (wrapped on the fly), smollm2, smollm2-tah, follow-tah.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _policy(name: str | None) -> str | None:
    if name is None or name in POLICIES:
        return name
    near = difflib.get_close_matches(name, POLICIES, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise typer.BadParameter(f"unknown policy {name!r}; {hint}choose from {', '.join(POLICIES)}")


def _system(text: str | None) -> str | None:
    try:
        (text or "").encode()
    except UnicodeError as error:
        raise typer.BadParameter("--system is not UTF-8 text") from error
    return text


def _number(help: str, kind: type[int] | type[float], low: int, high: int | None = None) -> Any:
    """An option for a number in a range; typer's own messages do not repeat what was typed."""
    name = "an integer" if kind is int else "a number"
    allowed = f"{name} >= {low}" if high is None else f"{name} from {low} to {high}"

    def parse(text: Any) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = kind(low - 1)
        if not (low <= value and (high is None or value <= high)):
            raise typer.BadParameter(f"{text} must be {allowed}")
        return value

    return typer.Option(parser=parse, metavar="N" if kind is int else "X", help=help)


ModelArgument = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="Directory, hub id, smollm2, smollm2-tah, or follow-tah.", show_default=False),
]
PolicyOption = Annotated[
    str | None,
    typer.Option(callback=_policy, metavar="NAME", help=f"Who iterates: {', '.join(POLICIES)}. [default: the model's]"),
]
ThresholdOption = Annotated[
    float | None,
    _number("Iterate above this probability, 0 to 1. [default: the model's]", float, 0, 1),
]
DepthOption = Annotated[
    int | None,
    _number("Most passes a token may take. [default: the model's]", int, 1, 1000),
]
TokensOption = Annotated[int, _number("Longest answer, in tokens.", int, 1)]
TemperatureOption = Annotated[float, _number("0 always takes the most probable token.", float, 0, 100)]
TopPOption = Annotated[
    float,
    _number("Sample among the most probable tokens up to this mass.", float, 0, 1),
]
TopKOption = Annotated[int, _number("Sample among this many tokens; 0 means all.", int, 0)]
SeedOption = Annotated[int, _number("Of the sampling.", int, 0, 2**63 - 1)]
SystemOption = Annotated[
    str | None, typer.Option(callback=_system, metavar="TEXT", help="System message of the chat template.")
]
DtypeOption = Annotated[
    str,
    typer.Option(
        metavar="NAME",
        help="auto (as saved if the device computes in it natively, else float32), float32, bfloat16 or float16.",
    ),
]
DeviceOption = Annotated[
    str, typer.Option(metavar="NAME", help="auto (cuda, else mps, else cpu), cpu, cuda, cuda:1, mps, ...")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]
NoColorOption = Annotated[
    bool, typer.Option("--no-color", help="Mark iterated tokens with [brackets] (also NO_COLOR=1).")
]


@app.callback(invoke_without_command=True)
def top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show where an error came from; accepted anywhere (also TAH_DEBUG=1).")
    ] = False,
) -> None:
    """Think-at-Hard: a language model that runs again on the tokens that are hard."""
    if version:
        from importlib.metadata import version as installed

        typer.echo(f"tah {installed('tah')}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def generate(
    model: ModelArgument,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The question; - reads standard input.")],
    policy: PolicyOption = None,
    threshold: ThresholdOption = None,
    max_depth: DepthOption = None,
    max_new_tokens: TokensOption = 256,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    top_k: TopKOption = 0,
    seed: SeedOption = 0,
    system: SystemOption = None,
    raw: Annotated[
        bool, typer.Option("--raw", help="Continue the prompt as it is, without the chat template.")
    ] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
    no_color: NoColorOption = False,
) -> None:
    """Answer a prompt, coloured by passes per token."""
    prompt = _text(prompt)
    if not prompt.strip():
        raise typer.BadParameter("PROMPT is empty; give at least one word")
    _check_changes(model, policy, threshold, max_depth)
    session = _open(model, dtype, device)
    from tah.policy import Rule
    from tah.session import sampling

    rule = Rule(policy, threshold, max_depth)
    if untrained := session.as_itself(rule):
        _note(untrained)

    from .terminal import Painter, make_console, summary

    if not raw and not session.tokenizer.chat_template:
        _note(f"{model} has no chat template; the prompt is continued as it is (--raw)")
    if unknown := session.unknown_words(prompt):
        _note(unknown)
    messages = [{"role": "system", "content": system}] if system else []
    ids = session.encode([*messages, {"role": "user", "content": prompt}], raw=raw)
    rule = session.rule(rule)
    options = sampling(temperature, top_p, top_k, seed) | {"max_new_tokens": max_new_tokens}
    if as_json:
        answer = session.answer(ids, lambda token: None, rule, **options)
        found = {"model": model, "prompt": prompt, **rule.arguments(), **answer.as_dict()}
        typer.echo(json.dumps(found, ensure_ascii=False))
        return
    painter = Painter(make_console(color=not no_color), rule.threshold)  # type: ignore[arg-type]  # completed
    answer = session.answer(ids, painter.show, rule, **options)
    painter.console.print()
    notes = make_console(stderr=True, color=not no_color)
    if any(depth > 1 for depth in answer.depths):
        notes.print(painter.legend())
    notes.print(summary(len(answer.tokens), answer.seconds, answer.depths), style="dim")


@app.command()
def chat(
    model: ModelArgument,
    policy: PolicyOption = None,
    threshold: ThresholdOption = None,
    max_depth: DepthOption = None,
    max_new_tokens: TokensOption = 512,
    temperature: TemperatureOption = 0.0,
    top_p: TopPOption = 1.0,
    top_k: TopKOption = 0,
    seed: SeedOption = 0,
    system: SystemOption = None,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    no_color: NoColorOption = False,
) -> None:
    """Talk to a model; /help lists the commands."""
    _check_changes(model, policy, threshold, max_depth)
    session = _open(model, dtype, device)
    from tah.policy import Rule
    from tah.session import sampling

    rule = Rule(policy, threshold, max_depth)
    if untrained := session.as_itself(rule):
        _note(untrained)

    from .chat import Chat

    options = sampling(temperature, top_p, top_k, seed) | {"max_new_tokens": max_new_tokens}
    Chat(session, session.rule(rule), options, system, color=not no_color).run()


def _text(prompt: str) -> str:
    """PROMPT, or standard input for -."""
    try:
        prompt = sys.stdin.read() if prompt == "-" else prompt
        prompt.encode()
    except UnicodeError as error:
        raise typer.BadParameter("PROMPT is not UTF-8 text") from error
    return prompt


def _open(model: str, dtype: str, device: str) -> Session:
    from tah.load import quiet
    from tah.progress import Reporter
    from tah.session import Session

    from .terminal import make_console

    quiet()
    return Session.open(model, dtype=dtype, device=device, progress=Reporter(make_console(stderr=True)))


def _check_changes(model: str, policy: str | None, threshold: float | None, max_depth: int | None) -> None:
    """Refuse what changes nothing for a base that answers as itself, before its weights are loaded."""
    if policy is None and (threshold, max_depth) != (None, None):
        from tah.load import find
        from tah.policy import Rule
        from tah.session import check_idle

        if find(model, weights=False)[1] == "base":
            check_idle(model, Rule(policy, threshold, max_depth))


def _note(text: str) -> None:
    typer.echo(f"tah: {text}", err=True)


def run(arguments: list[str]) -> int:
    """Run the command and return its exit code.

    0: done. 1: a fault of ours. 2: something that the user can put right. 130: interrupted. 141: nobody reads what we
    print. Either error is said in one line, with the traceback before it where --debug or TAH_DEBUG asks for that.
    """
    end = arguments.index("--") if "--" in arguments else len(arguments)
    debug = "--debug" in arguments[:end] or os.environ.get("TAH_DEBUG", "") not in ("", "0")
    arguments = [word for at, word in enumerate(arguments) if word != "--debug" or at > end]
    if arguments[:2] in (
        ["eval", "compare"],
        ["eval", "regrade"],
        ["bench", "train"],
        ["bench", "trace"],
        ["bench", "serve"],
    ):
        arguments[:2] = ["-".join(arguments[:2])]
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
            _note(line)
        except BrokenPipeError:  # nobody reads stderr either
            return _quietly(141)
        return code


def _explained(error: Exception) -> tuple[int, str]:
    """The exit code for an error, and what to say of it, in one line."""
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
    return code, printable(line) + hint


def printable(line: str) -> str:
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


from . import bench, evaluate, lens, make, models, see, serve  # noqa: E402, F401


def main() -> None:
    """Entry point of `tah` and `python -m tah`."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # before anything imports tqdm; the commands show progress themselves
    try:
        code = run(sys.argv[1:])
    except KeyboardInterrupt:  # a second one, while the first was being dealt with
        code = 130
    sys.exit(code)
