"""Rows of chat as people write them: what is said is learnt, or the row is dropped by a reason; never half of it.

The templates are written for these tests. Each has the structure of a public family's in its smallest form, with what
that family does to a message it does not know.
"""

import json
from collections import Counter

import datasets
import pytest
from transformers import AutoTokenizer

from helpers.models import CHAT_TEMPLATE
from tah.data.rows import load_rows, tokenize_row

CHATML = CHAT_TEMPLATE  # knows no tools, and takes any role
# As Qwen's: tools and calls are known, other roles vanish, and so does a content that is no string.
QWEN = """
{%- macro said(m) %}{{ m.content if m.content is string else '' }}{% endmacro %}
{%- set system = said(messages[0]) if messages[0].role == 'system' else '' %}
{%- if system or tools %}
    {{- '<|im_start|>system\\n' + system }}
    {%- for tool in tools or [] %}{{ '\\n' }}{{ tool | tojson }}{% endfor %}{{ '<|im_end|>\\n' }}
{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + m.role + '\\n' + said(m) + '<|im_end|>\\n' }}
    {%- elif m.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' + said(m) }}
        {%- for call in m.tool_calls or [] %}
            {%- set call = call.function if call.function is defined else call %}
            {{- '\\n<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}{{ call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- elif m.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + said(m) + '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
# As Llama 3.1's: a message is its call or its content, a call comes alone, results are written as JSON.
LLAMA = """
{%- for m in messages %}
    {%- if m.tool_calls is defined and m.tool_calls %}
        {%- if m.tool_calls | length != 1 %}{{ raise_exception('one tool call at a time') }}{% endif %}
        {%- set call = m.tool_calls[0].function %}
        {{- '<|start|>assistant<|end|>\\n\\n{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}{{ '}<|im_end|>' }}
    {%- elif m.role in ['tool', 'ipython'] %}
        {{- '<|start|>ipython<|end|>\\n\\n' }}{{ m.content | tojson }}{{ '<|im_end|>' }}
    {%- else %}
        {{- '<|start|>' + m.role + '<|end|>\\n\\n' + m.content | string | trim + '<|im_end|>' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant<|end|>\\n\\n' }}{% endif %}"""
# As Gemma's: no system message, user and model in turn.
GEMMA = """
{%- if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}
{%- for m in messages %}
    {%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}
    {{- '<start>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}
    {{- m.content | string | trim + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start>model\\n' }}{% endif %}"""
# As GLM 4.5's: nothing ends a turn but the marker of the next, and arguments are taken apart.
GLM = """
{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {{- '<|assistant|>\\n<think></think>' }}
        {%- set said = m.content.split('</think>')[-1].strip() %}
        {%- if said %}{{ '\\n' + said }}{% endif %}
        {%- for call in m.tool_calls or [] %}
            {%- set call = call.function if call.function else call %}
            {{- '\\n<tool_call>' + call.name }}
            {%- for k, v in call.arguments.items() %}
                {{- '\\n<key>' ~ k ~ '</key>\\n<value>' ~ (v if v is string else v | tojson) ~ '</value>' }}
            {%- endfor %}
            {{- '\\n</tool_call>' }}
        {%- endfor %}
    {%- elif m.role == 'tool' %}{{ '<|observation|>\\n' + m.content }}
    {%- else %}{{ '<|' + m.role + '|>\\n' + m.content }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""
# As Mistral's: the system prompt goes into the last question, calls are a list of functions.
MISTRAL = """
{%- set ns = namespace(system='', last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
    {%- if m.role == 'system' %}{% set ns.system = m.content + '\\n\\n' %}
    {%- elif m.role == 'user' %}
        {{- '[INST] ' + (ns.system if loop.index0 == ns.last else '') + m.content + '[/INST]' }}
    {%- elif m.role == 'tool' %}{{ '[RESULT] ' + m.content + '[/RESULT]' }}
    {%- elif m.tool_calls is defined and m.tool_calls is not none %}
        {{- '[CALLS] [' }}
        {%- for call in m.tool_calls %}{{ call.function | tojson }}{{ ', ' if not loop.last }}{% endfor %}
        {{- ']' + eos_token }}
    {%- else %}{{ ' ' + m.content + eos_token }}
    {%- endif %}
{%- endfor %}"""
# As DeepSeek's: arguments have to be a string.
STRING_ARGUMENTS = CHATML.replace(
    "<|im_end|>\n{% endfor",
    "{% for call in message.tool_calls or [] %}{{ '<call>' + call['function']['name'] + '\n' "
    "+ call['function']['arguments'] }}{% endfor %}<|im_end|>\n{% endfor",
)
# As DeepSeek's also: a content that is not None is a turn of its own.
TURN_PER_CONTENT = STRING_ARGUMENTS.replace(
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}",
    "<|im_start|>{{ message['role'] }}\n{% if message['content'] is not none %}"
    "{{ message['content'] + '<|im_end|>' }}{% endif %}",
)
PYTHON_ARGUMENTS = STRING_ARGUMENTS.replace(
    "+ call['function']['arguments'] }}", "}}{{ call['function']['arguments'] }}"
)
QUIET_TOOLS = "{% for tool in tools or [] %}{{ tool.function.name }}\n{% endfor %}" + CHATML
NAMELESS_TOOLS = "{{ tools | length if tools }}" + CHATML
WRAPPED_TOOLS = "{% for tool in tools or [] %}{{ 'tool ' + tool.function.name + '\n' }}{% endfor %}" + CHATML
NEEDS_PARTS = CHATML.replace(
    "{{ message['content'] }}",
    "{% for part in message['content'] %}{{ part['text'] if part['type'] == 'text' }}{% endfor %}",
)
# The end of a turn is not in the tags, as in trl's pull request 5988.
TAGS_WITHOUT_END = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>\n{% endfor %}"
)
TAGS_ONLY_THE_LAST = TAGS_WITHOUT_END.replace("if m.role == 'assistant'", "if loop.last")
# As Vicuna's: nothing ends a turn but a line break, and the marker of the next turn.
OPEN = (
    "{% for m in messages %}{{ ('<|user|>: ' if m.role == 'user' else 'ASSISTANT: ') + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
PYTHON_CALLS = STRING_ARGUMENTS.replace(
    "{{ '<call>' + call['function']['name'] + '\n' + call['function']['arguments'] }}", "{{ call }}"
)
PYTHON_QUESTIONS = CHATML.replace(
    "{{ message['content'] }}", "{{ message['content'] if message.role == 'assistant' else message }}"
)
TEMPLATES = {
    "open": OPEN,
    "python messages": CHATML.replace("{{ message['content'] }}", "{{ message }}"),
    "python items": CHATML.replace("{{ message['content'] }}", "{{ message.values() | list }}"),
    "python questions": PYTHON_QUESTIONS,
    "in quotation marks": CHATML.replace("{{ message['content'] }}", "'{{ message['content'] }}'"),
    "python calls": PYTHON_CALLS,
    "chatml": CHATML,
    "qwen": QWEN,
    "llama": LLAMA,
    "gemma": GEMMA,
    "glm": GLM,
    "mistral": MISTRAL,
    "string arguments": STRING_ARGUMENTS,
    "turn per content": TURN_PER_CONTENT,
    "python arguments": PYTHON_ARGUMENTS,
    "wrapped tools": WRAPPED_TOOLS,
    "quiet tools": QUIET_TOOLS,
    "nameless tools": NAMELESS_TOOLS,
    "needs parts": NEEDS_PARTS,
    "tags without end": TAGS_WITHOUT_END,
    "tags only the last": TAGS_ONLY_THE_LAST,
}
CHATTY = ("chatml", "qwen", "llama", "gemma", "glm", "mistral", "needs parts")
ENDS = {"chatml": "<|im_end|>\n", "qwen": "<|im_end|>\n", "llama": "<|im_end|>", "gemma": "<|im_end|>\n"}
ENDS |= {"glm": "<|im_end|>", "mistral": "<|im_end|>", "needs parts": "<|im_end|>\n"}
BEGINS = {"mistral": " ", "glm": "\n<think></think>\n"}


def user(content, **more):
    return {"role": "user", "content": content, **more}


def answer(content, **more):
    return {"role": "assistant", "content": content, **more}


def gpt(value, speaker="gpt"):
    return {"from": speaker, "value": value}


def human(value):
    return {"from": "human", "value": value}


def text(*texts):
    return [{"type": "text", "text": each} for each in texts]


def call(arguments, name="w"):
    return {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}


def called(*calls, content="", result="sunny"):
    """A conversation with a call, and its row."""
    said = [answer(content, tool_calls=list(calls)), {"role": "tool", "tool_call_id": "1", "content": result}]
    return {"messages": [user("Weather?"), *said, answer("Sunny.")]}


def told(call, **columns):
    """The same as ShareGPT has it."""
    said = [human("Weather?"), gpt(call, "function_call"), gpt("sunny", "observation"), gpt("Sunny.")]
    return {"conversations": said, **columns}


UNKNOWN, NO_TEXT, NO_PARTS = "unknown speaker: ", "content that is no text", "parts that are no text"
NO_CONTENT, EMPTY = "message without content", "empty assistant message"
LOST, NO_CALL = "the chat template leaves out a message of the role ", "the chat template leaves out a tool call"
HI = [user("Hi"), answer("Yo")]
IMAGE = {"type": "image", "image": "a.png"}
W = '{"name": "w", "arguments": {"city": "P"}}'

# Rows that hold nothing a template could not show: (what every template is to learn) or why none learns it.
ROWS = {
    # contents
    "text": ({"messages": HI}, ["Yo"]),
    "parts": ({"messages": [user(text("Hi")), answer(text("Yo"))]}, ["Yo"]),
    "several parts": ({"messages": [user(text("Hi", " you")), answer(text("Yo ", "you"))]}, ["Yo you"]),
    "parts of strings": ({"messages": [user(["Hi"]), answer(["Yo"])]}, ["Yo"]),
    "parts without a type": ({"messages": [user([{"text": "Hi"}]), answer([{"text": "Yo"}])]}, ["Yo"]),
    "parts of the responses API": (
        {"messages": [user([{"type": "input_text", "text": "Hi"}]), answer([{"type": "output_text", "text": "Yo"}])]},
        ["Yo"],
    ),
    "parts that Arrow filled up": (
        {
            "messages": [
                user([{"type": "text", "text": "Hi", "image": None}]),
                answer([{**text("Yo")[0], "index": None}]),
            ]
        },
        ["Yo"],
    ),
    "parts in the answer alone": ({"messages": [user("Hi"), answer(text("Yo"))]}, ["Yo"]),
    "parts in ShareGPT": ({"conversations": [human(text("Hi")), gpt(text("Yo"))]}, ["Yo"]),
    "an image": ({"messages": [user([IMAGE, *text("Hi")]), answer("Yo")]}, NO_PARTS),
    "an image that Arrow filled up": ({"messages": [user([IMAGE | {"text": None}]), answer("Yo")]}, NO_PARTS),
    "an image in the answer": ({"messages": [user("Hi"), answer([IMAGE])]}, NO_PARTS),
    "a thinking part": ({"messages": [user("Hi"), answer([{"type": "thinking", "thinking": "a"}])]}, NO_PARTS),
    "a part that is None": ({"messages": [user([None, *text("Hi")]), answer("Yo")]}, NO_PARTS),
    "a number as part": ({"messages": [user("Hi"), answer([4])]}, NO_PARTS),
    "no parts": ({"messages": [user("Hi"), answer([])]}, EMPTY),
    "empty parts": ({"messages": [user("Hi"), answer(text("", " "))]}, EMPTY),
    "an integer": ({"messages": [user("6 times 7?"), answer(42)]}, ["42"]),
    "integers": ({"messages": [user(6), answer(-7)]}, ["-7"]),
    "zero": ({"messages": [user("Hi"), answer(0)]}, ["0"]),
    "a fraction": ({"messages": [user("Hi"), answer(4.5)]}, NO_TEXT),
    "a truth value": ({"messages": [user("Hi"), answer(True)]}, NO_TEXT),
    "an object": ({"messages": [user("Hi"), answer({"text": "Yo"})]}, NO_TEXT),
    "an object in the question": ({"messages": [user({"a": 1}), answer("Yo")]}, NO_TEXT),
    "null": ({"messages": [user("Hi"), answer(None)]}, NO_CONTENT),
    "null in the question": ({"messages": [user(None), answer("Yo")]}, NO_CONTENT),
    "no content": ({"messages": [user("Hi"), {"role": "assistant"}]}, NO_CONTENT),
    "an empty answer": ({"messages": [user("Hi"), answer("")]}, EMPTY),
    "white space as answer": ({"messages": [user("Hi"), answer(" \n")]}, EMPTY),
    "an empty answer among others": ({"messages": [*HI, user("Hi"), answer("")]}, EMPTY),
    "an empty question": ({"messages": [user(""), answer("Yo")]}, ["Yo"]),
    "text that looks like Python": ({"messages": [user("Hi"), answer("[{'type': 1}]")]}, ["[{'type': 1}]"]),
    "half a surrogate pair": (
        {"messages": [user("Hi"), answer("\ud800")]},
        "half of a surrogate pair, which is no text",
    ),
    # names
    "role and value": (
        {"conversations": [{"role": "user", "value": "Hi"}, {"role": "assistant", "value": "Yo"}]},
        ["Yo"],
    ),
    "from and content": ({"messages": [{"from": "human", "content": "Hi"}, {"from": "gpt", "content": "Yo"}]}, ["Yo"]),
    "value that Arrow filled up": (
        {"messages": [{"role": "user", "value": "Hi", "content": None, "from": None}, answer("Yo", value=None)]},
        ["Yo"],
    ),
    "two kinds of turns": ({"conversations": [human("Hi"), answer("Yo"), user("a"), gpt("b")]}, ["Yo", "b"]),
    # speakers
    "bing": ({"conversations": [human("Hi"), gpt("Yo", "bing"), human("a"), gpt("b")]}, ["Yo", "b"]),
    "chatgpt": ({"conversations": [human("Hi"), gpt("Yo", "chatgpt")]}, ["Yo"]),
    "bot": ({"messages": [user("Hi"), {"role": "bot", "content": "Yo"}]}, ["Yo"]),
    "model": ({"messages": [user("Hi"), {"role": "model", "content": "Yo"}]}, ["Yo"]),
    "gpt as a role": ({"messages": [{"role": "human", "content": "Hi"}, {"role": "gpt", "content": "Yo"}]}, ["Yo"]),
    "capitals": ({"messages": [{"role": "User", "content": "Hi"}, {"role": "ASSISTANT ", "content": "Yo"}]}, ["Yo"]),
    "an unknown speaker": ({"conversations": [human("Hi"), gpt("Yo", "narrator"), gpt("b")]}, UNKNOWN + "narrator"),
    "an unknown role": ({"messages": [*HI, {"role": "critic", "content": "Bad."}]}, UNKNOWN + "critic"),
    "a speaker of many letters": ({"messages": [{"role": "a" * 99, "content": "Hi"}]}, UNKNOWN + "a" * 30),
    "a number as speaker": ({"messages": [{"role": 1, "content": "Hi"}, answer("Yo")]}, "malformed message"),
    "no speaker": ({"messages": [{"content": "Hi"}, answer("Yo")]}, "malformed message"),
    # strings
    "an empty completion": ({"prompt": "Hi", "completion": " "}, "empty completion"),
    "a number as completion": ({"prompt": "Hi", "completion": 4}, "malformed row"),
    "an empty list as completion": ({"prompt": [user("Hi")], "completion": []}, "malformed row"),
    "messages as completion": ({"prompt": [user(text("Hi"))], "completion": [answer(text("Yo"))]}, ["Yo"]),
    "malformed options": ({"messages": HI, "chat_template_kwargs": "{"}, "malformed chat_template_kwargs"),
    # tools
    "tools that are none": ({"messages": HI, "tools": "null"}, ["Yo"]),
    "tools that are empty": ({"messages": HI, "tools": "[]"}, ["Yo"]),
    "tools that are blank": ({"messages": HI, "tools": " "}, ["Yo"]),
    "tools that are no JSON": ({"messages": HI, "tools": "[{'name': 'w'}]"}, "malformed tools"),
    "tools that are a number": ({"messages": HI, "tools": "7"}, "malformed tools"),
    "tools that are names": ({"messages": HI, "tools": ["w"]}, "malformed tools"),
    "tools of 20,000 brackets": ({"messages": HI, "tools": "[" * 20_000 + "]" * 20_000}, "malformed tools"),
    "a call in words": (told("w(city='P')"), "malformed tool call"),
    "a call that is empty": (told(""), "malformed tool call"),
    "a call without a name": (told('{"arguments": {}}'), "malformed tool call"),
    "a call that is a number": (told("7"), "malformed tool call"),
    "a call of 20,000 brackets": (told("[" * 20_000), "malformed tool call"),
    "arguments in Python": (called(call("{'city': 'P'}")), "malformed tool arguments"),
    "arguments that are a list": (called(call('["P"]')), "malformed tool arguments"),
    "calls that Arrow filled up": (
        {
            "messages": [
                user("Hi", tool_calls=[]),
                answer("Yo", tool_calls=[call(None, None) | {"id": None, "type": None}]),
            ]
        },
        ["Yo"],
    ),
    "calls that are an empty list": ({"messages": [user("Hi", tool_calls=[]), answer("Yo", tool_calls=[])]}, ["Yo"]),
}

QWEN_CALL = '\n<tool_call>\n{"name": "w", "arguments": {"city": "P"}}\n</tool_call><|im_end|>\n'
LLAMA_CALL = '{"name": "w", "parameters": {"city": "P"}}<|im_end|>'
GLM_CALL = "\n<think></think>\n<tool_call>w\n<key>city</key>\n<value>P</value>\n</tool_call><|observation|>"
MISTRAL_CALL = '[CALLS] [{"name": "w", "arguments": {"city": "P"}}]<|im_end|>'
SUNNY = {"qwen": "Sunny.<|im_end|>\n", "llama": "Sunny.<|im_end|>", "mistral": " Sunny.<|im_end|>"}
SUNNY |= {"glm": "\n<think></think>\nSunny.<|im_end|>", "string arguments": "Sunny.<|im_end|>\n"}
BE_BRIEF = [{"role": "developer", "content": "Be brief."}, *HI]
NO_REASONING = "the chat template leaves out the reasoning of the last answer"
PYTHON = "the chat template writes a message as Python does"
YO, GLM_YO = ["Yo<|im_end|>\n"], "\n<think></think>\nYo<|im_end|>"
BLANK = user("", value="Q?")
MARKUP = ("<b>Yo</b>", "<answer>4</answer>", "a[TODO]", "4 [/INST]", "```html\n<p>x</p>\n```", "<br>", "a </b> </b>")
MARKUP += ('<tool_call>\n{"name": "w"}\n</tool_call>', "| a |\n|---|\n<details>x</details>", "<b>a</b> b")
THOUGHT = answer("<think>r</think>\n\nYo")

# What depends on the template: (template, row, what is learnt exactly or why nothing is, what else the text holds).
PAIRS = {
    # system prompts
    "developer, chatml": ("chatml", {"messages": BE_BRIEF}, ["Yo<|im_end|>\n"], ["<|im_start|>system\nBe brief."]),
    "developer, qwen": ("qwen", {"messages": BE_BRIEF}, ["Yo<|im_end|>\n"], ["<|im_start|>system\nBe brief."]),
    "developer, llama": ("llama", {"messages": BE_BRIEF}, ["Yo<|im_end|>"], ["<|start|>system<|end|>\n\nBe brief."]),
    "developer, mistral": ("mistral", {"messages": BE_BRIEF}, [" Yo<|im_end|>"], ["[INST] Be brief.\n\nHi[/INST]"]),
    "developer, gemma": (
        "gemma",
        {"messages": BE_BRIEF},
        "the chat template refuses it: System role not supported",
        [],
    ),
    "system column": (
        "qwen",
        {"conversations": [human("Hi"), gpt("Yo")], "system": "Be brief."},
        ["Yo<|im_end|>\n"],
        ["<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user"],
    ),
    "system column of messages": ("llama", {"messages": HI, "system": "Be brief."}, ["Yo<|im_end|>"], ["Be brief."]),
    "system column in parts": ("llama", {"messages": HI, "system": text("Be brief.")}, ["Yo<|im_end|>"], ["Be brief."]),
    "empty system column": ("gemma", {"messages": HI, "system": ""}, ["Yo<|im_end|>\n"], []),
    "system column, gemma": (
        "gemma",
        {"messages": HI, "system": "a"},
        "the chat template refuses it: System role not supported",
        [],
    ),
    "system twice, alike": (
        "qwen",
        {"messages": [{"role": "system", "content": "a"}, *HI], "system": "a"},
        ["Yo<|im_end|>\n"],
        [],
    ),
    "system twice": (
        "qwen",
        {"messages": [{"role": "system", "content": "a"}, *HI], "system": "b"},
        "two system prompts",
        [],
    ),
    "system column and completion": (
        "qwen",
        {"prompt": [*HI, user("a")], "completion": [answer("b")], "system": "c"},
        ["b<|im_end|>\n"],
        ["system\nc<|im_end|>"],
    ),
    "a system message that the template moves": (
        "mistral",
        {"messages": [{"role": "system", "content": "a"}, *HI, *HI]},
        [" Yo<|im_end|>"] * 2,
        ["[INST] a\n\nHi"],
    ),
    "a second system message that is lost": (
        "mistral",
        {"messages": [*HI, user("a"), answer("b"), {"role": "system", "content": "c"}]},
        LOST + "system",
        [],
    ),
    # tool calls
    "call as JSON, qwen": ("qwen", called(call('{"city": "P"}')), [QWEN_CALL, SUNNY["qwen"]], ["response>\nsunny\n"]),
    "call as JSON, llama": ("llama", called(call('{"city": "P"}')), [LLAMA_CALL, SUNNY["llama"]], ['"sunny"']),
    "call as JSON, glm": ("glm", called(call('{"city": "P"}')), [GLM_CALL, SUNNY["glm"]], []),
    "call as JSON, mistral": ("mistral", called(call('{"city": "P"}')), [MISTRAL_CALL, SUNNY["mistral"]], []),
    "call as JSON, chatml": ("chatml", called(call('{"city": "P"}')), NO_CALL, []),
    "call as JSON, gemma": (
        "gemma",
        called(call('{"city": "P"}')),
        "the chat template refuses it: Roles must alternate",
        [],
    ),
    "call as JSON, string arguments": (
        "string arguments",
        called(call('{"city": "P"}')),
        ['<call>w\n{"city": "P"}<|im_end|>\n', SUNNY["string arguments"]],
        [],
    ),
    "call as JSON, turn per content": (
        "turn per content",
        called(call('{"city": "P"}')),
        ['<call>w\n{"city": "P"}<|im_end|>\n', "Sunny.<|im_end|><|im_end|>\n"],
        [],
    ),
    "null and call, turn per content": (
        "turn per content",
        called(call('{"city": "P"}'), content=None),
        ['<call>w\n{"city": "P"}<|im_end|>\n', "Sunny.<|im_end|><|im_end|>\n"],
        [],
    ),
    "a tool by its name, wrapped for the template": (
        "wrapped tools",
        {"messages": HI, "tools": [{"name": "w"}]},
        ["Yo<|im_end|>\n"],
        ["tool w\n"],
    ),
    "a tool by its name, wrapped for a template that says nothing": (
        "quiet tools",
        {"messages": HI, "tools": [{"name": "weather"}]},
        ["Yo<|im_end|>\n"],
        ["weather\n"],
    ),
    "a tool that is left out": (
        "nameless tools",
        {"messages": HI, "tools": [{"name": "weather"}]},
        "the chat template leaves out a tool",
        [],
    ),
    "a tool of a template without tools": (
        "gemma",
        {"messages": HI, "tools": [{"name": "weather"}]},
        ["Yo<|im_end|>\n"],
        [],
    ),
    "call as JSON, python arguments": (
        "python arguments",
        called(call('{"city": "P"}')),
        ['<call>w\n{"city": "P"}<|im_end|>\n', SUNNY["string arguments"]],
        [],
    ),
    "call as an object, qwen": ("qwen", called(call({"city": "P"})), [QWEN_CALL, SUNNY["qwen"]], []),
    "call as an object, chatml": ("chatml", called(call({"city": "P"})), NO_CALL, []),
    "call encoded twice": ("qwen", called(call(json.dumps('{"city": "P"}'))), [QWEN_CALL, SUNNY["qwen"]], []),
    "call that Arrow filled up": ("qwen", called(call({"city": "P", "unit": None})), [QWEN_CALL, SUNNY["qwen"]], []),
    "call without arguments": (
        "qwen",
        called(call("")),
        [QWEN_CALL.replace('{"city": "P"}', "{}"), SUNNY["qwen"]],
        [],
    ),
    "call with a null": (
        "qwen",
        called(call('{"city": null}')),
        [QWEN_CALL.replace('"P"', "null"), SUNNY["qwen"]],
        [],
    ),
    "call with a truth value": (
        "glm",
        called(call('{"city": true}')),
        [GLM_CALL.replace(">P<", ">true<"), SUNNY["glm"]],
        [],
    ),
    "call with an accent": (
        "qwen",
        called(call('{"city": "\u00e9"}')),
        [QWEN_CALL.replace("P", "\u00e9"), SUNNY["qwen"]],
        [],
    ),
    "call with a quotation mark": (
        "qwen",
        called(call('{"city": "a\\"b"}')),
        [QWEN_CALL.replace("P", 'a\\"b'), SUNNY["qwen"]],
        [],
    ),
    "two calls, qwen": (
        "qwen",
        called(call({"city": "P"}), call({"city": "Q"})),
        [QWEN_CALL[:-11] + QWEN_CALL.replace("P", "Q"), SUNNY["qwen"]],
        [],
    ),
    "two calls, llama": (
        "llama",
        called(call({}), call({})),
        "the chat template refuses it: one tool call at a time",
        [],
    ),
    "content and call, qwen": (
        "qwen",
        called(call({"city": "P"}), content="Wait."),
        ["Wait." + QWEN_CALL, SUNNY["qwen"]],
        [],
    ),
    "content and call, llama": ("llama", called(call({"city": "P"}), content="Wait."), LOST + "assistant", []),
    "null and call": ("qwen", called(call({"city": "P"}), content=None), [QWEN_CALL, SUNNY["qwen"]], []),
    "an integer as result": ("qwen", called(call({"city": "P"}), result=7), [QWEN_CALL, SUNNY["qwen"]], ["\n7\n"]),
    "an object as result": ("qwen", called(call({"city": "P"}), result={"a": 1}), NO_TEXT, []),
    "calls as a string": (
        "qwen",
        called() | {"messages": [user("a"), answer("", tool_calls=f"[{W}]")]},
        [QWEN_CALL],
        [],
    ),
    "calls without function, llama": (
        "llama",
        {"messages": [user("a"), answer("", tool_calls=[json.loads(W)])]},
        [LLAMA_CALL],
        [],
    ),
    "OpenAI's old function_call": (
        "qwen",
        {"messages": [user("a"), answer(None, function_call={"name": "w", "arguments": '{"city": "P"}'})]},
        [QWEN_CALL],
        [],
    ),
    "OpenAI's old result": (
        "qwen",
        {"messages": [user("a"), {"role": "function", "name": "w", "content": "sunny"}, answer("Sunny.")]},
        [SUNNY["qwen"]],
        ["response>\nsunny\n"],
    ),
    "ShareGPT's call, qwen": (
        "qwen",
        told(W, system="Be kind.", tools='[{"name": "w"}]'),
        [QWEN_CALL, SUNNY["qwen"]],
        ['Be kind.\n{"name": "w"}<|im_end|>', "response>\nsunny\n"],
    ),
    "ShareGPT's call, llama": ("llama", told(W), [LLAMA_CALL, SUNNY["llama"]], ['"sunny"']),
    "ShareGPT's call, glm": ("glm", told(W), [GLM_CALL, SUNNY["glm"]], []),
    "ShareGPT's call, mistral": ("mistral", told(W), [MISTRAL_CALL, SUNNY["mistral"]], []),
    "ShareGPT's call, chatml": ("chatml", told(W), NO_CALL, []),
    "ShareGPT's call, string arguments": (
        "string arguments",
        told(W),
        ['<call>w\n{"city": "P"}<|im_end|>\n', SUNNY["string arguments"]],
        [],
    ),
    "ShareGPT's call as an object": ("qwen", told(json.loads(W)), [QWEN_CALL, SUNNY["qwen"]], []),
    "ShareGPT's call in a list": ("qwen", told(f"[{W}]"), [QWEN_CALL, SUNNY["qwen"]], []),
    "ShareGPT's call, arguments as JSON": (
        "qwen",
        told(json.dumps({"name": "w", "arguments": '{"city": "P"}'})),
        [QWEN_CALL, SUNNY["qwen"]],
        [],
    ),
    "ShareGPT's call with parameters": (
        "qwen",
        told(W.replace("arguments", "parameters")),
        [QWEN_CALL, SUNNY["qwen"]],
        [],
    ),
    "one tool": ("qwen", {"messages": HI, "tools": {"name": "w"}}, ["Yo<|im_end|>\n"], ['{"name": "w"}']),
    "one tool as JSON": ("qwen", {"messages": HI, "tools": '{"name": "w"}'}, ["Yo<|im_end|>\n"], ['{"name": "w"}']),
    "tools as JSON each": ("qwen", {"messages": HI, "tools": ['{"name": "w"}']}, ["Yo<|im_end|>\n"], ['{"name": "w"}']),
    "tools that Arrow filled up": (
        "qwen",
        {"messages": HI, "tools": [{"name": "w", "strict": None}]},
        ["Yo<|im_end|>\n"],
        ['{"name": "w"}'],
    ),
    # roles that templates know, or leave out
    "a role that the template names": (
        "chatml",
        {"messages": [user("Hi"), {"role": "context", "content": "c"}, answer("Yo")]},
        UNKNOWN + "context",
        [],
    ),
    # reasoning
    "reasoning that the template leaves out": ("glm", {"messages": [user("Hi"), THOUGHT]}, NO_REASONING, []),
    "reasoning that the template leaves out of an earlier answer": (
        "glm",
        {"messages": [user("Hi"), THOUGHT, *HI]},
        ["\n<think></think>\nYo<|user|>", "\n<think></think>\nYo<|im_end|>"],
        [],
    ),
    "reasoning in its key that is left out of an earlier answer": (
        "chatml",
        {"messages": [user("Hi"), answer("Yo", reasoning_content="r r"), *HI]},
        ["Yo<|im_end|>\n"] * 2,
        [],
    ),
    "reasoning that was only read": (
        "glm",
        {"prompt": [user("Hi"), THOUGHT, user("Hi")], "completion": [answer("Yo")]},
        ["\n<think></think>\nYo<|im_end|>"],
        [],
    ),
    "reasoning of a completion": ("glm", {"prompt": [user("Hi")], "completion": [THOUGHT]}, NO_REASONING, []),
    "reasoning in its key": ("chatml", {"messages": [*HI, user("a"), answer("b", reasoning="r r")]}, NO_REASONING, []),
    "reasoning, tags": ("tags without end", {"messages": [user("a"), answer("b", thinking="r")]}, NO_REASONING, []),
    "reasoning, parts": ("needs parts", {"messages": [user("a"), answer("b", thinking="r r")]}, NO_REASONING, []),
    "blank reasoning in its key": ("chatml", {"messages": [user("Hi"), answer("Yo", reasoning=" \n")]}, YO, []),
    "reasoning that is shown": (
        "chatml",
        {"messages": [user("Hi"), THOUGHT]},
        [THOUGHT["content"] + "<|im_end|>\n"],
        [],
    ),
    "what is no reasoning and left out as if": (
        "glm",
        {"messages": [user("a"), answer("Say </think>. Yo")]},
        NO_REASONING,
        [],
    ),
    "reasoning before a call": (
        "qwen",
        {"messages": [user("a"), answer("", reasoning_content="r r", tool_calls=[call({"city": "P"})])]},
        NO_REASONING,
        [],
    ),
    # which answers are learnt
    **{
        f"{name} {value}, {template}": (
            template,
            {"messages": [user("a"), answer("bad", **{name: value}), *HI]},
            want,
            ["bad"],
        )
        for name, value in (
            ("weight", 0),
            ("weight", 0.0),
            ("train", False),
            ("training", False),
            ("train_on_turn", False),
        )
        for template, want in (("chatml", YO), ("glm", [GLM_YO]), ("tags without end", ["Yo<|im_end|>"]))
    },
    "weight 0, mistral": (
        "mistral",
        {"messages": [user("a"), answer("bad", weight=0), *HI]},
        [" Yo<|im_end|>"],
        ["bad"],
    ),
    "weight 0 of the last": ("chatml", {"messages": [*HI, user("a"), answer("bad", weight=0)]}, YO, ["bad"]),
    "weight 0 of a last with reasoning": (
        "glm",
        {"messages": [*HI, user("a"), THOUGHT | {"weight": 0}]},
        [GLM_YO.replace("<|im_end|>", "<|user|>")],
        [],
    ),
    "weight 0 and a system column": (
        "chatml",
        {"messages": [user("a"), answer("bad", weight=0), *HI], "system": "Be brief."},
        YO,
        ["Be brief.", "bad"],
    ),
    "weight 0 in a completion": (
        "tags without end",
        {"prompt": HI, "completion": [user("a"), answer("bad", weight=0), *HI]},
        ["Yo<|im_end|>"],
        ["bad"],
    ),
    "weight 0, empty": ("chatml", {"messages": [user("a"), answer("", weight=0), *HI]}, YO, []),
    "weight 0 of ShareGPT": (
        "chatml",
        {"conversations": [human("a"), gpt("bad") | {"weight": 0}, human("Hi"), gpt("Yo") | {"weight": 1}]},
        YO,
        ["bad"],
    ),
    "weight 1": ("chatml", {"messages": [user("Hi", weight=0), answer("Yo", weight=1, train=True)]}, YO, []),
    "weight null": ("chatml", {"messages": [user("Hi", weight=None), answer("Yo", weight=None)]}, YO, []),
    "weight 0 everywhere": ("chatml", {"messages": [user("Hi"), answer("Yo", weight=0)]}, "no assistant tokens", []),
    "weight 0.5": (
        "chatml",
        {"messages": [user("Hi"), answer("Yo", weight=0.5)]},
        "weight that is neither 0 nor 1",
        [],
    ),
    "train no": ("chatml", {"messages": [user("Hi"), answer("Yo", train="no")]}, "train that is neither 0 nor 1", []),
    "train_detail": (
        "chatml",
        {"messages": [user("Hi"), answer("Yo", train_detail=[{"begin_offset": 0, "end_offset": 1, "train": False}])]},
        "train_detail, which is not understood",
        [],
    ),
    "weight 0, tags of the last turn alone": (
        "tags only the last",
        {"messages": [user("a"), answer("bad", weight=0), *HI]},
        "the chat template does not mark each answer by itself, and one is not supervised",
        [],
    ),
    # what Python writes
    "messages as Python writes them": ("python messages", {"messages": HI}, PYTHON, []),
    "messages as Python writes them, with a quotation mark": (
        "python messages",
        {"messages": [user("a"), answer("It's")]},
        PYTHON,
        [],
    ),
    "items as Python writes them": ("python items", {"messages": HI}, PYTHON, []),
    "only questions as Python writes them": ("python questions", {"messages": HI}, PYTHON, []),
    "calls as Python writes them": (
        "python calls",
        called(call('{"city": "P"}')),
        PYTHON.replace("message", "tool call"),
        [],
    ),
    "answers in quotation marks": (
        "in quotation marks",
        {"messages": HI},
        ["'Yo'<|im_end|>\n"],
        ["user\n'Hi'<|im_end|>"],
    ),
    "a call that shows what Python writes": (
        "qwen",
        called(call({"city": "{'name': 'w'}"})),
        [QWEN_CALL.replace("P", "{'name': 'w'}"), SUNNY["qwen"]],
        [],
    ),
    "an answer that shows what Python writes": (
        "chatml",
        {"messages": [user("Hi"), answer("{'role': 'user', 'content': 'Hi'}")]},
        ["{'role': 'user', 'content': 'Hi'}<|im_end|>\n"],
        [],
    ),
    # content and value
    "a blank content and a value": ("chatml", {"messages": [BLANK, answer("Yo")]}, YO, ["user\nQ?<|im_end|>"]),
    "a blank content and an answer as value": ("chatml", {"messages": [user("Hi"), answer(" ", value="Yo")]}, YO, []),
    "no parts and a value": (
        "chatml",
        {"messages": [BLANK | {"content": []}, answer("Yo")]},
        YO,
        ["user\nQ?<|im_end|>"],
    ),
    "a content and a blank value": ("chatml", {"messages": [user("Hi", value=""), answer("Yo", value=" ")]}, YO, []),
    "a content and the same value": ("chatml", {"messages": [user("Hi", value="Hi"), answer("Yo")]}, YO, []),
    "a content and a score": ("chatml", {"messages": [user("Hi"), answer("Yo", value=0.5)]}, YO, []),
    "a content and another value": (
        "chatml",
        {"messages": [user("Hi", value="Q?"), answer("Yo")]},
        "a content and a value that differ",
        [],
    ),
    "a blank content and a value that is no text": (
        "chatml",
        {"messages": [user("", value={"a": 1}), answer("Yo")]},
        NO_TEXT,
        [],
    ),
    "nothing but reasoning, left out": (
        "glm",
        {"messages": [user("Hi"), answer("<think>r</think>")]},
        LOST + "assistant",
        [],
    ),
    "nothing but reasoning in its key": (
        "qwen",
        {"messages": [user("Hi"), answer("", reasoning_content="r r r")]},
        LOST + "assistant",
        [],
    ),
    # parts
    "text where parts are needed": ("needs parts", {"messages": HI}, ["Yo<|im_end|>\n"], ["user\nHi<|im_end|>"]),
    # ends of turns
    "no end of a turn": (
        "glm",
        {"messages": [*HI, user("a"), answer("b")]},
        ["\n<think></think>\nYo<|user|>", "\n<think></think>\nb<|im_end|>"],
        [],
    ),
    "no end of a turn, only the last to be learnt": (
        "glm",
        {"prompt": [*HI, user("a")], "completion": [answer("b")]},
        ["\n<think></think>\nb<|im_end|>"],
        [],
    ),
    **{
        f"{said}, {template}": (template, {"messages": [user("a"), answer(said), *HI]}, [*ends], [])
        for said in MARKUP
        for template, ends in {
            "glm": ("\n<think></think>\n" + said + "<|user|>", GLM_YO),
            "tags without end": (said + "<|im_end|>", "Yo<|im_end|>"),
            "open": (" " + said + "\n<|user|>", " Yo\n<|im_end|>"),
            "chatml": (said + "<|im_end|>\n", *YO),
        }.items()
    },
    "markup after reasoning": (
        "glm",
        {"messages": [user("a"), answer("<think>r</think>\n\n<answer>4</answer>"), *HI]},
        ["\n<think></think>\n<answer>4</answer><|user|>", GLM_YO],
        [],
    ),
    "an answer that brings its end": (
        "open",
        {"messages": [user("a"), answer("b<|im_end|>"), user("a"), answer("b<|im_end|>")]},
        [" b<|im_end|>\n"] * 2,
        [],
    ),
    "an end that the tags leave out": (
        "tags without end",
        {"messages": [*HI, user("a"), answer("b")]},
        ["Yo<|im_end|>", "b<|im_end|>"],
        [],
    ),
    "tags of the last turn alone": (
        "tags only the last",
        {"messages": [*HI, user("a"), answer("b")]},
        LOST + "assistant",
        [],
    ),
}


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """What `datasets` keeps of the files it reads goes away with them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        yield


@pytest.fixture(scope="module")
def tokenizer(tiny_base):
    found = AutoTokenizer.from_pretrained(tiny_base)
    found.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|observation|>"]})
    return found


def learn(row, tokenizer, template):
    """(What is learnt, each stretch by itself, and the text), or why the row was dropped."""
    tokenizer.chat_template, dropped = TEMPLATES[template], Counter()
    found = tokenize_row(row, tokenizer, 10_000, dropped=dropped)
    if found is None:
        assert sum(dropped.values()) == 1
        return next(iter(dropped))
    stretches, inside = [], False
    for token, supervised in zip(found["input_ids"], found["supervised"], strict=True):
        if supervised and not inside:
            stretches.append([])
        if supervised:
            stretches[-1].append(token)
        inside = supervised
    return [tokenizer.decode(stretch) for stretch in stretches], tokenizer.decode(found["input_ids"])


def wanted(answers, template):
    """What a template makes of the answers."""
    if isinstance(answers, str):
        return answers
    found = [BEGINS.get(template, "") + each + ENDS[template] for each in answers]
    return [each.replace("<|im_end|>", "<|user|>") for each in found[:-1]] + found[-1:] if template == "glm" else found


def check(found, want, seen=()):
    if isinstance(want, str):
        assert found == want
    else:
        assert found[0] == want and all(each in found[1] for each in seen)


@pytest.mark.parametrize("template", CHATTY)
@pytest.mark.parametrize("name", ROWS)
def test_a_row_is_learnt_or_dropped_alike_with_every_template(name, template, tokenizer):
    row, answers = ROWS[name]
    check(learn(row, tokenizer, template), wanted(answers, template))


@pytest.mark.parametrize("name", PAIRS)
def test_what_depends_on_the_template(name, tokenizer):
    template, row, want, seen = PAIRS[name]
    check(learn(row, tokenizer, template), want, seen)


def test_rows_that_arrow_made_alike_are_learnt_alike(tokenizer):
    """Rows get each other's keys, filled up with None."""
    rows = [(name, *ROWS[name]) for name in ROWS if isinstance(ROWS[name][1], list)]
    rows = [each for each in rows if list(each[1]) == ["messages"]]
    strings = [each for each in rows if all(isinstance(m.get("content", ""), str) for m in each[1]["messages"])]
    parts = [each for each in rows if all(isinstance(m.get("content"), list) for m in each[1]["messages"])]
    parts = [each for each in parts if all(isinstance(p, dict) for m in each[1]["messages"] for p in m["content"])]
    assert len(strings) >= 6 and len(parts) >= 5
    calls = [("", row, want) for _, row, want, _ in PAIRS.values() if row == called(call({"city": "P"}))]
    for group, template in ((strings, "chatml"), (parts, "qwen"), (strings + calls[:1], "qwen")):
        data = datasets.Dataset.from_list([row for _, row, _ in group])
        assert any(
            message != given
            for (_, row, _), each in zip(group, data, strict=True)
            for message, given in zip(each["messages"], row["messages"], strict=True)
        )
        for (name, _, answers), given in zip(group, data, strict=True):
            want = wanted(answers, template) if name else answers
            check(learn(given, tokenizer, template), want)


def test_a_file_of_all_rows_is_read_alike(tokenizer, tmp_path):
    """Texts, parts and numbers in one column, as `datasets` reads them."""
    names = [name for name in ROWS if "messages" in ROWS[name][0] and "\\ud800" not in json.dumps(ROWS[name][0])]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(ROWS[name][0]) + "\n" for name in names))
    rows = load_rows(str(tmp_path / "a.jsonl"))
    for name, row in zip(names, rows, strict=True):
        found, want = learn(row, tokenizer, "qwen"), wanted(ROWS[name][1], "qwen")
        # Of an object that came from a file nobody knows whether its keys were given.
        check(found, want) if not (isinstance(want, str) and want.startswith("malformed")) else None


@pytest.mark.parametrize("template", ["qwen", "llama", "gemma", "chatml"])
def test_many_speakers_are_counted_together(template, tokenizer):
    tokenizer.chat_template, dropped = TEMPLATES[template], Counter()
    for number in range(100):
        tokenize_row({"messages": [*HI, {"role": f"person {number}", "content": "a"}]}, tokenizer, 100, dropped=dropped)
    assert sum(dropped.values()) == 100 and len(dropped) == 31 and dropped["unknown speaker"] == 70


def test_a_role_that_the_template_names_is_kept(tokenizer):
    TEMPLATES["context"] = CHATML.replace(
        "{{ message['role'] }}", "{{ 'doc' if message.role == 'context' else message.role }}"
    )
    row = {"messages": [user("Hi"), {"role": "context", "content": "c"}, answer("Yo")]}
    check(learn(row, tokenizer, "context"), ["Yo<|im_end|>\n"], ["<|im_start|>doc\nc<|im_end|>"])
    TEMPLATES["developer"] = CHATML.replace(
        "{{ message['role'] }}", "{{ 'dev' if message.role == 'developer' else message.role }}"
    )
    check(learn({"messages": BE_BRIEF}, tokenizer, "developer"), ["Yo<|im_end|>\n"], ["<|im_start|>dev\nBe brief."])


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (CHATML.replace("{{ message['content'] }}", "{{ message['content'] if message.role != 'tool' }}"), "tool"),
        (CHATML.replace("{{ message['content'] }}", "{{ message['content'] if message.role != 'system' }}"), "system"),
        (CHATML.replace("{{ message['content'] }}", "{{ message['content'] if message.role != 'user' }}"), "user"),
        (CHATML.replace("{{ message['content'] }}", "{{ message['content'] if loop.index < 4 }}"), "assistant"),
        (CHATML.replace("{{ message['content'] }}", "{{ message['content'][:1] }}"), "system"),
        (CHATML.replace("{{ message['content'] }}", "{{ message['content'] | length }}"), "system"),
    ],
)
def test_whatever_a_template_leaves_out_drops_the_row(template, message, tokenizer):
    """The check is of the rendered text, so that no list of templates is needed; also where an answer is one letter."""
    TEMPLATES["lossy"] = template
    messages = [{"role": "system", "content": "i"}, user("i"), {"role": "tool", "content": "i"}, answer("i")]
    check(learn({"messages": messages}, tokenizer, "chatml"), ["i<|im_end|>\n"])
    assert learn({"messages": messages}, tokenizer, "lossy") == LOST + message


def test_what_is_learnt_is_what_was_said(tokenizer):
    TEMPLATES["lossy"] = CHATML.replace("{{ message['content'] }}", "{{ message['content'] | replace('Yo', 'No') }}")
    assert learn({"messages": HI}, tokenizer, "lossy") == LOST + "assistant"
    check(learn({"messages": [user("Yo"), answer("Hi")]}, tokenizer, "lossy"), ["Hi<|im_end|>\n"])


def test_a_template_that_ends_no_turn_and_says_nothing_either_is_told_once(tokenizer, caplog):
    TEMPLATES["endless"] = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    TEMPLATES["named"] = {"default": TEMPLATES["endless"]}  # a tokenizer may have several
    for name in ("endless", "endless", "named"):
        found = learn({"messages": [*HI, user("a"), answer("b")]}, tokenizer, name)
        assert found[0] == ["Yo", "b<|im_end|>"]
    del TEMPLATES["named"]
    assert len(caplog.messages) == 2 and "these ends are not trained" in caplog.messages[0]
