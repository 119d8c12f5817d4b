"""The commands that evaluate: eval, eval compare, eval regrade."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from . import options
from .checks import check_model, check_policies, check_run, check_tasks, split
from .names import words
from .options import number, quiet, reporter, word

Code = Annotated[bool, typer.Option("--allow-code-execution", help="Run the programs in the answers, in a sandbox.")]


def evaluate(
    model: options.Model,
    tasks: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            callback=check_tasks,
            help="Benchmarks, separated by commas: nine (those of the paper), names, or lm_eval:NAME.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", metavar="DIR", help="Directory for answers and results; an unfinished run continues."
        ),
    ],
    policy: Annotated[
        str | None,
        typer.Option(
            metavar="NAMES",
            callback=check_policies,
            help=f"Policies, separated by commas: {', '.join(words.POLICIES)}. [default: that of the model]",
        ),
    ] = None,
    protocol: Annotated[
        str,
        word(
            "protocol",
            words.PROTOCOLS,
            "Sets prompt, sampling, seed, samples and sources: default, or paper for what its authors published. "
            "Other options override it.",
        ),
    ] = "default",
    samples: Annotated[
        int | None,
        number("Answers per question; the score is their mean (avg@N). [default: that of the protocol, 1]", int, 1),
    ] = None,
    limit: Annotated[int | None, number("Use only this number of questions of each task.", int, 1)] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TASK=FILE", help="Read the questions from a JSONL file, not from the Hub; may be repeated."
        ),
    ] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always take the most probable token.")] = False,
    temperature: Annotated[float | None, number("Sampling temperature. [default: 0.6]", float, 0, 100)] = None,
    top_p: Annotated[
        float | None, number("Sample among the most probable tokens up to this mass. [default: 0.95]", float, 0, 1)
    ] = None,
    top_k: Annotated[int | None, number("Sample among this many tokens; 0 means all. [default: 20]", int, 0)] = None,
    max_new_tokens: Annotated[int | None, number("Longest answer, in tokens. [default: 4096]", int, 1)] = None,
    seed: Annotated[
        int | None, number("Random seed. [default: that of the protocol; 0, or 42 with paper]", int, 0, 2**63 - 1)
    ] = None,
    batch_size: Annotated[int | None, number("Questions at a time. [default: 1; vLLM chooses its own]", int, 1)] = None,
    backend: Annotated[
        str, word("backend", words.BACKENDS, "transformers, or vllm for large runs, if it is installed.")
    ] = "transformers",
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", callback=check_model, help="Reference model of the policy oracle, with the same tokenizer."
        ),
    ] = None,
    threshold: options.Threshold = None,
    max_depth: options.Depth = None,
    raw: Annotated[bool, typer.Option("--raw", help="Ask without the chat template.")] = False,
    allow_code_execution: Code = False,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Evaluate on benchmarks.

    The answers are kept in DIR, and a killed run continues. Each result has a 95 % interval, the mean depth of the
    answers and their cost relative to the base.
    """
    files, drawing = _files(data), _drawing(greedy, temperature=temperature, top_p=top_p, top_k=top_k)
    words.check_questions(files, words.expand_tasks(split(tasks)))
    quiet()
    from tah.evaluation.eval_report import as_markdown
    from tah.evaluation.evaluate import evaluate as run_evaluation
    from tah.evaluation.request import Sampling

    results = run_evaluation(
        model,
        split(tasks),
        output,
        policies=split(policy),
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
        progress=reporter(),
    )
    typer.echo(json.dumps(results) if as_json else as_markdown(results), nl=as_json)


def compare(
    a: Annotated[
        str, typer.Argument(metavar="A", callback=check_run, help="Directory of an evaluation, or DIR:POLICY.")
    ],
    b: Annotated[
        str, typer.Argument(metavar="B", callback=check_run, help="Another evaluation, over the same questions.")
    ],
    as_json: options.Json = False,
) -> None:
    """Compare two evaluations question by question.

    Differences have paired 95 % bootstrap intervals. Runs over other data or with another protocol are refused.
    """
    from tah.evaluation.eval_report import compare as run_comparison
    from tah.evaluation.eval_report import compared_markdown

    found = run_comparison(a, b)
    typer.echo(json.dumps(found) if as_json else compared_markdown(found), nl=as_json)


def regrade(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Directory of an evaluation.")],
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK=FILE", help="Questions of a run that did not keep them; may be repeated."),
    ] = None,
    allow_code_execution: Code = False,
    as_json: options.Json = False,
) -> None:
    """Grade the answers of an evaluation again.

    For a run that was graded by an older version of the grader: `tah eval compare` compares only verdicts of one
    version. The answers stay; the verdicts and results in DIR are replaced.
    """
    check_run(str(directory))
    files = _files(data)
    from tah.evaluation.regrade import as_text
    from tah.evaluation.regrade import regrade as run_again

    found = run_again(directory, data=files, allow_code_execution=allow_code_execution, progress=reporter())
    typer.echo(json.dumps(found) if as_json else as_text(found), nl=as_json)


def _drawing(greedy: bool, **given: Any) -> dict[str, Any]:
    """The given options of the sampling.

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


def _files(given: list[str] | None) -> dict[str, str]:
    """The files of TASK=FILE by task.

    Raises:
        BadParameter: a text of another form, or a task with two files.
    """
    files: dict[str, str] = {}
    for text in given or ():
        name, equals, path = text.partition("=")
        if not equals or not path:
            raise typer.BadParameter(f"--data {text} must be TASK=FILE, such as gsm8k=questions.jsonl")
        if name in files:
            raise typer.BadParameter(f"--data names two files for {name}")
        files[name] = path
    return files
