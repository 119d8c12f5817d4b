"""`tah bench train`: the cost of training with hard tokens, as a ratio to training of the base without a second pass.

A step is forward, backward, AdamW and zeroing of the gradients, on random tokens that are all supervised. Each variant
has a separate model.

| variant | what runs |
| --- | --- |
| plain | the base of transformers, with its loss from `labels` |
| standard | the one-pass baseline: the forward of `tah` without a second pass, with the loss of `tah`, in chunks |
| stage 1 | 12 % of the supervised tokens, the same in every step, are hard and take two passes |
| plain, LoRA | as plain, with a frozen base and LoRA on all tokens |
| stage 1, LoRA | as stage 1, with a frozen base |

Then the benchmark measures the throughput of labelling, on rows of several lengths in the batches of `label`.

| variant | what runs |
| --- | --- |
| prefill | the forward of the reference model over the batches, with the last token's logits only |
| prefill, logits | the same with the logits of all tokens, which labels need |
| labelling | `label` with all tokens supervised |
| labelling, half | `label` with the second half of each text supervised |

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
AIMS = {"step": 1.20, "memory": 1.10, "labels": 1 / 0.9}  # ratios of `stage 1` to `plain`, of `labelling` to `prefill`


@dataclass(frozen=True)
class Setup:
    """Settings that all variants of a run share.

    Args:
        model: TaH checkpoint, base model, or `smollm2`.
        precision: `float32`, `bfloat16`, or `autocast` (float32 weights, bfloat16 products).
        random: Whether the weights are random; then only config.json of the model is read.
        checkpointing: Whether the backward recomputes activations.
        device: Device of the training.
    """

    model: str
    precision: str = "float32"
    random: bool = False
    checkpointing: bool = False
    device: str = "cpu"

    def load(self) -> PreTrainedModel:
        """Load the TaH model of a TaH checkpoint, else the base.

        Raises:
            ValueError: The model or the precision does not exist.
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
        """Load the base."""
        loaded = self.load()
        return loaded.base if isinstance(loaded, TaHForCausalLM) else loaded

    def wrapped(self) -> TaHForCausalLM:
        """Load the TaH model, or wrap the base; without a decider, since stage 1 neither runs nor trains one."""
        loaded = self.load()
        if isinstance(loaded, TaHForCausalLM):
            return loaded
        return TaHForCausalLM.from_base(loaded, decider=None, policy="never")


def hard_labels(batch: int, length: int) -> Tensor:
    """Return depth labels [B, T]: 2 for a share `HARD` of the positions that predict a token, else 1.

    The seed of the sample is fixed.
    """
    generator, labels = torch.Generator().manual_seed(SEED), torch.ones(batch, length, dtype=torch.long)
    for row in labels:
        row[torch.randperm(length - 1, generator=generator)[: round(HARD * (length - 1))]] = 2
    return labels


class Trainee:
    """The model of a variant with its optimiser.

    Args:
        variant: One of `VARIANTS`.
        setup: Settings, which all variants of a run share.
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
        self.optimizer = torch.optim.AdamW(trained, lr=1e-6, fused=True)  # Trainer's default except the learning rate

    def loss(self, ids: Tensor, depth_labels: Tensor) -> Tensor:
        """Return the training loss of a batch [B, T]."""
        with ExitStack() as stack:
            if self.setup.precision == "autocast":
                stack.enter_context(torch.autocast(ids.device.type, dtype=torch.bfloat16))
            if self.variant == "plain":
                return self.model(ids, labels=ids, use_cache=False).loss
            if self.variant == "plain, LoRA":
                stack.enter_context(at_depth(2))  # LoRA is active from depth 2 on
                return self.model.base(ids, labels=ids, use_cache=False).loss
            policy = "never" if self.variant == "standard" else "oracle"
            return self.model(ids, labels=ids, depth_labels=depth_labels, policy=policy).loss

    def stepper(self, batch: int, length: int) -> Callable[[], None]:
        """Return a function that runs one training step on a fixed batch [B, T]."""
        ids, labels = prompts(self.model, batch, length), hard_labels(batch, length).to(self.model.device)

        def step() -> None:
            self.loss(ids, labels).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

        return step


# -- memory ------------------------------------------------------------------------------------------------------


def peak_memory(variant: str, setup: Setup, batch: int, length: int) -> float:
    """Return the MiB of weights, gradients, optimiser and a training step, measured in a new process.

    The result is the peak resident memory (on a GPU: allocated memory) in the second step, minus the resident memory
    before the model is loaded.
    """
    return measure.in_fresh_process(variant, peak, variant, setup, batch, length)


def peak(variant: str, setup: Setup, batch: int, length: int) -> float:
    """Measure `peak_memory` in this process."""
    before, trainee = measure.resident(), Trainee(variant, setup)
    step = trainee.stepper(batch, length)
    step()  # allocates the optimiser's state
    return measure.peak_during(step, trainee.model.device, before)


# -- labelling ---------------------------------------------------------------------------------------------------


def label_seconds(
    setup: Setup, number: int, longest: int, batch: int, repeats: int
) -> tuple[dict[str, list[float]], int]:
    """Return the seconds of all rounds for each variant of `LABELLING`, and the number of tokens.

    The time of `label` is that of its shards, from text to file. It does not include the fingerprints, which are
    computed once per data set.

    Args:
        setup: Settings; `model` is the reference model and needs a tokenizer.
        number: Number of texts.
        longest: Tokens of the longest text; the shortest has an eighth of them.
        batch: Maximum tokens of a forward, including padding.
        repeats: Number of rounds, in addition to one warm-up round.
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
    """Measure all variants.

    Args:
        setup: Settings of the training.
        variants: Variants of `VARIANTS`; ratios are to the first.
        shapes: Shapes (B, T) of the batches.
        repeats: Number of rounds; the result is their median.
        memory: Whether to measure peak memory, in a new process per variant and shape.
        labels: Number of texts to label, tokens of the longest text, tokens of a batch; None for no labelling.
        progress: Reporter, which gets a line for each row.

    Returns:
        `{"machine", "settings", "rows"}`.
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
    """Return the result as a Markdown table."""
    lines = []
    for row in (Row(**row) for row in result["rows"]):
        rate = "" if row.tokens_per_second is None else f"{row.tokens_per_second:.0f}"
        aim = f"{AIMS[row.task.partition(',')[0]]:.2f}" if row.variant in ("stage 1", "labelling") else ""
        lines.append((row.dtype, row.task, row.variant, row.value, rate, f"{row.ratio:.2f}", aim))
    return table(("precision", "task", "variant", "median", "tokens/s", "ratio", "aim"), lines)
