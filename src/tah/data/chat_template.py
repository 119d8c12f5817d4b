"""Render a conversation by a chat template, and check that the result contains the whole conversation as text.

Templates expect tool calls and messages without a text in different forms, so there are several shapes of the same
conversation. A template without support for a message omits it silently, or writes a Python list in place of a text.
This package has no list of such templates. One check of the rendered text shows that every message is present, and that
the assistant's texts and calls are in the supervised characters.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Any, Literal

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from ..errors import first_line
from .chat_rows import REASONING, Chat, Messages, Unusable, nested, openai_call

MARK = "\ue000tah\ue001"  # placeholder for the content of a message
MARKER = re.compile(r"<[^<>\s]*>|\[/?[A-Z_]+\]")  # markup between an answer and its reasoning; templates may omit it
PARTS = re.compile(r"""\{['"]type['"]: ?['"]text['"]""")  # a list of parts that was written as a Python list
GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Errors that a template raises at a conversation that it does not support.
REFUSALS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
Spans = list[tuple[int, int]]  # (start, stop) in characters
Turns = list[tuple[list[int], Spans]]  # indices of the assistant's messages, and their characters


class Refused(Unusable):
    """The chat template raised an error."""


class LeftOut(Unusable):
    """The chat template omits part of the conversation, or does not write it as text."""


class NoReasoning(LeftOut):
    """The chat template omits the reasoning of the last answer, and nothing else."""


# -- rendering -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """A form of a conversation for a template.

    Args:
        calls: Form of tool calls. `given` is the form of the row, `openai` is OpenAI's form with a `function`, and
            `json` is that form with the arguments as a JSON string. The last two also change tools to OpenAI's form.
        no_content: Content of a message that has tool calls and no text.
        parts: Whether contents are lists with one text.
    """

    calls: Literal["given", "openai", "json"] = "given"
    no_content: Literal["absent", "none", "empty"] = "absent"
    parts: bool = False

    def tools(self, given: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
        """Return the tools in this shape."""
        if given is None or self.calls == "given":
            return given
        return [openai_call(tool) if "name" in tool else tool for tool in given]

    def message(self, message: dict[str, Any]) -> dict[str, Any]:
        """Return a message in this shape."""
        message = dict(message)
        if "tool_calls" in message and message["role"] == "assistant":
            message["tool_calls"] = [self._call(call) for call in message["tool_calls"]]
            if not message.get("content", "").strip():
                message.pop("content", None)
                if self.no_content != "absent":
                    message["content"] = None if self.no_content == "none" else ""
        if self.parts and message.get("content") is not None:
            message["content"] = [{"type": "text", "text": message["content"]}]
        return message

    def _call(self, call: dict[str, Any]) -> dict[str, Any]:
        if self.calls == "given":
            return call
        call = openai_call(call)
        if self.calls == "openai":
            return call
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        return {**call, "function": {**call["function"], "arguments": arguments}}


def shapes(chat: Chat) -> Iterator[Shape]:
    """Yield the shapes of a conversation, beginning with the one that most templates support."""
    called = any("tool_calls" in message for message in chat.messages)
    bare = any("name" in tool for tool in chat.tools or [])
    contents: tuple[Any, ...] = ("absent", "none", "empty") if called else ("absent",)
    calls: tuple[Any, ...] = ("given", "openai", "json") if called else ("given", "openai") if bare else ("given",)
    for content, call in product(contents, calls):
        yield Shape(call, content)
    yield Shape(parts=True)


@dataclass(frozen=True)
class Renderer:
    """The chat template, applied to one conversation in one shape."""

    tokenizer: Any
    chat: Chat
    shape: Shape

    @cached_property
    def tagged(self) -> bool:
        """Whether the template tags the assistant's turns."""
        return bool(GENERATION_TAG.search(self.chat.template))

    def __call__(self, messages: Messages, ask: bool = False, tags: bool = False) -> tuple[str, Spans]:
        """Return messages as text, and the tagged characters.

        Args:
            messages: Messages to render.
            ask: Whether to add the prompt for an answer.
            tags: Whether to return the tagged characters; otherwise that list is empty.

        Raises:
            Refused: The template raises an error.
        """
        try:
            texts, found = render_jinja_template(
                [[self.shape.message(message) for message in messages]],
                tools=self.shape.tools(self.chat.tools),
                chat_template=self.chat.template,
                add_generation_prompt=ask,
                return_assistant_tokens_mask=tags,
                **{**self.tokenizer.special_tokens_map, **self.chat.options},
            )
        except REFUSALS as error:
            raise Refused(f"the chat template refuses it: {first_line(error)[:80]}") from error
        return texts[0], found[0] if found else []

    def is_quoted(self, text: str) -> bool:
        """Return whether the template wrote a list or a None of the shape in place of a text."""
        given = json.dumps([self.chat.messages, self.chat.tools], ensure_ascii=False)
        if self.shape.parts and PARTS.search(text) and not PARTS.search(given):
            return True
        return self.shape.no_content == "none" and text.count("None") > given.count("None")


# -- the check -------------------------------------------------------------------------------------------------------


def check_turns(render: Renderer, text: str, turns: Turns) -> None:
    """Check that the text contains every message, and that the supervised characters contain the assistant's messages.

    Args:
        render: Renderer of the conversation.
        text: Rendered conversation.
        turns: Supervised messages and their characters.

    Raises:
        LeftOut: The check fails; the message names the missing part.
    """
    chat = render.chat
    _check_marks(render)
    if "tools" in chat.template:  # a template that does not support tools is used without them
        functions = [tool["function"] if isinstance(tool.get("function"), dict) else tool for tool in chat.tools or []]
        if not all(tool["name"] in text for tool in functions if isinstance(tool.get("name"), str)):
            raise LeftOut("the chat template leaves out a tool")
    last = max((index for indices, _ in turns for index in indices), default=None)
    for indices, spans in turns:
        shown, at = "".join(text[start:stop] for start, stop in spans), 0
        for index in indices:
            message, start = chat.messages[index], at
            at = _check_message(message, shown, at)
            if index == last and not _keeps_reasoning(message, shown[start:]):
                raise NoReasoning("the chat template leaves out the reasoning of the last answer")
            for call in message.get("tool_calls", []):
                _check_call(call, shown)


def _check_marks(render: Renderer) -> None:
    """Check that a mark in place of each message's content, and of the name of each call, appears in the text."""
    marked, marks = [], []
    for at, message in enumerate(render.chat.messages):
        stand_in = dict(message)
        if message.get("content", "").strip():
            stand_in["content"] = f"tah-mark-{at}-"
            marks.append((stand_in["content"], f"a message of the role {message['role']}"))
        if message["role"] == "assistant" and "tool_calls" in message:
            stand_in["tool_calls"] = []
            for number, call in enumerate(message["tool_calls"]):
                name = {"name": f"tah-call-{at}-{number}-"}
                marks.append((name["name"], "a tool call"))
                call = {**call, "function": {**call["function"], **name}} if "function" in call else {**call, **name}
                stand_in["tool_calls"].append(call)
        marked.append(stand_in)
    try:
        shown = render(marked)[0]
    except Refused:  # the template inspects the contents, so marks cannot replace them
        return
    for mark, what in marks:
        if mark not in shown:
            raise LeftOut(f"the chat template leaves out {what}")
        # As in {'role': 'user', 'content': 'Hi'}, or in a list of its values; 'Hi' alone may be intended.
        if re.search(rf"[\[({{:,] ?'{mark}'[\])}},]", shown):
            raise LeftOut(f"the chat template writes {what.partition(' of the role')[0]} as Python does")


def _check_message(message: dict[str, Any], shown: str, at: int) -> int:
    """Check that `shown` contains an assistant's message from character `at` on, and return the end of the message.

    The reasoning may be missing if the message has other parts.
    """
    content = message.get("content", "").strip()
    if f"'content': {content!r}" in shown[at:] and "'content': " not in content:
        raise LeftOut("the chat template writes a message as Python does")
    if part := _shown_part(content, shown[at:]):
        return shown.index(part, at) + len(part)
    thoughts = [message.get(name, "").strip() for name in REASONING]
    alone = not content and "tool_calls" not in message
    if content or (alone and not any(thought and thought in shown[at:] for thought in thoughts)):
        raise LeftOut("the chat template leaves out a message of the role assistant")
    return at


def _shown_part(content: str, shown: str) -> str:
    """Return the longest part of a content that `shown` contains: all of it, or the text after one of its markers.

    If nothing follows the last marker, the text before it counts. The result is empty if `shown` has no part.
    """
    starts = [0, *(marker.end() for marker in MARKER.finditer(content))]
    between = [part.strip() for part in reversed(MARKER.split(content)) if part.strip()]
    parts = [*(content[start:].strip() for start in starts), *between[:1]]
    return next((part for part in parts if part and part in shown), "")


def _keeps_reasoning(message: dict[str, Any], shown: str) -> bool:
    """Return whether `shown` contains all content and reasoning of a message, with any markers in between."""
    content, at = message.get("content", "").strip(), 0
    for part in [] if content in shown else MARKER.split(content):
        at = shown.find(part.strip(), at)
        if at < 0:
            return False
        at += len(part.strip())
    return all(message.get(name, "").strip() in shown for name in REASONING)


def _check_call(call: dict[str, Any], shown: str) -> None:
    """Check that `shown` contains a tool call, with arguments that are not in Python syntax and not encoded twice."""
    inner = call.get("function", call)
    values = list(nested(inner["arguments"]))
    if inner["name"] not in shown or not all(_is_shown(value, shown) for value in values):
        raise LeftOut("the chat template leaves out a tool call")
    for each in values:
        if not isinstance(each, dict | list):
            continue
        encoded = json.dumps(each, ensure_ascii=False)
        twice = json.dumps(encoded, ensure_ascii=False)[1:-1]
        if each and repr(each) != encoded and repr(each) in shown:
            raise LeftOut("the chat template writes tool arguments as Python does")
        if twice != encoded and twice in shown and encoded not in shown:
            raise LeftOut("the chat template encodes tool arguments twice")


def _is_shown(value: Any, text: str) -> bool:
    """Return whether a text contains a string or an integer, plain or in JSON.

    The result is True for other values, which have several spellings.
    """
    if isinstance(value, bool) or not isinstance(value, str | int):
        return True
    value = str(value).strip()
    return any(each in text for each in (value, json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1]))


# -- ends of turns ---------------------------------------------------------------------------------------------------


def open_ends(render: Renderer, text: str, turns: Turns) -> Sequence[int]:
    """Return the ends of those supervised turns that close with neither an end-of-text token nor markup."""
    end = render.tokenizer.eos_token or MARK  # no text contains the mark
    found = []
    for indices, spans in turns:
        message = render.chat.messages[indices[0]] if len(indices) == 1 else None
        for start, stop in spans:
            turn = text[start:stop]  # it may include its end token
            if not turn.rstrip().endswith(end) and not _closes(render, message, turn):
                found.append(stop)
    return found


def _closes(render: Renderer, message: dict[str, Any] | None, turn: str) -> bool:
    """Return whether the text of an assistant's turn closes with markup that only the ends of turns have.

    Args:
        render: Renderer of the conversation.
        message: Message of the turn; None if it is unknown.
        turn: Text of the turn.
    """
    if message is not None and "tool_calls" not in message:
        # The content is skipped, so that markup in it such as "</answer>" does not count as the end of the turn.
        part = _shown_part(message.get("content", "").strip(), turn)
        if part and turn[turn.rindex(part) + len(part) :].strip():
            return True
    probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": MARK}]
    try:
        text, spans = render(probe, tags=render.tagged)
    except Refused:
        return True
    stop = spans[-1][1] if render.tagged and spans else len(text)
    return MARK not in text or bool(text[text.rindex(MARK) + len(MARK) : stop].strip())
