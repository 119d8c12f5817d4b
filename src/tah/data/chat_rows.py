"""Read the conversations of rows into one form: messages with a role and a text, tools, and template options.

Rows use the names of OpenAI (role and content, tool_calls), of ShareGPT (from and value, function_call) or a mixture.
Contents may have several parts. A row with an unknown or ambiguous part raises `Unusable`; nothing is guessed.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..files import parse_json

Messages = list[dict[str, Any]]
CALL = "tool call"  # role of a message that consists of an assistant's tool call
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
WEIGHTS = (
    "weight",
    "train",
    "training",
    "train_on_turn",
)  # keys of a message; 0 or false means that it is not supervised
LARGEST = 2**64  # bound of the integers in a data set


class Unusable(ValueError):
    """A row cannot be used for training. The message is the reason, in the same words for all such rows."""


@dataclass
class Chat:
    """A conversation.

    Args:
        messages: Messages with `role`, and with `content` as text unless it is missing.
        context: Number of messages at the start that are only context.
        tools: Tools for the chat template; None if there are none.
        options: Further arguments of the chat template.
        unsupervised: Indices of the assistant's messages after the first `context` that are only context, too.
        template: Chat template.
    """

    messages: Messages
    context: int
    tools: list[dict[str, Any]] | None
    options: dict[str, Any]
    unsupervised: frozenset[int]
    template: str


def is_chat(row: Mapping[str, Any]) -> bool:
    """Return whether a row in one of `rows.FORMS` is a conversation; otherwise it contains strings."""
    lists = "completion" in row and not isinstance(row["completion"], str)
    return "messages" in row or "conversations" in row or lists


def read_chat(row: Mapping[str, Any], tokenizer: Any) -> Chat:
    """Return the conversation of a row.

    Args:
        row: Conversation in one of `rows.FORMS`, without None entries.
        tokenizer: Tokenizer with the chat template, which may define roles of its own.

    Raises:
        Unusable: Part of the row has an unknown form or is not text, or a supervised message is empty.
        ValueError: The tokenizer has no chat template.
    """
    tools = _tools(row)
    if tokenizer.chat_template is None:
        raise ValueError("the tokenizer has no chat template; give it one, or the data as prompt + completion or text")
    template = tokenizer.get_chat_template(None, tools)
    prompt: Any = []
    if "messages" in row or "conversations" in row:
        rest = row["messages"] if "messages" in row else row["conversations"]
    else:
        prompt, rest = row.get("prompt"), row["completion"]
    if not isinstance(prompt, list) or not isinstance(rest, list) or not rest:
        raise Unusable("malformed row")
    entries, context = [*prompt, *rest], len(prompt)
    messages = [_message(entry, template) for entry in entries]
    skipped = {
        at
        for at, message in enumerate(messages)
        if at >= context and message["role"] == "assistant" and not _is_supervised(entries[at])
    }
    system = _text(row.get("system", ""))
    if system.strip():
        if messages[0]["role"] != "system":
            messages, context = [{"role": "system", "content": system}, *messages], context + bool(prompt)
            skipped = {at + 1 for at in skipped}
        elif messages[0].get("content") != system:
            raise Unusable("two system prompts")
    for at, message in enumerate(messages[context:], context):
        if message["role"] == "assistant" and at not in skipped and _is_empty(message):
            raise Unusable("empty assistant message")
    options = row.get("chat_template_kwargs") or {}
    if not isinstance(options, dict):
        raise Unusable("malformed chat_template_kwargs")
    return Chat(messages, context, tools, options, frozenset(skipped), template)


# -- messages --------------------------------------------------------------------------------------------------------


def _message(entry: Any, template: str) -> dict[str, Any]:
    if not isinstance(entry, dict) or not ({"role", "from"} & set(entry)):
        raise Unusable("malformed message")
    role = _role(entry.get("role", entry.get("from")), template)
    content = _content(entry)
    message = {k: v for k, v in entry.items() if k not in ("from", "value", "tool_calls", "function_call", *WEIGHTS)}
    calls = [*_calls(entry.get("tool_calls")), *_calls(entry.get("function_call"))]
    if role == CALL:
        role, calls, content = "assistant", [*calls, *map(openai_call, _calls(content))], ""
        if not calls:
            raise Unusable("malformed tool call")
    message["role"] = role
    if content is not None:
        message["content"] = _text(content)
    for name in REASONING:
        if name in message:
            message[name] = _text(message[name])
    if calls:
        message["tool_calls"] = calls
    if content is None and _is_empty(message):
        raise Unusable("message without content")
    return message


def _is_empty(message: Mapping[str, Any]) -> bool:
    """Return whether a message has no tool calls, and no content or reasoning beyond white space."""
    return not message.get("tool_calls") and not any(message.get(key, "").strip() for key in ("content", *REASONING))


def _content(entry: Mapping[str, Any]) -> Any:
    """Return the content or the value of a message: the one that is not blank.

    Raises:
        Unusable: Both have texts, and these differ.
    """
    content, value = entry.get("content"), entry.get("value")
    if value is None or content == value:
        return content
    if content is None or not (content.strip() if isinstance(content, str) else content != []):
        return value
    if isinstance(value, str | list) and (value.strip() if isinstance(value, str) else value):
        raise Unusable("a content and a value that differ")
    return content


def _is_supervised(entry: Mapping[str, Any]) -> bool:
    """Return whether an assistant's message is supervised, by the keys in files of OpenAI and axolotl."""
    for name in WEIGHTS:
        if entry.get(name) not in (None, 0, 1):  # True equals 1
            raise Unusable(f"{name} that is neither 0 nor 1")
    if entry.get("train_detail"):
        raise Unusable("train_detail, which is not understood")
    return all(entry.get(name) != 0 for name in WEIGHTS)


def _role(speaker: Any, template: str) -> str:
    """Return the standard role of a speaker, or the speaker itself if the template contains its name in quotes."""
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
    """Return the text of a content, which may have parts. Integers are text; other numbers have several spellings."""
    if isinstance(content, str):
        return content
    if isinstance(content, int) and not isinstance(content, bool) and abs(content) < LARGEST:
        return str(content)
    if not isinstance(content, list):
        raise Unusable("content that is no text")
    parts: list[Any] = [
        each.get("text") if isinstance(each, dict) and each.get("type") in TEXT_PARTS else each for each in content
    ]
    if not all(isinstance(part, str) for part in parts):
        raise Unusable("parts that are no text")
    return "".join(parts)


# -- tools and calls -------------------------------------------------------------------------------------------------


def _tools(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    """Return the tools of a row, which has a list, one tool, or either as JSON; None if there are none."""
    tools = _parsed(row.get("tools"), "tools")
    tools = [tools] if isinstance(tools, dict) else tools
    if not tools:
        return None
    found = [_parsed(tool, "tools") for tool in tools] if isinstance(tools, list) else [tools]
    if not all(isinstance(tool, dict) for tool in found):
        raise Unusable("malformed tools")
    return found


def _calls(value: Any) -> list[dict[str, Any]]:
    """Return tool calls with name and arguments (an object), either in OpenAI's form or as these two alone.

    Arrow writes missing calls as None, or as objects that contain only None. These are left out.
    """
    value = _parsed(value, "tool call")
    found = [value] if isinstance(value, dict) else value
    if not isinstance(found, list | None):
        raise Unusable("malformed tool call")
    empty = (type(None), dict, list)
    return [_call(call) for call in found or [] if not all(isinstance(each, empty) for each in nested(call))]


def _call(call: Any) -> dict[str, Any]:
    inner = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str) or not inner["name"].strip():
        raise Unusable("malformed tool call")
    arguments = inner.get("arguments", inner.get("parameters"))
    for _ in range(2):  # some data sets encode arguments twice
        arguments = _parsed(arguments, "tool arguments")
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        raise Unusable("malformed tool arguments")
    inner = {key: value for key, value in inner.items() if key != "parameters"} | {"arguments": arguments}
    return {**call, "function": inner} if "function" in call else inner


def openai_call(call: Mapping[str, Any]) -> dict[str, Any]:
    """Return a call in OpenAI's form; a call of only name and arguments is wrapped."""
    return {"type": "function", "function": dict(call)} if "function" not in call else dict(call)


def _parsed(value: Any, what: str) -> Any:
    """Return the JSON value of a string, None for a blank one, and any other value unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return parse_json(value) if value.strip() else None
    except ValueError as error:
        raise Unusable(f"malformed {what}") from error


def nested(value: Any) -> Iterator[Any]:
    """Yield a JSON value and all values inside it."""
    yield value
    for entry in value.values() if isinstance(value, dict) else value if isinstance(value, list) else []:
        yield from nested(entry)
