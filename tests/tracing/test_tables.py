"""`tah report --markdown`: what models, data and traces wrote is text there, as it is in the page."""

from __future__ import annotations

from html import unescape
from typing import Any

import pytest
from markdown_it import MarkdownIt

from tah.tracing.tables import as_markdown

HOSTILE = {
    "a pipe": "a|b|c",
    "a pipe after a backslash": "a\\|b",
    "a backslash at the end": "a\\",
    "a script": "<script>alert(1)</script>",
    "a tag": '<img src=x onerror="alert(1)">',
    "an entity": "&lt;b&gt; &#60;b&#62;",
    "a comment": "<!-- hidden -->",
    "a picture": "![x](https://evil.example/a.png)",
    "a link": "[x](javascript:alert(1))",
    "a reference": "[x]: https://evil.example",
    "a footnote": "[^1]",
    "an address": "<https://evil.example>",
    "a bare address": "https://evil.example www.evil.example ftp://evil.example",
    "code": "`code` ``more``",
    "a fence": "```\ncode\n```",
    "emphasis": "*a* **b** _c_ __d__ ~~e~~",
    "a heading": "a\n# heading",
    "a line below": "a\n===",
    "a rule": "a\n\n---\n\nb",
    "a row": "a |\n| --- |\n| b",
    "a list": "a\n- b\n1. c",
    "a quotation": "a\n> b",
    "a task": "[x] done",
    "mathematics": "$x$ $$y$$",
    "another line": "a\r\nb\u2028c\x0bd",
    "backwards": "a\u202eb",
    "a word with underscores": "my_model/of_mine",
    "nothing": "",
    "a space": " ",
}


def rendered(page: str) -> str:
    return MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(page)


def tags(html: str) -> list[str]:
    return [part.partition(">")[0] for part in html.split("<")[1:]]


def shown(text: str) -> str:
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_text_is_itself_in_a_heading_and_in_a_table(text: str) -> None:
    html = rendered(as_markdown(report(text)))
    heading = html.split("<h1>")[1].split("</h1>")[0]
    assert unescape(heading) == f"{shown(text)} on {shown(text)}".strip()
    policy = html.split("<h2>Policies</h2>")[1].split("<td>")[1].split("</td>")[0]
    assert unescape(policy) == shown(text).strip()


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_report_has_the_shape_of_a_harmless_one(text: str) -> None:
    assert tags(rendered(as_markdown(report(text)))) == tags(rendered(as_markdown(report("harmless"))))


def report(text: str) -> dict[str, Any]:
    """Statistics whose every word is `text`."""
    value = {"value": 0.5, "low": None, "high": None}
    row = dict.fromkeys(("iterated", "accuracy", "gain", "loss", "precision", "break_even_precision"), value)
    about = dict.fromkeys(("model", "data", "policy", "confidence_measure"), text)
    return {
        "about": about | {"max_depth": 2, "threshold": 0.5, "final": "run"},
        "tokens": 10,
        "texts": 2,
        "every_token": False,
        "level": 0.95,
        "missing_texts": 0,
        "exact": True,
        "weights": text,
        "depths": [{"depth": 1, "accuracy": value, "loss": value}],
        "passes": [],
        "policies": {text: row | {"second_choice": value, "threshold": None}},
        "headroom": {text: value},
        "scores": {text: {"wrong": {"auroc": value, "average_precision": value, "share": 0.5}}},
        "iterated_tokens": [{"id": 1, "text": text, "count": 3, "iterated": 0.5}],
    }
