"""`tah bench train`: what training with hard tokens costs, as a ratio to training the base alone.

A step is forward, backward, AdamW and zeroing the gradients, on random tokens that are all supervised. As in
`bench.py`, variants take turns inside every round, ratios are medians over the rounds, and memory is measured in one
fresh process per variant. Every variant has a model of its own.

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

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from ..core.lora import at_depth
from ..files import write_atomically
from ..load import find, load_base, load_tah, load_tokenizer
from ..model import TaHForCausalLM
from .bench import SEED, Row, _high_water, _resident, in_fresh_process, interleave, machine, prompts, sync

VARIANTS = ("plain", "standard", "stage 1", "plain, LoRA", "stage 1, LoRA")
LABELLING = ("prefill", "prefill, logits", "labelling", "labelling, half")
SHAPES = ((1, 512), (4, 512), (1, 2048))
HARD = 0.12  # share of hard tokens among the supervised ones
AIMS = {"step": 1.20, "memory": 1.10, "labels": 1 / 0.9}  # of `stage 1` to `plain`, of `labelling` to `prefill`
PRECISIONS = ("float32", "bfloat16", "autocast")


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
            raise ValueError(f"precision {self.precision!r} is not one of {', '.join(PRECISIONS)}")
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
        return (
            loaded
            if isinstance(loaded, TaHForCausalLM)
            else TaHForCausalLM.from_base(loaded, decider=None, policy="never")
        )


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
    call = f"from tah.benchmarks.bench_train import _peak; _peak({variant!r}, {asdict(setup)!r}, {batch}, {length})"
    return in_fresh_process(call, variant)


def _peak(variant: str, setup: dict[str, Any], batch: int, length: int) -> None:
    """Runs in the fresh process of `peak_memory`; prints MiB."""
    before, trainee = _resident(), Trainee(variant, Setup(**setup))
    step = trainee.stepper(batch, length)
    step()  # the optimiser's state comes with it
    if trainee.model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        print(torch.cuda.max_memory_allocated() / 2**20)
        return
    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark of resident memory
    step()
    print(_high_water() - before)


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

    from ..data.rows import tokenize_row
    from ..data.scoring import batches
    from ..training.label import label

    model, tokenizer = setup.plain().eval(), load_tokenizer(find(setup.model)[0])
    texts = words(tokenizer, [longest // 8 + (longest - longest // 8) * row // number for row in range(number)])
    rows = {
        "labelling": [{"text": text} for text in texts],
        "labelling, half": [{"prompt": text[: len(text) // 2], "completion": text[len(text) // 2 :]} for text in texts],
    }
    found = [tokenize_row(row, tokenizer, longest, "cut") for row in rows["labelling"]]
    ids = [torch.tensor(row["input_ids"]) for row in found if row is not None]
    groups = batches([len(row) for row in ids], batch)
    inputs = [torch.nn.utils.rnn.pad_sequence([ids[row] for row in group], batch_first=True) for group in groups]

    @torch.no_grad()
    def prefill(keep: int) -> float:
        sync(model.device)
        start = time.perf_counter()
        for its in inputs:
            model(its.to(model.device), use_cache=False, logits_to_keep=keep)
        sync(model.device)
        return time.perf_counter() - start

    def labelling(name: str) -> float:
        data = datasets.Dataset.from_list(rows[name])
        with tempfile.TemporaryDirectory() as output:
            done = label(data, tokenizer, model, output, max_length=longest, tokens_per_batch=batch, too_long="cut")
        return float(done["seconds"])

    seconds: dict[str, list[float]] = {name: [] for name in LABELLING}
    for turn in range(repeats + 1):
        for name in LABELLING[turn % 4 :] + LABELLING[: turn % 4]:
            taken = labelling(name) if name in rows else prefill(1 if name == "prefill" else 0)
            if turn:
                seconds[name].append(taken)
    return seconds, sum(map(len, ids))


def words(tokenizer: Any, lengths: list[int]) -> list[str]:
    """Texts of about that many tokens, of random printable ones."""
    known = tokenizer.batch_decode([[token] for token in range(tokenizer.vocab_size)], skip_special_tokens=True)
    known = [text for text in known if text and text.isascii() and text.isprintable()]
    generator = torch.Generator().manual_seed(SEED)
    return ["".join(known[at] for at in torch.randint(len(known), (n,), generator=generator)) for n in lengths]


# -- the benchmark -----------------------------------------------------------------------------------------------


def bench_train(
    setup: Setup,
    *,
    variants: tuple[str, ...] = VARIANTS,
    shapes: tuple[tuple[int, int], ...] = SHAPES,
    repeats: int = 5,
    memory: bool = True,
    labels: tuple[int, int, int] | None = (32, 512, 4096),
    report: Callable[[Row], None] = lambda row: None,
) -> dict[str, Any]:
    """Measure all variants: `{"machine", "settings", "rows"}`.

    Args:
        setup: what to train and how.
        variants: of `VARIANTS`; the first is the one that the others are compared with.
        shapes: (B, T) of the batches.
        repeats: rounds; the median counts.
        memory: also measure that, a process per variant and shape.
        labels: number of texts to label, tokens of the longest, tokens of a batch; None: no labelling.
        report: called with each row as it comes.
    """
    rows: list[Row] = []

    def add(task: str, values: dict[str, list[float]], tokens: int) -> None:
        first = next(iter(values.values()))
        for name, its in values.items():
            ratio, median = statistics.median(v / b for v, b in zip(its, first, strict=True)), statistics.median(its)
            share = HARD if name.startswith("stage 1") else 0.0
            rows.append(Row(setup.precision, task, name, median, ratio, share, tokens / median if tokens else None))
            report(rows[-1])

    trainees = {variant: Trainee(variant, setup) for variant in variants}
    for batch, length in shapes:
        runs = {variant: trainee.stepper(batch, length) for variant, trainee in trainees.items()}
        device = next(iter(trainees.values())).model.device
        add(f"step, {batch} x {length}", interleave(runs, repeats, device), batch * length)
    runs, trainees = {}, {}
    for batch, length in shapes if memory else ():
        add(f"memory, {batch} x {length}", {v: [peak_memory(v, setup, batch, length)] for v in variants}, 0)
    if labels is not None:
        add("labels", *label_seconds(setup, *labels, repeats))
    settings = {**asdict(setup), "hard": HARD, "repeats": repeats, "labels": labels and list(labels), "seed": SEED}
    return {"machine": machine(), "settings": settings, "rows": [asdict(row) for row in rows]}


def markdown(result: dict[str, Any]) -> str:
    """The result as the table of docs/benchmarks.md."""
    lines = [
        "| precision | task | variant | median | tokens/s | ratio | aim |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in result["rows"]:
        kind = row["task"].partition(",")[0]
        value = f"{row['median']:.0f} MiB" if kind == "memory" else f"{row['median'] * 1000:.0f} ms"
        rate = "" if row["tokens_per_second"] is None else f"{row['tokens_per_second']:.0f}"
        aim = f"{AIMS[kind]:.2f}" if row["variant"] in ("stage 1", "labelling") else ""
        lines.append(
            f"| {row['dtype']} | {row['task']} | {row['variant']} | {value} | {rate} | {row['ratio']:.2f} | {aim} |"
        )
    return "\n".join(lines)


def save(result: dict[str, Any], folder: Path) -> None:
    """Write bench_train.json and bench_train.md."""
    write_atomically(folder / "bench_train.json", json.dumps(result, indent=2) + "\n")
    write_atomically(folder / "bench_train.md", markdown(result) + "\n")
