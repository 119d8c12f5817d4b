"""The commands that evaluate: eval, eval compare, eval regrade."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from . import options
from .checks import check_model, check_policies, check_processes, check_run, check_tasks, split
from .names import words
from .options import is_first, number, quiet, reporter, word

Code = Annotated[bool, typer.Option("--allow-code-execution", help="Run the programs of the answers in a sandbox.")]


def evaluate(
    model: options.Model,
    tasks: Annotated[
        str,
        typer.Option(
            metavar="NAMES",
            callback=check_tasks,
            help="Tasks, separated by commas: names, nine (the benchmarks of the paper), or lm_eval:NAME.",
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "-o", "--output", metavar="DIR", help="Directory of answers and results; an unfinished run continues."
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
            "Prompt, sampling, seed, number of samples and sources: default, or paper (the values that its "
            "authors published). Other options override it.",
        ),
    ] = "default",
    samples: Annotated[
        int | None,
        number("Answers per question; the score is their mean (avg@N). [default: that of the protocol, 1]", int, 1),
    ] = None,
    limit: Annotated[int | None, number("Maximum number of questions per task.", int, 1)] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TASK=FILE", help="JSONL file of the questions of a task, instead of the Hub; may be repeated."
        ),
    ] = None,
    greedy: Annotated[bool, typer.Option("--greedy", help="Always select the most probable token.")] = False,
    temperature: Annotated[float | None, number("Sampling temperature. [default: 0.6]", float, 0, 100)] = None,
    top_p: Annotated[
        float | None,
        number("Sample from the most probable tokens up to this total probability. [default: 0.95]", float, 0, 1),
    ] = None,
    top_k: Annotated[
        int | None,
        number("Sample from this number of most probable tokens; 0 means all tokens. [default: 20]", int, 0),
    ] = None,
    max_new_tokens: Annotated[
        int | None, number("Maximum number of tokens in an answer. [default: 4096]", int, 1)
    ] = None,
    seed: Annotated[
        int | None, number("Random seed. [default: that of the protocol; 0, or 42 with paper]", int, 0, 2**63 - 1)
    ] = None,
    batch_size: Annotated[
        int | None, number("Number of questions per batch. [default: 1; vLLM chooses its own]", int, 1)
    ] = None,
    backend: Annotated[
        str, word("backend", words.BACKENDS, "Backend: transformers, or vllm for large runs (if it is installed).")
    ] = "transformers",
    reference: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", callback=check_model, help="Reference model of the policy oracle (same tokenizer)."
        ),
    ] = None,
    threshold: options.Threshold = None,
    max_depth: options.Depth = None,
    raw: Annotated[bool, typer.Option("--raw", help="Write the questions without the chat template.")] = False,
    allow_code_execution: Code = False,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> None:
    """Evaluate a model on benchmarks.

    DIR keeps the answers, so a killed run continues. Each result has a 95 % interval, the mean depth of the answers,
    and their cost relative to the base. On several GPUs: torchrun --nproc-per-node 8 -m tah eval ...
    """
    files, drawing = _files(data), _drawing(greedy, temperature=temperature, top_p=top_p, top_k=top_k)
    words.check_questions(files, words.expand_tasks(split(tasks)))
    quiet()
    from tah.evaluation.eval_report import as_markdown
    from tah.evaluation.evaluate import evaluate as run_evaluation
    from tah.evaluation.request import Sampling
    from tah.processes import Processes

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
        processes=Processes.started(),
    )
    if is_first():
        typer.echo(json.dumps(results) if as_json else as_markdown(results), nl=as_json)


def compare(
    a: Annotated[
        str, typer.Argument(metavar="A", callback=check_run, help="Directory of an evaluation, or DIR:POLICY.")
    ],
    b: Annotated[
        str,
        typer.Argument(
            metavar="B",
            callback=check_run,
            help="Directory of another evaluation of the same questions, or DIR:POLICY.",
        ),
    ],
    as_json: options.Json = False,
) -> None:
    """Compare two evaluations question by question.

    Differences have paired 95 % bootstrap intervals. Both runs must have the same data and the same protocol.
    """
    check_processes("eval compare")
    from tah.evaluation.eval_report import compare as run_comparison
    from tah.evaluation.eval_report import compared_markdown

    found = run_comparison(a, b)
    typer.echo(json.dumps(found) if as_json else compared_markdown(found), nl=as_json)


def regrade(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Directory of an evaluation.")],
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TASK=FILE",
            help="JSONL file of the questions of a task, for a run that did not keep them; may be repeated.",
        ),
    ] = None,
    allow_code_execution: Code = False,
    as_json: options.Json = False,
) -> None:
    """Grade the answers of an evaluation again.

    `tah eval compare` needs two runs with verdicts of the same grader version. This command updates a run of an older
    version: it replaces the verdicts and results in DIR and keeps the answers.
    """
    check_processes("eval regrade")
    check_run(str(directory))
    files = _files(data)
    from tah.evaluation.regrade import as_text
    from tah.evaluation.regrade import regrade as run_again

    found = run_again(directory, data=files, allow_code_execution=allow_code_execution, progress=reporter())
    typer.echo(json.dumps(found) if as_json else as_text(found), nl=as_json)


def _drawing(greedy: bool, **given: Any) -> dict[str, Any]:
    """Return the sampling options that are not None.

    Raises:
        BadParameter: `greedy` is set beside another option.
    """
    drawing = {name: value for name, value in given.items() if value is not None}
    if greedy and drawing:
        name = next(iter(drawing))
        raise typer.BadParameter(
            f"--greedy does not sample, so --{name.replace('_', '-')} {drawing[name]:g} has no effect; "
            "leave out one of the two"
        )
    return {"temperature": 0.0} if greedy else drawing


def _files(given: list[str] | None) -> dict[str, str]:
    """Return the file of each task.

    Args:
        given: Texts like `gsm8k=questions.jsonl`.

    Raises:
        BadParameter: A text has another form, or a task has two files.
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
