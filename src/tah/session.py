"""A model, its tokenizer and a conversation with it, for the commands."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from .core.cache import DuoCache
from .core.compat import CACHE
from .core.inputs import check_ids
from .device import put
from .errors import first_line
from .generation import check_generation_config
from .load import find, load_base, load_tah, load_tokenizer
from .model import TaHForCausalLM
from .policy import Rule
from .progress import SILENT, Reporter
from .streaming import Token, TokenStreamer

# The threshold of a base wrapped on the fly, under the policy `confidence`: a token iterates where the most probable
# next token has a probability below 0.3, which is about one in ten.
CONFIDENCE_THRESHOLD = 0.7
NAMED = 5  # unknown words that a note names
LONGEST_REASON = 200  # characters of a chat template's message
LONGEST_NAME = 24  # characters of such a word


@dataclass
class Answer:
    """An answer, and what it cost."""

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
    def open(
        cls,
        source: str,
        *,
        dtype: str = "auto",
        device: str = "auto",
        as_saved: bool = False,
        progress: Reporter = SILENT,
    ) -> Session:
        """Load a TaH checkpoint, or wrap a base model, without adapter and decider. Nothing in such a base is trained
        to iterate, so it answers as itself, with the policy `never`, until another is asked for.

        Args:
            source: directory, hub id, `smollm2`, `smollm2-tah`, or `follow-tah`.
            dtype: `auto` is the checkpoint's where the device computes in it natively, else float32.
            device: `auto` is CUDA, then MPS, then the CPU.
            as_saved: the model is only handed on to another engine: it stays as it was saved, in the CPU's memory.
            progress: gets a note where `auto` became float32.

        Raises:
            ValueError: it cannot be found, is damaged, or cannot be wrapped, or there is no such device.
        """
        path, kind = find(source)
        if kind == "tah":
            model = load_tah(path, dtype)
        else:
            untrained: dict[str, Any] = {"lora_rank": 0, "decider": None}  # parts that would be random
            base = load_base(path, dtype)
            model = TaHForCausalLM.from_base(base, policy="never", threshold=CONFIDENCE_THRESHOLD, **untrained)
        model.name_or_path = source  # what errors and traces call it
        check_generation_config(model.generation_config, source)
        tokenizer = load_tokenizer(path, source, readable=False)  # `encode` refuses it
        if not as_saved:
            put(model, source, dtype=dtype, device=device, progress=progress)
        return cls(source, model.eval(), tokenizer, kind == "base")

    def rule(self, rule: Rule) -> Rule:
        """`rule`, completed by the model's configuration.

        Raises:
            ValueError: a threshold or a depth is given for a wrapped base that answers as itself: it changes nothing.
        """
        if self.wrapped:
            check_idle(self.source, rule)
        return rule.completed(self.model.config)

    def as_itself(self, rule: Rule) -> str | None:
        """A note for the user of a wrapped base who chose no policy, so that the base answers as itself; None for
        everybody else.

        Raises:
            ValueError: as `rule`.
        """
        self.rule(rule)
        if not self.wrapped or rule.policy is not None:
            return None
        return (
            f"{self.source} is a base model without a trained second pass, so it answers as itself; --policy "
            "confidence gives one to tokens it is unsure of"
        )

    def encode(self, messages: list[dict[str, str]], *, raw: bool = False) -> list[int]:
        """Token ids of a conversation, up to where the answer begins; `raw` leaves the chat template out.

        Raises:
            ValueError: the chat template refuses the conversation, or leaves its system message out.
        """
        if raw or not self.tokenizer.chat_template:
            return self.tokenizer("\n\n".join(message["content"] for message in messages))["input_ids"]
        return self.tokenizer(self._written(messages), add_special_tokens=False)["input_ids"]

    def _written(self, messages: list[dict[str, str]]) -> str:
        """A conversation as the chat template writes it."""
        system = [message["content"] for message in messages if message["role"] == "system"]
        others = [message for message in messages if message["role"] != "system"]

        def without_system() -> str | None:
            with suppress(Exception):  # of any kind: templates are programs
                return self._template(others)
            return None

        template = f"the chat template of {self.source}"
        try:
            text = self._template(messages)
        except Exception as error:
            why = f"({first_line(error)[:LONGEST_REASON]})"
            if system and others and without_system() is not None:
                raise ValueError(
                    f"{template} refuses a system message {why}; leave out --system, and put it into the prompt"
                ) from error
            raise ValueError(
                f"{template} cannot write this conversation {why}; tah generate --raw does without a template"
            ) from error
        if system and system[0].strip() not in text and without_system() == text:
            raise ValueError(f"{template} leaves a system message out; leave out --system, and put it into the prompt")
        return text

    def _template(self, messages: list[dict[str, str]]) -> str:
        text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        assert isinstance(text, str)
        return text

    def unknown_words(self, text: str) -> str | None:
        """A note that names the words that the tokenizer reads as its unknown token, or as nothing; None where there
        are none."""
        inner = getattr(getattr(self.tokenizer, "backend_tokenizer", None), "model", None)
        token = str(getattr(inner, "unk_token", None) or self.tokenizer.unk_token or "")
        nothing = self.tokenizer.convert_tokens_to_ids(token) if token else None
        words = list(dict.fromkeys(text.split()))
        read = self.tokenizer(words, add_special_tokens=False)["input_ids"] if words else []
        unknown = [
            word
            for word, ids in zip(words, read, strict=True)
            if not ids or (nothing is not None and nothing in ids and token not in word)
        ]
        if not unknown:
            return None
        named = [word if len(word) <= LONGEST_NAME else word[: LONGEST_NAME - 3] + "..." for word in unknown[:NAMED]]
        more = f" and {len(unknown) - NAMED} more" if len(unknown) > NAMED else ""
        return f"the tokenizer of {self.source} does not know {', '.join(map(repr, named))}{more}"

    def answer(
        self,
        ids: list[int],
        show: Callable[[Token], None],
        rule: Rule,
        *,
        max_new_tokens: int,
        **sampling: Any,
    ) -> Answer:
        """Continue the prompt `ids`.

        Args:
            show: called with each token as it comes.
            rule: who iterates; `Rule()` is as the model's configuration has it.
            max_new_tokens: fewer where the model has too few positions.
            sampling: further arguments of `generate`, see `sampling`.

        Raises:
            ValueError: an empty prompt, one longer than the model or of tokens that it does not have, or a model that
                computes NaN.
        """
        check_ids(ids, self.model, "the prompt", f"{self.source} comes with another model's tokenizer")
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
            **rule.arguments(),
            **sampling,
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
        common = len(os.path.commonprefix([self.ids[:seen], ids[:-1]]))
        if common == 0:
            return DuoCache()
        self.cache.crop(common - seen)
        return self.cache


def check_idle(source: str, rule: Rule) -> None:
    """Refuse settings of a base that answers as itself, because they would silently change nothing.

    Args:
        source: what the user calls the base.
        rule: without a policy the base answers as itself; a depth of 1 is what it does then.

    Raises:
        ValueError: there is no policy, but a threshold or a depth.
    """
    idle = {"--threshold": rule.threshold, "--max-depth": None if rule.max_depth == 1 else rule.max_depth}
    for option, value in idle.items():
        if rule.policy is None and value is not None:
            raise ValueError(
                f"{option} {value} changes nothing while the base model {source} answers as itself; add "
                "--policy confidence, or leave it out"
            )


def sampling(temperature: float, top_p: float, top_k: int, seed: int) -> dict[str, Any]:
    """Options of `generate`, greedy at temperature 0 whatever the model's own defaults are; seeds torch."""
    torch.manual_seed(seed)
    if temperature < 1e-3:  # too little to divide by
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}
