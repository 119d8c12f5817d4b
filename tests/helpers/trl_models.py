"""A tiny TaH model with the vocabulary of a tokenizer in the package, for TRL's trainers."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from helpers.families import tiny
from helpers.models import shake
from tah import TaHForCausalLM
from tah.load import FOLLOW, load_tokenizer


def words() -> PreTrainedTokenizerBase:
    """A tokenizer with one token per word, such as `e3>e1`."""
    return load_tokenizer(str(FOLLOW))


def model_of(tokenizer: PreTrainedTokenizerBase, family: str = "llama", **config) -> TaHForCausalLM:
    """A model whose every part matters. Its decider chooses about half of the tokens."""
    base = tiny(family, "sdpa" if family == "llama" else "eager", vocab_size=len(tokenizer))
    options = {"policy": "decider", "threshold": 0.5, "mix_topk": 16, "lora_rank": 4, "lora_dropout": 0.0}
    return shake(TaHForCausalLM.from_base(base, **options | config))
