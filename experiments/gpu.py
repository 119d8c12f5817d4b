"""Train larger models on the nine tasks and on text in seven minutes of one GPU, from scratch and without downloads.

    python experiments/gpu.py late --output out/gpu               # one H200: 20 to 100 M parameters, bfloat16
    python experiments/gpu.py late --output out/small --small     # tiny models, on any machine

Each model is one line, written when the model is scored: `nine-LAYERSxWIDTH.jsonl` in the format of `nine_runs.py`,
`text.jsonl` in that of `text.py`. A recipe gets an equal share of the time that is left, and a short measurement
determines its steps. The one-pass baseline then has at least as many training FLOPs and never fewer steps; the model
that iterates everywhere has as many steps. A model for which the time does not suffice is left out, with a line in
`left-out.jsonl`; without its recipe, so are the others of a file. Started again with the same `--output`, the script
makes the models that have no line; `steps.json` has the steps that were measured.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

import text
from choose import POLICIES
from lookahead import append, lines_of, record, refuse_others, settings_of, train
from nine.mixture import Mixture
from nine_runs import ALWAYS, BASELINE, matched, spent, variant_of
from variants import Size, build, objective_of

SEED = 50  # not one of nine_runs.py and text.py
SCORING = 0.25  # share of a model's time for scoring and start
LEAST = 4  # steps of a training
LEAST_SECONDS = 10.0  # of a model, with its scoring
SHORT, LONG = 5, 25  # steps of the two measurements
OPERATIONS = (1, 1, 2, 3)  # what the nine tasks draw; only for the lines


@dataclass(frozen=True)
class Models:
    """Describe the models.

    Args:
        nine: Sizes of the models of the nine tasks; the first is also trained to iterate everywhere.
        text: Size of the language model.
        problems: Training problems that are drawn; a longer training repeats them.
        processes: Processes that draw them.
    """

    nine: tuple[Size, ...]
    text: text.TextSize
    problems: int
    processes: int


LARGE = Models(
    nine=(
        Size(6, 512, OPERATIONS, steps=1, batch=512, rate=1e-3, heads=8, test=900, validation=450),
        Size(8, 960, OPERATIONS, steps=1, batch=512, rate=1e-3, heads=16, test=900, validation=450),
    ),
    text=text.TextSize(8, 512, 4096, 512, batch=64, steps=1, held_out=200, tau=2.0, heads=8, rate=1e-3),
    problems=600_000,
    processes=14,
)
SMALL = Models(
    nine=tuple(Size(layers, 32, OPERATIONS, steps=1, batch=16, test=18, validation=18) for layers in (1, 2)),
    text=text.SIZES["test"],
    problems=720,
    processes=2,
)


@dataclass
class Session:
    """Train models until the time is used up.

    Args:
        recipe: Name of the recipe.
        policy: Its policy.
        models: Models to train.
        output: Directory of the results.
        deadline: Value of `time.monotonic` at which the time ends.
        most: Most steps of a recipe.
        options: More `TrainingArguments`.
    """

    recipe: str
    policy: str
    models: Models
    output: Path
    deadline: float
    most: int
    options: dict[str, Any]
    took: dict[str, float] = field(default_factory=dict)  # seconds of the recipe, by the name of the file

    @property
    def left(self) -> float:
        """Return the seconds that are left."""
        return self.deadline - time.monotonic()

    def planned(self) -> Iterator[tuple[str, str]]:
        """Yield the name of the file and the variant of each model, the most important ones first."""
        first, *others = (f"nine-{size.layers}x{size.hidden}" for size in self.models.nine)
        yield from ((first, name) for name in (self.recipe, BASELINE, ALWAYS))
        yield from (("text", name) for name in (self.recipe, text.BASELINE))
        for other in others:
            yield from ((other, name) for name in (self.recipe, BASELINE))

    def run(self) -> None:
        """Train all models in turn.

        Raises:
            ValueError: A file has lines of other settings, for example of another recipe.
        """
        planned = list(self.planned())
        for file in dict.fromkeys(file for file, _ in planned):
            self.made(file)  # refuses lines of other settings before anything is trained
        for at, (file, name) in enumerate(planned):
            made = self.made(file)
            if name in made:
                continue
            if self.left < self.needed(file, name, made):
                append(self.output / "left-out.jsonl", {"file": file, "variant": name, "seconds_left": self.left})
                print(f"{file} {name}: left out, {self.left:.0f} seconds are left", flush=True)
                continue
            before = time.monotonic()
            make = self.text_model if file == "text" else self.nine_model
            make(file, name, self.left / (len(planned) - at))
            if name == self.recipe:
                self.took[file] = time.monotonic() - before
            print(f"{file} {name}: {time.monotonic() - before:.0f} s, {self.left:.0f} s left", flush=True)

    def settings(self, file: str) -> dict[str, Any]:
        """Return the settings of the lines of a file, with the steps of `self.models`."""
        if file == "text":
            return text.own_settings(self.models.text, self.recipe)
        return settings_of(self.size_of(file), **self.more)

    @property
    def more(self) -> dict[str, Any]:
        """Return what determines the lines of the nine tasks besides the size."""
        return {"recipe": self.recipe, "policy": self.policy}

    def size_of(self, file: str) -> Size:
        """Return the size of the model of the nine tasks whose lines are in a file."""
        (size,) = [its for its in self.models.nine if file == f"nine-{its.layers}x{its.hidden}"]
        return size

    def made(self, file: str) -> dict[str, dict[str, Any]]:
        """Return the lines of a file by variant.

        Raises:
            ValueError: It has lines of other settings. The steps are those of the lines, because they are measured.
        """
        path = self.output / f"{file}.jsonl"
        lines = lines_of(path)
        for line in lines:
            refuse_others(path, self.settings(file) | {"steps": line["settings"]["steps"]})
        return {line["variant"]: line for line in lines}

    def needed(self, file: str, name: str, made: dict[str, dict[str, Any]]) -> float:
        """Return the seconds that must be left for a model; infinite if its recipe has no line.

        Args:
            file: Name of the file of its line.
            name: Name of the variant.
            made: Lines of the file by variant.
        """
        if name == self.recipe:
            return LEAST_SECONDS
        if self.recipe not in made:
            return math.inf
        alone = made[self.recipe]["training"]["wall_seconds"] / (1 - SCORING)
        return max(LEAST_SECONDS, self.took.get(file, alone))

    def steps(self, file: str, seconds: float, trial: Any) -> int:
        """Return the steps of a recipe: those in `steps.json` for its settings, or as many as take the given seconds.

        Args:
            file: Name of the file of its line.
            seconds: Time of the model, with its scoring.
            trial: Function that makes a training of a number of steps.
        """
        path = self.output / "steps.json"
        known = json.loads(path.read_text()) if path.exists() else {}
        own = {name: value for name, value in self.settings(file).items() if name != "steps"}
        if known.get(file, {}).get("settings") != own:
            trial(SHORT)  # the first steps are slower
            times = []
            for count in (SHORT, LONG):
                before = time.monotonic()
                trial(count)
                times.append(time.monotonic() - before)
            each = max(1e-3, (times[1] - times[0]) / (LONG - SHORT))
            steps = max(LEAST, min(self.most, int(seconds * (1 - SCORING) / each)))
            known[file] = {"steps": steps, "settings": own}
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(known))
        return known[file]["steps"]

    def nine_model(self, file: str, name: str, seconds: float) -> None:
        """Train and score a model of the nine tasks."""
        size = self.size_of(file)
        task = Mixture("nine", SEED, self.models.processes, self.models.problems)
        recipe = variant_of(self.recipe, self.recipe, self.policy)

        def trial(steps: int) -> None:
            tokenizer, drawn = task.tokenizer(), Mixture("nine", SEED)
            rows = drawn.rows(drawn.take("train", 2 * size.batch, distinct=False), tokenizer)
            model = build(size, recipe, tokenizer, SEED)
            train(
                model,
                objective_of(recipe, SEED, steps=steps),
                rows,
                tokenizer,
                steps,
                size,
                SEED,
                "trial",
                **self.options,
            )

        size = replace(size, steps=self.steps(file, seconds, trial))
        output = self.output / f"{file}.jsonl"
        variant = variant_of(name, self.recipe, self.policy)
        if variant.method == "standard":
            variant = matched(task, size, variant, spent(self.made(file)[self.recipe], self.policy))
        record(output, task, file, size, name, variant=variant, more=self.more, **self.options)

    def text_model(self, file: str, name: str, seconds: float) -> None:
        """Train and score a language model."""
        size, recipe = self.models.text, text.variant_of(self.recipe, self.recipe)

        def trial(steps: int) -> None:
            tokenizer = text.tokenizer_of(size.vocabulary)
            rows, model = (
                text.rows_of(size, False, 2 * size.batch),
                build(size.model, recipe, tokenizer, SEED, size.length),
            )
            objective = objective_of(recipe, SEED, steps=steps, tau=size.tau)
            train(model, objective, rows, tokenizer, steps, size.model, SEED, "trial", **self.options)

        size = replace(size, steps=self.steps(file, seconds, trial))
        text.record(self.output / f"{file}.jsonl", file, size, name, self.recipe, SEED, **self.options)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=text.RECIPES, help="a recipe that iterates on uncertain tokens")
    parser.add_argument("--policy", choices=POLICIES, default="entropy-tau", help="its policy in the nine tasks")
    parser.add_argument("--output", type=Path, default=Path("out/gpu"), help="directory of the results")
    parser.add_argument("--minutes", type=float, default=7.0, help="time of all models together")
    parser.add_argument("--most", type=int, default=5000, help="most steps of a recipe")
    parser.add_argument("--small", action="store_true", help="tiny models, to test the script on any machine")
    given = parser.parse_args(arguments)
    if not given.small and not torch.cuda.is_available():
        parser.error("no GPU was found; --small runs anywhere")
    options: dict[str, Any] = {}
    if torch.cuda.is_available():
        torch.set_float32_matmul_precision("high")
        options = {"bf16": True, "dataloader_num_workers": 4}
    deadline = time.monotonic() + 60 * given.minutes
    models = SMALL if given.small else LARGE
    Session(given.recipe, given.policy, models, given.output, deadline, given.most, options).run()


if __name__ == "__main__":
    main()
