"""What a recipe hands to others, checked before anything runs: `TaHConfig` fields and `TrainingArguments`."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import functools
import json
import math
from collections.abc import Iterable
from typing import Any, get_args, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

OWNED = {  # TrainingArguments that another place decides
    "output_dir": "it is the run's directory; use output",
    "seed": "it is the recipe's seed",
    "resume_from_checkpoint": "it is the command's --resume",
}
POSITIVE = (
    "max_steps",
    "num_train_epochs",
    "learning_rate",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
)
CHOSEN = ("policy", "threshold")  # TaHConfig fields that a stage sets when it ends


def near(name: str, allowed: Iterable[str]) -> str:
    """A hint at the nearest allowed name."""
    allowed = sorted(allowed)
    found = difflib.get_close_matches(name, allowed, n=1)
    return f"did you mean {found[0]}?" if found else f"choose from {', '.join(allowed)}"


def in_words(message: str, value: Any) -> str:
    """Pydantic's message about a value of the wrong kind, as the rest of an error."""
    text = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
    message = message.replace("Input should be", "must be").replace("a valid dictionary", "a mapping of keys to values")
    message = message.partition(" or instance of ")[0]
    return f"={text}: {message[0].lower()}{message[1:]}"


def check_model(fields: dict[str, Any]) -> None:
    """`model` makes a `TaHConfig`, as far as that can be said without knowing the base.

    Raises:
        ValueError: naming the field.
    """
    from ..config import TaHConfig

    own = {name: kind for name, kind in TaHConfig.__annotations__.items() if name not in ("base_config", *CHOSEN)}
    hints = get_type_hints(type("Own", (), {"__annotations__": own}))  # transformers' own annotations name lazy imports
    for name, value in fields.items():
        if name in CHOSEN:
            raise ValueError(f"model.{name} is chosen by training, from backbone.method and the decider stage; drop it")
        if name not in own:
            raise ValueError(f"model.{name} is unknown; {near(name, own)}")
        _check_type(hints[name], value, f"model.{name}")
    if isinstance(fields.get("decider"), dict) and "kind" not in fields["decider"]:
        raise ValueError("model.decider.kind is required: lean (hidden states only) or mlp (the authors')")
    some_base = {"model_type": "llama", "num_hidden_layers": 10**6}  # its layers are checked when it is known
    try:
        TaHConfig(base_config=some_base, policy="never", **json.loads(json.dumps(fields)))
    except (TypeError, ValueError) as error:
        raise ValueError(f"model: {' '.join(str(error).split())}") from error


def check_training(training: dict[str, Any], place: str) -> None:
    """Keys, types, words and signs of `TrainingArguments`, without making one: that would ask for the device.

    Raises:
        ValueError: for the first that does not fit.
    """
    hints = _training_types()
    for name, value in training.items():
        if name in OWNED:
            raise ValueError(f"{place}.{name} is decided elsewhere: {OWNED[name]}")
        if name not in hints:
            found = difflib.get_close_matches(name, hints, n=1)
            hint = f"; did you mean {found[0]}?" if found else ""
            raise ValueError(f"{place}.{name} is no setting of transformers' TrainingArguments{hint}")
        _check_type(hints[name], value, f"{place}.{name}")
        if name in POSITIVE and value is not None and not 0 < value < math.inf:
            raise ValueError(f"{place}.{name}={value} must be more than 0; leave it out for the default")
        for option in get_args(hints[name]) or (hints[name],):
            if isinstance(option, type) and issubclass(option, enum.Enum) and isinstance(value, str):
                words = [str(member.value) for member in option]
                if value not in words:
                    raise ValueError(f"{place}.{name}={value!r} is unknown; {near(value, words)}")


def _check_type(kind: Any, value: Any, place: str) -> None:
    try:
        TypeAdapter(kind, config=ConfigDict(strict=True, arbitrary_types_allowed=True)).validate_python(value)
    except ValidationError as error:
        raise ValueError(f"{place}{in_words(error.errors()[0]['msg'], value)}") from None


@functools.cache
def _training_types() -> dict[str, Any]:
    from transformers import TrainingArguments

    hints = get_type_hints(TrainingArguments)
    return {field.name: hints[field.name] for field in dataclasses.fields(TrainingArguments) if field.init}
