"""Chat templates that refuse a system message or cannot be rendered, and the commands of a chat."""

from __future__ import annotations

import io

import pytest

from helpers.commands import one_line, questions, said
from helpers.models import CHAT_TEMPLATE
from tah.policy import Rule
from tah.session import Session

pytestmark = pytest.mark.usefixtures("plain")


# -- chat templates --------------------------------------------------------------------------------------------------

BODY = (
    "{% for m in messages %}{% if m['role'] != 'system' %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SYSTEM = "{% if messages[0]['role'] == 'system' %}"
REFUSING = {
    "gemma": SYSTEM + "{{ raise_exception('System role not supported') }}{% endif %}" + BODY,
    "alternating": "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% endfor %}" + BODY,
    "only known roles": "{% for m in messages %}{% if m['role'] not in ['user', 'assistant'] %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}" + BODY,
    "undefined": SYSTEM + "{{ messages[0].meta.kind }}{% endif %}" + BODY,
    "zero": SYSTEM + "{{ 1 / 0 }}{% endif %}" + BODY,
    "type": SYSTEM + "{{ 'a' + 1 }}{% endif %}" + BODY,
    "lookup": SYSTEM + "{{ {}['x']['y'] }}{% endif %}" + BODY,
    "lines": SYSTEM + "{{ raise_exception('No.\n\nNot at all.') }}{% endif %}" + BODY,
    "long": SYSTEM + "{{ raise_exception('no ' * 3000) }}{% endif %}" + BODY,
    "empty": SYSTEM + "{{ raise_exception('') }}{% endif %}" + BODY,
    "escapes": SYSTEM + "{{ raise_exception('\x1b[2Jno') }}{% endif %}" + BODY,
    "silent": BODY,  # leaves it out without a word
}
TAKING = {
    "chatml": CHAT_TEMPLATE,
    "default of its own": SYSTEM + "S:{{ messages[0]['content'] }}{% else %}S:be brief{% endif %}" + BODY,
    "trimmed": SYSTEM + "{{ messages[0]['content'] | trim }}{% endif %}" + BODY,
    "into the question": "{% set s = '' %}" + SYSTEM + "{% set s = messages[0]['content'] %}{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}<|im_start|>{{ s }} {{ m['content'] }}<|im_end|>{% endif %}"
    "{% endfor %}",
    "upper case": SYSTEM + "{{ messages[0]['content'] | upper }}{% endif %}" + BODY,
}


@pytest.mark.parametrize("verb", ["generate", "chat"])
@pytest.mark.parametrize("name", REFUSING)
def test_a_template_that_refuses_a_system_message(capsys, monkeypatch, changed, verb, name):
    monkeypatch.setattr("builtins.input", lambda prompt: pytest.fail("the chat began"))
    words = ("hi",) if verb == "generate" else ()
    line = one_line(capsys, verb, changed(REFUSING[name]), *words, "--system", "be brief", "--policy", "never")
    assert "chat template" in line and "leave out --system" in line and "\x1b" not in line


@pytest.mark.parametrize("verb", ["generate", "chat"])
@pytest.mark.parametrize("name", TAKING)
def test_a_template_that_takes_one(capsys, monkeypatch, changed, verb, name):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    words = ("hi", "--max-new-tokens", 2) if verb == "generate" else ()
    model = changed(TAKING[name])
    code, _, err = said(capsys, verb, model, *words, "--system", " be brief ", "--policy", "never")
    assert (code, err.count("tah:")) == (0, 0)


@pytest.mark.parametrize("name", REFUSING)
def test_the_same_templates_without_a_system_message(capsys, changed, name):
    model = changed(REFUSING[name])
    for words in ((), ("--system", ""), ("--raw", "--system", "be brief")):
        code, _, err = said(capsys, "generate", model, "hi", "--max-new-tokens", 2, "--policy", "never", *words)
        assert (code, err.count("tah:")) == (0, 0)


@pytest.mark.parametrize("template", ["{% for %}", "{{ 1 | no_such }}", "{{", "{% endfor %}", "{% generation %}"])
def test_a_template_that_cannot_be_read(capsys, changed, template):
    model = changed(template)
    for words in ((), ("--system", "be brief")):
        assert "chat template" in one_line(capsys, "generate", model, "hi", "--policy", "never", *words)


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('never') }}", "{{ messages[7].content.x }}", "{{ 1 / 0 }}", "{{ 'a' + 1 }}", "{{ x.y.z }}"],
)
def test_a_template_that_writes_nothing_at_all(capsys, monkeypatch, changed, template):
    model = changed(template)
    for words in ((), ("--system", "be brief")):
        line = one_line(capsys, "generate", model, "hi", "--policy", "never", *words)
        assert "cannot write this conversation" in line and "--raw" in line
    monkeypatch.setattr("sys.stdin", io.StringIO("hi\nho\n"))
    code, out, _ = said(capsys, "chat", model, "--policy", "never")
    assert code == 0 and " ".join(out.split()).count("cannot write this conversation") == 2  # and the chat went on


@pytest.mark.parametrize("template", ["{{ raise_exception('never') }}", "{{ 1 / 0 }}", "{{ messages[7].content.x }}"])
def test_an_evaluation_with_such_a_template(capsys, tmp_path, changed, template):
    words = ("--tasks", "gsm8k", "--policy", "never", "--max-new-tokens", 2, "-o", "out")
    words = (changed(template, positions=512), *words, "--data", questions(tmp_path / "q.jsonl", "2 + 2"))
    code, out, err = said(capsys, "eval", *words)
    assert (code, out) == (2, "") and "cannot format a question" in err.splitlines()[-1] and "--raw" in err
    assert said(capsys, "eval", *words, "--raw")[0] == 0


# -- commands of a chat ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("/threshold", "/threshold needs a number from 0 to 1, such as /threshold 0.5"),
        ("/threshold ", "/threshold needs a number from 0 to 1"),
        ("/threshold high", "/threshold high: not a number"),
        ("/threshold 0,5", "/threshold 0,5: not a number"),
        ("/threshold 2", "must be a number in [0, 1]"),
        ("/threshold nan", "must be a number in [0, 1]"),
        ("/threshold -inf", "must be a number in [0, 1]"),
        ("/depth", "/depth needs an integer >= 1"),
        ("/depth two", "/depth two: not a number"),
        ("/depth 2.5", "/depth 2.5: not a number"),
        ("/depth 0", "must be an integer >= 1"),
        ("/depth " + "9" * 5000, "not a number"),
        ("/policy", "/policy needs one of decider, confidence"),
        ("/policy sure", "unknown policy 'sure'"),
        ("/", "unknown command /"),
        ("/threshold 0.25", "threshold 0.25"),
        ("/threshold 1e-3", "threshold 0.001"),
        ("/depth 3", "max_depth 3"),
        ("/policy always", "policy always"),
        ("/reset", "new conversation"),
    ],
)
def test_commands_of_a_chat(tiny_checkpoint, line, told):
    from tah_cli.chat import Chat

    session = Session.open(str(tiny_checkpoint), device="cpu")
    chat = Chat(session, session.rule(Rule()), {}, None, color=False)
    before = chat.rule
    answer = chat.command(line)
    assert told in answer and "\n" not in answer and len(answer) < 300
    assert "could not convert" not in answer and "invalid literal" not in answer
    changes = ("/threshold 0.25", "/threshold 1e-3", "/depth 3", "/policy always")
    assert (chat.rule == before) == (line not in changes)
