"""A row as tokens, and the mask of those that an assistant is trained to produce.

A conversation is rendered by the tokenizer's chat template. Where the template tags the assistant's turns
(`{% generation %}`), its tags count. Elsewhere a turn is what the conversation up to and with it has beyond the
conversation before it, rendered with the prompt for an answer. Templates that change earlier turns when more follow
(Qwen3's drops their reasoning) are rendered again with a mark in the turn's place: what follows the mark shows where
the turn ends. Turns are found in characters, and tokens by the characters they cover; `chat_template.check_turns`
checks the result.

Shapes: T tokens of the row.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Mapping, Sequence
from os.path import commonprefix  # of any strings
from typing import Any

import numpy as np

from .chat_rows import Messages, Unusable, is_chat, read_chat
from .chat_template import MARK, LeftOut, NoReasoning, Refused, Renderer, Spans, Turns, check_turns, open_ends, shapes

OPEN_MARKER = re.compile(r"<[^<>\s]*$")  # where two texts part within a marker, as "<think>" and "<tool_call>" do
LOG = logging.getLogger(__name__)


def encode(row: Mapping[str, Any], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Tokens [T] of a row in one of `rows.FORMS`, and which of them are supervised; never the first.

    Raises:
        Unusable: the row is malformed, something in it would be lost, or the template hides who speaks.
        ValueError: no row can be encoded: the tokenizer has no chat template, or does not report offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{type(tokenizer).__name__} does not say which characters a token covers; use a fast one")
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
    # By their last character, since some tokenizers leave leading whitespace out of a token's offsets.
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
    """Supervise the special token at index `after`, which begins the next turn, where the turn before it has no end.

    After the last turn comes the end of text, which the caller adds.
    """
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    if after < len(ids) and ids[after] in special:
        mask[after] = True
    elif after < len(ids) or tokenizer.eos_token_id is None:
        _warn_of_no_end(str(tokenizer.chat_template))


@functools.lru_cache(maxsize=8)
def _warn_of_no_end(template: str) -> None:
    """Warn once for a template, not for every row."""
    LOG.warning(
        "the chat template ends some of the assistant's turns with nothing that a model could stop at: "
        "no end is learnt there"
    )


def _without_none(value: Any) -> Any:
    """Arrow gives all rows the same keys and fills up with None; templates test whether a key is there."""
    if isinstance(value, Mapping):
        return {key: _without_none(entry) for key, entry in value.items() if entry is not None}
    return [_without_none(entry) for entry in value] if isinstance(value, list) else value


def _strings(row: Mapping[str, Any]) -> tuple[str, Spans]:
    """Prompt and completion, or a text, as it is, and the supervised characters."""
    prompt, rest = (row["prompt"], row.get("completion")) if "prompt" in row else ("", row.get("text"))
    if not isinstance(prompt, str) or not isinstance(rest, str):
        raise Unusable("malformed row")
    if not rest.strip():
        raise Unusable("empty completion" if "prompt" in row else "no assistant tokens")
    return prompt + rest, [(len(prompt), len(prompt + rest))]


# -- conversations ---------------------------------------------------------------------------------------------------


def _chat(row: Mapping[str, Any], tokenizer: Any) -> tuple[str, Spans, Sequence[int]]:
    """The conversation as text, the supervised characters, and where supervised turns without an end stop.

    Where the template refuses a shape of the conversation, or leaves something out, the next shape is tried.
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
    """The conversation as text, and the supervised messages with their characters.

    Tags do not name the message to which they belong, so tagged turns are found all together. Where some answers are
    not supervised, there has to be a tag for each answer; `check_turns` shows that they are in order.
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
            raise Unusable("the chat template does not mark each answer by itself, and one is not to be learnt")
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
    """Where message `at` ends in `text`, the whole conversation; with `ask`, where the prompt for an answer to it ends.

    Usually that is the length of the conversation up to that message. Where `text` does not begin with that, both are
    rendered again with a mark in the message's place. What follows the mark in the whole conversation is what follows
    the message in the text; of that, as much belongs to the message (and the prompt) as also follows the mark when
    nothing comes after it. That may be less than all: some prompts have a "<think>" that the answer lacks. But what
    closes the message has to be there, or the answer's header would be taken for its beginning.
    """
    part = render(messages[: at + 1], ask)[0]
    if text.startswith(part):
        return len(part)
    message = messages[at]
    # The content alone as well, since some templates show the content or the tool calls, not both.
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
