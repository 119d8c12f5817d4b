"""Whether a chat template shows what a row says, all of it, and as text.

A template that was not written for a message leaves it out without a word, or writes a Python list where a text should
be. Rather than a list of such templates there is one check of what was rendered: every message is seen, and what an
assistant says and calls stands in what will be learnt.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .chat_rows import REASONING, Chat, Messages, Refused, Unusable, names_of

MARK = "\ue000tah\ue001"  # stands in for a message's content, to be found again
MARKER = re.compile(r"<[^<>\s]*>|\[/?[A-Z_]+\]")  # between an answer and its reasoning, which templates may leave out
Turns = Sequence[tuple[list[int], list[tuple[int, int]]]]  # numbers of messages, and (start, stop) in characters


class LeftOut(Unusable):
    """The chat template does not show everything, or not as text."""


class NoReasoning(LeftOut):
    """It shows everything but how the last answer was found."""


def check_turns(chat: Chat, text: str, turns: Turns, render: Callable[..., Any], knows_tools: bool) -> None:
    """Whether the template shows every message, and what the assistant says in the characters to be learnt.

    Args:
        text: the conversation as the template shows it.
        turns: numbers of assistant's messages, and the characters in which they stand.
        render: a conversation -> (text, spans); raises `Refused`.
        knows_tools: whether the template has a place for tools. One that has none is used without them.

    Raises:
        LeftOut: it does not; says what is missing.
    """
    _check_marks(chat.messages, render)
    last = max((number for numbers, _ in turns for number in numbers), default=None)
    if knows_tools and not all(name in text for name in names_of(chat.tools or [])):
        raise LeftOut("the chat template leaves out a tool")
    for numbers, spans in turns:
        learnt, at = "".join(text[start:stop] for start, stop in spans), 0
        for number in numbers:
            message = chat.messages[number]
            start, at = at, _check_said(message, learnt, at)
            if number == last and not _keeps_reasoning(message, learnt[start:]):
                raise NoReasoning("the chat template leaves out the reasoning of the last answer")
            for call in message.get("tool_calls", []):
                _check_call(call, learnt)


def _check_marks(messages: Messages, render: Callable[..., Any]) -> None:
    """Each message with a mark of its own for its content, and for the name of what it calls: are all marks shown?"""
    marked, marks = [], []
    for at, message in enumerate(messages):
        stand_in = dict(message)
        if message.get("content", "").strip():
            stand_in["content"] = f"tah-mark-{at}-"
            marks.append((stand_in["content"], f"a message of the role {message['role']}"))
        if message["role"] == "assistant" and "tool_calls" in message:
            names = [f"tah-call-{at}-{number}-" for number in range(len(message["tool_calls"]))]
            stand_in["tool_calls"] = [
                {**call, "function": {**call["function"], "name": name}}
                if "function" in call
                else {**call, "name": name}
                for call, name in zip(message["tool_calls"], names, strict=True)
            ]
            marks += [(name, "a tool call") for name in names]
        marked.append(stand_in)
    try:
        shown = render(marked)[0]
    except Refused:  # it looks at what is said, which then has to speak for itself
        return
    for mark, what in marks:
        if mark not in shown:
            raise LeftOut(f"the chat template leaves out {what}")
        # As in {'role': 'user', 'content': 'Hi'}, or in a list of what is in there; 'Hi' alone may well be meant.
        if re.search(rf"[\[({{:,] ?'{mark}'[\])}},]", shown):
            raise LeftOut(f"the chat template writes {what.partition(' of the role')[0]} as Python does")


def _check_said(message: dict[str, Any], learnt: str, at: int) -> int:
    """Whether an assistant's message stands in what is learnt, from character `at` on; where it ends there.

    Its reasoning may be missing, as long as there is more than that.
    """
    content = message.get("content", "").strip()
    if f"'content': {content!r}" in learnt[at:] and "'content': " not in content:
        raise LeftOut("the chat template writes a message as Python does")
    if part := _shown_part(content, learnt[at:]):
        return learnt.index(part, at) + len(part)
    thoughts = [message.get(name, "").strip() for name in REASONING]
    alone = not content and "tool_calls" not in message
    if content or (alone and not any(thought and thought in learnt[at:] for thought in thoughts)):
        raise LeftOut("the chat template leaves out a message of the role assistant")
    return at


def _shown_part(content: str, learnt: str) -> str:
    """The longest part of a content that stands in what is learnt: all of it, or what follows one of its markers.

    It is empty where nothing stands there.
    """
    starts = [0, *(marker.end() for marker in MARKER.finditer(content))]
    parts = [*(content[start:].strip() for start in starts), last_part(content)]
    return next((part for part in parts if part and part in learnt), "")


def _keeps_reasoning(message: dict[str, Any], learnt: str) -> bool:
    """Whether all that a message says and thinks stands in what is learnt, whatever the markers in between are."""
    content, at = message.get("content", "").strip(), 0
    for part in [] if content in learnt else MARKER.split(content):
        at = learnt.find(part.strip(), at)
        if at < 0:
            return False
        at += len(part.strip())
    return all(message.get(name, "").strip() in learnt for name in REASONING)


def _check_call(call: dict[str, Any], learnt: str) -> None:
    """Whether a tool call stands in what is learnt, its arguments neither as Python writes them nor encoded twice."""
    inner = call.get("function", call)
    if inner["name"] not in learnt or not all(_shows(learnt, leaf) for leaf in _leaves(inner["arguments"])):
        raise LeftOut("the chat template leaves out a tool call")
    for each in _containers(inner["arguments"]):
        encoded = json.dumps(each, ensure_ascii=False)
        twice = json.dumps(encoded, ensure_ascii=False)[1:-1]
        if each and repr(each) != encoded and repr(each) in learnt:
            raise LeftOut("the chat template writes tool arguments as Python does")
        if twice != encoded and twice in learnt and encoded not in learnt:
            raise LeftOut("the chat template encodes tool arguments twice")


def _shows(text: str, leaf: Any) -> bool:
    """Whether a string or an integer is there, as it is or as JSON writes it; other leaves have several spellings."""
    if isinstance(leaf, bool) or not isinstance(leaf, str | int):
        return True
    leaf = str(leaf).strip()
    return any(each in text for each in (leaf, json.dumps(leaf)[1:-1], json.dumps(leaf, ensure_ascii=False)[1:-1]))


def _leaves(value: Any) -> Iterator[Any]:
    if not isinstance(value, dict | list):
        yield value
        return
    for entry in value.values() if isinstance(value, dict) else value:
        yield from _leaves(entry)


def _containers(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        yield value
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _containers(entry)


def last_part(content: str) -> str:
    """What follows the last marker of a content, as "</think>"; what stands before it where nothing follows."""
    parts = [part.strip() for part in MARKER.split(content)]
    return next((part for part in reversed(parts) if part), "")


# -- ends of turns ---------------------------------------------------------------------------------------------------


def closes(message: dict[str, Any] | None, learnt: str, render: Callable[..., Any], tagged: bool) -> bool:
    """Whether an assistant's turn ends in something that tells its end.

    Args:
        message: the turn's; None where it is not known.
        learnt: the turn as text.
        render: a conversation -> (text, spans); raises `Refused`.
        tagged: whether the template tells what is to be learnt.
    """
    if message is not None and "tool_calls" not in message:
        # Of a content that ends in markup all counts, or "</answer>" would be taken for the end of the turn.
        part = _shown_part(message.get("content", "").strip(), learnt)
        if part and learnt[learnt.rindex(part) + len(part) :].strip():
            return True
    try:
        text, spans = render([{"role": "user", "content": "a"}, {"role": "assistant", "content": MARK}], tags=tagged)
    except Refused:
        return True
    stop = spans[-1][1] if tagged and spans else len(text)
    return MARK not in text or bool(text[text.rindex(MARK) + len(MARK) : stop].strip())
