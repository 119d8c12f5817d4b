"""Drop the least useful layers of a base, so that a TaH model is no larger than the base (method.md, section 12).

Each layer is left out in turn. The layer without which the perplexity of held-out texts is lowest is dropped. If
several layers are dropped, the perplexities are measured again after each. The perplexity is that of the mean loss over
all supervised tokens, not of a mean over batches. The loss is computed in float32 for any precision of the model.

Shapes: T tokens, D width, V vocabulary.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..core.compat import LOADING, attention_of
from ..core.families import PROBE_TOKENS, check_facts, decoder_layers, decoder_of, head_of
from ..markdown import table
from ..progress import SILENT, Reporter

CHUNK = 512  # tokens whose logits [CHUNK, V] exist in float32 at the same time
TEXTS = 64  # with fewer texts the order of the layers is mostly noise
# Configurations describe layers by one entry per layer, by a list of indices, or by the number of the first layers.
PER_LAYER = re.compile(r"layer|block|pattern|types")
INDEX_LISTS = ("moe_layers", "mlp_only_layers")
FIRST_LAYERS = ("first_k_dense_replace", "num_dense_layers")


@dataclass
class Text:
    """A held-out text.

    Args:
        tokens: Token ids, `[T]`.
        counts: Whether each token is supervised, `[T]`.
    """

    tokens: list[int]
    counts: list[bool]


@dataclass
class Round:
    """One dropped layer. Layers have the numbers of the original base.

    Args:
        dropped: Number of the layer.
        before: Perplexity before it is dropped.
        after: Perplexity after it is dropped.
        candidates: Perplexity without each layer, by layer.
    """

    dropped: int
    before: float
    after: float
    candidates: dict[int, float]


@dataclass
class PruneReport:
    """The dropped layers and the perplexities that they were chosen by.

    Args:
        base: Name of the base.
        family: `model_type` of the base.
        layers: Number of layers before pruning.
        parameters: Number of parameters before pruning.
        texts: Number of held-out texts.
        tokens: Number of supervised tokens in them.
        rounds: One entry per dropped layer.
        parameters_after: Number of parameters after pruning.
    """

    base: str
    family: str
    layers: int
    parameters: int
    texts: int
    tokens: int
    rounds: list[Round] = field(default_factory=list)
    parameters_after: int = 0

    @property
    def dropped(self) -> list[int]:
        """Numbers of the dropped layers, in the order of dropping."""
        return [each.dropped for each in self.rounds]

    def as_markdown(self) -> str:
        """Return the report as Markdown."""
        first, last = self.rounds[0], self.rounds[-1]
        lines = [
            f"# {self.base}, pruned",
            "",
            f"Dropped: layer {', '.join(map(str, self.dropped))} of {self.layers} (counted from 0). "
            f"Parameters: {self.parameters:,} -> {self.parameters_after:,}. "
            f"Perplexity: {first.before:.4f} -> {last.after:.4f}, over {self.tokens:,} tokens of {self.texts} texts.",
            "",
            "The table has the perplexity without each layer. The layer with the lowest value of a column is dropped.",
            "",
        ]
        rows = []
        for layer in range(self.layers):
            cells = [f"{each.candidates[layer]:.4f}" if layer in each.candidates else "" for each in self.rounds]
            cells = [
                f"**{cell}**" if each.dropped == layer else cell for cell, each in zip(cells, self.rounds, strict=True)
            ]
            rows.append([str(layer), *cells])
        columns = ["layer", *(f"drop {n}" for n in range(1, len(self.rounds) + 1))]
        return "\n".join([*lines, table(columns, rows)]) + "\n"


@torch.no_grad()
def prune(
    base: PreTrainedModel,
    tokenizer: Any,
    texts: Sequence[Text],
    layers: int,
    output: str | Path,
    *,
    fewest: int = TEXTS,
    progress: Reporter = SILENT,
    dtype: torch.dtype | None = None,
) -> PruneReport:
    """Drop `layers` layers from `base` in place, and write the result as a normal checkpoint.

    The directory appears only when it is complete.

    Args:
        base: Decoder of a supported family.
        tokenizer: Tokenizer to save beside the weights, or None.
        texts: Held-out texts.
        layers: Number of layers to drop, one after the other.
        output: Directory to create. It also contains `prune.json` and `prune.md`.
        fewest: Smallest number of texts.
        progress: Reporter of the texts, for each layer to drop.
        dtype: Data type of the checkpoint; by default that of the base.

    Returns:
        The dropped layers and the perplexities.

    Raises:
        ValueError: There are too few texts or layers, the output is not an empty directory, the logits are NaN, or a
            layer of the family depends on its number.
    """
    target = check_output(output)
    check_layers(base, layers)
    check_texts(len(texts), fewest)
    base.eval()
    config = base.config.get_text_config(decoder=True)
    name = base.config.name_or_path or ""
    name = Path(name).name if Path(name).is_dir() else name  # the report contains no path of this machine
    made = PruneReport(
        base=name or config.model_type,
        family=base.config.model_type,
        layers=config.num_hidden_layers,
        parameters=base.num_parameters(),
        texts=len(texts),
        tokens=sum(sum(text.counts[1:]) for text in texts),
    )
    left = list(range(made.layers))
    for _ in range(layers):
        before, without = perplexities(base, texts, progress)
        least = min(range(len(left)), key=lambda at: (without[at], at))
        drop_layer(base, least)
        candidates = dict(zip(left, without, strict=True))
        made.rounds.append(Round(left.pop(least), before, without[least], candidates))
    made.parameters_after = base.num_parameters()
    _save(base if dtype is None else base.to(dtype), tokenizer, made, target)
    return made


# -- measuring -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def perplexities(
    base: PreTrainedModel, texts: Sequence[Text], progress: Reporter = SILENT
) -> tuple[float, list[float]]:
    """Return the perplexity of the base, and its perplexity without each layer.

    A layer is left out by using its input as its output. The layers before it do not run again: their recorded outputs
    are used. All candidates together therefore cost half as much as one forward per layer.

    Args:
        base: Decoder of a supported family.
        texts: Held-out texts.
        progress: Reporter of the texts.

    Raises:
        ValueError: No token is supervised, or the logits are NaN.
    """
    layers = list(decoder_layers(decoder_of(base), base.config.get_text_config(decoder=True).num_hidden_layers))
    total, without = 0.0, [0.0] * len(layers)
    count = sum(sum(text.counts[1:]) for text in texts)
    if count == 0:
        raise ValueError("the held-out texts have no supervised token")
    with progress.work("leaving out each layer", len(texts), "texts") as work:
        for text in texts:
            seen: list[tuple[Tensor, Any]] = []  # per layer: its input [1, T, D] and its output
            with _recording(layers, seen):
                total += _loss(base, text)
            for at in range(len(layers)):
                with _replaying(layers[: at + 1], seen, at):
                    without[at] += _loss(base, text)
            work.advance()
    if math.isnan(total):
        raise ValueError("the base's logits are NaN on the held-out texts; its weights are damaged")
    return _perplexity(total / count), [_perplexity(loss / count) for loss in without]


def _perplexity(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def _loss(base: PreTrainedModel, text: Text) -> float:
    """Return the cross-entropy in nats, summed over the supervised tokens."""
    head, device = head_of(base), base.get_input_embeddings().weight.device
    tokens = torch.tensor([text.tokens], device=device)
    hidden = decoder_of(base)(input_ids=tokens, use_cache=False).last_hidden_state[0]  # [T, D]
    predicts = torch.tensor(text.counts[1:], device=device).nonzero()[:, 0]
    each = [
        F.cross_entropy(head(hidden[part]).float(), tokens[0, part + 1], reduction="sum")
        for part in predicts.split(CHUNK)
    ]
    return float(torch.stack(each).double().sum())


@contextmanager
def _recording(layers: list[nn.Module], seen: list[tuple[Tensor, Any]]) -> Iterator[None]:
    """Append the input and output of every layer to `seen` while the base runs once."""

    def note(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        seen.append((args[0] if args else kwargs["hidden_states"], out))

    hooks = [layer.register_forward_hook(note, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _replaying(layers: list[nn.Module], seen: list[tuple[Tensor, Any]], skipped: int) -> Iterator[None]:
    """Make `layers` return their recorded outputs without running; layer `skipped` returns its input."""

    def given(at: int) -> Callable[..., Any]:
        into, out = seen[at]
        if at == skipped:
            out = (into, *out[1:]) if isinstance(out, tuple) else into
        return lambda *args, **kwargs: out

    try:
        for at, layer in enumerate(layers):
            layer.forward = given(at)
        yield
    finally:
        for layer in layers:
            layer.__dict__.pop("forward", None)


# -- dropping --------------------------------------------------------------------------------------------------------


def drop_layer(base: PreTrainedModel, index: int) -> None:
    """Remove a layer in place, from the module list and from the configuration.

    Args:
        base: Decoder of a supported family.
        index: Number of the layer, from 0.
    """
    config = base.config.get_text_config(decoder=True)
    number = config.num_hidden_layers
    layers = decoder_layers(decoder_of(base), number)
    changes: dict[str, Any] = {}
    for name, value in config.to_dict().items():
        if name in INDEX_LISTS and isinstance(value, list):
            changes[name] = [at - (at > index) for at in value if at != index]
        elif isinstance(value, list) and len(value) == number and PER_LAYER.search(name):
            changes[name] = value[:index] + value[index + 1 :]
        elif name in FIRST_LAYERS and isinstance(value, int) and index < value:
            changes[name] = value - 1
    del layers[index]
    # Lists come first: a configuration may compare their lengths with the number of layers when that number is set.
    for name, value in changes.items():
        setattr(config, name, value)
    config.num_hidden_layers = number - 1
    for at, layer in enumerate(layers):
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = at  # type: ignore[assignment]


def check_layers(base: PreTrainedModel, layers: int) -> None:
    """Raise ValueError if the family of `base` is not supported, or if it has no more than `layers` layers."""
    check_facts(base)
    most = base.config.get_text_config(decoder=True).num_hidden_layers - 1
    if not 1 <= layers <= most:
        raise ValueError(f"layers={layers} must be from 1 to {most}: the base has {most + 1}")


def check_texts(count: int, fewest: int) -> None:
    """Raise ValueError if `count` is less than `fewest`."""
    if count < fewest:
        raise ValueError(
            f"there are only {count} of the {fewest} held-out texts; add data, or set a smaller number of texts "
            "(base.prune_texts, --texts)"
        )


def check_output(output: str | Path) -> Path:
    """Return the path of the output directory, with links resolved.

    Raises:
        ValueError: Something exists there, or it is not writable.
    """
    target = Path(os.path.realpath(output))
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{output} exists and is not an empty directory; choose another --output")
    existing = next(path for path in target.parents if path.exists())
    try:
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=existing):
            pass
    except OSError as error:
        raise ValueError(f"{output} cannot be written to ({error.strerror}); choose another --output") from error
    return target


def _save(base: PreTrainedModel, tokenizer: Any, made: PruneReport, target: Path) -> None:
    """Write the checkpoint beside `target`, check that it loads as the same model, and rename it to `target`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        base.save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        _check_reload(base, partial)
        (partial / "prune.json").write_text(json.dumps(asdict(made), indent=2) + "\n", "utf-8")
        (partial / "prune.md").write_text(made.as_markdown(), "utf-8")
        if target.exists():
            target.rmdir()  # fails unless empty
        partial.chmod(0o755)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _check_reload(base: PreTrainedModel, directory: Path) -> None:
    """Check that a saved model computes the same logits when it is loaded.

    The logits differ if the family computes a layer by its number or by the number of layers.

    Raises:
        ValueError: The logits differ.
    """
    device = base.get_input_embeddings().weight.device
    with LOADING:
        again = AutoModelForCausalLM.from_pretrained(
            directory, dtype=base.dtype, attn_implementation=attention_of(base.config), trust_remote_code=False
        )
    again = again.to(device).eval()
    ids = torch.arange(PROBE_TOKENS, device=device)[None] % base.config.get_text_config(decoder=True).vocab_size
    want, got = base(ids, use_cache=False).logits, again(ids, use_cache=False).logits
    if not torch.equal(want, got):
        raise ValueError(
            f"{type(base).__name__} cannot be pruned: its layers depend on their number or on the number of layers, "
            "so the saved checkpoint loads as a different model"
        )
