"""Think-at-Hard: run a language model again, but only on the tokens that are hard.

`import tah` registers the model with transformers, so `AutoModelForCausalLM.from_pretrained` and `pipeline` load it.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModelForCausalLM

from .cache import DuoCache
from .config import TaHConfig
from .convert import convert
from .families import UnsupportedBase, check_base
from .model import TaHForCausalLM, TaHOutput
from .policy import Always, Confidence, DepthState, Never, Oracle, Policy, Random

__version__ = "0.1.0"
__all__ = [
    "Always",
    "Confidence",
    "DepthState",
    "DuoCache",
    "Never",
    "Oracle",
    "Policy",
    "Random",
    "TaHConfig",
    "TaHForCausalLM",
    "TaHOutput",
    "UnsupportedBase",
    "check_base",
    "convert",
]

AutoConfig.register("tah", TaHConfig)
AutoModelForCausalLM.register(TaHConfig, TaHForCausalLM)
