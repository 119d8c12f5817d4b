"""Ways to write the same conversation for a chat template, since templates differ in what they take."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

from .chat_rows import Chat, Messages, openai_call

PARTS = re.compile(r"""\{['"]type['"]: ?['"]text['"]""")  # a list of parts that was written as it is


@dataclass(frozen=True)
class Shape:
    """How a conversation is written.

    Args:
        calls: tool calls as the row has them; in OpenAI's form, with a `function`; or in that, with the arguments as a
            string of JSON. But for the first, tools are in OpenAI's form too.
        silence: what the content of a message is that calls a tool and says nothing.
        parts: contents are lists with one text.
    """

    calls: Literal["given", "openai", "json"] = "given"
    silence: Literal["absent", "none", "empty"] = "absent"
    parts: bool = False

    def messages(self, given: Messages) -> Messages:
        """The messages in this shape."""
        return [self._message(message) for message in given]

    def tools(self, given: list[dict[str, Any]] | None) -> list[dict[str, Any]] | None:
        """The tools in this shape."""
        if given is None or self.calls == "given":
            return given
        return [openai_call(tool) if "name" in tool else tool for tool in given]

    def _message(self, message: dict[str, Any]) -> dict[str, Any]:
        message = dict(message)
        silent: dict[str, dict[str, Any]] = {"absent": {}, "none": {"content": None}, "empty": {"content": ""}}
        if "tool_calls" in message and message["role"] == "assistant":
            message["tool_calls"] = [self._call(call) for call in message["tool_calls"]]
            if not message.get("content", "").strip():
                message.pop("content", None)
                message.update(silent[self.silence])
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

    def is_quoted(self, chat: Chat, text: str) -> bool:
        """Whether a template that was not made for this shape has written it out, a list or None, instead of a text."""
        said = json.dumps([chat.messages, chat.tools], ensure_ascii=False)
        if self.parts and PARTS.search(text) and not PARTS.search(said):
            return True
        return self.silence == "none" and text.count("None") > said.count("None")


def shapes(chat: Chat) -> Iterator[Shape]:
    """Shapes in which a conversation can be given to a template, from the one that most templates take."""
    called = any("tool_calls" in message for message in chat.messages)
    bare = any("name" in tool for tool in chat.tools or [])
    silences: tuple[Any, ...] = ("absent", "none", "empty") if called else ("absent",)
    calls: tuple[Any, ...] = ("given", "openai", "json") if called else ("given", "openai") if bare else ("given",)
    for silence, call in product(silences, calls):
        yield Shape(call, silence)
    yield Shape(parts=True)
