"""A row as tokens, and which of them the model is to say.

Chat goes through the tokenizer's own template. Where that marks the assistant's turns (`{% generation %}`), its marks
count; elsewhere a turn is what the conversation up to and with it has in addition to the conversation up to it,
rendered with the prompt for an answer. Templates that render a turn differently once more follow (Qwen3's leaves out
earlier reasoning) are asked again with a mark in its place: what follows the mark tells where the turn ends. Either way
turns are found in characters, and tokens by what they cover. What was found is checked (shown.py) before it counts.

T: tokens of the row.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Callable, Mapping
from os.path import commonprefix  # of any strings
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from ..errors import first_line
from .chat_rows import Chat, Messages, Refused, Unusable, is_chat, read_chat, tools_of
from .shapes import Shape, shapes
from .shown import MARK, LeftOut, NoReasoning, check_turns, closes

GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
OPEN_MARKER = re.compile(r"<[^<>\s]*$")  # where two texts part within a marker, as "<think>" and "<tool_call>" do
# What a template raises at a conversation that it was not written for.
REFUSALS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
LOG = logging.getLogger(__name__)
Spans = list[tuple[int, int]]  # (start, stop) in characters
Turns = list[tuple[list[int], Spans]]  # numbers of assistant's messages, and where they stand
Render = Callable[..., tuple[str, Spans]]


def encode(row: Mapping[str, Any], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Tokens [T] of a row in one of `forms.FORMS`, and which of them are supervised; never the first.

    Raises:
        Unusable: the row is malformed, something in it would be lost, or the template does not let us tell who says
            what.
        ValueError: no row could be encoded: the tokenizer has no chat template, or tells no offsets.
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
        _learn_stop(ids, mask, ends, stop, tokenizer)
    supervised = mask.tolist()
    if (not chat or len(text) in unclosed) and tokenizer.eos_token_id is not None:
        if not ids or ids[-1] != tokenizer.eos_token_id:
            ids, supervised = [*ids, tokenizer.eos_token_id], [*supervised, True]
        supervised[-1] = True
    return ids, [False, *supervised[1:]] if ids else []


def _learn_stop(ids: list[int], mask: np.ndarray, ends: np.ndarray, stop: int, tokenizer: Any) -> None:
    """Let the model say the special token that follows a turn without an end, in which the next turn begins.

    What follows the last turn is the end of text, which the caller adds.
    """
    after = int((ends <= stop).sum())
    special = {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    if after < len(ids) and ids[after] in special:
        mask[after] = True
    elif after < len(ids) or tokenizer.eos_token_id is None:
        _warn_of_no_end(str(tokenizer.chat_template))


@functools.lru_cache(maxsize=8)
def _warn_of_no_end(template: str) -> None:
    """Say it once for a template, not for every row."""
    LOG.warning(
        "the chat template ends some of the assistant's turns with nothing that a model could stop at: "
        "no end is learnt there"
    )


def _without_none(value: Any) -> Any:
    """Arrow gives all rows the same keys and fills up with None; templates ask whether a key is there."""
    if isinstance(value, Mapping):
        return {key: _without_none(entry) for key, entry in value.items() if entry is not None}
    return [_without_none(entry) for entry in value] if isinstance(value, list) else value


def _strings(row: Mapping[str, Any]) -> tuple[str, Spans]:
    """Prompt and completion, or a text, as it is, and the characters to be learnt."""
    prompt, rest = (row["prompt"], row.get("completion")) if "prompt" in row else ("", row.get("text"))
    if not isinstance(prompt, str) or not isinstance(rest, str):
        raise Unusable("malformed row")
    if "prompt" in row and not rest.strip():
        raise Unusable("empty completion")
    if not rest.strip():
        raise Unusable("no assistant tokens")
    return prompt + rest, [(len(prompt), len(prompt + rest))]


# -- conversations ---------------------------------------------------------------------------------------------------


def _chat(row: Mapping[str, Any], tokenizer: Any) -> tuple[str, Spans, list[int]]:
    """The conversation as text, the (start, stop) characters to be learnt, and which stops are of turns without end.

    A template that refuses the first shape of the conversation, or leaves something out, is asked with the others.
    """
    tools = tools_of(row)
    if tokenizer.chat_template is None:
        raise ValueError("the tokenizer has no chat template; give it one, or the data as prompt + completion or text")
    template = tokenizer.get_chat_template(None, tools)
    chat = read_chat(row, template)
    tagged = bool(GENERATION_TAG.search(template))
    end, why = tokenizer.eos_token or MARK, None  # the mark is never said
    for shape in shapes(chat):
        render = functools.partial(_render, shape, chat, template, tokenizer)
        try:
            text, turns = _turns(chat, render, tagged)
            check_turns(chat, text, turns, render, "tools" in template)
        except (Refused, LeftOut) as error:
            why = error if isinstance(error, NoReasoning) else why or error
            continue
        if shape.is_quoted(chat, text):
            continue
        unclosed = []
        for numbers, spans in turns:
            message = chat.messages[numbers[0]] if len(numbers) == 1 else None
            for start, stop in spans:
                said = text[start:stop]  # which may bring its end along
                if not said.rstrip().endswith(end) and not closes(message, said, render, tagged):
                    unclosed.append(stop)
        return text, [span for _, spans in turns for span in spans], unclosed
    raise why or Unusable("malformed row")


def _render(
    shape: Shape,
    chat: Chat,
    template: str,
    tokenizer: Any,
    conversation: Messages,
    ask: bool = False,
    tags: bool = False,
) -> tuple[str, Spans]:
    """A conversation as text, with the prompt for an answer if `ask`, and what is tagged in it if `tags`."""
    try:
        texts, found = render_jinja_template(
            [shape.messages(conversation)],
            tools=shape.tools(chat.tools),
            chat_template=template,
            add_generation_prompt=ask,
            return_assistant_tokens_mask=tags,
            **{**tokenizer.special_tokens_map, **chat.options},
        )
    except REFUSALS as error:
        raise Refused(f"the chat template refuses it: {first_line(error)[:80]}") from error
    return texts[0], found[0] if found else []


def _turns(chat: Chat, render: Render, tagged: bool) -> tuple[str, Turns]:
    """The conversation as text, and the assistant's messages to be learnt with the characters in which they stand.

    Tags do not say to which message they belong, so that all of these come together. Where some answers are not to be
    learnt, there has to be a tag for each answer; the check of what was found shows that they are in order.
    """
    messages, first = chat.messages, chat.first
    text, spans = render(messages, tags=tagged)
    said = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
    learnt = [at for at in said if at >= first and at not in chat.unlearnt]
    if not learnt:
        return text, []
    if tagged and chat.unlearnt:
        if len(spans) != len(said):
            raise Unusable("the chat template does not mark each answer by itself, and one is not to be learnt")
        return text, [([at], [span]) for at, span in zip(said, spans, strict=True) if at in learnt]
    if tagged:
        begin = _end(messages, first - 1, text, render) if first else 0
        return text, [(learnt, [span for span in spans if span[0] >= begin])]
    if learnt[0] == 0:
        raise Unusable("begins with an assistant message")
    turns: Turns = []
    for at in learnt:
        start, stop = _end(messages, at - 1, text, render, ask=True), _end(messages, at, text, render)
        if stop < start:
            raise Unusable("the chat template changes earlier turns")
        turns.append(([at], [(start, stop)]))
    return text, turns


def _end(messages: Messages, at: int, text: str, render: Render, ask: bool = False) -> int:
    """Where in `text`, the whole conversation, message `at` ends; with `ask`, so does the prompt for an answer to it.

    Usually as many characters as the conversation up to that message has. Where that is not what the text begins with,
    both are rendered again with a mark in the message's place. What follows the mark in the whole conversation is what
    follows the message in the text; of that, as much belongs to the message (and the prompt) as also follows the mark
    when nothing comes after it. That may be less than all: some prompts have a "<think>" that the answer has not. But
    what closes the message has to be there, or the answer's header would be taken for its beginning.
    """
    part = render(messages[: at + 1], ask)[0]
    if text.startswith(part):
        return len(part)
    message = messages[at]
    # Alone as well, since some templates show the content or the tool calls, not both.
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
