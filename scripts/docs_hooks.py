"""MkDocs hooks: equations as MathML, notebooks from their stored outputs, and the pages of the repository's root.

Nothing is executed and nothing is loaded from another host, neither in the build nor by a reader of the site.
"""

from __future__ import annotations

import base64
import html
import json
import posixpath
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
ROOT_PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing/index.md", "SECURITY.md": "security.md"}
# Fenced blocks and inline code come first, so that their text is never read as an equation.
EQUATION = re.compile(
    r"^```math\n(?P<block>.*?)^```$|\$`(?P<inline>[^`]+)`\$"
    r"|^(?P<indent> *)(?P<fence>`{3,}|~{3,}).*?^(?P=indent)(?P=fence)`*$|(?P<tick>`+)(?!`).*?(?<!`)(?P=tick)(?!`)",
    re.M | re.S,
)
LINK = re.compile(r"(?<=\]\()([^)#\s:]+)(?=[)#])")
MARK = "equation{}of{}end"  # plain letters, which Markdown leaves alone


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are not Markdown files under docs/: one per notebook and one per page of the root."""
    for name, place in ROOT_PAGES.items():
        files.append(File.generated(config, place, content=(ROOT / name).read_text("utf-8")))
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        text, pictures = notebook_page(json.loads(notebook.content_string), posixpath.basename(notebook.src_uri))
        stem = notebook.src_uri.removesuffix(".ipynb")
        files.append(File.generated(config, f"{stem}.md", content=text))
        for name, content in pictures.items():
            files.append(File.generated(config, posixpath.join(posixpath.dirname(stem), name), content=content))
    return files


def notebook_page(notebook: dict[str, Any], name: str) -> tuple[str, dict[str, bytes]]:
    """Return a notebook as Markdown, with its stored outputs, and its pictures by file name."""
    parts, pictures = [], {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else fenced(source, "python"))
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if png := data.get("image/png"):
                picture = f"{name.removesuffix('.ipynb')}-{len(pictures) + 1}.png"
                pictures[picture] = base64.b64decode("".join(png))
                parts.append(f"![Output of the cell above]({picture})")
            elif "text/html" in data:
                lines = "".join(data["text/html"]).splitlines()
                parts.append("<div>" + "\n".join(line for line in lines if line.strip()) + "</div>")
            elif "text/markdown" in data:
                parts.append("".join(data["text/markdown"]))
            else:
                text = "".join(output.get("text", data.get("text/plain", output.get("traceback", []))))
                parts.append(fenced(re.sub(r"\x1b\[[\d;]*m", "", text), "text"))  # without colours of a terminal
    parts.append(f'<a href="../{name}" download>Download this notebook</a>')
    return "\n\n".join(part for part in parts if part) + "\n", pictures


def fenced(text: str, language: str) -> str:
    """Return a fenced block, or nothing for an empty text."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}" if text.strip() else ""


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Point links at the pages of the site, and replace equations by marks."""
    page.meta["equations"] = equations = []
    of_root = page.file.src_uri in ROOT_PAGES.values()
    place = "." if of_root else posixpath.join("docs", posixpath.dirname(page.file.src_uri))
    markdown = LINK.sub(lambda link: site_link(link[1], place, page.file.src_uri), markdown)
    return with_marks(markdown, equations)


def site_link(link: str, place: str, page: str) -> str:
    """Return the link as the site has it: notebooks and the pages of the root have other names there."""
    target = posixpath.normpath(posixpath.join(place, link))
    if target in ROOT_PAGES:
        target = posixpath.join("docs", ROOT_PAGES[target])
    elif target.endswith(".ipynb"):
        target = target.removesuffix(".ipynb") + ".md"
    if not target.startswith("docs/"):
        return link
    return posixpath.relpath(target.removeprefix("docs/"), posixpath.dirname(page) or ".")


def with_marks(markdown: str, equations: list[str]) -> str:
    """Return the text with a mark in place of each equation; append the equations as HTML."""

    def mark(match: re.Match[str]) -> str:
        if not (match["block"] or match["inline"]):
            return match[0]
        equations.append(block_html(match["block"]) if match["block"] else convert(match["inline"]))
        return MARK.format(len(equations) - 1, "block" if match["block"] else "inline")

    return EQUATION.sub(mark, markdown)


def block_html(latex: str) -> str:
    """Return an equation as MathML, with its number as an anchor: `\\tag{4}` becomes `#eq-4`."""
    tag = re.search(r"\\tag\{(\w+)\}", latex)
    mathml = convert(latex.replace(tag[0], "") if tag else latex, display="block")
    if not tag:
        return f'<div class="equation">{mathml}</div>'
    number = html.escape(tag[1])
    return f'<div class="equation" id="eq-{number}">{mathml}<a href="#eq-{number}">({number})</a></div>'


def on_page_content(content: str, page: Any, config: Any, files: Any) -> str:
    """Put the equations in place of their marks."""
    for number, equation in enumerate(page.meta["equations"]):
        content = content.replace(f"<p>{MARK.format(number, 'block')}</p>", equation)
        content = content.replace(MARK.format(number, "block"), equation)
        content = content.replace(MARK.format(number, "inline"), equation)
    return content


def on_post_build(config: Any) -> None:
    """Remove the addresses that the theme's script loads where a browser or a page needs more; no page here does."""
    for path in Path(config.site_dir).glob("assets/javascripts/bundle*.js"):
        path.write_text(re.sub(r"https://unpkg\.com/[^\"]*", "data:text/javascript,", path.read_text("utf-8")), "utf-8")
