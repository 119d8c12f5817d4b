"""A model, its tokenizer and a conversation with it: what the commands share."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from .cache import CACHE, DuoCache
from .load import find, first_line, load_base, load_tah, load_tokenizer
from .model import TaHForCausalLM
from .terminal import Token, TokenStreamer

# Of a base wrapped on the fly: iterate where the top token has less than 0.3 of the probability, about one in ten.
CONFIDENCE_THRESHOLD = 0.7


@dataclass
class Answer:
    """What a model said, and what it cost."""

    tokens: list[Token]
    prompt_tokens: int
    seconds: float

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens)

    @property
    def depths(self) -> list[int]:
        return [token.depth for token in self.tokens]

    def as_dict(self) -> dict[str, Any]:
        """For `--json`."""
        count = len(self.tokens)
        return {
            "text": self.text,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": count,
            "seconds": self.seconds,
            "tokens_per_second": count / self.seconds,
            "iterated_share": sum(depth > 1 for depth in self.depths) / max(1, count),
            "mean_depth": sum(self.depths) / max(1, count),
            "tokens": [vars(token) for token in self.tokens],
        }


@dataclass
class Session:
    """A loaded model. It keeps the cache of the last prompt, so that one which continues it costs only what is new."""

    source: str
    model: TaHForCausalLM
    tokenizer: Any
    wrapped: bool  # `source` is a base model, wrapped on the fly: nothing in it is trained to iterate
    cache: DuoCache = field(default_factory=DuoCache)
    ids: list[int] = field(default_factory=list)  # what the cache has seen, and one more

    @classmethod
    def open(cls, source: str, *, dtype: str = "auto", device: str = "cpu") -> Session:
        """Load a TaH checkpoint, or wrap a base model with the `confidence` policy, without adapter and decider.

        Raises:
            ValueError: it cannot be found, is damaged, or cannot be wrapped.
        """
        path, kind = find(source)
        if kind == "tah":
            model = load_tah(path, dtype)
        else:
            untrained: dict[str, Any] = {"lora_rank": 0, "decider": None}  # parts that would be random
            base = load_base(path, dtype)
            model = TaHForCausalLM.from_base(base, policy="confidence", threshold=CONFIDENCE_THRESHOLD, **untrained)
        model.name_or_path = source  # what errors and traces call it
        tokenizer = load_tokenizer(path, source)
        try:
            return cls(source, model.to(device).eval(), tokenizer, kind == "base")
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device {device!r} cannot be used: {first_line(error)}") from error

    def rule(self, **given: Any) -> dict[str, Any]:
        """Policy, threshold and max_depth: what was given, and the model's own where that is None."""
        return {name: getattr(self.model.config, name) if value is None else value for name, value in given.items()}

    def encode(self, messages: list[dict[str, str]], *, raw: bool = False) -> list[int]:
        """Token ids of a conversation, up to where the answer begins; `raw` leaves the chat template out."""
        if raw or not self.tokenizer.chat_template:
            return self.tokenizer("\n\n".join(message["content"] for message in messages))["input_ids"]
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def answer(self, ids: list[int], show: Callable[[Token], None], *, max_new_tokens: int, **options: Any) -> Answer:
        """Continue `ids`; `show` gets each token as it comes. `options` go to `generate`.

        Raises:
            ValueError: an empty prompt, one longer than the model, or a model that computes NaN.
        """
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None:
            max_new_tokens = max(1, min(max_new_tokens, limit - len(ids)))
        cache, self.cache = self._continued(ids), DuoCache()  # an interrupt leaves a half-written cache behind
        streamer = TokenStreamer(cache, lambda ids: self.tokenizer.decode(ids, skip_special_tokens=True), show)
        inputs = torch.tensor([ids], dtype=torch.long, device=self.model.device)
        start = time.perf_counter()
        self.model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            **{CACHE: cache},
            streamer=streamer,
            max_new_tokens=max_new_tokens,
            pad_token_id=self._end,
            **options,
        )
        seconds = time.perf_counter() - start
        self.cache, self.ids = cache, ids + [token.id for token in streamer.tokens]
        return Answer(streamer.tokens, len(ids), seconds)

    def forget(self) -> None:
        """Drop the cache, so that the next prompt runs from its first token."""
        self.cache, self.ids = DuoCache(), []

    @property
    def _end(self) -> int | None:
        end = self.model.generation_config.eos_token_id
        return end[0] if isinstance(end, list) else end if end is not None else self.tokenizer.eos_token_id

    def _continued(self, ids: list[int]) -> DuoCache:
        """The cache, cut back to what it has in common with `ids`; at least one token of them is left to run."""
        seen = self.cache.get_seq_length()
        pairs = zip(self.ids[:seen], ids[:-1], strict=False)
        common = next(
            (at for at, (ours, theirs) in enumerate(pairs) if ours != theirs), min(seen, max(0, len(ids) - 1))
        )
        if common == 0:
            return DuoCache()
        self.cache.crop(common - seen)
        return self.cache


def sampling(temperature: float, top_p: float, top_k: int, seed: int) -> dict[str, Any]:
    """Options of `generate`, greedy at temperature 0 whatever the model's own defaults are; seeds torch."""
    torch.manual_seed(seed)
    if temperature < 1e-3:  # too little to divide by
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}
