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
NAMED = 5  # most unknown words in a note
LONGEST_REASON = 200  # characters of a chat template's message
LONGEST_NAME = 24  # characters of an unknown word in a note


@dataclass
class Answer:
    """An answer with its tokens, the length of its prompt and its time."""

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
        """Return the entries that `--json` prints."""
        count = len(self.tokens)
        return {
            "text": self.text,
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": count,
            "seconds": self.seconds,
            "tokens_per_second": count / self.seconds,
            "iterated_share": sum(depth > 1 for depth in self.depths) / max(1, count),
            "mean_depth": sum(self.depths) / max(1, count),
            "tokens": [token.as_dict() for token in self.tokens],
        }


@dataclass
class Session:
    """A loaded model with its tokenizer and KV cache.

    The cache of the last prompt is kept. A prompt that continues it runs only its new tokens.
    """

    source: str
    model: TaHForCausalLM
    tokenizer: Any
    wrapped: bool  # whether `source` is a base model, which has no trained second pass
    cache: DuoCache = field(default_factory=DuoCache)
    ids: list[int] = field(default_factory=list)  # tokens in the cache, and one more

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
        """Load a TaH checkpoint, or wrap a base model without LoRA and decider.

        A wrapped base has no trained second pass, so its policy is `never` unless a call chooses another one.

        Args:
            source: Path of a directory, a hub id, or one of `smollm2`, `smollm2-tah` and `follow-tah`.
            dtype: Dtype of the model. `auto` is the checkpoint's if the device computes in it natively, else float32.
            device: Name of the device. `auto` is the first available of CUDA, MPS and CPU.
            as_saved: Whether the model keeps its saved dtype and stays in CPU memory, for use by another engine.
            progress: Reporter that receives a note if `auto` became float32.

        Raises:
            ValueError: The model does not exist, is damaged or cannot be wrapped, or there is no such device.
        """
        path, kind = find(source)
        if kind == "tah":
            model = load_tah(path, dtype)
        else:
            untrained: dict[str, Any] = {"lora_rank": 0, "decider": None}  # parts that would be random
            base = load_base(path, dtype)
            model = TaHForCausalLM.from_base(base, policy="never", threshold=CONFIDENCE_THRESHOLD, **untrained)
        model.name_or_path = source  # the name in errors and traces
        check_generation_config(model.generation_config, source)
        tokenizer = load_tokenizer(path, source, readable=False)  # `encode` raises for an unreadable template
        if not as_saved:
            put(model, source, dtype=dtype, device=device, progress=progress)
        return cls(source, model.eval(), tokenizer, kind == "base")

    def rule(self, rule: Rule) -> Rule:
        """Return `rule` with missing fields taken from the model's configuration.

        Raises:
            ValueError: A wrapped base without a policy gets a threshold or a depth, which would have no effect.
        """
        if self.wrapped:
            check_idle(self.source, rule)
        return rule.completed(self.model.config)

    def as_itself(self, rule: Rule) -> str | None:
        """Return a note if a wrapped base runs without a policy, so that it answers like the base; else None.

        Raises:
            ValueError: As for `rule`.
        """
        self.rule(rule)
        if not self.wrapped or rule.policy is not None:
            return None
        return (
            f"{self.source} is a base model without a trained second pass, so it answers as itself; --policy "
            "confidence gives one to tokens it is unsure of"
        )

    def encode(self, messages: list[dict[str, str]], *, raw: bool = False) -> list[int]:
        """Return the token ids of a conversation up to the beginning of the answer.

        Args:
            messages: Messages with `role` and `content`.
            raw: Whether to join the contents without the chat template.

        Raises:
            ValueError: The chat template raises an error for the conversation, or omits its system message.
        """
        if raw or not self.tokenizer.chat_template:
            return self.tokenizer("\n\n".join(message["content"] for message in messages))["input_ids"]
        return self.tokenizer(self._written(messages), add_special_tokens=False)["input_ids"]

    def _written(self, messages: list[dict[str, str]]) -> str:
        """Return a conversation as text, rendered by the chat template."""
        system = [message["content"] for message in messages if message["role"] == "system"]
        others = [message for message in messages if message["role"] != "system"]

        def without_system() -> str | None:
            with suppress(Exception):  # templates are programs and may raise anything
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
        """Return a note with the words that the tokenizer maps to its unknown token or to no token; None if there are
        none.
        """
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
        return f"the tokenizer of {self.source} has no token for {', '.join(map(repr, named))}{more}"

    def answer(
        self,
        ids: list[int],
        show: Callable[[Token], None],
        rule: Rule,
        *,
        max_new_tokens: int,
        **sampling: Any,
    ) -> Answer:
        """Generate an answer to the prompt.

        Args:
            ids: Token ids of the prompt.
            show: Callback for each new token.
            rule: Policy, threshold and depth; `Rule()` takes all of them from the model's configuration.
            max_new_tokens: Maximum number of new tokens; the model's positions may limit it further.
            sampling: Further arguments of `generate`, see the function `sampling`.

        Raises:
            ValueError: The prompt is empty, longer than the model's positions or has ids outside its vocabulary, or
                the model computes NaN.
        """
        check_ids(ids, self.model, "the prompt", f"{self.source} comes with another model's tokenizer")
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        if limit is not None:
            max_new_tokens = max(1, min(max_new_tokens, limit - len(ids)))
        cache, self.cache = self._continued(ids), DuoCache()  # an interrupt leaves a half-written cache behind
        weigh = self.model.mixture_weights
        streamer = TokenStreamer(cache, lambda ids: self.tokenizer.decode(ids, skip_special_tokens=True), show, weigh)
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
        """Drop the cache. The next prompt then runs from its first token."""
        self.cache, self.ids = DuoCache(), []

    @property
    def _end(self) -> int | None:
        end = self.model.generation_config.eos_token_id
        return end[0] if isinstance(end, list) else end if end is not None else self.tokenizer.eos_token_id

    def _continued(self, ids: list[int]) -> DuoCache:
        """Return the cache, cut to its common prefix with `ids`. At least one token of `ids` is left to run."""
        seen = self.cache.get_seq_length()
        common = len(os.path.commonprefix([self.ids[:seen], ids[:-1]]))
        if common == 0:
            return DuoCache()
        self.cache.crop(common - seen)
        return self.cache


def check_idle(source: str, rule: Rule) -> None:
    """Check that the rule of a wrapped base has no setting without effect.

    Args:
        source: Name of the base in messages.
        rule: Rule of the call. Without a policy every token takes one pass, so only a depth of 1 is allowed.

    Raises:
        ValueError: The rule has a threshold or a depth but no policy.
    """
    idle = {"--threshold": rule.threshold, "--max-depth": None if rule.max_depth == 1 else rule.max_depth}
    for option, value in idle.items():
        if rule.policy is None and value is not None:
            raise ValueError(
                f"{option} {value} changes nothing while the base model {source} answers as itself; add "
                "--policy confidence, or leave it out"
            )


def sampling(temperature: float, top_p: float, top_k: int, seed: int) -> dict[str, Any]:
    """Seed torch and return the sampling options of `generate`.

    Temperature 0 means greedy generation, whatever the defaults of the model are.
    """
    torch.manual_seed(seed)
    if temperature < 1e-3:  # too small a divisor
        return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    return {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}
