"""The commands that use a model: generate, chat, inspect, convert, card, demo."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from . import options
from .checks import check_model
from .names import PACKAGE
from .options import model_argument, note, number, open_session, quiet

if TYPE_CHECKING:
    from tah.policy import Rule
    from tah.session import Session


def generate(
    model: options.Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Prompt; - reads standard input.")],
    policy: options.Policy = None,
    threshold: options.Threshold = None,
    max_depth: options.Depth = None,
    max_new_tokens: options.Tokens = 256,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    seed: options.Seed = 0,
    system: options.System = None,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the prompt itself, without the chat template.")] = False,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    as_json: options.Json = False,
    no_color: options.NoColor = False,
) -> None:
    """Answer a prompt; colours mark the depth of each token."""
    prompt = _text(prompt)
    if not prompt.strip():
        raise typer.BadParameter("PROMPT is empty; write at least one word")
    session, rule = _open(model, dtype, device, policy, threshold, max_depth)
    from tah.session import sampling

    from .terminal import Painter, make_console, summary

    if not raw and not session.tokenizer.chat_template:
        note(f"{model} has no chat template; the model continues the prompt itself (--raw)")
    if unknown := session.unknown_words(prompt):
        note(unknown)
    messages = [{"role": "system", "content": system}] if system else []
    ids = session.encode([*messages, {"role": "user", "content": prompt}], raw=raw)
    drawing = sampling(temperature, top_p, top_k, seed) | {"max_new_tokens": max_new_tokens}
    shown = None if rule.draws(session.model.config) else cast(float, rule.threshold)
    if as_json:
        answer = session.answer(ids, lambda token: None, rule, **drawing)
        found = {"model": model, "prompt": prompt, **rule.arguments(), "threshold": shown, **answer.as_dict()}
        typer.echo(json.dumps(found, ensure_ascii=False))
        return
    painter = Painter(make_console(color=not no_color), shown)
    answer = session.answer(ids, painter.show, rule, **drawing)
    painter.console.print()
    notes = make_console(stderr=True, color=not no_color)
    if any(depth > 1 for depth in answer.depths):
        notes.print(painter.legend())
    notes.print(summary(len(answer.tokens), answer.seconds, answer.depths), style="dim")


def chat(
    model: options.Model,
    policy: options.Policy = None,
    threshold: options.Threshold = None,
    max_depth: options.Depth = None,
    max_new_tokens: options.Tokens = 512,
    temperature: options.Temperature = 0.0,
    top_p: options.TopP = 1.0,
    top_k: options.TopK = 0,
    seed: options.Seed = 0,
    system: options.System = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    no_color: options.NoColor = False,
) -> None:
    """Chat with a model; /help lists the commands."""
    session, rule = _open(model, dtype, device, policy, threshold, max_depth)
    from tah.session import sampling

    from .chat import Chat

    drawing = sampling(temperature, top_p, top_k, seed) | {"max_new_tokens": max_new_tokens}
    Chat(session, rule, drawing, system, color=not no_color).run()


def inspect(
    model: options.Model,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="BASE", callback=check_model, help="Base model whose number of parameters is compared with MODEL's."
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Describe a TaH model, or check whether a base can be wrapped."""
    from tah.inspect import as_lines
    from tah.inspect import inspect as look

    quiet()
    found = look(model, against)
    if card := model_card(model):
        found["card"] = card
    typer.echo(json.dumps(found) if as_json else as_lines(found))


def convert(
    source: Annotated[str, model_argument("Directory or Hub id of an original checkpoint.", "SRC")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="Directory of the new checkpoint.")],
    threshold: Annotated[
        float | None, number("Threshold of the new checkpoint. [default: that of SRC]", float, 0, 1)
    ] = None,
) -> None:
    """Convert an original checkpoint (of the authors) to a TaH checkpoint.

    No code of SRC runs. The command prints the converted parts, and notes on unexpected settings.
    """
    from tah.load import convert as run_convert

    quiet()
    report = run_convert(source, target, threshold=threshold)
    typer.echo(f"{report}\nwritten to {target}")


def card(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="Directory of a TaH checkpoint.")],
    results: Annotated[
        list[Path] | None,
        typer.Option(
            "--results", metavar="DIR", help="Directory of a finished tah eval of DIR; may be repeated. [default: none]"
        ),
    ] = None,
    name: Annotated[
        str | None, typer.Option(metavar="OWNER/NAME", help="Hub id under which DIR will be published. [default: none]")
    ] = None,
    license: Annotated[
        str | None,
        typer.Option(metavar="ID", help="License, such as apache-2.0. [default: that of the base, if it is known]"),
    ] = None,
) -> None:
    """Write the model card of a checkpoint, DIR/README.md, with the results of evaluations.

    A README.md that this program did not write stays, and the command fails.
    """
    from tah.load import write_card

    quiet()
    typer.echo(f"written to {write_card(directory, results or (), name=name, license=license)}")


def demo(
    max_new_tokens: options.Tokens = 64,
    problems: Annotated[int, number("Number of held-out problems that follow-tah answers.", int, 0, 100)] = 100,
    no_color: options.NoColor = False,
) -> None:
    """Run the two bundled checkpoints, smollm2-tah and follow-tah."""
    from .demo import demo as run_demo

    run_demo(max_new_tokens=max_new_tokens, problems=problems, color=not no_color)


def model_card(model: str) -> str | None:
    """Return the path of the model card, of a model directory or of a bundled checkpoint; None if there is none."""
    packaged = PACKAGE / "assets" / model / "README.md"
    own = Path(model) / "README.md"
    path = own if Path(model).is_dir() else packaged
    return str(path) if path.is_file() else None


def _text(prompt: str) -> str:
    """Return the prompt, or the text of standard input for `-`.

    Raises:
        BadParameter: The text is not UTF-8.
    """
    try:
        prompt = sys.stdin.read() if prompt == "-" else prompt
        prompt.encode()
    except UnicodeError as error:
        raise typer.BadParameter("PROMPT is not UTF-8 text") from error
    return prompt


def _open(
    model: str, dtype: str, device: str, policy: str | None, threshold: float | None, max_depth: int | None
) -> tuple[Session, Rule]:
    """Return the session of a command that answers, and its completed rule.

    Raises:
        ValueError: A threshold or depth was given for a base model without a policy, where it has no effect.
    """
    from tah.load import find
    from tah.policy import Rule
    from tah.session import check_idle

    rule = Rule(policy, threshold, max_depth)
    if rule != Rule() and find(model, weights=False)[1] == "base":
        check_idle(model, rule)  # before the weights are loaded
    session = open_session(model, dtype, device)
    if line := session.as_itself(rule):
        note(line)
    return session, session.rule(rule)
