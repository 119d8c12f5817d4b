"""A row as tokens, and which of them the model is to say.

Chat goes through the tokenizer's own template. Where that marks the assistant's turns (`{% generation %}`), its marks
count; elsewhere a turn is what the conversation up to and with it has in addition to the conversation up to it,
rendered with the prompt for an answer. Templates that render a turn differently once more follow (Qwen3's leaves out
earlier reasoning) are asked again with a mark in its place: what follows the mark tells where the turn ends. Either way
turns are found in characters, and tokens by what they cover.

T: tokens of the row.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from os.path import commonprefix  # of any strings
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from ..load import first_line

SPEAKERS = {"human": "user", "gpt": "assistant", "function": "tool"}  # ShareGPT's names for roles
GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
MARK = "\ue000tah\ue001"  # stands in for a message's content, to be found again
OPEN_MARKER = re.compile(r"<[^<>\s]*$")  # where two texts part within a marker, as "<think>" and "<tool_call>" do
REFUSALS = (TemplateError, TypeError, KeyError)  # what a template raises at a conversation it was not written for
Spans = list[tuple[int, int]]  # (start, stop) in characters
Messages = list[dict[str, Any]]


class Unusable(ValueError):
    """A row that cannot be trained on; the message is the reason, alike for all such rows, to be counted."""


def encode(row: Mapping[str, Any], tokenizer: Any) -> tuple[list[int], list[bool]]:
    """Tokens [T] of a row in one of `data.FORMS`, and which of them are supervised; never the first.

    Raises:
        Unusable: the row is malformed, or the template does not let us tell who says what.
        ValueError: no row could be encoded: the tokenizer has no chat template, or tells no offsets.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{type(tokenizer).__name__} does not say which characters a token covers; use a fast one")
    row = _without_none(row)
    messages, first = _messages(row)
    if messages:
        text, spans = _render_chat(messages, first, tokenizer, row)
    else:
        prompt, rest = (row["prompt"], row.get("completion")) if "prompt" in row else ("", row.get("text"))
        if not isinstance(prompt, str) or not isinstance(rest, str):
            raise Unusable("malformed row")
        text, spans = prompt + rest, [(len(prompt), len(prompt + rest))]
    found = tokenizer(text, add_special_tokens=not messages, return_offsets_mapping=True)
    # By their last character, since some tokenizers leave leading whitespace out of a token's offsets.
    ids, ends = list(found["input_ids"]), np.array([end for _, end in found["offset_mapping"]], dtype=np.int64)
    mask = np.zeros(len(ids), dtype=bool)
    for start, stop in spans:
        mask |= (start < ends) & (ends <= stop)
    supervised = mask.tolist()
    if not messages and tokenizer.eos_token_id is not None:
        if not ids or ids[-1] != tokenizer.eos_token_id:
            ids, supervised = [*ids, tokenizer.eos_token_id], [*supervised, True]
        supervised[-1] = True
    return ids, [False, *supervised[1:]] if ids else []


def _messages(row: Mapping[str, Any]) -> tuple[Messages, int]:
    """The row's conversation, and the number of messages at its start that are only read; empty where it is text."""
    read: Any = []
    if "messages" in row or "conversations" in row:
        said = row["messages"] if "messages" in row else row["conversations"]
    elif "completion" in row and not isinstance(row["completion"], str):
        read, said = row.get("prompt"), row["completion"]
    else:
        return [], 0
    if not isinstance(read, list) or not isinstance(said, list) or not said:
        raise Unusable("malformed row")
    return [_message(entry) for entry in [*read, *said]], len(read)


def _without_none(value: Any) -> Any:
    """Arrow gives all rows the same keys and fills up with None; templates ask whether a key is there."""
    if isinstance(value, Mapping):
        return {key: _without_none(entry) for key, entry in value.items() if entry is not None}
    return [_without_none(entry) for entry in value] if isinstance(value, list) else value


def _message(entry: Any) -> dict[str, Any]:
    """A message with role and content, from that or from ShareGPT's from and value."""
    if not isinstance(entry, dict) or not ({"role", "from"} & set(entry)):
        raise Unusable("malformed message")
    if "role" in entry:
        return entry
    role = SPEAKERS.get(entry["from"], entry["from"])
    rest = {key: value for key, value in entry.items() if key not in ("from", "value")}
    return {"role": role, "content": entry.get("value", ""), **rest}


def _render_chat(messages: Messages, first: int, tokenizer: Any, row: Mapping[str, Any]) -> tuple[str, Spans]:
    """The conversation as text, and the (start, stop) characters of the assistant's turns from message `first` on."""
    tools, options = row.get("tools") or None, dict(row.get("chat_template_kwargs") or {})
    try:
        tools = json.loads(tools) if isinstance(tools, str) else tools
    except json.JSONDecodeError as error:
        raise Unusable("malformed tools") from error
    if tokenizer.chat_template is None:
        raise ValueError("the tokenizer has no chat template; give it one, or the data as prompt + completion or text")
    template = tokenizer.get_chat_template(None, tools)
    tagged = bool(GENERATION_TAG.search(template))

    def render(conversation: Messages, ask: bool = False, tags: bool = False) -> tuple[str, Spans]:
        texts, found = render_jinja_template(
            [conversation],
            tools=tools,
            chat_template=template,
            add_generation_prompt=ask,
            return_assistant_tokens_mask=tags,
            **{**tokenizer.special_tokens_map, **options},
        )
        return texts[0], found[0] if found else []

    try:
        text, spans = render(messages, tags=tagged)
        if tagged:
            begin = _end(messages, first - 1, text, render) if first else 0
            return text, [span for span in spans if span[0] >= begin]
        for at, message in enumerate(messages):
            if at < first or message["role"] != "assistant":
                continue
            if at == 0:
                raise Unusable("begins with an assistant message")
            start, stop = _end(messages, at - 1, text, render, ask=True), _end(messages, at, text, render)
            if stop < start:
                raise Unusable("the chat template changes earlier turns")
            spans.append((start, stop))
        return text, spans
    except REFUSALS as error:
        raise Unusable(f"the chat template refuses it: {first_line(error)[:80]}") from error


def _end(messages: Messages, at: int, text: str, render: Callable[..., tuple[str, Spans]], ask: bool = False) -> int:
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
    mark = [{"type": "text", "text": MARK}] if isinstance(message.get("content"), list) else MARK
    # Alone as well, since some templates show the content or the tool calls, not both.
    for stand_in in ({**message, "content": mark}, {"role": message["role"], "content": mark}):
        marked = [*messages[:at], stand_in, *messages[at + 1 :]]
        try:
            *before, rest = render(marked)[0].split(MARK)
            *alone, own = render(marked[: at + 1], ask)[0].split(MARK)
            close = commonprefix([own, render(marked[: at + 1])[0].split(MARK)[-1]]) if ask else ""
        except REFUSALS:
            continue
        same = commonprefix([own, rest])
        if len(before) == len(alone) == 1 and text.endswith(rest) and same.startswith(close):
            return len(text) - len(rest) + len(same if same == own else OPEN_MARKER.sub("", same))
    raise Unusable("the chat template changes earlier turns")
