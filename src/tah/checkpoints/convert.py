"""Write a checkpoint of the original implementation as a native TaH checkpoint.

No code of the checkpoint runs. `original.py` reads its pickle and its configuration, an `auto_map` raises `ValueError`,
and weights must be safetensors. Conversion to the original layout is not supported, because that layout needs a pickle
and this package writes none. `peft.py` exchanges the LoRA adapter alone.

The converter reproduces the original loader in these surprising cases, and the report has a note about each:

* The threshold is `iter_decider_kwargs.threshold` (0.5 when absent), never the one among the weights. It is rounded to
  `iter_decider_kwargs.dtype` and then to the base's dtype: 0.9 is 0.8984375 in bfloat16.
* The decider runs in the base's dtype, whatever it was saved in. `logits_projection` and `combined_projection` are
  built in `iter_decider_kwargs.dtype` (bfloat16 when absent), so they lose precision even for a float32 base.
* A decider stops at its own `max_iter` (3 when absent from `iter_decider_kwargs`), even if the model's is larger.
* The class and arguments saved in `iter_decider.bin` count only where the config has none. State entries named like
  an argument (`threshold`) are dropped. The original ignores missing entries; here they are errors.
* `eval_iter_decider` decides at inference. If it is a class name, the original builds a new, untrained decider. For an
  MLPIterDecider the converter uses the trained weights with the arguments of the new one.
* PEFT keeps an adapter in float32 next to a base in half precision; here it takes the base's dtype.

Defaults of MLPIterDecider in the paper: layers (16, 20, 24, 28), widths (256, 512, 256), dropout 0.3, threshold
0.5, max_iter 3. Assumed, from the original's constructor: topk 100, expansion 4, normalize_input False, dtype bfloat16.

A checkpoint of TaH2 (`original_tah2.py`) has an updater besides, no adapter, and other rules:

* The threshold is `iter_decider_kwargs.threshold`, else the one among the weights. It is rounded to the base's dtype:
  0.47 is 0.4707031 in bfloat16. The authors' server reads the one in the file's arguments instead.
* A decider stops at its own `max_iter`, or at the model's if it has none. A token that the decider continues at the
  last depth keeps its whole probability here; the original loses a part of it if the decider's `max_iter` is larger.
* `iter_attention_mode` is `causal` when absent (`attention="own"` here).
"""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel

from ..config import TaHConfig
from ..decider import build_decider
from ..errors import some
from ..files import new_directory
from .contents import contents
from .hub import TOKENIZER, Snapshot, is_repository
from .original import (
    CONFIG,
    DECIDER,
    READ,
    READ_TAH2,
    OriginalDecider,
    is_tah2,
    own_files,
    read_config,
    read_decider,
)
from .original_tah2 import OriginalTaH2, read_tah2
from .peft import Adapter, read_adapter
from .untrusted import build_empty, checked_config, load_base, read_json, weight_files
from .user_cache import cache_dir, make_once

if TYPE_CHECKING:
    from ..model import TaHForCausalLM

VERSION = 1  # part of the names in the cache; increase it with every change of the converted files


@dataclass
class ConversionReport:
    """The properties of a converted checkpoint, with notes about unexpected ones."""

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
            f"parameters {self.parameters:,} in all",
            f"max_depth  {self.max_depth}",
            f"threshold  {self.threshold:.7g}",
        ]
        if self.unknown_keys:
            lines.append(f"ignored    unknown keys of tah_config.json: {', '.join(self.unknown_keys)}")
        return "\n".join(lines + [f"note       {note}" for note in self.notes])


def convert(
    src: str | Path, dst: str | Path, model_class: type[TaHForCausalLM], threshold: float | None = None
) -> ConversionReport:
    """Convert an original checkpoint like `tah.convert`, to a model of the class `model_class`."""
    source, target = Path(src), Path(os.path.realpath(dst))
    if not source.is_dir() and not (isinstance(src, str) and is_repository(src)):
        raise ValueError(f"{source} is not a directory; convert reads a checkpoint that has been downloaded")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists and is not an empty directory; choose another destination")
    if not source.is_dir():
        source = _downloaded(Snapshot(str(src)))
    notes: list[str] = []
    config = read_config(source)
    tah2 = read_tah2(source, config, notes) if is_tah2(source, config) else None
    make = _make_model if tah2 is None else partial(_make_tah2_model, tah2)
    model = make(source, config, model_class, threshold, notes)
    with new_directory(target) as work:
        model.save_pretrained(work)
        for name in TOKENIZER:
            if (source / name).is_file():
                shutil.copyfile(source / name, work / name)
    return ConversionReport(
        base_family=model.base.config.model_type,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        max_depth=model.config.max_depth,
        threshold=model.config.threshold,
        dtype=str(model.dtype).removeprefix("torch."),
        unknown_keys=sorted(config.keys() - (READ | {"mix_topk"} if tah2 is None else READ_TAH2)),
        notes=notes,
    )


def _make_model(
    source: Path, config: dict[str, Any], model_class: type[TaHForCausalLM], threshold: float | None, notes: list[str]
) -> TaHForCausalLM:
    """Return the model of a TaH checkpoint."""
    decider = read_decider(source, config, notes)
    adapter = _read_lora(source, config)
    base = _load_base(source, config["embedding_key"])
    fields = _config_fields(config, decider, adapter, base, threshold, notes)
    if adapter:
        adapter.check_shapes(base)
    if decider.state is not None:
        _check_decider(decider, base, fields)
    model = model_class.from_base(base, **fields)
    if adapter:
        adapter.copy_to(model)
    if decider.state is not None:
        _copy_decider(decider, model)
    return model


def _make_tah2_model(
    parts: OriginalTaH2,
    source: Path,
    config: dict[str, Any],
    model_class: type[TaHForCausalLM],
    threshold: float | None,
    notes: list[str],
) -> TaHForCausalLM:
    """Return the model of a TaH2 checkpoint."""
    base = _load_base(source, config["embedding_key"])
    parts.check(base.config.get_text_config(decoder=True).hidden_size)
    given = parts.threshold if threshold is None else threshold
    rounded = _rounded_threshold(given, (base.dtype,), notes)
    notes += parts.rounding(base.dtype)
    model = model_class.from_base(base, threshold=rounded, **parts.fields)
    parts.copy_to(model)
    return model


def converted(name: str, found: Path | Snapshot, model_class: type[TaHForCausalLM]) -> Path:
    """Return the directory of a converted original checkpoint in the user's cache; convert it if it is missing.

    Args:
        name: Name of the checkpoint in messages.
        found: Directory or hub snapshot of the checkpoint. A hub revision is converted once. A directory is converted
            again if a file that the conversion reads has changed.
        model_class: Class of the model.

    Raises:
        ValueError: The checkpoint cannot be converted.
    """
    if isinstance(found, Snapshot):
        key = found.commit[:12]
    else:
        name = os.path.basename(os.path.abspath(name))
        key = str(contents(str(found), files_read(found))).rpartition(" ")[2]

    def make(target: Path) -> None:
        convert(_downloaded(found) if isinstance(found, Snapshot) else found, target, model_class)

    words = re.sub(r"[^\w.-]+", "--", name).strip(".-")[-80:] or "original"
    line = f"Converting {name} from the original layout (once)"
    return make_once(cache_dir() / f"{words}-{key}-tah-v{VERSION}", _is_whole, make, line)


def reconversion(directory: str | os.PathLike[str]) -> str:
    """Return the advice that ends a message about a damaged directory; empty if `converted` did not create it."""
    made = re.search(r"-tah-v\d+$", os.path.basename(directory))
    ours = os.path.realpath(os.path.dirname(directory)) == os.path.realpath(cache_dir())
    return "; delete that directory, and it is converted again" if made and ours else ""


def files_read(source: Path) -> list[str]:
    """Return the names of the files of an original checkpoint that `convert` reads."""
    names = ["config.json", "generation_config.json", "model.safetensors.index.json", CONFIG, *TOKENIZER]
    try:
        names += [path.name for path in weight_files(source, read_json(source / "config.json"))]
        names += own_files(read_config(source))
    except ValueError:  # `convert` raises it again
        pass
    return names


def _downloaded(found: Snapshot) -> Path:
    """Download the files of an original checkpoint that `convert` reads, and return their directory."""
    return found.complete(*own_files(read_config(found.directory)))


def _is_whole(directory: Path) -> bool:
    return (directory / "config.json").is_file() and any(directory.glob("model*.safetensors"))


def _config_fields(
    config: dict[str, Any],
    decider: OriginalDecider,
    adapter: Adapter | None,
    base: PreTrainedModel,
    threshold: float | None,
    notes: list[str],
) -> dict[str, Any]:
    """Return the fields of the checkpoint's `TaHConfig`, without its base."""
    arguments, dtype = decider.arguments, base.dtype
    given = arguments["threshold"] if threshold is None else threshold
    rounded = _rounded_threshold(given, (arguments["dtype"], dtype), notes)
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
        fields |= adapter.fields(base)
        if any(tensor.dtype != dtype for tensor in adapter.tensors.values()):
            notes.append(f"the adapter is rounded to the base's {dtype}; the original computes it in float32")
    return fields


def _rounded_threshold(given: Any, dtypes: tuple[torch.dtype, ...], notes: list[str]) -> float:
    """Return a threshold, checked and rounded to each of `dtypes`."""
    if isinstance(given, bool) or not isinstance(given, (int, float)) or not 0 <= given <= 1:
        raise ValueError(f"threshold={given!r} must be a number in [0, 1]")
    value = torch.tensor(given, dtype=torch.float64)
    for dtype in dtypes:
        value = value.to(dtype)
    if abs(value.item() - given) > 1e-6:
        notes.append(f"threshold {given} is {value.item():.7g} in the decider's precision, as in the original")
    return value.item()


def _read_lora(source: Path, config: dict[str, Any]) -> Adapter | None:
    """Read the adapter in `lora/`; None if the config has none.

    The config must have the rank and scale of the adapter, since PEFT would use those of the config.
    """
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


def _load_base(source: Path, embedding_key: str) -> PreTrainedModel:
    """Load the base in the dtype of the checkpoint, without missing or unexpected tensors."""
    if (source / "adapter_config.json").exists():  # transformers would load another base from it
        raise ValueError(f"{source} has an adapter_config.json of its own; the adapter belongs in lora/")
    described = checked_config(
        source
    )  # without options, so that `attn_implementation` below does not replace a forbidden entry
    for key in ("auto_map", "quantization_config"):
        if described.get(key):
            raise ValueError(f"config.json has {key}; only plain weights of a family in transformers can be converted")
    options = {"dtype": "auto", "attn_implementation": "eager", "trust_remote_code": False, "local_files_only": True}
    base = load_base(source, options, str(source), ignored=())
    if dict(base.named_modules()).get(embedding_key) is not base.get_input_embeddings():
        raise ValueError(f"{CONFIG}: embedding_key is {embedding_key!r}, not the input embedding of the base")
    base.config.name_or_path = ""  # keeps the path of the old checkpoint out of the new one
    return base


def _check_decider(decider: OriginalDecider, base: PreTrainedModel, fields: dict[str, Any]) -> None:
    """Check the decider's tensors before the decider is allocated.

    Raises:
        ValueError: The names or shapes are not those of the decider that the arguments describe.
    """
    assert decider.state is not None
    config = TaHConfig(base_config=base.config, **fields)
    text, state = base.config.get_text_config(decoder=True), decider.state
    try:
        empty = build_empty(lambda: build_decider(config.decider or {}, text), len(state), CONFIG)
    except ValueError as error:
        raise ValueError(f"{DECIDER} does not fit its arguments: {error}") from error
    own = empty.state_dict()
    wrong = [f"{name} is missing" for name in own.keys() - state.keys()]
    wrong += [f"{name} is not a parameter of this decider" for name in state.keys() - own.keys()]
    for name in own.keys() & state.keys():
        if own[name].shape != state[name].shape:
            wrong.append(f"{name} is {list(state[name].shape)}, not {list(own[name].shape)}")
    if wrong:
        raise ValueError(f"{DECIDER} does not fit its arguments: {some(wrong)}")


@torch.no_grad()
def _copy_decider(decider: OriginalDecider, model: TaHForCausalLM) -> None:
    """Copy the MLP's tensors into the model's decider, in the model's dtype."""
    assert model.decider is not None and decider.state is not None
    own = model.decider.state_dict()
    for name, tensor in decider.state.items():
        if name.split(".")[0] in ("logits_projection", "combined_projection"):
            tensor = tensor.to(decider.arguments["dtype"])
        own[name].copy_(tensor)
