"""The documentation site: it builds without a warning, has every page, and loads nothing from another host."""

import base64
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytest.importorskip("mkdocs")
nbformat = pytest.importorskip("nbformat")

ROOT = Path(__file__).parent.parent
PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
# Elements and rules that make a browser load something while it shows a page; a link that a reader clicks is none.
LOADS = [
    re.compile(
        r"<(?:script|img|iframe|source|video|audio|embed|object)\b[^>]*\b(?:src|srcset|data)=[\"']?((?:https?:)?//[^\"'\s>]+)"
    ),
    re.compile(r"<link\b[^>]*\bhref=[\"']?((?:https?:)?//[^\"'\s>]+)"),
    re.compile(r"@import\s+(?:url\()?[\"']?((?:https?:)?//[^\"')\s]+)"),
    re.compile(r"url\([\"']?((?:https?:)?//[^\"')]+)"),
]
LOADS_OF_SCRIPTS = [
    re.compile(r"(?:import\s*\(?|from|importScripts\(|fetch\()\s*[\"'`](https?://[^\"'`]+)"),
    re.compile(r"[\"'`](https?://[^\"'`\s]*(?:unpkg|jsdelivr|cdn|googleapis|gstatic)[^\"'`]*)"),
]


def loads(text: str, suffix: str) -> list[str]:
    """The addresses of other hosts that a file of the site loads."""
    patterns = LOADS_OF_SCRIPTS if suffix == ".js" else LOADS
    return [address for pattern in patterns for address in pattern.findall(text)]


def build(config: Path, site: Path) -> subprocess.CompletedProcess:
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(config), "-d", str(site)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=config.parent)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site, built once. A link or anchor that leads nowhere, or a page outside the navigation, is an error."""
    directory = tmp_path_factory.mktemp("site")
    done = build(ROOT / "mkdocs.yml", directory)
    assert done.returncode == 0, done.stdout + done.stderr
    return directory


@pytest.fixture
def small(tmp_path):
    """`small(page)`: a site of one page and one notebook with our settings; the finished build."""

    def make(page: str) -> subprocess.CompletedProcess:
        config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
        config |= {"hooks": [str(ROOT / "scripts" / "docs_hooks.py")], "extra_css": [], "plugins": ["search"]}
        docs = tmp_path / "docs"
        (docs / "tutorials").mkdir(parents=True, exist_ok=True)
        (docs / "index.md").write_text(page)
        picture = base64.b64encode(PIXEL).decode()
        code = nbformat.v4.new_code_cell("print('run')")
        code.outputs = [
            nbformat.v4.new_output("stream", text="\x1b[31mstored, not\x1b[0m executed\n"),
            nbformat.v4.new_output("display_data", data={"image/png": picture}),
            nbformat.v4.new_output("display_data", data={"text/html": "<p>a</p>\n\n<p>*b*</p>", "text/plain": "<x>"}),
        ]
        words = nbformat.v4.new_markdown_cell("# A notebook\n\nSee [home](../index.md).")
        nbformat.write(nbformat.v4.new_notebook(cells=[words, code]), docs / "tutorials" / "sample.ipynb")
        root = ["changelog.md", "contributing/index.md", "security.md"]
        config["nav"] = ["index.md", "tutorials/sample.md"]
        config["validation"] = {"links": config["validation"]["links"]} | {"nav": {"omitted_files": "ignore"}}
        config["exclude_docs"] = "\n".join(root)
        (tmp_path / "mkdocs.yml").write_text(yaml.safe_dump(config))
        return build(tmp_path / "mkdocs.yml", tmp_path / "site")

    return make


def test_every_page_is_in_the_navigation(site):
    text = (ROOT / "mkdocs.yml").read_text()
    pages = [path.relative_to(ROOT / "docs") for path in (ROOT / "docs").rglob("*") if path.suffix in (".md", ".ipynb")]
    missing = [str(page) for page in pages if f": {page.with_suffix('.md').as_posix()}\n" not in text]
    assert not missing
    for page in pages:
        place = page.with_suffix("") if page.stem != "index" else page.parent
        assert (site / place / "index.html").exists()
    assert {"changelog", "contributing", "security"} <= {path.name for path in site.iterdir()}


def test_nothing_is_loaded_from_another_host(site):
    found = {
        str(path.relative_to(site)): hits
        for path in site.rglob("*")
        if path.suffix in (".html", ".css", ".js", ".svg") and (hits := loads(path.read_text("utf-8"), path.suffix))
    }
    assert not found


def test_a_load_from_another_host_is_found():
    """Control."""
    pages = [
        '<script src="https://a.example/x.js"></script>',
        "<img alt='' src='//a.example/x.png'>",
        '<link rel="stylesheet" href="https://a.example/x.css">',
        '@import "https://a.example/x.css";',
        "src: url(https://a.example/x.woff2)",
    ]
    assert all(len(loads(page, ".html")) >= 1 for page in pages)
    assert loads('load("https://unpkg.com/mermaid")', ".js") and loads('import("https://a.example/x.js")', ".js")
    assert not loads('<a href="https://a.example">a source</a> <script src="../x.js"></script>', ".html")


def test_search_has_an_index(site):
    index = (site / "search" / "search_index.json").read_text()
    assert "duo-causal" in index and "equation0of" not in index


def test_equations_and_notebooks(small, tmp_path):
    page = """# Equations

$`x_1`$ begins a line; `$x$` and `` a $`y`$ `` are code.

```math
\\sum_{v} \\pi_v E[v] \\tag{4}
```

```text
$`z`$
```

| a | b |
| --- | --- |
| $`|x|`$ | [(4)](tutorials/sample.ipynb) |
"""
    done = small(page)
    assert done.returncode == 0, done.stdout + done.stderr
    text = (tmp_path / "site" / "index.html").read_text()
    assert text.count("<math") == 3 and '<div class="equation" id="eq-4">' in text and 'href="#eq-4">(4)</a>' in text
    assert "<code>$x$</code>" in text and "<code>a $`y`$</code>" in text and "$`z`$" in text
    assert 'href="tutorials/sample/"' in text and not re.search(r"equation\d+of", text)
    notebook = (tmp_path / "site" / "tutorials" / "sample" / "index.html").read_text()
    assert "stored, not executed" in notebook and 'src="../sample-1.png"' in notebook and 'href="../.."' in notebook
    assert (tmp_path / "site" / "tutorials" / "sample-1.png").read_bytes() == PIXEL
    assert (tmp_path / "site" / "tutorials" / "sample.ipynb").exists() and 'href="../sample.ipynb"' in notebook
    assert "<p>*b*</p></div>" in notebook and "&lt;x&gt;" not in notebook
    assert not loads(text, ".html") and not loads(notebook, ".html")


@pytest.mark.parametrize("link", ["no.md", "#no-anchor", "tutorials/no.ipynb"])
def test_a_link_that_leads_nowhere_stops_the_build(small, link):
    """Control."""
    assert small(f"# Page\n\n[link]({link})\n").returncode != 0


def test_the_page_of_the_configuration_is_current(monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("config_docs", ROOT / "scripts" / "config_docs.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr("sys.argv", ["config_docs.py", "--check"])
    assert script.main() == 0, capsys.readouterr().err
    assert "| `mix_topk` | `int` | `100` | >= 1 |" in script.document()
    monkeypatch.setattr(script, "INTRODUCTION", "# Changed\n")
    assert script.main() == 1


def test_names_of_the_api_pages_exist():
    """mkdocstrings finds them without an import; here they are imported, except those that need vLLM."""
    pages = sorted((ROOT / "docs" / "reference" / "api").glob("*.md"))
    names = [name for page in pages for name in re.findall(r"^::: (\S+)$", page.read_text(), flags=re.M)]
    assert len(names) > 50 and len(names) == len(set(names))
    for module, _, name in (name.rpartition(".") for name in names):
        if not module.startswith("tah.vllm"):
            assert hasattr(importlib.import_module(module), name), f"{module}.{name}"
    import tah

    public = {*tah.__all__, *tah._LATER}
    assert public <= {name.rpartition(".")[2] for name in names}
