"""The `tah` command. Verbs import torch and the models only when they run, so that `--help` answers at once."""

from __future__ import annotations

import difflib
import json
import os
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from .session import Session

POLICIES = ("decider", "confidence", "always", "never", "random")  # `oracle` needs labels, which a prompt has none of
USER_ERRORS = (ValueError, OSError, ImportError)
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
SystemOption = Annotated[str | None, typer.Option(metavar="TEXT", help="System message of the chat template.")]
DtypeOption = Annotated[str, typer.Option(metavar="NAME", help="auto (as saved), float32, bfloat16 or float16.")]
DeviceOption = Annotated[str, typer.Option(metavar="NAME", help="cpu, cuda, cuda:1, mps, ...")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")]
NoColorOption = Annotated[
    bool, typer.Option("--no-color", help="Mark iterated tokens with [brackets] (also NO_COLOR=1).")
]


@app.callback(invoke_without_command=True)
def top(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show tracebacks; accepted anywhere (also TAH_DEBUG=1).")
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
    device: DeviceOption = "cpu",
    as_json: JsonOption = False,
    no_color: NoColorOption = False,
) -> None:
    """Answer a prompt, coloured by passes per token."""
    prompt = _text(prompt)
    if not prompt.strip():
        raise typer.BadParameter("PROMPT is empty; give at least one word")
    session = _open(model, dtype, device)
    from .session import sampling
    from .terminal import Painter, make_console, summary

    if not raw and not session.tokenizer.chat_template:
        _note(f"{model} has no chat template; the prompt is continued as it is (--raw)")
    messages = [{"role": "system", "content": system}] if system else []
    ids = session.encode([*messages, {"role": "user", "content": prompt}], raw=raw)
    rule = session.rule(policy=policy, threshold=threshold, max_depth=max_depth)
    options = rule | sampling(temperature, top_p, top_k, seed) | {"max_new_tokens": max_new_tokens}
    if as_json:
        answer = session.answer(ids, lambda token: None, **options)
        typer.echo(json.dumps({"model": model, "prompt": prompt, **rule, **answer.as_dict()}, ensure_ascii=False))
        return
    painter = Painter(make_console(color=not no_color), options["threshold"])
    answer = session.answer(ids, painter.show, **options)
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
    device: DeviceOption = "cpu",
    no_color: NoColorOption = False,
) -> None:
    """Talk to a model; /help lists the commands."""
    session = _open(model, dtype, device)
    from .chat import Chat
    from .session import sampling

    rule = session.rule(policy=policy, threshold=threshold, max_depth=max_depth)
    options = sampling(temperature, top_p, top_k, seed) | {"max_new_tokens": max_new_tokens}
    Chat(session, rule, options, system, color=not no_color).run()


@app.command()
def inspect(
    model: ModelArgument,
    against: Annotated[
        str | None, typer.Option(metavar="BASE", help="Also compare the number of parameters with a plain base.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Say what a model is, or if it can be wrapped."""
    from .load import as_lines, quiet
    from .load import inspect as look

    quiet()
    found = look(model, against)
    typer.echo(json.dumps(found) if as_json else as_lines(found))


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Checkpoint of the original implementation, or hub id.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="Directory to make.")],
    threshold: Annotated[float | None, _number("Instead of the checkpoint's.", float, 0, 1)] = None,
) -> None:
    """Convert a checkpoint of the original code.

    None of its code runs. Prints what was converted and anything about it that might surprise.
    """
    from .convert import convert as run_convert
    from .load import quiet

    quiet()
    report = run_convert(source, target, threshold=threshold)
    typer.echo(f"{report}\nwritten to {target}")


@app.command()
def demo(
    max_new_tokens: TokensOption = 64,
    problems: Annotated[int, _number("Held-out problems that the small model answers.", int, 0, 100)] = 100,
    no_color: NoColorOption = False,
) -> None:
    """Run the two checkpoints in the box."""
    from .demo import demo as run_demo

    run_demo(max_new_tokens=max_new_tokens, problems=problems, color=not no_color)


def _text(prompt: str) -> str:
    """PROMPT, or standard input for -."""
    try:
        prompt = sys.stdin.read() if prompt == "-" else prompt
        prompt.encode()
    except UnicodeError as error:
        raise typer.BadParameter("PROMPT is not UTF-8 text") from error
    return prompt


def _open(model: str, dtype: str, device: str) -> Session:
    from .load import quiet
    from .session import Session

    quiet()
    session = Session.open(model, dtype=dtype, device=device)
    if session.wrapped:
        _note(f"{model} is a base model without a trained second pass; policy: confidence unless you choose one")
    return session


def _note(text: str) -> None:
    typer.echo(f"tah: {text}", err=True)


def run(arguments: list[str]) -> int:
    """Run the command and return its exit code: 2 for what the user can put right, said in one line."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    debug = "--debug" in arguments[:end] or os.environ.get("TAH_DEBUG", "") not in ("", "0")
    arguments = [word for at, word in enumerate(arguments) if word != "--debug" or at > end]
    if arguments[:2] in (["eval", "compare"], ["bench", "train"], ["bench", "trace"], ["bench", "serve"]):
        arguments[:2] = ["-".join(arguments[:2])]
    try:
        status = app(arguments, prog_name="tah", standalone_mode=False)
        sys.stdout.flush()
        return status if isinstance(status, int) else 0
    except (KeyboardInterrupt, typer.Abort):
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nobody reads: let the exit flush go nowhere
        return 141
    except Exception as error:
        if debug:
            raise
        if isinstance(error, UsageError):
            _note(error.format_message())
            return 2
        expected = isinstance(error, USER_ERRORS) or type(error).__name__ == "SafetensorError"
        line = " ".join(str(error).split()) or type(error).__name__
        _note(line if expected else f"unexpected {type(error).__name__}: {line} (--debug shows where)")
        return 2 if expected else 1


def _register(name: str) -> None:
    """Run a module of the package without the package: importing that imports torch."""
    path = Path(__file__).parent.joinpath(*name.split(".")).with_suffix(".py")
    spec = spec_from_file_location(f"tah.{name}", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules[spec.name] = module_from_spec(spec)
    spec.loader.exec_module(module)


_register("cli_bench")
_register("cli_make")
_register("cli_see")
_register("cli_lens")
_register("cli_serve")
_register("cli_eval")


def main() -> None:
    """Entry point of `tah` and `python -m tah`."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # before anything imports tqdm; the commands show progress themselves
    sys.exit(run(sys.argv[1:]))
