"""Convert a row to tokens and the mask of its supervised tokens.

The tokenizer's chat template renders a conversation. If the template tags the assistant's turns (`{% generation %}`),
its tags count. Otherwise two renderings give a turn: the conversation up to and with the turn, and the conversation
before it with the prompt for an answer. The turn is the difference. Some templates change earlier turns when more
follow (Qwen3's drops their reasoning). They are rendered again with a mark in place of the turn, and the text after the
mark gives the end of the turn. Turns are found in characters, and tokens by the characters they cover.
`chat_template.check_turns` checks the result.

Shapes: T tokens of the row.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Mapping, Sequence
from os.path import commonprefix  # works on any strings
from typing import Any

import numpy as np

from .chat_rows import Messages, Unusable, is_chat, read_chat
from .chat_template import MARK, LeftOut, NoReasoning, Refused, Renderer, Spans, Turns, check_turns, open_ends, shapes

OPEN_MARKER = re.compile(r"<[^<>\s]*$")  # two texts differ within a marker, such as "<think>" and "<tool_call>"
LOG = logging.getLogger(__name__)


def encode(row: Mapping[str, Any], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Return the tokens `[T]` of a row and the mask `[T]` of its supervised tokens; the first is never supervised.

    Args:
        row: Row in one of `rows.FORMS`.
        tokenizer: Fast tokenizer of transformers.

    Raises:
        Unusable: The row is malformed, part of it would be lost, or the template does not separate the speakers.
        ValueError: No row can be encoded: the tokenizer has no chat template, or does not report offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{type(tokenizer).__name__} does not report which characters a token covers; use a fast one")
    try:
        row = _without_none(row)
        chat = is_chat(row)
        text, spans, unclosed = _chat(row, tokenizer) if chat else (*_strings(row), [])
    except RecursionError as error:
        raise Unusable("nested too deep") from error
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise Unusable("half of a surrogate pair, which is no text") from error
    found = tokenizer(text, add_special_tokens=not chat, return_offsets_mapping=True)
    # The last character counts, since some tokenizers leave leading whitespace out of a token's offsets.
    ids, ends = list(found["input_ids"]), np.array([end for _, end in found["offset_mapping"]], dtype=np.int64)
    mask = np.zeros(len(ids), dtype=bool)
    for start, stop in spans:
        mask |= (start < ends) & (ends <= stop)
    for stop in unclosed:
        _supervise_next(ids, mask, int((ends <= stop).sum()), tokenizer)
    supervised = mask.tolist()
    if (not chat or len(text) in unclosed) and tokenizer.eos_token_id is not None:
        if not ids or ids[-1] != tokenizer.eos_token_id:
            ids, supervised = [*ids, tokenizer.eos_token_id], [*supervised, True]
        supervised[-1] = True
    return ids, [False, *supervised[1:]] if ids else []


def _supervise_next(ids: list[int], mask: np.ndarray, after: int, tokenizer: Any) -> None:
    """Supervise the special token at index `after`, which begins the next turn, as the end of a turn without one.

    After the last turn the caller adds the end-of-text token.
    """
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    if after < len(ids) and ids[after] in special:
        mask[after] = True
    elif after < len(ids) or tokenizer.eos_token_id is None:
        _warn_of_no_end(str(tokenizer.chat_template))


@functools.lru_cache(maxsize=8)
def _warn_of_no_end(template: str) -> None:
    """Log a warning once for each template."""
    LOG.warning(
        "the chat template ends some of the assistant's turns without a token at which a model could stop: "
        "these ends are not trained"
    )


def _without_none(value: Any) -> Any:
    """Return a value without None entries. Arrow adds them for missing keys, but templates test for the keys."""
    if isinstance(value, Mapping):
        return {key: _without_none(entry) for key, entry in value.items() if entry is not None}
    return [_without_none(entry) for entry in value] if isinstance(value, list) else value


def _strings(row: Mapping[str, Any]) -> tuple[str, Spans]:
    """Return prompt and completion, or a text, unchanged, and the supervised characters."""
    prompt, rest = (row["prompt"], row.get("completion")) if "prompt" in row else ("", row.get("text"))
    if not isinstance(prompt, str) or not isinstance(rest, str):
        raise Unusable("malformed row")
    if not rest.strip():
        raise Unusable("empty completion" if "prompt" in row else "no assistant tokens")
    return prompt + rest, [(len(prompt), len(prompt + rest))]


# -- conversations ---------------------------------------------------------------------------------------------------


def _chat(row: Mapping[str, Any], tokenizer: Any) -> tuple[str, Spans, Sequence[int]]:
    """Return the conversation as text, the supervised characters, and the stops of supervised turns without an end.

    If the template raises an error for a shape of the conversation, or omits something, the next shape is tried.
    """
    chat, why = read_chat(row, tokenizer), None
    for shape in shapes(chat):
        render = Renderer(tokenizer, chat, shape)
        try:
            text, turns = _turns(render)
            check_turns(render, text, turns)
        except (Refused, LeftOut) as error:
            why = error if isinstance(error, NoReasoning) else why or error
            continue
        if not render.is_quoted(text):
            return text, [span for _, spans in turns for span in spans], open_ends(render, text, turns)
    raise why or Unusable("malformed row")


def _turns(render: Renderer) -> tuple[str, Turns]:
    """Return the conversation as text, and the supervised messages with their characters.

    Tags do not name their message, so all tagged turns are found together. If some answers are not supervised, each
    answer must have a tag of its own; `check_turns` checks their order.
    """
    chat = render.chat
    messages, context = chat.messages, chat.context
    text, spans = render(messages, tags=render.tagged)
    answers = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
    supervised = [at for at in answers if at >= context and at not in chat.unsupervised]
    if not supervised:
        return text, []
    if render.tagged and chat.unsupervised:
        if len(spans) != len(answers):
            raise Unusable("the chat template does not mark each answer by itself, and one is not supervised")
        return text, [([at], [span]) for at, span in zip(answers, spans, strict=True) if at in supervised]
    if render.tagged:
        begin = _end(render, messages, context - 1, text) if context else 0
        return text, [(supervised, [span for span in spans if span[0] >= begin])]
    if supervised[0] == 0:
        raise Unusable("begins with an assistant message")
    turns: Turns = []
    for at in supervised:
        start, stop = _end(render, messages, at - 1, text, ask=True), _end(render, messages, at, text)
        if stop < start:
            raise Unusable("the chat template changes earlier turns")
        turns.append(([at], [(start, stop)]))
    return text, turns


def _end(render: Renderer, messages: Messages, at: int, text: str, ask: bool = False) -> int:
    """Return the end of message `at` in `text`; with `ask`, the end of the prompt for an answer to it.

    Usually this is the length of the conversation up to that message. If `text` does not begin with that conversation,
    both are rendered again with a mark in place of the message. The text after the mark in the whole conversation is
    the text after the message. Its common prefix with the text after the mark in the shorter conversation belongs to
    the message (and the prompt). It may be shorter than that text: some prompts have a "<think>" that the answer lacks.
    It must contain the end of the message, or the header of the answer would count as part of the answer.

    Args:
        render: Renderer of the conversation.
        messages: All messages.
        at: Index of the message.
        text: Text of the whole conversation.
        ask: Whether to include the prompt for an answer.
    """
    part = render(messages[: at + 1], ask)[0]
    if text.startswith(part):
        return len(part)
    message = messages[at]
    # The second stand-in has the content alone, since some templates show either the content or the tool calls.
    for stand_in in ({**message, "content": MARK}, {"role": message["role"], "content": MARK}):
        marked = [*messages[:at], stand_in, *messages[at + 1 :]]
        try:
            *before, rest = render(marked)[0].split(MARK)
            *alone, own = render(marked[: at + 1], ask)[0].split(MARK)
            close = commonprefix([own, render(marked[: at + 1])[0].split(MARK)[-1]]) if ask else ""
        except Refused:
            continue
        same = commonprefix([own, rest])
        if len(before) == len(alone) == 1 and text.endswith(rest) and same.startswith(close):
            return len(text) - len(rest) + len(same if same == own else OPEN_MARKER.sub("", same))
    raise Unusable("the chat template changes earlier turns")
