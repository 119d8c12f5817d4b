"""A row's conversation in one form, whichever way it was written: messages with a role and a text, and what goes along.

Rows are written with OpenAI's names (role and content, tool_calls) or ShareGPT's (from and value, function_call), in
mixtures of both, and with contents in parts. What is understood is brought into the first form. What is not is never
guessed: the row is `Unusable`, and the message says why, alike for all such rows.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..files import parse_json

Messages = list[dict[str, Any]]
CALL = "tool call"  # who says what an assistant calls, as a message of its own
SPEAKERS = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "bot", "chatbot", "model", "ai"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "function_response", "tool_response"), "tool"),
    **dict.fromkeys(("function_call", "tool_call"), CALL),
}
TEXT_PARTS = (None, "text", "input_text", "output_text")  # types of parts that are text
REASONING = ("reasoning_content", "reasoning", "thinking")  # keys of an assistant's message
QUOTED = re.compile(r"""['"](\w+)['"]""")
UNLEARNT = ("weight", "train", "training", "train_on_turn")  # 0 or false: a turn that is read, not learnt
LARGEST = 2**64  # integers that a data set can hold


class Unusable(ValueError):
    """A row that cannot be trained on; the message is the reason, alike for all such rows, to be counted."""


class Refused(Unusable):
    """The chat template raised an error."""


@dataclass
class Chat:
    """A conversation.

    Args:
        messages: each with `role`, and `content` as text unless there is none.
        first: how many messages at the start are only read.
        tools: that may be called, as the chat template takes them; None where there are none.
        options: further arguments of the chat template.
        unlearnt: numbers of assistant's messages after the first that are only read, too.
    """

    messages: Messages
    first: int
    tools: list[dict[str, Any]] | None
    options: dict[str, Any]
    unlearnt: frozenset[int] = frozenset()


def is_chat(row: Mapping[str, Any]) -> bool:
    """Whether a row in one of `forms.FORMS` is a conversation, not strings."""
    lists = "completion" in row and not isinstance(row["completion"], str)
    return "messages" in row or "conversations" in row or lists


def tools_of(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """The row's tools: a list, one tool, or either as JSON.

    Raises:
        Unusable: they are something else.
    """
    tools = _decoded(row.get("tools"), "malformed tools")
    tools = [tools] if isinstance(tools, dict) else tools
    if not tools:
        return None
    if not isinstance(tools, list):
        raise Unusable("malformed tools")
    found = [_decoded(tool, "malformed tools") for tool in tools]
    if not all(isinstance(tool, dict) for tool in found):
        raise Unusable("malformed tools")
    return found


def names_of(tools: list[dict[str, Any]]) -> list[str]:
    """The names of tools, of those that have one."""
    inner = [tool["function"] if isinstance(tool.get("function"), dict) else tool for tool in tools]
    return [tool["name"] for tool in inner if isinstance(tool.get("name"), str)]


def read_chat(row: Mapping[str, Any], template: str) -> Chat:
    """The conversation of a row that `is_chat`, without entries that are None.

    Args:
        template: the chat template, which may know roles of its own.

    Raises:
        Unusable: something in it is not understood, is no text, or an assistant's turn to be learnt is empty.
    """
    read: Any = []
    if "messages" in row or "conversations" in row:
        said = row["messages"] if "messages" in row else row["conversations"]
    else:
        read, said = row.get("prompt"), row["completion"]
    if not isinstance(read, list) or not isinstance(said, list) or not said:
        raise Unusable("malformed row")
    messages, first = [_message(entry, template) for entry in [*read, *said]], len(read)
    unlearnt = {
        at
        for at, (message, entry) in enumerate(zip(messages, [*read, *said], strict=True))
        if at >= first and message["role"] == "assistant" and not _is_learnt(entry)
    }
    system = _text(row.get("system", ""))
    if system.strip():
        if messages[0]["role"] != "system":
            messages, first = [{"role": "system", "content": system}, *messages], first + bool(read)
            unlearnt = {at + 1 for at in unlearnt}
        elif messages[0].get("content") != system:
            raise Unusable("two system prompts")
    for at, message in enumerate(messages[first:], first):
        if message["role"] == "assistant" and at not in unlearnt and not says_something(message):
            raise Unusable("empty assistant message")
    options = row.get("chat_template_kwargs") or {}
    if not isinstance(options, dict):
        raise Unusable("malformed chat_template_kwargs")
    return Chat(messages, first, tools_of(row), options, frozenset(unlearnt))


def says_something(message: Mapping[str, Any]) -> bool:
    """Whether a message has a text, reasoning or tool calls that are more than white space."""
    texts = [message.get(name, "") for name in ("content", *REASONING)]
    return bool(message.get("tool_calls")) or any(text.strip() for text in texts)


# -- messages --------------------------------------------------------------------------------------------------------


def _message(entry: Any, template: str) -> dict[str, Any]:
    if not isinstance(entry, dict) or not ({"role", "from"} & set(entry)):
        raise Unusable("malformed message")
    role = _role(entry.get("role", entry.get("from")), template)
    said = _said(entry)
    message = {k: v for k, v in entry.items() if k not in ("from", "value", "function_call", *UNLEARNT)}
    calls = [*_calls(entry.get("tool_calls")), *_calls(entry.get("function_call"))]
    if role == CALL:
        role, calls, said = "assistant", [*calls, *map(openai_call, _calls(said))], ""
        if not calls:
            raise Unusable("malformed tool call")
    message["role"] = role
    if said is not None:
        message["content"] = _text(said)
    for name in REASONING:
        if name in message:
            message[name] = _text(message[name])
    message.pop("tool_calls", None)
    if calls:
        message["tool_calls"] = calls
    if said is None and not says_something(message):
        raise Unusable("message without content")
    return message


def _said(entry: Mapping[str, Any]) -> Any:
    """A message's content or value. A blank one does not hide the other; of two texts nobody knows which is meant."""
    content, value = entry.get("content"), entry.get("value")
    if value is None or content == value:
        return content
    if content is None or not (content.strip() if isinstance(content, str) else content != []):
        return value
    if isinstance(value, str | list) and (value.strip() if isinstance(value, str) else value):
        raise Unusable("a content and a value that differ")
    return content


def _is_learnt(entry: Mapping[str, Any]) -> bool:
    """Whether an assistant's message is to be learnt, as OpenAI's and axolotl's files say it."""
    for name in UNLEARNT:
        if entry.get(name) not in (None, 0, 1):  # True is 1, too
            raise Unusable(f"{name} that is neither 0 nor 1")
    if entry.get("train_detail"):
        raise Unusable("train_detail, which is not understood")
    return all(entry.get(name) != 0 for name in UNLEARNT)


def _role(speaker: Any, template: str) -> str:
    """A role that chat templates know, or that this one names."""
    if not isinstance(speaker, str):
        raise Unusable("malformed message")
    name = speaker.strip().lower()
    if name == "developer" and name in _quoted(template):
        return name
    if name in SPEAKERS:
        return SPEAKERS[name]
    if speaker in _quoted(template):
        return speaker
    raise Unusable(f"unknown speaker: {speaker[:30]}")


@functools.lru_cache(maxsize=8)
def _quoted(template: str) -> frozenset[str]:
    return frozenset(QUOTED.findall(template))


def _text(content: Any) -> str:
    """Text that a message holds, in parts or not. Integers are text; other numbers may be written in several ways."""
    if isinstance(content, str):
        return content
    if isinstance(content, int) and not isinstance(content, bool) and abs(content) < LARGEST:
        return str(content)
    if isinstance(content, list):
        return "".join(map(_part, content))
    raise Unusable("content that is no text")


def _part(part: Any) -> str:
    text = part.get("text") if isinstance(part, dict) and part.get("type") in TEXT_PARTS else part
    if not isinstance(text, str):
        raise Unusable("parts that are no text")
    return text


# -- tool calls ------------------------------------------------------------------------------------------------------


def _calls(value: Any) -> list[dict[str, Any]]:
    """Tool calls, of which each has its name and its arguments as an object; in OpenAI's form or as name and arguments.

    Arrow gives entries that are missing as None, and those of entries that are missing too: nothing is called then.
    """
    value = _decoded(value, "malformed tool call")
    found = [value] if isinstance(value, dict) else value
    if not isinstance(found, list | None):
        raise Unusable("malformed tool call")
    return [_call(call) for call in found or [] if not _is_nothing(call)]


def _call(call: Any) -> dict[str, Any]:
    if not isinstance(call, dict):
        raise Unusable("malformed tool call")
    inner = call.get("function", call)
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str) or not inner["name"].strip():
        raise Unusable("malformed tool call")
    arguments = inner.get("arguments", inner.get("parameters"))
    for _ in range(2):  # some are encoded twice
        arguments = _decoded(arguments, "malformed tool arguments")
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        raise Unusable("malformed tool arguments")
    inner = {key: value for key, value in inner.items() if key != "parameters"} | {"arguments": arguments}
    return {**call, "function": inner} if "function" in call else inner


def openai_call(call: Mapping[str, Any]) -> dict[str, Any]:
    """A call in OpenAI's form, also if it consists of name and arguments alone."""
    return {"type": "function", "function": dict(call)} if "function" not in call else dict(call)


def _decoded(value: Any, reason: str) -> Any:
    """What a string holds in JSON, None for a blank one; any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value) if value.strip() else None
    except ValueError as error:
        raise Unusable(reason) from error


def _is_nothing(value: Any) -> bool:
    if isinstance(value, dict | list):
        return all(map(_is_nothing, value.values() if isinstance(value, dict) else value))
    return value is None
