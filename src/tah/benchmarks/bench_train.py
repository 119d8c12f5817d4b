"""`tah bench train`: what training with hard tokens costs, as a ratio to training the base alone.

A step is forward, backward, AdamW and zeroing the gradients, on random tokens that are all supervised. Every
variant has a model of its own.

* **plain**: the untouched base with its own loss from `labels`, what everybody else runs;
* **standard**: through our forward, but nobody iterates: what our loss by chunks changes;
* **stage 1**: 12 % of the supervised tokens, the same at every step, are hard and run twice;
* **plain, LoRA** and **stage 1, LoRA**: the same with the base frozen; the plain one applies its adapters everywhere.

Then the throughput of labelling, on rows of many lengths in the batches that `label` makes:

* **prefill**: the reference's own forward over the batches, with the last token's logits only;
* **prefill, logits**: with the logits of all tokens, without which nothing can be judged;
* **labelling** and **labelling, half**: `label`, with all or every other token supervised.

Shapes: B batch, T tokens.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ..core.depth import at_depth
from ..data.rows import tokenize_row
from ..data.scoring import batches
from ..load import find, load_base, load_tah, load_tokenizer
from ..markdown import table
from ..model import TaHForCausalLM
from ..names import PRECISIONS, unknown
from ..progress import SILENT, Reporter
from ..training.label import label
from . import measure
from .measure import SEED, Row, alternate, prompts, rows_of, timed

VARIANTS = ("plain", "standard", "stage 1", "plain, LoRA", "stage 1, LoRA")
LABELLING = ("prefill", "prefill, logits", "labelling", "labelling, half")
SHAPES = ((1, 512), (4, 512), (1, 2048))
HARD = 0.12  # share of hard tokens among the supervised ones
AIMS = {"step": 1.20, "memory": 1.10, "labels": 1 / 0.9}  # of `stage 1` to `plain`, of `labelling` to `prefill`


@dataclass(frozen=True)
class Setup:
    """What the variants of a run share.

    Args:
        model: as for `tah bench`.
        precision: of weights and products: `float32`, `bfloat16`, or `autocast`: weights float32, products bfloat16.
        random: random weights of the model's shape; of the model only config.json is read.
        checkpointing: recompute activations in the backward.
        device: where to train.
    """

    model: str
    precision: str = "float32"
    random: bool = False
    checkpointing: bool = False
    device: str = "cpu"

    def load(self) -> PreTrainedModel:
        """The base, or the TaH model where `model` is a checkpoint of one.

        Raises:
            ValueError: no such model or precision.
        """
        if self.precision not in PRECISIONS:
            raise ValueError(unknown("precision", self.precision, PRECISIONS))
        dtype = "bfloat16" if self.precision == "bfloat16" else "float32"
        path, kind = find(self.model)
        if self.random:
            config = AutoConfig.from_pretrained(path, trust_remote_code=False)
            with torch.device(self.device):
                return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        loaded: PreTrainedModel = load_tah(path, dtype) if kind == "tah" else load_base(path, dtype)
        return loaded.to(self.device)

    def plain(self) -> PreTrainedModel:
        loaded = self.load()
        return loaded.base if isinstance(loaded, TaHForCausalLM) else loaded

    def wrapped(self) -> TaHForCausalLM:
        """Without a decider, which stage 1 neither runs nor trains, where that is ours to choose."""
        loaded = self.load()
        if isinstance(loaded, TaHForCausalLM):
            return loaded
        return TaHForCausalLM.from_base(loaded, decider=None, policy="never")


def hard_labels(batch: int, length: int) -> Tensor:
    """Depth labels [B, T]: 2 at `HARD` of the positions that predict a token, at seeded random places, 1 elsewhere."""
    generator, labels = torch.Generator().manual_seed(SEED), torch.ones(batch, length, dtype=torch.long)
    for row in labels:
        row[torch.randperm(length - 1, generator=generator)[: round(HARD * (length - 1))]] = 2
    return labels


class Trainee:
    """A variant's model with its optimiser.

    Args:
        variant: one of `VARIANTS`.
        setup: shared with the variants it is compared with.
    """

    def __init__(self, variant: str, setup: Setup) -> None:
        self.variant, self.setup = variant, setup
        self.model: Any = setup.plain() if variant == "plain" else setup.wrapped()
        self.model.train()
        if setup.checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if variant.endswith("LoRA"):
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_("lora_" in name)
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)  # Trainer's default, but for the rate

    def loss(self, ids: Tensor, depth_labels: Tensor) -> Tensor:
        """The training loss of a batch [B, T]."""
        with ExitStack() as stack:
            if self.setup.precision == "autocast":
                stack.enter_context(torch.autocast(ids.device.type, dtype=torch.bfloat16))
            if self.variant == "plain":
                return self.model(ids, labels=ids, use_cache=False).loss
            if self.variant == "plain, LoRA":
                stack.enter_context(at_depth(2))  # adapters on
                return self.model.base(ids, labels=ids, use_cache=False).loss
            policy = "never" if self.variant == "standard" else "oracle"
            return self.model(ids, labels=ids, depth_labels=depth_labels, policy=policy).loss

    def stepper(self, batch: int, length: int) -> Callable[[], None]:
        """A function that does one training step on a fixed batch [B, T]."""
        ids, labels = prompts(self.model, batch, length), hard_labels(batch, length).to(self.model.device)

        def step() -> None:
            self.loss(ids, labels).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

        return step


# -- memory ------------------------------------------------------------------------------------------------------


def peak_memory(variant: str, setup: Setup, batch: int, length: int) -> float:
    """MiB that a fresh process takes for weights, gradients, optimiser and a step: peak resident memory (on a GPU:
    allocated) during a second step, less what the libraries take before the model is loaded."""
    return measure.in_fresh_process(variant, peak, variant, setup, batch, length)


def peak(variant: str, setup: Setup, batch: int, length: int) -> float:
    """`peak_memory` of this process."""
    before, trainee = measure.resident(), Trainee(variant, setup)
    step = trainee.stepper(batch, length)
    step()  # the optimiser's state comes with it
    return measure.peak_during(step, trainee.model.device, before)


# -- labelling ---------------------------------------------------------------------------------------------------


def label_seconds(
    setup: Setup, number: int, longest: int, batch: int, repeats: int
) -> tuple[dict[str, list[float]], int]:
    """Seconds of every one of `LABELLING` in every round, and the number of tokens.

    Of `label`, the time of its shards, from text to file; not that of the fingerprints, taken once per data set.

    Args:
        setup: `model` is the reference; it needs a tokenizer.
        number: of texts.
        longest: tokens of the longest text; the shortest has an eighth.
        batch: most tokens of a forward, padding included.
        repeats: rounds that count; one more to warm up.
    """
    import datasets

    model, tokenizer = setup.plain().eval(), load_tokenizer(find(setup.model)[0], setup.model)
    lengths = [longest // 8 + (longest - longest // 8) * row // number for row in range(number)]
    texts = tokenizer.batch_decode(measure.texts(tokenizer, lengths))
    whole = [{"text": text} for text in texts]
    half = [{"prompt": text[: len(text) // 2], "completion": text[len(text) // 2 :]} for text in texts]
    found = [tokenize_row(row, tokenizer, longest, "cut") for row in whole]
    ids = [torch.tensor(row["input_ids"]) for row in found if row is not None]
    groups = batches([len(row) for row in ids], batch)
    inputs = [torch.nn.utils.rnn.pad_sequence([ids[row] for row in group], batch_first=True) for group in groups]

    @torch.no_grad()
    def prefill(keep: int) -> None:
        for its in inputs:
            model(its.to(model.device), use_cache=False, logits_to_keep=keep)

    def labelling(rows: list[dict[str, str]]) -> float:
        data = datasets.Dataset.from_list(rows)
        with tempfile.TemporaryDirectory() as output:
            done = label(data, tokenizer, model, output, max_length=longest, tokens_per_batch=batch, too_long="cut")
        return float(done["seconds"])

    runs = [timed(partial(prefill, keep), model.device) for keep in (1, 0)]
    runs += [partial(labelling, rows) for rows in (whole, half)]
    return alternate(dict(zip(LABELLING, runs, strict=True)), repeats), sum(map(len, ids))


# -- the benchmark -----------------------------------------------------------------------------------------------


def bench_train(
    setup: Setup,
    *,
    variants: tuple[str, ...] = VARIANTS,
    shapes: tuple[tuple[int, int], ...] = SHAPES,
    repeats: int = 5,
    memory: bool = True,
    labels: tuple[int, int, int] | None = (32, 512, 4096),
    progress: Reporter = SILENT,
) -> dict[str, Any]:
    """Measure all variants: `{"machine", "settings", "rows"}`.

    Args:
        setup: what to train and how.
        variants: of `VARIANTS`; the first is the one that the others are compared with.
        shapes: (B, T) of the batches.
        repeats: rounds; the median counts.
        memory: also measure that, a process per variant and shape.
        labels: number of texts to label, tokens of the longest, tokens of a batch; None: no labelling.
        progress: has a line for each row.
    """
    rows: list[Row] = []
    shares = {name: HARD for name in variants if name.startswith("stage 1")}
    trainees = {variant: Trainee(variant, setup) for variant in variants}
    for batch, length in shapes:
        steps = {
            variant: timed(trainee.stepper(batch, length), trainee.model.device)
            for variant, trainee in trainees.items()
        }
        seconds = alternate(steps, repeats)
        rows += rows_of(setup.precision, f"step, {batch} x {length}", seconds, shares, batch * length, progress)
    steps, trainees = {}, {}
    for batch, length in shapes if memory else ():
        peaks = {variant: [peak_memory(variant, setup, batch, length)] for variant in variants}
        rows += rows_of(setup.precision, f"memory, {batch} x {length}", peaks, shares, 0, progress)
    if labels is not None:
        seconds, tokens = label_seconds(setup, *labels, repeats)
        rows += rows_of(setup.precision, "labels", seconds, {}, tokens, progress)
    settings = {**asdict(setup), "hard": HARD, "repeats": repeats, "labels": labels and list(labels)}
    return measure.result_of(settings, rows)


def markdown(result: dict[str, Any]) -> str:
    """The result as the table of docs/results/benchmarks.md."""
    lines = []
    for row in (Row(**row) for row in result["rows"]):
        rate = "" if row.tokens_per_second is None else f"{row.tokens_per_second:.0f}"
        aim = f"{AIMS[row.task.partition(',')[0]]:.2f}" if row.variant in ("stage 1", "labelling") else ""
        lines.append((row.dtype, row.task, row.variant, row.value, rate, f"{row.ratio:.2f}", aim))
    return table(("precision", "task", "variant", "median", "tokens/s", "ratio", "aim"), lines)
