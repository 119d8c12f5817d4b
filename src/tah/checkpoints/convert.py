"""Write a checkpoint of the original implementation (spec C.1) as a native TaH checkpoint.

No code of the checkpoint runs: see `original.py` for its pickle and its configuration; `auto_map` is refused, and
weights must be safetensors. There is no way back: the original layout needs a pickle, and this package writes none.
The adapter alone can be exchanged, see `adapters.py`.

Where the original surprises, the converter does what its loader does, and says so in the report:

* The threshold is `iter_decider_kwargs.threshold` (0.5 when absent), never the one among the weights. It is rounded to
  `iter_decider_kwargs.dtype` and then to the base's dtype: 0.9 is 0.8984375 in bfloat16.
* The decider runs in the base's dtype, whatever it was saved in. `logits_projection` and `combined_projection` are
  built in `iter_decider_kwargs.dtype` (bfloat16 when absent), so they lose precision even for a float32 base.
* A decider stops at its own `max_iter`, 3 when `iter_decider_kwargs` has none, however large the model's is.
* The class and arguments saved in `iter_decider.bin` count only where the config has none. State entries named like
  an argument (`threshold`) are dropped. The original ignores missing entries; here they are errors.
* `eval_iter_decider` decides at inference. Given as a class name it is built afresh; an MLPIterDecider would then be
  untrained, so the trained weights are used with its arguments.
* PEFT keeps an adapter in float32 next to a base in half precision; here it takes the base's dtype.

Defaults of MLPIterDecider that the spec gives: layers (16, 20, 24, 28), widths (256, 512, 256), dropout 0.3, threshold
0.5, max_iter 3. Assumed, from the original's constructor: topk 100, expansion 4, normalize_input False, dtype bfloat16.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from ..config import TaHConfig
from ..decider import build_decider
from ..model import TaHForCausalLM
from .hub import TOKENIZER, Snapshot, is_repository, original_directory, own_files
from .original import CONFIG, DECIDER, READ, OriginalDecider, read_config, read_decider
from .peft import Adapter, read_adapter
from .smollm2 import cache_dir, locked, progress
from .untrusted import build_empty, check_model, empty_base, read_json, weight_files
from .weights import WEIGHTS, misshapen

VERSION = 1  # part of the names in the cache: raise it whenever what is converted changes


@dataclass
class ConversionReport:
    """What was converted, and everything about it that might surprise."""

    base_family: str
    parameters: int
    max_depth: int
    threshold: float
    dtype: str
    unknown_keys: list[str]
    notes: list[str]

    def __str__(self) -> str:
        lines = [
            f"base       {self.base_family}, {self.dtype}",
            f"parameters {self.parameters:,} with adapter and decider",
            f"max_depth  {self.max_depth}",
            f"threshold  {self.threshold:.7g}",
        ]
        if self.unknown_keys:
            lines.append(f"ignored    unknown keys of tah_config.json: {', '.join(self.unknown_keys)}")
        return "\n".join(lines + [f"note       {note}" for note in self.notes])


def convert(src: str | Path, dst: str | Path, *, threshold: float | None = None) -> ConversionReport:
    """Convert the original checkpoint in `src` to a native one in `dst`, all of it or nothing.

    Args:
        src: directory with `config.json`, `model.safetensors` (or its shards), `tah_config.json`, and as a rule
            `iter_decider.bin`, `lora/` and a tokenizer; a str may also be the id of such a repository on the hub.
        dst: directory to make; it may exist if it is empty.
        threshold: instead of the checkpoint's. The authors evaluate with 0.9, which their checkpoints do not say.

    Raises:
        ValueError: the checkpoint is incomplete, damaged, asks for code, or asks for what a TaH model cannot do;
            or `dst` is not empty. One line with the file and the entry.
    """
    source, target = Path(src), Path(os.path.realpath(dst))
    if not source.is_dir() and not (isinstance(src, str) and is_repository(src)):
        raise ValueError(f"{source} is not a directory; convert reads a checkpoint that has been downloaded")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists and is not an empty directory; choose another destination")
    if not source.is_dir():
        source = original_directory(Snapshot(str(src)))
    notes: list[str] = []
    config = read_config(source)
    decider = read_decider(source, config, notes)
    adapter = _read_lora(source, config)
    base = _load_base(source, config["embedding_key"])
    fields = _config_fields(config, decider, adapter, base, threshold, notes)
    if adapter:
        adapter.check_shapes(base)
    if decider.state is not None:
        _check_decider(decider, base, fields)
    model = TaHForCausalLM.from_base(base, **fields)
    if adapter:
        adapter.copy_to(model)
    if decider.state is not None:
        _copy_decider(decider, model)
    report = ConversionReport(
        base_family=base.config.model_type,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        max_depth=fields["max_depth"],
        threshold=fields["threshold"],
        dtype=str(base.dtype).removeprefix("torch."),
        unknown_keys=sorted(config.keys() - READ - {"mix_topk"}),
        notes=notes,
    )
    _save(model, source, target)
    return report


def _config_fields(
    config: dict[str, Any],
    decider: OriginalDecider,
    adapter: Adapter | None,
    base: PreTrainedModel,
    threshold: float | None,
    notes: list[str],
) -> dict[str, Any]:
    """The `TaHConfig` of the checkpoint, but for its base."""
    arguments, dtype = decider.arguments, base.dtype
    given = arguments["threshold"] if threshold is None else threshold
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not 0 <= given <= 1:
        raise ValueError(f"threshold={given!r} must be a number in [0, 1]")
    rounded = torch.tensor(given, dtype=arguments["dtype"]).to(dtype).item()
    if abs(rounded - given) > 1e-6:
        notes.append(f"threshold {given} is {rounded:.7g} in the decider's precision, as in the original")
    fields: dict[str, Any] = {
        "max_depth": decider.max_depth,
        "mix_topk": config["mix_topk"],
        "policy": decider.policy,
        "threshold": rounded,
        "decider": None,
        "lora_rank": 0,
    }
    if decider.state is not None:
        fields["decider"] = {
            "kind": "mlp",
            "layers": arguments["hidden_states_layer_nums"],
            "hidden_dims": arguments["hidden_dims"],
            "expansion": arguments["expansion_factor"],
            "topk": arguments["topk"],
            "normalize_input": arguments["normalize_input"],
            "dropout": arguments["dropout_rate"],
        }
        if any(tensor.dtype != dtype for tensor in decider.state.values()):
            notes.append(f"the decider is rounded to the base's {dtype}, as in the original")
        elif arguments["dtype"] != dtype:
            notes.append(f"the decider's first projections are rounded to {arguments['dtype']}, as in the original")
    if adapter:
        fields |= adapter.fields_for(base)
        if any(tensor.dtype != dtype for tensor in adapter.tensors.values()):
            notes.append(f"the adapter is rounded to the base's {dtype}; the original computes it in float32")
    return fields


def _read_lora(source: Path, config: dict[str, Any]) -> Adapter | None:
    """The adapter in `lora/`, which the config must agree with: PEFT would follow the config's rank and scale."""
    directory, wanted = source / "lora", config["adapter"] == "lora"
    if wanted != directory.is_dir():
        state = "is there" if directory.is_dir() else "is missing"
        raise ValueError(f"tah_config.json: adapter is {config['adapter']!r}, but {directory} {state}")
    if not wanted:
        return None
    adapter = read_adapter(directory)
    for key in ("r", "lora_alpha", "use_rslora"):
        ours = (config.get("adapter_kwargs") or {}).get(key, adapter.settings.get(key))
        if ours != adapter.settings.get(key):
            raise ValueError(f"{key} is {adapter.settings.get(key)!r} in lora/, but {ours!r} in tah_config.json")
    return adapter


def convert_once(name: str, key: str, fetch: Callable[[], Path]) -> Path:
    """A checkpoint of the original implementation as one of ours, in the cache; converted where it is not there yet.

    Args:
        name: of the checkpoint, for people.
        key: tells its revisions apart.
        fetch: where the original is; called only if it is needed.

    Raises:
        ValueError: it cannot be converted.
    """
    words = re.sub(r"[^\w.-]+", "--", name).strip(".-")[-80:] or "original"
    target = cache_dir() / f"{words}-{key}-tah-v{VERSION}"
    if _is_whole(target):
        return target
    with locked(target):
        if not _is_whole(target):  # another process may have converted it while this one waited for the lock
            for leftover in target.parent.glob(f".{target.name}.partial-*"):  # of killed runs: the lock is ours
                shutil.rmtree(leftover, ignore_errors=True)
            shutil.rmtree(target, ignore_errors=True)
            source = fetch()
            with progress(f"Converting {name} from the authors' layout (once)", after=True):
                convert(source, target)
    return target


def files_read(source: Path) -> list[str]:
    """The files of an original checkpoint that `convert` reads, and so those that its result depends on."""
    names = ["config.json", "generation_config.json", "model.safetensors.index.json", CONFIG, *TOKENIZER]
    try:
        names += [path.name for path in weight_files(source, read_json(source / "config.json"))]
        names += own_files(read_config(source))
    except ValueError:  # `convert` says so
        pass
    return names


def _is_whole(directory: Path) -> bool:
    """Whether a converted checkpoint is there: it got its name when it was, so only a later hand can have harmed it."""
    names = [path.name for path in directory.iterdir()] if directory.is_dir() else []
    return "config.json" in names and any(WEIGHTS.fullmatch(name) for name in names)


def _check_base_files(source: Path) -> None:
    """Everything about the base that can be refused before it is loaded."""
    if not (source / "config.json").is_file():
        raise ValueError(f"{source} has no config.json")
    if (source / "adapter_config.json").exists():  # transformers would follow it to another base
        raise ValueError(f"{source} has an adapter_config.json of its own; the adapter belongs in lora/")
    try:
        described = read_json(source / "config.json")
        wanted = {key for key, value in described.items() if key in ("auto_map", "quantization_config") and value}
        if not wanted:
            check_model(source, lambda: empty_base(source))
    except ValueError as error:
        line = str(error).removeprefix(f"{source}/").removeprefix(f"{source} ")
        damaged = " is damaged or incomplete: " in line
        raise ValueError(line if damaged else f"the base in {source} cannot be loaded: {line}") from error
    for key in sorted(wanted):
        raise ValueError(f"config.json has {key}; only plain weights of a family in transformers can be converted")


def _load_base(source: Path, embedding_key: str) -> PreTrainedModel:
    """The base model in the dtype of the checkpoint, complete and with nothing left over."""
    _check_base_files(source)
    try:
        base, loading = AutoModelForCausalLM.from_pretrained(
            source,
            dtype="auto",
            attn_implementation="eager",
            trust_remote_code=False,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
        )
    except (ImportError, OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"the base in {source} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    for what in ("missing", "unexpected"):
        if names := sorted(loading[f"{what}_keys"]):
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"the base weights have {what} tensors: {', '.join(names[:3])}{more}")
    if wrong := misshapen(loading):
        raise ValueError(f"the base weights do not fit config.json: {wrong[0]}")
    if dict(base.named_modules()).get(embedding_key) is not base.get_input_embeddings():
        raise ValueError(f"tah_config.json: embedding_key is {embedding_key!r}, not the input embedding of the base")
    base.config.name_or_path = ""  # the new checkpoint does not say where the old one lay
    return base


def _check_decider(decider: OriginalDecider, base: PreTrainedModel, fields: dict[str, Any]) -> None:
    """Raise `ValueError` unless the tensors are those of the decider that the arguments describe, before it is made."""
    assert decider.state is not None
    config = TaHConfig(base_config=base.config, **fields)
    text, state = base.config.get_text_config(decoder=True), decider.state
    sizes = text.hidden_size, text.vocab_size
    try:
        empty = build_empty(lambda: build_decider(config.decider or {}, *sizes), len(state), CONFIG)
    except ValueError as error:
        raise ValueError(f"{DECIDER} does not fit its arguments: {error}") from error
    own = empty.state_dict()
    wrong = [f"{name} is missing" for name in own.keys() - state.keys()]
    wrong += [f"{name} is not a parameter of this decider" for name in state.keys() - own.keys()]
    for name in own.keys() & state.keys():
        if own[name].shape != state[name].shape:
            wrong.append(f"{name} is {list(state[name].shape)}, not {list(own[name].shape)}")
    if wrong:
        more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ValueError(f"{DECIDER} does not fit its arguments: {min(wrong)}{more}")


@torch.no_grad()
def _copy_decider(decider: OriginalDecider, model: TaHForCausalLM) -> None:
    """Copy the MLP's tensors into the model's decider, in the model's dtype."""
    assert model.decider is not None and decider.state is not None
    own = model.decider.state_dict()
    for name, tensor in decider.state.items():
        if name.split(".")[0] in ("logits_projection", "combined_projection"):
            tensor = tensor.to(decider.arguments["dtype"])
        own[name].copy_(tensor)


def _save(model: TaHForCausalLM, source: Path, target: Path) -> None:
    """Write the checkpoint beside `target` and then rename it, so that `target` is never half a checkpoint."""
    partial = target.with_name(f".{target.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        model.save_pretrained(partial)
        for name in TOKENIZER:
            if (source / name).is_file():
                shutil.copyfile(source / name, partial / name)
        if target.exists():
            target.rmdir()  # empty, or this fails
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
