"""The commands that evaluate: eval, eval-compare, eval-regrade. Registered on the `tah` command by `cli.py`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from .app import DepthOption, DeviceOption, DtypeOption, JsonOption, ModelArgument, ThresholdOption, _number, app


@app.command("eval")
def evaluate(
    model: ModelArgument,
    tasks: Annotated[
        str,
        typer.Option(metavar="NAMES", help="nine (the paper's), names, or lm_eval:NAME; separated by commas."),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", metavar="DIR", help="For answers and results; continued.")],
    policy: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            help="Who iterates, one after the other: decider, confidence, always, never, random, oracle. "
            "[default: the model's]",
        ),
    ] = None,
    protocol: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="Fixes prompt, sampling, seed, samples and sources: default, or paper for what its authors published. "
            "Options given beside it override it.",
        ),
    ] = "default",
    samples: Annotated[
        int | None, _number("Answers to each question; their mean counts (avg@N). [default: the protocol's; 1]", int, 1)
    ] = None,
    limit: Annotated[int | None, _number("Only the first so many questions of each task.", int, 1)] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK=FILE", help="Questions from a JSONL file, not the Hub; may be repeated."),
    ] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always the most probable token.")] = False,
    temperature: Annotated[float | None, _number("Sampling temperature. [default: 0.6]", float, 0, 100)] = None,
    top_p: Annotated[
        float | None, _number("Sample among the most probable tokens up to this mass. [default: 0.95]", float, 0, 1)
    ] = None,
    top_k: Annotated[int | None, _number("Sample among this many tokens; 0 means all. [default: 20]", int, 0)] = None,
    max_new_tokens: Annotated[int | None, _number("Longest answer, in tokens. [default: 4096]", int, 1)] = None,
    seed: Annotated[
        int | None, _number("Random seed. [default: the protocol's; 0, or 42 with paper]", int, 0, 2**63 - 1)
    ] = None,
    batch_size: Annotated[
        int | None, _number("Questions at a time. [default: 1; with vLLM as many as it likes]", int, 1)
    ] = None,
    backend: Annotated[
        str, typer.Option(metavar="NAME", help="transformers, or vllm for large runs, where it is installed.")
    ] = "transformers",
    reference: Annotated[
        str | None, typer.Option(metavar="MODEL", help="For the policy oracle: the model that knows better.")
    ] = None,
    threshold: ThresholdOption = None,
    max_depth: DepthOption = None,
    raw: Annotated[bool, typer.Option("--raw", help="Ask without the chat template.")] = False,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="Run the programs that answers hold, in a sandbox.")
    ] = False,
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Evaluate on benchmarks, with the cost of iterating.

    The answers are kept in DIR, and a killed run continues where it was. Each result has its 95 % interval, the depth
    of its answers and their cost relative to the base. `tah eval compare A B` compares two runs; `tah eval regrade DIR`
    grades the answers of a run again.
    """
    from tah.load import quiet

    quiet()
    files, drawing = _files(data or []), _drawing(greedy, temperature=temperature, top_p=top_p, top_k=top_k)
    from tah.evaluation.eval_report import as_markdown
    from tah.evaluation.evaluate import evaluate as run_evaluation
    from tah.evaluation.request import Sampling
    from tah.progress import Reporter

    from .terminal import make_console

    results = run_evaluation(
        model,
        _words(tasks),
        output,
        policies=() if policy is None else _words(policy),
        protocol=protocol,
        sampling=Sampling(samples=samples, max_new_tokens=max_new_tokens, seed=seed, **drawing),
        limit=limit,
        data=files,
        threshold=threshold,
        max_depth=max_depth,
        reference=reference,
        raw=raw,
        batch_size=batch_size,
        backend=backend,
        allow_code_execution=allow_code_execution,
        dtype=dtype,
        device=device,
        progress=Reporter(make_console(stderr=True)),
    )
    typer.echo(json.dumps(results) if as_json else as_markdown(results), nl=as_json)


@app.command("eval-compare")
def compare(
    a: Annotated[str, typer.Argument(metavar="A", help="Directory of an evaluation, or DIR:POLICY.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Another one, over the same questions.")],
    as_json: JsonOption = False,
) -> None:
    """Compare two evaluations question by question.

    Also written `tah eval compare A B`. Differences come with paired 95 % bootstrap intervals; runs over other data or
    with another protocol are refused.
    """
    from tah.evaluation.eval_report import compare as run_comparison
    from tah.evaluation.eval_report import compared_markdown

    found = run_comparison(a, b)
    typer.echo(json.dumps(found) if as_json else compared_markdown(found), nl=as_json)


@app.command("eval-regrade")
def regrade(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Directory of an evaluation.")],
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK=FILE", help="Questions of a run that did not keep them; may be repeated."),
    ] = None,
    allow_code_execution: Annotated[
        bool, typer.Option("--allow-code-execution", help="Run the programs that answers hold, in a sandbox.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Grade the answers of an evaluation again, without a model.

    Also written `tah eval regrade DIR`. For a run that an older grader graded: `tah eval compare` compares only
    verdicts of the same version. The answers stay as they are; DIR's verdicts and results are replaced.
    """
    files = _files(data or [])
    from tah.evaluation.regrade import as_text
    from tah.evaluation.regrade import regrade as run_again
    from tah.progress import Reporter

    from .terminal import make_console

    found = run_again(
        directory, data=files, allow_code_execution=allow_code_execution, progress=Reporter(make_console(stderr=True))
    )
    typer.echo(json.dumps(found) if as_json else as_text(found), nl=as_json)


def _drawing(greedy: bool, **given: Any) -> dict[str, Any]:
    """What was said of the sampling; `Sampling` knows the rest.

    Raises:
        BadParameter: --greedy beside it.
    """
    drawing = {name: value for name, value in given.items() if value is not None}
    if greedy and drawing:
        name = next(iter(drawing))
        raise typer.BadParameter(
            f"--greedy draws nothing, so --{name.replace('_', '-')} {drawing[name]:g} has no meaning; leave out one"
        )
    return {"temperature": 0.0} if greedy else drawing


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _files(given: list[str]) -> dict[str, str]:
    files = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or not path:
            raise typer.BadParameter(f"--data {text} must be TASK=FILE, such as gsm8k=questions.jsonl")
        if name in files:
            raise typer.BadParameter(f"--data names two files for {name}")
        files[name] = path
    return files
