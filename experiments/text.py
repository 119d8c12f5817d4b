"""Train a language model on Python's own library: a recipe, one pass, and iterating everywhere, at equal FLOPs.

    python experiments/text.py late --output out      # hours; part 5 of the plan in docs/results/log.md
    python experiments/text.py late --output experiments/results --table
    python experiments/text.py late --look 150        # before the first run: which --tau a quarter exceeds

The text is the source code of the standard library of the running Python (PSF licence), which every installation has.
Nothing of it is stored. A hash of its path determines whether a file is held out. The vocabulary is a byte-level BPE
trained on the other files. A hash of the text is a setting of each line. All tokens are supervised. The recipe iterates
on tokens of an entropy above `--tau`, in training and afterwards. The one-pass baseline has at least as many parameters
and training FLOPs as the recipe and reads more text; the model that iterates everywhere has as many FLOPs and reads
less.

Each run is one line in `text.jsonl`, which also has the loss of every held-out token, rounded to `GRID` nats. The table
sorts held-out tokens by the loss of the baseline of the other seed, so that the noise of a compared model does not
choose its tokens. While the file `PAUSE` exists beside the results, no new run starts.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import math
import platform
import sysconfig
import time
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast

from lookahead import append, lines_of, made_with, refuse_others, row_flops, settings_of, train
from tah import Confidence
from tah.pipeline.experiment.scores import TokenScores, score_tokens
from tah.pipeline.experiment.tiny import SPECIAL, as_fast
from tah.policy import Rule
from variants import CHOICE, VARIANTS, Size, Variant, always_of, build, objective_of, one_pass_of, parameters

SEEDS, LOOK = (40, 41), 0  # seeds of the runs, and of `--look`
LOOKED = 16  # held-out rows of `--look`, which come after the scored ones
HOURS = 5.0  # processor time of all trainings together after which no run starts
BASELINE, ALWAYS = "standard", "always"
RECIPES = [name for name, its in CHOICE.items() if its.uncertain and not its.first]
HELD_OUT = 20  # one file of so many is held out
GRID = 1 / 16  # nats
EDGES = (0.0, 0.1, 0.5, 1.0, 2.0, 4.0, math.inf)  # nats; the bins of the table
SAMPLE = 4_000_000  # characters that the vocabulary is trained on


@dataclass(frozen=True)
class TextSize:
    """Describe a language model and its training.

    Args:
        layers: Number of layers.
        hidden: Width.
        vocabulary: Number of tokens of the vocabulary.
        length: Tokens of a row.
        batch: Rows per step.
        steps: Optimiser steps of the recipe.
        held_out: Rows to score.
        tau: Entropy in nats above which a token iterates.
        heads: Number of attention heads.
        rate: Peak learning rate of AdamW.
    """

    layers: int
    hidden: int
    vocabulary: int
    length: int
    batch: int
    steps: int
    held_out: int
    tau: float
    heads: int = 4
    rate: float = 3e-3

    @property
    def model(self) -> Size:
        """Return the size that `variants.build` and `lookahead.train` read."""
        return Size(self.layers, self.hidden, (), self.steps, self.batch, rate=self.rate, heads=self.heads)


SIZES = {
    "test": TextSize(1, 32, 300, 32, batch=4, steps=4, held_out=8, tau=2.0),
    "text": TextSize(3, 224, 1024, 256, batch=16, steps=900, held_out=160, tau=3.0),
}


# -- text ------------------------------------------------------------------------------------------------------------


def is_held_out(path: str) -> bool:
    """Return whether a file is held out, by a hash of its path below the library."""
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:4], "big") % HELD_OUT == 0


@lru_cache(maxsize=1)
def sources(library: str = sysconfig.get_paths()["stdlib"]) -> dict[bool, list[str]]:
    """Return the texts of the library, those for training (False) and those held out (True), ordered by a hash."""
    root, found = Path(library), []
    for path in root.rglob("*.py"):
        name = path.relative_to(root).as_posix()
        if "site-packages" not in path.parts:
            found.append((hashlib.sha256(name.encode()).hexdigest(), name, path))
    texts: dict[bool, list[str]] = {False: [], True: []}
    for _, name, path in sorted(found):
        try:
            texts[is_held_out(name)].append(path.read_text("utf-8"))
        except UnicodeDecodeError:  # tests of other encodings
            continue
    return texts


@lru_cache(maxsize=1)
def tokenizer_of(vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer, trained on files that are not held out."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_first(sources()[False], SAMPLE), trainer)
    return as_fast(tokenizer)


def _first(texts: Iterable[str], characters: int) -> Iterable[str]:
    for text in texts:
        if characters <= 0:
            return
        characters -= len(text)
        yield text


class Rows(Dataset):
    """Rows of text of equal length for `data.rows.Collator`; all tokens are supervised.

    Args:
        ids: Token ids `[rows, length]`, int16.
    """

    def __init__(self, ids: np.ndarray) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, at: int) -> dict[str, Any]:
        ids = self.ids[at]
        return {"input_ids": ids, "supervised": np.ones(len(ids), bool), "row": at}


@lru_cache(maxsize=2)
def stream(vocabulary: int, held_out: bool) -> np.ndarray:
    """Return the token ids of all files, each with an end, one after the other, int16."""
    tokenizer = tokenizer_of(vocabulary)
    end = np.array([tokenizer.eos_token_id], np.int16)
    every = tokenizer(sources()[held_out])["input_ids"]
    return np.concatenate([part for ids in every for part in (np.array(ids, np.int16), end)])


def rows_of(size: TextSize, held_out: bool, count: int, start: int = 0) -> Rows:
    """Return at most `count` rows of the text, from row `start` on."""
    ids = stream(size.vocabulary, held_out)[start * size.length :]
    count = min(count, len(ids) // size.length)
    return Rows(ids[: count * size.length].reshape(count, size.length))


def digest() -> str:
    """Return a hash of the whole text, which depends on the version of Python."""
    texts = sources()
    return hashlib.sha256("".join([*texts[False], *texts[True]]).encode()).hexdigest()


# -- runs ------------------------------------------------------------------------------------------------------------


def variant_of(name: str, recipe: str) -> Variant:
    """Return the variant of a name: the recipe without a decider, iterating everywhere, or one pass."""
    its = replace(VARIANTS[recipe], decider_after=False)
    if name == ALWAYS:
        return always_of(its)
    return one_pass_of(its) if name == BASELINE else its


def run(size: TextSize, name: str, recipe: str, seed: int, flops: float = 0.0, **options: Any) -> dict[str, Any]:
    """Train and score a variant, and return the fields of its line.

    Args:
        size: Size of the model and its training.
        name: The recipe, `always` or `standard`.
        recipe: Name of the recipe.
        seed: Random seed of the weights and the order.
        flops: FLOPs of the recipe. A `standard` is trained for at least as many, `always` for about as many.
        options: More `TrainingArguments`.
    """
    variant, tokenizer = variant_of(name, recipe), tokenizer_of(size.vocabulary)
    model = build(size.model, variant, tokenizer, seed, positions=size.length)

    def flops_of(share: float) -> float:
        return size.batch * row_flops(model, variant, size.length, share, size.length - 1)

    steps = size.steps
    if name == BASELINE:
        steps = max(steps, math.ceil(flops / flops_of(0.0)))
    if name == ALWAYS:
        steps = max(1, round(flops / flops_of(1.0)))
    rows = rows_of(size, False, steps * size.batch)
    before, start = time.process_time(), time.perf_counter()
    objective = objective_of(variant, seed, steps=steps, tau=size.tau)
    lines = train(model, objective, rows, tokenizer, steps, size.model, seed, name, **options)
    seconds, wall = time.process_time() - before, time.perf_counter() - start
    share = sum(tenth["iterated_share"] for tenth in lines) / max(1, len(lines))
    return {
        "training": {
            "steps": steps,
            "batch": size.batch,
            "tokens": steps * size.batch * size.length,
            "distinct_tokens": len(rows) * size.length,
            "iterated": share,
            "flops": steps * flops_of(share),
            "cpu_seconds": seconds,
            "wall_seconds": wall,
            "curve": lines,
        },
        "parameters": parameters(model),
        "held_out": score(model, tokenizer, rows_of(size, True, size.held_out), size.tau),
    }


@torch.no_grad()
def score(model: Any, tokenizer: Any, rows: Rows, tau: float) -> dict[str, Any]:
    """Return the scores of the held-out text.

    Returns:
        `policies`: mean loss in nats, next-token accuracy and iterated share, by policy. `each`: per token, compressed,
        the rounded loss and whether it is right after each depth, and whether the policy `entropy` iterates on it.
    """
    every = [rows[at] for at in range(len(rows))]

    def scored(rule: Rule) -> TokenScores:
        return score_tokens(model, every, tokenizer.pad_token_id, rule)

    if model.config.max_depth == 1:
        one = scored(Rule("never"))
        chosen, outputs = np.zeros(len(one.loss), bool), {"never": (one.loss, one.right)}
        passes = [one]
    else:
        one, two = scored(Rule(Confidence("entropy"), 1.0)), scored(Rule("always"))
        passes, chosen = [one, two], one.probability > 1 - math.exp(-tau)
        outputs = {"never": (one.loss, one.right), "always": (two.loss, two.right)}
        # With `attention="own"` a pass does not depend on which other tokens iterate.
        outputs["entropy"] = (np.where(chosen, two.loss, one.loss), np.where(chosen, two.right, one.right))
    shares = {"never": 0.0, "always": 1.0, "entropy": float(chosen.mean())}
    policies = {
        name: {"loss": float(loss.mean()), "accuracy": float(right.mean()), "iterated": shares[name]}
        for name, (loss, right) in outputs.items()
    }
    each = {"losses": [pack(its.loss) for its in passes], "right": [pack(its.right * GRID) for its in passes]}
    return {"tokens": len(one.loss), "policies": policies, "each": each | {"iterates": pack(chosen * GRID)}}


def pack(values: np.ndarray) -> str:
    """Return values `[n]` from 0 on as text, rounded to `GRID` and at most 255 of its steps."""
    grid = np.clip(np.round(values / GRID), 0, 255).astype(np.uint8)
    return base64.b64encode(zlib.compress(grid.tobytes(), 9)).decode()


def unpack(text: str) -> np.ndarray:
    """Return the values `[n]` of `pack`, float64."""
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8) * GRID


def record(
    output: Path, size_name: str, size: TextSize, name: str, recipe: str, seed: int, **options: Any
) -> dict[str, Any]:
    """Train and score a variant and append its line to `output`. Return the line, which may be there already.

    Raises:
        ValueError: The file has lines of other settings or of another text, or no line of the recipe, which determines
            the FLOPs.
    """
    line: dict[str, Any] = {"experiment": "text", "size": size_name, "variant": name, "seed": seed}
    line["settings"] = own_settings(size, recipe)
    refuse_others(output, line["settings"])
    flops = 0.0
    for made in read(output):
        if line.items() <= made.items():
            return made
        if (made["variant"], made["seed"]) == (recipe, seed):
            flops = made["training"]["flops"]
    if name != recipe and not flops:
        raise ValueError(f"{output} has no line of {recipe} with seed {seed}, which determines the FLOPs of {name}")
    line["text"] = {"source": f"standard library of Python {platform.python_version()}"}
    line |= {"made_with": made_with(**options)} | run(size, name, recipe, seed, flops, **options)
    append(output, line)
    scored = "  ".join(f"{name} {its['loss']:.3f}" for name, its in line["held_out"]["policies"].items())
    print(f"{name} seed {seed}: {line['training']['cpu_seconds']:.0f} s  {scored}", flush=True)
    return line


def own_settings(size: TextSize, recipe: str) -> dict[str, Any]:
    """Return the settings of the lines of a size, a recipe and the text."""
    return settings_of(size, recipe=recipe, text_sha256=digest())


def read(output: Path) -> list[dict[str, Any]]:
    """Return the lines of results in a file; none if there is no file.

    Raises:
        ValueError: A seed of a variant is there twice.
    """
    lines = lines_of(output)
    made = [(line["variant"], line["seed"]) for line in lines]
    twice = [one for one in made if made.count(one) > 1]
    if twice:
        raise ValueError(f"{output}: {' '.join(map(str, twice[0]))} occurs twice")
    return lines


def look(size: TextSize, recipe: str, steps: int) -> dict[float, float]:
    """Train a baseline for some steps and return, per share, the entropy in nats that this share of the text exceeds.

    The text is held out, and none of it is scored later.

    Args:
        size: Size of the model.
        recipe: Recipe that determines the size of the baseline.
        steps: Optimiser steps.

    Raises:
        ValueError: All of the held-out text is scored.
    """
    variant, tokenizer = variant_of(BASELINE, recipe), tokenizer_of(size.vocabulary)
    model = build(size.model, variant, tokenizer, LOOK, positions=size.length)
    objective, rows = objective_of(variant, LOOK), rows_of(size, False, steps * size.batch)
    after = rows_of(size, True, LOOKED, size.held_out)
    if not len(after):
        raise ValueError(f"the held-out text has no row after the {size.held_out} that are scored")
    train(model, objective, rows, tokenizer, steps, size.model, LOOK, "look")
    held_out = torch.from_numpy(after.ids.astype(np.int64)).to(model.device)
    model.eval()
    with torch.no_grad():
        logits = model(held_out, policy="never").logits.float()
    entropy = torch.distributions.Categorical(logits=logits).entropy().flatten().cpu()
    return {share: float(entropy.quantile(1 - share)) for share in (0.1, 0.25, 0.5)}


# -- tables ----------------------------------------------------------------------------------------------------------


def table(lines: list[dict[str, Any]], recipe: str) -> str:
    """Return a table of the variants with each policy, and tables of loss and accuracy by how hard a token is."""
    titles = "variant | policy | seeds | parameters | million tokens | TFLOP | CPU s | iterated | loss | accuracy"
    rows = [f"| {titles} | loss minus {BASELINE} | accuracy minus {BASELINE} |", f"|{' --- |' * 12}"]
    base = {line["seed"]: line["held_out"]["policies"]["never"] for line in lines if is_base(line)}
    for name in dict.fromkeys(line["variant"] for line in lines):
        its = [line for line in lines if line["variant"] == name]
        for policy in its[0]["held_out"]["policies"]:
            by_seed = {line["seed"]: line["held_out"]["policies"][policy] for line in its}
            reached = list(by_seed.values())
            changes = [
                ""
                if name == BASELINE
                else by_its_seed({seed: it[what] - base[seed][what] for seed, it in by_seed.items() if seed in base})
                for what in ("loss", "accuracy")
            ]
            training = [line["training"] for line in its]
            means = {what: np.mean([run[what] for run in training]) for what in ("tokens", "flops", "cpu_seconds")}
            scores = {what: np.mean([it[what] for it in reached]) for what in ("iterated", "loss", "accuracy")}
            rows.append(
                f"| {name} | {policy} | {len(its)} | {its[0]['parameters']:,} | {means['tokens'] / 1e6:.2f} | "
                f"{means['flops'] / 1e12:.1f} | {means['cpu_seconds']:.0f} | {scores['iterated']:.1%} | "
                f"{scores['loss']:.4f} | {scores['accuracy']:.4f} | {' | '.join(changes)} |"
            )
    return "\n".join([*rows, "", by_hardness(lines, recipe)])


def by_its_seed(changes: dict[int, float]) -> str:
    """Return the mean of differences, and the difference of each seed, because a gain is named only if all have it."""
    if not changes:
        return ""
    each = ", ".join(f"{seed}: {change:+.4f}" for seed, change in sorted(changes.items()))
    return f"{np.mean(list(changes.values())):+.4f} ({each})"


def is_base(line: dict[str, Any]) -> bool:
    """Return whether a line is of the one-pass baseline."""
    return line["variant"] == BASELINE


def by_hardness(lines: list[dict[str, Any]], recipe: str) -> str:
    """Return loss and accuracy in bins of the loss of the baseline of another seed, or of the same if there is one."""
    base = {line["seed"]: unpack(line["held_out"]["each"]["losses"][0]) for line in lines if is_base(line)}
    columns = [(BASELINE, "never"), (recipe, "never"), (recipe, "entropy"), (ALWAYS, "always")]
    columns = [one for one in columns if any(line["variant"] == one[0] for line in lines)]
    rows = [
        f"| loss of the baseline | tokens | iterated | {' | '.join(f'{name}, {its}' for name, its in columns)} |",
        f"|{' --- |' * (3 + len(columns))}",
    ]
    for low, high in zip(EDGES[:-1], EDGES[1:], strict=True):
        cells, iterated, sizes = [], [], []
        for name, policy in columns:
            losses, rights = [], []
            for line in lines:
                others = [seed for seed in base if seed != line["seed"]] or list(base)
                if line["variant"] != name or not others:
                    continue
                hard = base[others[0]]
                here = (hard >= low) & (hard < high)
                loss, right, goes = output_of(line, policy)
                sizes.append(here.mean())
                if not here.any():
                    continue
                losses.append(loss[here].mean())
                rights.append(right[here].mean())
                if (name, policy) == (recipe, "entropy"):
                    iterated.append(goes[here].mean())
            cells.append(f"{np.mean(losses):.3f} / {np.mean(rights):.3f}" if losses else "")
        share = f"{np.mean(iterated):.0%}" if iterated else ""
        bounds = f"{low:g} to {high:g}" if high < math.inf else f"from {low:g}"
        rows.append(f"| {bounds} | {np.mean(sizes) if sizes else 0:.1%} | {share} | {' | '.join(cells)} |")
    return "\n".join([*rows, "", "Cells: loss in nats / next-token accuracy, means over seeds."])


def output_of(line: dict[str, Any], policy: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return rounded loss, whether it is right, and whether it iterates, per held-out token under a policy."""
    each = line["held_out"]["each"]
    losses, right = ([unpack(one) for one in each[what]] for what in ("losses", "right"))
    goes = unpack(each["iterates"]) > 0
    if policy != "entropy":
        goes = np.full(len(goes), policy == "always")
    return np.where(goes, losses[-1], losses[0]), np.where(goes, right[-1], right[0]) > 0, goes


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", choices=RECIPES, help="a recipe that iterates on uncertain tokens")
    parser.add_argument("--output", type=Path, default=Path("out"), help="directory of the results")
    parser.add_argument("--size", choices=SIZES, default="text", help="size of the model and its training")
    parser.add_argument("--seed", type=int, nargs="+", default=SEEDS, help="random seeds")
    parser.add_argument("--steps", type=int, help="optimiser steps of the recipe; replaces the value of --size")
    parser.add_argument("--tau", type=float, help="nats above which a token iterates; replaces the value of --size")
    parser.add_argument("--hours", type=float, default=HOURS, help="CPU hours after which no run starts")
    parser.add_argument("--look", type=int, metavar="STEPS", help="print entropies of a baseline after so many steps")
    parser.add_argument("--table", action="store_true", help="print the tables; train nothing")
    given = parser.parse_args(arguments)
    output = given.output / "text.jsonl"
    if given.table:
        if not (lines := read(output)):
            parser.error(f"{output} has no lines")
        print(table(lines, given.recipe))
        return
    changed = {name: getattr(given, name) for name in ("steps", "tau") if getattr(given, name) is not None}
    size = replace(SIZES[given.size], **changed)
    if given.look:
        for share, entropy in look(size, given.recipe, given.look).items():
            print(f"{share:.0%} of the held-out tokens are above {entropy:.2f} nats")
        return
    for seed in given.seed:
        for name in (given.recipe, BASELINE, ALWAYS):
            refuse_others(output, own_settings(size, given.recipe))
            if any((line["variant"], line["seed"]) == (name, seed) for line in read(output)):
                continue
            while (given.output / "PAUSE").exists():
                time.sleep(10)
            if sum(line["training"]["cpu_seconds"] for line in read(output)) > 3600 * given.hours:
                raise SystemExit(f"the budget of {given.hours} CPU hours is used up before {name} {seed}")
            record(output, given.size, size, name, given.recipe, seed)


if __name__ == "__main__":
    main()
