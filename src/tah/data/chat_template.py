"""A conversation rendered by a chat template, and the check that the result has all of the conversation, as text.

Templates differ in how they take tool calls and messages without a text, so there are several shapes in which the same
conversation can be handed to them. A template that was not written for a message leaves it out silently, or writes a
Python list where a text should be. No list of such templates is kept: one check of the rendered text finds that every
message is shown, and that the assistant's texts and calls stand in the supervised characters.
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

MARK = "\ue000tah\ue001"  # stands in for a message's content, to be found again
MARKER = re.compile(r"<[^<>\s]*>|\[/?[A-Z_]+\]")  # between an answer and its reasoning, which templates may leave out
PARTS = re.compile(r"""\{['"]type['"]: ?['"]text['"]""")  # a list of parts that was written as it is
GENERATION_TAG = re.compile(r"\{%-?\s*generation\s*-?%\}")
# What a template raises at a conversation that it was not written for.
REFUSALS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
Spans = list[tuple[int, int]]  # (start, stop) in characters
Turns = list[tuple[list[int], Spans]]  # indices of assistant's messages, and the characters in which they stand


class Refused(Unusable):
    """The chat template raised an error."""


class LeftOut(Unusable):
    """The chat template does not show everything, or not as text."""


class NoReasoning(LeftOut):
    """The chat template leaves out the reasoning of the last answer, and nothing else."""


# -- rendering -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """How a conversation is written for a template.

    Args:
        calls: tool calls as the row has them; in OpenAI's form, with a `function`; or in that form with the arguments
            as a string of JSON. In the latter two, tools are in OpenAI's form too.
        no_content: the content of a message that has tool calls and no text.
        parts: contents are lists with one text.
    """

    calls: Literal["given", "openai", "json"] = "given"
    no_content: Literal["absent", "none", "empty"] = "absent"
    parts: bool = False

    def tools(self, given: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
        """The tools in this shape."""
        if given is None or self.calls == "given":
            return given
        return [openai_call(tool) if "name" in tool else tool for tool in given]

    def message(self, message: dict[str, Any]) -> dict[str, Any]:
        """A message in this shape."""
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
    """Shapes in which a conversation can be given to a template, from the one that most templates take."""
    called = any("tool_calls" in message for message in chat.messages)
    bare = any("name" in tool for tool in chat.tools or [])
    contents: tuple[Any, ...] = ("absent", "none", "empty") if called else ("absent",)
    calls: tuple[Any, ...] = ("given", "openai", "json") if called else ("given", "openai") if bare else ("given",)
    for content, call in product(contents, calls):
        yield Shape(call, content)
    yield Shape(parts=True)


@dataclass(frozen=True)
class Renderer:
    """The chat template, for one conversation in one shape."""

    tokenizer: Any
    chat: Chat
    shape: Shape

    @cached_property
    def tagged(self) -> bool:
        """Whether the template marks what an assistant generates."""
        return bool(GENERATION_TAG.search(self.chat.template))

    def __call__(self, messages: Messages, ask: bool = False, tags: bool = False) -> tuple[str, Spans]:
        """Messages as text, with the prompt for an answer if `ask`, and the tagged characters if `tags`.

        Raises:
            Refused: the template raises an error.
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
        """Whether the template has written out a list or None of the shape, instead of a text."""
        given = json.dumps([self.chat.messages, self.chat.tools], ensure_ascii=False)
        if self.shape.parts and PARTS.search(text) and not PARTS.search(given):
            return True
        return self.shape.no_content == "none" and text.count("None") > given.count("None")


# -- the check -------------------------------------------------------------------------------------------------------


def check_turns(render: Renderer, text: str, turns: Turns) -> None:
    """Check that the template shows every message, and the assistant's messages in the supervised characters.

    Args:
        text: the conversation as the template shows it.
        turns: supervised messages and their characters.

    Raises:
        LeftOut: it does not; names what is missing.
    """
    chat = render.chat
    _check_marks(render)
    if "tools" in chat.template:  # a template without a place for tools is used without them
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
    except Refused:  # it inspects the contents, so only the contents themselves can be checked
        return
    for mark, what in marks:
        if mark not in shown:
            raise LeftOut(f"the chat template leaves out {what}")
        # As in {'role': 'user', 'content': 'Hi'}, or in a list of what is in there; 'Hi' alone may well be meant.
        if re.search(rf"[\[({{:,] ?'{mark}'[\])}},]", shown):
            raise LeftOut(f"the chat template writes {what.partition(' of the role')[0]} as Python does")


def _check_message(message: dict[str, Any], shown: str, at: int) -> int:
    """Check that an assistant's message stands in `shown` from character `at` on; returns where it ends.

    Its reasoning may be missing, as long as there is something else.
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
    """The longest part of a content that stands in `shown`: all of it, or what follows one of its markers.

    What stands before the last marker counts where nothing follows it. The result is empty where no part is shown.
    """
    starts = [0, *(marker.end() for marker in MARKER.finditer(content))]
    between = [part.strip() for part in reversed(MARKER.split(content)) if part.strip()]
    parts = [*(content[start:].strip() for start in starts), *between[:1]]
    return next((part for part in parts if part and part in shown), "")


def _keeps_reasoning(message: dict[str, Any], shown: str) -> bool:
    """Whether all of a message's content and reasoning is shown, whatever the markers in between are."""
    content, at = message.get("content", "").strip(), 0
    for part in [] if content in shown else MARKER.split(content):
        at = shown.find(part.strip(), at)
        if at < 0:
            return False
        at += len(part.strip())
    return all(message.get(name, "").strip() in shown for name in REASONING)


def _check_call(call: dict[str, Any], shown: str) -> None:
    """Check that a tool call is shown, its arguments neither as Python writes them nor encoded twice."""
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
    """Whether a string or an integer stands in a text, plainly or as in JSON; other values have several spellings."""
    if isinstance(value, bool) or not isinstance(value, str | int):
        return True
    value = str(value).strip()
    return any(each in text for each in (value, json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1]))


# -- ends of turns ---------------------------------------------------------------------------------------------------


def open_ends(render: Renderer, text: str, turns: Turns) -> Sequence[int]:
    """Where those supervised turns end that have no end for a model to stop at: no end-of-text token, no markup."""
    end = render.tokenizer.eos_token or MARK  # no text has the mark
    found = []
    for indices, spans in turns:
        message = render.chat.messages[indices[0]] if len(indices) == 1 else None
        for start, stop in spans:
            turn = text[start:stop]  # which may include its end
            if not turn.rstrip().endswith(end) and not _closes(render, message, turn):
                found.append(stop)
    return found


def _closes(render: Renderer, message: dict[str, Any] | None, turn: str) -> bool:
    """Whether the text of an assistant's turn ends in something that only ends of turns have.

    Args:
        message: the turn's; None where it is not known.
    """
    if message is not None and "tool_calls" not in message:
        # A content's own markup belongs to it, or "</answer>" would be taken for the end of the turn.
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
