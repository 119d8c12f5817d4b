"""The commands that make a model: label, prune, train, run. Registered on the `tah` command by `cli.py`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .app import PACKAGE, DeviceOption, DtypeOption, _note, _number, app

if TYPE_CHECKING:
    from tah.progress import Reporter
    from tah.training.recipe import Recipe

STAGES = ("backbone", "decider")
RECIPES = ", ".join(sorted(path.stem for path in PACKAGE.joinpath("recipes").glob("*.yaml")))


def _stage(name: str) -> str:
    if name not in STAGES:
        raise typer.BadParameter(f"{name!r} is not one of {', '.join(STAGES)}")
    return name


RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help=f"A .yaml file, or one of the package's: {RECIPES}.", show_default=False)
]
OverridesArgument = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE",
        help="Instead of the recipe's, like backbone.training.learning_rate=1e-4.",
        show_default=False,
    ),
]
OutputOption = Annotated[
    str | None, typer.Option("--output", metavar="DIR", help="The run's directory. [default: runs/<recipe name>]")
]


@app.command()
def label(recipe: RecipeArgument, overrides: OverridesArgument = None, output: OutputOption = None) -> None:
    """Mark the hard tokens of a recipe's data.

    A token is hard where the recipe's reference model would have said another. A killed run goes on where it was. Many
    GPUs: torchrun --nproc-per-node 8 -m tah label RECIPE
    """
    _make(lambda steps, plan, run: steps.label(plan, run, _reporter()), recipe, overrides, output)


@app.command()
def prune(
    base: Annotated[str, typer.Argument(metavar="BASE", help="Directory, hub id, or smollm2.")],
    data: Annotated[str, typer.Option(metavar="SOURCE", help="Held-out texts: hub id, directory or file.")],
    output: Annotated[Path, typer.Option(metavar="DIR", help="Directory to make.")],
    layers: Annotated[int, _number("How many to drop.", int, 1)] = 1,
    texts: Annotated[int, _number("Texts that decide; fewer rank layers by luck.", int, 1)] = 64,
    max_length: Annotated[int, _number("Longer texts are cut to so many tokens.", int, 2)] = 2048,
    split: Annotated[str, typer.Option(metavar="NAME", help="Of the texts.")] = "train",
    dtype: DtypeOption = "auto",
    device: DeviceOption = "auto",
) -> None:
    """Drop the layers of a base that matter least.

    Each layer is left out in turn; the one without which held-out perplexity stays lowest is dropped, and what is left
    is measured anew. DIR is a normal checkpoint, with prune.md beside it.
    """
    _quiet()
    from tah.pipeline.pruned import Pruning, prune_model

    asked = Pruning(base, data, output, split, layers, texts, max_length, dtype, device)
    made = prune_model(asked, _reporter())
    typer.echo(f"{made.as_markdown()}\nwritten to {output}")


@app.command()
def train(
    recipe: RecipeArgument,
    overrides: OverridesArgument = None,
    stage: Annotated[str, typer.Option(callback=_stage, metavar="NAME", help="backbone or decider.")] = "backbone",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an unfinished training, if any.")] = False,
    output: OutputOption = None,
) -> None:
    """Train a stage of a recipe.

    First the backbone; then the decider, with everything else frozen. Many GPUs: torchrun --nproc-per-node 8 -m tah
    train RECIPE, or accelerate launch with one of the configurations in tah/recipes/accelerate.
    """
    _make(lambda steps, plan, run: steps.train(plan, run, stage, resume, _reporter()), recipe, overrides, output)


@app.command()
def run(recipe: RecipeArgument, overrides: OverridesArgument = None, output: OutputOption = None) -> None:
    """Make a model from a recipe: every step.

    Steps that are done are skipped, a killed one goes on, and one whose part of the recipe has changed is made again,
    with all that depends on it; what was there before is kept in DIR/old.
    """
    directory = _make(lambda steps, plan, run: steps.run(plan, run, _reporter()), recipe, overrides, output)
    report = directory / "report" / "report.md"
    if report.is_file() and os.environ.get("RANK", "0") == "0":
        _note(f"report: {report}")


def _reporter() -> Reporter:
    from rich.console import Console

    from tah.progress import Reporter

    return Reporter(Console(stderr=True))


def _quiet() -> None:
    """Leave the terminal to us."""
    from tah import load
    from tah.data import rows as data

    data.quiet()
    load.quiet()


def _make(
    work: Callable[[Any, Recipe, Path], Path], recipe: str, overrides: list[str] | None, output: str | None
) -> Path:
    """Read the recipe, work on it, say where the result is, and return the directory of the run."""
    from tah.training.recipe_file import load_recipe

    given = list(overrides or ()) + ([f"output={json.dumps(output)}"] if output is not None else [])
    plan = load_recipe(recipe, given)
    _quiet()
    from tah.pipeline import steps
    from tah.training.train import Stopped

    try:
        result = work(steps, plan, plan.directory())
    except Stopped as stopped:
        _note(str(stopped))
        raise typer.Exit(143) from stopped
    if os.environ.get("RANK", "0") == "0":  # of torchrun's processes
        typer.echo(str(result))
    return plan.directory()
