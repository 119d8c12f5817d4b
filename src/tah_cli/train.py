"""The commands that make a model: run, label, train, prune."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import options
from .checks import check_data, check_recipe
from .names import words
from .options import is_first, model_argument, note, number, quiet, reporter, word

if TYPE_CHECKING:
    from tah.training.recipe import Recipe

RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        callback=check_recipe,
        help=f"Recipe: a .yaml file, or the name of a packaged recipe: {', '.join(words.RECIPE_FILES)}.",
        show_default=False,
    ),
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="New value of a key of the recipe, such as backbone.training.learning_rate=1e-4.",
        show_default=False,
    ),
]
OutputOption = Annotated[
    str | None, typer.Option("--output", metavar="DIR", help="Directory of the run. [default: runs/<recipe name>]")
]


def label(recipe: RecipeArgument, overrides: OverridesArgument = None, output: OutputOption = None) -> None:
    """Label the hard tokens of a recipe's data.

    A token is hard if the recipe's reference model predicts another token. A killed run continues where it stopped. On
    several GPUs: torchrun --nproc-per-node 8 -m tah label RECIPE
    """
    _make(lambda steps, plan, run: steps.label(plan, run, reporter()), recipe, overrides, output)


def prune(
    base: Annotated[str, model_argument("Directory or Hub id of a base model, or smollm2.", "BASE")],
    data: Annotated[
        str, typer.Option(metavar="SOURCE", callback=check_data, help="Held-out texts: Hub id, directory or file.")
    ],
    output: Annotated[Path, typer.Option(metavar="DIR", help="Directory of the new model.")],
    layers: Annotated[int, number("Number of layers to drop.", int, 1)] = 1,
    texts: Annotated[
        int, number("Number of texts that rank the layers; with few texts the ranking is noise.", int, 1)
    ] = 64,
    max_length: Annotated[int, number("Maximum tokens of a text; longer texts are cut.", int, 2)] = 2048,
    split: options.Split = "train",
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
) -> None:
    """Drop the layers of a base with the least effect on perplexity.

    In each round the command measures held-out perplexity without each of the remaining layers, and drops the layer
    whose removal gives the lowest perplexity. DIR is a normal checkpoint with a report, prune.md.
    """
    from tah.pipeline.pruned import Pruning, prune_model

    quiet(data=True)
    request = Pruning(base, data, output, split, layers, texts, max_length, dtype, device)
    made = prune_model(request, reporter())
    typer.echo(f"{made.as_markdown()}\nwritten to {output}")


def train(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    stage: Annotated[str, word("stage", words.STAGES, "Stage: backbone or decider.")] = "backbone",
    resume: Annotated[bool, typer.Option("--resume", help="Continue an unfinished training, if there is one.")] = False,
    output: OutputOption = None,
) -> None:
    """Train one stage of a recipe.

    Stage 1 trains the backbone. Stage 2 trains the decider; everything else is frozen. On several GPUs: torchrun
    --nproc-per-node 8 -m tah train RECIPE, or accelerate launch with a configuration of tah/recipes/accelerate.
    """
    _make(lambda steps, plan, run: steps.train(plan, run, stage, resume, reporter()), recipe, overrides, output)


def run(recipe: RecipeArgument, overrides: OverridesArgument = None, output: OutputOption = None) -> None:
    """Run all steps of a recipe, from data to a trained model.

    The command skips finished steps and continues a killed one. If a part of the recipe has changed, its step and all
    dependent steps run again, and their former results move to DIR/old.
    """
    directory = _make(lambda steps, plan, run: steps.run(plan, run, reporter()), recipe, overrides, output)
    report = directory / "report" / "report.md"
    if report.is_file():
        note(f"report: {report}")


def _make(
    work: Callable[[Any, Recipe, Path], Path], recipe: str, overrides: list[str] | None, output: str | None
) -> Path:
    """Read the recipe, call `work`, print the path of the result, and return the directory of the run."""
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
    if is_first():
        typer.echo(str(result))
    return plan.directory()
