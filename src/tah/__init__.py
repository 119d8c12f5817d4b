"""Think-at-Hard: further passes of a language model, only for the tokens that need them.

`import tah` registers the model with transformers, so `AutoModelForCausalLM.from_pretrained` and `pipeline` load it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from transformers import AutoConfig, AutoModelForCausalLM

from .checkpoints.adapter import save_adapter
from .checkpoints.card import model_card
from .checkpoints.peft import load_peft, save_peft
from .config import TaHConfig
from .core.cache import DuoCache
from .core.families import UnsupportedBase, check_base
from .load import convert, load_adapter
from .model import TaHForCausalLM, TaHOutput, TrainingPass
from .policy import Always, Confidence, DepthState, Never, Oracle, Policy, Random, Rule

if TYPE_CHECKING:
    from .evaluation.evaluate import evaluate as evaluate
    from .tracing.trace import TraceRequest as TraceRequest
    from .tracing.trace import trace as trace
    from .training.label import label as label
    from .training.prune import prune as prune
    from .training.recipe_file import load_recipe as load_recipe
    from .training.train import train as train

__version__ = "0.2.0"
# Names that are imported at first use, because some of their modules need optional packages.
_LATER = {
    "TraceRequest": "tracing.trace",
    "evaluate": "evaluation.evaluate",
    "label": "training.label",
    "load_recipe": "training.recipe_file",
    "prune": "training.prune",
    "trace": "tracing.trace",
    "train": "training.train",
}
__all__ = [
    "Always",
    "Confidence",
    "DepthState",
    "DuoCache",
    "Never",
    "Oracle",
    "Policy",
    "Random",
    "Rule",
    "TaHConfig",
    "TaHForCausalLM",
    "TaHOutput",
    "TrainingPass",
    "UnsupportedBase",
    "check_base",
    "convert",
    "load_adapter",
    "load_peft",
    "model_card",
    "save_adapter",
    "save_peft",
]

AutoConfig.register("tah", TaHConfig)
AutoModelForCausalLM.register(TaHConfig, TaHForCausalLM)


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module 'tah' has no attribute {name!r}")
    return getattr(import_module(f".{_LATER[name]}", __name__), name)
