"""The commands that make a model: run, label, train, prune."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .checks import check_data, check_recipe
from .names import words
from .options import model_argument, note, number, quiet, reporter, word

if TYPE_CHECKING:
    from tah.training.recipe import Recipe

RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        callback=check_recipe,
        help=f"A .yaml file, or one of the package's: {', '.join(words.RECIPE_FILES)}.",
        show_default=False,
    ),
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Replaces a value of the recipe, like backbone.training.learning_rate=1e-4.",
        show_default=False,
    ),
]
OutputOption = Annotated[
    str | None, typer.Option("--output", metavar="DIR", help="The run's directory. [default: runs/<recipe name>]")
]


def label(recipe: RecipeArgument, overrides: OverridesArgument = None, output: OutputOption = None) -> None:
    """Mark the hard tokens of a recipe's data.

    A token is hard where the recipe's reference model would have said another. A killed run goes on where it was. Many
    GPUs: torchrun --nproc-per-node 8 -m tah label RECIPE
    """
    _make(lambda steps, plan, run: steps.label(plan, run, reporter()), recipe, overrides, output)


def prune(
    base: Annotated[str, model_argument("Directory, hub id, or smollm2.", "BASE")],
    data: Annotated[
        str, typer.Option(metavar="SOURCE", callback=check_data, help="Held-out texts: hub id, directory or file.")
    ],
    output: Annotated[Path, typer.Option(metavar="DIR", help="Directory to make.")],
    layers: Annotated[int, number("Number of layers to drop.", int, 1)] = 1,
    texts: Annotated[int, number("Number of texts that rank the layers; few texts rank them by chance.", int, 1)] = 64,
    max_length: Annotated[int, number("Longer texts are cut to this number of tokens.", int, 2)] = 2048,
    split: options.Split = "train",
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
) -> None:
    """Drop the layers of a base that matter least.

    Each layer is left out in turn; the one without which held-out perplexity stays lowest is dropped, and what is left
    is measured anew. DIR is a normal checkpoint, with prune.md beside it.
    """
    from tah.pipeline.pruned import Pruning, prune_model

    quiet(data=True)
    request = Pruning(base, data, output, split, layers, texts, max_length, dtype, device)
    made = prune_model(request, reporter())
    typer.echo(f"{made.as_markdown()}\nwritten to {output}")


def train(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    stage: Annotated[str, word("stage", words.STAGES, "backbone or decider.")] = "backbone",
    resume: Annotated[bool, typer.Option("--resume", help="Continue an unfinished training, if there is one.")] = False,
    output: OutputOption = None,
) -> None:
    """Train a stage of a recipe.

    First the backbone; then the decider, with everything else frozen. Many GPUs: torchrun --nproc-per-node 8 -m tah
    train RECIPE, or accelerate launch with one of the configurations in tah/recipes/accelerate.
    """
    _make(lambda steps, plan, run: steps.train(plan, run, stage, resume, reporter()), recipe, overrides, output)


def run(recipe: RecipeArgument, overrides: OverridesArgument = None, output: OutputOption = None) -> None:
    """Make a model from a recipe: every step.

    Steps that are done are skipped, a killed one goes on, and one whose part of the recipe has changed is made again,
    with all that depends on it; what was there before is kept in DIR/old.
    """
    directory = _make(lambda steps, plan, run: steps.run(plan, run, reporter()), recipe, overrides, output)
    report = directory / "report" / "report.md"
    if report.is_file() and os.environ.get("RANK", "0") == "0":
        note(f"report: {report}")


def _make(
    work: Callable[[Any, Recipe, Path], Path], recipe: str, overrides: list[str] | None, output: str | None
) -> Path:
    """Read the recipe, work on it, say where the result is, and return the directory of the run."""
    from tah.training.recipe_file import load_recipe

    given = list(overrides or ()) + ([f"output={json.dumps(output)}"] if output is not None else [])
    plan = load_recipe(recipe, given)
    quiet(data=True)
    from tah.pipeline import steps
    from tah.training.train import Stopped

    try:
        result = work(steps, plan, plan.directory())
    except Stopped as stopped:
        note(str(stopped))
        raise typer.Exit(143) from stopped
    if os.environ.get("RANK", "0") == "0":  # of torchrun's processes
        typer.echo(str(result))
    return plan.directory()
